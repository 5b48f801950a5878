"""How far the student is from its teacher, measured on a fixed held-out set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .data import batches
from .losses import IGNORED, attention_divergence, mlm_loss, prediction_loss, select_heads
from .models import forward


@torch.no_grad()
def discrepancy(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks,
    batch_size: int = 16,
    neurons: Tensor | None = None,
    heads: Tensor | None = None,
) -> dict[str, float]:
    """The prediction discrepancy and its companions at the labelled positions of held-out blocks.

    Labelled are the masked tokens, or, for causal models, all that have a next one.

    Args:
        student, teacher: models with their heads over one vocabulary; put in eval mode for the measure.
        blocks: held-out blocks with fixed `labels`, as `load_corpus` returns for validation.
        batch_size: blocks a forward; changes nothing but memory.
        neurons: of a student under masks, the indices of its residual neurons that count; None for all.
        heads: (L, Hs), which of the teacher's heads each of the student's is; None: the same ones.

    Returns:
        kl: KL(teacher || student), nats a labelled token, mean (the paper's discrepancy); 0.0 if identical.
        agreement: share of these tokens on which the first guesses agree; 1.0 if identical.
        mlm: the student's own loss on them in nats, teacher_mlm the teacher's.
        accuracy, teacher_accuracy: share of them guessed right.
        hidden: mean squared difference between the teacher's hidden states and the best linear map of the
            student's (least squares over these tokens, so that any two widths compare), mean over
            layers and elements; 0.0 if identical, to rounding.
        hidden_1 to hidden_L: the same error of each layer, as a share of its states' mean square, so that layers
            compare; in [0, 1].
        attention_1 to attention_L: KL(teacher || student) of what a token attends to, nats, mean over heads and
            tokens; 0.0 if identical. Left out where the student has fewer heads and nobody says which.

    Raises:
        ValueError: no blocks, or no labelled position in them.
    """
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    sums: dict[str, Tensor] = {}
    fits: list[_LinearFit] = []
    positions = tokens = 0
    for batch in batches(blocks, batch_size, device=student.device):
        loss_positions = batch["labels"] != IGNORED
        labels, count = batch["labels"][loss_positions], int(loss_positions.sum())  # (N,)
        ours = forward(student, batch["input_ids"], loss_positions, batch.get("attention_mask"))
        theirs = forward(teacher, batch["input_ids"], loss_positions, batch.get("attention_mask"))
        if count:  # the mean over nothing is none
            for name, value in _position_means(ours.logits, theirs.logits, labels).items():
                sums[name] = sums.get(name, 0.0) + value.double() * count
        positions += count
        fits = fits or [_LinearFit() for _ in ours.hidden_states[1:]]
        real = batch.get("attention_mask", torch.ones_like(loss_positions)).bool()
        for name, value in _attention_means(ours, theirs, heads, batch.get("attention_mask")).items():
            sums[name] = sums.get(name, 0.0) + value.double() * real.sum()
        tokens += int(real.sum())
        for fit, states, targets in zip(fits, ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
            if neurons is not None and states.shape[-1] == student.config.hidden_size:
                states = states[..., neurons.to(states.device)]
            fit.add(states[real], targets[real])
    student.train(modes[0]), teacher.train(modes[1])
    if positions == 0:
        raise ValueError("the held-out blocks have no labelled position: pass the validation blocks of load_corpus")
    means = {name: float(value) / (tokens if "attention" in name else positions) for name, value in sums.items()}
    residuals = [fit.residual() for fit in fits]
    shares = [residual / fit.mean_square for residual, fit in zip(residuals, fits, strict=True)]
    by_layer = {f"hidden_{layer}": share for layer, share in enumerate(shares, 1)}
    return means | {"hidden": sum(residuals) / len(residuals)} | by_layer


def _position_means(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Everything that is a mean over the masked positions. student, teacher (N, V); labels (N,)."""
    guess, teacher_guess = student.argmax(-1), teacher.argmax(-1)  # (N,)
    return {
        "kl": prediction_loss(student, teacher),
        "agreement": (guess == teacher_guess).float().mean(),
        "mlm": mlm_loss(student, labels),
        "teacher_mlm": mlm_loss(teacher, labels),
        "accuracy": (guess == labels).float().mean(),
        "teacher_accuracy": (teacher_guess == labels).float().mean(),
    }


def _attention_means(ours, theirs, heads: Tensor | None, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """The attention's divergence in each layer, where heads can be paired."""
    if heads is None and ours.attentions[0].num_heads != theirs.attentions[0].num_heads:
        return {}
    means = {}
    for layer, pair in enumerate(zip(ours.attentions, theirs.attentions, strict=True), 1):
        if heads is not None:
            pair = [select_heads(recorded, heads[layer - 1]) for recorded in pair]
        means[f"attention_{layer}"] = attention_divergence(*pair, attention_mask)
    return means


class _LinearFit:
    """Least squares of teacher states on student states, from running sums: memory flat in tokens."""

    def __init__(self):
        self.inner = self.cross = self.targets = 0.0  # X'X (Ds, Ds), X'Y (Ds, Dt), sum of Y^2
        self.elements = 0

    def add(self, states: Tensor, targets: Tensor) -> None:
        states, targets = states.double(), targets.double()  # (N, Ds), (N, Dt)
        self.inner = self.inner + F.linear(states.T, states.T)
        self.cross = self.cross + F.linear(states.T, targets.T)
        self.targets = self.targets + targets.square().sum()
        self.elements += targets.numel()

    @property
    def mean_square(self) -> float:
        return float(self.targets) / self.elements

    def residual(self) -> float:
        """Mean squared error that the best linear map leaves; not a number if a state was not finite."""
        if not torch.isfinite(self.inner).all():
            return float("nan")
        inner, cross = self.inner.cpu(), self.cross.cpu()  # this driver, which bears rank deficiency, is the CPU's
        weights = torch.linalg.lstsq(inner, cross, driver="gelsd").solution  # (Ds, Dt)
        explained = (weights * cross).sum()
        left = self.mean_square - float(explained) / self.elements
        return 0.0 if left < 0 else left  # rounding can leave a little less than nothing
