"""The invariants for every family, every width and three ratios; for random shapes; for the embedded teacher.

One case is one model and one shape with all eight invariants. `pytest --hypothesis-profile long
tests/test_invariants.py -k random_shapes` tests 10,000 random shapes instead of about a hundred.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hdlib
from hdlib import Widths
from hdlib.models import forward

import invariants
from conftest import full, random_batch, random_bert
from models import KINDS, models_and_widths, narrower, random_model
from reference import Doubles, masked

RATIOS = (0.9, 0.5, 0.29)
TRAINED = ("albert, two groups", "gpt2", "qwen2")  # twenty times, by default


def cases() -> Iterator:
    """Every family, width and ratio; by default one width and ratio for each family, so that all pairs of both occur.

    With the random shapes below, about fifty shapes are in the default set.
    """
    seen = Counter()  # how often a pair of a width and a ratio was chosen
    for name in KINDS:
        pairs = list(product(narrower(name, random_model(name), 0.5), RATIOS))
        chosen = min(pairs, key=seen.__getitem__)
        seen[chosen] += 1
        for width, ratio in pairs:
            marks = () if (width, ratio) == chosen else pytest.mark.full
            yield pytest.param(name, width, ratio, id=f"{name}-{width}-{ratio}", marks=marks)


def test_every_width_meets_every_ratio_by_default():
    chosen = {tuple(case.values[1:]) for case in cases() if not case.marks}
    assert chosen == set(product(("ffn", "all", "heads", "head_dim", "hidden", "layers"), RATIOS))


@pytest.mark.parametrize("name, width, ratio", cases())
def test_every_family_width_and_ratio(name, width, ratio, tmp_path):
    model = random_model(name, layers=3 if width == "layers" else 2)
    shape = narrower(name, model, ratio)[width]
    invariants.eight(model, shape, random_batch(size=4), tmp_path)
    invariants.mask_equals_narrow(model, shape, random_batch(size=4))  # and to 1e-5 in float32


@settings(max_examples=settings.default.max_examples // 6)
@given(drawn=models_and_widths(least_hidden=3))  # a norm over two coordinates is constant and has no gradient
def test_random_shapes(tmp_path_factory, drawn):
    _, model, widths = drawn
    invariants.eight(model, widths, random_batch(size=4), tmp_path_factory.mktemp("student"))


@settings(max_examples=settings.default.max_examples // 2)
@given(drawn=models_and_widths())
def test_mask_equals_narrow_down_to_one_neuron(drawn):
    _, model, widths = drawn
    with Doubles():
        invariants.mask_equals_narrow(model.double(), widths, random_batch(), 1e-6)
        invariants.asked_is_got(model.float(), widths, random_batch())


@pytest.mark.parametrize("name", [*TRAINED, *full(*(name for name in KINDS if name not in TRAINED))])
def test_twenty_prunes_with_training_between_them(name, tmp_path):
    """After each: widths, every parameter in the optimiser once and changing, ties; every tenth model is saved."""
    model = random_model(name, heads=6, head_dim=8, ffn=90, hidden=66, groups=3, layers=3)
    least = narrower(name, model, 0.2)["layers" if KINDS[name].deep else "all"]
    shapes = [Widths.of(model).between(least, step / 20, model) for step in range(1, 21)]
    assert len(set(shapes)) > 10 and shapes[-1] == least
    prunes = []

    def check(student):
        prunes.append(Widths.of(student))
        if len(prunes) % 10 == 0:
            invariants.opens_stock(student, model, random_batch(), tmp_path / str(len(prunes)))

    invariants.live_optimizer(model, shapes, random_batch(), check)
    assert prunes == shapes


@given(st.integers(0, 10**6))
def test_a_masked_bert_computes_what_the_narrowed_one_does(seed):
    """The masks act on the activations of a full-width stock BERT; they do not use the width groups."""
    model = random_bert(heads=5, head_dim=4, ffn=33, seed=seed % 1000)
    scores = {
        name: torch.rand(group.size, generator=torch.Generator().manual_seed(seed))
        for name, group in hdlib.width_groups(model).items()
    }
    input_ids, _ = random_batch(seed=seed)
    student = copy.deepcopy(model)
    kept = hdlib.narrow(student, Widths(hidden=9, ffn=20, heads=3, head_dim=3), scores)
    with torch.no_grad(), masked(model, kept):
        expected = forward(model, input_ids)
    got = forward(student, input_ids)
    invariants.close(got.logits, expected.logits)
    for layer, (narrow, wide) in enumerate(zip(got.attentions, expected.attentions, strict=True)):
        invariants.close(narrow.scores(), wide.scores()[:, kept[f"layer.{layer}.heads"]])


@pytest.fixture(scope="module")
def embedded():
    teacher, tokenizer = hdlib.load_teacher()
    text = "The student starts as a copy of its teacher and is narrowed step by step while it learns. " * 6
    input_ids = torch.tensor([tokenizer(text)["input_ids"][:48], tokenizer(text[25:])["input_ids"][:48]])
    labels = torch.full_like(input_ids, -100)
    labels[:, 3::6] = input_ids[:, 3::6]
    return teacher, (input_ids.index_fill(1, torch.arange(3, 48, 6), tokenizer.mask_token_id), labels)


def test_identity_on_the_embedded_teacher(embedded):
    invariants.identity(*embedded)


@pytest.mark.parametrize("ratio", [RATIOS[0], *full(*RATIOS[1:])])
def test_exact_narrowing_of_the_embedded_teacher(embedded, ratio, tmp_path):
    teacher, batch = embedded
    widths = Widths.at(teacher, ratio)
    invariants.mask_equals_narrow(teacher, widths, batch)
    invariants.stock(teacher, widths, batch, tmp_path / "student")
    invariants.asked_is_got(teacher, widths, batch)


def test_live_optimizer_on_the_embedded_teacher(embedded):
    teacher, batch = embedded
    invariants.live_optimizer(teacher, [Widths.at(teacher, 0.29)], batch)


def test_taylor_on_the_embedded_teacher(embedded):
    teacher, batch = embedded
    invariants.taylor(hdlib.models.student_of(teacher), batch, neurons=1)
