"""The terms of the loss that touch most memory, a piece at a time, with their gradients made on the way.

Automatic differentiation would keep several (N, V) tensors of float32 for each term over the vocabulary, several
(B, H, S, S) ones for each layer's attention scores, and pass over memory for every one of them. Here a piece stays
in the processor's cache, and what is kept is the gradient alone, in the dtype and shape of what it belongs to (or
what is there anyway). The numbers are those of `torch.nn.functional`, which the tests compare them with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = {"cpu": 2**19}  # elements that are worked on at once: about a cache
PIECE_ELSEWHERE = 2**25  # a GPU would rather have few large pieces


class Divergence(torch.autograd.Function):
    """T^2 KL(teacher || student), mean over rows, from logits (N, V); no gradient for the teacher."""

    @staticmethod
    def forward(context, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student) if context.needs_input_grad[0] else None
        total = 0.0
        for rows in pieces(student, student.shape[1]):
            log_student = F.log_softmax(at_least_float32(student[rows]) / temperature, -1)
            log_teacher = F.log_softmax(at_least_float32(teacher[rows]) / temperature, -1)
            shares = log_teacher.exp()
            total = total + (log_teacher.sub_(log_student).mul_(shares)).sum()
            if gradient is not None:
                gradient[rows] = log_student.exp_().sub_(shares).mul_(temperature / len(student))
        context.save_for_backward(gradient)
        return total * (temperature**2 / len(student))

    @staticmethod
    def backward(context, above: Tensor):
        return context.saved_tensors[0] * above, None, None


class CrossEntropy(torch.autograd.Function):
    """-log of the label's probability, mean over the rows that have a label, from logits (N, V) and labels (N,)."""

    @staticmethod
    def forward(context, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        labelled = labels != ignored
        count = labelled.sum()
        gradient = torch.empty_like(logits) if context.needs_input_grad[0] else None
        total = 0.0
        for rows in pieces(logits, logits.shape[1]):
            log_shares = F.log_softmax(at_least_float32(logits[rows]), -1)
            column = labels[rows].clamp(min=0)[:, None]
            total = total - log_shares.gather(1, column).mul_(labelled[rows, None]).sum()
            if gradient is not None:
                shares = log_shares.exp_()
                shares.scatter_add_(1, column, torch.full_like(column, -1, dtype=shares.dtype))
                gradient[rows] = shares.mul_(labelled[rows, None]).div_(count)
        context.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(context, above: Tensor):
        return context.saved_tensors[0] * above, None, None


class StateDifference(torch.autograd.Function):
    """Mean squared difference of two states (..., D); no gradient for the teacher's."""

    @staticmethod
    def forward(context, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student) if context.needs_input_grad[0] else None
        total = 0.0
        for rows in pieces(student, student[0].numel()):
            difference = at_least_float32(student[rows]) - at_least_float32(teacher[rows])
            total = total + difference.square().sum()
            if gradient is not None:
                gradient[rows] = difference.mul_(2 / student.numel())
        context.save_for_backward(gradient)
        return total / student.numel()

    @staticmethod
    def backward(context, above: Tensor):
        return context.saved_tensors[0] * above, None


class ScoreDifference(torch.autograd.Function):
    """Mean squared difference of two models' attention scores; 0.0 if identical.

    From queries and keys (B, H, S, head_dim) and what the queries are scaled by. The scores of a few sequences exist
    at a time. What is kept for the way back is the smaller: where the student's heads are narrower than the teacher's,
    their gradients; else queries and keys, of which the scores are made once more (the student's are kept by its
    attention anyway). They are multiplied out and subtracted: their squared difference is a sum of products of Gram
    matrices too, without any S x S, twice as fast from 512 tokens on and no faster at 128, but that cancels, and
    identical models would differ by its rounding.

    Args:
        pairs: which pairs of tokens count, (1 or B, 1, S, S) of bool; None for all.
    """

    @staticmethod
    def forward(
        context,
        query: Tensor,
        key: Tensor,
        their_query: Tensor,
        their_key: Tensor,
        scaling: float,
        their_scaling: float,
        pairs: Tensor | None,
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        context.count = (
            batch * heads * length**2 if pairs is None else heads * pairs.expand(batch, 1, length, length).sum()
        )
        compared = query, key, their_query, their_key, pairs
        context.scalings = scaling, their_scaling
        narrower = query.shape[-1] < their_query.shape[-1]
        total, gradients = _score_difference(*compared, *context.scalings, narrower and any(context.needs_input_grad))
        context.save_for_backward(*gradients or compared)
        return total / context.count

    @staticmethod
    def backward(context, above: Tensor):
        gradients = context.saved_tensors
        if len(gradients) > 2:
            _, gradients = _score_difference(*context.saved_tensors, *context.scalings, True)
        above = above * 2 * context.scalings[0] / context.count
        return (*(above * gradient for gradient in gradients), None, None, None, None, None)


def _score_difference(
    query: Tensor,
    key: Tensor,
    their_query: Tensor,
    their_key: Tensor,
    pairs: Tensor | None,
    scaling: float,
    their_scaling: float,
    differentiated: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The sum of squared differences of the scores that count; its gradients by query and key, over 2 x scaling."""
    total, gradients = 0.0, []
    if differentiated:
        gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key)]
    with torch.autocast(query.device.type, enabled=False):  # near-equal products are subtracted
        for here in pieces(query, query.shape[1] * query.shape[2] ** 2):
            ours, our_key, theirs, their = (
                at_least_float32(each[here]) for each in (query, key, their_query, their_key)
            )
            difference = (ours * scaling @ our_key.mT).sub_(theirs * their_scaling @ their.mT)  # (., H, S, S)
            if pairs is not None:
                difference.masked_fill_(~(pairs if len(pairs) == 1 else pairs[here]), 0.0)
            total = total + difference.square().sum()
            if differentiated:
                gradients[0][here] = difference @ our_key
                gradients[1][here] = difference.mT @ ours
    return total, gradients


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is too coarse for differences of near-equal numbers: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pieces(tensor: Tensor, elements: int) -> Iterator[slice]:
    """Slices of a tensor's first dimension, each entry of which stands for so many elements."""
    size = max(1, PIECE.get(tensor.device.type, PIECE_ELSEWHERE) // elements)
    return (slice(start, start + size) for start in range(0, len(tensor), size))
