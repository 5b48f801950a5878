"""The invariants can fail: each test breaks the library on purpose, and one invariant must turn red."""

import copy
from dataclasses import replace
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch

import hdlib
from hdlib import DistillationLoss, Widths, losses, narrowing
from hdlib.data import TrainingBatches
from hdlib.families import FAMILIES, FIXED, HEADS, HIDDEN, KEY, QUERY, VALUE
from hdlib.scorers import Sensitivity
from hdlib.training import Training

import invariants
from conftest import random_batch, random_bert
from models import KINDS, narrower, random_model
from mutations import MUTATIONS, ROOT
from reference import Doubles

NARROW = Widths(hidden=12, ffn=20, head_dim=3, heads=4, layers=2)


def red(check, *arguments) -> None:
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(*arguments)


def test_identity_detects_a_student_with_dropout(monkeypatch):
    student_of = hdlib.models.student_of
    monkeypatch.setattr(hdlib.models, "student_of", lambda teacher: student_of(teacher).train())
    red(invariants.identity, random_bert(), random_batch())


def test_identity_detects_projections_that_are_not_the_identity(monkeypatch):
    begin = DistillationLoss.__init__

    def skewed(self, *arguments, **options):
        begin(self, *arguments, **options)
        for projection in self.parameters():
            projection.data += 1 / 7

    monkeypatch.setattr(DistillationLoss, "__init__", skewed)
    red(invariants.identity, random_bert(), random_batch())


def test_mask_equals_narrow_detects_a_stale_attention_scale(monkeypatch):
    monkeypatch.setattr(narrowing, "math", SimpleNamespace(sqrt=lambda _: 1.0))
    red(invariants.mask_equals_narrow, random_bert(), NARROW, random_batch())


def test_mask_equals_narrow_detects_unpaired_query_and_key(monkeypatch):
    """One layer keeps the first queries instead of the important ones."""
    narrow_parameter = narrowing._narrow_parameter

    def careless(parameter, sites, axes, kept, *others):
        first = {name: torch.arange(len(indices)) for name, indices in kept.items()}
        queries = axes[0] and axes[0][0].group == "layer.1.query_key" and axes[0][0].scaled
        narrow_parameter(parameter, sites, axes, first if queries else kept, *others)

    monkeypatch.setattr(narrowing, "_narrow_parameter", careless)
    red(invariants.mask_equals_narrow, random_bert(), NARROW, random_batch())


def test_stock_detects_ties_that_were_broken(monkeypatch, tmp_path):
    narrow = hdlib.narrow

    def untied(model, *arguments, **options):
        kept = narrow(model, *arguments, **options)
        decoder = model.cls.predictions.decoder
        decoder.weight = torch.nn.Parameter(decoder.weight.detach() * 1.01)
        return kept

    monkeypatch.setattr(hdlib, "narrow", untied)
    red(invariants.stock, random_bert(), NARROW, random_batch(), tmp_path)


def test_stock_detects_a_config_that_was_not_updated(monkeypatch, tmp_path):
    model, set_widths = random_bert(), narrowing.set_widths
    monkeypatch.setattr(narrowing, "set_widths", lambda m, c, *w: None if c is model.config else set_widths(m, c, *w))
    monkeypatch.setattr(hdlib.models, "student_of", lambda _: model)
    red(invariants.stock, random_bert(), NARROW, random_batch(), tmp_path)


def test_asked_is_got_detects_wrong_widths(monkeypatch):
    between = Widths.resolved
    monkeypatch.setattr(Widths, "resolved", lambda self, model: between(Widths(hidden=16, ffn=20, heads=4), model))
    red(invariants.asked_is_got, random_bert(), NARROW, random_batch())


def test_asked_is_got_detects_shuffled_neurons(monkeypatch):
    monkeypatch.setattr(narrowing, "_highest", lambda scores, count: scores.argsort(descending=True)[:count])
    red(invariants.asked_is_got, random_bert(), NARROW, random_batch())


def test_live_optimizer_detects_lost_parameters(monkeypatch):
    narrow = hdlib.narrow
    monkeypatch.setattr(hdlib, "narrow", lambda model, widths, scores, optimizer: narrow(model, widths, scores))
    red(invariants.live_optimizer, random_bert(), [NARROW], random_batch())


def test_live_optimizer_detects_moments_of_other_neurons(monkeypatch):
    replace = narrowing.replace_parameter

    def careless(old, new, sites, optimizer, take, factor=1.0):
        replace(old, new, sites, optimizer, lambda tensor: take(tensor).flip(0), factor)

    monkeypatch.setattr(narrowing, "replace_parameter", careless)
    red(invariants.live_optimizer, random_bert(), [NARROW], random_batch())


def test_live_optimizer_detects_second_moments_that_are_scaled_once(monkeypatch):
    monkeypatch.setattr(narrowing, "_divided", lambda value, factor, _: value if factor is None else value / factor)
    red(invariants.live_optimizer, random_bert(), [NARROW], random_batch())


@pytest.mark.parametrize(
    "element",
    [
        lambda self, parameter, gradient: parameter.abs(),
        lambda self, parameter, gradient: gradient.abs(),
        lambda self, parameter, gradient: 1.01 * (parameter * gradient).abs(),
    ],
)
def test_taylor_detects_another_score(monkeypatch, element):
    monkeypatch.setattr(Sensitivity, "element", element)
    red(invariants.taylor, random_bert(), random_batch())


def test_taylor_detects_an_element_counted_twice(monkeypatch):
    owned = hdlib.scorers._owned

    def twice(element, axes):
        return list(owned(element, axes))[: len(axes)]  # without the subtraction where two axes cross

    monkeypatch.setattr(hdlib.scorers, "_owned", twice)
    red(invariants.taylor, random_bert(), random_batch())


def _no_moment(state):
    next(iter(state["optimizer"]["state"].values()))["exp_avg"].zero_()


def _other_neurons(state):
    state["kept"]["hidden"] = state["kept"]["hidden"] + 1


def _no_averages(state):
    for average in state["importance"]["averages"].values():
        average.zero_()


def _no_projection(state):
    state["loss"]["embedding_projection"].zero_()


@pytest.mark.parametrize("lose", [_no_moment, _other_neurons, _no_averages, _no_projection])
def test_resume_detects_a_checkpoint_that_loses_something(monkeypatch, tmp_path, lose):
    state = Training.state

    def forgetful(self):
        kept = copy.deepcopy(state(self))
        lose(kept)
        return kept

    monkeypatch.setattr(Training, "state", forgetful)
    red(invariants.resume, random_bert(), NARROW, random_batch(), tmp_path)


def test_processes_detects_a_loss_that_is_divided_by_its_own_labels(monkeypatch):
    mlm_loss = losses.mlm_loss
    monkeypatch.setattr(losses, "mlm_loss", lambda logits, labels, count=None: mlm_loss(logits, labels))
    with Doubles():
        red(invariants.processes, random_bert().double(), NARROW, random_batch(size=8))


def test_processes_detects_batches_that_count_their_own_labels(monkeypatch):
    batch_of = TrainingBatches.__getitem__

    def careless(self, step):
        batch = batch_of(self, step)
        return batch | {"label_count": (batch["labels"] >= 0).sum()}

    monkeypatch.setattr(TrainingBatches, "__getitem__", careless)
    with Doubles():
        red(invariants.processes, random_bert().double(), NARROW, random_batch(size=8))


# A family with one wrong entry in its table fails its invariants.
@pytest.mark.parametrize(
    "name, width, pattern, row",
    [
        (
            "gpt2",
            "head_dim",
            "*.attn.c_attn.weight",
            (HIDDEN, (KEY, KEY, VALUE)),
        ),  # no parameter absorbs the attention scale
        ("gpt2", "head_dim", "*.attn.c_attn.weight", (HIDDEN, (QUERY, VALUE, KEY))),
        ("bert", "head_dim", "*.self.query.weight", (VALUE, HIDDEN)),
        ("bert", "head_dim", "*.self.query.bias", (KEY,)),
        ("bert", "head_dim", "*.self.key.bias", (QUERY,)),
        ("bert", "head_dim", "*.attention.output.dense.weight", (HIDDEN, KEY)),
        ("deberta-v2", "head_dim", "*.self.pos_query_proj.weight", (KEY, HIDDEN)),
        ("modernbert", "heads", "*.attn.Wqkv.weight", (HEADS, HIDDEN)),
        ("gpt_neox", "heads", "*.attention.query_key_value.weight", ((HEADS, HEADS, HEADS), HIDDEN)),
        ("modernbert", "ffn", "*.mlp.Wi.weight", (FIXED, HIDDEN)),
        ("mpnet", "heads", "*relative_attention_bias.weight", (FIXED, FIXED)),
    ],
)
def test_mask_equals_narrow_detects_a_wrong_row(monkeypatch, name, width, pattern, row):
    declared = FAMILIES[KINDS[name].config.model_type]
    others = {other: axes for other, axes in declared.axes.items() if other != pattern}
    broken = replace(declared, axes={pattern: row} | others)  # the first match counts
    model = random_model(name)
    assert any(fnmatchcase(parameter, pattern) for parameter, _ in model.named_parameters())
    widths = narrower(name, model, 0.5)[width]
    invariants.mask_equals_narrow(model, widths, random_batch())
    monkeypatch.setitem(FAMILIES, KINDS[name].config.model_type, broken)
    red(invariants.mask_equals_narrow, model, widths, random_batch())


@pytest.mark.parametrize("part", dict.fromkeys(part for part, *_ in MUTATIONS))
def test_every_mutation_still_applies(part):
    text = (ROOT / "hdlib" / f"{part}.py").read_text()
    assert [old for name, old, _ in MUTATIONS if name == part and text.count(old) != 1] == []
