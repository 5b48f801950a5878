"""The five terms of the distillation loss and their weighted sum.

Shapes: B batch, S tokens, N loss positions, V vocabulary, L layers, H heads, D hidden width (Dt of the teacher, Ds of
the student). Every distillation term is exactly 0.0, and so is its gradient, for identical models without dropout.

A batch may come in parts. Each part is then divided by the count of the whole batch, so that the parts' losses add up.

Autograd would store several float32 copies of the logits and of all attention scores. The terms are computed in pieces
that fit a cache instead, each with its gradient. Values equal those of `torch.nn.functional` up to rounding.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .narrowing import forget_parameters, replace_parameter, sites_of
from .widths import LAYERS, compared_states

TERMS = ("mlm", "prediction", "hidden", "attention", "embedding")
IGNORED = -100  # label of a position that is not predicted
MAX_LOGITS = 2**25  # elements of a model's logits held at a time: 128 MiB in float32
PIECE = {"cpu": 2**19}  # elements processed at a time: about the size of a cache
PIECE_ELSEWHERE = 2**25  # a GPU is faster with few large pieces


class Share(NamedTuple):
    """The fraction of a batch that a part has; the pairs are exact where every token attends to all of its block."""

    blocks: float = 1.0
    tokens: float = 1.0  # without padding
    pairs: float = 1.0  # of tokens in a block


class LogitsInPieces(NamedTuple):
    """Logits that are too large to be held: the head runs on one slice of the loss positions at a time."""

    states: Tensor  # (N, D), last hidden states
    head: Callable[[Tensor], Tensor]  # (n, D) to (n, V)
    vocab_size: int

    @property
    def slices(self) -> list[slice]:
        """Consecutive slices of the N positions, of at most `MAX_LOGITS` logits each."""
        size = max(1, MAX_LOGITS // self.vocab_size)
        return [slice(start, start + size) for start in range(0, len(self.states), size)]


class QueryKey(NamedTuple):
    """Queries and keys of one layer, (B, H, S, head_dim) each, from which its attention scores follow."""

    query: Tensor
    key: Tensor
    attended: Tensor | None = None  # (1 or B, 1, S, S), bool: True where a query attends to a key; None: everywhere
    scaling: float = 1.0  # factor of the query; kept apart to avoid storing a scaled copy

    def scores(self) -> Tensor:
        """Attention scores before softmax and mask, (B, H, S, S)."""
        return (self.query * self.scaling) @ self.key.transpose(-1, -2)

    def of_heads(self, heads: Tensor) -> Self:
        return self._replace(query=self.query[:, heads], key=self.key[:, heads])


class Scores(NamedTuple):
    """Attention scores of one layer, (B, H, S, S), in families whose scores are more than query times key."""

    before_softmax: Tensor
    attended: Tensor | None = None  # as in QueryKey

    def scores(self) -> Tensor:
        return self.before_softmax

    def of_heads(self, heads: Tensor) -> Self:
        return self._replace(before_softmax=self.before_softmax[:, heads])


def mlm_loss(logits: Tensor, labels: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Cross-entropy of the labelled tokens, in nats, mean over them. logits (N, V); labels (N,), -100 where none.

    `count` is the number of labels of the whole batch, if these are a part of it.
    """
    labelled = labels != IGNORED
    count = labelled.sum() if count is None else count

    def piece(rows: slice, gradient: Tensor | None) -> Tensor:
        log_probabilities = F.log_softmax(at_least_float32(logits[rows]), -1)  # (n, V)
        label = labels[rows].clamp(min=0)[:, None]  # (n, 1)
        value = -log_probabilities.gather(1, label).mul_(labelled[rows, None]).sum()
        if gradient is not None:
            probabilities = log_probabilities.exp_()
            probabilities.scatter_add_(1, label, torch.full_like(label, -1, dtype=probabilities.dtype))
            gradient[rows] = probabilities.mul_(labelled[rows, None]).div_(count)
        return value

    return _InPieces.apply(logits, piece, lambda total: total / count)


def prediction_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, count: float | Tensor | None = None
) -> Tensor:
    """T^2 KL(teacher || student) over the vocabulary, in nats, mean over positions; 0.0 for identical logits (N, V).

    The temperature T divides both logits; T^2 keeps the size of the gradient (Hinton et al., 2015). `count` is the
    number of positions of the whole batch, if these are a part of it.
    """
    count = len(student) if count is None else count

    def piece(rows: slice, gradient: Tensor | None) -> Tensor:
        log_student = F.log_softmax(at_least_float32(student[rows]) / temperature, -1)  # (n, V)
        log_teacher = F.log_softmax(at_least_float32(teacher[rows]) / temperature, -1)  # (n, V)
        probabilities = log_teacher.exp()
        value = log_teacher.sub_(log_student).mul_(probabilities).sum()
        if gradient is not None:
            gradient[rows] = log_student.exp_().sub_(probabilities).mul_(temperature / count)
        return value

    return _InPieces.apply(student, piece, lambda total: total * (temperature**2 / count))


@torch.no_grad()
def divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row of logits (N, V), in nats, (N,); 0.0 for identical rows."""
    values = at_least_float32(student.new_empty(len(student)))
    for rows in pieces(student, student.shape[-1]):
        log_student, log_teacher = (F.log_softmax(at_least_float32(logits[rows]), -1) for logits in (student, teacher))
        values[rows] = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return values


def state_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, S, D) states over all elements of real tokens; 0.0 for identical states.

    `attention_mask` (B, S) is 1 for real tokens and 0 for padding, or None. The teacher has no gradient.
    """
    count = student.numel()
    if attention_mask is not None:
        count = student.shape[-1] * at_least_float32(attention_mask.to(student.dtype)).sum()

    def piece(rows: slice, gradient: Tensor | None) -> Tensor:
        difference = at_least_float32(student[rows]) - at_least_float32(teacher[rows])
        if attention_mask is not None:
            difference.masked_fill_(attention_mask[rows, :, None] == 0, 0.0)
        value = difference.square().sum()
        if gradient is not None:
            gradient[rows] = difference.mul_(2 / count)
        return value

    return _InPieces.apply(student, piece, lambda total: total / count)


class _InPieces(torch.autograd.Function):
    """The mean over a tensor's rows of a loss, computed in pieces; the gradient is stored in the tensor's dtype.

    `piece(rows, gradient)` returns the sum over these rows and writes gradient[rows] unless gradient is None.
    """

    @staticmethod
    def forward(context, student: Tensor, piece: Callable, mean: Callable) -> Tensor:
        gradient = torch.empty_like(student) if context.needs_input_grad[0] else None
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        for rows in pieces(student, student.shape[1:].numel()):
            total = total + piece(rows, gradient)
        context.save_for_backward(gradient)
        return mean(total)

    @staticmethod
    def backward(context, gradient_of_loss: Tensor):
        return context.saved_tensors[0] * gradient_of_loss, None, None


def attention_loss(student: Tensor, teacher: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, H, S, S) scores or probabilities over heads and pairs of tokens; 0.0 if identical.

    `pairs` (1 or B, 1, S, S) of bool is True for the pairs that count; None if all do.
    """
    if pairs is None:
        return F.mse_loss(at_least_float32(student), at_least_float32(teacher))
    difference = (at_least_float32(student) - at_least_float32(teacher)).masked_fill(~pairs, 0.0)  # (B, H, S, S)
    return difference.square().sum() / pairs.expand_as(student).sum()


class ScoreDifference(torch.autograd.Function):
    """`attention_loss` of scores, computed from queries and keys (B, H, S, head_dim); 0.0 if identical.

    The scores of a few sequences exist at a time. The backward pass needs the smaller of two things: the student's
    gradients where its heads are narrower than the teacher's, else queries and keys, to recompute the scores.
    """

    @staticmethod
    def forward(context, query, key, teacher_query, teacher_key, scaling, teacher_scaling, pairs) -> Tensor:
        batch, heads, length, _ = query.shape
        counted = batch * length**2 if pairs is None else pairs.expand(batch, 1, length, length).sum()
        context.count, context.scalings = heads * counted, (scaling, teacher_scaling)
        compared = query, key, teacher_query, teacher_key, pairs
        store = query.shape[-1] < teacher_query.shape[-1] and any(context.needs_input_grad)
        total, gradients = _score_difference(*compared, *context.scalings, store)
        context.save_for_backward(*gradients or compared)
        return total / context.count

    @staticmethod
    def backward(context, gradient_of_loss: Tensor):
        gradients = context.saved_tensors
        if len(gradients) > 2:
            _, gradients = _score_difference(*context.saved_tensors, *context.scalings, True)
        factor = gradient_of_loss * 2 * context.scalings[0] / context.count
        return (*(factor * gradient for gradient in gradients), None, None, None, None, None)


def _score_difference(
    query, key, teacher_query, teacher_key, pairs, scaling, teacher_scaling, differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    """The sum of squared differences over the pairs; its gradients for query and key, over 2 x scaling."""
    total, gradients = 0.0, []
    if differentiate:
        gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key)]
    with torch.autocast(query.device.type, enabled=False):  # the difference of near-equal products needs float32
        for rows in pieces(query, query.shape[1] * query.shape[2] ** 2):
            scores = _product(teacher_query[rows], teacher_key[rows].mT, teacher_scaling)
            difference = _product(query[rows], key[rows].mT, scaling).sub_(scores)  # (b, H, S, S)
            if pairs is not None:
                difference.masked_fill_(~(pairs if len(pairs) == 1 else pairs[rows]), 0.0)
            total = total + difference.square().sum()
            if differentiate:
                gradients[0][rows] = _product(difference, key[rows])
                gradients[1][rows] = _product(difference.mT, query[rows])
    return total, gradients


def _product(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """factor x left @ right, (b, H, n, m), at least in float32; `right` decides how `left` is read.

    Products of bfloat16 are exact in float32, and a GPU adds them in it: no copies in float32, no slow product of them.
    """
    if right.is_cuda and right.dtype == torch.bfloat16:
        pair = (each.to(torch.bfloat16).flatten(0, 1) for each in (left, right))
        return torch.bmm(*pair, out_dtype=torch.float32).mul_(factor).unflatten(0, left.shape[:2])
    left = at_least_float32(left)
    return (left if factor == 1.0 else left * factor) @ at_least_float32(right)


def attention_divergence(student, teacher, attention_mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of one layer's attention, in nats, mean over heads and real tokens; 0.0 if identical."""
    pairs = pairs_that_count(student.attended, attention_mask)
    rows = [_softmax_input(layer, pairs).transpose(1, 2) for layer in (student, teacher)]  # (B, S, H, S)
    if attention_mask is not None:
        rows = [scores[attention_mask.bool()] for scores in rows]  # (N, H, S)
    return prediction_loss(*(scores.flatten(0, -2) for scores in rows))


def pairs_that_count(attended: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """The pairs of real tokens that attend to each other in a layer, (1 or B, 1, S, S) of bool; None for all.

    Pairs outside a causal mask or a local window have no effect on the model, so they are not compared.
    """
    if attention_mask is None:
        return attended
    real = attention_mask.bool()  # (B, S)
    real = real[:, None, :, None] & real[:, None, None, :]  # (B, 1, S, S)
    return real if attended is None else real & attended


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of embeddings (B, E) of length 1, which is 2 (1 - cosine), mean over sentences; in [0, 4].

    Identical embeddings give exactly 0.0, and so does the gradient; a computed cosine is 1 up to rounding only.
    """
    return (student - teacher).square().sum(-1).mean()


def similarity_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student), in nats, of how each sentence's similarity is distributed over the others of the batch.

    Embeddings (B, E) have length 1; cosines are divided by the temperature. Mean over sentences; 0.0 if identical, and
    for a single sentence.
    """
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    student, teacher = ((each @ each.T / temperature)[others].view(len(each), -1) for each in (student, teacher))
    return prediction_loss(student, teacher) if student.numel() else student.sum()


class LossTerms(NamedTuple):
    """The weighted sum and each term before weighting; None for a term whose weight is 0."""

    total: Tensor
    mlm: Tensor | None = None
    prediction: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    embedding: Tensor | None = None
    similarity: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The computed terms by name, the total first, detached."""
        return {name: value.detach() for name, value in self._asdict().items() if value is not None}


class DistillationLoss(nn.Module):
    """mlm + prediction + hidden + attention + embedding, each times its weight (HomoDistil, total loss).

    For sentence encoders the prediction term is `embedding_loss`, in the space of the teacher, and there is no mlm.

    The hidden and embedding terms compare in the teacher's space, through one learned projection (Ds, Dt) for each
    layer and one for the embeddings. Projections start as the identity, so that both terms are exactly 0.0 while the
    student equals its teacher. They lose rows as the student loses neurons; those of a removed layer go with it. The
    outputs of the teacher are then those of the layers that stay, from `hdlib.forward`.

    Args:
        hidden_size, num_layers, num_heads: Dt, L and H of the teacher.
        mlm, prediction, hidden, attention, embedding: weights, at least 0. A term of weight 0 is not computed.
        similarity: weight of `similarity_loss`, for sentence encoders.
        temperature: T of the prediction term; for sentence encoders, of the similarities.
        attention_target: "scores" before the softmax (as in TinyBERT), or "probs" after it.
        positions: where predictions are compared: "masked", at the labelled tokens, or "all" real tokens.
        student_hidden_size: Ds at the start; None: Dt.

    Raises ValueError for a negative weight, no positive one, or an unknown choice.
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
        similarity: float = 0.0,
        temperature: float = 1.0,
        attention_target: str = "scores",
        positions: str = "masked",
        student_hidden_size: int | None = None,
    ):
        super().__init__()
        self.weights = dict(zip(TERMS, (mlm, prediction, hidden, attention, embedding), strict=True))
        self.weights |= {"similarity": similarity}
        if min(self.weights.values()) < 0 or max(self.weights.values()) == 0:
            raise ValueError(f"loss weights must be at least 0 and not all 0; got {self.weights}")
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
        # (L, H): the index of the teacher's head that each head of the student started as
        self.register_buffer("heads", torch.arange(num_heads).repeat(num_layers, 1))

    def forward(
        self,
        student,
        teacher,
        labels: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        loss_positions: Tensor | None = None,
        labels_in_batch: int | None = None,
        share: float | Share = 1.0,
    ) -> LossTerms:
        """Compare the outputs of two models on one batch.

        Args:
            student, teacher: outputs of `hdlib.forward`. Logits are (B, S, V), or (N, V) at the loss positions, in
                pieces for both models or for none. With attention_target="probs", eager attentions (B, H, S, S) will
                do. The teacher may be None if the loss `compares` nothing.
            labels: (B, S), the token to predict, or -100 where nothing is predicted; None for sentence encoders.
            attention_mask: (B, S), 1 for real tokens and 0 for padding; None if all are real.
            loss_positions: (N,) of the method of this name, made on the CPU; None: made here, with a host
                synchronisation if the labels are on a GPU.
            labels_in_batch: the number of labels in the whole batch, if this is a part of it; the terms of the parts
                add up to those of the batch.
            share: the fraction of the batch that this part has.

        Raises ValueError for no label, unless this is a part of a batch, and for another number of logits or layers
        than needed (SDPA alone returns no attentions).
        """
        weights, terms, layers = self.weights, {}, len(self.heads)
        share = share if isinstance(share, Share) else Share(share, share, share)
        if labels is None:
            terms |= self._sentence_terms(student.embeddings, teacher.embeddings, share)
        elif labels_in_batch is None:
            labels_in_batch = int((labels != IGNORED).sum())
            if labels_in_batch == 0:
                raise ValueError("no position of this batch has a label: nothing was masked")
        if labels is not None and (weights["mlm"] or weights["prediction"]):
            positions = self.loss_positions(labels, attention_mask) if loss_positions is None else loss_positions
            terms |= self._vocabulary_terms(student, teacher, labels, positions, labels_in_batch, share.blocks)
        if weights["hidden"] or weights["embedding"]:
            (embedded, target), *states = _paired("hidden_states", student, teacher, layers + 1)
        if weights["hidden"]:
            terms["hidden"] = share.tokens * sum(
                state_loss(_fitted(*pair, projection), pair[1], attention_mask)
                for pair, projection in zip(states, self.hidden_projections, strict=True)
            )
        if weights["attention"]:
            attentions = _paired("attentions", student, teacher, layers)
            terms["attention"] = share.pairs * sum(
                self._attention_term(*pair, heads, attention_mask)
                for pair, heads in zip(attentions, self.heads, strict=True)
            )
        if weights["embedding"]:
            embedded = _fitted(embedded, target, self.embedding_projection)  # (B, S, Dt)
            terms["embedding"] = share.tokens * state_loss(embedded, target, attention_mask)
        return LossTerms(total=sum(weights[name] * value for name, value in terms.items()), **terms)

    @property
    def compares(self) -> bool:
        """Whether any term needs the teacher's outputs; the mlm term does not."""
        return any(self.weights[name] for name in TERMS if name != "mlm")

    def loss_positions(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The N positions at which the loss needs logits: indices (N,) of the flattened tokens (B x S,)."""
        real = torch.ones_like(labels) if attention_mask is None else attention_mask
        return (labels != IGNORED if self.positions == "masked" else real).flatten().nonzero()[:, 0]

    @torch.no_grad()
    def narrow(self, kept: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Slice projections, their moments in the optimiser, and `heads`; `kept` is the result of `hdlib.narrow`.

        With fewer layers, the last state keeps its projection, as it is still compared with the teacher's last.
        """

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, kept["hidden"].to(tensor.device))

        layers = kept[LAYERS].tolist()
        heads = torch.stack([kept[f"layer.{layer}.heads"] for layer in layers])  # (L, H)
        if len(layers) < len(self.heads):
            states = [state - 1 for state in compared_states(layers, len(self.heads))[1:]]
            gone = [each for state, each in enumerate(self.hidden_projections) if state not in states]
            forget_parameters(gone, optimizer)
            self.hidden_projections = nn.ParameterList(self.hidden_projections[state] for state in states)
        device = self.heads.device
        self.heads = self.heads.index_select(0, kept[LAYERS].to(device)).gather(1, heads.to(device))
        for old, sites in sites_of(self).items() if "hidden" in kept else ():  # not where the hidden width is fixed
            replace_parameter(old, nn.Parameter(rows(old.data)), sites, optimizer, rows)

    def _vocabulary_terms(
        self, student, teacher, labels: Tensor, loss_positions: Tensor, labels_in_batch: int, share: float
    ) -> dict[str, Tensor]:
        """The mlm and prediction terms; with logits in pieces, the backward pass recomputes them slice by slice."""
        labels = labels.flatten().index_select(0, loss_positions)  # (N,), -100 where there is only a prediction term
        student = _logits_at(loss_positions, student.logits, "student")
        teacher = _logits_at(loss_positions, teacher.logits, "teacher") if self.weights["prediction"] else None
        labelled = max(1, labels_in_batch)  # without any, both terms are 0
        compared = labelled if self.positions == "masked" else len(labels) / share

        def of(student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
            terms = {"mlm": mlm_loss(student, labels, labelled)} if self.weights["mlm"] else {}
            if self.weights["prediction"]:
                terms["prediction"] = prediction_loss(student, teacher, self.temperature, compared)
            return terms

        if isinstance(student, Tensor):
            return of(student, teacher, labels)

        def of_rows(rows: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                teacher_logits = None if teacher is None else teacher.head(teacher.states[rows])  # (n, V)
            return of(student.head(student.states[rows]), teacher_logits, labels[rows])

        sums: dict[str, Tensor] = {}
        for rows in student.slices:
            for name, part in checkpoint(of_rows, rows, use_reentrant=False, preserve_rng_state=False).items():
                sums[name] = sums[name] + part if name in sums else part
        return sums

    def _sentence_terms(self, student: Tensor, teacher: Tensor, share: Share) -> dict[str, Tensor]:
        """The terms of embeddings (B, E)."""
        terms = {"prediction": lambda: embedding_loss(student, teacher)}
        terms |= {"similarity": lambda: similarity_loss(student, teacher, self.temperature)}
        return {name: share.blocks * term() for name, term in terms.items() if self.weights[name]}

    def _attention_term(self, student, teacher, heads: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The attention term of one layer, from its record in each model."""
        layers = [select_heads(layer, heads) for layer in (student, teacher)]
        if all(isinstance(layer, Tensor) for layer in layers):
            if self.attention_target == "scores":
                raise ValueError('no scores before the softmax: use hdlib.forward, or attention_target="probs"')
            return attention_loss(*layers, pairs_that_count(None, attention_mask))
        pairs = pairs_that_count(student.attended, attention_mask)
        if self.attention_target == "probs":
            return attention_loss(*(_softmax_input(layer, pairs).softmax(-1) for layer in layers), pairs)
        if not all(isinstance(layer, QueryKey) for layer in layers):
            return attention_loss(*(layer.scores() for layer in layers), pairs)
        (query, key, _, scaling), (teacher_query, teacher_key, _, teacher_scaling) = layers
        return ScoreDifference.apply(query, key, teacher_query, teacher_key, scaling, teacher_scaling, pairs)


def _softmax_input(layer: QueryKey | Scores, pairs: Tensor | None) -> Tensor:
    """Masked scores, (B, H, S, S); the mask is the lowest finite number, since padding has no key to attend to."""
    scores = layer.scores()
    return scores if pairs is None else scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)


def _fitted(states: Tensor, target: Tensor, projection: Tensor) -> Tensor:
    """(B, S, Ds) to (B, S, Dt). A state of fixed width needs no projection, such as the last one of OPT-350m."""
    fixed = states.shape[-1] == target.shape[-1] != projection.shape[1]
    return states if fixed else in_teacher_space(states, projection)


def in_teacher_space(states: Tensor, projection: Tensor) -> Tensor:
    """(..., Ds) to (..., Dt), exactly for the identity."""
    if projection.shape[0] < projection.shape[1]:
        return states @ projection
    # The diagonal apart, in float32: a product in bfloat16 would round states that are equal to the teacher's.
    diagonal = projection.diagonal()
    return states * diagonal + states @ (projection - diagonal.diag())


def _logits_at(loss_positions: Tensor, logits: Tensor | LogitsInPieces, model: str) -> Tensor | LogitsInPieces:
    """Logits at the N loss positions, from logits at those positions or at all (B, S)."""
    if isinstance(logits, Tensor) and logits.dim() == 3:
        return logits.flatten(0, 1).index_select(0, loss_positions)  # (N, V)
    given, expected = len(logits.states if isinstance(logits, LogitsInPieces) else logits), len(loss_positions)
    if given != expected:
        raise ValueError(f"the {model} has logits at {given} positions, the loss needs {expected}: pass loss_positions")
    return logits


def select_heads(layer: Tensor | QueryKey | Scores, heads: Tensor) -> Tensor | QueryKey | Scores:
    """The given heads of one layer; the layer itself if it has no others."""
    scores_or_query = layer if isinstance(layer, Tensor) else layer[0]  # (B, H, ...)
    if scores_or_query.shape[1] == len(heads):
        return layer
    return layer[:, heads] if isinstance(layer, Tensor) else layer.of_heads(heads)


def _paired(name: str, student, teacher, expected: int) -> list[tuple]:
    """What both models recorded under this name, layer by layer. Raises ValueError for another number of layers."""
    layers = [getattr(outputs, name) or () for outputs in (student, teacher)]
    if [len(each) for each in layers] != [expected, expected]:
        given = f"the student gave {len(layers[0])} and the teacher {len(layers[1])}"
        raise ValueError(f"the loss compares {expected} {name.replace('_', ' ')}, but {given}: use hdlib.forward")
    return list(zip(*layers, strict=True))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32: it is too coarse for the difference of near-equal numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pieces(tensor: Tensor, elements: int) -> Iterator[slice]:
    """Slices of a tensor's first dimension whose entries stand for `elements` elements each."""
    size = max(1, PIECE.get(tensor.device.type, PIECE_ELSEWHERE) // elements)
    return (slice(start, start + size) for start in range(0, len(tensor), size))
