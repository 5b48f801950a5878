"""All settings of a run in one frozen object, checked at construction."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date

import torch
from transformers import PreTrainedModel

from .data import Sentences, as_blocks, longest
from .losses import TERMS, DistillationLoss
from .masks import SCOPES
from .models import check_length, check_teacher, check_vocabulary, is_encoder
from .narrowing import check_narrowable
from .schedules import SCHEDULES
from .scorers import SCORERS
from .widths import Widths, family, width_groups


def option(default, help: str, least: int | None = None):
    """A field with its description and its lowest value; both are in `field.metadata`."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The settings of `hdlib.distill`. Raises ValueError for an impossible value, naming the field."""

    # Size of the run and of the student
    steps: int = option(1000, "T, optimiser steps", least=1)
    batch_size: int = option(32, "B, blocks per step over all processes", least=1)
    micro_batch_size: int = option(0, "blocks per forward pass; gradients add up; 0: all blocks of a process", least=0)
    target: float | Widths | dict = option(0.29, "fraction of every width to keep, or the shape to reach")  # noqa: RUF009
    multiple_of: int = option(
        1, "divides hidden and feed-forward widths, except a given target's; 8 on GPUs, odd widths are slow", least=1
    )
    initial: str = option("teacher", "student at step 0: a copy of the teacher, or random weights of the target shape")

    # Pruning, from step t_i to step t_f
    schedule: str = option("cubic", "how the kept fraction falls: cubic, linear or one_shot")
    prune_start: float = option(0.05, "t_i as a fraction of the steps")
    prune_end: float = option(0.5, "t_f as a fraction of the steps")
    prune_every: int = option(10, "steps between two prunes", least=1)
    scorer: str = option("reconstruction", "importance, by one of hdlib.scorers.SCORERS")
    smoothing: float = option(0.85, "beta, weight of the past in the moving average of the scores")
    masked: bool = option(False, "mask neurons during training and remove them at the end (the dense baseline)")
    recover: bool = option(False, "masked neurons may return until t_f; implies masks")
    rotate: bool = option(True, "rotate heads before the first step, so that few dimensions carry most of them")
    compensate: bool = option(True, "fold what a prune removes into the weights that stay, by least squares")
    scope: str = option("local", "local: one quota for all layers; global: one ranking of all, leaves no stock student")

    # Loss
    mlm: float = option(1.0, "weight of the language-model loss, on masked or on next tokens")
    prediction: float = option(
        10.0, "weight of KL(teacher || student); sentence encoders: of their distance, best at 1"
    )
    hidden: float = option(1.0, "weight of the hidden-state loss")
    attention: float = option(1.0, "weight of the attention loss")
    embedding: float = option(1.0, "weight of the embedding loss")
    similarity: float = option(0.0, "sentence encoders: weight of KL(teacher || student) of similarities in a batch")
    temperature: float = option(1.0, "temperature of the prediction loss; sentence encoders: of similarities, 0.05")
    attention_target: str = option("scores", "attention loss: on scores before the softmax, or on probs after it")
    positions: str = option("masked", "prediction loss: masked positions (causal: all with a next token), or all")

    # Optimisation
    learning_rate: float = option(1e-3, "peak learning rate of Adam; narrow teachers need more, 4e-3 at a width of 180")
    warmup: float = option(0.1, "fraction of the steps in which the learning rate rises; the first prunes fall into it")
    weight_decay: float = option(0.01, "weight decay, not on biases, norms and projections", least=0)
    betas: tuple[float, float] = option((0.9, 0.999), "betas of Adam")
    eps: float = option(1e-6, "epsilon of Adam")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    mask_probability: float = option(0.4, "fraction of tokens to predict")
    precision: str = option("auto", "of matrix products: float32, bfloat16 or the faster one here; weights are float32")
    seed: int = option(0, "seed of data order, masking, random weights and random scores")

    # Measures and checkpoints
    eval_every: int = option(100, "steps between two held-out measures", least=1)
    eval_blocks: int = option(512, "held-out blocks to measure on, drawn over all of them", least=1)
    eval_prunes: bool = option(False, "also measure just before and just after every prune")
    checkpoint_every: int = option(100, "steps between two checkpoints", least=1)
    keep_last: int = option(2, "number of checkpoints to keep", least=1)

    @classmethod
    def paper(cls, **changes) -> DistillConfig:
        """The recipe of the paper, as far as it is known (`experiments/paper`), with changes. Masks need it."""
        return cls(**PAPER | changes)

    def __post_init__(self):
        if isinstance(self.target, dict):
            names = [width.name for width in fields(Widths)]
            unknown = sorted(map(str, set(self.target) - {*names}))
            _require(not unknown, f"target has no width {unknown}: give {', '.join(names)}")
            object.__setattr__(self, "target", Widths(**self.target))
        self._check_types()
        for name in ("learning_rate", "max_grad_norm", "eps"):
            _require(getattr(self, name) > 0, f"{name} must be above 0; got {getattr(self, name)}")
        _require(0 <= self.warmup <= 1, f"warmup must be in [0, 1]; got {self.warmup}")
        _require(0 <= self.smoothing < 1, f"smoothing must be in [0, 1); got {self.smoothing}")
        _require(0 < self.mask_probability < 1, f"mask_probability must be in (0, 1); got {self.mask_probability}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} is one of {', '.join(choices)}; got {_short(value)}")
        pruning = f"prune_start={self.prune_start}, prune_end={self.prune_end}"
        fractions = 0 <= self.prune_start < self.prune_end <= 1
        _require(fractions, f"{pruning}: pruning must start before it ends, in fractions of the steps from 0 to 1")
        start, end = self._pruning_steps()
        _require(start < end, f"{pruning}: no step of {self.steps} lies between them; raise steps or prune_end")
        if self.under_masks and self.initial != "teacher":
            wide = "masked, recover and scope='global' mask a copy of the teacher; take initial='teacher'"
            raise ValueError(f"initial='random' starts at the target shape, but {wide}")
        if self.under_masks and self.compensate:
            masks = "masked, recover and scope='global' keep every weight, which compensate=True changes for good"
            raise ValueError(f"{masks}: take DistillConfig.paper(...), or compensate=False and scorer='sensitivity'")
        if self.scorer == "reconstruction" and not self.compensate:
            raise ValueError("scorer='reconstruction' ranks by the error after a fold: set compensate=True or scorer")
        DistillationLoss(1, 1, 1, **self.loss_options())  # checks its own options

    def check(self, teacher: PreTrainedModel, tokenizer, train, validation, processes: int = 1) -> Widths:
        """The student's final shape. Raises ValueError if a run with these arguments is impossible."""
        width_groups(teacher)
        check_teacher(teacher)
        target = self.shape(teacher)
        check_narrowable(teacher, target)
        check_vocabulary(tokenizer, teacher)
        broken = [name for name, parameter in teacher.named_parameters() if not torch.isfinite(parameter).all()]
        _require(not broken, f"the teacher's weights are not all finite: {', '.join(broken)}; take another checkpoint")
        if self.batch_size % processes:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of the {processes} processes: take one")
        train, validation = as_blocks(train), as_blocks(validation)
        self._check_kind(teacher, train, validation, processes)
        self._check_blocks(train, validation, teacher.config.vocab_size)
        if not is_encoder(teacher):
            self._check_labels(train, validation, family(teacher).causal)
        check_length(longest(train), teacher)
        return target

    def _check_kind(self, teacher: PreTrainedModel, train, validation, processes: int) -> None:
        """Whether the text and the loss suit a language model or a sentence encoder."""
        encoder, reads = is_encoder(teacher), {isinstance(part, Sentences) for part in (train, validation)}
        if reads != {encoder}:
            kind, loader = ("sentence encoder", "load_sentences") if encoder else ("language model", "load_corpus")
            raise ValueError(f"the teacher is a {kind}: pass the text that {loader} returns, training and validation")
        if not encoder:
            _require(not self.similarity, "similarity compares embeddings, which a language model has not: set it to 0")
            return
        teacher.sentence_pooling.prompt(train.prompt)
        terms = ", ".join(ENCODER_TERMS)
        weighted = any(getattr(self, name) for name in ENCODER_TERMS)
        _require(weighted, f"a sentence encoder has no mlm term: set a weight above 0 for one of {terms}")
        allowed = not self.similarity or (processes == 1 and not self.micro_batch_size)
        _require(allowed, "similarity needs the whole batch: use micro_batch_size=0 and one process")

    def _check_blocks(self, train, validation, vocabulary: int) -> None:
        for part, blocks in (("training", train), ("validation", validation)):
            _require(len(blocks) > 0, f"the {part} part of the corpus has no blocks: pass more text")
            ids = blocks[: self.batch_size]["input_ids"]  # a sample: all blocks of a corpus are made together
            _require(isinstance(ids, torch.Tensor), f"the {part} blocks differ in length: cut them to the same")
            if ids.min() < 0 or ids.max() >= vocabulary:
                outside = f"token ids outside of 0 to {vocabulary - 1}"
                raise ValueError(f"the {part} blocks hold {outside}: make them with the teacher's tokenizer")
        if len(train) < self.batch_size:
            fewer = f"{len(train)} blocks, fewer than one batch of {self.batch_size}"
            raise ValueError(f"the corpus has {fewer}: lower batch_size or the length of the blocks, or pass more text")

    def _check_labels(self, train, validation, causal: bool) -> None:
        if "attention_mask" in [*train.column_names, *validation.column_names]:
            raise ValueError("a run ignores attention_mask: pass blocks packed without padding, as by load_corpus")
        _require("labels" in validation.column_names, "validation has no labels: pass the second result of load_corpus")
        first = validation[0]
        if causal != bool((first["labels"][:-1] == first["input_ids"][1:]).all()):
            own, other = ("next", "masked") if causal else ("masked", "next")
            labels = f"the validation labels are of {other} ones: make them with load_corpus(..., causal={causal})"
            raise ValueError(f"the teacher predicts {own} tokens, but {labels}")

    def shape(self, teacher: PreTrainedModel) -> Widths:
        """The target shape; for a fraction, the nearest possible one. Raises ValueError if there is none."""
        target = Widths.at(teacher, self.target, self.multiple_of) if isinstance(self.target, float) else self.target
        shape, depth = target.resolved(teacher), Widths.of(teacher).layers
        if self.under_masks and shape.layers < depth:
            masks = "masked, recover and scope='global' use masks, which layers cannot have"
            raise ValueError(f"layers={shape.layers}: {masks}; take layers={depth}, or leave them out")
        return shape

    @property
    def under_masks(self) -> bool:
        """Whether neurons are masked during training instead of removed."""
        return self.masked or self.recover or self.scope == "global"

    def widths_at(self, step: int, teacher: PreTrainedModel, target: Widths) -> Widths:
        """The shape after a step; between two prunes, that of the earlier one.

        Every width follows r(t) = r_f + (1 - r_f) s(t) with its own final fraction r_f; s is the schedule for r_f = 0.
        Layers leave at any step.
        """
        layers = math.ceil(self.depth_at(step, teacher, target))
        start, end = self._pruning_steps()
        if step < end:
            step -= step % self.prune_every
        progress = 1 - SCHEDULES[self.schedule](step, start, end, 0.0)
        return replace(Widths.of(teacher).between(target, progress, teacher, self.multiple_of), layers=layers)

    def depth_at(self, step: int, teacher: PreTrainedModel, target: Widths) -> float:
        """The depth after a step, which follows the schedule too: 3.4 are three layers and one that is faded to 0.4."""
        wide, (start, end) = Widths.of(teacher).layers, self._pruning_steps()
        return target.layers + (wide - target.layers) * SCHEDULES[self.schedule](step, start, end, 0.0)

    def chooses_at(self, step: int) -> bool:
        """Whether neurons are ranked again after a step: from t_i to t_f, every `prune_every` steps."""
        start, end = self._pruning_steps()
        return start <= step <= end and (step % self.prune_every == 0 or step == end)

    def still_prunes(self, step: int) -> bool:
        """Whether scores are still needed after this step; they are not after t_f."""
        return step <= self._pruning_steps()[1]

    def _pruning_steps(self) -> tuple[int, int]:
        """t_i and t_f in steps."""
        return round(self.prune_start * self.steps), max(1, round(self.prune_end * self.steps))

    def loss_options(self) -> dict:
        names = (*TERMS, "similarity", "temperature", "attention_target", "positions")
        return {name: getattr(self, name) for name in names}

    def scorer_options(self) -> dict:
        return {"smoothing": self.smoothing} | ({"seed": self.seed} if self.scorer == "random" else {})

    def to_dict(self) -> dict:
        """Plain values for JSON and YAML; `DistillConfig(**d)` gives the same config."""
        return asdict(self) | {"betas": list(self.betas)}

    def _check_types(self) -> None:
        """YAML reads 3e-4 as a string and no as False: name the field now instead of failing later."""
        for each in (each for each in fields(self) if each.name not in ("target", "betas")):
            value, kind, least = getattr(self, each.name), type(each.default), each.metadata["least"]
            accepted = int | float if kind is float else kind
            matches = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
            _require(matches, f"{each.name} must be of type {kind.__name__}; got {_short(value)}{hint(value, kind)}")
            _require(not isinstance(value, float) or math.isfinite(value), f"{each.name} must be finite; got {value}")
            small = not isinstance(value, int) or -LARGEST < value < LARGEST
            _require(small, f"{each.name} must be below {LARGEST:.0e}; got {_short(value)}")
            _require(least is None or value >= least, f"{each.name} must be at least {least}; got {value}")
        if not isinstance(self.target, Widths):
            number = isinstance(self.target, int | float) and not isinstance(self.target, bool)
            known = "target is a fraction to keep, in (0, 1], or Widths (for a Budget: hdlib.lab.shapes)"
            got = f"{_short(self.target)}{hint(self.target, float)}"
            _require(number and 0 < self.target <= 1, f"{known}; got {got}")
            object.__setattr__(self, "target", float(self.target))
        pair = isinstance(self.betas, list | tuple) and len(self.betas) == 2
        valid = pair and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas)
        _require(valid, f"betas are two numbers in [0, 1); got {_short(self.betas)}")
        object.__setattr__(self, "betas", tuple(self.betas))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]} ..."


def hint(value, kind: type) -> str:
    """How to write a value of this type in YAML, which reads 3e-4 as a text, no as False and 2026-01-01 as a date."""
    number = re.fullmatch(r"([-+]?\d+)([.]\d*)?e([-+]?)(\d{1,3})", str(value), re.IGNORECASE)
    if number and kind is float:
        digits, fraction, sign, exponent = number.groups()
        return f", which YAML reads as a text: write {digits}{fraction or '.0'}e{sign or '+'}{exponent}"
    if kind is int and (number or isinstance(value, float)) and float(value).is_integer():
        return f": write {float(value):.0f}"
    if kind is str and isinstance(value, bool | int | float | date):
        return ": put it in quotes"
    return ": write true or false" if kind is bool else ""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


PAPER = {  # where the published recipe differs from the defaults
    "prune_end": 0.7,
    "scorer": "sensitivity",
    "rotate": False,
    "compensate": False,
    "prediction": 1.0,
    "mask_probability": 0.15,
    "learning_rate": 6e-4,
}
ENCODER_TERMS = ("prediction", "hidden", "attention", "embedding", "similarity")
LARGEST = 10**12  # larger integers overflow somewhere in a run
MAY_CHANGE = ("micro_batch_size", "checkpoint_every", "keep_last")  # on resuming: they do not change the numbers
CHOICES = {  # the values of fields that are names
    "initial": ("teacher", "random"),
    "schedule": tuple(SCHEDULES),
    "scorer": tuple(SCORERS),
    "scope": SCOPES,
    "precision": ("auto", "float32", "bfloat16"),
}
