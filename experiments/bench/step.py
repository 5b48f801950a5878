"""Time of a step by its parts, relative to a floor: the teacher's forward and the student's masked-LM step."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch

from .turns import against, in_turns
from .work import Setting, Work

RATIOS = (1.0, 0.5, 0.29)  # of the widths: before the first prune, half-way, at the end


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each kept fraction and part of the step, as returned by `against`; `step` is the whole step."""
    return pd.concat({ratio: _at(setting, ratio) for ratio in RATIOS}, names=["kept", "what"])


def _at(setting: Setting, ratio: float) -> pd.DataFrame:
    work = Work(setting, ratio)
    losses = {term: work.loss("mlm", term) for term in ("prediction", "hidden", "attention", "embedding")}
    whole = work.loss()

    def step() -> None:
        work.backward(whole)
        work.importance.update(work.student)

    def optimiser() -> None:
        torch.nn.utils.clip_grad_norm_(work.student.parameters(), 1.0)
        work.optimizer.step()

    calls = {f"mlm and {term}": lambda loss=loss: work.backward(loss) for term, loss in losses.items()}
    calls |= {"five terms": lambda: work.backward(whole), "step": step, "clipping and Adam alone": optimiser}
    calls = {name: partial(_recording, work, call) for name, call in calls.items()}
    return against(in_turns({"floor": work.floor} | calls, setting.turns, setting.device), "floor")


def _recording(work: Work, call) -> None:
    """Call with queries and keys recorded, as in the loop; the floor uses plain SDPA."""
    with work.recording():
        call()
