"""Every table of the benchmarks on a tiny model: they run, and their comparisons are fair."""

from shutil import which

import pytest
import torch

from experiments.bench import compiled, growth, memory, step, student, whole_run
from experiments.bench.__main__ import QUESTIONS
from experiments.bench.work import Setting, Work

TINY = Setting("tiny", batch_size=2, length=16, turns=1)


@pytest.mark.full
def test_a_whole_run_counts_its_operations():
    table = whole_run.measure(TINY)
    assert (table.loc[["narrowing", "under masks"], "seconds"] > 0).all()
    assert table.loc["ratio", "teraflop"] > 1.2, "a narrowing run has fewer operations"
    # A step under masks: the teacher's forward, and the student's forward and backward (3 x) at full width.
    wide = whole_run._forward(TINY.teacher().config, TINY)
    assert table.loc["under masks", "teraflop"] * 1e12 == pytest.approx(4 * whole_run.STEPS * wide)


def test_a_step_needs_less_memory_than_the_naive_step():
    found = step.measure(TINY)
    assert set(found.index.get_level_values("kept")) == set(step.RATIOS)
    assert (found.xs("floor", level="what")["of floor"] == 1.0).all()
    found = memory.measure(Setting("tiny", batch_size=2, length=128))
    assert found.loc["floor", "megabytes"] <= found.loc["step", "megabytes"] < found.loc["naive", "megabytes"]


def test_the_naive_step_has_the_same_gradients():
    """With identical models the distillation terms are 0 in both, and the masked-language-model loss is equal."""
    work = Work(TINY)
    with work.recording():
        terms = work.backward(work.loss())
    expected = {name: parameter.grad.clone() for name, parameter in work.student.named_parameters()}
    work.eager()
    work.naive()
    assert terms.prediction.item() == terms.hidden.item() == terms.attention.item() == 0.0
    for name, parameter in work.student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_students_have_the_expected_shapes_and_operations():
    found = student.measure(TINY)
    fewer = found["times fewer operations"]
    assert fewer[1.0, "teacher"] == 1.0 < fewer[0.29, "nearest"]
    assert found.loc[(0.5, "multiples of 16"), "widths"] == "16/48, 4 x 4"
    assert found.loc[(0.5, "nearest"), "widths"] == "24/48, 6 x 4"
    assert found.loc[(0.5, "all heads"), "widths"] == "24/48, 12 x 2"
    assert list(QUESTIONS) == ["run", "step", "memory", "prune", "peers", "student", "growth", "compile"]


@pytest.mark.bench
@pytest.mark.skipif(not which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiling_pays_off_after_the_time_of_the_first_call(monkeypatch):
    monkeypatch.setattr(compiled, "RATIOS", (0.5,))
    row = compiled.measure(TINY).loc[0.5]
    assert row["first"] > row["compiled"] > 0, "the first call compiles"
    saved = row["eager"] - row["compiled"]
    assert row["steps until it pays"] == pytest.approx(row["first"] / saved if saved > 0 else float("inf"))
    # Every tenth step from t_i = 50 to t_f = 700 may prune: 65 times. Some prunes of a small model change no width.
    assert 20 <= row["shapes"] <= 65


@pytest.mark.bench
def test_a_step_needs_at_most_half_the_memory_of_the_naive_step():
    assert memory.measure(Setting("minilm")).loc["step", "of naive"] <= 0.5


@pytest.mark.bench
def test_memory_grows_neither_along_a_run_nor_with_the_text(monkeypatch):
    """A leak of two megabytes a step, such as a retained graph, would fail this test."""
    small = {"MEGABYTES": (1, 4), "READ": 20, "STEPS": 120, "BATCHES": (1, 2), "LENGTHS": (16, 32)}
    for name, value in small.items():
        monkeypatch.setattr(growth, name, value)
    found = growth.measure(TINY)
    assert [axes.has_data() for axes in growth.plot(found).axes] == [True, True, True]
    table = found["y"]
    along = table.loc["along a run, float32"]
    assert along.iloc[90:].mean() - along.iloc[40:70].mean() < 20
    assert table["reading batches", 4] - table["reading batches", 1] < 40
