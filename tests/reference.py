"""Independent references: what the library must agree with, written another way."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import BertForMaskedLM


@contextmanager
def masked(model: BertForMaskedLM, kept: dict[str, torch.Tensor]):
    """A stock BERT of full width in which the neurons that are not kept count for nothing.

    Norms take mean and variance over the kept coordinates of the residual stream and write zeros
    elsewhere; feed-forward, query, key and value neurons are zeroed where they are made. The attention
    scale stays that of the full head.
    """
    with ExitStack() as stack:
        hidden = _indicator(kept["hidden"], model.config.hidden_size)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                hook = module.register_forward_hook(_masked_norm(hidden))
                stack.callback(hook.remove)
        for index, layer in enumerate(model.bert.encoder.layer):
            pairs = _indicator(kept[f"layer.{index}.query_key"], model.config.hidden_size)
            values = _indicator(kept[f"layer.{index}.value_output"], model.config.hidden_size)
            inner = _indicator(kept[f"layer.{index}.ffn"], model.config.intermediate_size)
            attention = layer.attention.self
            places = [(attention.query, pairs), (attention.key, pairs), (attention.value, values)]
            for module, mask in [*places, (layer.intermediate, inner)]:
                hook = module.register_forward_hook(lambda _, __, output, mask=mask: output * mask)
                stack.callback(hook.remove)
        yield model


def _indicator(kept: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size).index_fill(0, kept, 1.0)


def _masked_norm(mask: torch.Tensor):
    def hook(norm: nn.LayerNorm, inputs, _output):
        states = inputs[0]
        mean = (states * mask).sum(-1, keepdim=True) / mask.sum()
        variance = ((states - mean).square() * mask).sum(-1, keepdim=True) / mask.sum()
        return (norm.weight * (states - mean) / (variance + norm.eps).sqrt() + norm.bias) * mask

    return hook
