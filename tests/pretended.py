"""Tests on the pretend device: no tensors of two devices meet. `test_gpu` runs them in a process of their own."""

import pytest
import torch

import hdlib
from experiments.gpu import cases

from models import random_model
from pretend_device import DEVICE, pretend_device  # noqa: F401
from test_loop import ARGUMENTS

PRETENDED = (
    "narrowed, platon",
    "masked, neurons return",
    "masked, global",
    "micro-batches",
    "resumed, narrowed, random",
    "resumed, masked, neurons return",
    "grouped heads, qwen3, narrowed",
    "discrepancy, bert",
    "narrow with AdamW, fused, llama",
)


@pytest.mark.parametrize("name", PRETENDED)
def test_no_tensors_of_two_devices_meet(name, pretend_device):  # noqa: F811
    case = cases.cases(6)[f"float32: {name}"]
    found = case(DEVICE)
    assert pretend_device.waits or pretend_device.copies, "nothing ran on the device"
    assert not [place for place in pretend_device.doubles if not place.startswith("discrepancy.py")]
    reference = {"value": case(torch.device("cpu"))} if name.startswith(("discrepancy", "narrow with")) else None
    if reference:
        assert cases.compared({"value": found}, reference, "float32")["passed"]


def test_the_pretend_device_refuses_mixed_tensors(pretend_device):  # noqa: F811
    with pytest.raises(RuntimeError, match="CPU tensors"):
        torch.zeros(3, device=DEVICE) + torch.zeros(3)
    assert (torch.zeros(3, device=DEVICE) + 1).tolist() == [1.0] * 3
    assert pretend_device.waits["outside of the library"] == 1


@pytest.mark.parametrize(
    "kind, options",
    [
        ("bert", {"micro_batch_size": 3}),
        ("bert", {"recover": True, "positions": "all", "attention_target": "probs"}),
        ("bert", {"compensate": True}),
        ("deberta-v2", {}),  # the last three: families with checks of their own on the tokens
        ("gpt2", {}),
        ("gemma3", {}),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
