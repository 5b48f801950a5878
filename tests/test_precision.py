"""The choice of precision, and the two ways to avoid casts under autocast."""

import time
from contextlib import nullcontext

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import hdlib
from hdlib import DistillConfig, losses, precision
from hdlib.lab.cost import peak_memory
from hdlib.models import forward

from conftest import random_batch
from invariants import loss_for
from models import KINDS, random_model
from test_loop import ARGUMENTS

AUTO = ARGUMENTS | {"precision": "auto", "steps": 6}


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bfloat16"), (1.1, "float32"), (0.1, "float32")])
def test_auto_is_the_faster_precision(gain, expected, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda device: gain)
    assert precision.resolve_precision("auto", torch.device("cpu")) == expected
    assert precision.resolve_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    assert precision.resolve_precision("float32", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_measures_nothing_on_a_gpu(supported, expected, monkeypatch):
    """The product is too small to tell; emulated bfloat16 does not count as supported."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(precision, "bfloat16_gain", pytest.fail)
    assert precision.resolve_precision("auto", torch.device("cuda")) == expected


def test_the_gain_is_measured_on_a_linear_layer(monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda states, weight: time.sleep(0.02 if states.dtype == torch.float32 else 0.005),
    )
    precision.bfloat16_gain.cache_clear()
    assert 3 < precision.bfloat16_gain(torch.device("cpu")) < 5
    precision.bfloat16_gain.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_was_cast_once_has_the_same_outputs(kind):
    """Bit-equal to autocast; embeddings tied to the head stay in float32."""
    model = random_model(kind).eval().requires_grad_(False)
    input_ids, _ = random_batch()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    cast = precision.cast_once(model, "bfloat16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(input_ids).logits, model(input_ids).logits)
    assert any(parameter.dtype == torch.bfloat16 for parameter in cast.parameters())
    assert cast.get_input_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    assert precision.cast_once(model, "float32") is model


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "qwen3"])
def test_recomputed_casts_change_no_gradient_and_are_undone(kind, in_pieces, monkeypatch):
    """Bit-equal to autocast; afterwards the model's layers are the stock ones.

    In pieces the head runs many times and is recomputed in the backward pass. Autocast sums its gradients in bfloat16.
    """
    if in_pieces:
        monkeypatch.setattr(losses, "MAX_LOGITS", 1)
    input_ids, labels = random_batch()
    models = {recomputed: random_model(kind).eval() for recomputed in (False, True)}
    teacher = random_model(kind, seed=1).eval()
    for recomputed, model in models.items():
        loss = loss_for(teacher)
        read = {"input_ids": input_ids, "positions": loss.loss_positions(labels), "in_pieces": True}
        with precision.recompute_casts(model) if recomputed else nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    teacher_outputs = forward(teacher, **read)
                terms = loss(forward(model, **read), teacher_outputs, labels)
            terms.total.backward()
    for (name, one), other in zip(models[True].named_parameters(), models[False].parameters(), strict=True):
        error = (one.grad - other.grad).norm() / other.grad.norm()
        assert error <= (0.01 if in_pieces else 0.0), name
    layers = [module for module in models[True].modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    assert layers and all("forward" not in vars(layer) for layer in layers)


def test_recomputed_casts_do_not_affect_float32():
    model, (input_ids, _) = random_model("bert").eval(), random_batch()
    expected = model(input_ids).logits
    with precision.recompute_casts(model):
        assert torch.equal(model(input_ids).logits, expected)


def test_no_copy_of_a_weight_is_stored_for_the_backward_pass():
    """One copy of sixteen exists at a time; autocast holds all of them after the forward pass."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(16)))
    states = torch.randn(4, 512)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return layers(states).sum()

    peak = {}
    for recomputed in (False, True):
        with precision.recompute_casts(layers) if recomputed else nullcontext():
            peak[recomputed] = peak_memory(forward)
    copies = sum(layer.weight.numel() for layer in layers) * 2
    assert peak[False] >= copies > 4 * peak[True]


def test_a_run_reports_its_precision_and_keeps_it(teacher, tokenizer, blocks, tmp_path, monkeypatch, capsys):
    """Started where bfloat16 is fast and resumed where it is not, a run stays in bfloat16."""

    def interrupted(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    def started_with(gain, folder):
        monkeypatch.setattr(precision, "bfloat16_gain", lambda device: gain)
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
    printed = "".join(capsys.readouterr())
    assert "fast: bfloat16 on cpu" in printed
    started_with(0.5, tmp_path / "slow")
    assert hdlib.Run.load(tmp_path / "fast").arguments["precision"] == "bfloat16"
    assert hdlib.Run.load(tmp_path / "slow").arguments["precision"] == "float32"
    config = DistillConfig(**AUTO | {"checkpoint_every": 3})
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "fast", resume=True)
    whole = DistillConfig(**AUTO | {"checkpoint_every": 3, "precision": "bfloat16"})
    whole = hdlib.distill(teacher, tokenizer, *blocks, whole, tmp_path / "whole")
    assert resumed.records()[-1]["total"] == whole.records()[-1]["total"]
    assert hdlib.Run.load(tmp_path / "slow").records()[-1]["total"] != resumed.records()[-2]["total"]
