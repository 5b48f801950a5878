"""Measure the cost of a step, one table a question: `python -m experiments.bench [QUESTION ...]`.

The calls that a table compares alternate within one process, and a ratio is the median over the turns, since absolute
times vary on a shared machine. Models have random weights and real shapes: the cost depends on shapes only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import compiled, growth, memory, peers, prune, step, student, whole_run
from .work import SHAPES, Setting

QUESTIONS = {
    "run": whole_run,
    "step": step,
    "memory": memory,
    "prune": prune,
    "peers": peers,
    "student": student,
    "growth": growth,
    "compile": compiled,
}
FIGURES = {"growth": growth.plot}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), help=", ".join(QUESTIONS), metavar="QUESTION")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each call")
    parser.add_argument("--results", type=Path, help="also write each table as JSON to this folder")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.questions if name not in QUESTIONS]:
        parser.error(f"unknown question {', '.join(unknown)}: use {', '.join(QUESTIONS)}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    sizes = (arguments.shape, arguments.batch_size, arguments.length, arguments.precision)
    setting = Setting(*sizes, device, arguments.turns)
    for name in arguments.questions:
        module = QUESTIONS[name]
        print(f"\n{name}: {module.__doc__.splitlines()[0]}\n{setting}\n", flush=True)
        table = module.measure(setting)
        print(table.round(3).to_string(), flush=True)
        if arguments.results:
            arguments.results.mkdir(parents=True, exist_ok=True)
            found = {"setting": str(setting), "threads": torch.get_num_threads(), "torch": torch.__version__}
            found["table"] = json.loads(table.round(5).reset_index().to_json(orient="records"))
            (arguments.results / f"bench_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            if name in FIGURES:
                FIGURES[name](table).savefig(arguments.results / f"bench_{name}.png", dpi=160)


if __name__ == "__main__":
    main()
