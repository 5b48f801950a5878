"""Score several checkpoints on several tasks with several seeds, beside baselines without a language model."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
from datasets import Dataset, DatasetDict
from filelock import FileLock
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from .finetune import FineTuneConfig, finetune, measure, sample
from .squad import SQUAD, SquadConfig, finetune_squad, score_answers
from .tasks import Task


def baselines(task: Task, data: DatasetDict, train_rows: int | None = None) -> pd.DataFrame:
    """Score two models without a language model, a row each: `majority` and `bag_of_words`.

    They are trained on the rows that `finetune` uses with the same `train_rows`. The majority predicts the most
    frequent class (a regression: the mean). The bag of words is a logistic (ridge) regression with scikit-learn's
    default settings. Its features are the TF-IDF of single words and of pairs of neighbours. For SQuAD there is only
    the majority, which answers no question.
    """
    held_out = data["validation"]
    if task.name in SQUAD:
        found = {"majority": score_answers(dict.fromkeys(held_out["id"], ""), held_out)}
    else:
        train = sample(data["train"], train_rows)
        linear = Ridge() if task.regression else LogisticRegression(max_iter=1000)
        models = {
            "majority": DummyRegressor() if task.regression else DummyClassifier(),
            "bag_of_words": make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), linear),
        }
        found = {}
        for name, model in models.items():
            model.fit(_joined(train), train["label"])
            found[name] = measure(task.measures, held_out["label"], model.predict(_joined(held_out)))
    rows = [{"task": task.name, "model": name} | row | {"score": row[task.measures[0]]} for name, row in found.items()]
    return pd.DataFrame(rows)


def _joined(rows: Dataset) -> list[str]:
    """One text a row: the two texts of a pair are joined."""
    columns = [rows[column] for column in ("text", "pair") if column in rows.column_names]
    return ["\n".join(texts) for texts in zip(*columns, strict=True)]


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
    """Fine-tune every checkpoint on every task with every seed, each at its best learning rate.

    The learning rate with the highest `score` on the tuning seed is used. It is selected on the held-out part that is
    reported, since GLUE's test labels are not public; the reported seeds are different ones. Finished trainings are
    read from the folder and not repeated.

    Args:
        checkpoints: folders or hub names, by the name in the table. A function maps the seed to a checkpoint, so that
            the spread includes that of producing the checkpoint.
        tasks: (task, data) pairs by name, as returned by `load_probe` and `load_squad`, or made with `load_task`.
        learning_rates: the candidates, the same for all.
        seeds: the seeds that are reported.
        folder: where each training stores its measures.
        tuning_seed: the seed that selects the learning rate; not used with one candidate.
        draw_only: train nothing, return the finished trainings.
        settings: other fields of FineTuneConfig, the same for all.

    Returns:
        A row for each task, model and seed: the task's measures, `score` (the first measure), `learning_rate` and
        `seconds`; and a row without seed for each task and baseline.

    Raises:
        ValueError: the folder holds a training of that name with other settings; or as `finetune`.
        ArithmeticError: a training that is reported diverged.
    """
    rates, seeds, rows = list(learning_rates), list(seeds), []
    limit = settings.get("train_rows")
    without = [baselines(task, data, limit).assign(task=name) for name, (task, data) in tasks.items()]
    pairs = tqdm(list(product(tasks, checkpoints)), desc="fine-tuning", unit="model", disable=draw_only)
    for name, model in pairs:
        pairs.set_postfix_str(f"{model} on {name}")
        task, data = tasks[name]
        file = re.sub(r"[^\w.-]+", "_", f"{task.name}-{model}")  # a model's name may be a path
        train = partial(_train_once, Path(folder) / file, checkpoints[model], task, data, settings, draw_only)
        rate = _best_rate(train, rates, tuning_seed, task.measures[0])
        for seed in seeds:
            if found := train(rate, seed):
                row = {"task": name, "model": model, "seed": seed, "learning_rate": rate}
                rows.append(row | found | {"score": found[task.measures[0]]})
    trained = pd.DataFrame(rows).convert_dtypes(convert_floating=False)  # seeds stay integers beside missing ones
    return pd.concat([trained, *without], ignore_index=True)


def _best_rate(train: Callable, rates: list[float], seed: int, name: str) -> float:
    """The rate with the highest measure on the seed; training that diverges or was not run counts as the lowest."""
    tried = dict.fromkeys(rates, -math.inf)
    for rate in rates if len(rates) > 1 else []:
        with suppress(ArithmeticError):
            if found := train(rate, seed):
                tried[rate] = found[name]
    return max(tried, key=tried.get)


def _train_once(
    stem: Path, checkpoint, task: Task, data: DatasetDict, settings: dict, draw_only: bool, rate: float, seed: int
) -> dict[str, float] | None:
    """The measures of one training, which one process runs and stores; None for `draw_only` and no stored ones."""
    path = stem.expanduser().with_name(f"{stem.name}-rate-{rate:g}-seed-{seed}.json")
    if draw_only and not path.exists():
        return None
    kind, run = (SquadConfig, finetune_squad) if task.name in SQUAD else (FineTuneConfig, finetune)
    config = kind(learning_rate=rate, seed=seed, **settings)
    checkpoint = checkpoint(seed) if callable(checkpoint) else checkpoint
    now = json.loads(json.dumps(asdict(config) | {"checkpoint": str(checkpoint), "task": asdict(task)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            found = run(checkpoint, task, data, config)
            draft = path.with_suffix(".unfinished")
            draft.write_text(json.dumps({"settings": now, "found": found}, indent=1, allow_nan=False) + "\n")
            os.replace(draft, path)
    stored = json.loads(path.read_text())
    changed = [f"{name} was {was}, is {now[name]}" for name, was in stored["settings"].items() if was != now[name]]
    if changed:
        raise ValueError(f"{path} holds a training with other settings: {'; '.join(changed)}. Use another folder")
    return stored["found"]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Models by tasks as text: median over the seeds in per cent [lowest, highest]; one value for a baseline."""
    cells = table.groupby(["model", "task"], sort=False)["score"].agg(_spread)
    return cells.unstack("task").loc[table["model"].unique(), table["task"].unique()]


def _spread(values: pd.Series) -> str:
    values = 100 * values.dropna()
    spread = f" [{values.min():.1f}, {values.max():.1f}]" if len(values) > 1 else ""
    return f"{values.median():.1f}{spread}"
