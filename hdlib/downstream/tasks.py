"""Tasks over one or two texts a row: GLUE, tables of one's own, and three probes made of the documentation corpus.

The probes need no download, so downstream quality can be measured on any machine:

- `package`: which of eight packages does a paragraph come from? Paragraphs that name a package are left out.
- `docstring`: are two paragraphs neighbours in one docstring, or from different modules of one package?
- `order`: is the word order of a paragraph intact, or have two of its words been swapped?

Their splits are fixed and those of the corpus: a module is either in training or held out, and no paragraph occurs
twice. Classes are equally frequent.
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import HfApi, constants

from ..text.documentation import gather

HUB = "nyu-mll/glue"
CSV = {"keep_default_na": False, "na_values": [""]}  # an empty field is missing; None and NA are texts
READERS = {
    ".parquet": lambda file: Dataset(pyarrow.parquet.read_table(file)),
    ".csv": partial(pd.read_csv, **CSV),
    ".tsv": partial(pd.read_csv, **CSV, sep="\t", quoting=csv.QUOTE_NONE),  # in GLUE's files quotes are text
    ".jsonl": partial(pd.read_json, lines=True, dtype=False, convert_dates=False),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A table with one or two texts a row, and the label to predict."""

    name: str  # of the task, and of its folder or hub configuration
    texts: tuple[str, ...] = ("sentence",)  # the columns with the texts, one or two
    label: str = "label"  # the column with the class or, for a regression, the number
    regression: bool = False  # whether the label is a number
    classes: int | None = None  # how many, with labels 0 to classes - 1; None: the sorted values of the training part
    measures: tuple[str, ...] = ("accuracy",)  # keys of finetune.MEASURES; the first selects the learning rate
    epochs: int = 3  # passes over the training part
    held_out: str = "validation"  # name of the part that is measured

    def __post_init__(self):
        if len(self.texts) not in (1, 2):
            raise ValueError(f"task {self.name}: texts must name one or two columns; got {self.texts}")


PAIR = ("sentence1", "sentence2")
GLUE = {
    task.name: task
    for task in (
        Task(name="cola", classes=2, measures=("matthews", "accuracy"), epochs=10),
        Task(name="sst2", classes=2),
        Task(name="mrpc", texts=PAIR, classes=2, measures=("f1", "accuracy"), epochs=10),
        Task(name="stsb", texts=PAIR, regression=True, measures=("spearman", "pearson"), epochs=10),
        Task(name="qqp", texts=("question1", "question2"), classes=2, measures=("f1", "accuracy")),
        Task(name="mnli", texts=("premise", "hypothesis"), classes=3, held_out="validation_matched"),
        Task(name="qnli", texts=("question", "sentence"), classes=2),
        Task(name="rte", texts=PAIR, classes=2, epochs=10),
        Task(name="wnli", texts=PAIR, classes=2, epochs=10),
    )
}

# ------------------------------------------------------------------------------------------------------- reading


def load_task(task: str | Task, source: str | Path = HUB) -> DatasetDict:
    """Read the training and the held-out part of a task, with the columns `text`, `pair` (of two texts) and `label`.

    Args:
        task: the name of a GLUE task, or a `Task`.
        source: a folder that holds `TASK/train` and `TASK/validation` (or the part that the task names) as parquet,
            csv, tsv or jsonl; a folder that holds these files itself; or a data set on the hub.

    Returns:
        `train` and `validation`. Labels are 0 to classes - 1, or numbers for a regression; the column's feature holds
        the names of the classes.

    Raises:
        ValueError: an unknown task; a missing part or column; an empty part; a missing text, an unknown class or a
            target that is not a finite number, with its row.
        FileNotFoundError: the folder does not exist, or the hub cannot be reached.
    """
    if isinstance(task, str):
        if task not in GLUE:
            raise ValueError(
                f"unknown task {task!r}: use one of {', '.join(GLUE)}, or describe a table with "
                "Task(name=..., texts=(...), label=...)"
            )
        task = GLUE[task]
    parts = {"train": "train", "validation": task.held_out}
    found = load_parts(task.name, source, parts, (*task.texts, task.label))
    classes = None if task.regression else _classes(task, found["train"])
    return DatasetDict({part: labelled(task, part, rows, classes) for part, rows in found.items()})


def load_parts(name: str, source: str | Path, parts: dict[str, str], columns: tuple[str, ...]) -> dict[str, Dataset]:
    """Read a task's tables from files or the hub; `parts` maps each part to its name there.

    Raises the errors of `load_task` for a part, a column of `columns` or a value that is missing.
    """
    folder = Path(source).expanduser()
    found = _from_files(name, folder, parts) if folder.exists() else _from_hub(name, str(source), parts)
    for part, rows in found.items():
        if len(rows) == 0:
            raise ValueError(f"task {name}: the {part} part is empty. Add rows to it")
        for column in columns:
            where = f"task {name} ({part})"
            if column not in rows.column_names:
                raise ValueError(f"{where} has no column {column!r}; its columns are {', '.join(rows.column_names)}")
            if None in (values := list(rows[column])):
                raise ValueError(f"{where}: row {values.index(None)} has no value in column {column!r}. Remove the row")
    return found


def _from_files(name: str, source: Path, parts: dict[str, str]) -> dict[str, Dataset]:
    folder = source / name if (source / name).is_dir() else source
    found = {}
    for part, stem in parts.items():
        files = sorted(path for path in folder.glob(f"{stem}.*") if path.suffix in READERS)
        if not files:
            others = ", ".join(sorted(path.name for path in folder.iterdir())) or "no file"
            raise ValueError(
                f"task {name}: {folder} holds {others}, but no {stem} part. Add {stem}.parquet, .csv, .tsv or .jsonl"
            )
        try:
            table = READERS[files[0].suffix](files[0])
            found[part] = table if isinstance(table, Dataset) else Dataset.from_pandas(table, preserve_index=False)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{files[0]} cannot be read: {error}") from error
    return found


def _from_hub(name: str, source: str, parts: dict[str, str]) -> dict[str, Dataset]:
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"the folder {source} does not exist")
    try:
        if not (Path(HF_DATASETS_CACHE) / source.replace("/", "___")).exists():
            timeout = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
            HfApi().dataset_info(source, timeout=timeout)  # without a network, load_dataset would retry for minutes
        found = load_dataset(source, name if source == HUB else None)
    except Exception as error:
        raise FileNotFoundError(
            f"task {name}: {source!r} is not a local folder, and no data set of that name could be loaded from the "
            f"hub ({type(error).__name__}). Pass a folder that holds {name}/train.parquet"
        ) from error
    if missing := [stem for stem in parts.values() if stem not in found]:
        raise ValueError(f"task {name} has no {missing[0]} part in {source}; its parts are {', '.join(found)}")
    return {part: found[stem] for part, stem in parts.items()}


def _classes(task: Task, train: Dataset) -> list:
    if task.classes:
        return list(range(task.classes))
    classes = sorted(set(train[task.label]))
    if len(classes) < 2:
        raise ValueError(f"task {task.name}: the training part has one class only, {classes[0]!r}")
    if isinstance(classes[0], float):
        raise ValueError(
            f"task {task.name}: column {task.label!r} holds fractional numbers such as {classes[0]}, not classes. "
            "Set regression=True, or name the column of the classes"
        )
    return classes


def labelled(task: Task, part: str, rows: Dataset, classes: list | None) -> Dataset:
    """The columns `text`, `pair` and `label`, checked."""
    for column in task.texts:
        if (kind := rows.features[column]) not in (Value("string"), Value("large_string")):
            raise ValueError(f"task {task.name} ({part}): column {column!r} must hold texts; it holds {kind}")
    texts, labels = [list(rows[column]) for column in task.texts], list(rows[task.label])
    for row, label in enumerate(labels):
        where = f"task {task.name} ({part}): row {row} has {label!r} in column {task.label!r}"
        if classes is None and (isinstance(label, str) or not math.isfinite(label)):
            raise ValueError(f"{where}, but a regression needs finite numbers")
        if classes is not None and label not in classes:
            known = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
            raise ValueError(f"{where}, which is not one of the classes {known}")
    if classes is None:
        return _table(texts, labels, Value("double"))
    feature = rows.features[task.label]
    named = isinstance(feature, ClassLabel) and len(feature.names) == len(classes)
    names = feature.names if named else [str(label) for label in classes]
    return _table(texts, [classes.index(label) for label in labels], ClassLabel(names=names))


def _table(texts: list[list[str]], labels: list, kind: Value | ClassLabel) -> Dataset:
    columns = dict(zip(("text", "pair"), texts, strict=False))
    features = Features(dict.fromkeys(columns, Value("string")) | {"label": kind})
    return Dataset.from_dict(columns | {"label": labels}, features)


# -------------------------------------------------------------------------------------------------------- probes

PROBES = {
    "package": Task(name="package", measures=("accuracy", "macro_f1")),
    "docstring": Task(name="docstring"),
    "order": Task(name="order"),
}
PROBE_ROWS = {"train": 4000, "validation": 800}  # at most
PACKAGES = 8
WORDS = 60  # of a paragraph, from its beginning: two paragraphs fit into 128 positions


def load_probe(name: str, folder: str | Path | None = None) -> tuple[Task, DatasetDict]:
    """Return a probe and its rows, in the form of `load_task`.

    Args:
        name: package, docstring or order.
        folder: of the gathered documentation; None: gathered at first use, as for `hdlib.load_corpus`.

    Raises:
        ValueError: an unknown probe.
    """
    if name not in PROBES:
        raise ValueError(f"unknown probe {name!r}: use one of {', '.join(PROBES)}")
    folder = Path(folder or gather()).expanduser()
    documents = {part: pd.read_parquet(folder / f"{part}.parquet").to_dict("records") for part in PROBE_ROWS}
    if name == "package":
        # Chosen by the held-out part, the smaller one, so that each class has enough rows there.
        counts = Counter(each["package"] for each in documents["validation"] for _ in _anonymous(each))
        classes = sorted(package for package, _ in counts.most_common(PACKAGES))
        by_class = {part: _package(found, classes) for part, found in documents.items()}
    elif name == "docstring":
        classes = ["apart", "together"]
        by_class = {part: _docstring(found, part) for part, found in documents.items()}
    else:
        classes = ["swapped", "intact"]
        by_class = {part: _order(found, part) for part, found in documents.items()}
    return PROBES[name], DatasetDict({part: _balanced(rows, part, classes) for part, rows in by_class.items()})


def _package(documents: list[dict], classes: list[str]) -> list[list[tuple[str]]]:
    """Paragraphs of each package in `classes`."""
    return [[(text,) for each in documents if each["package"] == name for text in _anonymous(each)] for name in classes]


def _anonymous(document: dict) -> list[str]:
    """The paragraphs that do not contain the package's name or a part of it."""
    name = document["package"].lower()
    names = {name, *re.split(r"[-_.]", name)} - {"python"} | {document["source"].split(".")[0].lower()}
    return [text for text in _paragraphs(document) if names.isdisjoint(re.findall(r"[a-z]+", text.lower()))]


def _docstring(documents: list[dict], part: str) -> list[list[tuple[str, str]]]:
    """Pairs of paragraphs that are not neighbours, and pairs that are; each paragraph is in one pair only."""
    pairs = [(document, *pair) for document in documents for pair in list(pairwise(_paragraphs(document)))[::2]]
    random.Random(f"docstring {part}").shuffle(pairs)
    half = min(PROBE_ROWS[part], len(pairs)) // 2
    return [_strangers(pairs[half:]), [(first, second) for _, first, second in pairs[:half]]]


def _strangers(pairs: list[tuple[dict, str, str]]) -> list[tuple[str, str]]:
    """Exchange the second paragraphs of two pairs from the same package and different modules."""
    waiting: dict[str, tuple[dict, str, str]] = {}
    exchanged = []
    for document, first, second in pairs:
        package = document["package"]
        if package not in waiting:
            waiting[package] = document, first, second
        elif waiting[package][0]["source"] != document["source"]:
            _, other_first, other_second = waiting.pop(package)
            exchanged += [(other_first, second), (first, other_second)]
    return exchanged


def _order(documents: list[dict], part: str) -> list[list[tuple[str]]]:
    """Paragraphs with two words swapped, and others as they are."""
    draw = random.Random(f"order {part}")
    paragraphs = [text for document in documents for text in _paragraphs(document)]
    draw.shuffle(paragraphs)
    half = min(PROBE_ROWS[part], len(paragraphs)) // 2
    return [[(_swap(text, draw),) for text in paragraphs[half : 2 * half]], [(text,) for text in paragraphs[:half]]]


def _swap(text: str, draw: random.Random) -> str:
    """Swap two different words; not the first or last, whose capital or full stop would reveal it."""
    words = text.split()
    pairs = combinations(range(1, len(words) - 1), 2)
    i, j = draw.choice([(i, j) for i, j in pairs if words[i].lower() != words[j].lower()])
    words[i], words[j] = words[j], words[i]
    return " ".join(words)


def _paragraphs(document: dict) -> list[str]:
    """The paragraphs of at least 12 words, cut to their first words."""
    found = (paragraph.split() for paragraph in document["text"].split("\n\n"))
    return [" ".join(words[:WORDS]) for words in found if len(words) >= 12]


def _balanced(by_class: list[list[tuple[str, ...]]], part: str, classes: list[str]) -> Dataset:
    """Draw equally many rows of each class, in a fixed random order."""
    each = min(PROBE_ROWS[part] // len(classes), *map(len, by_class))
    draw = random.Random(0)
    rows = [(*texts, label) for label, found in enumerate(by_class) for texts in draw.sample(found, each)]
    draw.shuffle(rows)
    *texts, labels = map(list, zip(*rows, strict=True))
    return _table(texts, labels, ClassLabel(names=classes))
