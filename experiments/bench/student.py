"""Speed-up of narrowed students over their teacher, compared with the ratio of their operations."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
from transformers import BertConfig

import hdlib
from hdlib.lab.cost import flops
from hdlib.models import student_of

from .turns import in_turns
from .work import Setting, Work, all_heads

RATIOS = (0.66, 0.5, 0.33, 0.29)
SHAPES = {  # of a kept fraction: fewer heads, the same in multiples of 16, or narrower heads
    "nearest": lambda teacher, ratio: hdlib.Widths.at(teacher, ratio),
    "multiples of 16": lambda teacher, ratio: hdlib.Widths.at(teacher, ratio, 16),
    "all heads": all_heads,
}


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each kept fraction and shape: time of a forward of the layers, and its operations."""
    teacher = setting.teacher()
    models = {(1.0, "teacher"): teacher.base_model}
    for ratio in RATIOS:
        for shape, widths in SHAPES.items():
            student = student_of(teacher)
            hdlib.narrow(student, widths(teacher, ratio))
            models[ratio, shape] = student.base_model
    ids = Work(setting).input_ids
    calls = {shape: partial(_forward, model, ids, setting) for shape, model in models.items()}
    seconds = in_turns(calls, setting.turns, setting.device)
    faster = seconds[[(1.0, "teacher")]].to_numpy() / seconds
    counted = {shape: flops(model.config, setting.length) for shape, model in models.items()}
    fewer = {shape: counted[1.0, "teacher"] / operations for shape, operations in counted.items()}
    table = pd.DataFrame(
        {
            "widths": {shape: _named(model.config) for shape, model in models.items()},
            "seconds": seconds.median(),
            "times fewer operations": fewer,
            "times faster": faster.median(),
        }
    )
    table["of the promise"] = table["times faster"] / table["times fewer operations"]
    table["lowest"] = faster.min() / table["times fewer operations"]
    table["highest"] = faster.max() / table["times fewer operations"]
    return table.rename_axis(["kept", "shape"])


def _named(config: BertConfig) -> str:
    heads = config.num_attention_heads
    return f"{config.hidden_size}/{config.intermediate_size}, {heads} x {config.hidden_size // heads}"


def _forward(model, input_ids, setting: Setting) -> None:
    with torch.inference_mode(), setting.autocast():
        model(input_ids)
