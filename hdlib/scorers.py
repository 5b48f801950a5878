"""Importance of neurons, read off weights and gradients after a backward.

A scorer turns each parameter into element scores of its own shape and sums them over everything that
one neuron owns: all slices of its width group, in all matrices. `update` belongs after the backward
and before clipping and the optimiser step, so that weights and gradients belong together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .losses import pieces
from .narrowing import take
from .widths import Axis, axes_of, narrowed_axis


class Scorer:
    """The interface: `update(model)` after each backward, `scores()` when neurons are to be chosen."""

    def __init__(self, smoothing: float = 0.85):
        _check_fraction("smoothing", smoothing)
        self.smoothing = smoothing
        self._averages: dict[str, Tensor] = {}

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The score of every element of one parameter, in its shape."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Take in the weights and gradients of this step: average <- beta average + (1 - beta) new."""
        axes = axes_of(model)
        for name, new in _neuron_sums(axes, self._elements(model, axes)).items():
            past = self._averages.get(name)
            self._averages[name] = new if past is None else torch.lerp(new, past, self.smoothing)

    def scores(self) -> dict[str, Tensor]:
        """Group name to a vector of importances at least 0, one for each neuron; larger means keep."""
        if not self._averages:
            raise RuntimeError("no scores yet: call update(model) after a backward first")
        return dict(self._averages)

    def narrow(self, kept: dict[str, Tensor]) -> None:
        """Let the averages follow a prune; `kept` is what `hdlib.narrow` returned."""
        self._averages = {name: past[kept[name].to(past.device)] for name, past in self._averages.items()}

    def state_dict(self) -> dict:
        return {"averages": dict(self._averages)}

    def load_state_dict(self, state: dict) -> None:
        self._averages = dict(state["averages"])

    def _elements(self, model: PreTrainedModel, axes: dict[str, tuple[Axis, ...]]) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and element scores; where its rows are no neurons, as in embeddings, some at a time."""
        for name, parameter, gradient in _with_gradients(model):
            rows_at_once = pieces(parameter, parameter[0].numel()) if axes[name][0] is None else [slice(None)]
            for rows in rows_at_once:
                yield name, self.element(parameter[rows], gradient[rows])


def _with_gradients(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, parameter and gradient; one that is None (unused in this batch) is 0."""
    for name, parameter in model.named_parameters():
        none = parameter.grad is None
        yield name, parameter, parameter.new_zeros(()).expand_as(parameter) if none else parameter.grad


def _neuron_sums(axes: dict[str, tuple[Axis, ...]], elements: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Sum element scores over all that each neuron owns: group name to a vector."""
    sums: dict[str, Tensor] = {}
    for name, element in elements:
        for group, score in _owned(element, axes[name]):
            sums[group] = sums[group] + score if group in sums else score
    return sums


def _owned(element: Tensor, axes: tuple[Axis, ...]) -> Iterator[tuple[str, Tensor]]:
    """Sums of one parameter's elements for each neuron of each stretch of each axis.

    Where both axes count the same neurons, as in the MLM head's transform, neuron i owns row i and
    column i, and the element in which they cross is counted once.
    """
    for axis, blocks in enumerate(axes):
        others = [other for other in range(element.dim()) if other != axis]
        along = element.sum(others) if others and blocks else element
        start = 0
        for block in blocks or ():
            stop = start + block.size * block.unit
            yield block.group, along[start:stop].reshape(block.size, block.unit).sum(1)
            start = stop
    if len(axes) > 1 and axes[0] and axes[0] == axes[1]:
        crossing = element.diagonal()  # (..., D): what lies between the two axes and the last goes first
        yield axes[0][0].group, -crossing.flatten(0, -2).sum(0) if crossing.dim() > 1 else -crossing


class Sensitivity(Scorer):
    """|theta * dL/dtheta|: the first-order change of the total loss if the element were zero (HomoDistil).

    A neuron's score is the sum over all elements it owns. Scaling every one of them by
    1 + eps * sign(theta * dL/dtheta) raises the loss by eps times the score, to first order.
    """

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return (parameter * gradient).abs_()


class Platon(Scorer):
    """Sensitivity times its uncertainty, element by element (PLATON, Zhang et al., ICML 2022).

        I_t = |theta * dL/dtheta|
        I~_t = beta_1 I~_{t-1} + (1 - beta_1) I_t             smoothed sensitivity, from 0
        U_t = |I_t - I~_t|
        U~_t = beta_2 U~_{t-1} + (1 - beta_2) U_t             smoothed uncertainty, from 0
        S_t = I~_t U~_t

    A neuron's score is the sum of S_t over all elements it owns. Costs two numbers for each weight.

    Args:
        smoothing: beta_1.
        uncertainty: beta_2.
    """

    def __init__(self, smoothing: float = 0.85, uncertainty: float = 0.95):
        super().__init__(smoothing)
        _check_fraction("uncertainty", uncertainty)
        self.uncertainty = uncertainty
        self._smoothed: dict[str, Tensor] = {}  # I~ of each parameter
        self._uncertain: dict[str, Tensor] = {}  # U~ of each parameter
        self._axes: dict[str, tuple[Axis, ...]] = {}

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return (parameter * gradient).abs_()

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        self._axes = axes_of(model)
        for name, parameter, gradient in _with_gradients(model):
            now = self.element(parameter, gradient)
            smoothed = self._smoothed.setdefault(name, torch.zeros_like(now))
            uncertain = self._uncertain.setdefault(name, torch.zeros_like(now))
            smoothed.lerp_(now, 1 - self.smoothing)
            uncertain.lerp_((now - smoothed).abs_(), 1 - self.uncertainty)
        self._averages = _neuron_sums(
            self._axes, ((name, self._smoothed[name] * self._uncertain[name]) for name in self._smoothed)
        )

    def narrow(self, kept: dict[str, Tensor]) -> None:
        super().narrow(kept)
        for state in (self._smoothed, self._uncertain):
            state.update({name: take(past, self._axes[name], kept) for name, past in state.items()})
        self._axes = {name: tuple(narrowed_axis(axis, kept) for axis in axes) for name, axes in self._axes.items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {"smoothed": self._smoothed, "uncertain": self._uncertain}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._smoothed, self._uncertain = dict(state["smoothed"]), dict(state["uncertain"])


class Magnitude(Scorer):
    """|theta|: size alone, blind to the loss."""

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return parameter.abs()


class Movement(Scorer):
    """-theta * dL/dtheta: weights that the loss moves away from zero are kept (Sanh et al., NeurIPS 2020).

    A moving average, as in the other scorers, instead of their sum over the whole training. The sums have
    either sign; the smallest of all groups is taken off all of them, so that scores are at least 0 and
    neurons compare as before.
    """

    def element(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return -(parameter * gradient)

    def scores(self) -> dict[str, Tensor]:
        signed = super().scores()
        lowest = min(score.min() for score in signed.values())
        return {name: score - lowest for name, score in signed.items()}


class Random(Scorer):
    """Uniform noise from a generator of its own, drawn once for each neuron: the floor of every comparison."""

    def __init__(self, smoothing: float = 0.0, seed: int = 0):
        super().__init__(smoothing)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        if not self._averages:
            blocks = [block for axes in axes_of(model).values() for axis in axes for block in axis or ()]
            sizes = {block.group: block.size for block in blocks}
            self._averages = {group: torch.rand(size, generator=self._generator) for group, size in sizes.items()}


SCORERS = {
    "sensitivity": Sensitivity,
    "platon": Platon,
    "magnitude": Magnitude,
    "movement": Movement,
    "random": Random,
}


def scorer(name: str = "sensitivity", **options) -> Scorer:
    """A scorer by name; `options` go to its class, `smoothing` (beta of the moving average) for all.

    Raises:
        ValueError: unknown name; the message lists those there are.
    """
    if name not in SCORERS:
        raise ValueError(f"no scorer is called {name!r}; there are: {', '.join(SCORERS)}")
    return SCORERS[name](**options)


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is the weight of the past in a moving average, in [0, 1); got {value}")
