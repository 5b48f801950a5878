"""What a step holds at most, beyond weights and gradients, against the way most distillation code is written."""

from __future__ import annotations

import pandas as pd

from hdlib.cost import peak_memory

from .work import Setting, Work


def measure(setting: Setting) -> pd.DataFrame:
    """Megabytes of one step while the student is as wide as its teacher, and the naive step's share."""
    work = Work(setting)
    loss = work.loss()
    with work.recording():
        work.backward(loss)  # the gradients are there from now on, as they are in training
        ours = peak_memory(lambda: work.backward(loss), setting.device)
    floor = peak_memory(work.floor, setting.device)
    work.eager()
    naive = peak_memory(work.naive, setting.device)
    table = pd.DataFrame({"megabytes": {"step": ours / 1e6, "floor": floor / 1e6, "naive": naive / 1e6}})
    table["of naive"] = table["megabytes"] / table.loc["naive", "megabytes"]
    return table.rename_axis("what")
