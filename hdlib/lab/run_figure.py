"""All of one run in one figure, at one step: the curves on the left, every neuron of the teacher on the right."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch import Tensor

from ..families import FFN, HEADS, HIDDEN, SHARED_HEADS, VALUE
from ..runs import Prune, Run
from ..widths import QUERY_KEY
from .plots import COLOURS, plot_discrepancy, plot_layers, plot_losses

KINDS = {
    HIDDEN: "residual stream",
    FFN: "feed-forward",
    QUERY_KEY: "queries and keys",
    VALUE: "values and outputs",
    HEADS: "key/value heads",
    SHARED_HEADS: "heads, the same in all layers",
}
INK = colormaps["cividis_r"].with_extremes(bad="white")  # the more important the darker; what has gone is paper
LEAST = 1e-3  # of the largest importance: what is less is drawn as this
UNKNOWN = 1e-2  # what is drawn before anything was ranked
DOTS = 500  # columns of a map at most


class RunFigure:
    """The figure of a run that can be moved to any of its steps. Only what moves is drawn again.

    Args:
        run: finished or not; what has not been recorded is left out, and its place says so.

    Attributes:
        figure: a matplotlib Figure.
        steps: the first and the last step that were logged.
        moving: the artists that change with the step.
    """

    def __init__(self, run: Run):
        self.run, self.metrics, self.pruned_at = run, run.metrics, run.pruned_at
        self.steps = (0, 0) if self.metrics.empty else (int(self.metrics.index[0]), int(self.metrics.index[-1]))
        self.measured = self.metrics.dropna(subset=["held_out_kl"]) if not self.metrics.empty else self.metrics
        self.figure = plt.figure(figsize=(12.4, 6.8))  # margins by hand: a layout engine takes half of the time
        plt.close(self.figure)  # it is shown by whoever asked for it, not by pyplot at the end of a cell
        curves, neurons = self.figure.subfigures(1, 2, width_ratios=[1, 1.25])
        self.moving = self._draw_curves(curves)
        self.maps = _Maps(neurons, run.prune(self.pruned_at[-1])) if self.pruned_at else None
        if self.maps is None:
            neurons.text(0.5, 0.5, "no prune recorded", ha="center", va="center", color=COLOURS["grey"])
        else:
            self.moving += self.maps.moving
        self.prune = lru_cache(maxsize=256)(run.prune)  # all that a run records, a few megabytes
        self.at(self.steps[1])

    def at(self, step: int) -> str:
        """Move the figure to a step, and say in words what it shows there."""
        for line in self.cursors:
            line.set_xdata([step, step])
        last = bisect_right(self.pruned_at, step)
        if self.maps is not None:
            self.maps.show(self.prune(self.pruned_at[last - 1]) if last else None)
        return self.words(step)

    def words(self, step: int) -> str:
        """What the figure shows at a step, for those who do not see it."""
        if self.metrics.empty:
            return "Nothing recorded yet."
        record = self.metrics.loc[: max(step, self.steps[0])].iloc[-1]
        first = self.metrics.iloc[0]
        widths = {"hidden_size": "hidden", "intermediate_size": "feed-forward"}
        said = [f"{words} {record[name]:.0f} of {first[name]:.0f}" for name, words in widths.items()]
        measured = self.measured.loc[:step]
        if len(measured):
            said.append(f"KL to the teacher {measured['held_out_kl'].iloc[-1]:.3f} nats")
            said.append(f"same first guess {measured['held_out_agreement'].iloc[-1]:.0%}")
        return f"Step {step:,} of {self.run.config.steps:,}: {', '.join(said)}."

    def _draw_curves(self, place) -> list:
        layered = "held_out_hidden_1" in self.metrics
        upper, lower, losses, *layers = place.subplots(
            3 + layered,
            1,
            sharex=True,
            height_ratios=[3, 1.2, 3, 2][: 3 + layered],
            gridspec_kw={"left": 0.15, "right": 0.85, "top": 0.96, "bottom": 0.08, "hspace": 0.15},
        )
        plot_discrepancy(self.run, (upper, lower))
        plot_losses(self.run, losses)
        panels = [upper, lower, losses, *layers]
        if layered:
            scale = layers[0].inset_axes((1.03, 0, 0.03, 1))
            plot_layers(self.run, "hidden", layers[0], scale)
            scale.set_ylabel("share of\nmean square", fontsize="small", labelpad=1)
            scale.tick_params(labelsize="small")
            layers[0].set_ylabel("hidden states\nof layer")
        for panel in panels:
            panel.set_xlabel("")
            panel.yaxis.label.set_size("small")
            panel.yaxis.set_label_coords(-0.115, 0.5)
            panel.tick_params(labelsize="small")
        losses.set_ylabel("loss term,\nbefore weighting")
        upper.set_ylabel("KL to the teacher\nnats, held out")
        lower.set_ylabel("hidden\nwidth")
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        self.cursors = [panel.axvline(0, color=COLOURS["orange"], linewidth=1.5, zorder=5) for panel in panels]
        return list(self.cursors)


class _Maps:
    """A map for each kind of width group: layers upwards, the teacher's neurons to the right."""

    def __init__(self, place, prune: Prune):
        self.rows = _rows(prune.kept)
        heights = [0.5 + 0.16 * len(names) for names in self.rows.values()]
        margins = {"left": 0.07, "right": 0.87, "top": 0.96, "bottom": 0.08, "hspace": 0.45}
        panels = place.subplots(len(self.rows), 1, height_ratios=heights, squeeze=False, gridspec_kw=margins)[:, 0]
        self.images, self.counts, self.ink = {}, {}, ScalarMappable(LogNorm(LEAST, 1), INK)
        for panel, (kind, names) in zip(panels, self.rows.items(), strict=True):
            size = len(prune.kept[names[0]])
            self.images[kind] = panel.imshow(
                np.ones((1, 1, 4)),
                aspect="auto",
                origin="lower",
                interpolation="nearest",
                extent=(0, size, 0.5, len(names) + 0.5),
            )
            self.counts[kind] = panel.set_title(" ", fontsize="small", loc="left")
            panel.tick_params(labelsize="small", length=2)
            panel.set_yticks([])
            if len(names) > 1:
                panel.set_yticks([1, len(names)])
                panel.set_ylabel("layer", fontsize="small", labelpad=0)
            panel.set_xlim(0, size)
        panels[-1].set_xlabel("neuron of the teacher", fontsize="small")
        bar = place.colorbar(self.ink, cax=place.add_axes((0.89, 0.08, 0.02, 0.88)))
        bar.set_label("importance at the last prune, the largest of its kind is 1; white: gone", fontsize="small")
        bar.ax.tick_params(labelsize="small")
        self.moving = [*self.images.values(), *self.counts.values()]

    def show(self, prune: Prune | None) -> None:
        """The map after a prune; before the first, where nobody was ranked yet, all are there and alike."""
        for kind, names in self.rows.items():
            if prune is None:
                values = np.full((len(names), 1), UNKNOWN)
                said = "all there, not ranked yet"
            else:
                values = np.stack([prune.importance[name].numpy() for name in names])
                stays = np.stack([prune.kept[name].numpy() for name in names])
                largest = np.nanmax(np.where(stays, values, np.nan)) or 1.0
                values = np.where(stays, np.maximum(values / largest, LEAST), np.nan)
                said = f"{_range(stays.sum(1))} of {stays.shape[1]}{' in each layer' if len(names) > 1 else ''}"
                said += f", as of step {prune.step:,}"
            self.images[kind].set_data(_averaged(self.ink.to_rgba(np.ma.masked_invalid(values))))
            self.counts[kind].set_text(f"{KINDS[kind]}: {said}")


def _averaged(colours: np.ndarray) -> np.ndarray:
    """Colours (L, N, 4) with at most DOTS columns: where neurons are more than dots, those of one dot are averaged."""
    columns = np.linspace(0, colours.shape[1], min(DOTS, colours.shape[1]), endpoint=False).astype(int)
    counts = np.diff([*columns, colours.shape[1]])
    return np.add.reduceat(colours, columns, axis=1) / counts[:, None]


def plot_run(run: Run, step: int | None = None) -> Figure:
    """All of one run in one figure, at one step: what `hdlib.lab.explore` shows while its slider moves.

    On the left the discrepancy, the width, the loss terms and what is left of each layer's hidden states; on the
    right the teacher's neurons that are still there, the darker the more important.

    Args:
        run: finished or not.
        step: where the line stands and what the maps show; the last one if None.
    """
    drawn = RunFigure(run)
    if step is not None:
        drawn.at(step)
    return drawn.figure


def plot_neurons(run: Run, step: int | None = None) -> Figure:
    """The teacher's neurons that are still there after a step, the darker the more important.

    Args:
        run: one with a prune recorded.
        step: the last prune up to it is shown; the last of all if None.

    Raises:
        ValueError: no prune was recorded up to that step.
    """
    until = [at for at in run.pruned_at if step is None or at <= step]
    if not until:
        raise ValueError(f"{run.folder} has no prune recorded up to step {step}: it has those of {run.pruned_at}")
    prune = run.prune(until[-1])
    figure = plt.figure(figsize=(7, 5.4))
    _Maps(figure, prune).show(prune)
    return figure


def _rows(groups: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the groups of each kind, by layer."""
    rows: dict[str, list[str]] = {}
    for name in sorted(groups, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        rows.setdefault(name.rpartition(".")[2], []).append(name)
    return {kind: rows[kind] for kind in KINDS if kind in rows}


def _range(counts: np.ndarray) -> str:
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
