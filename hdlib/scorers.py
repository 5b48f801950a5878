"""Importance of neurons, read off weights and gradients after a backward.

A scorer turns each parameter into element scores of its own shape and sums them over everything that
one neuron owns: all slices of its width group, in all matrices. `update` belongs after the backward
and before clipping and the optimiser step, so that weights and gradients belong together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .widths import axes_of


class Scorer:
    """The interface: `update(model)` after each backward, `scores()` when neurons are to be chosen."""

    def __init__(self, smoothing: float = 0.85):
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is the weight of the past in a moving average, in [0, 1); got {smoothing}")
        self.smoothing = smoothing
        self._averages: dict[str, Tensor] = {}
        self._axes: dict[str, tuple] | None = None

    def element(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """The score of every element of one parameter, in its shape, at least 0."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Take in the weights and gradients of this step: average <- beta average + (1 - beta) new."""
        if self._axes is None:
            self._axes = axes_of(model)
        for name, new in self._sums(model).items():
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

    def _sums(self, model: PreTrainedModel) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, axes in self._axes.items():
            if not any(axes):
                continue
            parameter = model.get_parameter(name)
            element = self.element(parameter, parameter.grad)
            for group, score in _neuron_sums(element, axes):
                sums[group] = sums[group] + score if group in sums else score
        return sums


def _neuron_sums(element: Tensor, axes):
    """Sum element scores over all that each neuron owns in one parameter.

    Where both axes count the same neurons, as in the MLM head's transform, neuron i owns row i and
    column i, and the element in which they cross is counted once.
    """
    for axis, group in enumerate(axes):
        if group is not None:
            others = [other for other in range(element.dim()) if other != axis]
            yield group, element.sum(others) if others else element
    if len(axes) == 2 and axes[0] is not None and axes[0] == axes[1]:
        yield axes[0], -element.diagonal()


class Sensitivity(Scorer):
    """|theta * dL/dtheta|: the first-order change of the total loss if the element were zero (HomoDistil).

    A neuron's score is the sum over all elements it owns. Scaling every one of them by
    1 + eps * sign(theta * dL/dtheta) raises the loss by eps times the score, to first order.
    """

    def element(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.zeros_like(parameter)  # unused in this batch: its removal changes nothing
        return (parameter * gradient).abs()


class Magnitude(Scorer):
    """|theta|: size alone, blind to the loss."""

    def element(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        return parameter.abs()


class Random(Scorer):
    """Uniform noise from a generator of its own, drawn once for each neuron: the floor of every comparison."""

    def __init__(self, smoothing: float = 0.0, seed: int = 0):
        super().__init__(smoothing)
        self._generator = torch.Generator().manual_seed(seed)

    def _sums(self, model: PreTrainedModel) -> dict[str, Tensor]:
        if self._averages:
            return self._averages
        sizes = {
            group: model.get_parameter(name).shape[axis]
            for name, axes in self._axes.items()
            for axis, group in enumerate(axes)
            if group is not None
        }
        return {group: torch.rand(size, generator=self._generator) for group, size in sizes.items()}


SCORERS = {"sensitivity": Sensitivity, "magnitude": Magnitude, "random": Random}


def scorer(name: str = "sensitivity", **options) -> Scorer:
    """A scorer by name; `options` go to its class, `smoothing` (beta of the moving average) for all.

    Raises:
        ValueError: unknown name; the message lists those there are.
    """
    if name not in SCORERS:
        raise ValueError(f"no scorer is called {name!r}; there are: {', '.join(SCORERS)}")
    return SCORERS[name](**options)
