"""The study of a GPU session: the default recipe and the paper's, each iteratively and one-shot, at a rate tuned alike.

Each recipe is tried with every learning rate in a short run. Then every arm runs at the best rate of its recipe, one
seed after the other, as many runs as fit. With a sentence encoder, the default is compared with fewer layers. A run
whose time is over stops after its step and is recorded with `finished` false; no run begins that would take longer than
the time that is left. Students of the first seed are saved in the folder `students`.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

import hdlib
from hdlib.checkpoints import save_folder
from hdlib.config import PAPER
from hdlib.discrepancy import main_measure
from hdlib.losses import TERMS
from hdlib.models import frozen_copy, is_encoder

from .part import Part

SEEDS = 5  # at most
CONFIG = {
    "steps": 400,
    "batch_size": 128,
    "target": 0.29,
    "multiple_of": 8,
    "precision": "bfloat16",
    "eval_every": 100,
    "eval_blocks": 256,
}
RECIPES = {"default": {}, "paper": PAPER, "fewer layers": {}}
ONE_SHOT = {"schedule": "one_shot"}
ARMS = {  # name to recipe and what differs from it
    "default": ("default", {}),
    "paper": ("paper", {}),
    "default, one-shot": ("default", ONE_SHOT),
    "paper, one-shot": ("paper", ONE_SHOT),
}
ENCODER_ARMS = {name: ARMS[name] for name in ("default", "default, one-shot")} | {"fewer layers": ("fewer layers", {})}
RATES = (5e-4, 1e-3, 2e-3)
TRIAL = 100  # steps, with seed 0; the runs that are compared have seeds from 1 on
ENCODER = {
    "steps": 2000,
    "batch_size": 128,
    "target": 0.5,
    "attention": 0.0,
    "prediction": 1.0,
    "weight_decay": 0.0,
    "prune_end": 0.3,
}
TOY = {"steps": 6, "batch_size": 2, "prune_every": 2, "eval_every": 3, "eval_blocks": 2, "precision": "float32"}
LOGGED = ("seconds", "elapsed", "parameters", "hidden_size", "intermediate_size", "total", *TERMS)


class OutOfTime(Exception):
    """The time of the part is over; carries nothing, since the run's folder holds its records."""


def run(part: Part) -> None:
    trained = Path(part.plan.out) / "teacher"
    teacher, tokenizer, train, held_out = part.data()
    if trained.exists():
        teacher, _ = hdlib.load_teacher(trained)
    data = teacher, tokenizer, train, held_out
    options, arms = (CONFIG | ENCODER, ENCODER_ARMS) if is_encoder(teacher) else (CONFIG, ARMS)
    options = options | (TOY if part.plan.dry else {})
    recipes = dict.fromkeys(recipe for recipe, _ in arms.values())
    best, longest = {recipe: _best_rate(part, data, recipe, options) for recipe in recipes}, 0.0
    for seed in range(1, 2 if part.plan.dry else 1 + SEEDS):
        for arm, (recipe, changes) in arms.items():
            name = f"{arm}, seed {seed}"
            if part.seconds_left < longest:
                part.not_reached.append(name)
                continue
            changes = options | {"learning_rate": best[recipe], "seed": seed} | changes
            part.item(name, partial(_measured, part, data, recipe, changes, name))
            longest = max(longest, part.items.get(name, {}).get("seconds", 0.0))
    part.write()


def _best_rate(part: Part, data: tuple, recipe: str, options: dict) -> float:
    """The rate of the trial with the lowest held-out measure; the middle one if none has ended."""
    measure, found = main_measure(data[0]), {}
    for rate in RATES[:1] if part.plan.dry else RATES:
        name = f"{recipe}, trial of rate {rate:g}"
        changes = options | {"steps": min(TRIAL, options["steps"]), "learning_rate": rate, "seed": 0}
        part.item(name, partial(_measured, part, data, recipe, changes, None))
        ended = part.items.get(name, {}).get("value", {})
        if ended.get("finished"):
            found[rate] = ended["held_out"][measure]
    return min(found, key=found.get, default=RATES[1])


def _measured(part: Part, data: tuple, recipe: str, options: dict, name: str | None) -> dict:
    """One run and its student's measures over the whole held-out part; a student of seed 1 with a name is saved."""
    teacher, tokenizer, _, held_out = data
    started = perf_counter()
    train = _with_fewer_layers if recipe == "fewer layers" else _distilled
    student, found = train(part, data, RECIPES[recipe] | options)
    if student is None:
        return {"finished": False} | found
    found |= {"finished": True, "seconds": perf_counter() - started, "parameters": student.num_parameters()}
    models = student.to(part.device), frozen_copy(teacher, part.device)
    found["held_out"] = dict(hdlib.discrepancy(*models, held_out, batch_size=64))
    if name and options["seed"] == 1:
        folder = Path(part.plan.out) / "students" / name.replace(", ", "_").replace(" ", "_")
        save_folder(folder, student.to("cpu", torch.bfloat16), tokenizer)
    return found


def _distilled(part: Part, data: tuple, options: dict) -> tuple:
    """The student of a run of the loop, or None if its time was over, with its config, widths and curve."""
    config = hdlib.DistillConfig(**options | {"checkpoint_every": options["steps"]})

    def check_time(record: dict) -> None:
        if part.seconds_left <= 0:
            raise OutOfTime

    with tempfile.TemporaryDirectory() as folder:
        run = hdlib.Run(Path(folder) / "run")
        try:
            hdlib.distill(*data, config, run.folder, on_step=check_time)
        except OutOfTime:
            return None, {"curve": _curve(run)}
        student, _ = run.student()
        widths = vars(hdlib.Widths.of(student))
        return student, {"config": config.to_dict(), "widths": widths, "curve": _curve(run)}


def _with_fewer_layers(part: Part, data: tuple, options: dict) -> tuple:
    """A sentence encoder with as many parameters in its layers, but of the teacher's width."""
    from hdlib.lab.baselines import fewer_layers  # needs `datasets`

    teacher, _, train, _ = data
    recipe = {name: options[name] for name in ("steps", "batch_size", "learning_rate", "seed")}
    return fewer_layers(frozen_copy(teacher, part.device), train, options["target"], **recipe), {"recipe": recipe}


def _curve(run: hdlib.Run) -> list[dict]:
    """The records of the steps with held-out measures: losses, widths, seconds, and what was measured."""
    names = (*LOGGED, "step")
    return [
        {name: value for name, value in record.items() if name in names or name.startswith("held_out")}
        for record in run.records()
        if any(name.startswith("held_out") for name in record)
    ]
