"""Three small tasks made of the documentation corpus, so that downstream quality can be followed anywhere.

- `package`: which of eight packages does a paragraph come from? Paragraphs that name a package are left out.
- `docstring`: are two paragraphs neighbours in one docstring, or do they come from different modules of one package?
- `order`: is the word order of a paragraph intact, or have two of its words changed places?

The splits are fixed and those of the corpus: a module is in training or held out, whole, and no paragraph is said
twice. Within a probe classes are equally frequent and a paragraph is used once, so no answer can be remembered.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from ..documentation import gather
from .tasks import Task

ROWS = {"train": 4000, "validation": 800}  # at most
PACKAGES = 8
WORDS = 60  # of a paragraph, from its beginning: what a model of 128 positions can read twice

PROBES = {
    "package": Task(name="package", measures=("accuracy", "macro_f1"), epochs=3),
    "docstring": Task(name="docstring", measures=("accuracy",), epochs=3),
    "order": Task(name="order", measures=("accuracy",), epochs=3),
}


def load_probe(name: str, folder: str | Path | None = None) -> tuple[Task, DatasetDict]:
    """A probe and its rows, as `load_task` gives them.

    Args:
        name: package, docstring or order.
        folder: of the gathered documentation; None: gathered at first use, as for `hdlib.load_corpus`.

    Raises:
        ValueError: there is no such probe.
    """
    if name not in PROBES:
        raise ValueError(f"there is no probe {name!r}; there are: {', '.join(PROBES)}")
    folder = Path(folder or gather())
    documents = {
        part: load_dataset("parquet", data_files=str(folder / f"{part}.parquet"), split="train") for part in ROWS
    }
    rows, classes = MAKERS[name]({part: list(found) for part, found in documents.items()})
    made = {}
    for part, found in rows.items():
        columns = {column: [row[column] for row in found] for column in found[0]}
        kinds = Features({column: Value("string") for column in columns} | {"label": ClassLabel(names=classes)})
        made[part] = Dataset.from_dict(columns, kinds)
    return PROBES[name], DatasetDict(made)


def _package(documents: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], list[str]]:
    told = {part: [row for document in found for row in _anonymous(document)] for part, found in documents.items()}
    # The least of both parts decides, so that the held-out part has enough of every class.
    frequent = Counter(row["label"] for row in told["validation"]).most_common(PACKAGES)
    classes = sorted(name for name, _ in frequent)
    rows = {}
    for part, found in told.items():
        by_class = [[row for row in found if row["label"] == name] for name in classes]
        rows[part] = _balanced(by_class, ROWS[part])
        for row in rows[part]:
            row["label"] = classes.index(row["label"])
    return rows, classes


def _anonymous(document: dict) -> list[dict]:
    name = document["package"].lower()
    names = {name, *re.split(r"[-_.]", name)} - {"python"} | {document["source"].split(".")[0].lower()}
    return [
        {"text": paragraph, "label": document["package"]}
        for paragraph in _paragraphs(document)
        if names.isdisjoint(re.findall(r"[a-z]+", paragraph.lower()))
    ]


def _docstring(documents: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], list[str]]:
    rows = {}
    for part, found in documents.items():
        draw = random.Random(f"docstring {part}")
        pairs = [(document, *pair) for document in found for pair in _apart(_paragraphs(document))]
        draw.shuffle(pairs)
        half = min(ROWS[part], len(pairs)) // 2
        together = [{"text": first, "pair": second, "label": 1} for _, first, second in pairs[:half]]
        rows[part] = _balanced([_strangers(pairs[half:]), together], ROWS[part])
    return rows, ["apart", "together"]


def _apart(paragraphs: list[str]) -> list[tuple[str, str]]:
    """Neighbours, each paragraph in one pair only."""
    return list(pairwise(paragraphs))[::2]


def _strangers(pairs: list[tuple[dict, str, str]]) -> list[dict]:
    """Two pairs of one package and two modules change partners."""
    waiting: dict[str, tuple[dict, str, str]] = {}
    made = []
    for pair in pairs:
        package = pair[0]["package"]
        other = waiting.get(package)
        if other is None:
            waiting[package] = pair
        elif other[0]["source"] != pair[0]["source"]:
            made.append({"text": other[1], "pair": pair[2], "label": 0})
            made.append({"text": pair[1], "pair": other[2], "label": 0})
            del waiting[package]
    return made


def _order(documents: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], list[str]]:
    rows = {}
    for part, found in documents.items():
        draw = random.Random(f"order {part}")
        paragraphs = [text for document in found for text in _paragraphs(document)]
        draw.shuffle(paragraphs)
        half = min(ROWS[part], len(paragraphs)) // 2
        intact = [{"text": text, "label": 1} for text in paragraphs[:half]]
        swapped = [{"text": _swap(text, draw), "label": 0} for text in paragraphs[half : 2 * half]]
        rows[part] = _balanced([swapped, intact], ROWS[part])
    return rows, ["swapped", "intact"]


def _swap(text: str, draw: random.Random) -> str:
    """Two different words change places; first and last stay, so that capitals and full stops tell nothing."""
    words = text.split()
    inner = range(1, len(words) - 1)
    places = [(i, j) for i in inner for j in inner if i < j and words[i].lower() != words[j].lower()]
    i, j = draw.choice(places)
    words[i], words[j] = words[j], words[i]
    return " ".join(words)


MAKERS: dict[str, Callable] = {"package": _package, "docstring": _docstring, "order": _order}


def _paragraphs(document: dict) -> list[str]:
    """The paragraphs that are long enough to be told apart, cut to their first words."""
    found = (paragraph.split() for paragraph in document["text"].split("\n\n"))
    return [" ".join(words[:WORDS]) for words in found if len(words) >= 12]


def _balanced(by_class: list[list[dict]], rows: int) -> list[dict]:
    """As many rows of each class, drawn and mixed in an order that is always the same."""
    each = min(rows // len(by_class), *map(len, by_class))
    draw = random.Random(0)
    chosen = [row for found in by_class for row in draw.sample(found, each)]
    draw.shuffle(chosen)
    return chosen
