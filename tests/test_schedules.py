"""Schedules: end points exact, never rising, the published formula."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hdlib

SCHEDULES = [hdlib.cubic, hdlib.linear, hdlib.one_shot]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(start=st.integers(0, 500), span=st.integers(1, 500), final=st.floats(0.01, 1.0))
def test_schedules_fall_from_one_to_final(schedule, start, span, final):
    kept = [schedule(step, start, start + span, final) for step in range(0, start + span + 20)]
    before = start if schedule is hdlib.one_shot else start + 1
    assert kept[:before] == [1.0] * before
    assert kept[start + span :] == [final] * 20
    assert all(late <= early for early, late in pairwise(kept))


def test_cubic_is_the_papers_formula():
    r_f, t_i, t_f = 0.29, 100, 1400
    for t in range(t_i, t_f + 1, 50):
        expected = r_f + (1 - r_f) * (1 - (t - t_i) / (t_f - t_i)) ** 3
        assert hdlib.cubic(t, t_i, t_f, r_f) == pytest.approx(expected, rel=1e-12)


def test_one_shot_is_final_from_the_start():
    assert [hdlib.one_shot(step, 7, 9, 0.3) for step in (6, 7, 8)] == [1.0, 0.3, 0.3]


def test_an_end_before_the_start_is_refused():
    with pytest.raises(ValueError, match="end after it starts"):
        hdlib.cubic(3, 10, 10, 0.5)
