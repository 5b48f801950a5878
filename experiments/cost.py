"""What a run would cost, before it is paid for: `python -m experiments.cost CONFIG.yaml`.

The configuration is one that `python -m hdlib` takes; nothing is downloaded but the teacher's shape. How the hours
are found is told in hdlib/projection.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from hdlib.__main__ import read
from hdlib.lab.projection import device, project
from hdlib.models import language_model_class, shape_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, help="a YAML file as python -m hdlib takes it")
    parser.add_argument("--like", metavar="TYPE", help="take the stock shape of a model type (bert), and no hub")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="devices like this one (default: 1)")
    parser.add_argument("--price", type=float, default=0.0, help="of one device and hour")
    parser.add_argument("--micro", type=int, metavar="N", help="another micro_batch_size")
    parser.add_argument("--teraflops", type=float, help="what another device sustains: the hours on it are told too")
    arguments = parser.parse_args()
    try:
        places, config = read(arguments.config)
        if arguments.micro is not None:
            config = replace(config, micro_batch_size=arguments.micro)
        shape = AutoConfig.for_model(arguments.like) if arguments.like else shape_of(places["teacher"])
        teacher = language_model_class(shape).from_config(shape)
        found = project(teacher, config, places["length"], arguments.processes)
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"{arguments.config}: {error}")
    name = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.config}: {config.steps:,} steps of {config.batch_size:,} x {places['length']} tokens")
    print(
        f"  {found.operations:.3g} floating-point operations, {found.operations_per_second / 1e12:.3g} T a second here"
    )
    print(_line(name, found.hours, arguments) + f", {found.tokens_per_second:,.0f} tokens a second")
    print(f"  {found.gigabytes:.1f} GB at most on each")
    if arguments.teraflops:
        hours = found.operations / arguments.processes / arguments.teraflops / 1e12 / 3600
        print(_line(f"a device that sustains {arguments.teraflops:g} T a second", hours, arguments))


def _line(device: str, hours: float, arguments: argparse.Namespace) -> str:
    money = f", {hours * arguments.processes * arguments.price:,.2f} in all" if arguments.price else ""
    return f"  {hours:,.3g} hours on {arguments.processes} x {device}{money}"


if __name__ == "__main__":
    main()
