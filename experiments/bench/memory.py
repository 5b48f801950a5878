"""Peak memory of a step beyond the weights, compared with the usual way of writing distillation code."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from hdlib.lab.cost import peak_memory

from .work import Setting, Work


def measure(setting: Setting) -> pd.DataFrame:
    """Megabytes of one step with a student as wide as its teacher, also as a fraction of the naive step."""
    work = Work(setting)
    loss = work.loss()
    work.floor()  # one-time allocations
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
    """Peak memory of a call that starts without gradients, as after an optimiser step."""
    work.student.zero_grad()
    return peak_memory(call, work.setting.device)
