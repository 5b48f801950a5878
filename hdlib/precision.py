"""The precision of matrix products: float32, or bfloat16 where it is faster."""

from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import cache, partial
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

NO_FLOAT64 = {"mps"}  # types of devices without it: Apple's
MINIMUM_GAIN = 1.2  # of bfloat16 over float32; below it, casts cost more time than they save


def resolve_precision(precision: str, device: torch.device) -> str:
    """The given precision; for "auto" the faster one here: bfloat16 on a GPU with such units, else as measured."""
    if precision != "auto":
        return precision
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else bfloat16_gain(device) >= MINIMUM_GAIN
    return "bfloat16" if fast else "float32"


def doubled(tensor: Tensor) -> Tensor:
    """float64, on the CPU for a device that has none."""
    return (tensor.cpu() if tensor.device.type in NO_FLOAT64 else tensor).double()


@cache
def bfloat16_gain(device: torch.device) -> float:
    """Time of a matrix product in float32 over its time in bfloat16: the shortest of ten alternating runs of each."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    for dtype in [*seconds] * 10:
        states = torch.ones(512, 768, dtype=dtype, device=device)
        torch.get_device_module(device).synchronize()
        started = perf_counter()
        nn.functional.linear(states, states)
        torch.get_device_module(device).synchronize()
        seconds[dtype].append(perf_counter() - started)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def cast_once(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A frozen copy that autocast need not cast: linear layers hold weights of this precision; the rest is shared."""
    if precision == "float32":
        return model
    cast = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in cast.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)
    return cast


@contextmanager
def recompute_casts(model: PreTrainedModel):
    """Recompute autocast's copies of weights in the backward pass instead of storing them; sum gradients in float32."""
    with ExitStack() as stack:
        for layer in model.modules():
            if type(layer) in (nn.Linear, Conv1D):  # no subclasses
                layer.forward = partial(_linear, layer)
                stack.callback(delattr, layer, "forward")
        yield


def _linear(layer: nn.Linear | Conv1D, states: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(states.device.type):
        return type(layer).forward(layer, states)
    weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight  # (out, in); Conv1D stores (in, out)
    return _BFloat16Linear.apply(states, weight, layer.bias)


class _BFloat16Linear(torch.autograd.Function):
    @staticmethod
    def forward(context, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(states, weight)  # as they are, not the copies in bfloat16
        halves = (None if each is None else each.to(torch.bfloat16) for each in (states, weight, bias))
        return nn.functional.linear(*halves)

    @staticmethod
    def backward(context, gradient: Tensor):
        states, weight = context.saved_tensors
        rows = gradient.flatten(0, -2)  # (N, out)
        of_states = (gradient @ weight.to(torch.bfloat16)).to(states.dtype)
        of_weight = (rows.mT @ states.flatten(0, -2).to(torch.bfloat16)).to(weight.dtype)
        return of_states, of_weight, rows.sum(0).to(weight.dtype) if context.needs_input_grad[2] else None
