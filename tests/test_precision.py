"""Which precision a run takes when it is left to the machine, and that a run stays with it."""

import time

import pytest
import torch

import hdlib
from hdlib import DistillConfig, precision

from conftest import random_batch
from models import KINDS, random_model
from test_loop import ARGUMENTS

AUTO = ARGUMENTS | {"precision": "auto", "steps": 6}


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bfloat16"), (1.1, "float32"), (0.1, "float32")])
def test_the_faster_one_is_taken_where_it_is_left_to_the_machine(gain, expected, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda device: gain)
    assert precision.chosen("auto", torch.device("cpu")) == expected
    assert precision.chosen("bfloat16", torch.device("cpu")) == "bfloat16"
    assert precision.chosen("float32", torch.device("cpu")) == "float32"


def test_the_gain_is_that_of_a_linear_layer(monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda states, weight: time.sleep(0.02 if states.dtype == torch.float32 else 0.005),
    )
    precision.bfloat16_gain.cache_clear()
    assert 3 < precision.bfloat16_gain(torch.device("cpu")) < 5
    precision.bfloat16_gain.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_was_cast_once_says_the_same(kind):
    """To the last bit what autocast makes of it, embeddings tied to the head in float32 as before."""
    model = random_model(kind).eval().requires_grad_(False)
    input_ids, _ = random_batch()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    cast = precision.cast_once(model, "bfloat16")
    with torch.no_grad(), precision.autocast("bfloat16", model.device):
        assert torch.equal(cast(input_ids).logits, model(input_ids).logits)
    assert any(parameter.dtype == torch.bfloat16 for parameter in cast.parameters())
    assert cast.get_input_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    assert precision.cast_once(model, "float32") is model


def test_a_run_says_what_it_took_and_stays_with_it(teacher, tokenizer, blocks, tmp_path, monkeypatch, capsys):
    """Started where bfloat16 is fast and resumed where it is not: the run does not change under way."""

    def interrupted(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    def started_with(gain, folder):
        for module in (precision, hdlib.loop):
            monkeypatch.setattr(module, "bfloat16_gain", lambda device: gain)
        with pytest.raises(KeyboardInterrupt):
            hdlib.distill(
                teacher,
                tokenizer,
                *blocks,
                DistillConfig(**AUTO | {"checkpoint_every": 3}),
                folder,
                on_step=interrupted,
            )

    started_with(3.0, tmp_path / "fast")
    said = capsys.readouterr()
    assert "fast: bfloat16 on cpu" in said.out + said.err and "3.0 times as fast" in said.out + said.err
    started_with(0.5, tmp_path / "slow")
    assert hdlib.Run.load(tmp_path / "fast").arguments["precision"] == "bfloat16"
    assert hdlib.Run.load(tmp_path / "slow").arguments["precision"] == "float32"
    config = DistillConfig(**AUTO | {"checkpoint_every": 3})
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "fast", resume=True)
    whole = DistillConfig(**AUTO | {"checkpoint_every": 3, "precision": "bfloat16"})
    whole = hdlib.distill(teacher, tokenizer, *blocks, whole, tmp_path / "whole")
    assert resumed.records()[-1]["total"] == whole.records()[-1]["total"]
    assert hdlib.Run.load(tmp_path / "slow").records()[-1]["total"] != resumed.records()[-2]["total"]
