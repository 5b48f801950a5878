"""From a budget to a shape: shapes within it, what each costs, and the loss that is predicted for it.

    table = hdlib.lab.shapes(teacher, tokenizer, *blocks, hdlib.lab.Budget(parameters=20e6, milliseconds=10))
    config = hdlib.DistillConfig(target=table["shape"][0])

A run is given a shape and not a budget: latency differs between devices and minutes, and a run must resume as it began.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import compress, product

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import DistillConfig
from ..data import Masking, NextToken, TrainingBatches, as_blocks, batches, sample
from ..discrepancy import main_measure
from ..models import frozen_copy, is_encoder
from ..narrowing import narrow, stock_model
from ..rotation import rotate_heads
from ..training import Training
from ..widths import Widths, family
from .cost import fitted_count, flops, latency, shape_config

SCORED, BLOCKS = 4, 8  # batches that are read for scores and moments, and blocks of each
ROTATED = 32  # blocks whose moments decide how heads are rotated
HELD_OUT = 16  # blocks on which shapes are compared
PATH = 256  # shapes on the way from the teacher to a narrow shape
FIRST_STEP = 0.125  # of a width of the teacher, between the best shape and those beside it
TIMED = 0.25  # fraction of one width that is kept, in the shapes that are timed for the fit of latencies
REPEATS = 5  # of a timed forward


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a model may cost; None: any. Raises ValueError without a limit, or for one that is not above 0."""

    parameters: float | None = None  # all of them, tied ones once
    megabytes: float | None = None  # of the weights in float32; 10^6 bytes
    flops: float | None = None  # floating-point operations of a forward of one sequence, without the head
    milliseconds: float | None = None  # of a forward of one sequence on the device of the teacher, with the head

    def __post_init__(self):
        if not (limits := self.limits):
            raise ValueError(f"the budget has no limit: give one of {', '.join(each.name for each in fields(self))}")
        for name, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
                raise ValueError(f"{name}={limit} is no limit of a budget: take a number above 0")

    @property
    def limits(self) -> dict[str, float]:
        return {name: limit for name, limit in asdict(self).items() if limit is not None}


def shapes(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train,
    validation,
    budget: Budget,
    *,
    count: int = 20,
    length: int = 128,
    multiple_of: int = 1,
    include: Iterable[Widths] = (),
) -> pd.DataFrame:
    """Shapes that use up a budget, the best one first.

    Half of them, at most, on the straight ways from the teacher on which some widths fall and the others stay; then
    those beside the best one. The feed-forward width is the one that the budget leaves.

    Args:
        teacher, tokenizer, train, validation: as for `hdlib.distill`; not changed.
        count: number of shapes, at most.
        length: S, tokens of the sequence whose operations are counted and whose forward is timed.
        multiple_of: divides hidden and ffn; 8 or 16 on GPUs.
        include: shapes to compare with those found, if they are within the budget.

    Returns:
        A row a shape: `shape` (Widths), its widths, the costs that a Budget limits, and `predicted`: the held-out KL
        in nats, for sentence encoders the cosine distance, after one compensated prune without training, times the
        square root of the teacher's layers over those of the shape. It orders shapes by their loss after training and
        is far above it.

    Raises ValueError for a budget below the smallest shape, and for what `hdlib.distill` refuses.
    """
    names = _changeable(teacher)
    costs = _Costs(teacher, names, length)
    config = _config(teacher, costs.smallest)
    config.check(teacher, tokenizer, train, validation)
    fits = costs.within(budget.limits)
    training = _scored(teacher, tokenizer, train, validation, config)
    ways = _Ways(teacher, names, fits, multiple_of)

    def row(shape: Widths) -> dict:
        return {"shape": shape} | asdict(shape) | costs.counted(shape) | _measured(training, shape, costs.milliseconds)

    given = filter(fits, (shape.resolved(teacher) for shape in include))

    def order(shape: Widths) -> tuple[bool, float]:
        return any(rows[shape][name] > limit for name, limit in budget.limits.items()), rows[shape]["predicted"]

    rows, new, step = {}, [*dict.fromkeys([*given, *ways.straight()[: max(1, count // 2)]])], FIRST_STEP
    while len(rows) < count and step > 0.02:
        rows |= {shape: row(shape) for shape in new[: count - len(rows)]}
        new = [shape for shape in ways.beside(min(rows, key=order), step) if shape not in rows]
        step = step if new else step / 2
    table = pd.DataFrame(rows.values()).sort_values("predicted", ignore_index=True)
    within = table[table[[*budget.limits]].le(budget.limits).all(axis=1)].reset_index(drop=True)
    if not len(within):
        way_out = f"the nearest took {table['milliseconds'].min():.3g} milliseconds; raise these, or lower other limits"
        raise ValueError(f"no shape was measured within {budget}: {way_out}")
    return within


def _config(teacher: PreTrainedModel, target: Widths) -> DistillConfig:
    """Of a few steps without an update. The student is the teacher, where distillation terms have no gradient."""
    steps = {"steps": SCORED, "batch_size": BLOCKS, "schedule": "one_shot", "prune_start": 0.0, "prune_end": 1.0}
    weights = dict.fromkeys(("hidden", "attention", "embedding"), 0.0) | {"prediction": float(is_encoder(teacher))}
    # The recipe of the ledger's correlation: sensitivity is also cheaper than reconstruction.
    return DistillConfig.paper(target=target, compensate=True, precision="float32", **steps, **weights)


def _changeable(teacher: PreTrainedModel) -> list[str]:
    """The widths that can change alone."""
    linked, names = {"hidden"} if family(teacher).linked else set(), []
    for name in (each.name for each in fields(Widths) if each.name not in linked):
        try:
            names += [name] if _narrowed(teacher, {name: 0.0}) != Widths.of(teacher) else []
        except ValueError:  # the message says why this width is fixed
            continue
    return names


def _narrowed(teacher: PreTrainedModel, ratios: dict[str, float]) -> Widths:
    """The possible shape with about these fractions of the teacher's widths; others follow, or stay."""
    wide, linked = Widths.of(teacher), family(teacher).linked
    sizes = {name: max(1, round(ratio * getattr(wide, name))) for name, ratio in ratios.items()}
    if "heads" in sizes and not linked:  # query heads that share a key/value head stay together
        sizes["heads"] = Widths.at(teacher, max(ratios["heads"], 1e-9)).heads
    if "hidden" in sizes:
        heads = sizes.get("heads", wide.heads)
        sizes["hidden"] = -(-sizes["hidden"] // heads) * heads
    return Widths(**sizes).resolved(teacher)


class _Ways:
    """Shapes that use up a budget. `fits` is whether a shape is within it."""

    def __init__(self, teacher: PreTrainedModel, names: list[str], fits: Callable[[Widths], bool], multiple_of: int):
        self.teacher, self.names, self.fits, self.multiple_of = teacher, names, fits, multiple_of
        self.wide = Widths.of(teacher)

    def straight(self) -> list[Widths]:
        """On the straight ways from the teacher on which some widths fall, all as fast, and the others stay."""
        chosen = [
            set(compress(self.names, each)) for each in product((True, False), repeat=len(self.names)) if any(each)
        ]
        ends = [_narrowed(self.teacher, dict.fromkeys(falling, 0.0)) for falling in chosen]
        return self._filled(self._first(self.wide, end) for end in ends)

    def beside(self, shape: Widths, step: float) -> list[Widths]:
        """Shapes of which one width is more or less by this fraction of the teacher's."""
        ratios = {name: getattr(shape, name) / getattr(self.wide, name) for name in self.names if name != "ffn"}
        found = []
        for name, move in product(ratios, (-step, step)):
            with suppress(ValueError):  # the hidden width of the embeddings
                found.append(_narrowed(self.teacher, ratios | {name: min(1.0, max(0.0, ratios[name] + move))}))
        return self._filled(found)

    def _filled(self, found: Iterable[Widths | None]) -> list[Widths]:
        """With the widest ffn, the finest of the widths, that the budget allows; without those outside of it."""
        ways = ((replace(shape, ffn=self.wide.ffn), replace(shape, ffn=1)) for shape in found if shape)
        return list(dict.fromkeys(filter(None, (self._first(*way) for way in ways))))

    def _first(self, wide: Widths, narrow: Widths) -> Widths | None:
        """The first shape within the budget on the way between two; None if there is none."""

        def at(step: int) -> Widths:
            return wide.between(narrow, step / PATH, self.teacher, self.multiple_of)

        shape = at(bisect_left(range(PATH), True, key=lambda step: self.fits(at(step))))
        return shape if self.fits(shape) else None


class _Costs:
    """Costs of shapes that need no weights; a latency is fitted to those of a few shapes."""

    def __init__(self, teacher: PreTrainedModel, names: list[str], length: int):
        self.teacher, self.names, self.length, self.wide = teacher, names, length, Widths.of(teacher)
        self.smallest = _narrowed(teacher, dict.fromkeys(names, 0.0))
        self.of_teacher = self._timed(teacher, 4 * REPEATS)

    def milliseconds(self, model: PreTrainedModel) -> float:
        """Of a forward of one sequence while the teacher, timed just before, takes as long as at first."""
        of_teacher = self._timed(self.teacher)
        return self._timed(model) * (self.of_teacher / of_teacher)

    def _timed(self, model: PreTrainedModel, repeats: int = REPEATS) -> float:
        """Alone, as in use: in turns with others, small weights leave the cache."""
        return latency({"": model}, 1, self.length, repeats)[""]

    def parameters(self, shape: Widths) -> int:
        return stock_model(self.teacher, shape).num_parameters()

    def flops(self, shape: Widths) -> int:
        return flops(shape_config(self.teacher, shape), self.length)

    def counted(self, shape: Widths) -> dict[str, float]:
        parameters = self.parameters(shape)
        return {"parameters": parameters, "megabytes": 4e-6 * parameters, "flops": self.flops(shape)}

    def within(self, limits: dict[str, float]) -> Callable[[Widths], bool]:
        """Whether a shape is within a budget. Raises ValueError if the smallest one is not."""
        parameters = self._fitted(self.parameters)
        measures = {"parameters": parameters, "megabytes": lambda shape: 4e-6 * parameters(shape)}
        if {"flops", "milliseconds"} & limits.keys():
            measures["flops"] = self._fitted(self.flops)
        if "milliseconds" in limits:
            measures["milliseconds"] = self._milliseconds(measures["flops"])
        for name, limit in limits.items():
            if (least := measures[name](self.smallest)) > limit:
                reason = f"{name}={limit:g} is below the {least:.4g} of the smallest shape, {self.smallest}"
                raise ValueError(f"no shape is within the budget: {reason}; raise it, or trim the vocabulary first")
        return lambda shape: all(measures[name](shape) <= limit for name, limit in limits.items())

    def _fitted(self, count: Callable[[Widths], int]) -> Callable[[Widths], int]:
        ratios = product((0.1, 0.6, 1.0), repeat=len(self.names))
        some = [_narrowed(self.teacher, dict(zip(self.names, each, strict=True))) for each in ratios]
        fitted = fitted_count(count, some, self.wide)
        return cache(lambda shape: round(fitted(shape)))

    def _milliseconds(self, count: Callable[[Widths], int]) -> Callable[[Widths], float]:
        alone = [_narrowed(self.teacher, dict.fromkeys(self.names, 1.0) | {name: TIMED}) for name in self.names]
        timed = {}
        for shape in (self.smallest, self.wide, *alone):
            model = deepcopy(self.teacher)
            narrow(model, shape)
            timed[shape] = self.milliseconds(model)

        def terms(shape: Widths) -> np.ndarray:
            return np.array([1.0, shape.layers, count(shape), shape.hidden])  # the head costs in proportion to hidden

        design = np.array([terms(shape) / timed[shape] for shape in timed])  # the errors are relative
        scale = design.max(0)
        weights = nnls(design / scale, np.ones(len(timed)))[0] / scale
        return lambda shape: float(weights @ terms(shape))


def _scored(teacher, tokenizer, train, validation, config: DistillConfig) -> Training:
    """The state of a run with the scores and moments of a few batches, whose student is the rotated teacher."""
    teacher = deepcopy(frozen_copy(teacher, teacher.device))
    rotate_heads(teacher, batches(sample(train, ROTATED), BLOCKS, teacher.device))
    training = Training.begin(teacher, config.target, sample(validation, HELD_OUT), config, None)
    task = NextToken() if family(teacher).causal else Masking.of(tokenizer, config.mask_probability)
    data = TrainingBatches(as_blocks(train), None if is_encoder(teacher) else task, BLOCKS, config.seed)
    for step in range(SCORED):
        training.start_step(step)
        training.forward_backward(data[step])
        training.score()
        training.optimizer.zero_grad()
    return training


def _measured(training: Training, shape: Widths, milliseconds: Callable[[PreTrainedModel], float]) -> dict[str, float]:
    """Latency, and discrepancy after one compensated prune, of a copy of the student."""
    shared = (training.teacher, training.cast_teacher, training.held_out)
    training.choose_leaving(training.widths.layers - shape.layers)
    pruned = deepcopy(training, {id(each): each for each in shared})
    pruned.prune(shape)
    jump = pruned.discrepancy()[main_measure(training.teacher)]
    # Training makes less good for layers than for widths: the ledger has the fit of this root and its test on a second
    # teacher.
    return {
        "milliseconds": milliseconds(pruned.student),
        "predicted": jump * (training.widths.layers / shape.layers) ** 0.5,
    }
