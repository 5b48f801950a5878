"""Shapes for a budget: within it, used up, costed as the stock model, ordered by the predicted loss; refusals."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.data import Masking, NextToken, Sentences, labelled_once
from hdlib.lab import Budget, budget, shapes
from hdlib.narrowing import stock_model
from hdlib.training import Training

from conftest import flops_once, full
from models import KINDS, random_encoder, random_model

SOME = ("bert", "llama")


@pytest.fixture(autouse=True)
def quiet_clock(monkeypatch):
    """Milliseconds in proportion to parameters; operations of a shape are counted once for all tests."""

    def latency(models, *_):
        return {name: model.num_parameters() / 100 for name, model in models.items()}

    monkeypatch.setattr(budget, "latency", latency)
    monkeypatch.setattr(budget, "flops", flops_once)


def blocks_for(kind: str, tokenizer):
    ids = torch.randint(5, len(tokenizer), (64, 16), generator=torch.Generator().manual_seed(2))
    return ids, labelled_once(ids[:16], NextToken() if KINDS[kind].causal else Masking.of(tokenizer), seed=0)


def found(kind: str, tokenizer, count: int = 5, **limits):
    """The teacher and the table of a budget, limits as fractions of the teacher's costs."""
    teacher = random_model(kind)
    of_teacher = {"parameters": teacher.num_parameters(), "milliseconds": teacher.num_parameters() / 100}
    of_teacher |= {"megabytes": 4e-6 * teacher.num_parameters(), "flops": budget.flops(teacher.config, 16)}
    given = Budget(**{name: fraction * of_teacher[name] for name, fraction in limits.items()})
    return teacher, given, shapes(teacher, tokenizer, *blocks_for(kind, tokenizer), given, count=count, length=16)


@pytest.mark.parametrize("kind", [*SOME, *full(*(kind for kind in KINDS if kind not in SOME))])
def test_shapes_use_up_the_budget(kind, tokenizer):
    teacher, given, table = found(kind, tokenizer, parameters=0.7)
    wide = Widths.of(teacher)
    assert 1 < len(table) <= 5 and table["shape"].is_unique and table["predicted"].is_monotonic_increasing
    for row in table.to_dict("records"):
        shape = row["shape"]
        assert shape == shape.resolved(teacher) and shape.fits_in(wide) and asdict(shape).items() <= row.items()
        assert row["parameters"] == stock_model(teacher, shape).num_parameters() <= given.parameters
        assert row["milliseconds"] == row["parameters"] / 100 and row["megabytes"] == 4e-6 * row["parameters"]
        more = shape.ffn < wide.ffn and stock_model(teacher, replace(shape, ffn=shape.ffn + 1)).num_parameters()
        assert shape.ffn == wide.ffn or more > given.parameters, "the feed-forward width takes what is left"
    assert DistillConfig(target=table["shape"][0]).shape(teacher) == table["shape"][0]


@pytest.mark.parametrize("kind", SOME)
def test_a_row_has_the_counts_of_its_student(kind, tokenizer, tmp_path):
    """Of the one that a run leaves on the disk, where tied weights are stored once."""
    teacher, _, table = found(kind, tokenizer, 2, parameters=0.6)
    row = table.iloc[-1]
    config = DistillConfig(target=row["shape"], steps=2, prune_start=0.0, prune_end=0.5, batch_size=4, eval_blocks=4)
    student = hdlib.distill(teacher, tokenizer, *blocks_for(kind, tokenizer), config, tmp_path).student()[0]
    stored = sum(each.numel() for each in load_file(tmp_path / "student" / "model.safetensors").values())
    assert row["parameters"] == stored == student.num_parameters() and row["megabytes"] == 4e-6 * stored
    assert row["flops"] == flops_once(student.config, 16) and row["shape"] == Widths.of(student)


@pytest.mark.parametrize("limit", ["megabytes", "flops", "milliseconds"])
def test_every_limit_beside_another(limit, tokenizer):
    _, given, table = found("bert", tokenizer, 2, **{limit: 0.7}, parameters=0.8)
    assert (table[limit] <= given.limits[limit]).all() and (table["parameters"] <= given.parameters).all()
    assert (table[limit] > 0.6 * given.limits[limit]).any()


def test_a_budget_that_the_teacher_meets(tokenizer):
    """Nothing is pruned, and nothing is lost."""
    teacher, _, table = found("bert", tokenizer, parameters=1.0)
    assert table["shape"][0] == Widths.of(teacher) and table["predicted"][0] == pytest.approx(0, abs=1e-6)


def test_the_best_shape_keeps_what_matters(tokenizer):
    """Feed-forward neurons do almost nothing here. The teacher is unchanged, and the table the same each time."""
    teacher = random_model("bert")
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            layer.output.dense.weight.mul_(0.01)
    before, blocks = copy.deepcopy(teacher.state_dict()), blocks_for("bert", tokenizer)
    tables = [shapes(teacher, tokenizer, *blocks, Budget(parameters=10_900), count=3, length=16) for _ in range(2)]
    assert len(tables[0]) == 3 and tables[0]["shape"][0] == replace(Widths.of(teacher), ffn=28)
    assert tables[1].equals(tables[0])
    assert all(torch.equal(each, before[name]) for name, each in teacher.state_dict().items())


def test_shapes_to_compare_with(tokenizer):
    """Equal ratios are listed, incomplete as they are given; a shape beyond the budget is not."""
    teacher, equal = random_model("bert"), Widths(hidden=12, ffn=28)
    given = Budget(parameters=stock_model(teacher, equal.resolved(teacher)).num_parameters())
    blocks, others = blocks_for("bert", tokenizer), [equal, Widths(ffn=28)]
    table = shapes(teacher, tokenizer, *blocks, given, count=4, length=16, include=others)
    assert len(table) == 4 and (table["shape"] == equal.resolved(teacher)).sum() == 1


def test_fewer_layers_are_predicted_to_end_further_away_than_their_jump_says(tokenizer, monkeypatch):
    monkeypatch.setattr(Training, "discrepancy", lambda training: {"kl": 1.0})
    teacher, given = random_model("bert"), Budget(parameters=1e6)
    others = [Widths(layers=1), Widths(ffn=28)]
    table = shapes(teacher, tokenizer, *blocks_for("bert", tokenizer), given, count=2, length=16, include=others)
    assert table["layers"].tolist() == [2, 1] and table["predicted"].tolist() == pytest.approx([1.0, 2**0.5])


def test_a_sentence_encoder(tokenizer):
    teacher = random_encoder("bert")
    ids = torch.randint(5, len(tokenizer), (40, 9), generator=torch.Generator().manual_seed(2)).tolist()
    sentences = Sentences.of(ids, 0, "")
    table = shapes(teacher, tokenizer, sentences, sentences, Budget(parameters=0.7 * teacher.num_parameters()), count=3)
    assert len(table) == 3 and table["predicted"].between(0, 2, inclusive="neither").all()


@pytest.mark.parametrize(
    "limits, words",
    [
        ({}, "the budget has no limit: give one of parameters, megabytes, flops, milliseconds"),
        ({"parameters": 0}, "parameters=0 is no limit of a budget: take a number above 0"),
        ({"flops": float("nan")}, "flops=nan is no limit"),
        ({"megabytes": True}, "megabytes=True is no limit"),
        ({"milliseconds": "10"}, "milliseconds=10 is no limit"),
    ],
)
def test_a_budget_that_is_none(limits, words):
    with pytest.raises(ValueError, match=words):
        Budget(**limits)


@pytest.mark.parametrize(
    "limits, words",
    [
        ({"parameters": 100}, r"parameters=100 is below the \d+ of the smallest shape, Widths.*trim the vocabulary"),
        ({"parameters": 1e9, "milliseconds": 1}, r"milliseconds=1 is below the \d+\.\d+ of the smallest shape"),
    ],
)
def test_a_budget_below_every_shape(limits, words, tokenizer, monkeypatch):
    monkeypatch.setattr(budget, "_scored", None)  # is not called
    with pytest.raises(ValueError, match=words) as refusal:
        shapes(random_model("bert"), tokenizer, *blocks_for("bert", tokenizer), Budget(**limits), length=16)
    assert "\n" not in str(refusal.value)


def test_latencies_that_exceed_their_fit(tokenizer, monkeypatch):
    timed = []

    def slow(models, *_):
        timed.append(models)
        late = len(timed) > 13 and len(timed) % 2  # after the teacher, then six shapes, each with the teacher before it
        return {name: 9.0 if late else model.num_parameters() / 1e4 for name, model in models.items()}

    monkeypatch.setattr(budget, "latency", slow)
    with pytest.raises(ValueError, match=r"no shape was measured within .*: the nearest took 9 milliseconds"):
        found("bert", tokenizer, milliseconds=0.02)


def test_load_that_comes_later_cancels_out(monkeypatch):
    teacher, load = random_model("bert"), [1.0]
    monkeypatch.setattr(
        budget, "latency", lambda models, *_: {name: load[0] * each.num_parameters() for name, each in models.items()}
    )
    costs, smaller = budget._Costs(teacher, budget._changeable(teacher), 16), random_model("bert", ffn=3)
    quiet = costs.milliseconds(smaller)
    load[0] = 3.0
    assert costs.milliseconds(smaller) == pytest.approx(quiet) == smaller.num_parameters()


def test_a_latency_is_fitted_for_layers_operations_and_the_head(monkeypatch):
    """Exactly, if it consists of these: a budget of milliseconds is then used up by shapes of any depth."""
    teacher = random_model("bert")
    costs = budget._Costs(teacher, budget._changeable(teacher), 16)

    def milliseconds(shape: Widths) -> float:
        return 0.5 + 0.2 * shape.layers + 1e-6 * costs.flops(shape) + 0.01 * shape.hidden

    def latency(models, *_):
        return {name: milliseconds(Widths.of(model)) for name, model in models.items()}

    monkeypatch.setattr(budget, "latency", latency)
    costs.of_teacher = milliseconds(Widths.of(teacher))
    fitted = costs._milliseconds(costs.flops)
    for change in ({"layers": 1}, {"ffn": 5}, {"heads": 2}, {"hidden": 12, "layers": 2}):
        shape = Widths(**change).resolved(teacher)
        assert fitted(shape) == pytest.approx(milliseconds(shape), rel=1e-6)


def test_a_run_takes_a_shape_and_no_budget():
    with pytest.raises(ValueError, match=r"or Widths \(for a Budget: hdlib.lab.shapes\); got Budget"):
        hdlib.DistillConfig(target=Budget(parameters=1e6))
