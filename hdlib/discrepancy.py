"""Held-out measures of how far a student is from its teacher."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .data import batches
from .losses import IGNORED, attention_divergence, mlm_loss, prediction_loss, select_heads
from .models import forward
from .widths import Widths


@torch.no_grad()
def discrepancy(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks,
    batch_size: int = 16,
    neurons: Tensor | None = None,
    heads: Tensor | None = None,
) -> dict[str, float]:
    """The prediction discrepancy and related measures on held-out blocks.

    Args:
        student, teacher: models with their heads over one vocabulary; measured in eval mode, then set back.
        blocks: held-out blocks with `labels` for the masked tokens, or in causal models for all that have a next one.
        batch_size: blocks per forward; affects memory only.
        neurons: for a student under masks, the indices of the hidden neurons that are not masked; None: all.
        heads: (L, Hs), the index of the teacher's head for each head of the student; None: the same heads.

    Returns:
        kl: KL(teacher || student), nats per labelled token (the paper's discrepancy); 0.0 if identical.
        agreement: fraction of labelled tokens with the same top-1 prediction; 1.0 if identical.
        mlm, teacher_mlm: cross-entropy of the student and of the teacher, nats per labelled token.
        accuracy, teacher_accuracy: fraction of labelled tokens predicted correctly.
        hidden: mean squared error of the teacher's hidden states after a linear least-squares fit on the student's,
            which may have another width; mean over layers and elements; 0.0 up to rounding if identical.
        hidden_1 to hidden_L: this error of each layer over the mean square of its states, in [0, 1].
        attention_1 to attention_L: KL(teacher || student) of the attention probabilities, nats, mean over heads and
            tokens; 0.0 if identical. Left out if the student has fewer heads and `heads` is None.

    Raises ValueError if the blocks have no labelled token.
    """
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    if heads is None and Widths.of(student).heads == Widths.of(teacher).heads:
        heads = torch.arange(Widths.of(teacher).heads).repeat(teacher.config.num_hidden_layers, 1)
    sums, counts, fits = Counter(), Counter(), defaultdict(_LinearFit)
    for batch in batches(blocks, batch_size, device=student.device):
        loss_positions, mask = batch["labels"] != IGNORED, batch.get("attention_mask")  # (B, S)
        student_outputs = forward(student, batch["input_ids"], loss_positions, mask)
        teacher_outputs = forward(teacher, batch["input_ids"], loss_positions, mask)
        labels = batch["labels"][loss_positions]  # (N,)
        for name, mean, count in _means(student_outputs, teacher_outputs, labels, heads, mask):
            sums[name] += mean.double() * count
            counts[name] += count
        hidden_states = zip(student_outputs.hidden_states[1:], teacher_outputs.hidden_states[1:], strict=True)
        for layer, (states, targets) in enumerate(hidden_states, 1):
            if neurons is not None and states.shape[-1] == student.config.hidden_size:
                states = states[..., neurons.to(states.device)]
            real = torch.ones_like(loss_positions) if mask is None else mask.bool()
            fits[layer].add(states[real], targets[real])
    student.train(modes[0]), teacher.train(modes[1])
    if "kl" not in sums:
        raise ValueError("the held-out blocks have no labelled position: pass the validation blocks of load_corpus")
    errors, shares = zip(*(fit.errors() for fit in fits.values()), strict=True)
    means = {name: float(total) / counts[name] for name, total in sums.items()} | {"hidden": sum(errors) / len(errors)}
    return means | {f"hidden_{layer}": share for layer, share in enumerate(shares, 1)}


def _means(student, teacher, labels: Tensor, heads, attention_mask: Tensor | None) -> Iterator[tuple[str, Tensor, int]]:
    """Name, mean and number of tokens of each measure, from the outputs on one batch; labels (N,), heads (L, Hs)."""
    if len(labels):  # the mean over no token is not a number
        top, teacher_top = student.logits.argmax(-1), teacher.logits.argmax(-1)  # (N,)
        yield "kl", prediction_loss(student.logits, teacher.logits), len(labels)
        yield "agreement", (top == teacher_top).float().mean(), len(labels)
        yield "mlm", mlm_loss(student.logits, labels), len(labels)
        yield "teacher_mlm", mlm_loss(teacher.logits, labels), len(labels)
        yield "accuracy", (top == labels).float().mean(), len(labels)
        yield "teacher_accuracy", (teacher_top == labels).float().mean(), len(labels)
    tokens = student.hidden_states[0][..., 0].numel() if attention_mask is None else int(attention_mask.sum())
    for layer, kept in enumerate(() if heads is None else heads):
        pair = (select_heads(outputs.attentions[layer], kept) for outputs in (student, teacher))
        yield f"attention_{layer + 1}", attention_divergence(*pair, attention_mask), tokens


class _LinearFit:
    """Least-squares fit of teacher states on student states, from running sums: memory does not grow with tokens."""

    def __init__(self):
        self.inner = self.cross = self.targets = 0.0  # X'X (Ds, Ds), X'Y (Ds, Dt), sum of Y^2
        self.elements = 0

    def add(self, states: Tensor, targets: Tensor) -> None:
        states, targets = states.double(), targets.double()  # (N, Ds), (N, Dt)
        self.inner = self.inner + F.linear(states.T, states.T)
        self.cross = self.cross + F.linear(states.T, targets.T)
        self.targets = self.targets + targets.square().sum()
        self.elements += targets.numel()

    def errors(self) -> tuple[float, float]:
        """Mean squared error of the fit, and as a share of the targets' mean square; nan if a state was not finite."""
        if not torch.isfinite(self.inner).all():
            return float("nan"), float("nan")
        inner, cross = self.inner.cpu(), self.cross.cpu()  # "gelsd" handles rank deficiency and exists on CPUs only
        weights = torch.linalg.lstsq(inner, cross, driver="gelsd").solution  # (Ds, Dt)
        mean_square, explained = float(self.targets) / self.elements, float((weights * cross).sum()) / self.elements
        error = max(mean_square - explained, 0.0)  # rounding can make the difference slightly negative
        return error, error / mean_square
