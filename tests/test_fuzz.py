"""Any configuration and any corpus gives a run or one paragraph that names the error. No traceback, no hang."""

import bz2
import gzip
import json
import lzma
import math
import os
import random
import re
import signal
import sys
import warnings
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
import yaml
import zstandard

import hdlib
import hdlib.__main__ as command
from hdlib import DistillConfig
from hdlib.text.corpus import load_documents

from models import random_model

CONFIGS = int(os.environ.get("HDLIB_FUZZ", "24"))  # HDLIB_FUZZ=1000 takes 15 minutes
SECONDS = 600  # more is a hang; a valid configuration takes less than one second

SMALL = {"steps": 4, "batch_size": 4, "length": 16, "prune_every": 1, "eval_blocks": 2, "eval_every": 4, "target": 0.5}
GOOD = {
    "steps": [2, 4, 6],
    "batch_size": [1, 2, 4, 8],
    "micro_batch_size": [0, 1, 3],
    "target": [0.3, 0.5, 1.0, 1, {"hidden": 12, "ffn": 20}, {"hidden": 12, "ffn": 20, "heads": 2}, {"ffn": 8}],
    "multiple_of": [1, 2, 4],
    "initial": ["teacher", "random"],
    "schedule": ["cubic", "linear", "one_shot"],
    "prune_start": [0.0, 0.2],
    "prune_end": [0.6, 1.0, 1],
    "prune_every": [1, 2, 7],
    "scorer": ["sensitivity", "platon", "magnitude", "movement", "random", "reconstruction"],
    "smoothing": [0.0, 0.5, 0.99],
    "masked": [True, False],
    "recover": [True, False],
    "scope": ["local", "global"],
    "rotate": [True, False],
    "compensate": [True, False],
    **{name: [0.0, 0.5, 1, 1e3] for name in ("mlm", "prediction", "hidden", "attention", "embedding")},
    "temperature": [0.5, 2.0],
    "attention_target": ["scores", "probs"],
    "positions": ["masked", "all"],
    "learning_rate": [1e-5, 1e-3],
    "warmup": [0.0, 0.5, 1.0],
    "weight_decay": [0.0, 0.1],
    "betas": [[0.9, 0.999], [0.0, 0.5]],
    "eps": [1e-8, 1e-3],
    "max_grad_norm": [1e-3, 10],
    "mask_probability": [0.05, 0.5],
    "precision": ["auto", "float32", "bfloat16"],
    "seed": [0, 7],
    "eval_every": [1, 5],
    "eval_blocks": [1, 1000],
    "eval_prunes": [True, False],
    "checkpoint_every": [1, 100],
    "keep_last": [1, 5],
    "length": [8, 16, 32],
    "text_column": ["text"],
    "subset": [None],
    "causal": [None, False],
    "streaming": [False],
    "prompt": [None],
    "similarity": [0.0],
}
BAD = [None, "3e-4", "", "no such thing", -1, -0.5, 0, 1.5, 2**70, math.nan, math.inf, -math.inf, True, [], [1], {}]
BAD += [{"hidden": "x"}, [[0]], "\u0000", "ÿ" * 300, [None, None], 10**400, "../../etc/passwd", "!!python/object"]


@pytest.fixture(scope="module")
def places(tokenizer, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    random_model("bert", vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"teacher": str(folder), "corpus": str(text_file)}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the command with this text as its file; returns the error message, or None after a run."""

    def hung(*_):
        raise AssertionError(f"not finished after {SECONDS} seconds")

    def run(text: str) -> str | None:
        (tmp_path / "config.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["hdlib", str(tmp_path / "config.yaml")])
        monkeypatch.chdir(tmp_path)
        before = signal.signal(signal.SIGALRM, hung)
        signal.alarm(SECONDS)
        try:
            command.main()
        except SystemExit as refusal:
            return str(refusal.code)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return None

    return run


def is_one_paragraph(message: str) -> None:
    assert message.strip() and "\n\n" not in message and "Traceback" not in message and len(message) < 1500, message


def test_every_argument_is_tried():
    assert set(GOOD) == {field.name for field in fields(DistillConfig)} | set(command.PLACES) - {
        "teacher",
        "corpus",
        "run_dir",
    }


@pytest.mark.parametrize("seed", range(CONFIGS))
def test_any_configuration_is_a_run_or_a_paragraph(seed, places, start, tmp_path):
    draw = random.Random(seed)
    values = SMALL | places | {"run_dir": str(tmp_path / "run")}
    values |= {name: draw.choice(GOOD[name]) for name in draw.sample(sorted(GOOD), draw.randint(0, 8))}
    broken = draw.sample([*sorted(GOOD), "teacher", "corpus"], draw.choice([0, 1, 1, 2]))
    values |= {name: draw.choice(BAD) for name in broken}
    message = start(yaml.safe_dump(values, allow_unicode=True))
    if message is None:
        assert (tmp_path / "run" / "student" / "model.safetensors").exists() or values.get("scope") == "global"
        return
    is_one_paragraph(message)
    if len(broken) == 1 and not isinstance(values[broken[0]], dict):
        names = {
            "teacher": "teacher|model|folder|hub",
            "corpus": "corpus|file|folder|hub",
            "causal": "causal|next token",
        }
        named = names.get(broken[0], broken[0].split("_")[0])
        assert any(word in message for word in named.split("|")), (broken, values[broken[0]], message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "just text",
        "steps: [",
        "3: 4\nrun_dir: r",
        "steps: 4\nsteps: 5",
        "!!python/object:os.system {}",
        "\t",
        "a: &a [*a]",
    ],
)
def test_a_file_that_holds_no_configuration(text, start):
    message = start(text)
    is_one_paragraph(message)
    assert "config.yaml" in message


# --- the corpus

FOLDERS = {"": "train", "train": "train", "more/deep": "train", "test": "validation", "a/Dev": "validation"}
FOLDERS |= {".git": None, "__MACOSX": None, "x/.cache/y": None}  # None: not read
ODD = [
    "a",
    "b c",
    "[ab]",
    "a*",
    "a?",
    "::",
    "gzip::a",
    "#a",
    "50%",
    "-n",
    "ñ文",
    "a,b",
    "~",
    "{a}",
    "'",
    "a\n",
    "\udcff",
    "$HOME",
]
ENDS = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
DECOY = "decoy"
NO_TEXT = [5, 0.5, True, ["a", "b"], {"x": "y"}, "\ud800"]


def write(path, kind, texts, column, draw, wrong=None) -> None:
    """A file with these documents in a random form of its kind; `wrong`, no text, is in the last row."""
    rows = [{"n": draw.choice([1, 2])} | nested(column, text) for text in texts] + [nested(column, None)]
    rows += [] if wrong is None else [nested(column, wrong)]
    if kind == "parquet":
        with path.open("wb") as file:
            pd.DataFrame(rows).to_parquet(file)
        return
    line_end = draw.choice(["\n", "\r\n", "\r"])
    if kind == "txt":
        blank = line_end * 2 + draw.choice(["", " \t" + line_end, "\f" + line_end * 3])
        written = (line_end if draw.random() < 0.2 and len(texts) > 1 else blank).join(texts) + line_end * draw.choice(
            [0, 1, 3]
        )
    elif draw.random() < 0.2:
        written = json.dumps(rows, indent=draw.choice([None, 1]))
    else:
        written = draw.choice([line_end, line_end * 2]).join(
            json.dumps(row, ensure_ascii=draw.random() < 0.5 or bool(wrong)) for row in rows
        )
    path.write_bytes(
        ENDS[path.suffix if path.suffix in ENDS else ""](written.encode(draw.choice(["utf-8", "utf-8-sig"])))
    )


def nested(column, value) -> dict:
    outer, _, inner = column.partition(".")
    return {outer: {inner: value} if inner else value}


def break_one(files, column, draw) -> tuple[Path, str]:
    """Damages one of the files; returns it and a pattern of the error."""
    file, damage = draw.choice(files), draw.choice(["empty", "latin", "cut", "column", "value", "gone", "json"])
    kind = file.name.split(".")[-2 if file.suffix in ENDS else -1]
    if damage == "value" and kind != "txt":
        wrong = draw.choice(NO_TEXT[:-1] if kind == "parquet" else NO_TEXT)
        write(file, kind, [] if kind == "parquet" else ["some words"], column, draw, wrong)
        return file, "row [12345], column"
    if damage == "column" and kind != "txt":
        write(file, kind, ["some words"], "body", draw)
        return file, "has no column.*'body'"
    if damage == "cut" and len(file.read_bytes()) > 40 and (file.suffix in ENDS or kind == "parquet"):
        file.write_bytes(file.read_bytes()[:-15])
        return file, "cannot be read to its end|could not be read as parquet"
    if damage == "json" and kind.startswith("json"):
        file.write_bytes(ENDS[file.suffix if file.suffix in ENDS else ""](b'{"n": 1}\n{"n": \n'))
        return file, "could not be read as json: line 2"
    if damage == "latin" and kind != "parquet":
        file.write_bytes(
            ENDS[file.suffix if file.suffix in ENDS else ""]("é".encode(draw.choice(["latin-1", "utf-16"])) * 9)
        )
        return file, "is not UTF-8 text: byte 0"
    if damage == "gone":
        file.unlink()
        file.symlink_to(file.parent / "nowhere")
        return file, "no file or folder"
    file.write_bytes(b"")
    return file, "is empty"


@pytest.mark.parametrize("seed", range(max(12, CONFIGS // 2)))
def test_any_folder_is_blocks_or_a_paragraph(seed, letters, tmp_path):
    draw = random.Random(seed)
    root = tmp_path / "test" / draw.choice(ODD)
    kind, column = draw.choice(["txt", "jsonl", "json", "parquet"]), draw.choice(["text", "text", "a.b", "ñ"])
    column = "text" if kind == "txt" else column
    expected, files = {"train": [], "validation": []}, []
    names = draw.sample(ODD, draw.randint(1, 5))
    for number, name in enumerate(names):
        folder = draw.choice(list(FOLDERS))
        end = "" if kind == "parquet" else draw.choice(["", "", *ENDS])
        file = root / folder / f"{name}.{kind}{end}"
        file.parent.mkdir(parents=True, exist_ok=True)
        shown = FOLDERS[folder] is not None
        texts = [
            f"{'asked' if shown else DECOY} {seed} {number} {i} " + "words " * draw.randint(1, 30) + "end"
            for i in range(draw.randint(1, 40))
        ]
        write(file, kind, texts, column, draw)
        if shown:
            files.append(file)
            expected[FOLDERS[folder]] += texts
    for name in ("a", "b", "aa", "ab", "n"):  # what a pattern would find
        (tmp_path / "test" / f"{name}.{kind}").write_text(DECOY)
    (root / "notes.md").write_text(DECOY)
    if not expected["train"]:
        expected = {"train": expected["validation"], "validation": []}
    file, pattern = break_one(files, column, draw) if files and draw.random() < 0.5 else (None, None)
    source = draw.choice([root, str(root), [root], [*files, root] if expected["validation"] else files or root])
    streaming = draw.random() < 0.2
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(action="ignore"):
            found = load_documents(source, column, streaming=streaming)
            found = {split: [row[column] for row in part] for split, part in found.items()}
            blocks = hdlib.load_corpus(source, letters, 16, text_column=column)
    except (ValueError, FileNotFoundError) as error:
        is_one_paragraph(str(error).encode(errors="replace").decode().replace("\n", " "))
        assert file or not files or not expected["train"] or len(" ".join(expected["train"])) < 200, error
        if file:
            assert re.search(pattern, str(error)) and str(file) in str(error), (pattern, error)
        return
    finally:
        signal.alarm(0)
    assert file is None, (file, pattern)
    assert {split: sorted(texts) for split, texts in found.items()} == {
        split: sorted(texts) for split, texts in expected.items() if texts
    }
    text = letters.decode([*chain(*(block[1:-1] for block in blocks[0]["input_ids"]))])
    assert DECOY not in text and "words" in text
