"""How much may stay: the kept fraction r(t) of every width, a pure function of the step.

All three start at 1, never rise, and end at `final`. The cubic is the paper's: it cuts quickly while
there is much to spare and slows down where every neuron counts.
"""


def cubic(step: int, start: int, end: int, final: float) -> float:
    """r = 1 up to start; r_f + (1 - r_f) (1 - (t - t_i) / (t_f - t_i))^3; r_f from end on (HomoDistil, PLATON).

    Args:
        step: t, counted from 0.
        start: t_i, the last step at full width.
        end: t_f, the first step at the final width; above start.
        final: r_f, the fraction kept in the end, in (0, 1].

    Returns:
        The fraction of neurons to keep, in [final, 1].
    """
    return final + (1 - final) * (1 - _progress(step, start, end)) ** 3


def linear(step: int, start: int, end: int, final: float) -> float:
    """r falls from 1 at start to `final` at end along a straight line. Arguments as for `cubic`."""
    return final + (1 - final) * (1 - _progress(step, start, end))


def one_shot(step: int, start: int, end: int, final: float) -> float:
    """r = 1 before start and `final` from start on: everything at once. `end` is not used."""
    return 1.0 if step < start else final


def _progress(step: int, start: int, end: int) -> float:
    if not end > start:
        raise ValueError(f"the schedule must end after it starts: start {start}, end {end}")
    return min(max((step - start) / (end - start), 0.0), 1.0)


SCHEDULES = {"cubic": cubic, "linear": linear, "one_shot": one_shot}
