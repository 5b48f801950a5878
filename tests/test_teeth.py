"""The invariants can fail: the library is broken on purpose, and each of them must see it."""

import pytest
import torch

import hdlib
from hdlib import Widths, narrowing
from hdlib.scorers import Sensitivity

import invariants
from conftest import random_batch, random_bert

NARROW = Widths(hidden=12, ffn=20, head_dim=3, heads=4)


def red(check, *arguments) -> None:
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(*arguments)


def test_identity_sees_a_student_with_dropout(monkeypatch):
    monkeypatch.setattr(invariants, "student_of", lambda teacher: hdlib.models.student_of(teacher).train())
    red(invariants.identity, random_bert(), random_batch())


def test_identity_sees_projections_that_are_not_the_identity(monkeypatch):
    monkeypatch.setattr(torch, "eye", lambda *size: torch.ones(*size) / 7)
    red(invariants.identity, random_bert(), random_batch())


def test_mask_equals_narrow_sees_a_stale_attention_scale(monkeypatch):
    monkeypatch.setattr(narrowing.math, "sqrt", lambda _: 1.0)
    red(invariants.mask_equals_narrow, random_bert(), NARROW, random_batch())


def test_mask_equals_narrow_sees_unpaired_query_and_key(monkeypatch):
    """Every axis takes the first neurons instead of the kept ones, in one matrix only."""
    take = narrowing._take

    def careless(tensor, axes, kept):
        first = {name: torch.arange(len(indices)) for name, indices in kept.items()}
        return take(tensor, axes, first if axes == ("layer.1.query_key", "hidden") else kept)

    monkeypatch.setattr(narrowing, "_take", careless)
    red(invariants.mask_equals_narrow, random_bert(), NARROW, random_batch())


def test_stock_sees_ties_that_were_cut(monkeypatch, tmp_path):
    narrow = hdlib.narrow

    def untied(model, *arguments, **options):
        kept = narrow(model, *arguments, **options)
        decoder = model.cls.predictions.decoder
        decoder.weight = torch.nn.Parameter(decoder.weight.detach() * 1.01)
        return kept

    monkeypatch.setattr(hdlib, "narrow", untied)
    red(invariants.stock, random_bert(), NARROW, random_batch(), tmp_path)


def test_stock_sees_a_config_that_was_not_updated(monkeypatch, tmp_path):
    model, set_widths = random_bert(), narrowing.set_widths
    monkeypatch.setattr(narrowing, "set_widths", lambda c, w: None if c is model.config else set_widths(c, w))
    monkeypatch.setattr(invariants, "student_of", lambda _: model)
    red(invariants.stock, random_bert(), NARROW, random_batch(), tmp_path)


def test_asked_is_got_sees_a_neuron_too_many(monkeypatch):
    between = Widths.resolved
    monkeypatch.setattr(Widths, "resolved", lambda self, model: between(Widths(hidden=16, ffn=20, heads=4), model))
    red(invariants.asked_is_got, random_bert(), NARROW, random_batch())


def test_asked_is_got_sees_shuffled_neurons(monkeypatch):
    monkeypatch.setattr(narrowing, "_highest", lambda scores, count: scores.argsort(descending=True)[:count])
    red(invariants.asked_is_got, random_bert(), NARROW, random_batch())


def test_live_optimizer_sees_parameters_that_were_lost(monkeypatch):
    narrow = hdlib.narrow
    monkeypatch.setattr(hdlib, "narrow", lambda model, widths, scores, optimizer: narrow(model, widths, scores))
    red(invariants.live_optimizer, random_bert(), [NARROW], random_batch())


def test_live_optimizer_sees_moments_of_other_neurons(monkeypatch):
    replace = narrowing.replace_parameter

    def careless(old, new, sites, optimizer, take, factor=1.0):
        replace(old, new, sites, optimizer, lambda tensor: take(tensor).flip(0), factor)

    monkeypatch.setattr(narrowing, "replace_parameter", careless)
    red(invariants.live_optimizer, random_bert(), [NARROW], random_batch())


@pytest.mark.parametrize(
    "element",
    [
        lambda self, parameter, gradient: parameter.abs(),
        lambda self, parameter, gradient: gradient.abs(),
        lambda self, parameter, gradient: 1.01 * (parameter * gradient).abs(),
    ],
)
def test_taylor_sees_another_score(monkeypatch, element):
    monkeypatch.setattr(Sensitivity, "element", element)
    red(invariants.taylor, random_bert(), random_batch())


def test_taylor_sees_an_element_counted_twice(monkeypatch):
    sums = hdlib.scorers._neuron_sums

    def twice(element, axes):
        return list(sums(element, axes))[: len(axes)]

    monkeypatch.setattr(hdlib.scorers, "_neuron_sums", twice)
    red(invariants.taylor, random_bert(), random_batch())
