"""The results of a study: its expectations with the measured numbers, and the cost of a larger scale."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hdlib import DistillConfig, Run, Widths
from hdlib.lab import verdict
from hdlib.lab.cost import course, operations
from hdlib.models import language_model_class, shape_of

from .study import ConfigError, Scale, Study, parameters

VERDICTS = {"higher": "holds", "lower": "reversed"}


def answers(study: Study, table: pd.DataFrame) -> list[dict]:
    """Test every expectation against the final numbers of the runs.

    Returns:
        For each expectation its claim, its measure, and `hdlib.lab.verdict` of the arm that should be higher against
        the other: None for a number that does not exist, "holds" for "higher" and "reversed" for "lower".
    """
    found = []
    for expectation in study.expectations:
        answer = verdict(table, expectation["higher"], expectation["lower"], expectation["measure"])
        answer = {name: None if value != value else value for name, value in answer.items()}
        answer["verdict"] = VERDICTS.get(answer["verdict"], answer["verdict"])
        found.append({"claim": expectation["claim"], "measure": expectation["measure"]} | answer)
    return found


def describe(answer: dict) -> str:
    """One line for an answer."""
    text = f"{answer['claim']}: {answer['verdict']}"
    if answer["difference"] is None:
        return text
    interval = "" if answer["low"] is None else f" [{answer['low']:+.3f}, {answer['high']:+.3f}]"
    return f"{text} ({answer['measure']} {answer['difference']:+.3f}{interval}, seeds: {answer['pairs']})"


def estimate(study: Study, measured: Path, scale: Scale) -> str:
    """The time of a run at a scale on this machine, from the floating-point operations and seconds of finished runs.

    A run at the scale takes the same fraction of the operations at full width as the measured runs. The estimate holds
    for the kind of machine that they ran on.
    """
    files = sorted((measured / "runs").rglob("run.json"))
    runs = [run for file in files if (run := Run.load(file.parent)).finished]
    if not runs:
        raise ConfigError(f"{measured} holds no finished runs to measure a step of: run a smaller scale first")
    costs = [_operations(_teacher(run.arguments["teacher"]), *_setting(run)) for run in runs]
    done = sum(run.config.steps * run.config.batch_size * cost for run, (cost, _) in zip(runs, costs, strict=True))
    seconds = sum(run.metrics["seconds"].sum() for run in runs)
    values = parameters(study, scale, {})
    teacher = _teacher(runs[0].arguments["teacher"])
    if scale.teacher_config:
        teacher = _without_weights(AutoConfig.for_model(**scale.teacher_config))
    _, full = _operations(teacher, replace(runs[0].config, target=1.0), values["length"])
    each = values["steps"] * values["batch_size"] * full * mean(cost / widest for cost, widest in costs)
    each /= done / seconds
    return (
        f"scale {scale.name}: one run would take about {_duration(each)} on this machine, "
        f"{len(runs)} like those measured here {_duration(each * len(runs))} "
        f"({done / seconds / 1e12:.2g} TFLOP/s over {len(runs)} runs, {seconds:.0f} s)"
    )


@cache
def _operations(teacher: PreTrainedModel, config: DistillConfig, length: int) -> tuple[float, float]:
    """Floating-point operations of a block in one step: the mean over a run, and at full width."""
    shapes, wide = course(teacher, config)[0], Widths.of(teacher)
    of_block = operations(teacher, {*shapes, wide}, config, length)
    return mean(of_block[each] for each in shapes), of_block[wide]


@cache
def _teacher(name: str) -> PreTrainedModel:
    return _without_weights(shape_of(name))


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return language_model_class(config).from_config(config)


def _setting(run: Run) -> tuple[DistillConfig, int]:
    """What the operations depend on; equal for all seeds."""
    return replace(run.config, seed=0), run.arguments["blocks"]["length"]


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def save(folder: Path, study: Study, scale: Scale, values: dict, answers: list[dict], table: pd.DataFrame) -> None:
    """Write `study.json`: the content of a ledger row, small enough to commit."""
    first = next(iter(sorted((folder / "runs").glob("*/run.json"))), None)
    description = json.loads(first.read_text()) if first else {}
    found = {
        "study": study.name,
        "scale": scale.name,
        "parameters": values,
        "machine": description.get("machine"),
        "versions": description.get("versions"),
        "answers": answers,
        "table": json.loads(table.to_json(orient="records", double_precision=6)),
    }
    (folder / "study.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
