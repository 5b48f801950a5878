"""Several runs beside each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.backend_bases import MouseEvent

from ...runs import Run
from ..plots import PLACES, plot_arms
from .explore import RECORDED, explore
from .parts import WRAPPED, Shown, alert, drawn, number, table


def compare(*runs: Run | str | Path) -> widgets.Widget:
    """Compare runs: the settings that differ, and a measure along steps, seconds or parameters.

    Runs that differ only in their seed form one curve, with a band from the lowest to the highest. A click on a
    curve opens its run below; so does the list beside it.

    Args:
        runs: Runs or their folders, finished or not. A message names each run that cannot be shown, and why.
    """
    opened, problems = [], []
    for run in runs:
        try:
            run = Run.load(run.folder if isinstance(run, Run) else run)
            if run.metrics.empty:
                raise ValueError(f"Nothing has been recorded yet in {run.folder}: wait for its first step")
            run.config  # noqa: B018  raises now if it is damaged
            opened.append(run)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if opened:
        return Comparison(opened, problems)
    return Shown([*problems, "There are no runs to compare. Pass their folders: compare('runs/one', 'runs/two')."])


class Comparison(Shown):
    """The result of `compare` for at least one readable run."""

    def __init__(self, runs: Sequence[Run], problems: Sequence[str] = ()):
        super().__init__(problems)
        self.runs = {run.folder.name: run for run in runs}
        if len(self.runs) < len(runs):  # the same name in two places
            self.runs = {str(run.folder): run for run in runs}
        columns = {column for run in runs for column in run.metrics}
        measures = {label.partition("\n")[0]: name for name, label in RECORDED.items() if name in columns}
        self.measure = widgets.Dropdown(options=measures, description="measure")
        self.along = widgets.Dropdown(options=PLACES, description="along")
        self.seeds = widgets.Checkbox(True, description="seeds as one curve with a band", indent=False)
        tooltip = "Explore one of the runs below; a click on its curve does the same"
        options = {"(none)": None} | {name: name for name in self.runs}
        self.chosen = widgets.Dropdown(options=options, description="open", tooltip=tooltip)
        self.message, self.explored = widgets.HTML(), widgets.VBox()
        for control in (self.measure, self.along, self.seeds):
            control.observe(lambda _change: self.show(), "value")
        self.chosen.observe(lambda _change: self._explore(), "value")
        self.picture.on_msg(lambda _widget, place, _buffers: self.click(place["x"], 1 - place["y"]))
        settings = widgets.HTML(_settings(arms_of(self.runs)))
        controls = widgets.Box([self.measure, self.along, self.seeds, self.chosen], layout=WRAPPED)
        self.children = [*self.children, settings, controls, self.message, self.picture, self.explored]
        self.show()

    def show(self) -> None:
        """Draw the chosen measure."""
        measure, along = self.measure.value, self.along.value
        columns = {name: {"step", *run.metrics.dropna(axis="columns", how="all")} for name, run in self.runs.items()}
        lacking = [name for name in self.runs if {measure, along} - columns[name]]
        self.message.value = alert(f"Not recorded in: {', '.join(lacking)}") if lacking else ""
        able = {name: run for name, run in self.runs.items() if name not in lacking}
        self.arms = arms_of(able) if self.seeds.value else {name: {name: run} for name, run in able.items()}
        figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
        plt.close(figure)
        plot_arms({arm: list(each.values()) for arm, each in self.arms.items()}, measure, along, axes)
        self._lines = dict(zip(self.arms, axes.lines, strict=True))
        self._canvas = drawn(figure)
        self.alt = self._ends()
        self.picture.show(self._canvas, self.alt)

    def click(self, x: float, y: float) -> None:
        """Open the run whose curve is nearest to a position, in fractions of the figure from its lower left corner."""
        width, height = self._canvas.get_width_height()
        position = MouseEvent("button_press_event", self._canvas, x * width, y * height)
        for near in range(2, 40, 2):  # dots; a click further from every curve opens nothing
            for arm, line in self._lines.items():
                line.set_pickradius(near)
                if line.contains(position)[0]:
                    self.chosen.value = next(iter(self.arms[arm]))
                    return

    def _explore(self) -> None:
        self.explored.children = [explore(self.runs[self.chosen.value])] if self.chosen.value else []

    def _ends(self) -> str:
        """The last value of every curve, as text."""
        ends = []
        for arm, runs in self.arms.items():
            last = mean(run.metrics[self.measure.value].dropna().iloc[-1] for run in runs.values())
            ends.append(f"{arm} {number(last)}")
        return f"{self.measure.label} along {self.along.label}; at the end: {', '.join(ends) or 'nothing recorded'}."


def arms_of(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Group runs that differ only in their seed, under a name without the seed."""
    arms: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        same = next((arm for arm in arms.values() if _setting(next(iter(arm.values()))) == _setting(run)), None)
        if same is None:
            short = re.sub(r"-seed-\d+$", "", name)
            same = arms[name if short in arms else short] = {}
        same[name] = run
    return arms


def _setting(run: Run) -> dict[str, str]:
    """All arguments of a run except the seed, as text."""
    arguments = run.arguments
    flat = {"teacher": arguments["teacher"], "precision": arguments.get("precision")}
    flat |= {f"blocks, {name}": count for name, count in arguments["blocks"].items()} | arguments["config"]
    return {name: str(value) for name, value in flat.items() if name != "seed"}


def _settings(arms: Mapping[str, Mapping[str, Run]]) -> str:
    """A table of the settings that differ between arms, a row each."""
    settings = pd.DataFrame({arm: _setting(next(iter(each.values()))) for arm, each in arms.items()}).T
    differ = settings.loc[:, settings.nunique() > 1].copy()
    differ["seeds"] = [", ".join(str(run.config.seed) for run in each.values()) for each in arms.values()]
    return table(differ, "Settings that differ" if len(differ.columns) > 1 else "All settings are the same")
