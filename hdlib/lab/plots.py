"""Figures of recorded runs, drawn from run folders. A figure of one study is in its notebook.

Every function returns the figure. With `axes` it draws into these, without into a new figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import matplotlib.pyplot as plt
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from transformers import PreTrainedModel

from ..config import DistillConfig
from ..runs import Run
from ..widths import Widths

SMOKE = 100  # steps; shorter runs only test the code
NOISY = ("total", "seconds")  # drawn as a running median
# Okabe and Ito's palette for colour-blind readers; line styles and markers also differ, for grey print.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "yellow": "#E69F00",
    "grey": "#666666",
}
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
CYCLE = cycler(color=[*COLOURS.values()] * 35, linestyle=STYLES * 42, marker=MARKERS * 30)  # 210 combinations


@contextmanager
def look(settings: Mapping) -> Iterator[None]:
    """Settings of matplotlib for one figure.

    `plt.rc_context` restores `interactive` too, which the backend of a notebook sets with its first figure. Without it,
    no later figure is shown.
    """
    before = {name: plt.rcParams[name] for name in settings}
    plt.rcParams.update(settings)
    try:
        yield
    finally:
        plt.rcParams.update(before)


styled = look(
    {
        "figure.constrained_layout.use": True,
        "legend.fontsize": "small",
        "legend.frameon": False,
        "legend.title_fontsize": "small",
        "lines.markersize": 4,
    }
)
small = look({f"{part}size": "small" for part in ("axes.label", "axes.title", "xtick.label", "ytick.label")})
MEASURES = {
    "held_out_kl": "KL(teacher ‖ student)\nnats per predicted token, held out",
    "held_out_agreement": "top-1 agreement with the teacher\nfraction of predicted tokens, held out",
    "held_out_mlm": "language-model loss\nnats per predicted token, held out",
    "held_out_accuracy": "top-1 accuracy\nfraction of predicted tokens, held out",
    "held_out_cosine_distance": "cosine distance to the teacher\nmean over sentences, held out",
    "held_out_rank_correlation": "rank correlation of similarities\nwith those of the teacher, held out",
    "held_out_recall": "recall of the teacher's 10 neighbours\nin its index, held out",
    "held_out_hidden": "hidden states, best linear map\nmean squared error, held out",
    "total": "loss",
    "hidden_size": "hidden width\nneurons",
    "intermediate_size": "feed-forward width\nneurons a layer",
    "seconds": "seconds a step",
    "elapsed": "seconds of training",
    "encoder_parameters": "parameters of the layers",
    "encoder_gflops": "GFLOP, one forward of the layers",
    "latency": "milliseconds, one forward",
}
PLACES = {"step": "step", "seconds of training": "seconds", "parameters": "parameters"}  # x axes of `plot_arms`
WIDTHS = {
    "hidden": "hidden",
    "ffn": "feed-forward",
    "heads": "heads",
    "head_dim": "dimensions a head",
    "layers": "layers",
}
LABELS = {
    "mlm": "language model",
    "prediction": "prediction",
    "hidden": "hidden states",
    "attention": "attention scores",
    "embedding": "embedding",
    "similarity": "similarities",
}


@styled
def plot_discrepancy(run: Run, axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Held-out KL, of a sentence encoder cosine distance, (above) and hidden width (below) over the steps of a run."""
    if axes is None:
        axes = plt.subplots(2, 1, sharex=True, figsize=(7, 4.6), height_ratios=[2, 1])[1]
    for each, measure in zip(axes, (run.measure, "hidden_size"), strict=True):
        plot_arms({"": [run]}, measure, axes=each)
        each.set_xlim(0, run.config.steps)  # also the steps to come
    axes[0].set_xlabel("")
    plt.setp(axes[1].lines, marker="")
    return axes[0].figure


@styled
def plot_schedule(config: DistillConfig, teacher: PreTrainedModel, axes: Axes | None = None) -> Figure:
    """The fraction of every width that a run will keep over its steps; the weights of `teacher` do not matter."""
    axes = panel("step", "kept fraction of the width", axes, (5, 2.4))
    target, wide = config.shape(teacher), asdict(Widths.of(teacher))
    steps = sorted({round(part * config.steps / 400) for part in range(401)})
    copied = config.initial == "teacher"
    widths = [asdict(config.widths_at(step, teacher, target) if copied else target) for step in steps]
    for name, label in WIDTHS.items():
        kept = [each[name] / wide[name] for each in widths]
        if kept[-1] < 1:
            axes.step(steps, kept, where="post", marker="", label=label)
    axes.set(xlim=(0, config.steps), ylim=(0, 1.03))
    _finish(axes)
    return axes.figure


@styled
def plot_losses(run: Run, axes: Axes | None = None) -> Figure:
    """Every loss term before weighting, over the steps, on a logarithmic axis.

    A running median over ten steps is in front of the raw values.
    """
    axes, metrics = panel("step", "loss term, before weighting", axes), run.metrics
    axes.set_yscale("log")
    for term, look in zip(LABELS, CYCLE, strict=False):
        if term in metrics:
            values = metrics[term].where(metrics[term] > 0).dropna()  # 0 before the first step and the first prune
            every = 1 + len(values) // 2000  # a figure has no more dots
            median = values.rolling(max(10, every), min_periods=1, center=True).median().iloc[::every]
            axes.plot(values.iloc[::every], color=look["color"], linestyle="-", marker="", alpha=0.2, linewidth=0.8)
            axes.plot(median, label=LABELS[term], **look | {"marker": ""})
    _finish(axes, ncols=2)
    return axes.figure


@styled
def plot_arms(
    runs: Mapping[str, list[Run]], measure: str | None = None, x: str = "step", axes: Axes | None = None
) -> Figure:
    """One measure over the training of every arm: the mean of its seeds, and their range as a band.

    `runs` are from `hdlib.lab.Study.distill`. `measure` is a column of `Run.metrics`, None the held-out discrepancy;
    loss and seconds are running medians. `x` is "step", "seconds" of training or "parameters", the mean of the seeds at
    each step.
    """
    column = "elapsed" if x == "seconds" else x
    measure = measure or next((run.measure for each in runs.values() for run in each), "held_out_kl")
    axes = panel(column, measure, axes)
    seeds = any(len(each) > 1 for each in runs.values())
    for arm, each in runs.items():
        curves = pd.concat([_curve(run, measure) for run in each], axis=1).dropna()
        if curves.empty:
            continue
        along = curves.index
        if x != "step":
            along = pd.concat([run.metrics[column] for run in each], axis=1).mean(axis=1)[along]
        look = {"label": f"{_name(arm)} ({len(each)})" if seeds else _name(arm), "clip_on": False}
        (line,) = axes.plot(along, curves.mean(axis=1), markevery=max(1, len(curves) // 20), **look)
        if len(each) > 1:
            look = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
            axes.fill_between(along, curves.min(axis=1), curves.max(axis=1), **look)
    axes.set_ylim(bottom=0)
    if x == "parameters":
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.invert_xaxis()  # training runs to the right
    else:
        axes.set_xlim(left=0)
    _finish(axes, title="arm (seeds), band: lowest to highest" if seeds else None)
    return axes.figure


def _curve(run: Run, measure: str) -> pd.Series:
    values = run.metrics.get(measure, pd.Series(dtype=float)).dropna()
    if measure == "seconds":
        values = values.loc[1:]  # step 0 takes no time
    window = 1 + len(values) // 50
    return values.rolling(window, min_periods=1, center=True).median() if measure in NOISY else values


@styled
def plot_ends(
    table: pd.DataFrame, measure: str, baseline: str | None = None, axes: Axes | None = None, centre: str = "mean"
) -> Figure:
    """The final value of every arm: a row an arm, a point a seed, a bar and a number for the mean or median.

    `measure` is a column of `table` (from `hdlib.lab.final_table`). A line marks the centre of `baseline`.
    """
    arms = {arm: rows[measure] for arm, rows in table.groupby("arm", sort=False, observed=False)}
    label = MEASURES.get(f"held_out_{measure}", measure).replace("\n", ", ")
    axes = panel(label, "", axes, (7, 0.8 + 0.36 * len(arms)), grid="x")
    for row, (arm, values) in enumerate(arms.items()):
        colour, middle = COLOURS["blue" if baseline in (None, arm) else "grey"], values.agg(centre)
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
        axes.plot(middle, row, "|", color=colour, markersize=16, markeredgewidth=2)
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": "small"}
        axes.annotate(f"{middle:#.3g}".rstrip("."), (1.01, row), **place)
        if arm == baseline:
            axes.axvline(middle, color=COLOURS["grey"], linewidth=1, linestyle=":", zorder=0)
    axes.set_yticks(range(len(arms)), map(_name, arms))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return axes.figure


@styled
def plot_layers(run: Run, what: str = "hidden", axes: Axes | None = None) -> Figure:
    """The held-out discrepancy of every layer over the steps of one run, as shades.

    `what` is "hidden" (error of the best linear map between the states) or "attention" (KL of the probabilities).
    """
    axes = axes or plt.subplots(figsize=(7, 2.6))[1]
    columns = run.metrics.filter(regex=rf"^held_out_{what}_\d+$").dropna(how="all")  # a layer that left has none
    layers = [int(name.rpartition("_")[2]) for name in columns]
    shades = axes.pcolormesh(columns.index, layers, columns.to_numpy().T, cmap="cividis", shading="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="step", ylabel="layer")
    unit = {"hidden": "fraction of\nthe mean square", "attention": "nats per token"}[what]
    axes.figure.colorbar(shades, cax=axes.inset_axes((1.03, 0, 0.03, 1)), label=unit)
    return axes.figure


def mark_smoke(figure: Figure, steps: int) -> Figure:
    """Write "smoke scale" across a figure of runs with fewer than 100 steps: they test the code, not the question."""
    if steps < SMOKE:
        look = {"ha": "center", "va": "center", "rotation": 20, "fontsize": 24, "color": "#D55E00", "alpha": 0.35}
        figure.text(0.5, 0.5, f"smoke scale: {steps} steps", **look)
    return figure


def _name(arm: str) -> str:
    return arm.replace("_", " ")


def panel(x: str, y: str, axes: Axes | None = None, size: tuple[float, float] = (7, 3.6), grid: str = "y") -> Axes:
    """Axes with a light grid, without a frame and with the labels of two quantities; new ones if None."""
    axes = axes or plt.subplots(figsize=size, layout="constrained")[1]
    axes.set(xlabel=MEASURES.get(x, x), ylabel=MEASURES.get(y, y))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.5, alpha=0.4)
    axes.set_prop_cycle(CYCLE)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _finish(axes: Axes, **legend) -> None:
    """Add a legend if there are names, and a notice if nothing was drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**legend)
    if not axes.lines:
        look = {"ha": "center", "va": "center", "transform": axes.transAxes, "color": COLOURS["grey"]}
        axes.text(0.5, 0.5, "nothing recorded yet", **look)
