"""Every number of a run in one frozen object, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import as_blocks
from .losses import TERMS, DistillationLoss
from .masks import SCOPES
from .models import check_length, check_vocabulary
from .narrowing import check_narrowable
from .schedules import SCHEDULES
from .scorers import SCORERS
from .widths import Widths, family, width_groups


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The arguments of `hdlib.distill`. Raises ValueError, naming the field, for what cannot be."""

    steps: int = 1000  # T, optimiser steps
    batch_size: int = 32  # B, blocks a step over all processes
    micro_batch_size: int = 0  # blocks that go through the models at once, gradients add up; 0: a process's whole share
    target: float | Widths | dict = 0.29  # what is kept of every width, or the shape to reach
    multiple_of: int = 1  # of hidden and feed-forward widths, on the way and for a ratio in the end; 16 is faster
    initial: str = "teacher"  # the student starts as the teacher's copy; or random, fresh weights of the target shape

    schedule: str = "cubic"  # how the kept fraction falls: cubic, linear or one_shot
    prune_start: float = 0.05  # t_i as a fraction of the steps
    prune_end: float = 0.70  # t_f as a fraction of the steps
    prune_every: int = 10  # steps from one prune to the next
    scorer: str = "sensitivity"  # importance: sensitivity, platon, magnitude, movement or random
    smoothing: float = 0.85  # beta, weight of the past in the moving average of the scores
    masked: bool = False  # neurons are masked while training and removed at the end (the dense baseline)
    recover: bool = False  # masked neurons may return until t_f; implies masks
    scope: str = "local"  # the same quota in every layer; or global, one ranking over all layers, under masks only

    mlm: float = 1.0  # weight of the language-model loss, on masked or on next tokens
    prediction: float = 1.0  # weight of KL(teacher || student)
    hidden: float = 1.0  # weight of the hidden-state loss
    attention: float = 1.0  # weight of the attention loss
    embedding: float = 1.0  # weight of the embedding loss
    temperature: float = 1.0  # T of the prediction loss
    attention_target: str = "scores"  # compare attention scores before the softmax, or probs after it
    positions: str = "masked"  # where predictions are compared: masked (causal: all with a next token), or all

    learning_rate: float = 6e-4  # peak, Adam
    warmup: float = 0.1  # fraction of the steps in which the learning rate rises
    weight_decay: float = 0.01  # not on biases, norms and projections
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    eps: float = 1e-6  # of Adam
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    mask_probability: float = 0.15  # share of the tokens that is to be predicted
    precision: str = "auto"  # of matrix products: float32, bfloat16 or the faster one here; weights are float32 always
    seed: int = 0  # of order and masks, and of random weights and scores

    eval_every: int = 50  # steps from one held-out measure to the next
    eval_blocks: int = 64  # held-out blocks measured
    eval_prunes: bool = False  # measure just before and just after every prune too
    checkpoint_every: int = 100  # steps from one checkpoint to the next
    keep_last: int = 2  # checkpoints that stay

    def __post_init__(self):
        if isinstance(self.target, dict):
            unknown = set(self.target) - {field.name for field in fields(Widths)}
            _require(not unknown, f"target: a shape has hidden, ffn, head_dim and heads; got {sorted(unknown)}")
            object.__setattr__(self, "target", Widths(**self.target))
        self._check_types()
        for name in _COUNTS:
            _require(getattr(self, name) >= 1, f"{name} must be at least 1; got {getattr(self, name)}")
        _require(self.micro_batch_size >= 0, f"micro_batch_size is at least 0; got {self.micro_batch_size}")
        for name in ("learning_rate", "max_grad_norm", "eps"):
            _require(getattr(self, name) > 0, f"{name} must be above 0; got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} is one of {', '.join(choices)}; got {value!r}")
        _require(
            0 <= self.prune_start < self.prune_end <= 1,
            f"pruning must start before it ends, both as fractions of the steps in [0, 1]; "
            f"got prune_start={self.prune_start}, prune_end={self.prune_end}",
        )
        start, end = self._pruning_steps()
        _require(
            start < end,
            f"of {self.steps} steps, pruning from {self.prune_start} to {self.prune_end} leaves none: "
            "more steps, or prune_start and prune_end further apart",
        )
        _require(0 <= self.warmup <= 1, f"warmup is a fraction of the steps in [0, 1]; got {self.warmup}")
        _require(0 < self.mask_probability < 1, f"mask_probability is in (0, 1); got {self.mask_probability}")
        _require(0 <= self.smoothing < 1, f"smoothing is in [0, 1); got {self.smoothing}")
        _require(self.weight_decay >= 0, f"weight_decay is at least 0; got {self.weight_decay}")
        _require(
            self.initial == "teacher" or not self.under_masks,
            "masked, recover and scope='global' mask the teacher's copy; initial='random' starts at the target shape",
        )
        if not isinstance(self.target, Widths):
            _require(0 < self.target <= 1, f"target is the fraction of the width to keep, in (0, 1]; got {self.target}")
        DistillationLoss(1, 1, 1, **self.loss_options())  # refuses what it cannot do

    def check(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train, validation, processes: int = 1
    ) -> Widths:
        """The shape that the student will have; ValueError if these arguments cannot make it."""
        width_groups(teacher)
        target = self.shape(teacher)
        check_narrowable(teacher, target)
        check_vocabulary(tokenizer, teacher)
        broken = [name for name, parameter in teacher.named_parameters() if not torch.isfinite(parameter).all()]
        _require(not broken, f"the teacher's weights are not all finite: {', '.join(broken)}")
        train, validation = as_blocks(train), as_blocks(validation)
        for part, blocks in (("training", train), ("validation", validation)):
            _require(len(blocks) > 0, f"the {part} part of the corpus has no blocks")
        _require(
            len(train) >= self.batch_size,
            f"the corpus has {len(train)} blocks, fewer than one batch of {self.batch_size}: "
            "lower batch_size, shorten the blocks or bring more text",
        )
        _require(
            self.batch_size % processes == 0,
            f"batch_size {self.batch_size} cannot be shared out evenly to {processes} processes",
        )
        check_length(len(train[0]["input_ids"]), teacher)
        _require(
            "attention_mask" not in train.column_names,
            "the training blocks have an attention_mask, which the loop would not see: "
            "pass blocks packed without padding, as load_corpus makes them",
        )
        _require("labels" in validation.column_names, "validation has no labels: pass the second result of load_corpus")
        first, causal = validation[0], family(teacher).causal
        _require(
            causal == bool((first["labels"][:-1] == first["input_ids"][1:]).all()),
            f"the teacher predicts {'next' if causal else 'masked'} tokens, but the validation blocks ask for "
            f"{'masked' if causal else 'next'} ones: make them with load_corpus(..., causal={causal})",
        )
        return target

    def shape(self, teacher: PreTrainedModel) -> Widths:
        """The target; of a fraction the nearest shape that a stock model can have. ValueError if there is none."""
        target = Widths.at(teacher, self.target, self.multiple_of) if isinstance(self.target, float) else self.target
        return target.resolved(teacher)

    @property
    def under_masks(self) -> bool:
        """Neurons are masked while training, not removed."""
        return self.masked or self.recover or self.scope == "global"

    def widths_at(self, step: int, teacher: PreTrainedModel, target: Widths) -> Widths:
        """The shape after a step. Between two prunes it is that of the one before.

        Every width follows r(t) = r_f + (1 - r_f) s(t) with an r_f of its own; s is the schedule for
        r_f = 0, the share of the way that is still to go.
        """
        start, end = self._pruning_steps()
        if step < end:
            step -= step % self.prune_every
        progress = 1 - SCHEDULES[self.schedule](step, start, end, 0.0)
        return Widths.of(teacher).between(target, progress, teacher, self.multiple_of)

    def chooses_at(self, step: int) -> bool:
        """Whether neurons are ranked anew after a step: between t_i and t_f, every `prune_every` steps."""
        start, end = self._pruning_steps()
        return start <= step <= end and (step % self.prune_every == 0 or step == end)

    def still_prunes(self, step: int) -> bool:
        """Whether neurons may still be chosen after this step or a later one; beyond t_f nobody asks who matters."""
        return step <= self._pruning_steps()[1]

    def _pruning_steps(self) -> tuple[int, int]:
        """t_i and t_f in steps."""
        return round(self.prune_start * self.steps), max(1, round(self.prune_end * self.steps))

    def loss_options(self) -> dict:
        names = (*TERMS, "temperature", "attention_target", "positions")
        return {name: getattr(self, name) for name in names}

    def scorer_options(self) -> dict:
        return {"smoothing": self.smoothing} | ({"seed": self.seed} if self.scorer == "random" else {})

    def to_dict(self) -> dict:
        """Plain values, as JSON and YAML hold them; `DistillConfig(**d)` makes the same config again."""
        return asdict(self) | {"betas": list(self.betas)}

    def _check_types(self) -> None:
        """YAML gives 3e-4 as a string and no as False: name the field instead of failing later."""
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if field.name in ("target", "betas"):
                continue
            kinds = (int, float) if isinstance(default, float) else type(default)
            if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, kinds):
                raise ValueError(f"{field.name} must be of type {type(default).__name__}; got {_short(value)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite; got {value}")
            if isinstance(value, int) and not -LARGEST < value < LARGEST:
                raise ValueError(f"{field.name} must be below {LARGEST:.0e}; got {_short(value)}")
        if isinstance(self.target, bool) or not isinstance(self.target, (int, float, Widths)):
            raise ValueError(f"target is a fraction or Widths; got {self.target!r}")
        if isinstance(self.target, int):
            object.__setattr__(self, "target", float(self.target))
        pair = isinstance(self.betas, list | tuple) and len(self.betas) == 2
        if not pair or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers in [0, 1); got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]} ..."


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


LARGEST = 10**12  # beyond any whole number that a run could have; more overflows somewhere below
# What a run may go on with changed: it says how the same numbers are had, not which.
MAY_CHANGE = ("micro_batch_size", "checkpoint_every", "keep_last")
_COUNTS = (
    "steps",
    "batch_size",
    "multiple_of",
    "prune_every",
    "eval_every",
    "eval_blocks",
    "checkpoint_every",
    "keep_last",
)
CHOICES = {  # the fields that name something, and the names there are
    "initial": ("teacher", "random"),
    "schedule": tuple(SCHEDULES),
    "scorer": tuple(SCORERS),
    "scope": SCOPES,
    "precision": ("auto", "float32", "bfloat16"),
}
