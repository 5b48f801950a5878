"""A step with four distillation losses, compared with TextBrewer: the same models, batch and losses.

The losses are the divergence at the masked tokens, hidden states and embeddings through a linear map, and attention
probabilities, which is what TextBrewer compares (`pip install -e ".[bench]"`).
"""

from __future__ import annotations

from importlib.util import find_spec

import pandas as pd
import torch

from hdlib.losses import IGNORED, DistillationLoss

from .turns import against, in_turns
from .work import Setting, Work

RATIOS = (1.0, 0.5, 0.29)
TERMS = {"prediction": 1.0, "hidden": 1.0, "attention": 1.0, "embedding": 1.0}


def measure(setting: Setting) -> pd.DataFrame:
    """A row for each kept fraction and library: seconds of forward and backward, and the ratio to TextBrewer."""
    if not find_spec("textbrewer"):
        raise SystemExit('TextBrewer is not installed. Run pip install -e ".[bench]"')
    return pd.concat({ratio: _at(setting, ratio) for ratio in RATIOS}, names=["kept", "library"])


def _at(setting: Setting, ratio: float) -> pd.DataFrame:
    work, peer = Work(setting, ratio), Work(setting, ratio)
    peer.eager()
    config, width = work.teacher.config, work.student.config.hidden_size
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    loss = DistillationLoss(*sizes, student_hidden_size=width, mlm=0.0, attention_target="probs", **TERMS)
    loss = loss.to(setting.device)
    distiller = _distiller(peer)

    def step() -> None:
        with work.recording():
            work.backward(loss)

    def peer_step() -> None:
        peer.student.zero_grad()
        with setting.autocast():
            batch = {"input_ids": peer.input_ids, "labels": peer.labels}
            total, _ = distiller.train_on_batch(batch, {})
        total.backward()

    return against(in_turns({"TextBrewer": peer_step, "hdlib": step}, setting.turns, setting.device), "TextBrewer")


def _distiller(work: Work):
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    layers = range(work.teacher.config.num_hidden_layers + 1)
    wide, narrow = work.teacher.config.hidden_size, work.student.config.hidden_size
    states = [
        {
            "layer_T": layer,
            "layer_S": layer,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 1,
            "proj": ["linear", narrow, wide],
        }
        for layer in layers
    ]
    attention = [
        {"layer_T": layer, "layer_S": layer, "feature": "attention", "loss": "attention_mse", "weight": 1}
        for layer in layers[:-1]
    ]
    config = DistillationConfig(temperature=1, hard_label_weight=0, intermediate_matches=states + attention)

    def adaptor(batch, outputs):
        return {
            "logits": outputs.logits,
            "logits_mask": (batch["labels"] != IGNORED).to(torch.long),
            "hidden": outputs.hidden_states,
            "attention": outputs.attentions,
        }

    training = TrainingConfig(device=work.setting.device, log_dir=None, output_dir=".")
    return GeneralDistiller(training, config, _Recorded(work.teacher), _Recorded(work.student), adaptor, adaptor)


class _Recorded(torch.nn.Module):
    """A model that always returns hidden states and attention."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return self.model(input_ids, output_hidden_states=True, output_attentions=True)
