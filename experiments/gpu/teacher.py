"""Train the language model of the pack on the pack's text: a teacher that was trained little is not worth distilling.

For the model of `experiments.make_wide_teacher`, in as many steps as the time allows. The study takes the result, which
is in the folder `teacher`. A sentence encoder stays as it is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import perf_counter

import hdlib
from hdlib.checkpoints import save_folder
from hdlib.data import Masking, TrainingBatches, longest
from hdlib.models import is_encoder

from ..make_wide_teacher import fit
from .part import Part

BATCH, RATE = 128, 2e-4
TIMED = 20  # steps at a rate of 0, after as many that warm up, from which the number of steps follows
LEFT = 0.7  # of the time, for the steps


def run(part: Part) -> None:
    model, tokenizer, train, held_out = part.data()
    if not is_encoder(model):
        part.item("teacher", partial(_trained, part, model.to(part.device), tokenizer, train, held_out))


def _trained(part: Part, model, tokenizer, train, held_out) -> dict:
    batches = TrainingBatches(train, Masking.of(tokenizer), 2 if part.plan.dry else BATCH, seed=0)
    train_for = partial(fit, model, [*model.parameters()], batches, precision="bfloat16")
    before = _measured(model, held_out)
    for _ in range(2):
        started = perf_counter()
        train_for(1 if part.plan.dry else TIMED, 0.0)
        seconds = (perf_counter() - started) / TIMED
    steps = 2 if part.plan.dry else int(LEFT * part.seconds_left / seconds)
    train_for(steps, RATE)
    save_folder(Path(part.plan.out) / "teacher", model.cpu(), tokenizer)
    model.to(part.device)
    tokens = steps * batches.batch_size * longest(train)
    found = {"steps": steps, "tokens": tokens, "seconds a step": seconds}
    return found | {"before": before, "after": _measured(model, held_out)}


def _measured(model, held_out) -> dict[str, float]:
    measured = hdlib.discrepancy(model, model, held_out, batch_size=64)
    return {name: measured[name] for name in ("accuracy", "mlm")}
