"""What a study found: its expectations beside its numbers, and what a larger scale would cost."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pandas as pd
from transformers import AutoConfig

import hdlib

from .study import ConfigError, Scale, Study, parameters

MASKED = hdlib.DistillConfig.mask_probability  # by default: share of the positions at which the head runs


def answers(study: Study, table: pd.DataFrame) -> list[dict]:
    """Every expectation with what came out: a difference over the seeds, and whether all of them agree with it.

    Returns:
        For each expectation its claim; `difference` (higher minus lower, mean over the seeds that both arms
        have), `lowest`, `highest`; `seeds`; and `verdict`: "holds" on all seeds, "reversed" on all seeds, or "tie".
    """
    found = []
    for expectation in study.expectations:
        measure, lower, higher = (expectation[name] for name in ("measure", "lower", "higher"))
        by_seed = table.pivot(index="seed", columns="arm", values=measure)
        answer = {"claim": expectation["claim"], "measure": measure, "seeds": 0, "verdict": "not measured"}
        if {lower, higher} <= set(by_seed):
            difference = (by_seed[higher] - by_seed[lower]).dropna()
            if len(difference):
                spread = {"difference": mean(difference), "lowest": difference.min(), "highest": difference.max()}
                answer |= {"seeds": len(difference), "verdict": _verdict(difference)}
                answer |= {name: float(value) for name, value in spread.items()}
        found.append(answer)
    return found


def _verdict(difference: pd.Series) -> str:
    if (difference > 0).all():
        return "holds"
    return "reversed" if (difference < 0).all() else "tie"


def in_words(answer: dict) -> str:
    if not answer["seeds"]:
        return f"{answer['claim']}: not measured"
    spread = f"{answer['difference']:+.3f} [{answer['lowest']:+.3f}, {answer['highest']:+.3f}]"
    return f"{answer['claim']}: {answer['verdict']} ({answer['measure']} {spread}, {answer['seeds']} seeds)"


def estimate(study: Study, measured: Path, scale: Scale) -> str:
    """How long a run at a scale would take on this machine, from the steps of the runs in a folder.

    A step costs the teacher's forward and three times the student's (forward and backward), the head at the
    masked positions included; the student's share of the teacher is that of the measured runs. What
    the machine computes in a second is taken from them too, so a different kind of machine is not covered.
    """
    runs = [hdlib.Run.load(file.parent) for file in sorted((measured / "runs").rglob("run.json"))]
    if not runs:
        raise ConfigError(f"{measured} holds no finished runs to measure a step of: run a smaller scale first")
    share = mean(_share_of_teacher(run) for run in runs)
    work = sum(_work(_teacher_config(run), share, **_size(run)) for run in runs)
    seconds = sum(run.metrics["seconds"].sum() for run in runs)
    values = parameters(study, scale, {})
    size = {"steps": values["steps"], "batch_size": values["batch_size"], "length": values["length"]}
    config = AutoConfig.for_model(**scale.teacher_config) if scale.teacher_config else _teacher_config(runs[0])
    each = _work(config, share, **size) / (work / seconds)
    return (
        f"scale {scale.name}: one run would take about {_duration(each)} on this machine, "
        f"{len(runs)} like those measured here {_duration(each * len(runs))} "
        f"({work / seconds / 1e12:.2g} TFLOP/s over {len(runs)} runs, {seconds:.0f} s)"
    )


def _work(config, share: float, steps: int, batch_size: int, length: int) -> float:
    """Floating-point operations of a run."""
    head = 2 * MASKED * length * config.hidden_size * (config.hidden_size + config.vocab_size)
    forward = hdlib.lab.cost.flops(config, length) + head
    return steps * batch_size * forward * (1 + 3 * share)


def _share_of_teacher(run: hdlib.Run) -> float:
    """The matrix products of the student's layers as a fraction of the teacher's, mean over the steps."""
    m = run.metrics
    work = m["hidden_size"] * (4 * m["num_heads"] * m["head_dim"] + 2 * m["intermediate_size"])
    widest = _teacher_config(run)
    return float(work.mean() / (widest.hidden_size * (4 * widest.hidden_size + 2 * widest.intermediate_size)))


def _teacher_config(run: hdlib.Run):
    teacher = run.arguments["teacher"]
    return AutoConfig.from_pretrained(teacher, trust_remote_code=False)


def _size(run: hdlib.Run) -> dict:
    config = run.arguments["config"]
    return {"steps": config["steps"], "batch_size": config["batch_size"], "length": run.arguments["blocks"]["length"]}


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def save(folder: Path, study: Study, scale: Scale, values: dict, answers: list[dict], table: pd.DataFrame) -> None:
    """`study.json`: everything that a ledger's row needs, small enough to be committed."""
    first = next(iter(sorted((folder / "runs").glob("*/run.json"))), None)
    ran_with = json.loads(first.read_text()) if first else {}
    found = {
        "study": study.name,
        "scale": scale.name,
        "parameters": values,
        "machine": ran_with.get("machine"),
        "versions": ran_with.get("versions"),
        "answers": answers,
        "table": json.loads(table.to_json(orient="records", double_precision=6)),
    }
    (folder / "study.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
