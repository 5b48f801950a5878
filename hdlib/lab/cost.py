"""What a model costs: parameters, floating-point operations and time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from copy import deepcopy
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameter counts, tied weights once: `total`, and `encoder`, the layers without embeddings and head."""
    layers = sum(p.numel() for name, p in model.named_parameters() if re.search(r"[.]\d+[.]", name))
    return {"total": model.num_parameters(), "encoder": layers}


def encoder_parameters(config: PreTrainedConfig) -> int:
    """Parameters in the layers of a model of this shape."""
    return parameters(_without_weights(config))["encoder"]


def flops(config: PreTrainedConfig, length: int = 128) -> int:
    """Floating-point operations of one forward of one sequence through the layers, head left out.

    Counted by PyTorch over the matrix products, two for each multiply-add.

    Args:
        config: of the model; its weights are not needed.
        length: S, tokens; cut to the positions that the model has.
    """
    try:
        return _counted(_without_weights(config), length, "meta")  # nothing is computed
    except RuntimeError:  # DeBERTa reads numbers off tensors on its way, and the meta device has none
        return _counted(AutoModel.from_config(deepcopy(config), attn_implementation="eager"), length, "cpu")


def _counted(model: PreTrainedModel, length: int, device: str) -> int:
    tokens = torch.zeros(1, min(length, model.config.max_position_embeddings), dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops()


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The bare model of a shape, on the meta device; eager, since not every SDPA kernel is counted."""
    with torch.device("meta"):
        return AutoModel.from_config(deepcopy(config), attn_implementation="eager")


@torch.inference_mode()
def latency(models: dict[str, PreTrainedModel], batch_size: int = 1, length: int = 128, repeats: int = 20) -> dict:
    """Milliseconds of one forward of each model, median over `repeats`; the models take turns.

    Measured in turns so that whatever else the machine does falls on all of them alike. The head runs at
    every position. Call on one device; on a GPU the clock waits for it.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            input_ids = _random_tokens(model, batch_size, length)
            started = perf_counter()
            model(input_ids)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first turns warm up caches and threads
                times[name].append((perf_counter() - started) * 1000)
    return {name: median(values) for name, values in times.items()}


def profiled_flops(model: PreTrainedModel, batch_size: int = 1, length: int = 128) -> int:
    """Floating-point operations of one forward as PyTorch's profiler counts them while it runs, the head included.

    Matrix products and element-wise sums and products, so it is a little more than `flops` and the head.
    """
    input_ids = _random_tokens(model, batch_size, length)
    with _eagerly(model), torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        model(input_ids)
    return sum(event.flops for event in seen.key_averages() if event.flops)


@contextmanager
def _eagerly(model: PreTrainedModel):
    """Attention as plain matrix products, which every counter can see."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that a call holds at once at most, beyond what was there before.

    On a GPU from PyTorch's allocator; on a CPU from the allocations that its profiler records.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def forward_table(
    models: dict[str, PreTrainedModel],
    batch_sizes: Iterable[int] = (1, 32),
    lengths: Iterable[int] = (32, 128, 512),
    repeats: int = 10,
) -> pd.DataFrame:
    """What a forward costs: a row for each model, batch size and length.

    Columns: model, batch_size, length; `milliseconds` (median over `repeats`, the models take turns),
    `tokens_per_second`, `megabytes` (peak, beyond the weights), `gflop` (of the layers, counted). Lengths
    beyond the positions of a model are left out.
    """
    rows = []
    for batch_size in batch_sizes:
        for length in lengths:
            able = {name: model for name, model in models.items() if length <= model.config.max_position_embeddings}
            for name, milliseconds in latency(able, batch_size, length, repeats).items():
                model = able[name]
                tokens = _random_tokens(model, batch_size, length)
                with torch.inference_mode():
                    memory = peak_memory(lambda model=model, tokens=tokens: model(tokens), model.device)
                row = {"model": name, "batch_size": batch_size, "length": length, "milliseconds": milliseconds}
                row |= {"tokens_per_second": 1000 * batch_size * length / milliseconds, "megabytes": memory / 1e6}
                rows.append(row | {"gflop": batch_size * flops(model.config, length) / 1e9})
    return pd.DataFrame(rows)


def _random_tokens(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    return torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)
