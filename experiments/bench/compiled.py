"""Gain of torch.compile for a step of the student, and the cost of compiling each shape of a run."""

from __future__ import annotations

import pandas as pd
import torch
from torch.nn import functional as F

import hdlib
from hdlib.models import base_model, head

from .turns import in_turns, timed
from .work import Setting, Work

RATIOS = (1.0, 0.5, 0.29)
RUN = hdlib.DistillConfig.paper(steps=1000, target=0.29)


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each kept fraction: forward and backward of the masked-language-model loss, layers compiled or not.

    `first` is the time of the first call, which compiles, in seconds. `steps until it pays` is for one shape; `shapes`
    counts the shapes of a run of 1,000 steps to 0.29. This favours compiling: queries and keys are not recorded.
    """
    return pd.DataFrame({ratio: _at(setting, ratio) for ratio in RATIOS}).T.rename_axis("kept")


def _at(setting: Setting, ratio: float) -> dict[str, float]:
    work = Work(setting, ratio)
    layers = base_model(work.student)
    compiled = torch.compile(layers)
    with torch._inductor.config.patch(force_disable_caches=True):  # compile again at every call
        first = timed(lambda: _step(work, compiled), setting.device)
    calls = {"eager": lambda: _step(work, layers), "compiled": lambda: _step(work, compiled)}
    seconds = in_turns(calls, setting.turns, setting.device)
    torch._dynamo.reset()
    ratios = seconds["compiled"] / seconds["eager"]
    saved = seconds["eager"].median() - seconds["compiled"].median()
    return {
        "first": first,
        **seconds.median(),
        "of eager": ratios.median(),
        "lowest": ratios.min(),
        "highest": ratios.max(),
        "steps until it pays": first / saved if saved > 0 else float("inf"),
        "shapes": _shapes(work),
    }


def _step(work: Work, layers) -> None:
    work.student.zero_grad()
    positions = work.labels != hdlib.losses.IGNORED
    with work.setting.autocast():
        states = layers(work.input_ids).last_hidden_state
        loss = F.cross_entropy(head(work.student, states[positions]).float(), work.labels[positions])
    loss.backward()


def _shapes(work: Work) -> int:
    """The number of different widths of a run, without the first."""
    target = hdlib.Widths.at(work.teacher, RUN.target)
    return len({RUN.widths_at(step, work.teacher, target) for step in range(1, RUN.steps + 1)}) - 1
