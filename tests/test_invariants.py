"""What must always hold, on random BERT shapes and on the embedded teacher."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import hdlib
from hdlib import Widths

import invariants
from conftest import random_batch, random_bert

RATIOS = (0.9, 0.5, 0.29)


@st.composite
def berts(draw):
    """Heads 2 to 12, any head size, uneven feed-forward ratios."""
    heads = draw(st.integers(2, 12))
    return random_bert(
        heads=heads,
        head_dim=draw(st.integers(2, 7)),
        ffn=draw(st.integers(5, 90)),
        layers=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def berts_and_widths(draw):
    """A model and a shape it can become: any feed-forward width, fewer dimensions a head, fewer heads."""
    model = draw(berts())
    wide = Widths.of(model)
    heads, head_dim = draw(st.integers(1, wide.heads)), draw(st.integers(1, wide.head_dim))
    ffn = draw(st.integers(1, wide.ffn))
    return model, Widths(hidden=heads * head_dim, ffn=ffn, head_dim=head_dim, heads=heads)


@given(berts())
def test_identity(model):
    invariants.identity(model, random_batch())


@given(berts_and_widths())
def test_mask_equals_narrow(drawn):
    invariants.mask_equals_narrow(*drawn, random_batch())


@given(berts_and_widths())
def test_stock(tmp_path_factory, drawn):
    invariants.stock(*drawn, random_batch(), tmp_path_factory.mktemp("student"))


@given(berts_and_widths())
def test_asked_is_got(drawn):
    invariants.asked_is_got(*drawn, random_batch())


@given(berts_and_widths())
def test_live_optimizer(drawn):
    model, narrow = drawn
    assume(narrow.hidden > 2)  # a norm over one or two coordinates is constant: nothing before it can move
    wide = Widths.of(model)
    invariants.live_optimizer(model, [wide.between(narrow, p) for p in (0.2, 0.6, 1.0)], random_batch())


@given(berts())
def test_taylor(model):
    invariants.taylor(model, random_batch())


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


@pytest.mark.parametrize("ratio", RATIOS)
def test_exact_narrowing_of_the_embedded_teacher(embedded, ratio, tmp_path):
    teacher, batch = embedded
    widths = Widths.at(teacher, ratio)
    invariants.mask_equals_narrow(teacher, widths, batch)
    invariants.stock(teacher, widths, batch, tmp_path / "student")
    invariants.asked_is_got(teacher, widths, batch)


def test_live_optimizer_on_the_embedded_teacher(embedded):
    teacher, batch = embedded
    invariants.live_optimizer(teacher, [Widths.at(teacher, ratio) for ratio in RATIOS], batch)


def test_taylor_on_the_embedded_teacher(embedded):
    teacher, batch = embedded
    invariants.taylor(hdlib.models.student_of(teacher), batch, neurons=2)
