"""A whole run that narrows, compared with the same run under masks (dense baseline); their steps alternate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from threading import Semaphore

import pandas as pd
import torch
from datasets import Dataset
from transformers import BertConfig

import hdlib
from hdlib.lab import cost
from hdlib.lab.cost import placeholder_tokenizer

from .work import Setting

STEPS = 100  # every tenth prunes, the default
TARGET = 0.29


def measure(setting: Setting) -> pd.DataFrame:
    """Seconds and operations of both runs, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        runs = _in_turns({name: _distilled(setting, masked, Path(folder) / name) for name, masked in ARMS.items()})
        steps = {name: run.metrics.loc[1:] for name, run in runs.items()}
    seconds = {name: float(each["seconds"].sum()) for name, each in steps.items()}
    operations = {name: _operations(setting, each, ARMS[name]) for name, each in steps.items()}
    table = pd.DataFrame({"seconds": seconds, "teraflop": {name: each / 1e12 for name, each in operations.items()}})
    faster, allowed = (table[column]["under masks"] / table[column]["narrowing"] for column in table)
    table.loc["ratio"] = [faster, allowed]
    table.loc["share of what is allowed"] = [faster / allowed, 1.0]
    return table.rename_axis("run")


ARMS = {"narrowing": False, "under masks": True}


def _distilled(setting: Setting, masked: bool, folder: Path) -> Callable[[Callable[[dict], None]], hdlib.Run]:
    config = hdlib.DistillConfig.paper(
        steps=STEPS,
        batch_size=setting.batch_size,
        target=TARGET,
        masked=masked,
        precision=setting.precision,
        eval_every=STEPS,
        eval_blocks=1,
        checkpoint_every=STEPS,
    )
    blocks = torch.randint(1000, 30000, (STEPS * setting.batch_size, setting.length), generator=torch.Generator())
    train = Dataset.from_dict({"input_ids": blocks.tolist()})
    masked_words = {"input_ids": blocks[:1].tolist(), "labels": blocks[:1].tolist()}
    data = (placeholder_tokenizer(BertConfig().vocab_size), train, Dataset.from_dict(masked_words), config, folder)
    return lambda on_step: hdlib.distill(setting.teacher(), *data, on_step=on_step)


def _in_turns(distilled: dict[str, Callable]) -> dict[str, hdlib.Run]:
    """Run all of them, each in its own thread; one thread at a time executes a step."""
    turns = {name: Semaphore(number == 0) for number, name in enumerate(distilled)}
    following = dict(zip(turns, [*list(turns)[1:], next(iter(turns))], strict=True))

    def run(name: str) -> hdlib.Run:
        def hand_over(record: dict) -> None:
            turns[following[name]].release()
            turns[name].acquire()

        turns[name].acquire()
        try:
            return distilled[name](hand_over)
        finally:
            turns[following[name]].release()

    with ThreadPoolExecutor(len(distilled)) as pool:
        return dict(zip(distilled, pool.map(run, distilled), strict=True))


def _operations(setting: Setting, steps: pd.DataFrame, masked: bool) -> float:
    """Floating-point operations of all forward and backward passes (backward: 2 x forward), without the losses."""
    wide = setting.teacher()
    teacher = _forward(wide.config, setting)
    total = 0.0
    for widths in steps[["hidden_size", "intermediate_size"]].itertuples():
        config = deepcopy(wide.config)
        if not masked:
            config.hidden_size, config.intermediate_size = int(widths.hidden_size), int(widths.intermediate_size)
        total += teacher + 3 * _forward(config, setting)
    return total


def _forward(config: BertConfig, setting: Setting) -> float:
    """Operations of one batch through the layers, and through the head at 15 % of the positions."""
    head = 2 * config.hidden_size * (config.hidden_size + config.vocab_size)
    return setting.batch_size * (cost.flops(config, setting.length) + 0.15 * setting.length * head)
