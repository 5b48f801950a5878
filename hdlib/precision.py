"""Which precision the matrix products of a machine are fast in."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache, partial
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PAYS = 1.2  # times faster; below that, what casting costs eats it up


def chosen(precision: str, device: torch.device) -> str:
    """The precision asked for, "float32" or "bfloat16"; for "auto" the faster one on this device."""
    if precision != "auto":
        return precision
    return "bfloat16" if bfloat16_gain(device) >= PAYS else "float32"


@cache
def bfloat16_gain(device: torch.device) -> float:
    """How many times as fast as in float32 a linear layer is in bfloat16, measured in a moment, in turns."""
    states, weight = (torch.ones(512, 768, device=device) for _ in range(2))  # nobody's random numbers are drawn
    seconds = {dtype: [] for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(10):
        for dtype, found in seconds.items():
            operands = states.to(dtype), weight.to(dtype)
            _wait(device)
            started = perf_counter()
            torch.nn.functional.linear(*operands)
            _wait(device)
            found.append(perf_counter() - started)
    single, half = (min(found) for found in seconds.values())  # whatever else the machine does only adds to them
    return single / half


def autocast(precision: str, device: torch.device):
    """A context in which matrix products have this precision; weights, norms, attention and losses stay float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def cast_once(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A model that is only read, with its linear layers in this precision: what `autocast` would make in every step.

    The same numbers as under `autocast`, and BERT-base reads 8 x 128 tokens in seven eighths of the time. Everything
    else is shared with the model that was given, embeddings that are tied to a linear layer too.
    """
    if precision == "float32":
        return model
    cast = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in cast.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)
    return cast


@contextmanager
def casting_again(model: PreTrainedModel):
    """Under `autocast`, let linear layers cast their weights once more on the way back instead of keeping the copies.

    The same numbers, but that a layer that runs several times adds up its gradients in float32. The copies are half
    as large as the model, and all of them would be there when most is held.
    """
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]  # nobody's own variants
    for layer in layers:
        layer.forward = partial(_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: nn.Linear | Conv1D, states: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(states.device.type):
        return type(layer).forward(layer, states)
    weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight  # GPT-2's are (in, out)
    return _CastAgain.apply(states, weight, layer.bias)


class _CastAgain(torch.autograd.Function):
    """A linear layer in bfloat16, of which states and weights are kept as they came."""

    @staticmethod
    def forward(context, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(states, weight)
        halves = (None if each is None else each.to(torch.bfloat16) for each in (states, weight, bias))
        return nn.functional.linear(*halves)

    @staticmethod
    def backward(context, above: Tensor):
        states, weight = context.saved_tensors
        rows = above.flatten(0, -2)
        to_states = (above @ weight.to(torch.bfloat16)).to(states.dtype)
        to_weight = (rows.mT @ states.flatten(0, -2).to(torch.bfloat16)).to(weight.dtype)
        to_bias = rows.sum(0).to(weight.dtype) if context.needs_input_grad[2] else None
        return to_states, to_weight, to_bias


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
