"""Time calls in alternation, so that other load on the machine affects all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import pandas as pd
import torch


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int, device: torch.device) -> pd.DataFrame:
    """Seconds of every call, a row a turn and a column a call; a first turn is warm-up and not reported."""
    rows = []
    for _ in range(turns + 1):
        rows.append({name: timed(call, device) for name, call in calls.items()})
    return pd.DataFrame(rows[1:])


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU until its kernels have finished."""
    started = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def against(seconds: pd.DataFrame, base: str) -> pd.DataFrame:
    """A row for each call: its median seconds, and its ratio to `base`: median, lowest and highest over the turns."""
    ratios = seconds.div(seconds[base], axis=0)
    return pd.DataFrame(
        {
            "seconds": seconds.median(),
            f"of {base}": ratios.median(),
            "lowest": ratios.min(),
            "highest": ratios.max(),
        }
    )
