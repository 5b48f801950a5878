"""Views of a run while it trains, in this process or in another."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from time import perf_counter, time

import ipywidgets as widgets
import matplotlib.pyplot as plt
from IPython.display import display

from ...runs import Run
from ..plots import mark_smoke, plot_discrepancy
from ..run_figure import DESCRIBED, RunFigure
from .explore import explore
from .parts import Shown, alert, drawn, duration, status

QUIET_STEPS = 20  # without a record for the time of so many steps, the run may have stopped
QUIET_SECONDS = 120  # but not sooner: a checkpoint or a held-out measure may take as long


class LiveFigure:
    """Discrepancy and width of a run during training, read from its folder.

    Pass it as `on_step` to `hdlib.distill`. Without a front end the notebook keeps the last drawing.

    Args:
        run_dir: the folder that is given to `distill`.
        every: seconds between two drawings, so that drawing takes little of the training time.
    """

    def __init__(self, run_dir: str | Path, every: float = 5.0):
        self.run_dir, self.every = run_dir, every
        self.drawn, self.handle = -float("inf"), None

    def __call__(self, record: dict) -> None:
        if not record.keys().isdisjoint(DESCRIBED) and perf_counter() - self.drawn >= self.every:
            self.draw()

    def draw(self) -> None:
        """Replace the last drawing by the current state of the folder."""
        run = Run.load(self.run_dir)
        figure = mark_smoke(plot_discrepancy(run), run.config.steps)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        self.drawn = perf_counter()


class Watch(Shown):
    """A live view of a run from its folder alone, for a batch job or a cluster job on a shared disk.

    It reads the folder until the run has finished, and then shows `explore`. Without a running event loop (outside a
    notebook) it reads once; `look()` reads again.

    Args:
        run_dir: the folder; it may not exist yet.
        every: seconds between two reads.
    """

    watching: dict[Path, Watch] = {}  # noqa: RUF012  one per folder: a cell that runs again pauses the earlier one

    def __init__(self, run_dir: str | Path, every: float = 2.0):
        super().__init__()
        self.run, self.every = Run(run_dir), every
        self.progress = widgets.IntProgress(0, 0, 1, description="step", layout={"width": "70%"})
        self.pause = widgets.ToggleButton(False, description="Pause", tooltip="Stop reading; the run continues")
        self.message = widgets.HTML()
        self._seen, self._drawing = None, 0.0
        self.children = [widgets.HBox([self.progress, self.pause]), self.message, self.picture]
        self.pause.observe(lambda change: change["new"] or self._begin(), "value")
        if before := self.watching.get(self.run.folder.resolve()):
            before.pause.value = True
        self.watching[self.run.folder.resolve()] = self
        self.look()
        self._begin()

    def look(self) -> bool:
        """Read the folder and show what is new. Returns whether the run has finished."""
        try:
            finished = self.run.finished
            self.alt = self._state(finished)
            self.message.value = status(self.alt)
            self._draw(finished)
        except (OSError, ValueError) as error:  # a damaged file, or one that a shared disk has not copied yet
            self.alt, self.message.value = str(error), alert(str(error))
            return False
        return finished

    def _begin(self) -> None:
        with suppress(RuntimeError):  # no event loop: not in a notebook
            self._task = asyncio.get_running_loop().create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while not self.pause.value and not self.look():
            await asyncio.sleep(max(self.every, 10 * self._drawing))  # the kernel stays free for other cells

    def _draw(self, finished: bool) -> None:
        """Draw the run if anything was recorded since the last drawing."""
        path = self.run.folder / "metrics.jsonl"
        recorded = (path.stat().st_size if path.exists() else 0, len(self.run.pruned_at), finished)
        if not self.run.begun or recorded == self._seen:
            return
        self._seen, started = recorded, perf_counter()
        if finished:
            self.explorer = explore(self.run)
            self.picture = self.explorer.picture
            self.children = [self.children[0], self.message, self.explorer]
        else:
            figure = RunFigure(self.run)
            self.picture.show(drawn(figure.figure), figure.describe(figure.steps[1]))
        self._drawing = perf_counter() - started

    def _state(self, finished: bool) -> str:
        """The progress of the run as text."""
        if not self.run.begun:
            return f"No run has started in {self.run.folder} yet; waiting for it."
        metrics, steps = self.run.metrics, self.run.config.steps
        if metrics.empty:
            return f"The run has started; none of its {steps:,} steps is complete."
        step, seconds = int(metrics.index[-1]), float(metrics["seconds"].iloc[1:].tail(50).median())
        self.progress.max, self.progress.value = steps, step
        if finished:
            return f"Finished: {steps:,} steps in {duration(metrics['elapsed'].iloc[-1])} of training."
        text = f"Step {step:,} of {steps:,}"
        if step > metrics.index[0]:
            text += f", {1 / seconds:.3g} steps per second, about {duration((steps - step) * seconds)} left"
        quiet = time() - (self.run.folder / "metrics.jsonl").stat().st_mtime
        text += f". Last record {duration(quiet)} ago."
        if quiet > max(QUIET_SECONDS, QUIET_STEPS * seconds):  # max ignores a second value of NaN, at the first record
            text += " The run may have stopped: start it again with --resume, or resume=True, to continue it."
        return text
