"""Importance of neurons, computed from weights and gradients after a backward pass.

A scorer gives every element theta of every parameter a score, with g = dL/dtheta the gradient of the total loss. The
score of a neuron is the sum over all elements it owns: the slices of its width group. Call `update` after the backward
pass and before gradient clipping and the optimiser's step, while weights and gradients belong together.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .losses import pieces
from .narrowing import take
from .widths import Axis, axes_of, new_numbers, renumbered, width_groups


class Scorer:
    """The interface: `update(model)` after each backward pass, `scores()` before each prune.

    Scores are moving averages over updates: beta * average + (1 - beta) * new, with beta = `smoothing`.
    """

    def __init__(self, smoothing: float = 0.85):
        self.smoothing = _fraction("smoothing", smoothing)
        self._averages: dict[str, Tensor] = {}

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The score of each element of a parameter, in its shape."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Add the present weights and gradients of a model to the average; the first update starts it."""
        axes, scores = axes_of(model), defaultdict(list)
        for name, element in self._elements(model, axes):
            for group, score in _owned(element, axes[name]):
                scores[group].append(score)
        sums = [first for first, *_ in scores.values()]
        for others in zip_longest(*(others for _, *others in scores.values())):  # few kernels for all groups together
            pairs = [pair for pair in zip(sums, others, strict=True) if pair[1] is not None]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        past = [self._averages.get(group, new) for group, new in zip(scores, sums, strict=True)]
        self._averages = dict(zip(scores, torch._foreach_lerp(sums, past, self.smoothing), strict=True))

    def scores(self) -> dict[str, Tensor]:
        """Group name to a vector of importances, at least 0, one per neuron; larger means keep."""
        if not self._averages:
            raise RuntimeError("no scores yet: call update(model) after a backward pass first")
        return dict(self._averages)

    def narrow(self, kept: dict[str, Tensor]) -> None:
        """Remove the averages of removed neurons and layers; `kept` is the result of `hdlib.narrow`."""
        averages = {name: past[kept[name].to(past.device)] for name, past in self._averages.items()}
        self._averages = renumbered(averages, new_numbers(kept))

    def state_dict(self) -> dict:
        return {"averages": dict(self._averages)}

    def load_state_dict(self, state: dict) -> None:
        self._averages = dict(state["averages"])

    def _elements(self, model: PreTrainedModel, axes: dict[str, tuple[Axis, ...]]) -> Iterator[tuple[str, Tensor]]:
        """Parameter names and element scores; a parameter whose rows are no neurons (embeddings) comes in pieces."""
        for name, parameter, gradient in _with_gradients(model):
            if axes[name][0] is not None:
                yield name, self.element(parameter, gradient)
                continue
            for rows in pieces(parameter, parameter[0].numel()):
                yield name, self.element(parameter[rows], gradient[rows])


def _with_gradients(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, parameter and gradient; a gradient that is None (parameter unused in this batch) is 0."""
    for name, parameter in model.named_parameters():
        zero = parameter.new_zeros(()).expand_as(parameter) if parameter.grad is None else None
        yield name, parameter, parameter.grad if zero is None else zero


def _owned(element: Tensor, axes: tuple[Axis, ...]) -> Iterator[tuple[str, Tensor]]:
    """For each block of each axis of a parameter: group name, and the sums of the elements of each neuron."""
    for axis, blocks in enumerate(axes):
        others = [other for other in range(element.dim()) if other != axis]
        along = element.sum(others) if others and blocks else element
        for block in blocks or ():
            own = along[block.start : block.start + block.size * block.unit]
            yield block.group, own if block.unit == 1 else own.reshape(block.size, block.unit).sum(1)
    # In the transform of BERT's MLM head neuron i owns row i and column i: count their crossing once.
    if len(axes) > 1 and axes[0] and axes[0] == axes[1]:
        crossing = element.diagonal()  # (..., D): the dimensions after the first two, then the diagonal
        yield axes[0][0].group, -crossing.flatten(0, -2).sum(0) if crossing.dim() > 1 else -crossing


class Sensitivity(Scorer):
    """|theta * g|: to first order, the change of the loss if theta became 0 (HomoDistil, Liang et al., ICLR 2023).

    Multiplying every element of a neuron by 1 + eps * sign(theta * g) raises the loss by eps times its score.
    """

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return (parameter * gradient).abs_()


class Platon(Sensitivity):
    """Sensitivity times its uncertainty (PLATON, Zhang et al., ICML 2022). Stores two numbers per weight.

    I_t = |theta * g|;
    I~_t = beta_1 I~_{t-1} + (1 - beta_1) I_t, from 0, with beta_1 = `smoothing`;
    U~_t = beta_2 U~_{t-1} + (1 - beta_2) |I_t - I~_t|, from 0, with beta_2 = `uncertainty`;
    S_t = I~_t U~_t.
    """

    def __init__(self, smoothing: float = 0.85, uncertainty: float = 0.95):
        super().__init__(smoothing)
        self.uncertainty = _fraction("uncertainty", uncertainty)
        self._smoothed: dict[str, Tensor] = {}  # I~ of each parameter
        self._uncertain: dict[str, Tensor] = {}  # U~ of each parameter
        self._axes: dict[str, tuple[Axis, ...]] = {}

    def update(self, model: PreTrainedModel) -> None:
        self._averages = {}  # the elements are smoothed instead
        super().update(model)

    def narrow(self, kept: dict[str, Tensor]) -> None:
        super().narrow(kept)
        layers, axes = new_numbers(kept), self._axes
        self._smoothed, self._uncertain = (
            renumbered({name: take(past, axes[name], kept) for name, past in state.items()}, layers)
            for state in (self._smoothed, self._uncertain)
        )
        self._axes = {
            name: tuple(axis and tuple(block.narrowed(kept) for block in axis) for axis in each)
            for name, each in renumbered(axes, layers).items()
        }

    def state_dict(self) -> dict:
        return super().state_dict() | {"smoothed": self._smoothed, "uncertain": self._uncertain}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._smoothed, self._uncertain = dict(state["smoothed"]), dict(state["uncertain"])

    def _elements(self, model: PreTrainedModel, axes: dict[str, tuple[Axis, ...]]) -> Iterator[tuple[str, Tensor]]:
        self._axes = axes
        for name, parameter, gradient in _with_gradients(model):
            now = self.element(parameter, gradient)
            smoothed = self._smoothed.setdefault(name, torch.zeros_like(now)).lerp_(now, 1 - self.smoothing)
            uncertain = self._uncertain.setdefault(name, torch.zeros_like(now))
            yield name, smoothed * uncertain.lerp_((now - smoothed).abs_(), 1 - self.uncertainty)


class Magnitude(Scorer):
    """|theta|, independent of the loss."""

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return parameter.abs()


class Movement(Scorer):
    """-theta * g: keep weights that the loss moves away from 0 (Sanh et al., NeurIPS 2020).

    A moving average, not the paper's sum over training; its smallest value is subtracted, so that scores are >= 0.
    """

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return -(parameter * gradient)

    def scores(self) -> dict[str, Tensor]:
        signed = super().scores()
        lowest = min(score.min() for score in signed.values())
        return {name: score - lowest for name, score in signed.items()}


class Random(Scorer):
    """Uniform noise from a generator of its own, drawn once per neuron: the baseline of every comparison."""

    def __init__(self, smoothing: float = 0.0, seed: int = 0):
        super().__init__(smoothing)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, model: PreTrainedModel) -> None:
        if not self._averages:
            groups = width_groups(model).values()
            self._averages = {group.name: torch.rand(group.size, generator=self._generator) for group in groups}


class Reconstruction(Sensitivity):
    """Sensitivity, but of hidden neurons and of the values of heads the error that removing one leaves after its fold.

    `compensation`, a `hdlib.reconstruction.Compensation`, has the moments of what layers read.
    """

    def __init__(self, compensation, smoothing: float = 0.85):
        super().__init__(smoothing)
        self.compensation, self._model = compensation, None

    def update(self, model: PreTrainedModel) -> None:
        self._model = model
        super().update(model)

    def scores(self) -> dict[str, Tensor]:
        return super().scores() | self.compensation.errors(self._model)


SCORERS = {kind.__name__.lower(): kind for kind in (Sensitivity, Platon, Magnitude, Movement, Random, Reconstruction)}


def scorer(name: str = "sensitivity", **options) -> Scorer:
    """A scorer by name, one of SCORERS; `options` are arguments of its class. ValueError for an unknown name."""
    if name not in SCORERS:
        raise ValueError(f"no scorer is called {name!r}; there are: {', '.join(SCORERS)}")
    return SCORERS[name](**options)


def _fraction(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is not a weight of the past in a moving average: take one in [0, 1)")
    return value
