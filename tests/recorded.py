"""Synthetic run folders of long trainings, for tests of what reads runs."""

import json
from pathlib import Path

import torch

from hdlib import DistillConfig, Run
from hdlib.runs import Prune


def recorded_run(
    folder: Path, steps: int, layers: int = 12, hidden: int = 768, ffn: int = 3072, prunes: int = 100, every: int = 50
) -> Run:
    """The run of a BERT: a record for each step, held-out measures every `every` steps, `prunes` prunes to a third."""
    config = DistillConfig(steps=steps, eval_every=every, target=0.33)
    blocks = {"train": 1000, "validation": 100, "length": 128}
    run = Run.start(folder, {"config": config.to_dict(), "blocks": blocks, "teacher": "embedded"})
    ratios = [max(1 / 3, 1 - number / (1.5 * prunes)) for number in range(prunes + 1)]
    pruned = {max(1, round((0.05 + 0.65 * number / prunes) * steps)): ratios[number] for number in range(1, prunes + 1)}
    ratio, lines = 1.0, []
    for step in range(steps + 1):
        ratio = pruned.get(step, ratio)
        record = {"step": step, "seconds": 0.5 * ratio, "elapsed": 0.5 * step}
        record |= {"hidden_size": round(hidden * ratio), "intermediate_size": round(ffn * ratio), "head_dim": 64}
        record |= {"num_heads": 12, "parameters": round(1e8 * ratio)}
        if step:
            terms = {"mlm": 2.0 + ratio, "prediction": 1.1 - ratio, "hidden": 1.2 - ratio, "attention": 9.0 - ratio}
            record |= terms | {"embedding": 1.01 - ratio, "total": sum(terms.values()), "gradient_norm": 1.0}
        if step % every == 0:
            measures = {"kl": 1 - ratio, "agreement": ratio, "mlm": 2.0, "accuracy": ratio, "hidden": 1 - ratio}
            measures |= {f"hidden_{layer}": (1 - ratio) * layer / layers for layer in range(1, layers + 1)}
            record |= {f"held_out_{name}": value for name, value in measures.items()}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    groups = {"hidden": hidden}
    for layer in range(layers):
        groups |= {f"layer.{layer}.ffn": ffn, f"layer.{layer}.query_key": hidden, f"layer.{layer}.value_output": hidden}
    random = torch.Generator().manual_seed(0)
    ranks = {name: torch.rand(size, generator=random) for name, size in groups.items()}
    for step, ratio in pruned.items():
        kept = {name: rank.argsort().argsort() >= (1 - ratio) * len(rank) for name, rank in ranks.items()}
        run.save_prune(Prune(step, {name: rank**4 for name, rank in ranks.items()}, kept))
    return run
