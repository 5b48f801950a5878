"""Recorded prunes, numbers of parameters, and the table of metrics."""

import shutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file

import hdlib
from hdlib import DistillConfig, Run
from hdlib.runs import RECORDED, Prune
from hdlib.widths import width_groups

from conftest import ARGUMENTS, random_bert


@pytest.fixture
def recorded(tokenizer, whole_run):
    """A run and its teacher."""
    return whole_run, random_bert(vocabulary=len(tokenizer))


def test_every_prune_is_recorded_in_the_teachers_numbering(recorded):
    run, teacher = recorded
    widths = run.metrics[["hidden_size", "intermediate_size", "head_dim"]]
    assert run.pruned_at == [int(step) for step in widths.index[widths.diff().lt(0).any(axis=1)]]
    before = {name: torch.ones(group.size, dtype=torch.bool) for name, group in width_groups(teacher).items()}
    for step in run.pruned_at:
        prune = run.prune(step)
        assert prune.kept.keys() == prune.importance.keys() == before.keys()
        for name, kept in prune.kept.items():
            importance = prune.importance[name]
            assert torch.equal(importance.isfinite(), before[name]), "a score for each neuron before the prune"
            assert not (kept & ~before[name]).any() and (importance[before[name]] >= 0).all()
            if name.endswith(("ffn", "hidden")):  # in attention, neurons are ranked within their head
                removed = before[name] & ~kept
                assert importance[kept].min() >= importance[removed].max() if removed.any() else True
        before = prune.kept
        assert int(before["hidden"].sum()) == widths.loc[step, "hidden_size"]
        assert int(before["layer.1.ffn"].sum()) == widths.loc[step, "intermediate_size"]
    assert {name: kept.nonzero()[:, 0].tolist() for name, kept in before.items()}.items() <= run.kept.items()


def test_a_prune_recorded_by_the_first_version_is_read(tmp_path):
    importance, kept = torch.tensor([0.5, 0.25, torch.nan]), torch.tensor([True, False, False])
    (tmp_path / "neurons").mkdir()
    tensors = {"importance.layer.0.ffn": importance.bfloat16(), "stays.layer.0.ffn": kept}
    save_file(tensors, tmp_path / "neurons" / "step_00000007.safetensors")
    prune = Run(tmp_path).prune(7)
    assert prune.step == 7 and torch.equal(prune.kept["layer.0.ffn"], kept)
    torch.testing.assert_close(prune.importance["layer.0.ffn"], importance, rtol=0, atol=0, equal_nan=True)


def test_of_many_prunes_an_even_selection_is_recorded(tokenizer, blocks, tmp_path, monkeypatch):
    """A tenth of the steps of a long run, and of the prunes that are recorded."""
    assert RECORDED == 100
    monkeypatch.setattr(import_module("hdlib.distill"), "RECORDED", 10)
    teacher = random_bert(vocabulary=len(tokenizer), ffn=512)
    config = DistillConfig(**ARGUMENTS | {"steps": 30, "prune_every": 1, "batch_size": 1, "eval_every": 30})
    run = hdlib.distill(teacher, tokenizer, *blocks, replace(config, checkpoint_every=30), tmp_path)
    pruned = run.metrics.index[run.metrics["intermediate_size"].diff().lt(0)]
    assert len(pruned) > 10 and 4 < len(run.pruned_at) <= 10
    assert run.pruned_at[-1] == pruned[-1], "always the last one"
    assert set(pruned // 3) == {step // 3 for step in run.pruned_at}, "at most one prune in three steps"


def test_a_resumed_run_records_the_same_prunes(recorded, tokenizer, blocks, tmp_path):
    run, teacher = recorded
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    shutil.rmtree(again / "student")
    Run(again).save_prune(Prune(23, {}, {"hidden": torch.ones(3, dtype=torch.bool)}))  # of a step that is repeated
    resumed = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS), again, resume=True)
    assert resumed.pruned_at == run.pruned_at
    for step in run.pruned_at:
        kept, expected = resumed.prune(step).kept, run.prune(step).kept
        assert all(torch.equal(kept[name], expected[name]) for name in expected)


@pytest.mark.parametrize("changes", [{}, {"masked": True}, {"recover": True}, {"scope": "global"}])
def test_parameters_are_those_of_a_stock_model_of_the_width(changes, teacher, tokenizer, blocks, tmp_path):
    run = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS | changes), tmp_path)
    metrics = run.metrics
    assert metrics.loc[0, "parameters"] == teacher.num_parameters()
    assert metrics["parameters"].is_monotonic_decreasing
    if run.has_student:
        assert metrics["parameters"].iloc[-1] == run.student()[0].num_parameters()
    last = run.prune(run.pruned_at[-1]).kept
    assert last["layer.0.ffn"].shape == (teacher.config.intermediate_size,)
    if changes != {"scope": "global"}:
        assert all(kept.nonzero()[:, 0].tolist() == run.kept[name] for name, kept in last.items())


def test_a_student_of_random_weights_records_no_prune(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"initial": "random"})
    assert hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path).pruned_at == []


def test_metrics_and_records_are_equal(recorded):
    """Arrow reads the table and json the records: equal to the last bit."""
    run, _ = recorded
    metrics = run.metrics
    for record in run.records():
        row = metrics.loc[record["step"]].dropna()
        assert row.to_dict() == {name: value for name, value in record.items() if name != "step"}


def test_metrics_follow_a_growing_file_and_leave_out_an_incomplete_line(recorded, tmp_path):
    copy = Run(tmp_path)
    lines = (recorded[0].folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for count in (0, 1, 5):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:count]) + lines[count][:20])
        assert len(copy.metrics) == count
    changed = copy.metrics
    changed.loc[0, "held_out_kl"] = 7.0
    assert copy.metrics.loc[0, "held_out_kl"] == 0.0, "a changed table is a copy"
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + "{broken\n" + lines[2])
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged"):
        copy.metrics  # noqa: B018
