"""A run, step by step."""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...models import load_teacher
from ...runs import Run
from ..guesses import GAP, guesses
from ..plots import LABELS, MEASURES
from ..run_figure import RunFigure
from .parts import Shown, alert, drawn, table

RECORDED = MEASURES | {"parameters": "parameters"}  # columns of Run.metrics with their labels
COLUMNS = {name: label.replace("\n", ", ") for name, label in (RECORDED | LABELS).items()}


def explore(
    run: Run | str | Path, teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
) -> widgets.Widget:
    """Explore a run with a slider: its curves, every neuron of the teacher, and guesses of student and teacher.

    Args:
        run: a Run or its folder, finished or not. A message stands in place of what is missing.
        teacher: model and tokenizer; None loads the teacher that the run names, at the first guess.

    Returns:
        A widget. The `value` of its `slider` is the step; without a front end it shows `hdlib.lab.plot_run`.
    """
    try:
        return Explorer(Run.load(run.folder if isinstance(run, Run) else run), teacher)
    except (OSError, ValueError) as error:
        return Shown([f"The run cannot be explored: {error}"])


class Explorer(Shown):
    """The result of `explore` for a readable run. A move of the slider redraws only the artists that change."""

    def __init__(self, run: Run, teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None):
        super().__init__(missing(run))
        self.run, self.drawn, self.guesser = run, RunFigure(run), Guesser(run, teacher)
        for artist in self.drawn.moving:
            artist.set_animated(True)
        self._canvas = drawn(self.drawn.figure)
        self._background = self._canvas.copy_from_bbox(self.drawn.figure.bbox)
        self._recorded = self.drawn.metrics.filter(COLUMNS).ffill()
        self.slider, steps = _slider(*self.drawn.steps)
        self.slider.observe(lambda _change: self.show(), "value")
        self.words, self.numbers = widgets.HTML(), widgets.HTML()
        self.children = [*self.children, steps, self.words, self.picture, self.numbers, self.guesser]
        self.show()

    def show(self) -> None:
        """Show the step of the slider."""
        step = self.slider.value
        self.alt = self.drawn.at(step)
        self._canvas.restore_region(self._background)
        for artist in self.drawn.moving:
            artist.axes.draw_artist(artist)
        self.picture.show(self._canvas, self.alt)
        self.words.value = f"<b>{escape(self.alt)}</b>"
        self.numbers.value = self._numbers(step)
        self.guesser.at(step)

    def _numbers(self, step: int) -> str:
        """A table of the last values up to a step, and of the last values of the run."""
        if self._recorded.empty:
            return ""
        last = {f"step {step:,}": self._recorded.loc[:step].iloc[-1], "last": self._recorded.iloc[-1]}
        return table(pd.DataFrame(last).rename(COLUMNS))


class Guesser(widgets.VBox):
    """A sentence with gaps, and the tokens that teacher and student would fill in."""

    def __init__(self, run: Run, teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None):
        self.run, self.students, self._teacher = run, run.students(), teacher
        look = {"continuous_update": False, "layout": {"width": "70%"}, "disabled": not self.students}
        look["tooltip"] = f"{GAP} marks a token to guess; a causal model continues the sentence"
        self.sentence = widgets.Text(f"Returns the {GAP} of the list.", description="sentence", **look)
        look = {"tooltip": "Compute the guesses of teacher and student", "disabled": not self.students}
        self.button = widgets.Button(description="Guess", **look)
        self.answer = widgets.HTML("" if self.students else alert("No guesses: no student has been saved yet."))
        self._step, self._load = None, cache(load_teacher)
        self.sentence.observe(lambda _change: self.guess(), "value")
        self.button.on_click(lambda _button: self.guess())
        super().__init__([widgets.HBox([self.sentence, self.button]), self.answer])

    def at(self, step: int) -> None:
        """Take the saved student nearest to a step; if there were guesses, replace them by its guesses."""
        nearest = min(self.students, key=lambda saved: abs(saved - step), default=None)
        if nearest != self._step:
            self._step = nearest
            if self.answer.value:
                self.guess()

    def guess(self) -> None:
        """Show the guesses for every gap of the sentence, best first. Does nothing without a saved student."""
        if self.students:
            try:
                self.answer.value = self._answer()
            except (OSError, ValueError) as error:
                self.answer.value = alert(str(error))

    def _answer(self) -> str:
        """A table for each gap, with a column for each model and bars for the probabilities."""
        teacher, tokenizer = self._teacher or self._load(self.run.arguments["teacher"])
        student, _ = self._load(self.students[self._step])
        models = {"teacher": teacher, f"student of step {self._step:,}": student}
        found = {name: guesses(model, tokenizer, self.sentence.value) for name, model in models.items()}
        tables = ""
        for gap in range(len(found["teacher"])):
            guessed = pd.concat({name: each[gap] for name, each in found.items()}, axis="columns")
            bars = guessed.xs("probability", axis="columns", level=1)
            rows = guessed.xs("guess", axis="columns", level=1) + bars.map(" {:.0%}".format)
            tables += table(rows.rename(lambda rank: rank + 1), bars=bars)
        return tables


def missing(run: Run) -> list[str]:
    """What a run folder does not hold, a sentence each."""
    metrics, problems = run.metrics, []
    if metrics.empty:
        return ["Nothing has been recorded yet."]
    if not run.finished:
        problems.append(f"The run has not finished. Last recorded step: {metrics.index[-1]:,} of {run.config.steps:,}.")
    if not run.pruned_at:
        random = run.config.initial == "random"
        why = "the student started with random weights" if random else "none has happened yet, or the run is older"
        problems.append(f"No prune was recorded, so there is no map of neurons: {why}.")
    return problems


def _slider(first: int, last: int) -> tuple[widgets.IntSlider, widgets.HBox]:
    """A slider over the steps of a run, at the last one; and the same beside a button that plays them."""
    look = {"description": "step", "layout": {"width": "70%"}}
    look["tooltip"] = "Arrow keys move by one step, page keys by more"
    slider = widgets.IntSlider(last, first, max(last, first + 1), disabled=first == last, **look)
    tooltip = "Play the run from this step on"
    play = widgets.Play(last, first, last, step=max(1, (last - first) // 100), interval=200, tooltip=tooltip)
    widgets.jslink((play, "value"), (slider, "value"))
    return slider, widgets.HBox([play, slider])
