"""KL right after one prune, without training: `python -m experiments.jumps [--teacher FOLDER --corpus FOLDER]`.

Each row is a run of ten steps with a learning rate next to 0, which prunes at its eighth step.
"""

from __future__ import annotations

import argparse
import tempfile

import pandas as pd

import hdlib

ARMS = {
    "sliced": {},
    "compensated": {"rotate": True, "compensate": True},
    "compensated, reconstruction": {"rotate": True, "compensate": True, "scorer": "reconstruction"},
}
AT_STEP_8 = {"steps": 10, "schedule": "one_shot", "prune_start": 0.8, "prune_end": 0.9, "prune_every": 1}
STILL = {"learning_rate": 1e-12, "weight_decay": 0.0, "precision": "float32", "eval_every": 10}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.jumps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.75, 0.5], help="fractions of every width")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks of 64 tokens a step")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    arguments = parser.parse_args()
    teacher, tokenizer = hdlib.load_teacher(arguments.teacher)
    text = hdlib.load_corpus(arguments.corpus, tokenizer, 64)
    sizes = {"batch_size": arguments.batch_size, "eval_blocks": arguments.blocks}
    table = {}
    for kept in arguments.kept:
        for arm, options in ARMS.items():
            config = hdlib.DistillConfig.paper(**AT_STEP_8, **STILL, **sizes, **options, target=kept)
            with tempfile.TemporaryDirectory() as folder:
                run = hdlib.distill(teacher, tokenizer, *text, config, folder)
                table.setdefault(arm, {})[kept] = run.metrics["held_out_kl"].iloc[-1]
        jumps = pd.DataFrame(table)
        for arm in [*ARMS][1:]:
            jumps[f"{arm}, of sliced"] = jumps[arm] / jumps["sliced"]
        print(jumps.rename_axis("kept").round(3).to_string(), flush=True)


if __name__ == "__main__":
    main()
