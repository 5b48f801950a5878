"""Which precision the matrix products of a machine are fast in."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from time import perf_counter

import torch

PAYS = 1.2  # times faster; below that, what casting costs eats it up


def chosen(precision: str, device: torch.device) -> str:
    """ "float32" or "bfloat16", as asked for; "auto" is the faster one on this device."""
    if precision != "auto":
        return precision
    return "bfloat16" if bfloat16_gain(device) >= PAYS else "float32"


@cache
def bfloat16_gain(device: torch.device) -> float:
    """How many times as fast as in float32 a linear layer is in bfloat16, measured in a moment, in turns."""
    states, weight = (torch.randn(512, 768, device=device) for _ in range(2))
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
