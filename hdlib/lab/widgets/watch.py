"""A run in another process, watched while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import perf_counter, time

import ipywidgets as widgets

from ...runs import Run
from ..run_figure import RunFigure
from .describe import Shown, alert, status
from .explore import explore
from .picture import Picture, drawn

QUIET = 20  # times as long as a step usually takes, without a word from the run: something may have happened to it
AT_LEAST = 120  # seconds of quiet that mean nothing: a checkpoint or a held-out measure may take them
BUSY = 10  # drawing takes at most one part in this of the kernel's time


def watch(run_dir: str | Path, every: float = 2.0) -> Watch:
    """A live view of a run, from its folder alone: a papermill batch, a cluster job on a disk that is shared.

    Args:
        run_dir: the folder; it need not be there yet.
        every: seconds between two looks.

    Returns:
        A widget that looks until the run has finished, and can be explored then. Without a running event loop
        (outside a notebook) it looks once; `look()` looks again.
    """
    return Watch(run_dir, every)


class Watch(Shown):
    """What `watch` returns."""

    watching: dict[Path, Watch] = {}  # noqa: RUF012  one for each folder: a cell that is run again takes over

    def __init__(self, run_dir: str | Path, every: float = 2.0):
        self.run, self.every = Run(run_dir), every
        self.progress = widgets.IntProgress(0, 0, 1, description="step", layout=widgets.Layout(width="70%"))
        self.pause = widgets.ToggleButton(False, description="Pause", tooltip="Stop looking; the run goes on")
        self.words, self.picture = widgets.HTML(), Picture()
        self._seen, self._drawing = None, 0.0
        super().__init__([widgets.HBox([self.progress, self.pause]), self.words, self.picture], "")
        self.pause.observe(lambda change: change["new"] or self._begin(), "value")
        if before := self.watching.get(self.run.folder.resolve()):
            before.pause.value = True
        self.watching[self.run.folder.resolve()] = self
        self.look()
        self._begin()

    def look(self) -> bool:
        """Read what has been written since the last look; whether the run has finished."""
        try:
            finished = self.run.finished
            self._say(self._state(finished))
            if self.run.begun and (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                self._draw(finished)
        except (OSError, ValueError) as error:  # a file that is broken, or on its way from another machine
            self._say(str(error), alert)
            return False
        return finished

    @property
    def png(self) -> bytes:
        return self.picture.png

    def _begin(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook
            return
        self._task = loop.create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while not self.pause.value and not self.look():
            await asyncio.sleep(max(self.every, BUSY * self._drawing))

    def _stamp(self) -> tuple:
        """Changes whenever something was recorded."""
        path = self.run.folder / "metrics.jsonl"
        return (path.stat().st_size if path.exists() else 0, len(self.run.pruned_at), self.run.finished)

    def _draw(self, finished: bool) -> None:
        started = perf_counter()
        if finished:
            self.explorer = explore(self.run)
            self.children = [self.children[0], self.words, self.explorer]
            self.picture.png = getattr(self.explorer, "png", b"")
        else:
            figure = RunFigure(self.run)
            self.picture.show(drawn(figure.figure), figure.describe(figure.steps[1]))
        self._drawing = perf_counter() - started

    def _state(self, finished: bool) -> str:
        """How far the run is, in a sentence."""
        if not self.run.begun:
            return f"No run has begun in {self.run.folder} yet: waiting for it."
        metrics, steps = self.run.metrics, self.run.config.steps
        if metrics.empty:
            return f"The run has begun; none of its {steps:,} steps is done yet."
        step, seconds = int(metrics.index[-1]), float(metrics["seconds"].iloc[1:].tail(50).median())
        self.progress.max, self.progress.value = steps, step
        if finished:
            return f"Finished: {steps:,} steps in {_span(metrics['elapsed'].iloc[-1])} of training."
        quiet = time() - (self.run.folder / "metrics.jsonl").stat().st_mtime
        said = f"Step {step:,} of {steps:,}"
        if step > metrics.index[0]:
            said += f", {1 / seconds:.3g} steps a second, about {_span((steps - step) * seconds)} to go"
        said += f"; last heard of {_span(quiet)} ago."
        if quiet > max(AT_LEAST, QUIET * (seconds if seconds == seconds else 0)):
            said += " It may have been stopped: with --resume, or resume=True, it goes on from its last checkpoint."
        return said

    def _say(self, text: str, how: Callable[[str], str] = status) -> None:
        self.alt, self.words.value = text, how(text)


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
