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
from hdlib import DistillConfig

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
