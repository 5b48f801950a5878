"""What a step holds at most, beyond the weights, against the way most distillation code is written."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from hdlib.lab.cost import peak_memory

from .work import Setting, Work


def measure(setting: Setting) -> pd.DataFrame:
    """Megabytes of one step while the student is as wide as its teacher, and the naive step's share."""
    work = Work(setting)
    loss = work.loss()
    work.floor()  # what is made once and for all is made
    held = {}
    with work.recording():
        held["step"] = _peak(work, lambda: work.backward(loss))
    held["floor"] = _peak(work, work.floor)
    work.eager()
    held["naive"] = _peak(work, work.naive)
    table = pd.DataFrame({"megabytes": held}) / 1e6
    table["of naive"] = table["megabytes"] / table.loc["naive", "megabytes"]
    return table.rename_axis("what")


def _peak(work: Work, call: Callable[[], object]) -> int:
    """With no gradients at the start, as after an optimiser's step: freeing some must not make room for the rest."""
    work.student.zero_grad()
    return peak_memory(call, work.setting.device)
