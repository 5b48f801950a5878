"""Independent implementations that the library must agree with."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import BertForMaskedLM, PreTrainedModel

import hdlib


@contextmanager
def masked(model: BertForMaskedLM, kept: dict[str, torch.Tensor]):
    """A stock BERT of full width in which the neurons that are not kept have no effect.

    Norms compute mean and variance over the kept coordinates of the residual stream and output zeros elsewhere.
    Feed-forward, query, key and value neurons are set to 0 where they are computed. The attention scale stays that
    of the full head.
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
            masks = [(attention.query, pairs), (attention.key, pairs), (attention.value, values)]
            for module, mask in [*masks, (layer.intermediate, inner)]:
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
        normed = (1.0 if norm.weight is None else norm.weight) * (states - mean) / (variance + norm.eps).sqrt()
        return (normed if norm.bias is None else normed + norm.bias) * mask

    return hook


def without_layers(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """The model itself, of which only the layers `kept` are run."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
                setattr(module, name, nn.ModuleList(child[layer] for layer in kept))
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in kept]
    return model


@contextmanager
def zeroed(model: PreTrainedModel, kept: dict[str, torch.Tensor]):
    """A model of any family with all weights of removed neurons set to 0, in place.

    Norms over the residual stream compute their statistics over the kept coordinates. Wrong indices, separated pairs
    and a missing attention scale change the outputs.
    """
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for group in hdlib.width_groups(model).values():
            removed = sorted(set(range(group.size)) - set(kept[group.name].tolist()))
            for name, axis, start, unit in group.members:
                indices = [start + neuron * unit + i for neuron in removed for i in range(unit)]
                weights[name].index_fill_(axis, torch.tensor(indices, dtype=torch.long), 0.0)
    with ExitStack() as stack:
        width = model.config.hidden_size
        hidden = _indicator(kept["hidden"], width) if "hidden" in kept else None
        for name, module in model.named_modules():
            if hidden is None or "norm" not in type(module).__name__.lower():
                continue
            with_mean = isinstance(module, nn.LayerNorm)
            shape = module.normalized_shape if with_mean else module.weight.shape
            if shape == (width,) and not _over_something_else(name, model):
                hook = _masked_norm(hidden) if with_mean else _masked_rms_norm(hidden)
                stack.callback(module.register_forward_hook(hook).remove)
        yield model


def _over_something_else(name: str, model: PreTrainedModel) -> bool:
    """Norms over another width, even if it equals the hidden one: ALBERT's embeddings, or the dimensions of a head."""
    in_embeddings = name in ("albert.embeddings.LayerNorm", "predictions.LayerNorm")
    return in_embeddings if model.config.model_type == "albert" else name.endswith(("q_norm", "k_norm"))


def _masked_rms_norm(mask: torch.Tensor):
    def hook(norm: nn.Module, inputs, _output):
        states = inputs[0] * mask
        mean_square = states.square().sum(-1, keepdim=True) / mask.sum()
        return states / (mean_square + norm.variance_epsilon).sqrt() * norm.weight

    return hook


class Doubles(TorchFunctionMode):
    """Keep float64 where stock classes convert to float32, in norms and attention."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        double = bool(arguments) and torch.is_tensor(arguments[0]) and arguments[0].dtype == torch.float64
        if double and (function is torch.Tensor.float or (function is torch.Tensor.to and torch.float32 in arguments)):
            return arguments[0]
        if options.get("dtype") is torch.float32 and (double or function is torch.tensor):
            options["dtype"] = torch.float64
        return function(*arguments, **options)
