"""What a run would cost, before it is paid for: `python -m experiments.cost CONFIG.yaml`.

The configuration is one that `python -m hdlib` takes; nothing is downloaded but the teacher's shape, weights and text
are random. A short run on this machine says how long a step takes at the widths on the way and how long a prune, the
operations are counted, and the whole run is the sum over its steps. Exchange between processes is not in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoConfig, BertTokenizerFast, PreTrainedConfig, PreTrainedModel

import hdlib
from hdlib.__main__ import read
from hdlib.config import DistillConfig
from hdlib.cost import flops, peak_memory
from hdlib.data import Masking, NextToken, labelled_once
from hdlib.models import EMBEDDED_TEACHER, language_model_class
from hdlib.widths import Widths, family, set_widths

from .report import MASKED

STEPS = 24  # of the run that is measured, every second of which does not prune
WARM = 2  # of them, that are not counted: caches and threads wake up


@dataclass(frozen=True)
class Projection:
    """Of a whole run on devices like this one."""

    hours: float
    tokens_per_second: float  # on all devices together
    operations: float  # floating-point operations of all forwards and backwards
    operations_per_second: float  # on one device
    gigabytes: float  # on one device, at most at once


def project(teacher: PreTrainedModel, config: DistillConfig, length: int, processes: int = 1) -> Projection:
    """What a run would take.

    Args:
        teacher: of the right shape; its weights do not matter.
        config: of the run.
        length: S, tokens a block.
        processes: devices like this one that share out the batch.
    """
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared out evenly to {processes} processes")
    target = config.shape(teacher)
    share = config.batch_size // processes  # blocks a step on one device
    blocks = min(config.micro_batch_size or share, share)

    @cache
    def operations(widths: Widths) -> float:
        """Of one micro batch: the teacher's forward, and three times the student's."""
        return blocks * (_forward(teacher, Widths.of(teacher), length) + 3 * _forward(teacher, widths, length))

    wide = Widths.of(teacher)
    measured = _short_run(teacher, replace(config, target=target), blocks, length, STEPS)
    seconds_of, prune_seconds = _fitted(measured, operations)
    widths = [wide, *(config.widths_at(step, teacher, target) for step in range(1, config.steps + 1))]
    total = sum(operations(each) for each in widths[:-1]) * share / blocks
    seconds = sum(seconds_of(operations(each)) for each in widths[:-1]) * share / blocks
    seconds += prune_seconds * sum(one != other for one, other in pairwise(widths))
    held = peak_memory(lambda: _short_run(teacher, replace(config, target=target), blocks, length, 3), _device())
    held += sum(parameter.nbytes for parameter in teacher.parameters())
    tokens = config.steps * config.batch_size * length
    return Projection(seconds / 3600, tokens / seconds, total * processes, total / seconds, held / 1e9)


def _short_run(teacher: PreTrainedModel, config: DistillConfig, blocks: int, length: int, steps: int) -> pd.DataFrame:
    """The record of a run of the same kind from the teacher's widths to the target, in a few steps."""
    few = {"steps": steps, "batch_size": blocks, "micro_batch_size": 0, "prune_every": 2, "eval_blocks": 1}
    few |= {"prune_start": 0.25, "prune_end": 0.75, "eval_every": steps, "checkpoint_every": steps}
    with tempfile.TemporaryDirectory() as folder:
        data = _random_text(teacher, length, blocks)
        return hdlib.distill(deepcopy(teacher), *data, replace(config, **few), Path(folder) / "run").metrics


def _random_text(teacher: PreTrainedModel, length: int, count: int) -> tuple[BertTokenizerFast, Dataset, Dataset]:
    """A tokenizer that never reads, and blocks of random tokens for training and held out."""
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = named + [f"w{number}" for number in range(teacher.config.vocab_size - len(named))]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    tokens = torch.randint(len(named), len(words), (count, length), generator=torch.Generator().manual_seed(0))
    task = NextToken() if family(teacher).causal else Masking.of(tokenizer)
    return tokenizer, Dataset.from_dict({"input_ids": tokens.tolist()}), labelled_once(tokens, task, seed=0)


def _fitted(metrics: pd.DataFrame, operations) -> tuple[Callable[[float], float], float]:
    """Seconds of a step as a straight line in its operations, and what a prune adds, from a run's record."""
    names = ["hidden_size", "intermediate_size", "head_dim", "num_heads"]
    after = [Widths(*map(int, row)) for row in metrics[names].itertuples(index=False)]  # step 0 first
    steps = pd.DataFrame({"before": after[:-1], "after": after[1:], "seconds": metrics["seconds"].iloc[1:]})
    steps["operations"] = [operations(widths) for widths in steps["before"]]
    steps, pruned = steps.iloc[WARM:], (steps["before"] != steps["after"]).iloc[WARM:]
    plain = steps[~pruned].groupby("operations")["seconds"].median()
    line = np.polynomial.Polynomial.fit(plain.index, plain, 1)
    extra = steps[pruned]["seconds"] - line(steps[pruned]["operations"])
    return line, max(0.0, float(extra.median()))


def _forward(teacher: PreTrainedModel, widths: Widths, length: int) -> float:
    """Operations of one block through the layers, and through the head where the loss looks."""
    config = deepcopy(teacher.config)
    set_widths(teacher, config, widths)
    looked_at = length if family(teacher).causal else round(MASKED * length)
    return flops(config, length) + 2 * looked_at * config.hidden_size * (config.hidden_size + config.vocab_size)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        shape = AutoConfig.for_model(arguments.like) if arguments.like else _shape(places["teacher"])
        teacher = language_model_class(shape).from_config(shape)
        found = project(teacher, config, places["length"], arguments.processes)
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"{arguments.config}: {error}")
    name = torch.cuda.get_device_name() if _device().type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
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


def _shape(teacher: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(EMBEDDED_TEACHER if teacher == "embedded" else teacher, trust_remote_code=False)


if __name__ == "__main__":
    main()
