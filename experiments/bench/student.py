"""How much faster narrowed students are than their teacher, against what their operations promise."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch

import hdlib
from hdlib.cost import flops
from hdlib.models import student_of

from .turns import in_turns
from .work import Setting, Work

RATIOS = (0.66, 0.5, 0.33, 0.29)
MULTIPLES = (1, 16)  # the nearest widths, and the nearest that suit the processor


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each kept fraction: forwards of the layers, in turns; batch and length are the setting's."""
    teacher = setting.teacher()
    models = {(1.0, 1): teacher.base_model}
    for ratio in RATIOS:
        for multiple_of in MULTIPLES:
            student = student_of(teacher)
            hdlib.narrow(student, hdlib.Widths.at(teacher, ratio, multiple_of))
            models[ratio, multiple_of] = student.base_model
    ids = Work(setting).input_ids
    calls = {shape: partial(_forward, model, ids, setting) for shape, model in models.items()}
    seconds = in_turns(calls, setting.turns, setting.device)
    faster = seconds[[(1.0, 1)]].to_numpy() / seconds
    counted = {shape: flops(model.config, setting.length) for shape, model in models.items()}
    fewer = {shape: counted[1.0, 1] / operations for shape, operations in counted.items()}
    widths = {shape: f"{model.config.hidden_size}/{model.config.intermediate_size}" for shape, model in models.items()}
    table = pd.DataFrame(
        {
            "widths": widths,
            "seconds": seconds.median(),
            "times fewer operations": fewer,
            "times faster": faster.median(),
        }
    )
    table["of the promise"] = table["times faster"] / table["times fewer operations"]
    table["lowest"] = faster.min() / table["times fewer operations"]
    table["highest"] = faster.max() / table["times fewer operations"]
    return table.rename_axis(["kept", "multiple of"])


def _forward(model, input_ids, setting: Setting) -> None:
    with torch.inference_mode(), setting.autocast():
        model(input_ids)
