"""The kept fraction r(t) of every width, as a pure function of the step t.

All three schedules start at 1, never rise, and end at `final`.
"""


def cubic(step: int, start: int, end: int, final: float) -> float:
    """r = 1 up to t_i; r_f + (1 - r_f) (1 - (t - t_i) / (t_f - t_i))^3 up to t_f; then r_f (HomoDistil, PLATON).

    Args:
        step: t, counted from 0.
        start: t_i, the last step at full width.
        end: t_f, the first step at the final width.
        final: r_f, the fraction kept at the end, in (0, 1].

    Returns:
        The fraction of neurons to keep, in [final, 1]. Raises ValueError unless end is above start.
    """
    return final + (1 - final) * (1 - _progress(step, start, end)) ** 3


def linear(step: int, start: int, end: int, final: float) -> float:
    """A straight line from 1 at start to `final` at end. Arguments as for `cubic`."""
    return final + (1 - final) * (1 - _progress(step, start, end))


def one_shot(step: int, start: int, end: int, final: float) -> float:
    """1 before start, `final` from start on. `end` is not used."""
    return 1.0 if step < start else final


def _progress(step: int, start: int, end: int) -> float:
    if end <= start:
        raise ValueError(f"the schedule must end after it starts; got start={start}, end={end}")
    return min(max((step - start) / (end - start), 0.0), 1.0)


SCHEDULES = {"cubic": cubic, "linear": linear, "one_shot": one_shot}
