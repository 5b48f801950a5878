"""Everything that needs a GPU, in one command: `python -m experiments.gpu [--minutes 8] [--dry]`.

Four parts, in this order, each in a process of its own with a time limit: `cases` (device tests against the CPU's
numbers), `speed` (benchmarks at BERT-base shapes), `teacher` (the pack's teacher is trained further) and `study` (the
default recipe and the paper's on it). Results are in runs/gpu, or $OUT, or --out:

- session.json: the command, and how each part ended.
- verdicts.json: which device tests passed, with the largest difference from the CPU.
- cases.json, reference.json: the numbers of the device tests, on the accelerator and on the CPU.
- speed.json, teacher.json, study.json: the measurements; teacher and students: the trained models.
- log.txt: what the parts wrote to standard error.

First make the folder that travels, where the data is (runs/gpu_pack; git ignores it):

    python -m experiments.gpu.pack TEACHER TEXT... --validation TEXT

The machine with the GPU needs torch, transformers, accelerate, safetensors, tokenizers, numpy, scipy, pandas, pyarrow,
tqdm and pyyaml. `--dry` runs the same code at toy shapes on a CPU. Named parts run alone, so that a session can be two
commands: `cases speed --minutes 5`, then `study --minutes 8`. A second call with the same --out skips what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic

from hdlib.runs import write_whole

from .cases import compared
from .pack import FOLDER, TOKENS
from .part import Plan

SHARES = {"cases": 2, "speed": 4, "teacher": 1, "study": 5}  # of the time; a part leaves what it does not need
GRACE = 0.05  # of a part's time, at its end, in which no item begins; what runs after it is killed
ROOT = Path(__file__).parents[2]


def main() -> None:
    arguments = _arguments()
    started, seconds = monotonic(), 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    ends = {}
    for number, name in enumerate(arguments.parts):
        weights = [SHARES[each] for each in arguments.parts[number:]]
        limit = (seconds - (monotonic() - started)) * weights[0] / sum(weights)
        until = monotonic() + (1 - GRACE) * limit
        plan = Plan(name, str(arguments.pack), str(arguments.out), until, arguments.dry)
        reference = _reference(plan) if name == "cases" else None
        ends[name] = _run(plan, limit)
        if reference:
            ends["reference"] = _wait(reference, GRACE * limit)
            _judge(arguments.out)
        session = {"arguments": sys.argv[1:], "seconds": monotonic() - started, "parts": ends}
        write_whole(arguments.out / "session.json", json.dumps(session, indent=1) + "\n")
    print(f"{monotonic() - started:.0f} s; results: {arguments.out}")


def _run(plan: Plan, seconds: float) -> str:
    """Run a part, again without the items it has while its process dies of an item; returns how it ended."""
    path, until, had = Path(plan.out) / f"{plan.name}.json", monotonic() + seconds, -1
    while True:
        how = _wait(_start(plan), until - monotonic())
        has = len(json.loads(path.read_text())["items"]) if path.exists() else 0
        if how == "ended" or monotonic() >= plan.until or has <= had:
            return how
        print(f"{plan.name}: {how}; a new process takes the next item", flush=True)
        had = has


def _reference(plan: Plan) -> subprocess.Popen:
    """The device tests by a process that sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return _start(replace(plan, name="reference", module="cases"), **hidden)


def _start(plan: Plan, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", f"{__package__}.part", json.dumps(asdict(plan))]
    environment |= {"TQDM_MININTERVAL": "60"}
    if plan.dry:
        environment["OMP_NUM_THREADS"] = "1"
    with (Path(plan.out) / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log, env=os.environ | environment, start_new_session=True)


def _wait(process: subprocess.Popen, seconds: float) -> str:
    """How the process ended; it and its children are killed after `seconds`."""
    try:
        code = process.wait(max(0.0, seconds))
        return "ended" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "killed at the time limit"


def _judge(out: Path) -> None:
    """Compare the device tests with the CPU's numbers: verdicts.json, and a line for each that did not pass."""
    found, reference = (
        json.loads(path.read_text())["items"] if path.exists() else {}
        for path in (out / "cases.json", out / "reference.json")
    )
    verdicts = {
        name: compared(item, reference.get(name, {}), precision=name.partition(":")[0]) for name, item in found.items()
    }
    write_whole(out / "verdicts.json", json.dumps(verdicts, indent=1) + "\n")
    for name, verdict in verdicts.items():
        if not verdict["passed"]:
            print(f"NOT PASSED {name}: {json.dumps(verdict)[:300]}")
    passed = sum(verdict["passed"] for verdict in verdicts.values())
    print(f"{passed} of {len(verdicts)} device tests passed", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", default=list(SHARES), metavar="PART", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (default: 8)")
    parser.add_argument("--pack", type=Path, default=FOLDER, help=f"the folder that travelled (default: {FOLDER})")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT", "runs/gpu"), help="(default: $OUT or runs/gpu)"
    )
    parser.add_argument("--dry", action="store_true", help="toy shapes, to see that everything runs")
    arguments = parser.parse_args()
    arguments.pack, arguments.out = Path(arguments.pack).resolve(), Path(arguments.out).resolve()
    if unknown := [name for name in arguments.parts if name not in SHARES]:
        parser.error(f"there is no part {', '.join(unknown)}; there are: {', '.join(SHARES)}")
    if not (arguments.pack / TOKENS).exists():
        parser.error(
            f"{arguments.pack} holds no pack: make it with python -m experiments.gpu.pack, or name it with --pack"
        )
    return arguments


if __name__ == "__main__":
    main()
