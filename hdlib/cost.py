"""What a model costs: parameters and time."""

from __future__ import annotations

import re
from statistics import median
from time import perf_counter

import torch
from transformers import PreTrainedModel


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameter counts, tied weights once: `total`, and `encoder`, the layers without embeddings and head."""
    layers = sum(p.numel() for name, p in model.named_parameters() if re.search(r"[.]\d+[.]", name))
    return {"total": model.num_parameters(), "encoder": layers}


@torch.inference_mode()
def latency(models: dict[str, PreTrainedModel], batch_size: int = 1, length: int = 128, repeats: int = 20) -> dict:
    """Milliseconds of one forward of each model, median over `repeats`; the models take turns.

    Measured in turns so that whatever else the machine does falls on all of them alike. The head runs at
    every position. Call on one device; on a GPU the clock waits for it.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            input_ids = torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)
            started = perf_counter()
            model(input_ids)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first turns warm up caches and threads
                times[name].append((perf_counter() - started) * 1000)
    return {name: median(values) for name, values in times.items()}
