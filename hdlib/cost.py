"""What a model costs: parameters, floating-point operations and time."""

from __future__ import annotations

import re
from copy import deepcopy
from statistics import median
from time import perf_counter

import torch
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
            input_ids = torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)
            started = perf_counter()
            model(input_ids)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first turns warm up caches and threads
                times[name].append((perf_counter() - started) * 1000)
    return {name: median(values) for name, values in times.items()}
