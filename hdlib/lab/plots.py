"""Figures: of recorded runs, drawn from run folders, never from live objects; and of how a model is coupled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
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

# Okabe and Ito's palette: told apart by colour-blind readers, and here by line style in grey print too.
SMOKE = 100  # steps; shorter runs only test the code
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
MEASURES = {
    "held_out_kl": "KL(teacher ‖ student)\nnats per predicted word, held out",
    "held_out_agreement": "same first guess as the teacher\nshare of predicted words, held out",
    "held_out_mlm": "language-model loss\nnats per predicted word, held out",
    "held_out_accuracy": "words guessed right\nshare of predicted words, held out",
    "held_out_hidden": "hidden states, best linear map\nmean squared error, held out",
}
RECORDED_EACH_STEP = {
    "total": "loss",
    "hidden_size": "hidden width\nneurons",
    "intermediate_size": "feed-forward width\nneurons a layer",
    "parameters": "parameters",
    "seconds": "seconds a step",
}
NOISY = ("total", "seconds")  # drawn through a running median
PLACES = {"step": "step", "seconds of training": "seconds", "parameters": "parameters"}  # along which curves go
COSTS = {
    "encoder_parameters": "parameters of the layers",
    "encoder_gflops": "GFLOP, one forward of the layers",
    "latency": "milliseconds, one forward",
}
POINTS = 2000  # of a long curve that are drawn: as many as a figure has dots
WIDTHS = {"hidden": "hidden", "ffn": "feed-forward", "heads": "heads", "head_dim": "dimensions of a head"}
LABELS = {
    "mlm": "words (language model)",
    "prediction": "prediction (KL)",
    "hidden": "hidden states",
    "attention": "attention scores",
    "embedding": "embedding",
}


def plot_discrepancy(runs: Run | Mapping[str, Run], axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Prediction discrepancy (above) and hidden width (below) along the steps.

    Args:
        runs: one run, or several by the name they shall have in the legend.
        axes: two axes to draw into; a new figure where none are given.

    Returns:
        The figure. A run without a record yet gives empty axes that say so.
    """
    runs = {"": runs} if isinstance(runs, Run) else runs
    upper, lower = axes if axes is not None else _two_axes()
    for (name, run), colour, style in zip(runs.items(), _cycle(COLOURS.values()), _cycle(STYLES), strict=False):
        metrics = run.metrics
        if metrics.empty:
            continue
        measured = metrics["held_out_kl"].dropna()
        marker = "o" if len(measured) <= 60 else None
        upper.plot(
            measured.index,
            measured,
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=3,
            clip_on=False,
            label=name,
        )
        width = metrics["hidden_size"]
        width = width[width.diff().ne(0) | (width.index == width.index[-1])]  # where it changes is enough
        lower.step(width.index, width, where="post", color=colour, linestyle=style)
    _finish(upper, MEASURES["held_out_kl"])
    _finish(lower, "hidden width\nneurons")
    lower.set_xlabel("step")
    lower.set_xlim(0, max(run.arguments["config"]["steps"] for run in runs.values()))  # what is to come shows too
    lower.set_ylim(bottom=0)
    upper.set_ylim(bottom=0)
    if any(runs):
        upper.legend(frameon=False)
    return upper.figure


def plot_schedule(config: DistillConfig, teacher: PreTrainedModel, axes: Axes | None = None) -> Figure:
    """What a run will leave of every width along its steps, before anything is trained.

    Args:
        config: of the run.
        teacher: a model of the right shape; its weights do not matter.
        axes: where to draw; a new figure if None.
    """
    axes = axes or plt.subplots(figsize=(5, 2.4), layout="constrained")[1]
    target, wide = config.shape(teacher), asdict(Widths.of(teacher))
    steps = sorted({round(part * config.steps / 400) for part in range(401)})  # enough for every dot
    copied = config.initial == "teacher"
    widths = [asdict(config.widths_at(step, teacher, target) if copied else target) for step in steps]
    shapes = pd.DataFrame(widths, index=steps) / pd.Series(wide)
    for (name, label), colour, style in zip(WIDTHS.items(), COLOURS.values(), STYLES, strict=False):
        if shapes[name].iloc[-1] < 1:
            axes.step(steps, shapes[name], where="post", color=colour, linestyle=style, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.set_xlim(0, config.steps)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("step")
    axes.set_ylabel("kept of the width")
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    return axes.figure


def plot_losses(run: Run, axes: Axes | None = None, window: int = 10) -> Figure:
    """Every loss term along the steps, before weighting, on a logarithmic axis.

    Args:
        run: finished or not.
        axes: where to draw; a new figure if None.
        window: steps of the running median through which each curve is drawn; the raw values stand behind it. Of
            runs of more than 2,000 steps, medians of equal stretches in place of steps.
    """
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    metrics = run.metrics
    for term, colour, style in zip(TERMS, COLOURS.values(), STYLES, strict=False):
        if term in metrics:
            values = metrics[term].dropna()
            values = values[values > 0]  # exactly 0 before the first step and the first prune: no logarithm
            every = 1 + len(values) // POINTS
            medians = values.groupby(np.arange(len(values)) // every).median().set_axis(values.index[::every])
            values, smooth = values.iloc[::every], medians.rolling(window, min_periods=1, center=True).median()
            axes.plot(values.index, values, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(smooth.index, smooth, color=colour, linestyle=style, label=LABELS[term])
    _finish(axes, "loss term, before weighting")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    if axes.lines:
        axes.legend(frameon=False, ncols=2, fontsize="small")
    return axes.figure


def plot_arms(
    runs: Mapping[str, list[Run]], measure: str = "held_out_kl", x: str = "step", axes: Axes | None = None
) -> Figure:
    """One measure along the training of every arm: the mean over its seeds, and their range as a band.

    Args:
        runs: as `hdlib.lab.Study.distill` returns them.
        measure: a column of `Run.metrics`; loss and seconds of single steps through a running median.
        x: "step"; or "seconds" (of training so far) or "parameters", the mean over the seeds at each step.
        axes: where to draw; a new figure if None.
    """
    axes = axes or plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    seeds = any(len(each) > 1 for each in runs.values())
    for (arm, each), colour, style, marker in zip(
        runs.items(), _cycle(COLOURS.values()), _cycle(STYLES), _cycle(MARKERS), strict=False
    ):
        curves = pd.concat([_curve(run, measure) for run in each], axis=1).dropna()
        places = curves.index
        if x != "step":
            column = "elapsed" if x == "seconds" else x
            places = pd.concat([run.metrics[column] for run in each], axis=1).mean(axis=1)[curves.index]
        axes.plot(
            places,
            curves.mean(axis=1),
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=4,
            markevery=max(1, len(curves) // 8),
            clip_on=False,
            label=f"{words(arm)} ({len(each)})" if seeds else words(arm),
        )
        if len(each) > 1:
            axes.fill_between(places, curves.min(axis=1), curves.max(axis=1), color=colour, alpha=0.15, linewidth=0)
    _finish(axes, MEASURES.get(measure) or RECORDED_EACH_STEP.get(measure, measure))
    axes.set_xlabel(next(words for words, place in PLACES.items() if place == x))
    axes.xaxis.set_major_locator(MaxNLocator(integer=x == "step"))
    axes.set_ylim(bottom=0)
    if x == "parameters":
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.invert_xaxis()  # a run goes to the right here too
    else:
        axes.set_xlim(left=0)
    if axes.lines:
        title = "arm (seeds)" if seeds else None
        axes.legend(frameon=False, fontsize="small", title=title, title_fontsize="small")
    return axes.figure


def _curve(run: Run, measure: str) -> pd.Series:
    values = run.metrics[measure].dropna()
    if measure == "seconds":
        values = values.loc[1:]  # before the first step nothing took any
    window = 1 + len(values) // 50
    return values.rolling(window, min_periods=1, center=True).median() if measure in NOISY else values


def plot_ends(
    table: pd.DataFrame, measure: str = "kl", baseline: str | None = None, axes: Axes | None = None
) -> Figure:
    """How every arm ended: a point for each seed, a bar at their mean, an arm a row.

    Args:
        table: as `hdlib.lab.final_table` returns it.
        measure: a column of it.
        baseline: the arm whose mean is drawn as a line through all rows.
        axes: where to draw; a new figure if None.
    """
    arms = list(table["arm"].unique())
    axes = axes or plt.subplots(figsize=(7, 0.8 + 0.36 * len(arms)), layout="constrained")[1]
    means = table.groupby("arm")[measure].mean()
    if baseline in means:
        axes.axvline(means[baseline], color=COLOURS["grey"], linewidth=1, linestyle=":", zorder=0)
    for row, arm in enumerate(arms):
        values = table.loc[table["arm"] == arm, measure]
        colour = COLOURS["orange"] if arm == baseline else COLOURS["blue"]
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
        axes.plot(means[arm], row, "|", color=colour, markersize=16, markeredgewidth=2)
        axes.annotate(
            f"{means[arm]:#.3g}".rstrip("."),
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize="small",
        )
    axes.set_yticks(range(len(arms)), [words(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(MEASURES.get(f"held_out_{measure}", measure).replace("\n", ", "))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="x", linewidth=0.5, alpha=0.4)
    return axes.figure


def plot_scores(table: pd.DataFrame) -> Figure:
    """How fine-tuned models score, a panel for each task: a point for each seed, a bar at their median.

    Lines stand for what needs no language model: dotted the most frequent class, dashed a bag of words.

    Args:
        table: as `hdlib.downstream.score` returns it.
    """
    tasks = list(table["task"].unique())
    models = list(table.loc[table["seed"].notna(), "model"].unique())
    size = (max(4.5, 1.4 + 2.6 * len(tasks)), 1.4 + 0.36 * len(models))
    figure, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, task in zip(panels[0], tasks, strict=True):
        of_task = table[table["task"] == task]
        for baseline, style in (("majority", ":"), ("bag_of_words", "--")):
            for score in of_task.loc[of_task["model"] == baseline, "score"]:
                line = axes.axvline(100 * score, color=COLOURS["grey"], linestyle=style, linewidth=1, zorder=0)
                line.set_label(words(baseline))
        for row, model in enumerate(models):
            scores = 100 * of_task.loc[of_task["model"] == model, "score"]
            axes.plot(
                scores, [row] * len(scores), "o", color=COLOURS["blue"], markersize=5, alpha=0.6, markeredgewidth=0
            )
            axes.plot(scores.median(), row, "|", color=COLOURS["blue"], markersize=16, markeredgewidth=2)
        axes.set_title(task)
        axes.set_xlabel("score, per cent")
        axes.set_yticks(range(len(models)), [words(model) for model in models])
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(axis="x", linewidth=0.5, alpha=0.4)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_speed_up(table: pd.DataFrame, baseline: str = "teacher") -> Figure:
    """How much faster than a baseline each model is, against what its operations promise; a panel for each batch size.

    On the dotted line a forward is as many times faster as it has fewer operations.

    Args:
        table: as `hdlib.lab.cost.forward_table` returns it.
        baseline: the model that the others are compared with.
    """
    places = ["batch_size", "length"]
    base = table[table["model"] == baseline].set_index(places)
    others = table[table["model"] != baseline].set_index(places)
    others = others.assign(
        promised=base["gflop"].reindex(others.index) / others["gflop"],
        measured=base["milliseconds"].reindex(others.index) / others["milliseconds"],
    ).reset_index()
    sizes = sorted(others["batch_size"].unique())
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(4.2 * len(sizes), 3.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    highest = others["promised"].max() * 1.05
    for axes, batch_size in zip(panels[0], sizes, strict=True):
        axes.plot([1, highest], [1, highest], color=COLOURS["grey"], linestyle=":", linewidth=1, zorder=0)
        of_size = others[others["batch_size"] == batch_size]
        for (length, each), colour, style, marker in zip(
            of_size.groupby("length"), _cycle(COLOURS.values()), _cycle(STYLES), _cycle(MARKERS), strict=False
        ):
            each = each.sort_values("promised")
            axes.plot(
                each["promised"],
                each["measured"],
                color=colour,
                linestyle=style,
                marker=marker,
                label=f"{length} tokens",
            )
        axes.set_title(f"batch {batch_size}")
        axes.set_xlabel("times fewer operations")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.5, alpha=0.4)
    panels[0][0].set_ylabel("times faster")
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].legend(frameon=False)
    return figure


def plot_layers(run: Run, what: str = "hidden", axes: Axes | None = None, scale: Axes | None = None) -> Figure:
    """The discrepancy of every layer along one run, as shades: steps to the right, layers upwards.

    Args:
        run: finished or not.
        what: "hidden" (what the best linear map leaves of the states) or "attention" (KL of what is attended to).
        axes: where to draw; a new figure if None.
        scale: where the scale of the shades goes; beside the others if None.
    """
    axes = axes or plt.subplots(figsize=(7, 2.6), layout="constrained")[1]
    columns = run.metrics.filter(regex=rf"^held_out_{what}_\d+$").dropna()
    layers = np.arange(1, columns.shape[1] + 1)
    shades = axes.pcolormesh(columns.index, layers, columns.to_numpy().T, cmap="cividis", shading="nearest")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    unit = {"hidden": "share of the mean square", "attention": "nats per token"}[what]
    axes.figure.colorbar(shades, ax=axes, cax=scale, label=unit)
    return axes.figure


def plot_prunes(run: Run, axes: Axes | None = None) -> Figure:
    """What every prune does to the discrepancy, and what training makes good until the next one.

    Args:
        run: one with `eval_prunes`, measured just before and just after every prune.
        axes: where to draw; a new figure if None.

    Raises:
        ValueError: the run was not measured around its prunes.
    """
    if "before_prune_kl" not in run.metrics:
        raise ValueError(f"{run.folder} was not measured around its prunes: set eval_prunes=True in its config")
    axes = axes or plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    measured = run.metrics.dropna(subset=["held_out_kl"])
    before = measured["before_prune_kl"].dropna()
    after = measured["held_out_kl"]
    axes.vlines(before.index, before, after[before.index], color=COLOURS["orange"], linewidth=1.5, label="a prune")
    starts = [0, *before.index]
    for number, (start, end) in enumerate(zip(starts, [*before.index, measured.index[-1]], strict=True)):
        between = after.loc[start:end].copy()
        if end in before:
            between.loc[end] = before[end]
        label = None if number else "training between two"
        axes.plot(between.index, between, color=COLOURS["blue"], linestyle="--", linewidth=1, label=label)
    _finish(axes, MEASURES["held_out_kl"])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    return axes.figure


def plot_overlap(shares: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """Share of kept neurons that two arms have in common; `shares` as `hdlib.lab.overlap` returns it."""
    size = 1.2 + 0.7 * len(shares)
    axes = axes or plt.subplots(figsize=(size + 1.5, size), layout="constrained")[1]
    shades = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    labels = [words(arm) for arm in shares]
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    for (row, column), share in np.ndenumerate(shares.to_numpy()):
        if np.isfinite(share):
            colour = "black" if share > 0.6 else "white"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize="small")
    axes.figure.colorbar(shades, ax=axes, label="share of neurons kept by both")
    return axes.figure


def plot_map(summary: pd.DataFrame, rows: str, columns: str, axes: Axes | None = None) -> Figure:
    """Where one arm beats another, over two settings, as shades around 0 with numbers.

    Args:
        summary: a row for each cell of the map, with the columns `rows` and `columns` (the settings) and `count`,
            `mean`, `min` and `max` of a difference over the seeds. A star marks cells in which all of several seeds
            agree about its sign.
        rows, columns: which settings go down and across.
        axes: where to draw; a new figure if None.
    """
    cells = summary.set_index([rows, columns])
    means = cells["mean"].unstack()
    height = 1.4 + 0.55 * len(means)
    axes = axes or plt.subplots(figsize=(2.6 + 1.1 * means.shape[1], height), layout="constrained")[1]
    largest = float(means.abs().max().max()) or 1.0
    shades = axes.imshow(means, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), mean in np.ndenumerate(means.to_numpy()):
        if np.isfinite(mean):
            cell = cells.loc[means.index[row], means.columns[column]]
            agreed = cell["count"] > 1 and (cell["min"] > 0 or cell["max"] < 0)
            star = " *" if agreed else ""
            colour = "white" if abs(mean) > 0.7 * largest else "black"
            axes.text(column, row, f"{mean:+.3f}{star}", ha="center", va="center", color=colour)
    axes.set_xticks(range(means.shape[1]), means.columns)
    axes.set_yticks(range(len(means)), means.index)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.figure.colorbar(shades, ax=axes, label="difference of KL, nats")
    return axes.figure


def plot_ladder(table: pd.DataFrame, x: str, measure: str = "kl", axes: Axes | None = None) -> Figure:
    """One measure against a cost, an arm a line, a point for each seed.

    Args:
        table: of runs, with the columns `arm`, `x` and `measure`.
        x: the column of the cost, drawn on a logarithmic axis.
        measure: a column of `hdlib.lab.final_table`.
        axes: where to draw; a new figure if None.
    """
    axes = axes or plt.subplots(figsize=(5, 3.6), layout="constrained")[1]
    for (arm, rows), colour, style, marker in zip(
        table.groupby("arm", sort=False), _cycle(COLOURS.values()), _cycle(STYLES), _cycle(MARKERS), strict=False
    ):
        line = rows.groupby(x)[measure].mean()
        axes.plot(line.index, line, color=colour, linestyle=style, label=words(arm))
        axes.plot(rows[x], rows[measure], marker, color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
    _finish(axes, MEASURES.get(f"held_out_{measure}", measure))
    axes.set_xscale("log")
    rungs = sorted(table[x].unique())
    axes.set_xticks(rungs, [f"{_short(rung / 1e6)} M" if rung >= 1e4 else _short(rung) for rung in rungs])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(COSTS.get(x, x))
    return axes.figure


def _short(number: float) -> str:
    """Two digits, and never an exponent."""
    return f"{float(f'{number:.2g}'):g}"


def words(name: str) -> str:
    """The name of an arm as a label."""
    return name.replace("_", " ")


def plot_coupling(model: PreTrainedModel, kept: Mapping[str, Tensor], layer: int = 0) -> Figure:
    """The matrices of one layer and of the embedding, with what goes when neurons go.

    Args:
        model: a small one, before it is narrowed: every element is drawn.
        kept: as `hdlib.narrow` returns it, what stays of each group. The slices of the others are coloured
            by their group, darker where two groups cross.
        layer: which one.
    """
    axes_by_name = {
        name: axes
        for name, axes in axes_of(model).items()
        if len(axes) == 2 and re.search(rf"[.]{layer}[.]|embed", name)
    }
    kinds = sorted(
        {block.group.rpartition(".")[2] for axes in axes_by_name.values() for axis in axes for block in axis or ()}
    )
    tints = (0.25 + 0.75 * np.array(to_rgb(colour)) for colour in COLOURS.values())  # they multiply where groups cross
    colours = dict(zip(kinds, tints, strict=False))
    columns = 5
    rows = -(-len(axes_by_name) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(9, 2.35 * rows), layout="constrained", squeeze=False)
    for place in grid.flat:
        place.axis("off")
    for place, (name, axes) in zip(grid.flat, axes_by_name.items(), strict=False):
        _draw_matrix(place, name, model.get_parameter(name).shape, axes, kept, colours)
    legend = [Patch(color=colour, label=kind.replace("_", " / ")) for kind, colour in colours.items()]
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=len(legend),
        frameon=False,
        title="goes with a neuron of the group",
    )
    return figure


def _draw_matrix(
    place: Axes, name: str, shape, axes, kept: Mapping[str, Tensor], colours: dict[str, np.ndarray]
) -> None:
    """Rows downwards, columns to the right; white is what stays."""
    image, labels = np.ones((*shape, 3)), []
    for axis, blocks in enumerate(axes):
        start = 0
        for block in blocks or ():
            gone = sorted(set(range(block.size)) - set(kept[block.group].tolist()))
            for first in (start + neuron * block.unit for neuron in gone):
                lines = [slice(None), slice(None)]
                lines[axis] = slice(first, first + block.unit)
                image[tuple(lines)] *= colours[block.group.rpartition(".")[2]]
            start += block.size * block.unit
        kinds = dict.fromkeys(block.group.rpartition(".")[2].replace("_", " / ") for block in blocks or ())
        labels.append(", ".join(kinds) or "fixed")
    place.axis("on")
    place.imshow(image, aspect="equal")
    place.set_xticks(np.arange(-0.5, shape[1]), [])
    place.set_yticks(np.arange(-0.5, shape[0]), [])
    place.grid(color="#BBBBBB", linewidth=0.6)
    place.tick_params(length=0)
    short = re.sub(r".*[.]\d+[.]|[.]weight$|^.*?embeddings[.]", "", name)
    place.set_title(f"{short.replace('attention.self.', '')}\n{shape[0]} × {shape[1]}", fontsize="small")
    place.set_ylabel(labels[0], fontsize="small")
    place.set_xlabel(labels[1], fontsize="small")


def mark_smoke(figure: Figure, steps: int) -> Figure:
    """Write "smoke scale" across a figure of runs with fewer than 100 steps: they test the code, not the question."""
    if steps < SMOKE:
        figure.text(
            0.5,
            0.5,
            f"smoke scale: {steps} steps",
            ha="center",
            va="center",
            rotation=20,
            fontsize=24,
            color="#D55E00",
            alpha=0.35,
        )
    return figure


def _two_axes() -> tuple[Axes, Axes]:
    _, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.6), height_ratios=[2, 1], layout="constrained")
    return upper, lower


def _cycle(values):
    values = list(values)
    return values * 20


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing recorded yet", ha="center", va="center", transform=axes.transAxes, color="#666666")
