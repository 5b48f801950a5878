"""Figures of recorded runs, drawn from run folders, and of the coupling inside a model.

Every function returns the figure. With `axes` it draws into these, without into a new figure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor
from transformers import PreTrainedModel

from ..config import DistillConfig
from ..losses import TERMS
from ..runs import Run
from ..widths import Widths, axes_of

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
styled = plt.rc_context(
    {
        "figure.constrained_layout.use": True,
        "legend.fontsize": "small",
        "legend.frameon": False,
        "legend.title_fontsize": "small",
        "lines.markersize": 4,
    }
)
small = plt.rc_context({f"{part}size": "small" for part in ("axes.label", "axes.title", "xtick.label", "ytick.label")})
MEASURES = {
    "held_out_kl": "KL(teacher ‖ student)\nnats per predicted token, held out",
    "held_out_agreement": "top-1 agreement with the teacher\nfraction of predicted tokens, held out",
    "held_out_mlm": "language-model loss\nnats per predicted token, held out",
    "held_out_accuracy": "top-1 accuracy\nfraction of predicted tokens, held out",
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
WIDTHS = {"hidden": "hidden", "ffn": "feed-forward", "heads": "heads", "head_dim": "dimensions a head"}
LABELS = {
    "mlm": "language model",
    "prediction": "prediction (KL)",
    "hidden": "hidden states",
    "attention": "attention scores",
    "embedding": "embedding",
}


@styled
def plot_discrepancy(runs: Run | Mapping[str, Run], axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Held-out KL (above) and hidden width (below) over the steps, of one run or of several by their names."""
    runs = {"": runs} if isinstance(runs, Run) else runs
    if axes is None:
        axes = plt.subplots(2, 1, sharex=True, figsize=(7, 4.6), height_ratios=[2, 1])[1]
    for each, measure in zip(axes, ("held_out_kl", "hidden_size"), strict=True):
        plot_arms({name: [run] for name, run in runs.items()}, measure, axes=each)
        each.set_xlim(0, max(run.config.steps for run in runs.values()))  # also the steps to come
    axes[0].set_xlabel("")
    plt.setp(axes[1].lines, marker="")
    if axes[1].get_legend():
        axes[1].get_legend().remove()
    return axes[0].figure


@styled
def plot_schedule(config: DistillConfig, teacher: PreTrainedModel, axes: Axes | None = None) -> Figure:
    """The fraction of every width that a run will keep over its steps; the weights of `teacher` do not matter."""
    axes = _panel(axes, "step", "kept fraction of the width", (5, 2.4))
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
def plot_losses(run: Run, axes: Axes | None = None, window: int = 10) -> Figure:
    """Every loss term before weighting, over the steps, on a logarithmic axis.

    A running median over `window` steps is in front of the raw values.
    """
    axes, metrics = _panel(axes, "step", "loss term, before weighting"), run.metrics
    axes.set_yscale("log")
    for term, look in zip(TERMS, CYCLE, strict=False):
        if term in metrics:
            values = metrics[term].where(metrics[term] > 0).dropna()  # 0 before the first step and the first prune
            every = 1 + len(values) // 2000  # a figure has no more dots
            median = values.rolling(max(window, every), min_periods=1, center=True).median().iloc[::every]
            axes.plot(values.iloc[::every], color=look["color"], linestyle="-", marker="", alpha=0.2, linewidth=0.8)
            axes.plot(median, label=LABELS[term], **look | {"marker": ""})
    _finish(axes, ncols=2)
    return axes.figure


@styled
def plot_arms(
    runs: Mapping[str, list[Run]], measure: str = "held_out_kl", x: str = "step", axes: Axes | None = None
) -> Figure:
    """One measure over the training of every arm: the mean of its seeds, and their range as a band.

    `runs` are from `hdlib.lab.Study.distill`. `measure` is a column of `Run.metrics`; loss and seconds are running
    medians. `x` is "step", "seconds" of training or "parameters", the mean of the seeds at each step.
    """
    column = "elapsed" if x == "seconds" else x
    axes = _panel(axes, column, measure)
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
    _finish(axes, title="arm (seeds)" if seeds else None)
    return axes.figure


def _curve(run: Run, measure: str) -> pd.Series:
    values = run.metrics.get(measure, pd.Series(dtype=float)).dropna()
    if measure == "seconds":
        values = values.loc[1:]  # step 0 takes no time
    window = 1 + len(values) // 50
    return values.rolling(window, min_periods=1, center=True).median() if measure in NOISY else values


@styled
def plot_ends(
    table: pd.DataFrame,
    measure: str = "kl",
    baseline: str | None = None,
    axes: Axes | None = None,
    centre: str = "mean",
) -> Figure:
    """The final value of every arm: a row an arm, a point a seed, a bar and a number for the mean or median.

    `measure` is a column of `table` (from `hdlib.lab.final_table`). A line marks the centre of `baseline`.
    """
    arms = {arm: rows[measure] for arm, rows in table.groupby("arm", sort=False, observed=False)}
    label = MEASURES.get(f"held_out_{measure}", measure).replace("\n", ", ")
    axes = _panel(axes, label, "", (7, 0.8 + 0.36 * len(arms)), grid="x")
    for row, (arm, values) in enumerate(arms.items()):
        colour, middle = COLOURS["orange" if arm == baseline else "blue"], values.agg(centre)
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
def plot_scores(table: pd.DataFrame) -> Figure:
    """The scores of fine-tuned models: a panel a task, a row a model, a point a seed, a bar and a number at the median.

    Vertical lines are baselines without a language model: dotted the most frequent class, dashed a bag of words.
    `table` is from `hdlib.downstream.score`.
    """
    table = table.assign(score=100 * table["score"])
    models = table[table["seed"].notna()]
    models = models.assign(arm=pd.Categorical(models["model"], models["model"].unique()))
    tasks = table["task"].unique()
    size = (max(4.5, 1.4 + 2.6 * len(tasks)), 1.4 + 0.36 * models["model"].nunique())
    figure, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        plot_ends(models[models["task"] == task], "score", axes=axes, centre="median")
        axes.set(title=task, xlabel="score, per cent")
        for baseline, style in (("majority", ":"), ("bag_of_words", "--")):
            for score in table.loc[(table["task"] == task) & (table["model"] == baseline), "score"]:
                look = {"color": COLOURS["grey"], "linestyle": style, "linewidth": 1, "zorder": 0}
                axes.axvline(score, label=_name(baseline), **look)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="medium")
    return figure


@styled
def plot_speed_up(table: pd.DataFrame, baseline: str = "teacher") -> Figure:
    """Measured speed-up over a baseline against the reduction of its operations, a panel for each batch size.

    On the dotted line, time falls as much as the operations. `table` is from `hdlib.lab.cost.forward_table`.
    """
    cases = ["batch_size", "length"]
    base = table[table["model"] == baseline].set_index(cases)
    others = table[table["model"] != baseline].set_index(cases)
    for column in ("gflop", "milliseconds"):
        others[column] = base[column].reindex(others.index) / others[column]
    sizes = list(others.groupby("batch_size"))
    size = (4.2 * len(sizes), 3.6)
    figure, panels = plt.subplots(1, len(sizes), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, (batch_size, rows) in zip(panels[0], sizes, strict=True):
        _panel(axes, "times fewer operations", "", grid="both").set_title(f"batch {batch_size}")
        promised = [1, others["gflop"].max()]
        axes.plot(promised, promised, color=COLOURS["grey"], linestyle=":", marker="", linewidth=1, zorder=0)
        for length, each in rows.sort_values("gflop").groupby("length"):
            axes.plot(each["gflop"], each["milliseconds"], label=f"{length} tokens")
    panels[0][0].set(ylabel="times faster", ylim=(0, None))
    _finish(panels[0][0])
    return figure


@styled
def plot_layers(run: Run, what: str = "hidden", axes: Axes | None = None) -> Figure:
    """The held-out discrepancy of every layer over the steps of one run, as shades.

    `what` is "hidden" (error of the best linear map between the states) or "attention" (KL of the probabilities).
    """
    axes = axes or plt.subplots(figsize=(7, 2.6))[1]
    columns = run.metrics.filter(regex=rf"^held_out_{what}_\d+$").dropna()
    layers = np.arange(1, columns.shape[1] + 1)
    shades = axes.pcolormesh(columns.index, layers, columns.to_numpy().T, cmap="cividis", shading="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="step", ylabel="layer")
    unit = {"hidden": "fraction of\nthe mean square", "attention": "nats per token"}[what]
    axes.figure.colorbar(shades, cax=axes.inset_axes((1.03, 0, 0.03, 1)), label=unit)
    return axes.figure


@styled
def plot_prunes(run: Run, axes: Axes | None = None) -> Figure:
    """The held-out KL just before and after every prune, and between prunes.

    Raises ValueError for a run without `eval_prunes`.
    """
    if "before_prune_kl" not in run.metrics:
        raise ValueError(f"{run.folder} was not measured around its prunes: set eval_prunes=True in its config")
    axes = _panel(axes, "step", "held_out_kl")
    metrics = run.metrics.dropna(subset=["held_out_kl"])
    before, after = metrics["before_prune_kl"].dropna(), metrics["held_out_kl"]
    path = pd.concat([before, after]).sort_index(kind="stable")  # before a prune, then after it
    axes.plot(path, color=COLOURS["blue"], linestyle="--", marker="", linewidth=1, label="training")
    axes.vlines(before.index, before, after[before.index], COLOURS["orange"], linewidth=1.5, label="prune", zorder=3)
    axes.set_ylim(bottom=0)
    _finish(axes)
    return axes.figure


@styled
def plot_overlap(shares: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """The fraction of kept neurons that two arms share, from `hdlib.lab.overlap`, as shades with numbers."""
    size = 1.2 + 0.7 * len(shares)
    axes = axes or plt.subplots(figsize=(size + 1.5, size))[1]
    named = shares.rename(index=_name, columns=_name)
    _heatmap(axes, named, shares.map("{:.2f}".format), "fraction of neurons kept by both", "cividis", 0, 1)
    plt.setp(axes.get_xticklabels(), rotation=35, ha="right")
    return axes.figure


@styled
def plot_map(summary: pd.DataFrame, rows: str, columns: str, axes: Axes | None = None) -> Figure:
    """The difference between two arms over two settings, as shades around 0 with numbers.

    `summary` has a row a cell: the settings (columns `rows` and `columns`), and `count`, `mean`, `min` and `max` of the
    difference over the seeds. A star marks cells with several seeds that agree on the sign.
    """
    agreed = (summary["count"] > 1) & ((summary["min"] > 0) | (summary["max"] < 0))
    text = summary["mean"].map("{:+.3f}".format) + agreed.map({True: " *", False: ""})
    cells = summary.assign(text=text).set_index([rows, columns])[["mean", "text"]].unstack()
    means = cells["mean"]
    axes = axes or plt.subplots(figsize=(2.6 + 1.1 * means.shape[1], 1.4 + 0.55 * len(means)))[1]
    largest = float(means.abs().max().max()) or 1.0
    _heatmap(axes, means, cells["text"], "difference of KL, nats", "PuOr", -largest, largest)
    axes.set(xlabel=columns, ylabel=rows, aspect="auto")
    return axes.figure


def _heatmap(axes: Axes, values: pd.DataFrame, text: pd.DataFrame, label: str, cmap: str, low: float, high: float):
    """A cell for each value, with its text in black or white, whichever contrasts more; missing values are empty."""
    image = axes.imshow(values, cmap=cmap, vmin=low, vmax=high)
    axes.set_xticks(range(values.shape[1]), values.columns)
    axes.set_yticks(range(len(values)), values.index)
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        if np.isfinite(value):
            light = np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114))
            look = {"ha": "center", "va": "center", "color": "black" if light > 0.5 else "white"}
            axes.text(column, row, text.iloc[row, column], **look)
    axes.figure.colorbar(image, ax=axes, label=label)


@styled
def plot_ladder(table: pd.DataFrame, x: str, measure: str = "kl", axes: Axes | None = None) -> Figure:
    """One measure against a cost on a logarithmic axis: a line an arm, a point a seed.

    `table` has the columns `arm`, `x` (a cost) and `measure`, a column of `hdlib.lab.final_table`.
    """
    axes = _panel(axes, x, MEASURES.get(f"held_out_{measure}", measure), (5, 3.6))
    for (arm, rows), look in zip(table.groupby("arm", sort=False), CYCLE, strict=False):
        axes.plot(rows.groupby(x)[measure].mean(), label=_name(arm), **look | {"marker": ""})
        axes.plot(rows[x], rows[measure], alpha=0.6, markeredgewidth=0, **look | {"linestyle": ""})
    axes.set_xscale("log")
    costs = sorted(table[x].unique())
    axes.set_xticks(costs, [EngFormatter()(float(f"{c:.2g}")) if c >= 1e4 else f"{c:.3g}" for c in costs])
    axes.set_xticks([], minor=True)
    return axes.figure


@styled
@small
def plot_coupling(model: PreTrainedModel, kept: Mapping[str, Tensor], layer: int = 0) -> Figure:
    """The matrices of one layer and of the embedding, with the rows and columns that a prune removes.

    `model` is small and not yet narrowed; `kept` is from `hdlib.narrow`. Removed neurons have the colour of their
    group, darker where two groups cross.
    """
    matrices = {
        name: axes
        for name, axes in axes_of(model).items()
        if len(axes) == 2 and re.search(rf"[.]{layer}[.]|embed", name)
    }
    kinds = sorted({_kind(block) for axes in matrices.values() for axis in axes for block in axis or ()})
    tints = (0.25 + 0.75 * np.array(to_rgb(colour)) for colour in COLOURS.values())
    colours = dict(zip(kinds, tints, strict=False))
    rows = -(-len(matrices) // 5)
    figure, grid = plt.subplots(rows, 5, figsize=(9, 2.35 * rows), squeeze=False)
    for place in grid.flat[len(matrices) :]:
        place.axis("off")
    for place, (name, axes) in zip(grid.flat, matrices.items(), strict=False):
        shape = model.get_parameter(name).shape
        down, across = (_tints(axis, size, kept, colours) for axis, size in zip(axes, shape, strict=True))
        place.imshow(down[:, None] * across)  # (rows, columns, 3); colours multiply where groups cross
        short = re.sub(r".*[.]\d+[.]|[.]weight$|^.*?embeddings[.]|attention[.]self[.]", "", name)
        down, across = (", ".join(dict.fromkeys(map(_kind, axis or ()))) or "fixed" for axis in axes)
        place.set(title=f"{short}\n{shape[0]} × {shape[1]}", xlabel=across, ylabel=down)
        place.set_xticks(np.arange(-0.5, shape[1]), [])
        place.set_yticks(np.arange(-0.5, shape[0]), [])
        place.grid(color="#BBBBBB", linewidth=0.6, alpha=1)
        place.tick_params(length=0)
    legend = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), title="removed with a neuron of")
    return figure


def _kind(block) -> str:
    return block.group.rpartition(".")[2].replace("_", " / ")


def _tints(axis, size: int, kept: Mapping[str, Tensor], colours: Mapping[str, np.ndarray]) -> np.ndarray:
    """Colours (size, 3) of the indices of an axis: white where they are kept, else that of their group."""
    tints = [np.empty((0, 3)) if axis else np.ones((size, 3))]
    for block in axis or ():
        removed = ~np.isin(np.arange(block.size), kept[block.group]).repeat(block.unit)
        tints.append(np.where(removed[:, None], colours[_kind(block)], 1.0))
    return np.concatenate(tints)


def mark_smoke(figure: Figure, steps: int) -> Figure:
    """Write "smoke scale" across a figure of runs with fewer than 100 steps: they test the code, not the question."""
    if steps < SMOKE:
        look = {"ha": "center", "va": "center", "rotation": 20, "fontsize": 24, "color": "#D55E00", "alpha": 0.35}
        figure.text(0.5, 0.5, f"smoke scale: {steps} steps", **look)
    return figure


def _name(arm: str) -> str:
    return arm.replace("_", " ")


def _panel(axes: Axes | None, x: str, y: str, size: tuple[float, float] = (7, 3.6), grid: str = "y") -> Axes:
    """Axes with a light grid, without a frame and with the labels of two quantities; new ones if None."""
    axes = axes or plt.subplots(figsize=size)[1]
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
