"""Tests on the pretend device: no tensors of two devices meet. `test_gpu` runs them in a process of their own."""

from dataclasses import replace
from threading import Event

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hdlib
from experiments.gpu import cases
from hdlib import precision
from hdlib.downstream.finetune import open_with_head
from hdlib.lab import cost
from hdlib.runs import Run

from conftest import ARGUMENTS, full
from models import random_model
from pretend_device import DEVICE, pretend_device  # noqa: F401

PRETENDED = (
    "float32: masked, global",
    "float32: rotated and compensated",
    "float32: discrepancy, bert",
    "float32: narrow with AdamW, fused, llama",
    "bfloat16: grouped heads, llama, narrowed",
)
MORE = (
    "float32: resumed, narrowed, random",
    "float32: fewer layers",
    "bfloat16: masked, neurons return",
    "float32: micro-batches",
    "float32: grouped heads, qwen3, narrowed",
    "float32: narrowed, platon",
    "float32: narrowed, reconstruction",
    "float32: narrowed, sensitivity",
    "float32: narrowed, magnitude",
    "float32: narrowed, movement",
    "float32: masked, neurons return",
    "float32: resumed, masked, neurons return",
    "float32: resumed, fewer layers",
    "bfloat16: narrowed, sensitivity",
    "bfloat16: masked, global",
    "bfloat16: attention probabilities, all positions",
    "bfloat16: grouped heads, llama, masked",
)
DOUBLES = ("float32: discrepancy, bert", "float32: rotated and compensated")  # compute float64 on a device that has it
ONCE = [(name, False) for name in PRETENDED]
ONCE += full(*((name, False) for name in MORE), *((name, True) for name in DOUBLES))


@pytest.mark.parametrize("name, float64", ONCE)
def test_no_tensors_of_two_devices_meet(name, float64, pretend_device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(precision, "NO_FLOAT64", set() if float64 else {"shadow"})
    case = cases.cases(3)[name]
    found = case(DEVICE)
    assert pretend_device.waits or pretend_device.copies, "nothing ran on the device"
    assert bool(pretend_device.doubles) == float64, pretend_device.doubles
    if name.startswith(("float32: discrepancy", "float32: narrow with")):
        assert cases.compared({"value": found}, {"value": case(torch.device("cpu"))}, "float32")["passed"]


def test_the_pretend_device_refuses_mixed_tensors(pretend_device):  # noqa: F811
    with pytest.raises(RuntimeError, match="CPU tensors"):
        torch.zeros(3, device=DEVICE) + torch.zeros(3)
    assert (torch.zeros(3, device=DEVICE) + 1).tolist() == [1.0] * 3
    assert pretend_device.waits["outside of the library"] == 1


@pytest.mark.parametrize(
    "kind, options",
    [
        ("bert", {"compensate": True, "micro_batch_size": 4}),
        *full(
            ("gpt2", {}),  # this one, and the last two: families with checks of their own on the tokens
            ("bert", {"micro_batch_size": 3}),
            ("bert", {"recover": True, "positions": "all", "attention_target": "probs"}),
            ("deberta-v2", {}),
            ("gemma3", {}),
        ),
    ],
)
def test_a_step_waits_for_the_device_once(kind, options, tmp_path, pretend_device):  # noqa: F811
    """Outside of prunes and held-out measures: to log the loss terms and the gradient's norm."""
    teacher, waits, copies = random_model(kind, vocabulary=cases.VOCABULARY), [], []
    options = {"steps": 5, "precision": "float32", "prune_start": 0.8, "prune_end": 1.0} | options
    config = hdlib.DistillConfig(**cases.CONFIG | options)

    def count(_record):
        waits.append(pretend_device.waits.copy())
        copies.append(pretend_device.copies.copy())

    hdlib.distill(teacher, *cases._text(teacher), config, tmp_path, on_step=count)
    during = waits[3] - waits[1]  # steps 2 and 3
    assert list(during.values()) == [2] and next(iter(during)).startswith("distill.py"), during
    copied = {place.partition(":")[0] for place in copies[3] - copies[1]}
    assert copied <= {"data.py", "models.py"}, "of the library only the batch; DeBERTa has constants of its own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, *full(torch.float32)])
def test_distill_leaves_the_teacher_as_it_was(dtype, teacher, tokenizer, blocks, tmp_path, pretend_device):  # noqa: F811
    """Device, dtype, mode, attention and requires_grad of the caller's teacher stay, though those of the run differ."""
    teacher = teacher.to(dtype).train()
    teacher.base_model.embeddings.requires_grad_(False)

    def state() -> tuple:
        parameters = {name: (p.dtype, p.device, p.requires_grad) for name, p in teacher.named_parameters()}
        return parameters, teacher.training, teacher.config._attn_implementation, teacher.dtype, teacher.device

    before, weights = state(), {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    run = hdlib.distill(teacher, tokenizer, *blocks, hdlib.DistillConfig(**ARGUMENTS | {"steps": 4}), tmp_path)
    assert run.finished and state() == before
    assert all(torch.equal(weights[name], parameter) for name, parameter in teacher.named_parameters())
    assert teacher.device.type == "cpu" and all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.full
def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, pretend_device, monkeypatch):  # noqa: F811
    """It holds the weights of its step, though the next step ends before it is written; and its error is not lost."""
    teacher, options = random_model("bert", vocabulary=cases.VOCABULARY), {"steps": 3, "precision": "float32"}
    config = hdlib.DistillConfig(**cases.CONFIG | options | {"checkpoint_every": 1, "eval_blocks": 2})
    arguments = teacher, *cases._text(teacher), config
    save, later = Run.save_checkpoint, Event()

    def save_late(run, step, *content):
        assert later.wait(60)
        save(run, step, *content)

    def passed(record):
        if record["step"] == 2:
            later.set()

    run = hdlib.distill(*arguments, tmp_path / "at once")
    monkeypatch.setattr(Run, "save_checkpoint", save_late)
    late = hdlib.distill(*arguments, tmp_path / "late", on_step=passed)
    assert [folder.name for folder in late.checkpoints()] == [f"step_{step:08d}" for step in (1, 2)]
    for mine, expected in zip(late.checkpoints(), run.checkpoints(), strict=True):
        mine, expected = (load_file(folder / "model.safetensors") for folder in (mine, expected))
        assert all(torch.equal(mine[name], expected[name]) for name in expected)

    def full_disk(*content):
        raise OSError("no space left")

    monkeypatch.setattr(Run, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hdlib.distill(*arguments[:-1], replace(config, steps=2), tmp_path / "full")


@pytest.mark.full
def test_the_cost_of_a_run(pretend_device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cost, "STEPS", 5)
    teacher = random_model("bert", vocabulary=100)
    config = hdlib.DistillConfig(steps=20, batch_size=4, target=0.5, precision="float32")
    assert cost.project(teacher.to(DEVICE), config, 16).tokens_per_second > 0
    assert pretend_device.waits


def test_the_forward_of_fine_tuning(teacher, tokenizer, tmp_path, pretend_device):  # noqa: F811
    teacher.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = open_with_head(AutoModelForSequenceClassification, tmp_path, num_labels=2)
    rows = tokenizer(["the student", "a teacher learns"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**rows).logits
    model.to(DEVICE)
    rows = {name: each.to(DEVICE) for name, each in rows.items()}
    outputs = model(**rows, labels=torch.tensor([0, 1]).to(DEVICE))
    torch.testing.assert_close(outputs.logits.cpu(), expected)
    outputs.loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "classifier" in name)
