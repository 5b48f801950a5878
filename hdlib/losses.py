"""The five terms of the distillation loss: small pure functions and their weighted sum.

Shapes: B batch, S tokens, N positions the loss looks at, V vocabulary, L layers, H heads, D hidden
width (Dt of the teacher, Ds of the student). Every distillation term is exactly 0.0 for identical
models in float32 without dropout; nothing here knows of pruning beyond following it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .fused import CrossEntropy, Divergence, ScoreDifference, StateDifference, at_least_float32
from .narrowing import replace_parameter

TERMS = ("mlm", "prediction", "hidden", "attention", "embedding")
IGNORED = -100  # label of a position that is not predicted


# Elements: 128 MiB in float32, 1,099 positions of BERT's vocabulary. Pieces of half of that halve the peak of BERT-base
# at all of 8 x 128 positions and take 1.13 times as long, since the head is run once more on the way back.
LOGITS_AT_ONCE = 2**25


class LogitsInPieces(NamedTuple):
    """Logits that are made where they are looked at, since all of them are more than should be held at once."""

    states: Tensor  # (N, D), last hidden states
    head: Callable[[Tensor], Tensor]  # (n, D) to (n, V)
    vocab_size: int

    @property
    def pieces(self) -> list[slice]:
        """The positions that are worked on together."""
        size = max(1, LOGITS_AT_ONCE // self.vocab_size)
        return [slice(start, start + size) for start in range(0, len(self.states), size)]

    def at(self, rows: slice) -> Tensor:
        return self.head(self.states[rows])

    def all(self) -> Tensor:
        return self.head(self.states)


class QueryKey(NamedTuple):
    """What a layer's attention scores are made of: (B, H, S, head_dim) each."""

    query: Tensor
    key: Tensor
    attended: Tensor | None = None  # (1 or B, 1, S, S) of bool: which keys a query meets; None: all of them
    scaling: float = 1.0  # of the query; kept apart, since a scaled copy of every layer's would be held for nothing

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    def scores(self) -> Tensor:
        """Attention scores before the softmax and without mask, (B, H, S, S)."""
        return (self.query * self.scaling) @ self.key.transpose(-1, -2)

    def of_heads(self, heads: Tensor) -> QueryKey:
        return self._replace(query=self.query[:, heads], key=self.key[:, heads])


class Scores(NamedTuple):
    """A layer's attention scores themselves, (B, H, S, S), where they are more than a product of two."""

    before_softmax: Tensor
    attended: Tensor | None = None  # as in QueryKey

    @classmethod
    def of(cls, masked: Tensor) -> Scores:
        """From what goes into the softmax, where pairs that do not meet have about the lowest number there is."""
        return cls(masked, (masked > torch.finfo(masked.dtype).min / 2)[:, :1])

    @property
    def num_heads(self) -> int:
        return self.before_softmax.shape[1]

    def scores(self) -> Tensor:
        return self.before_softmax

    def of_heads(self, heads: Tensor) -> Scores:
        return self._replace(before_softmax=self.before_softmax[:, heads])


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the masked tokens, in nats, mean over them. logits (N, V), labels (N,)."""
    return CrossEntropy.apply(logits, labels, IGNORED)


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) over the vocabulary, in nats, mean over positions; 0.0 if identical.

    Args:
        student, teacher: logits (N, V).
        temperature: T, divides both logits; T^2 keeps the size of the gradient (Hinton et al., 2015).
    """
    return Divergence.apply(student, teacher, temperature)


def state_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, S, D) states over all elements of real tokens; 0.0 if identical."""
    if attention_mask is None:
        return StateDifference.apply(student, teacher)
    real = attention_mask.bool()
    return StateDifference.apply(student[real], teacher[real])


def attention_loss(student: Tensor, teacher: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, H, S, S) scores or probabilities; 0.0 if identical.

    Args:
        pairs: which pairs of tokens count, (1 or B, 1, S, S) of bool; None for all. The mean runs over them
            and over all heads.
    """
    if pairs is None:
        return F.mse_loss(at_least_float32(student), at_least_float32(teacher))
    difference = (at_least_float32(student) - at_least_float32(teacher)).masked_fill(~pairs, 0.0)  # (B, H, S, S)
    return difference.square().sum() / pairs.expand_as(student).sum()


def attention_divergence(student, teacher, attention_mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of what a token attends to, in nats, mean over heads and real tokens; 0.0 if identical.

    Unlike the difference of scores it ignores what the softmax ignores, a constant added to all of a row.

    Args:
        student, teacher: what one layer recorded, with the same heads.
    """
    rows = [_masked(recorded.scores(), recorded.attended, attention_mask) for recorded in (student, teacher)]
    rows = [scores.transpose(1, 2) for scores in rows]  # (B, S, H, S)
    if attention_mask is not None:
        rows = [scores[attention_mask.bool()] for scores in rows]  # (N, H, S)
    return prediction_loss(*(scores.flatten(0, -2) for scores in rows))


def pairs_that_count(attended: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Pairs of tokens that are real and meet in this layer, (1 or B, 1, S, S) of bool; None for all.

    A causal model leaves out the future, local attention what lies outside its window: what it would
    score there has no effect, so it is nothing to imitate.
    """
    if attention_mask is None:
        return attended
    real = attention_mask.bool()
    real = real[:, None, :, None] & real[:, None, None, :]
    return real if attended is None else real & attended


@dataclass(frozen=True)
class LossTerms:
    """The weighted sum and each term before weighting; None for a term whose weight is 0."""

    total: Tensor
    mlm: Tensor | None = None
    prediction: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    embedding: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The terms that were computed, by name, the total first, without their graph."""
        return {name: value.detach() for name, value in vars(self).items() if value is not None}


class DistillationLoss(nn.Module):
    """mlm + prediction + hidden + attention + embedding, each with its weight (HomoDistil, total loss).

    The hidden and embedding terms compare in the teacher's space, through one learned projection
    (Ds, Dt) for each layer and one for the embedding output. They start as the identity, so that both
    terms are exactly 0.0 while the student is its teacher, and lose rows as the student loses neurons.

    Args:
        hidden_size: Dt.
        num_layers: L.
        mlm, prediction, hidden, attention, embedding: weights, at least 0. A term of weight 0 is not
            computed.
        temperature: of the prediction term.
        attention_target: "scores" before the softmax (TinyBERT's choice), or "probs" after it.
        positions: "masked", the prediction term where labels are; or "all" real tokens.
        student_hidden_size: Ds at the start, if the student is narrower already.
        num_heads: H, of the teacher.

    Raises:
        ValueError: a negative weight, no positive one, or an unknown choice.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        mlm: float = 1.0,
        prediction: float = 1.0,
        hidden: float = 1.0,
        attention: float = 1.0,
        embedding: float = 1.0,
        temperature: float = 1.0,
        attention_target: str = "scores",
        positions: str = "masked",
        student_hidden_size: int | None = None,
    ):
        super().__init__()
        self.weights = dict(zip(TERMS, (mlm, prediction, hidden, attention, embedding), strict=True))
        if min(self.weights.values()) < 0 or max(self.weights.values()) == 0:
            raise ValueError(f"loss weights are at least 0 and not all 0; got {self.weights}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        if attention_target not in ("scores", "probs"):
            raise ValueError(f"attention_target is 'scores' or 'probs'; got {attention_target!r}")
        if positions not in ("masked", "all"):
            raise ValueError(f"positions is 'masked' or 'all'; got {positions!r}")
        self.temperature, self.attention_target, self.positions = temperature, attention_target, positions
        identity = torch.eye(student_hidden_size or hidden_size, hidden_size)  # (Ds, Dt)
        self.embedding_projection = nn.Parameter(identity.clone())
        self.hidden_projections = nn.ParameterList(identity.clone() for _ in range(num_layers))
        # Which of the teacher's heads each of the student's heads is: (L, H)
        self.register_buffer("heads", torch.arange(num_heads).repeat(num_layers, 1))

    def forward(self, student, teacher, labels: Tensor, attention_mask: Tensor | None = None) -> LossTerms:
        """Compare two models on one batch.

        Args:
            student, teacher: Hugging Face outputs with `logits`, `hidden_states` (L + 1 of them) and
                `attentions`, as `hdlib.forward` gives them: L QueryKey pairs. The logits are (B, S, V),
                or (N, V) for the positions the loss looks at, in pieces on both sides or on none. Attention
                probabilities (B, H, S, S) do for attention_target="probs". The teacher may be None where the
                loss `compares` nothing.
            labels: (B, S), the token to predict, or -100 where nothing is predicted.
            attention_mask: (B, S), 1 for real tokens and 0 for padding; None if all are real.

        Raises:
            ValueError: no label at all; layers missing or not the same number on both sides (an empty
                tuple would make a term silently 0); logits of another number of positions.
        """
        weights, terms = self.weights, {}
        if not (labels != IGNORED).any():
            raise ValueError("no position of this batch has a label: nothing was masked")
        if weights["mlm"] or weights["prediction"]:
            loss_positions = self.loss_positions(labels, attention_mask)
            labelled = labels[loss_positions]  # (N,), -100 where only the prediction term looks
            ours = _at(student.logits, loss_positions, "student")
            theirs = _at(teacher.logits, loss_positions, "teacher") if weights["prediction"] else None
            whole = not isinstance(ours, LogitsInPieces)
            terms |= (self._over_vocabulary if whole else self._in_pieces)(ours, theirs, labelled)
        if weights["hidden"] or weights["embedding"]:
            _same_layers("hidden states", student.hidden_states, teacher.hidden_states, len(self.heads) + 1)
        if weights["hidden"]:
            terms["hidden"] = sum(
                state_loss(_in_teacher_space(states, projection, target), target, attention_mask)
                for projection, states, target in zip(
                    self.hidden_projections, student.hidden_states[1:], teacher.hidden_states[1:], strict=True
                )
            )
        if weights["attention"]:
            _same_layers("attentions", student.attentions, teacher.attentions, len(self.heads))
            terms["attention"] = sum(
                self._attention(ours, theirs, heads, attention_mask)
                for heads, ours, theirs in zip(self.heads, student.attentions, teacher.attentions, strict=True)
            )
        if weights["embedding"]:
            projected = student.hidden_states[0] @ self.embedding_projection  # (B, S, Dt)
            terms["embedding"] = state_loss(projected, teacher.hidden_states[0], attention_mask)
        return LossTerms(total=sum(weights[name] * value for name, value in terms.items()), **terms)

    @property
    def compares(self) -> bool:
        """Whether any term looks at the teacher at all; language modelling alone does not."""
        return any(self.weights[name] for name in TERMS if name != "mlm")

    def loss_positions(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The positions whose logits the loss needs, (B, S) of bool."""
        if self.positions == "masked":
            return labels != IGNORED
        return torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()

    @torch.no_grad()
    def narrow(self, kept: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Let projections and head pairing follow a prune; `kept` is what `hdlib.narrow` returned."""

        def rows(tensor):
            return tensor.index_select(0, kept["hidden"].to(tensor.device))

        layers = [kept[f"layer.{layer}.heads"].to(self.heads.device) for layer in range(len(self.heads))]
        self.heads = torch.stack([heads[keep] for heads, keep in zip(self.heads, layers, strict=True)])
        if "hidden" not in kept:  # a family whose hidden width cannot change
            return
        sites = [(self, "embedding_projection")] + [(self.hidden_projections, str(i)) for i in range(len(self.heads))]
        for module, name in sites:
            old = module._parameters[name]
            replace_parameter(old, nn.Parameter(rows(old.data)), [(module, name)], optimizer, rows)

    def _over_vocabulary(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """The two terms over the words, from logits (N, V) and labels (N,)."""
        terms = {}
        if self.weights["mlm"]:
            terms["mlm"] = mlm_loss(student, labels)
        if self.weights["prediction"]:
            terms["prediction"] = prediction_loss(student, teacher, self.temperature)
        return terms

    def _in_pieces(self, student: LogitsInPieces, teacher: LogitsInPieces | None, labels: Tensor) -> dict[str, Tensor]:
        """The same, where the logits of some positions exist at a time; they are made once more on the way back."""

        def at(rows: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                theirs = None if teacher is None else teacher.at(rows)  # (n, V)
            return self._over_vocabulary(student.at(rows), theirs, labels[rows])

        counted = {"mlm": labels != IGNORED, "prediction": torch.ones_like(labels, dtype=torch.bool)}
        sums = dict.fromkeys(counted, 0.0)
        for rows in student.pieces:
            for name, mean in checkpoint(at, rows, use_reentrant=False, preserve_rng_state=False).items():
                if counted[name][rows].any():  # the mean over nothing is none
                    sums[name] = sums[name] + mean * counted[name][rows].sum()
        return {name: total / counted[name].sum() for name, total in sums.items() if self.weights[name]}

    def _attention(self, student, teacher, heads: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The attention term of one layer, from what the two models recorded."""
        compared = [select_heads(recorded, heads) for recorded in (student, teacher)]
        if all(isinstance(recorded, Tensor) for recorded in compared):
            if self.attention_target == "scores":
                raise ValueError(
                    "the attention term needs scores before the softmax, but these outputs hold probabilities: "
                    'use hdlib.forward, or attention_target="probs"'
                )
            return attention_loss(*compared, pairs_that_count(None, attention_mask))
        pairs = pairs_that_count(student.attended, attention_mask)
        if self.attention_target == "scores" and all(isinstance(recorded, QueryKey) for recorded in compared):
            (query, key, _, scaling), (their_query, their_key, _, their_scaling) = compared
            return ScoreDifference.apply(query, key, their_query, their_key, scaling, their_scaling, pairs)
        scores = [recorded.scores() for recorded in compared]
        if self.attention_target == "probs":
            scores = [_masked(each, student.attended, attention_mask).softmax(-1) for each in scores]
        return attention_loss(*scores, pairs)


def _masked(scores: Tensor, attended: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """What goes into the softmax, (B, H, S, S); the lowest finite number, since a row may have nothing to attend to."""
    lowest = torch.finfo(scores.dtype).min
    if attended is not None:
        scores = scores.masked_fill(~attended, lowest)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask.bool()[:, None, None, :], lowest)
    return scores


def _in_teacher_space(states: Tensor, projection: Tensor, target: Tensor) -> Tensor:
    """(B, S, Ds) to (B, S, Dt). A state that has the teacher's width for good needs no projection.

    OPT-350m has such a one: its last state is projected to the width of its embeddings, which stays.
    """
    fixed = states.shape[-1] == target.shape[-1] != projection.shape[1]
    return states if fixed else states @ projection


def _at(logits: Tensor | LogitsInPieces, positions: Tensor, who: str) -> Tensor | LogitsInPieces:
    """The logits of the positions looked at, (N, V), whether the model gave all of them or only those."""
    if isinstance(logits, Tensor) and logits.dim() == 3:
        return logits[positions]
    given = len(logits.states if isinstance(logits, LogitsInPieces) else logits)
    if given != int(positions.sum()):
        raise ValueError(f"the {who} gave logits for {given} positions, the loss looks at {int(positions.sum())}")
    return logits


def select_heads(recorded, heads: Tensor):
    """The teacher's heads that the student still has, in its order; nothing to select where no others are left."""
    if isinstance(recorded, Tensor):  # probabilities (B, H, S, S)
        return recorded if recorded.shape[1] == len(heads) else recorded[:, heads]
    return recorded if recorded.num_heads == len(heads) else recorded.of_heads(heads)


def _same_layers(what: str, student, teacher, expected: int) -> None:
    counts = [0 if layers is None else len(layers) for layers in (student, teacher)]
    if counts != [expected, expected]:
        raise ValueError(
            f"the loss compares {expected} {what}, but the student gave {counts[0]} and the teacher {counts[1]}; "
            "hdlib.forward makes a model record them"
        )
