"""What a run records beside its numbers: every prune, the parameters that are left; and how its record is read."""

import shutil
from dataclasses import replace

import pytest
import torch

import hdlib
from hdlib import DistillConfig, Run
from hdlib.neurons import RECORDED, Prune
from hdlib.widths import width_groups

from conftest import random_bert
from test_loop import ARGUMENTS


@pytest.fixture(scope="module")
def recorded(tokenizer, blocks, tmp_path_factory):
    """A run and its teacher."""
    teacher = random_bert(vocabulary=len(tokenizer))
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS), folder), teacher


def test_every_prune_is_recorded_in_the_teachers_numbering(recorded):
    run, teacher = recorded
    widths = run.metrics[["hidden_size", "intermediate_size", "head_dim"]]
    assert run.pruned_at == [int(step) for step in widths.index[widths.diff().lt(0).any(axis=1)]]
    there = {name: torch.ones(group.size, dtype=torch.bool) for name, group in width_groups(teacher).items()}
    for step in run.pruned_at:
        prune = run.prune(step)
        assert prune.stays.keys() == prune.importance.keys() == there.keys()
        for name, stays in prune.stays.items():
            importance = prune.importance[name]
            assert torch.equal(importance.isfinite(), there[name]), "ranked were those that were still there"
            assert not (stays & ~there[name]).any() and (importance[there[name]] >= 0).all()
            if name.endswith(("ffn", "hidden")):  # heads have rankings of their own inside
                goes = there[name] & ~stays
                assert importance[stays].min() >= importance[goes].max() if goes.any() else True
        there = prune.stays
        assert int(there["hidden"].sum()) == widths.loc[step, "hidden_size"]
        assert int(there["layer.1.ffn"].sum()) == widths.loc[step, "intermediate_size"]
    assert {name: stays.nonzero()[:, 0].tolist() for name, stays in there.items()}.items() <= run.kept.items()


def test_of_many_prunes_an_even_selection_is_recorded(tokenizer, blocks, tmp_path):
    teacher = random_bert(vocabulary=len(tokenizer), ffn=512)
    config = DistillConfig(**ARGUMENTS | {"steps": 300, "prune_every": 1, "batch_size": 1, "eval_every": 300})
    run = hdlib.distill(teacher, tokenizer, *blocks, replace(config, checkpoint_every=300), tmp_path)
    pruned = run.metrics.index[run.metrics["intermediate_size"].diff().lt(0)]
    assert len(pruned) > RECORDED and 40 < len(run.pruned_at) <= RECORDED
    assert run.pruned_at[-1] == pruned[-1], "the last one always"
    assert set(pruned // 3) == {step // 3 for step in run.pruned_at}, "one in every three steps in which there was any"


def test_a_run_that_goes_on_records_what_an_undisturbed_one_does(recorded, tokenizer, blocks, tmp_path):
    run, teacher = recorded
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    shutil.rmtree(again / "student")
    Prune(23, {}, {"hidden": torch.ones(3, dtype=torch.bool)}).save(again / "neurons")  # of a step that is done again
    resumed = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS), again, resume=True)
    assert resumed.pruned_at == run.pruned_at
    for step in run.pruned_at:
        for ours, theirs in ((resumed.prune(step).stays, run.prune(step).stays),):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("changes", [{}, {"masked": True}, {"recover": True}, {"scope": "global"}])
def test_parameters_are_those_of_a_stock_model_of_the_width(changes, teacher, tokenizer, blocks, tmp_path):
    run = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS | changes), tmp_path)
    metrics = run.metrics
    assert metrics.loc[0, "parameters"] == teacher.num_parameters()
    assert metrics["parameters"].is_monotonic_decreasing
    if run.has_student:
        assert metrics["parameters"].iloc[-1] == run.student()[0].num_parameters()
    assert run.pruned_at and run.prune(run.pruned_at[-1]).stays["layer.0.ffn"].shape == (
        teacher.config.intermediate_size,
    )
    if changes != {"scope": "global"}:
        last = run.prune(run.pruned_at[-1]).stays
        assert all(stays.nonzero()[:, 0].tolist() == run.kept[name] for name, stays in last.items())


def test_a_student_that_never_was_the_copy_prunes_nothing(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"initial": "random"})
    assert hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path).pruned_at == []


def test_the_table_of_a_record_is_its_lines(recorded, tmp_path):
    """Arrow reads the table, the lines are JSON: the same numbers, to the last bit."""
    run, _ = recorded
    metrics = run.metrics
    for record in run.records():
        row = metrics.loc[record["step"]].dropna()
        assert row.to_dict() == {name: value for name, value in record.items() if name != "step"}


def test_a_record_is_read_again_when_it_has_grown_and_a_line_that_was_cut_is_left_out(recorded, tmp_path):
    copy = Run(tmp_path)
    lines = (recorded[0].folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for count in (0, 1, 5):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:count]) + lines[count][:20])
        assert len(copy.metrics) == count
    mine = copy.metrics
    mine.loc[0, "held_out_kl"] = 7.0
    assert copy.metrics.loc[0, "held_out_kl"] == 0.0, "what a reader does to a table is the reader's"
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + "{broken\n" + lines[2])
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged"):
        copy.metrics  # noqa: B018
