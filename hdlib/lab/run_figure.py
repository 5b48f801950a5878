"""One run at one step: its curves on the left, every neuron of the teacher on the right."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ..families import FFN, HEADS, HIDDEN, SHARED_HEADS, VALUE
from ..runs import Prune, Run
from ..widths import QUERY_KEY
from .plots import COLOURS, plot_discrepancy, plot_layers, plot_losses, small

KINDS = {
    HIDDEN: "residual stream",
    FFN: "feed-forward",
    QUERY_KEY: "queries and keys",
    VALUE: "values and outputs",
    HEADS: "key/value heads",
    SHARED_HEADS: "heads, the same in all layers",
}
PANELS = {  # label and relative height
    "KL to the teacher\nnats, held out": 3,
    "hidden\nwidth": 1.2,
    "loss term,\nbefore weighting": 3,
    "hidden states\nof layer": 2,
}
DISTANCE = "cosine distance\nto the teacher, held out"  # the first label of a sentence encoder
DESCRIBED = {  # measures and their texts
    "held_out_kl": {
        "held_out_kl": "KL to the teacher {:.3f} nats",
        "held_out_agreement": "top-1 agreement {:.0%}",
    },
    "held_out_cosine_distance": {
        "held_out_cosine_distance": "cosine distance to the teacher {:.3f}",
        "held_out_recall": "recall of its 10 neighbours {:.0%}",
    },
}
INK = colormaps["cividis_r"].with_extremes(bad="white")  # dark is important; removed neurons are white
LEAST = 1e-3  # lowest importance with a colour of its own, as a fraction of the largest
UNKNOWN = 1e-2  # colour of neurons that are not ranked yet
DOTS = 500  # most columns of a map


class RunFigure:
    """The figure of a run, finished or not. `at` moves it to a step and changes only the artists in `moving`."""

    @small
    def __init__(self, run: Run):
        self.run, self.metrics, self.pruned_at = run, run.metrics, run.pruned_at
        self.steps = (0, 0) if self.metrics.empty else (int(self.metrics.index[0]), int(self.metrics.index[-1]))
        self.figure = plt.figure(figsize=(12.4, 6.8))  # fixed margins: a layout engine doubles the drawing time
        plt.close(self.figure)  # pyplot does not show it at the end of a cell
        self.prune = cache(run.prune)  # a few megabytes for all prunes of a run
        curves, neurons = self.figure.subfigures(1, 2, width_ratios=[1, 1.25])
        self.cursors = self._draw_curves(curves)
        self.maps = _Maps(neurons, self.prune(self.pruned_at[-1])) if self.pruned_at else None
        self.moving = [*self.cursors, *(self.maps.moving if self.maps else ())]
        if not self.maps:
            neurons.text(0.5, 0.5, "no prune recorded", ha="center", va="center", color=COLOURS["grey"])
        self.at(self.steps[1])

    def at(self, step: int) -> str:
        """Move the figure to a step and return its description."""
        for line in self.cursors:
            line.set_xdata([step, step])
        if self.maps:
            last = bisect_right(self.pruned_at, step)
            self.maps.show(self.prune(self.pruned_at[last - 1]) if last else None)
        return self.describe(step)

    def describe(self, step: int) -> str:
        """The text alternative of the figure at a step."""
        if self.metrics.empty:
            return "Nothing recorded yet."
        first, record = self.metrics.iloc[0], self.metrics.loc[: max(step, self.steps[0])].iloc[-1]
        widths = {"hidden_size": "hidden", "intermediate_size": "feed-forward"}
        parts = [f"{name} {record[column]:.0f} of {first[column]:.0f}" for column, name in widths.items()]
        texts = DESCRIBED[self.run.measure]
        measured = self.metrics.loc[:step, [*texts]].dropna()
        for values in measured.to_numpy()[-1:]:
            parts += [text.format(value) for text, value in zip(texts.values(), values, strict=True)]
        return f"Step {step:,} of {self.run.config.steps:,}: {', '.join(parts)}."

    def _draw_curves(self, place) -> list:
        """The panels of PANELS, the last one if layers were measured. Returns the line at the step in each."""
        count = len(PANELS) - ("held_out_hidden_1" not in self.metrics)
        margins = {"left": 0.15, "right": 0.85, "top": 0.96, "bottom": 0.08, "hspace": 0.15}
        heights = list(PANELS.values())[:count]
        panels = place.subplots(count, 1, sharex=True, height_ratios=heights, gridspec_kw=margins)
        plot_discrepancy(self.run, panels[:2])
        plot_losses(self.run, panels[2])
        for axes in panels[3:]:
            plot_layers(self.run, "hidden", axes)
        labels = [*PANELS] if self.run.measure == "held_out_kl" else [DISTANCE, *list(PANELS)[1:]]
        for axes, label in zip(panels, labels, strict=False):
            axes.set(xlabel="", ylabel=label)
            axes.yaxis.set_label_coords(-0.115, 0.5)
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        return [axes.axvline(0, color=COLOURS["orange"], linewidth=1.5, zorder=5) for axes in panels]


class _Maps:
    """A map for each kind of width group: a row a layer, a column a neuron of the teacher."""

    @small
    def __init__(self, place, prune: Prune):
        self.rows: dict[str, list[str]] = {}  # names of the groups of each kind, by layer
        for name in sorted(prune.kept, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
            self.rows.setdefault(name.rpartition(".")[2], []).append(name)
        self.rows = {kind: self.rows[kind] for kind in KINDS if kind in self.rows}
        heights = [0.5 + 0.16 * len(names) for names in self.rows.values()]
        margins = {"left": 0.07, "right": 0.87, "top": 0.96, "bottom": 0.08, "hspace": 0.45}
        panels = place.subplots(len(self.rows), 1, height_ratios=heights, squeeze=False, gridspec_kw=margins)[:, 0]
        self.images, self.titles, self.ink = {}, {}, ScalarMappable(LogNorm(LEAST, 1), INK)
        for axes, (kind, names) in zip(panels, self.rows.items(), strict=True):
            extent = (0, len(prune.kept[names[0]]), 0.5, len(names) + 0.5)
            look = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "extent": extent}
            self.images[kind] = axes.imshow(np.ones((1, 1, 4)), **look)
            self.titles[kind] = axes.set_title(" ", loc="left")
            axes.tick_params(length=2)
            axes.set_yticks([1, len(names)] if len(names) > 1 else [])
            axes.set_ylabel("layer" if len(names) > 1 else "", labelpad=0)
        panels[-1].set_xlabel("neuron of the teacher")
        bar = place.colorbar(self.ink, cax=place.add_axes((0.89, 0.08, 0.02, 0.88)))
        bar.set_label("importance at the last prune, the largest of its kind is 1; white: removed")
        self.moving = [*self.images.values(), *self.titles.values()]

    def show(self, prune: Prune | None) -> None:
        """The neurons after a prune, or before the first one."""
        for kind, names in self.rows.items():
            values, title = np.full((len(names), 1), UNKNOWN), "all kept, not ranked yet"
            if prune is not None:
                kept = np.stack([prune.kept[name].numpy() for name in names])
                values = np.where(kept, [prune.importance[name].numpy() for name in names], np.nan)
                values = np.maximum(values / (np.nanmax(values) or 1.0), LEAST)
                low, high = kept.sum(1).min(), kept.sum(1).max()
                count = f"{low}" if low == high else f"{low} to {high}"
                where = " in each layer" if len(names) > 1 else ""
                title = f"{count} of {kept.shape[1]}{where}, as of step {prune.step:,}"
            self.images[kind].set_data(_averaged(self.ink.to_rgba(np.ma.masked_invalid(values))))
            self.titles[kind].set_text(f"{KINDS[kind]}: {title}")


def _averaged(colours: np.ndarray) -> np.ndarray:
    """Colours (L, N, 4) with at most DOTS columns: neurons that share a dot are averaged."""
    columns = np.linspace(0, colours.shape[1], min(DOTS, colours.shape[1]), endpoint=False).astype(int)
    counts = np.diff([*columns, colours.shape[1]])
    return np.add.reduceat(colours, columns, axis=1) / counts[:, None]


def plot_run(run: Run, step: int | None = None) -> Figure:
    """One run at one step, the last if None; the static form of `hdlib.lab.explore`.

    Left: held-out KL, hidden width, loss terms, error of the hidden states of each layer. Right: every neuron of the
    teacher at the last prune, the darker the more important, white if removed.
    """
    drawn = RunFigure(run)
    if step is not None:
        drawn.at(step)
    return drawn.figure
