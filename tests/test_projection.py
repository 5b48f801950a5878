"""What a run would cost, told beforehand: it follows the run's config."""

from dataclasses import astuple
from itertools import pairwise

import pandas as pd
import pytest

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.lab import projection
from hdlib.lab.projection import course, project
from hdlib.models import check_vocabulary
from hdlib.widths import set_widths

from models import KINDS, random_model

SMALL = {"steps": 100, "batch_size": 8, "micro_batch_size": 2, "target": 0.5, "precision": "float32"}


def forward(teacher, widths, loss_positions):
    """Operations of one block of 16 tokens."""
    shape = type(teacher.config)(**teacher.config.to_dict())
    set_widths(teacher, shape, widths)
    return hdlib.lab.cost.flops(shape, 16) + 2 * loss_positions * shape.hidden_size * (shape.hidden_size + 100)


@pytest.mark.parametrize("name, causal", [("bert", False), ("qwen3", True)])
def test_a_projection_adds_up(name, causal):
    """By hand: operations, and time that follows steps and devices."""
    teacher = random_model(name, vocabulary=100)
    config = DistillConfig(**SMALL)
    found = project(teacher, config, 16)
    assert found.tokens_per_second == pytest.approx(100 * 8 * 16 / (found.hours * 3600))
    assert found.operations == pytest.approx(found.operations_per_second * found.hours * 3600)

    def operations(widths):
        return forward(teacher, widths, 16 if causal else 2)

    wide, target = Widths.of(teacher), config.shape(teacher)
    at = [wide, *(config.widths_at(step, teacher, target) for step in range(1, 100))]
    assert found.operations == pytest.approx(8 * sum(operations(wide) + 3 * operations(widths) for widths in at))
    assert project(teacher, config, 16, processes=2).operations == pytest.approx(found.operations)


@pytest.mark.parametrize(
    "masks", [{"masked": True}, {"recover": True}, {"scope": "global"}], ids=lambda each: str(each)
)
def test_under_masks_every_step_costs_what_the_first_one_does(masks):
    teacher = random_model("bert", vocabulary=100)
    config = DistillConfig(**SMALL, **masks)
    widths, prunes = course(teacher, config)
    assert set(widths) == {Widths.of(teacher)} and len(widths) == 100
    assert [step for step, prune in enumerate(prunes, 1) if prune] == [10, 20, 30, 40, 50, 60, 70], "ranked anew"
    found = project(teacher, config, 16)
    assert found.operations == pytest.approx(100 * 8 * 4 * forward(teacher, Widths.of(teacher), 2))


def test_a_random_student_never_was_wide():
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
    ids=["all positions", "half of them masked", "nobody asks the teacher"],
)
def test_operations_are_where_the_loss_looks(options, loss_positions, teachers):
    teacher = random_model("bert", vocabulary=100)
    each = forward(teacher, Widths.of(teacher), loss_positions)
    config = DistillConfig(**SMALL, **options)
    wide = Widths.of(teacher)
    assert projection.operations(teacher, [wide], config, 16) == {wide: pytest.approx((teachers + 3) * each)}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_counted_at_some_shapes_tells_the_others(name):
    teacher = random_model(name, heads=8, head_dim=16, ffn=400, hidden=128, vocabulary=100)
    config = DistillConfig(steps=1000, target=0.3, prune_every=1)
    shapes = sorted(set(course(teacher, config)[0]), key=astuple)
    found = projection.operations(teacher, shapes, config, 16)
    assert len(shapes) > 100 and found.keys() == set(shapes)
    loss_positions = 16 if KINDS[name].causal else 2
    wide = forward(teacher, Widths.of(teacher), loss_positions)
    for widths in shapes[5 :: len(shapes) // 4]:
        assert found[widths] == pytest.approx(wide + 3 * forward(teacher, widths, loss_positions), rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"initial": "random"}, {"schedule": "one_shot"}], ids=str)
def test_a_run_takes_the_course_that_was_projected(options, teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(steps=12, batch_size=4, target=0.4, prune_every=2, precision="float32", **options)
    names = ["hidden_size", "intermediate_size", "head_dim", "num_heads"]
    metrics = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "run").metrics[names]
    after = [Widths(*map(int, row)) for row in metrics.itertuples(index=False)]  # step 0 first
    widths, prunes = course(teacher, config)
    assert widths == after[:-1]
    assert prunes == [one != other for one, other in pairwise(after)]


def test_the_whole_teacher_kept_is_projected_too():
    teacher = random_model("bert", vocabulary=100)
    assert project(teacher, DistillConfig(**SMALL | {"target": 1.0}), 16).hours > 0


def test_memory_counts_the_teacher_once():
    """With next to no text, what a run holds is parameters: the teacher, the student, its gradients and moments."""
    teacher = random_model("bert", heads=8, head_dim=32, ffn=1024, layers=4, vocabulary=100)
    held = project(teacher, DistillConfig(**SMALL | {"micro_batch_size": 1, "target": 1.0}), 8).gigabytes * 1e9
    parameters = sum(parameter.nbytes for parameter in teacher.parameters())
    assert 5 <= held / parameters <= 6, "the scores come on top"


@pytest.mark.filterwarnings("error")
def test_a_line_is_fitted_to_the_steps_and_prunes_come_on_top():
    """Seconds made up as 1 + 2 x operations, and 5 more where a prune was."""
    sizes = [8, 8, 8, 8, 6, 6, 4, 4, 4]  # before and after each of 8 steps
    prunes = [before != after for before, after in pairwise(sizes)]
    seconds = pd.Series([1 + 2 * size + 5 * prune for size, prune in zip(sizes, prunes, strict=False)])
    line, prune = projection._fitted(seconds, sizes[:-1], prunes)
    assert [line(n) for n in (8, 4, 1)] == pytest.approx([17, 9, 3]) and prune == pytest.approx(5)
    line, prune = projection._fitted(seconds[:3], sizes[:3], prunes[:3])
    assert line(8) == pytest.approx(17) and prune == 0, "of one size, and without a prune"


@pytest.mark.parametrize("name", ["roberta", "gpt2", "modernbert"])
def test_a_wordless_tokenizer_belongs_to_the_teacher(name):
    """Padding is where the teacher has it."""
    teacher = random_model(name, vocabulary=100, pad_token_id=7)
    tokenizer = projection.wordless_tokenizer(100, teacher.config.pad_token_id)
    check_vocabulary(tokenizer, teacher)
    assert len(tokenizer) == 100 and tokenizer.pad_token_id == 7
