"""Run folders as a long training would leave them, made up in a moment: what looks at runs is tested on them."""

import json
from pathlib import Path

import torch

from hdlib import DistillConfig, Run
from hdlib.neurons import Prune


def recorded_run(
    folder: Path, steps: int, layers: int = 12, hidden: int = 768, ffn: int = 3072, prunes: int = 100, every: int = 50
) -> Run:
    """A BERT's run with a line for each step, a held-out measure every `every` steps and `prunes` prunes to a third."""
    config = DistillConfig(steps=steps, eval_every=every, target=0.33)
    blocks = {"train": 1000, "validation": 100, "length": 128}
    run = Run.start(folder, {"config": config.to_dict(), "blocks": blocks, "teacher": "embedded"})
    kept = [max(1 / 3, 1 - number / (1.5 * prunes)) for number in range(prunes + 1)]
    pruned = {max(1, round((0.05 + 0.65 * number / prunes) * steps)): kept[number] for number in range(1, prunes + 1)}
    share, lines = 1.0, []
    for step in range(steps + 1):
        share = pruned.get(step, share)
        record = {"step": step, "seconds": 0.5 * share, "elapsed": 0.5 * step}
        record |= {"hidden_size": round(hidden * share), "intermediate_size": round(ffn * share), "head_dim": 64}
        record |= {"num_heads": 12, "parameters": round(1e8 * share)}
        if step:
            terms = {"mlm": 2.0 + share, "prediction": 1.1 - share, "hidden": 1.2 - share, "attention": 9.0 - share}
            record |= terms | {"embedding": 1.01 - share, "total": sum(terms.values()), "gradient_norm": 1.0}
        if step % every == 0:
            measures = {"kl": 1 - share, "agreement": share, "mlm": 2.0, "accuracy": share, "hidden": 1 - share}
            measures |= {f"hidden_{layer}": (1 - share) * layer / layers for layer in range(1, layers + 1)}
            record |= {f"held_out_{name}": value for name, value in measures.items()}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    groups = {"hidden": hidden}
    for layer in range(layers):
        groups |= {f"layer.{layer}.ffn": ffn, f"layer.{layer}.query_key": hidden, f"layer.{layer}.value_output": hidden}
    random = torch.Generator().manual_seed(0)
    ranks = {name: torch.rand(size, generator=random) for name, size in groups.items()}
    for step, share in pruned.items():
        stays = {name: rank.argsort().argsort() >= (1 - share) * len(rank) for name, rank in ranks.items()}
        Prune(step, {name: rank**4 for name, rank in ranks.items()}, stays).save(folder / "neurons")
    return run
