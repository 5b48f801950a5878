"""The command's file: what YAML reads otherwise than written is refused with a hint, and paths are expanded."""

import sys

import pytest
import yaml

import hdlib.__main__ as command
from hdlib import Run

from models import random_model

SMALL = {"steps": 2, "batch_size": 4, "length": 16, "eval_blocks": 2, "target": 1.0}


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
    (tmp_path / "config.yaml").write_text("run_dir: run\nsteps: 1_000\neps: 2.0e-3\nrotate: no\nseed: 0\nwarmup: 0.5\n")
    _, config = command.read(tmp_path / "config.yaml")
    assert (config.steps, config.eps, config.rotate, config.seed, config.warmup) == (1000, 2e-3, False, 0, 0.5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_paths_are_below_the_home_folder_and_the_family_decides_what_is_predicted(
    family, tokenizer, text_file, tmp_path, monkeypatch
):
    """A Gemma has a mask token in its tokenizer, and predicts the next token."""
    assert tokenizer.mask_token_id is not None
    random_model(family, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "corpus.txt").symlink_to(text_file)
    paths = {"teacher": "~/teacher", "corpus": ["~/corpus.txt"], "run_dir": "~/run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALL | paths))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["hdlib", str(tmp_path / "config.yaml")])
    command.main()
    run = Run("~/run")
    assert run.finished and Run.load("~/run").folder == tmp_path / "run" and run.student()
