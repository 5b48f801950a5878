"""Tasks over one or two texts a row: which columns, which measures, and tables that are checked as they are read."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import HfApi

HUB = "nyu-mll/glue"


def _read_csv(file: Path, **options) -> Dataset:
    """Only an empty field is missing: a text that says None or NA is a text."""
    frame = pd.read_csv(file, keep_default_na=False, na_values=[""], **options)
    return Dataset.from_pandas(frame, preserve_index=False)


def _read_jsonl(file: Path) -> Dataset:
    frame = pd.read_json(file, lines=True, dtype=False, convert_dates=False)
    return Dataset.from_pandas(frame, preserve_index=False)


READERS = {
    ".parquet": lambda file: Dataset(pyarrow.parquet.read_table(file)),
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, sep="\t", quoting=csv.QUOTE_NONE),  # quotes are text in GLUE's own files
    ".jsonl": _read_jsonl,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A table with one or two texts a row, and what is to be said about them.

    Args:
        name: of the task, and of its folder or hub configuration.
        texts: the columns with the texts, one or two.
        label: the column with the class or, for a regression, the number.
        regression: the label is a number to be predicted.
        classes: how many classes there are, 0 to classes - 1; None: those that the training part has, of any
            name, in sorted order.
        measures: what is reported, by the names in `metrics.MEASURES`; the first decides between learning rates.
        epochs: passes over the training part.
        held_out: the part that is measured.
    """

    name: str
    texts: tuple[str, ...] = ("sentence",)
    label: str = "label"
    regression: bool = False
    classes: int | None = None
    measures: tuple[str, ...] = ("accuracy",)
    epochs: int = 3
    held_out: str = "validation"

    def __post_init__(self):
        if len(self.texts) not in (1, 2):
            raise ValueError(f"task {self.name}: texts names one or two columns; got {self.texts}")


GLUE = {
    task.name: task
    for task in (
        Task(name="cola", classes=2, measures=("matthews", "accuracy"), epochs=10),
        Task(name="sst2", classes=2),
        Task(name="mrpc", texts=("sentence1", "sentence2"), classes=2, measures=("f1", "accuracy"), epochs=10),
        Task(
            name="stsb",
            texts=("sentence1", "sentence2"),
            regression=True,
            measures=("spearman", "pearson"),
            epochs=10,
        ),
        Task(name="qqp", texts=("question1", "question2"), classes=2, measures=("f1", "accuracy")),
        Task(name="mnli", texts=("premise", "hypothesis"), classes=3, held_out="validation_matched"),
        Task(name="qnli", texts=("question", "sentence"), classes=2),
        Task(name="rte", texts=("sentence1", "sentence2"), classes=2, epochs=10),
        Task(name="wnli", texts=("sentence1", "sentence2"), classes=2, epochs=10),
    )
}


def load_task(task: str | Task, source: str | Path = HUB) -> DatasetDict:
    """The training and the held-out part of a task, with the columns `text`, `pair` (of two texts) and `label`.

    Args:
        task: the name of a GLUE task, or a task of your own.
        source: a folder that holds `TASK/train` and `TASK/validation` (or the part that the task names) as
            parquet, csv, tsv or jsonl, or a folder that holds these files itself; or a data set on the hub, GLUE by
            default.

    Returns:
        `train` and `validation`. Labels are 0 to classes - 1, numbers for a regression; the names of
        the classes are in the column's feature.

    Raises:
        ValueError: no such task, part or column; nothing held out; a text that is missing, a class that is unknown or
            outside the range, or a target that is no number, with its row.
        FileNotFoundError: no such folder, and no hub.
    """
    if isinstance(task, str):
        if task not in GLUE:
            raise ValueError(
                f"there is no task {task!r}; there are: {', '.join(GLUE)}, or describe your own table: "
                "Task(name=..., texts=(...), label=...)"
            )
        task = GLUE[task]
    parts = {"train": "train", "validation": task.held_out}
    found = load_parts(task.name, source, parts)
    found = {part: _check_columns(task, part, rows) for part, rows in found.items()}
    names = None if task.regression else _classes(task, found["train"])
    return DatasetDict({part: _labelled(task, part, rows, names) for part, rows in found.items()})


def load_parts(name: str, source: str | Path, parts: dict[str, str]) -> dict[str, Dataset]:
    """The tables of a task as they are, from files or from the hub; what they are called there, by part."""
    if Path(source).exists():
        return _from_files(name, Path(source), parts)
    return _from_hub(name, str(source), parts)


def _from_files(name: str, source: Path, parts: dict[str, str]) -> dict[str, Dataset]:
    folder = source / name if (source / name).is_dir() else source
    found = {}
    for part, stem in parts.items():
        files = sorted(path for path in folder.glob(f"{stem}.*") if path.suffix in READERS)
        if not files:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise ValueError(
                f"task {name} has no {stem} part in {folder}: a file {stem}.parquet, .csv, .tsv or .jsonl is "
                f"looked for, and there is {there}"
            )
        found[part] = _read(files[0])
    return found


def _read(file: Path) -> Dataset:
    try:
        return READERS[file.suffix](file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} could not be read: {error}") from error


def _from_hub(name: str, source: str, parts: dict[str, str]) -> dict[str, Dataset]:
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {source}")
    try:
        if not (Path(HF_DATASETS_CACHE) / source.replace("/", "___")).exists():
            HfApi().dataset_info(source, timeout=5)  # fails at once where there is no network
        every = load_dataset(source, name if source == HUB else None)
    except Exception as error:
        raise FileNotFoundError(
            f"task {name}: {source!r} is no local folder, and the hub could not be asked for a data set of that "
            f"name ({type(error).__name__}). Pass a folder that holds {name}/train.parquet"
        ) from error
    for stem in parts.values():
        if stem not in every:
            raise ValueError(f"task {name} has no {stem} part in {source}; it has: {', '.join(every)}")
    return {part: every[stem] for part, stem in parts.items()}


def _check_columns(task: Task, part: str, rows: Dataset) -> Dataset:
    for column in (*task.texts, task.label):
        if column not in rows.column_names:
            raise ValueError(
                f"task {task.name} ({part}) has no column {column!r}; it has: {', '.join(rows.column_names)}"
            )
    if len(rows) == 0:
        raise ValueError(f"task {task.name}: the {part} part is empty")
    for column in task.texts:
        for row, text in enumerate(rows[column]):
            if not isinstance(text, str):
                raise ValueError(f"task {task.name} ({part}): row {row} has no text in {column!r} but {text!r}")
    return rows


def _classes(task: Task, train: Dataset) -> list:
    if task.classes:
        return list(range(task.classes))
    found = set(train[task.label])
    if None in found:
        raise ValueError(f"task {task.name} (train): row {list(train[task.label]).index(None)} has no label")
    if len(found) < 2:
        raise ValueError(f"task {task.name}: the training part has one class only, {found.pop()!r}")
    if any(isinstance(label, float) for label in found):
        raise ValueError(
            f"task {task.name}: {task.label!r} holds numbers that are no classes: say regression=True, or name "
            "the column of the classes"
        )
    return sorted(found)


def _labelled(task: Task, part: str, rows: Dataset, names: list | None) -> Dataset:
    labels = []
    for row, label in enumerate(rows[task.label]):
        where = f"task {task.name} ({part}): row {row}"
        if names is None:
            if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
                raise ValueError(f"{where} has {label!r} in {task.label!r}, and a regression needs a number")
            labels.append(float(label))
        elif label not in names or isinstance(label, bool) != isinstance(names[0], bool):
            known = f"0 to {task.classes - 1}" if task.classes else f"what the training part has: {_few(names)}"
            raise ValueError(f"{where} has the label {label!r}, which is outside {known}")
        else:
            labels.append(names.index(label))
    columns = dict(zip(("text", "pair"), task.texts, strict=False))
    kind = Value("double")
    if names is not None:
        feature = rows.features[task.label]
        named = isinstance(feature, ClassLabel) and len(feature.names) == len(names)
        kind = ClassLabel(names=feature.names if named else [str(name) for name in names])
    texts = {name: list(rows[column]) for name, column in columns.items()}
    return Dataset.from_dict(
        texts | {"label": labels}, Features(dict.fromkeys(texts, Value("string")) | {"label": kind})
    )


def _few(names: list) -> str:
    return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
