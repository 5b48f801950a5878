"""What grows in JupyterLab while a run goes on. It looks at the run folder only."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import matplotlib.pyplot as plt
from IPython.display import display

from ...runs import Run
from ..plots import plot_discrepancy


class LiveFigure:
    """Discrepancy and width of a running distillation, redrawn while it goes on.

    Pass it as `on_step` to `hdlib.distill`. It reads what the run has written at most once in `every` seconds;
    where there is no front end, the picture of the last drawing is what stays in the notebook.

    Args:
        run_dir: the folder of the run, the one that is given to `distill`.
        every: seconds between drawings, so that drawing costs next to nothing.
    """

    def __init__(self, run_dir: str | Path, every: float = 5.0):
        self.run_dir, self.every = run_dir, every
        self.drawn = -float("inf")
        self.handle = None

    def __call__(self, record: dict) -> None:
        if "held_out_kl" in record and perf_counter() - self.drawn >= self.every:
            self.draw()

    def draw(self) -> None:
        """Draw what the folder holds now, in place of what was drawn before."""
        figure = plot_discrepancy(Run.load(self.run_dir))
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        self.drawn = perf_counter()
