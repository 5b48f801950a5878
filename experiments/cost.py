"""The cost of a run before it starts: `python -m experiments.cost CONFIG.yaml`.

The configuration is that of `python -m hdlib`. Of a teacher on the hub only the config is downloaded.
`hdlib.lab.cost.project` describes the method.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from hdlib.__main__ import read
from hdlib.lab.cost import project
from hdlib.models import language_model_class, shape_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, help="a YAML file as for python -m hdlib")
    parser.add_argument("--like", metavar="TYPE", help="use the stock shape of a model type (bert) instead of the hub")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="devices like this one (default: 1)")
    parser.add_argument("--price", type=float, default=0.0, help="of one device for one hour")
    parser.add_argument("--micro", type=int, metavar="N", help="another micro_batch_size")
    parser.add_argument("--teraflops", type=float, help="sustained by another device: also print the hours on it")
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
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.config}: {config.steps:,} steps of {config.batch_size:,} x {places['length']} tokens")
    print(f"  {found.operations:.3g} floating-point operations, {found.operations_per_second / 1e12:.3g} TFLOP/s here")
    print(_line(name, found.hours, arguments) + f", {found.tokens_per_second:,.0f} tokens a second")
    print(f"  {found.gigabytes:.1f} GB peak memory on each")
    if arguments.teraflops:
        hours = found.operations / arguments.processes / arguments.teraflops / 1e12 / 3600
        print(_line(f"a device with {arguments.teraflops:g} TFLOP/s", hours, arguments))


def _line(device: str, hours: float, arguments: argparse.Namespace) -> str:
    price = f", {hours * arguments.processes * arguments.price:,.2f} in total" if arguments.price else ""
    return f"  {hours:,.3g} hours on {arguments.processes} x {device}{price}"


if __name__ == "__main__":
    main()
