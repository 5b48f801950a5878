"""Any configuration gives a run or one paragraph that names the error. No traceback, no hang."""

import math
import os
import random
import signal
import sys
from dataclasses import fields

import pytest
import yaml

import hdlib.__main__ as command
from hdlib import DistillConfig, Run

from models import random_model

CONFIGS = int(os.environ.get("HDLIB_FUZZ", "24"))  # HDLIB_FUZZ=1000 takes 15 minutes
SECONDS = 60  # more is a hang; a valid configuration takes less than one second

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
    "scorer": ["sensitivity", "platon", "magnitude", "movement", "random"],
    "smoothing": [0.0, 0.5, 0.99],
    "masked": [True, False],
    "recover": [True, False],
    "scope": ["local", "global"],
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


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "learning_rate: 2e-3",
            "learning_rate must be of type float; got '2e-3', which YAML reads as a text: write 2.0e-3",
        ),
        ("eps: 1E6", r"eps must be of type float.*: write 1.0e\+6"),
        ("target: 3e-1", r"target is a fraction.*: write 3.0e-1"),
        ("steps: 1e3", "steps must be of type int; got '1e3': write 1000"),
        ("steps: 1.0e+3", "steps must be of type int; got 1000.0: write 1000"),
        ("steps: 1000.5", "steps must be of type int; got 1000.5"),
        ("length: 1e2", "length must be of type int; got '1e2': write 100"),
        ("masked: 'yes'", "masked must be of type bool; got 'yes': write true or false"),
        ("scorer: no", "scorer must be of type str; got False: put it in quotes"),
        (
            "text_column: 2026-01-01",
            r"text_column must be of type str; got datetime.date\(2026, 1, 1\): put it in quotes",
        ),
        ("teacher: ~", "teacher must be of type str; got None"),
        ("steps: 010", "010 is read as 8: write it as a decimal number"),
        ("batch_size: 0x10", "0x10 is read as 16"),
        ("steps: 1:30", "1:30 is read as 90"),
        ("eps: 1:30.5", "1:30.5 is read as 90.5"),
        ("steps: 4\nsteps: 5", "the file sets steps several times: keep one"),
        ("target: {hidden: 12, hidden: 16}", "the file sets hidden several times: keep one"),
        ("target: {hidden: 014}", "014 is read as 12"),
        ("3: 010", "010 is read as 8"),
    ],
)
def test_what_yaml_reads_otherwise_than_written(line, words, tmp_path):
    (tmp_path / "config.yaml").write_text(f"run_dir: run\n{line}\n")
    with pytest.raises(ValueError, match=words):
        command.read(tmp_path / "config.yaml")


def test_what_yaml_reads_as_written(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "run_dir: run\nsteps: 1_000\neps: 2.0e-3\nmasked: yes\nseed: 0\nwarmup: 0.5\n"
    )
    _, config = command.read(tmp_path / "config.yaml")
    assert (config.steps, config.eps, config.masked, config.seed, config.warmup) == (1000, 2e-3, True, 0, 0.5)


def test_paths_of_the_file_are_below_the_home_folder(places, start, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, path in places.items():
        (tmp_path / name).symlink_to(path)
    (tmp_path / "corpus").rename(tmp_path / "corpus.txt")
    paths = {"teacher": "~/teacher", "corpus": ["~/corpus.txt"], "run_dir": "~/run"}
    assert start(yaml.safe_dump(SMALL | paths)) is None
    run = Run("~/run")
    assert run.finished and Run.load("~/run").folder == tmp_path / "run" and run.student()


def test_a_causal_teacher_whose_tokenizer_has_a_mask_token(places, start, tokenizer, tmp_path):
    """As Gemma's: the family decides what is predicted, not the tokenizer."""
    random_model("llama", vocabulary=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert tokenizer.mask_token_id is not None
    values = SMALL | places | {"teacher": str(tmp_path / "teacher"), "run_dir": str(tmp_path / "run"), "target": 1.0}
    assert start(yaml.safe_dump(values)) is None
