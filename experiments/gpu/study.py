"""The study of a GPU session: the teacher of the pack narrowed to a third, iteratively, one-shot, and random start.

One seed after the other, as many runs as fit. A run whose time is over stops after its step and is recorded with
`finished` false; no run begins that would take longer than the time that is left.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import hdlib
from hdlib.data import Blocks
from hdlib.losses import TERMS
from hdlib.models import frozen_copy

from .pack import load_pack
from .part import Part

ARMS = {"iterative": {}, "one-shot": {"schedule": "one_shot"}, "random start": {"initial": "random"}}
SEEDS = 5  # at most
CONFIG = {
    "steps": 3000,
    "batch_size": 128,
    "target": 1 / 3,
    "learning_rate": 1e-3,
    "precision": "bfloat16",
    "eval_every": 250,
    "eval_blocks": 64,
}
TOY = {"steps": 6, "batch_size": 2, "prune_every": 2, "eval_every": 3, "eval_blocks": 2, "precision": "float32"}
LOGGED = ("seconds", "elapsed", "parameters", "hidden_size", "intermediate_size", "total", *TERMS)


class OutOfTime(Exception):
    """The time of the part is over; carries nothing, since the run's folder holds its records."""


def run(part: Part) -> None:
    teacher, tokenizer, train, held_out = load_pack(part.plan.pack)
    options = CONFIG | (TOY if part.plan.dry else {})
    if part.plan.dry:
        held_out = Blocks(**held_out[:4])
    longest = 0.0
    for seed in range(1 if part.plan.dry else SEEDS):
        for name, arm in ARMS.items():
            if part.seconds_left < longest:
                part.not_reached.append(f"{name}, seed {seed}")
                continue
            config = hdlib.DistillConfig.paper(**options | arm | {"seed": seed, "checkpoint_every": options["steps"]})
            distilled = partial(_distilled, part, (teacher, tokenizer, train, held_out), config)
            part.item(f"{name}, seed {seed}", distilled)
            longest = max(longest, part.items.get(f"{name}, seed {seed}", {}).get("seconds", 0.0))
    part.write()


def _distilled(part: Part, data: tuple, config: hdlib.DistillConfig) -> dict:
    """One run and its student's held-out measures over all held-out blocks, in float32."""
    teacher, _, _, held_out = data

    def check_time(record: dict) -> None:
        if part.seconds_left <= 0:
            raise OutOfTime

    started = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = hdlib.Run(Path(folder) / "run")
        try:
            hdlib.distill(*data, config, run.folder, on_step=check_time)
        except OutOfTime:
            return {"finished": False, "curve": _curve(run, config)}
        seconds = perf_counter() - started
        student, _ = run.student()
        models = student.to(part.device), frozen_copy(teacher, part.device)
        measured = hdlib.discrepancy(*models, held_out, batch_size=64)
        widths = vars(hdlib.Widths.of(student))
        found = {"finished": True, "seconds": seconds, "config": config.to_dict(), "widths": widths}
        return found | {"parameters": student.num_parameters(), "held_out": measured, "curve": _curve(run, config)}


def _curve(run: hdlib.Run, config: hdlib.DistillConfig) -> list[dict]:
    """The records of the steps with held-out measures: losses, widths, seconds, and what was measured."""
    records = [record for record in run.records() if "held_out_kl" in record]
    names = (*LOGGED, "step")
    return [
        {name: value for name, value in record.items() if name in names or name.startswith("held_out")}
        for record in records
    ]
