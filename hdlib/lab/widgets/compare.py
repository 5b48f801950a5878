"""Several runs, looked at side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import mean

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.backend_bases import MouseEvent

from ...runs import Run
from ..plots import PLACES, plot_arms
from .describe import Shown, alert, table
from .explore import explore
from .picture import Picture, drawn

CHOICES = {
    "discrepancy": "held_out_kl",
    "same first guess": "held_out_agreement",
    "language-model loss, held out": "held_out_mlm",
    "loss": "total",
    "hidden width": "hidden_size",
    "feed-forward width": "intermediate_size",
    "parameters": "parameters",
    "seconds a step": "seconds",
}
NEAR = 40  # dots from a curve at which a click still means it


def compare(*runs: Run | str | Path) -> widgets.Widget:
    """Lay runs beside each other: what differs in their settings, then any measure along steps, seconds or parameters.

    Runs that differ in nothing but their seed are one curve with a band, from the lowest to the highest. A click on a
    curve opens its run below, and so does the list beside it.

    Args:
        runs: Runs or their folders, finished or not; those that cannot be shown are named with the reason.
    """
    opened, problems = [], []
    for run in runs:
        try:
            run = Run.load(run.folder if isinstance(run, Run) else run)
            run.config  # noqa: B018  what is damaged is to be found now
            if run.metrics.empty:
                raise ValueError(f"{run.folder}: nothing has been recorded yet")
            opened.append(run)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if not opened:
        problems.append("There are no runs to compare: name their folders, as in compare('runs/one', 'runs/two')")
        return Shown([widgets.HTML(alert(problem)) for problem in problems], " ".join(problems))
    return Comparison(opened, problems)


class Comparison(Shown):
    """What `compare` returns where there are runs."""

    def __init__(self, runs: list[Run], problems: list[str] | tuple = ()):
        self.runs = named(runs)
        self.measure = widgets.Dropdown(options=CHOICES, description="measure")
        self.along = widgets.Dropdown(options=PLACES, description="along")
        self.seeds = widgets.Checkbox(True, description="seeds as one curve with a band", indent=False)
        self.chosen = widgets.Dropdown(
            options={"(none)": None} | {name: name for name in self.runs},
            description="open",
            tooltip="Explore one of the runs below; a click on its curve does the same",
        )
        self.picture, self.said, self.explored = Picture(), widgets.HTML(), widgets.VBox()
        for control in (self.measure, self.along, self.seeds):
            control.observe(lambda _change: self.show(), "value")
        self.chosen.observe(lambda _change: self._explore(), "value")
        self.picture.on_click(self.click)
        controls = widgets.HBox([self.measure, self.along, self.seeds, self.chosen], layout={"flex_flow": "row wrap"})
        settings = widgets.HTML(_settings(arms_of(self.runs)))
        shown = [
            *(widgets.HTML(alert(problem)) for problem in problems),
            settings,
            controls,
            self.said,
            self.picture,
            self.explored,
        ]
        super().__init__(shown, "")
        self.show()

    def show(self) -> None:
        """Draw what the controls ask for."""
        measure, along = self.measure.value, self.along.value
        arms = arms_of(self.runs) if self.seeds.value else {name: {name: run} for name, run in self.runs.items()}
        able = {name: run for name, run in self.runs.items() if {measure, along} - {"step"} <= {*run.metrics}}
        left = {arm: {name: run for name, run in each.items() if name in able} for arm, each in arms.items()}
        self.arms = {arm: each for arm, each in left.items() if each}
        lacking = ", ".join(name for name in self.runs if name not in able)
        self.said.value = alert(f"Not recorded in: {lacking}") if lacking else ""
        figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
        plt.close(figure)
        plot_arms({arm: list(each.values()) for arm, each in self.arms.items()}, measure, along, axes)
        self._lines = dict(zip(self.arms, axes.lines, strict=True))
        self._canvas = drawn(figure)
        self.alt = self._in_words()
        self.picture.show(self._canvas, self.alt)

    def click(self, x: float, y: float) -> None:
        """Open the run whose curve is nearest to a place, given as fractions of the figure."""
        width, height = self._canvas.get_width_height()
        place = MouseEvent("button_press_event", self._canvas, x * width, y * height)
        for near in range(2, NEAR, 2):
            for arm, line in self._lines.items():
                line.set_pickradius(near)
                if line.contains(place)[0]:
                    self.chosen.value = next(iter(self.arms[arm]))
                    return

    @property
    def png(self) -> bytes:
        return self.picture.png

    def _explore(self) -> None:
        self.explored.children = [explore(self.runs[self.chosen.value])] if self.chosen.value else []

    def _in_words(self) -> str:
        """Where every curve ends."""
        measure = self.measure.value
        ends = {
            arm: [run.metrics[measure].dropna().iloc[-1] for run in each.values()] for arm, each in self.arms.items()
        }
        told = ", ".join(f"{arm} {mean(values):.4g}" for arm, values in ends.items())
        return f"{self.measure.label.capitalize()} along {self.along.label}, at the end: {told or 'nothing recorded'}."


def named(runs: list[Run]) -> dict[str, Run]:
    """Runs by the names of their folders, with the folder above where two have the same."""
    short = Counter(run.folder.name for run in runs)
    names = [run.folder.name if short[run.folder.name] == 1 else str(run.folder) for run in runs]
    return dict(zip(names, runs, strict=True))


def arms_of(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Runs that differ in nothing but the seed, together, under a name without it."""
    arms: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        same = next((arm for arm in arms.values() if _setting(next(iter(arm.values()))) == _setting(run)), None)
        if same is None:
            short = re.sub(r"-seed-\d+$", "", name)
            same = arms[name if short in arms else short] = {}
        same[name] = run
    return arms


def _setting(run: Run) -> dict[str, str]:
    """All that was asked for, but the seed."""
    arguments = run.arguments
    flat = {"teacher": arguments["teacher"], "precision": arguments.get("precision")}
    flat |= {f"blocks, {name}": count for name, count in arguments["blocks"].items()} | arguments["config"]
    return {name: str(value) for name, value in flat.items() if name != "seed"}


def _settings(arms: Mapping[str, Mapping[str, Run]]) -> str:
    """What differs between arms, a row for each."""
    settings = pd.DataFrame({arm: _setting(next(iter(each.values()))) for arm, each in arms.items()}).T
    differ = settings.loc[:, settings.nunique() > 1].copy()
    differ["seeds"] = [", ".join(str(run.config.seed) for run in each.values()) for each in arms.values()]
    differ.index = [escape(arm) for arm in differ.index]
    intro = "What differs between these runs:" if len(differ.columns) > 1 else "These runs have the same settings:"
    return f"<p>{intro}</p>{table(differ)}"
