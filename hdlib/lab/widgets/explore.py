"""A run, looked at step by step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from html import escape
from itertools import zip_longest
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...models import SAFE_LOADING, language_model_class, load_teacher, no_progress_bars
from ...runs import Run
from ..guesses import GAP, guesses
from ..run_figure import RunFigure
from .describe import Shown, alert, table
from .picture import Picture, drawn

PARTS = {  # what a record holds, in the order in which it is told
    "held_out_kl": "KL to the teacher, nats",
    "held_out_agreement": "same first guess",
    "held_out_accuracy": "words guessed right",
    "held_out_hidden": "hidden states, mean squared error",
    "total": "loss",
    "mlm": "words (language model)",
    "prediction": "prediction (KL)",
    "hidden": "hidden states",
    "attention": "attention scores",
    "embedding": "embedding",
    "parameters": "parameters",
    "seconds": "seconds a step",
}
SENTENCE = f"Returns the {GAP} of the list."


def explore(
    run: Run | str | Path, teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
) -> widgets.Widget:
    """Move along a run: its curves, every neuron of the teacher, and what the student guesses beside its teacher.

    Args:
        run: a Run or its folder, finished or not. What is not there is said in words in its place.
        teacher: model and tokenizer; None loads the one that the run names, when it is first asked to guess.

    Returns:
        A widget. `value` of its `slider` is the step; without a front end it is `hdlib.lab.plot_run`.
    """
    folder = Path(run.folder if isinstance(run, Run) else run)
    try:
        return Explorer(Run.load(folder), teacher)
    except (OSError, ValueError) as error:
        said = f"There is nothing to explore: {error}"
        return Shown([widgets.HTML(alert(said))], said)


class Explorer(Shown):
    """What `explore` returns for a run folder. A move of the slider draws again only what moves."""

    def __init__(self, run: Run, teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None):
        self.run = run
        self.drawn = RunFigure(run)
        for artist in self.drawn.moving:
            artist.set_animated(True)
        self._canvas = drawn(self.drawn.figure)
        self._still = self._canvas.copy_from_bbox(self.drawn.figure.bbox)
        first, last = self.drawn.steps
        self.slider = widgets.IntSlider(
            last,
            first,
            max(last, first + 1),
            description="step",
            layout=widgets.Layout(width="70%"),
            disabled=first == last,
            tooltip="Arrow keys move by one step, page keys by more",
        )
        self.play = widgets.Play(last, first, last, step=max(1, (last - first) // 100), interval=200)
        self.play.tooltip = "Play the run from this step on"
        widgets.jslink((self.play, "value"), (self.slider, "value"))
        self.picture, self.words, self.parts = Picture(), widgets.HTML(), widgets.HTML()
        self.guesser = _Guesser(run, teacher)
        self.slider.observe(lambda _change: self.show(), "value")
        problems = [widgets.HTML(alert(problem)) for problem in missing(run)]
        moved = widgets.HBox([self.play, self.slider])
        super().__init__([*problems, moved, self.words, self.picture, self.parts, self.guesser], "")
        self.show()

    def show(self) -> None:
        """Bring everything to the slider's step."""
        step = self.slider.value
        self.alt = self.drawn.at(step)
        self._canvas.restore_region(self._still)
        for artist in self.drawn.moving:
            artist.axes.draw_artist(artist)
        self.picture.show(self._canvas, self.alt)
        self.words.value = f"<b>{escape(self.alt)}</b>"
        self.parts.value = self._parts(step)
        self.guesser.at(step)

    @property
    def png(self) -> bytes:
        return self.picture.png

    def _parts(self, step: int) -> str:
        """What was recorded last up to a step, and in the end."""
        metrics = self.drawn.metrics
        if metrics.empty:
            return ""
        rows = {}
        for name, words in PARTS.items():
            if name in metrics:
                values = metrics[name].dropna()
                until = values.loc[:step]
                rows[words] = [_number(until.iloc[-1]) if len(until) else "", _number(values.iloc[-1])]
        there = pd.DataFrame.from_dict(rows, orient="index", columns=[f"step {step:,}", "last"])
        return table(there.T)


class _Guesser(widgets.VBox):
    """A sentence, and how teacher and student would fill it, beside each other."""

    def __init__(self, run: Run, teacher):
        self.run, self._given = run, teacher
        self.sentence = widgets.Text(
            SENTENCE,
            description="sentence",
            continuous_update=False,
            layout=widgets.Layout(width="70%"),
            tooltip=f"{GAP} stands for a word that is to be guessed; a causal model goes on from the end",
        )
        self.button = widgets.Button(description="Guess", tooltip="Ask teacher and student")
        self.answer = widgets.HTML()
        self.students = run.students()
        self._step, self._asked = None, False
        self._loaded: dict[Path, PreTrainedModel] = {}
        self.sentence.observe(lambda _change: self.guess(), "value")
        self.button.on_click(lambda _button: self.guess())
        if not self.students:
            self.answer.value = alert("No student has been saved yet, so nothing can be guessed.")
            self.button.disabled = self.sentence.disabled = True
        super().__init__([widgets.HBox([self.sentence, self.button]), self.answer])

    def at(self, step: int) -> None:
        """Take the saved student that is nearest to a step; it guesses again if it guessed before."""
        nearest = min(self.students, key=lambda saved: abs(saved - step), default=None)
        if nearest != self._step:
            self._step = nearest
            if self._asked:
                self.guess()

    def guess(self) -> None:
        """Fill the gaps of the sentence; without a saved student there is nobody to ask."""
        if not self.students:
            return
        self._asked = True
        try:
            teacher, tokenizer = self._teacher
            asked = {"teacher": teacher, f"student of step {self._step:,}": self._student(self.students[self._step])}
            found = {name: guesses(model, tokenizer, self.sentence.value) for name, model in asked.items()}
        except (OSError, ValueError) as error:
            self.answer.value = alert(str(error))
            return
        self.answer.value = _beside_each_other(found)

    @cached_property
    def _teacher(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self._given or load_teacher(self.run.arguments["teacher"])

    def _student(self, folder: Path) -> PreTrainedModel:
        if folder not in self._loaded:
            auto_class = language_model_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
            with no_progress_bars():
                self._loaded[folder] = auto_class.from_pretrained(folder, **SAFE_LOADING)
        return self._loaded[folder]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def missing(run: Run) -> list[str]:
    """What a run folder does not hold, each in a sentence."""
    said = []
    metrics = run.metrics
    if metrics.empty:
        said.append("Nothing has been recorded yet.")
    elif not run.finished:
        said.append(f"The run has not finished: step {metrics.index[-1]:,} of {run.config.steps:,} is the last one.")
    if not run.pruned_at and len(metrics):
        random = run.config.initial == "random"
        why = "the student began with random weights" if random else "none has happened yet, or it is an older run"
        said.append(f"No prune was recorded, so there is no map of neurons: {why}.")
    return said


def _beside_each_other(found: Mapping[str, list[pd.DataFrame]]) -> str:
    """A table for each gap: the guesses of every model, best first, with a bar as long as the probability."""

    def cell(row) -> str:
        share = f"{row.probability:.0%}"
        bar = f"linear-gradient(90deg, #cfe3f1 {share}, transparent {share})"
        return f'<td style="background: {bar}; min-width: 12em; padding: 1px 8px">{escape(row.guess)} {share}</td>'

    tables = []
    for gaps in zip(*found.values(), strict=True):
        head = "".join(
            f'<th scope="col" style="text-align: left; padding: 1px 8px">{escape(name)}</th>' for name in found
        )
        rows = zip_longest(*(gap.itertuples(index=False) for gap in gaps))
        body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
        tables.append(f"<table><tr>{head}</tr>{body}</table>")
    return "".join(tables)
