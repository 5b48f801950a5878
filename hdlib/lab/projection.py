"""What a run would cost, before it is paid for: hours, operations and memory.

A short run of the same kind says how long a step takes at the widths on the way and how long a prune, the operations
are counted, and the whole run is the sum over its steps. Text and weights are random: neither changes what a step
costs. Exchange between processes is not in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import BertTokenizerFast, PreTrainedModel

from ..config import DistillConfig
from ..data import Blocks, Masking, NextToken, labelled_once
from ..distill import distill
from ..losses import DistillationLoss
from ..widths import Widths, family, set_widths
from .cost import flops, peak_memory

STEPS = 24  # of the run that is measured, every second of which does not prune
WARM = 2  # of them, that are not counted: caches and threads wake up
COUNTED = 12  # shapes of which the operations are counted; those of the others follow
NAMED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Projection:
    """Of a whole run on devices like this one."""

    hours: float
    tokens_per_second: float  # on all devices together
    operations: float  # floating-point operations of all forwards and backwards
    operations_per_second: float  # on one device
    gigabytes: float  # on one device, at most at once


def project(teacher: PreTrainedModel, config: DistillConfig, length: int, processes: int = 1) -> Projection:
    """What a run would take, from some seconds of measuring on this machine.

    Args:
        teacher: of the right shape; its weights do not matter, and it stays as it is.
        config: of the run.
        length: S, tokens a block.
        processes: devices like this one that share out the batch.

    Raises:
        ValueError: a run that cannot be, or a batch that cannot be shared out.
        MemoryError: memory does not suffice for a step.
    """
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared out evenly to {processes} processes")
    config = replace(config, target=config.shape(teacher))
    share = config.batch_size // processes  # blocks a step on one device
    blocks = min(config.micro_batch_size or share, share)

    short = _shortened(config, STEPS, blocks)
    (short_widths, short_prunes), (widths, prunes) = course(teacher, short), course(teacher, config)
    of_block = operations(teacher, {*short_widths, *widths}, config, length)
    seconds = _short_run(teacher, short, length)["seconds"].iloc[1:]  # step 0 measures only
    seconds_of, prune_seconds = _fitted(seconds, [blocks * of_block[each] for each in short_widths], short_prunes)
    total = share * sum(of_block[each] for each in widths)
    seconds = sum(seconds_of(blocks * of_block[each]) for each in widths) * share / blocks
    seconds += prune_seconds * sum(prunes)
    held = peak_memory(lambda: _short_run(teacher, _shortened(config, 3, blocks), length), device())
    tokens = config.steps * config.batch_size * length
    return Projection(seconds / 3600, tokens / seconds, total * processes, total / seconds, held / 1e9)


def course(teacher: PreTrainedModel, config: DistillConfig) -> tuple[list[Widths], list[bool]]:
    """For each step from the first on: the shape that it computes in, and whether neurons are chosen after it."""
    wide, target = Widths.of(teacher), config.shape(teacher)
    now = target if config.initial == "random" else wide
    widths, prunes = [], []
    for step in range(1, config.steps + 1):
        asked = config.widths_at(step, teacher, target)
        after = asked if asked.fits_in(now) else now
        widths.append(wide if config.under_masks else now)  # what is masked computes along
        prunes.append(config.chooses_at(step) if config.under_masks else after != now)
        now = after
    return widths, prunes


def operations(
    teacher: PreTrainedModel, shapes: Iterable[Widths], config: DistillConfig, length: int
) -> dict[Widths, float]:
    """Floating-point operations of a step for one block, at each of these shapes of the student.

    The teacher's forward, and three times the student's. A matrix product is of two widths, or of one with tokens,
    words or a width that stays; so what is counted at some of the shapes tells all the others.
    """
    wide, shapes = Widths.of(teacher), sorted(set(shapes), key=astuple)
    loss_positions = length
    if config.positions == "masked" and not family(teacher).causal:
        loss_positions = max(1, round(config.mask_probability * length))
    reads_teacher = DistillationLoss(1, 1, 1, **config.loss_options()).compares
    theirs = _forward(teacher, wide, length, loss_positions) if reads_teacher else 0.0
    some = sorted(set(np.linspace(0, len(shapes) - 1, COUNTED).round().astype(int)))
    counted = [_forward(teacher, shapes[each], length, loss_positions) for each in some]
    products = np.array([_products(widths, wide) for widths in shapes])  # (shapes, products)
    weights = np.linalg.lstsq(products[some], np.array(counted, dtype=float))[0]
    return dict(zip(shapes, (theirs + 3 * products @ weights).tolist(), strict=True))


def wordless_tokenizer(vocab_size: int, pad_token_id: int | None = None) -> BertTokenizerFast:
    """A tokenizer of so many entries that never reads: for random tokens.

    Args:
        vocab_size: V, with the five named tokens, which come first.
        pad_token_id: where [PAD] is to be instead.
    """
    words = [*NAMED, *(f"w{number}" for number in range(vocab_size - len(NAMED)))]
    if pad_token_id is not None:
        words[0], words[pad_token_id] = words[pad_token_id], words[0]
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


def device() -> torch.device:
    """Where a run computes here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shortened(config: DistillConfig, steps: int, blocks: int) -> DistillConfig:
    """A run of the same kind from the first shape to the last, in a few steps of one micro batch."""
    few = {"steps": steps, "batch_size": blocks, "micro_batch_size": 0, "prune_every": 2, "eval_blocks": 1}
    few |= {"prune_start": 0.25, "prune_end": 0.75, "eval_every": steps, "checkpoint_every": steps}
    return replace(config, **few)


def _short_run(teacher: PreTrainedModel, config: DistillConfig, length: int) -> pd.DataFrame:
    """The record of a run on random text."""
    with tempfile.TemporaryDirectory() as folder:
        data = _random_text(teacher, config, length)
        return distill(deepcopy(teacher), *data, config, Path(folder) / "run").metrics


def _random_text(
    teacher: PreTrainedModel, config: DistillConfig, length: int
) -> tuple[BertTokenizerFast, Blocks, Blocks]:
    """A tokenizer that never reads, and a batch of random tokens for training and held out."""
    vocabulary = teacher.config.vocab_size
    tokenizer = wordless_tokenizer(vocabulary, teacher.config.pad_token_id)
    drawn = {"size": (config.batch_size, length), "generator": torch.Generator().manual_seed(0)}
    tokens = torch.randint(len(NAMED), vocabulary, **drawn)
    task = NextToken() if family(teacher).causal else Masking.of(tokenizer, config.mask_probability)
    return tokenizer, Blocks(tokens), labelled_once(tokens, task, seed=0)


def _fitted(
    seconds: pd.Series, operations: Iterable[float], prunes: Iterable[bool]
) -> tuple[Callable[[float], float], float]:
    """Seconds of a step as a straight line in its operations, and what a prune adds, from the steps of a run."""
    steps = pd.DataFrame({"seconds": list(seconds), "operations": list(operations), "prunes": list(prunes)})
    steps = steps.iloc[WARM:]
    plain = steps[~steps["prunes"]].groupby("operations")["seconds"].median()
    line = np.polynomial.Polynomial.fit(plain.index, plain, min(1, len(plain) - 1))  # all of one size: their median
    pruned = steps[steps["prunes"]]
    extra = pruned["seconds"] - line(pruned["operations"])
    return line, max(0.0, float(extra.median())) if len(extra) else 0.0


def _products(widths: Widths, wide: Widths) -> list[float]:
    """What the operations of a forward are a sum of: the widths as fractions of the teacher's, and their products."""
    hidden, ffn = widths.hidden / wide.hidden, widths.ffn / wide.ffn
    heads = widths.heads * widths.head_dim / (wide.heads * wide.head_dim)
    return [1.0, hidden, ffn, heads, hidden * ffn, hidden * heads, hidden * hidden]


def _forward(teacher: PreTrainedModel, widths: Widths, length: int, loss_positions: int) -> float:
    """Operations of one block through the layers, and through the head where the loss looks."""
    config = deepcopy(teacher.config)
    set_widths(teacher, config, widths)
    return flops(config, length) + 2 * loss_positions * config.hidden_size * (config.hidden_size + config.vocab_size)
