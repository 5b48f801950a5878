"""Cost of one prune, compared with one forward and backward of the same model, and with Torch-Pruning.

One prune covers everything from scores to a narrowed model and optimiser (AdamW with moments). It removes a 64th of the
feed-forward neurons and one dimension of every head. Torch-Pruning removes as much from the same model by its
first-order importance, without an optimiser (`pip install -e ".[bench]"`; left out if it is not installed).
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pandas as pd
import torch

import hdlib

from .turns import against, timed
from .work import Setting


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each part, relative to a forward and backward; every turn prunes the model further."""
    model = setting.teacher().requires_grad_(True)
    input_ids = torch.randint(1000, 30000, (setting.batch_size, setting.length), device=setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scorer = hdlib.scorer("sensitivity")
    forward_backward(model, input_ids, setting)  # warm-up; the optimiser needs moments
    optimizer.step()
    rows = []
    for _ in range(setting.turns):
        optimizer.zero_grad()
        row = {"forward and backward": timed(lambda: forward_backward(model, input_ids, setting), setting.device)}
        row["importance, every step"] = timed(lambda: scorer.update(model), setting.device)
        optimizer.step()
        optimizer.zero_grad()
        widths = hdlib.Widths.of(model)
        smaller = hdlib.Widths(hidden=widths.hidden - widths.heads, ffn=widths.ffn - widths.ffn // 64)
        row["one prune"] = timed(partial(prune, model, smaller, scorer, optimizer), setting.device)
        if find_spec("torch_pruning"):
            row["Torch-Pruning, one step"] = torch_pruning_step(setting, input_ids)
        rows.append(row)
    return against(pd.DataFrame(rows), "forward and backward")


def forward_backward(model, input_ids, setting: Setting) -> None:
    with setting.autocast():
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()


def prune(model, widths, scorer, optimizer) -> None:
    scorer.narrow(hdlib.narrow(model, widths, scorer.scores(), optimizer))


def torch_pruning_step(setting: Setting, input_ids) -> float:
    """Seconds of one `pruner.step()` on a fresh model with gradients; building the pruner is not counted."""
    import torch_pruning as tp

    model = setting.teacher().requires_grad_(True)
    forward_backward(model, input_ids, setting)
    attention = [layer.attention.self for layer in model.bert.encoder.layer]
    heads = {
        linear: model.config.num_attention_heads for each in attention for linear in (each.query, each.key, each.value)
    }
    pruner = tp.pruner.BasePruner(
        model,
        input_ids,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=1 / 64,
        num_heads=heads,
        prune_head_dims=True,
        ignored_layers=[model.cls.predictions.decoder],
    )
    return timed(pruner.step, setting.device)
