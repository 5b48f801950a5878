"""What models cost, counted in more than one way, and models that leave PyTorch."""

from __future__ import annotations

from copy import deepcopy

import pandas as pd
import pytest
import torch

import hdlib

from models import random_model


def test_the_profiler_counts_what_the_shape_promises(teacher):
    length, hidden, vocabulary = 16, teacher.config.hidden_size, teacher.config.vocab_size
    promised = hdlib.lab.cost.flops(teacher.config, length) + 2 * length * hidden * (hidden + vocabulary)
    assert promised <= hdlib.lab.cost.profiled_flops(teacher, 1, length) <= 1.1 * promised
    assert hdlib.lab.cost.profiled_flops(teacher, 3, length) == 3 * hdlib.lab.cost.profiled_flops(teacher, 1, length)
    assert teacher.config._attn_implementation == "sdpa", "as it was before"


def test_peak_memory_by_hand():
    kept = torch.zeros(500, 500)  # 1 MB, there before

    def call():
        first = kept + 1  # 1 MB
        second = first * 2  # 2 MB
        del first
        return torch.cat([second, second])  # 3 MB

    assert hdlib.lab.cost.peak_memory(call) == pytest.approx(3e6, rel=0.01)


def test_a_table_of_forwards(teacher):
    narrow = random_model("bert", vocabulary=teacher.config.vocab_size, max_position_embeddings=32)
    hdlib.narrow(narrow, hdlib.Widths.at(narrow, 0.5))
    table = hdlib.lab.cost.forward_table({"wide": teacher, "narrow": narrow}, (1, 4), (8, 32, 64), repeats=2)
    assert len(table) == 2 * 2 * 2, "no model has 64 positions"
    assert (table[["milliseconds", "megabytes", "gflop"]] > 0).all().all()
    by = table.set_index(["model", "batch_size", "length"])
    assert by.loc[("wide", 4, 32), "gflop"] == pytest.approx(4 * by.loc[("wide", 1, 32), "gflop"])
    assert by.loc[("narrow", 4, 32), "gflop"] < by.loc[("wide", 4, 32), "gflop"]
    assert by.loc[("wide", 4, 32), "megabytes"] > by.loc[("wide", 1, 32), "megabytes"]
    row = table.iloc[0]
    assert row["tokens_per_second"] == pytest.approx(1000 * row["batch_size"] * row["length"] / row["milliseconds"])


def test_speed_ups_are_ratios_to_the_baseline():
    table = pd.DataFrame(
        {"model": ["teacher", "half"], "batch_size": 1, "length": 8, "milliseconds": [6.0, 2.0], "gflop": [8.0, 2.0]}
    )
    axes = hdlib.lab.plot_speed_up(table).axes[0]
    (line,) = [line for line in axes.get_lines() if line.get_label() == "8 tokens"]
    assert line.get_xydata().tolist() == [[4.0, 3.0]]


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gpt2", "llama"])
def test_a_narrowed_student_runs_as_an_exported_program(family, tmp_path):
    student = random_model(family)
    hdlib.narrow(student, hdlib.Widths.at(student, 0.5))
    assert hdlib.lab.export.to_program(student, tmp_path / "student.pt2") <= 1e-5


def test_a_narrowed_student_runs_as_onnx(teacher, tmp_path):
    hdlib.narrow(teacher, hdlib.Widths.at(teacher, 0.5))
    assert hdlib.lab.export.to_onnx(teacher, tmp_path / "student.onnx") <= 1e-5


def test_a_wrong_export_would_be_seen(teacher, tmp_path, monkeypatch):
    traced, other = hdlib.lab.export._traced, deepcopy(teacher)
    with torch.no_grad():
        other.cls.predictions.bias[7] += 0.1
    monkeypatch.setattr(hdlib.lab.export, "_traced", lambda model: traced(other))
    assert hdlib.lab.export.to_program(teacher, tmp_path / "student.pt2") > 1e-3
