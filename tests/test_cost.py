"""What models and runs cost, checked by hand, and students exported from PyTorch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import astuple, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.config import PAPER
from hdlib.lab import cost
from hdlib.lab.cost import course, project
from hdlib.models import check_vocabulary
from hdlib.widths import set_widths

from conftest import full
from models import KINDS, random_model


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Projections from half as many steps."""
    monkeypatch.setattr(cost, "STEPS", 12)


def profiled_flops(model, batch_size: int, length: int) -> int:
    """Operations of one forward, head included, as PyTorch's profiler counts them: element-wise ones too."""
    model = deepcopy(model)
    model.set_attn_implementation("eager")  # SDPA kernels are not counted
    input_ids = torch.randint(5, model.config.vocab_size, (batch_size, length))
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        model(input_ids)
    return sum(event.flops for event in profiled.key_averages() if event.flops)


def test_the_profiler_counts_the_operations_of_the_shape(teacher):
    length, hidden, vocabulary = 16, teacher.config.hidden_size, teacher.config.vocab_size
    counted = cost.flops(teacher.config, length) + 2 * length * hidden * (hidden + vocabulary)
    assert counted <= profiled_flops(teacher, 1, length) <= 1.1 * counted
    assert profiled_flops(teacher, 3, length) == 3 * profiled_flops(teacher, 1, length)


def test_peak_memory_by_hand():
    kept = torch.zeros(500, 500)  # 1 MB, before the call

    def call():
        first = kept + 1  # 1 MB
        second = first * 2  # 2 MB
        del first
        return torch.cat([second, second])  # 3 MB

    assert cost.peak_memory(call) == pytest.approx(3e6, rel=0.01)


def test_a_table_of_forwards(teacher):
    narrow = random_model("bert", vocabulary=teacher.config.vocab_size, max_position_embeddings=32)
    hdlib.narrow(narrow, hdlib.Widths.at(narrow, 0.5))
    table = cost.forward_table({"wide": teacher, "narrow": narrow}, (1, 4), (8, 32, 64), repeats=2)
    assert len(table) == 2 * 2 * 2, "no model has 64 positions"
    assert (table[["milliseconds", "megabytes", "gflop"]] > 0).all().all()
    by = table.set_index(["model", "batch_size", "length"])
    assert by.loc[("wide", 4, 32), "gflop"] == pytest.approx(4 * by.loc[("wide", 1, 32), "gflop"])
    assert by.loc[("narrow", 4, 32), "gflop"] < by.loc[("wide", 4, 32), "gflop"]
    assert by.loc[("wide", 4, 32), "megabytes"] > by.loc[("wide", 1, 32), "megabytes"]
    row = table.iloc[0]
    assert row["tokens_per_second"] == pytest.approx(1000 * row["batch_size"] * row["length"] / row["milliseconds"])


@pytest.mark.parametrize("family", ["bert", *full("llama", "distilbert", "modernbert", "gpt2")])
def test_a_narrowed_student_runs_as_an_exported_program(family, tmp_path):
    student = random_model(family, layers=1)
    hdlib.narrow(student, hdlib.Widths.at(student, 0.5))
    assert hdlib.lab.export.to_program(student, tmp_path / "student.pt2") <= 1e-5


@pytest.mark.full
def test_a_narrowed_student_runs_as_onnx(tmp_path):
    student = random_model("bert", layers=1)
    hdlib.narrow(student, hdlib.Widths.at(student, 0.5))
    assert hdlib.lab.export.to_onnx(student, tmp_path / "student.onnx") <= 1e-5


def test_a_wrong_export_is_detected(teacher, tmp_path, monkeypatch):
    traced, other = hdlib.lab.export._traced, deepcopy(teacher)
    with torch.no_grad():
        other.cls.predictions.bias[7] += 0.1
    monkeypatch.setattr(hdlib.lab.export, "_traced", lambda model: traced(other))
    assert hdlib.lab.export.to_program(teacher, tmp_path / "student.pt2") > 1e-3


def test_flops_are_those_of_the_published_shape():
    """BERT-base, 128 tokens: 12 layers of 24 D^2 S + 4 S^2 D."""
    expected = 12 * (24 * 768**2 * 128 + 4 * 128**2 * 768)
    assert cost.flops(BertConfig(), 128) == pytest.approx(expected, rel=1e-3)
    assert cost.encoder_parameters(BertConfig()) == 12 * (12 * 768**2 + 13 * 768)


def test_flops_of_a_family_whose_forward_reads_values():
    config = random_model("deberta-v2").config
    assert cost.flops(config, 16) > 2 * 16 * cost.encoder_parameters(config) * 0.5


SMALL = PAPER | {"steps": 100, "batch_size": 8, "micro_batch_size": 2, "target": 0.5, "precision": "float32"}


def test_models_on_different_devices_are_not_compared():
    with pytest.raises(ValueError, match="different devices, cpu, meta: move all to one"):
        cost.latency({"teacher": random_model("bert"), "student": random_model("bert").to("meta")})


def forward(teacher, widths, loss_positions):
    """Operations of one block of 16 tokens."""
    shape = type(teacher.config)(**teacher.config.to_dict())
    set_widths(teacher, shape, widths)
    return cost.flops(shape, 16) + 2 * loss_positions * shape.hidden_size * (shape.hidden_size + 100)


@pytest.mark.parametrize("name, causal", [("bert", False), *full(("qwen3", True))])
def test_a_projection_adds_up(name, causal):
    """Operations by hand; time from steps and devices."""
    teacher = random_model(name, vocabulary=100)
    config = DistillConfig(**SMALL)
    found = project(teacher, config, 16)
    assert found.tokens_per_second == pytest.approx(100 * 8 * 16 / (found.hours * 3600))
    assert found.operations == pytest.approx(found.operations_per_second * found.hours * 3600)

    @cache
    def operations(widths):
        return forward(teacher, widths, 16 if causal else 2)

    wide, target = Widths.of(teacher), config.shape(teacher)
    at = [wide, *(config.widths_at(step, teacher, target) for step in range(1, 100))]
    assert found.operations == pytest.approx(8 * sum(operations(wide) + 3 * operations(widths) for widths in at))
    assert project(teacher, config, 16, processes=2).operations == pytest.approx(found.operations)


@pytest.mark.parametrize(
    "masks", [{"masked": True}, {"recover": True}, {"scope": "global"}], ids=lambda each: str(each)
)
def test_every_step_under_masks_costs_as_much_as_the_first(masks):
    teacher = random_model("bert", vocabulary=100)
    config = DistillConfig(**SMALL | masks)
    widths, prunes = course(teacher, config)
    assert set(widths) == {Widths.of(teacher)} and len(widths) == 100
    assert [step for step, prune in enumerate(prunes, 1) if prune] == [10, 20, 30, 40, 50, 60, 70], "ranked again"
    found = project(teacher, config, 16)
    assert found.operations == pytest.approx(100 * 8 * 4 * forward(teacher, Widths.of(teacher), 2))


def test_a_random_student_is_narrow_from_the_first_step():
    teacher = random_model("bert", vocabulary=100)
    config = DistillConfig(**SMALL, initial="random")
    target = config.shape(teacher)
    widths, prunes = course(teacher, config)
    assert set(widths) == {target} != {Widths.of(teacher)} and not any(prunes)
    wide, narrow = (forward(teacher, each, 2) for each in (Widths.of(teacher), target))
    assert project(teacher, config, 16).operations == pytest.approx(100 * 8 * (wide + 3 * narrow))


@pytest.mark.parametrize(
    "options, loss_positions, teachers",
    [
        ({"positions": "all"}, 16, 1),
        ({"mask_probability": 0.5}, 8, 1),
        ({"prediction": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0}, 2, 0),
    ],
    ids=["all positions", "half of them masked", "without the teacher"],
)
def test_operations_of_the_head_are_at_the_loss_positions(options, loss_positions, teachers):
    teacher = random_model("bert", vocabulary=100)
    each = forward(teacher, Widths.of(teacher), loss_positions)
    config = DistillConfig(**SMALL | options)
    wide = Widths.of(teacher)
    assert cost.operations(teacher, [wide], config, 16) == {wide: pytest.approx((teachers + 3) * each)}


@pytest.mark.parametrize("name", [*list(KINDS)[1::7], *full(*(name for n, name in enumerate(KINDS) if n % 7 != 1))])
def test_counts_at_some_shapes_give_the_others(name):
    teacher = random_model(name, heads=8, head_dim=16, ffn=400, hidden=128, vocabulary=100)
    target = Widths.at(teacher, 0.3)
    target = replace(target, layers=1) if KINDS[name].deep else target
    config = DistillConfig.paper(steps=1000, target=target, prune_every=1)
    shapes = sorted(set(course(teacher, config)[0]), key=astuple)
    found = cost.operations(teacher, shapes, config, 16)
    assert len(shapes) > 100 and found.keys() == set(shapes)
    loss_positions = 16 if KINDS[name].causal else 2
    wide = forward(teacher, Widths.of(teacher), loss_positions)
    for widths in shapes[5 :: len(shapes) // 4]:
        assert found[widths] == pytest.approx(wide + 3 * forward(teacher, widths, loss_positions), rel=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"initial": "random"}, {"schedule": "one_shot"}, {"target": Widths(layers=1, ffn=20)}], ids=str
)
def test_a_run_takes_the_projected_course(options, teacher, tokenizer, blocks, tmp_path):
    options = {"target": 0.4} | options
    config = DistillConfig(steps=12, batch_size=4, prune_every=2, precision="float32", **options)
    names = ["hidden_size", "intermediate_size", "head_dim", "num_heads", "num_layers"]
    metrics = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "run").metrics[names]
    after = [Widths(*map(int, row)) for row in metrics.itertuples(index=False)]  # step 0 first
    widths, prunes = course(teacher, config)
    assert widths == after[:-1]
    assert prunes == [one != other for one, other in pairwise(after)]


def test_a_run_that_keeps_the_whole_teacher_is_projected():
    teacher = random_model("bert", vocabulary=100)
    assert project(teacher, DistillConfig(**SMALL | {"target": 1.0}), 16).hours > 0


@pytest.mark.full
def test_memory_counts_the_teacher_once():
    """With tiny batches a run holds parameters: the teacher, the student, its gradients and its moments."""
    teacher = random_model("bert", heads=8, head_dim=32, ffn=1024, layers=4, vocabulary=100)
    held = project(teacher, DistillConfig(**SMALL | {"micro_batch_size": 1, "target": 1.0}), 8).gigabytes * 1e9
    parameters = sum(parameter.nbytes for parameter in teacher.parameters())
    assert 5 <= held / parameters <= 6, "and the scores"


@pytest.mark.filterwarnings("error")
def test_seconds_are_fitted_to_steps_operations_and_prunes():
    """Made-up seconds: 1 for a step, 2 for an operation and 5 for a prune."""
    sizes = [8, 8, 8, 8, 6, 6, 4, 4, 4]  # before and after each of 8 steps
    prunes = [before != after for before, after in pairwise(sizes)]
    seconds = np.array([1 + 2 * size + 5 * prune for size, prune in zip(sizes, prunes, strict=False)])
    assert cost._fitted(seconds, sizes[:-1], prunes) == pytest.approx([1, 2, 5])
    step, operation, prune = cost._fitted(seconds[:3], sizes[:3], prunes[:3])
    assert step + 8 * operation == pytest.approx(17) and prune == 0, "one size and no prune"


@pytest.mark.parametrize("name", ["roberta", "gpt2", "modernbert"])
def test_the_placeholder_tokenizer_fits_the_teacher(name):
    teacher = random_model(name, vocabulary=100, pad_token_id=7)
    tokenizer = cost.placeholder_tokenizer(100, teacher.config.pad_token_id)
    check_vocabulary(tokenizer, teacher)
    assert len(tokenizer) == 100 and tokenizer.pad_token_id == 7
