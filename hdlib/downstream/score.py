"""Many checkpoints on many tasks with several seeds, in one table, beside what needs no language model at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
from datasets import DatasetDict
from filelock import FileLock
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from .finetune import FineTuneConfig, drawn, finetune
from .metrics import measure
from .squad import SQUAD, SquadConfig, finetune_squad, score_answers
from .tasks import Task


def baselines(task: Task, data: DatasetDict, train_rows: int | None = None) -> pd.DataFrame:
    """What is reached without any language model, one row each: `majority` and `bag_of_words`.

    They learn from the rows that a model with the same `train_rows` would learn from.

    The majority answers the most frequent class (the mean, for a regression). The bag of words is a logistic
    (ridge) regression on TF-IDF of single words and pairs of neighbours, the two texts of a pair
    side by side, with scikit-learn's default settings. For SQuAD there is a majority only: no question has an answer.
    """
    if task.name in SQUAD:
        found = score_answers(dict.fromkeys(data["validation"]["id"], ""), data["validation"])
        return pd.DataFrame([{"task": task.name, "model": "majority"} | found | {"score": found[task.measures[0]]}])
    train, held_out = drawn(data["train"], train_rows), data["validation"]
    linear = Ridge() if task.regression else LogisticRegression(max_iter=1000)
    models = {
        "majority": DummyRegressor() if task.regression else DummyClassifier(),
        "bag_of_words": make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), linear),
    }
    rows = []
    for name, model in models.items():
        model.fit(_one_text(train), train["label"])
        found = measure(task.measures, held_out["label"], model.predict(_one_text(held_out)))
        rows.append({"task": task.name, "model": name} | found | {"score": found[task.measures[0]]})
    return pd.DataFrame(rows)


def _one_text(rows) -> list[str]:
    if "pair" not in rows.column_names:
        return list(rows["text"])
    return [f"{text}\n{pair}" for text, pair in zip(rows["text"], rows["pair"], strict=True)]


def score(
    checkpoints: Mapping[str, str | Path | Callable[[int], str | Path]],
    tasks: Mapping[str, tuple[Task, DatasetDict]],
    learning_rates: Iterable[float],
    seeds: Iterable[int],
    folder: str | Path,
    *,
    tuning_seed: int = 0,
    draw_only: bool = False,
    **settings,
) -> pd.DataFrame:
    """Fine-tune every checkpoint on every task with every seed, each with the learning rate that suits it.

    The rate is chosen by the task's first measure on the tuning seed, the same rates for all. A rate is chosen on
    the part that is reported, as is usual for GLUE, whose test labels are not public; the seeds that are
    reported are others. Finished trainings are read from the folder and not done again.

    Args:
        checkpoints: folders or hub names, by the name that tables show; or what gives the checkpoint of a seed, so
            that the spread is that of making the checkpoint too.
        tasks: as (task, `load_task(task, ...)`), `load_probe(...)` or `load_squad(...)`, by name.
        learning_rates: the rates that are tried.
        seeds: the seeds that are reported.
        folder: where each training leaves its numbers.
        tuning_seed: the seed on which rates are chosen; with one rate nothing is.
        draw_only: train nothing, tell what is there.
        settings: other fields of FineTuneConfig, the same for all.

    Returns:
        A row for each task, model and seed: the task's measures, `score` (the first of them),
        `learning_rate`, `seconds`; and a row for each task and baseline, without a seed.

    Raises:
        ValueError: the folder holds a training of that name with other settings; or as `finetune`.
    """
    rates, seeds = list(learning_rates), list(seeds)
    trials = [(rate, tuning_seed) for rate in rates if len(rates) > 1]
    rows, without = [], []
    total = len(tasks) * len(checkpoints) * (len(trials) + len(seeds))
    with tqdm(total=total, desc="fine-tuning", unit="training", disable=draw_only) as bar:
        for name, (task, data) in tasks.items():
            without.append(baselines(task, data, settings.get("train_rows")).assign(task=name))
            for model, checkpoint in checkpoints.items():
                bar.set_postfix_str(f"{model} on {name}")
                train = partial(_trained, Path(folder), model, checkpoint, task, data, settings, draw_only, bar)
                tried = {rate: _tried(train, rate, seed, task.measures[0]) for rate, seed in trials}
                rate = max(tried, key=tried.get, default=rates[0])
                for seed in seeds:
                    if found := train(rate, seed):
                        row = {"task": name, "model": model, "seed": seed, "learning_rate": rate}
                        rows.append(row | found | {"score": found[task.measures[0]]})
    trained = pd.DataFrame(rows).convert_dtypes(convert_floating=False)  # a baseline's missing seed makes no 1.0 of a 1
    return pd.concat([trained, *without], ignore_index=True)


def _tried(train: Callable, rate: float, seed: int, decisive: str) -> float:
    try:
        found = train(rate, seed)
    except ArithmeticError:  # a rate with which training comes apart has lost
        return -math.inf
    return found[decisive] if found else -math.inf


def _trained(
    folder: Path,
    model: str,
    checkpoint,
    task: Task,
    data: DatasetDict,
    settings: dict,
    draw_only: bool,
    bar: tqdm,
    rate: float,
    seed: int,
) -> dict[str, float] | None:
    """What one fine-tuning found: trained once, by one process, and kept as a file that is whole or not there."""
    name = re.sub(r"[^\w.-]+", "_", f"{task.name}-{model}")  # a model may be named by its path
    path = folder / f"{name}-rate-{rate:g}-seed-{seed}.json"
    if draw_only and not path.exists():
        return None
    answers = task.name in SQUAD
    config = (SquadConfig if answers else FineTuneConfig)(learning_rate=rate, seed=seed, **settings)
    checkpoint = checkpoint(seed) if callable(checkpoint) else checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asdict(config) | {"checkpoint": str(checkpoint), "task": asdict(task)}))
    with FileLock(f"{path}.lock"):
        if not path.exists():
            found = (finetune_squad if answers else finetune)(checkpoint, task, data, config)
            draft = path.with_suffix(".unfinished")
            draft.write_text(json.dumps({"settings": asked, "found": found}, indent=1, allow_nan=False) + "\n")
            os.replace(draft, path)
    bar.update()
    kept = json.loads(path.read_text())
    changed = [f"{name} was {was}, is {asked[name]}" for name, was in kept["settings"].items() if was != asked[name]]
    if changed:
        raise ValueError(f"{path} holds a training with other settings: {'; '.join(changed)}. Take another folder")
    return kept["found"]


def summary(table: pd.DataFrame, measure: str = "score") -> pd.DataFrame:
    """Models by tasks as text: the median over the seeds in per cent, [lowest, highest]; a baseline has one value."""
    cells = table.groupby(["model", "task"], sort=False)[measure].agg(_spread)
    return cells.unstack("task").loc[table["model"].unique(), table["task"].unique()]


def _spread(values: pd.Series) -> str:
    per_cent = [100 * value for value in values.dropna()]
    if len(per_cent) == 1:
        return f"{per_cent[0]:.1f}"
    return f"{median(per_cent):.1f} [{min(per_cent):.1f}, {max(per_cent):.1f}]"
