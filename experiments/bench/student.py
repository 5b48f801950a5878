"""How much faster narrowed students are than their teacher, against what their operations promise."""

from __future__ import annotations

import pandas as pd
import torch

from hdlib.cost import flops

from .turns import in_turns
from .work import Setting, Work

RATIOS = (0.66, 0.5, 0.33, 0.29)


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each kept fraction: forwards of the layers, in turns; batch and length are the setting's."""
    works = {ratio: Work(setting, ratio) for ratio in (1.0, *RATIOS)}
    models = {ratio: work.student.base_model for ratio, work in works.items()}
    ids = works[1.0].input_ids
    calls = {ratio: lambda model=model: _forward(model, ids, setting) for ratio, model in models.items()}
    seconds = in_turns(calls, setting.turns, setting.device)
    faster = seconds[[1.0]].to_numpy() / seconds
    fewer = {
        ratio: flops(models[1.0].config, setting.length) / flops(model.config, setting.length)
        for ratio, model in models.items()
    }
    table = pd.DataFrame(
        {"seconds": seconds.median(), "times fewer operations": fewer, "times faster": faster.median()}
    )
    table["of the promise"] = table["times faster"] / table["times fewer operations"]
    table["lowest"] = faster.min() / table["times fewer operations"]
    table["highest"] = faster.max() / table["times fewer operations"]
    return table.rename_axis("kept")


def _forward(model, input_ids, setting: Setting) -> None:
    with torch.inference_mode(), setting.autocast():
        model(input_ids)
