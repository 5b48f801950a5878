"""What one prune costs, beside one forward and backward of the same model, and beside Torch-Pruning.

    python -m experiments.prune_cost [--results experiments/results/prune_cost.json]

A BERT-base shape with its masked-language-model head, 8 x 128 tokens, float32. One prune is everything from scores to a
narrowed model and optimiser (AdamW with moments): 768 to 756 hidden neurons, 3,072 to 3,024 inner ones, a
dimension of every head. Torch-Pruning (`pip install --no-deps torch-pruning==1.6.1`, left out if it is not
there) is asked to remove as much from the same model by its first-order importance; it knows nothing of the optimiser.
Forward and backward and the prunes take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from transformers import BertConfig, BertForMaskedLM

import hdlib

BATCH, LENGTH = 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    seconds = measure(turns=5)
    step = median(seconds["forward_backward"])
    figures = {
        name: {"seconds": round(median(times), 4), "of_a_step": round(median(times) / step, 4)}
        for name, times in seconds.items()
    }
    print(json.dumps(figures, indent=2))
    if arguments.results:
        arguments.results.write_text(json.dumps(figures | {"threads": torch.get_num_threads()}, indent=2) + "\n")


def measure(turns: int, beside: bool = True) -> dict[str, list[float]]:
    """Seconds of each part, a list over the turns; `beside` measures Torch-Pruning too, if it is there."""
    torch.manual_seed(0)
    input_ids = torch.randint(1000, 30000, (BATCH, LENGTH))
    model = BertForMaskedLM(BertConfig()).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scorer = hdlib.scorer("sensitivity")
    seconds: dict[str, list[float]] = {"forward_backward": [], "scores": [], "prune": []}
    forward_backward(model, input_ids)  # warm up, and give the optimiser its moments
    optimizer.step()
    for turn in range(1, turns + 1):
        optimizer.zero_grad()
        seconds["forward_backward"].append(timed(forward_backward, model, input_ids))
        seconds["scores"].append(timed(scorer.update, model))
        optimizer.step()
        optimizer.zero_grad()
        widths = hdlib.Widths(hidden=768 - 12 * turn, ffn=3072 - 48 * turn)
        seconds["prune"].append(timed(prune, model, widths, scorer, optimizer))
        if beside and find_spec("torch_pruning"):
            seconds.setdefault("torch_pruning", []).append(torch_pruning_step(input_ids))
    return seconds


def forward_backward(model, input_ids) -> None:
    model(input_ids, labels=input_ids).loss.backward()


def prune(model, widths, scorer, optimizer) -> None:
    scorer.narrow(hdlib.narrow(model, widths, scorer.scores(), optimizer))


def torch_pruning_step(input_ids) -> float:
    """Seconds of one `pruner.step()` on a fresh BERT-base with gradients; building the pruner is not counted."""
    import torch_pruning as tp

    model = BertForMaskedLM(BertConfig()).eval()
    forward_backward(model, input_ids)
    heads = {layer.attention.self.query: 12 for layer in model.bert.encoder.layer}
    heads |= {layer.attention.self.key: 12 for layer in model.bert.encoder.layer}
    heads |= {layer.attention.self.value: 12 for layer in model.bert.encoder.layer}
    pruner = tp.pruner.BasePruner(
        model,
        input_ids,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=1 / 64,
        num_heads=heads,
        prune_head_dims=True,
        ignored_layers=[model.cls.predictions.decoder],
    )
    return timed(pruner.step)


def timed(function, *arguments) -> float:
    started = perf_counter()
    function(*arguments)
    return perf_counter() - started


if __name__ == "__main__":
    main()
