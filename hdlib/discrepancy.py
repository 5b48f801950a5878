"""Held-out measures of how far a student is from its teacher.

B blocks, S tokens, L layers, N sentences, E dimensions of an embedding.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data import batches
from .losses import IGNORED, attention_divergence, divergences, mlm_loss, select_heads
from .models import forward, is_encoder
from .precision import doubled
from .widths import Widths, compared_states, spaced_layers

NEAREST = 10  # neighbours of a sentence that are compared
TOKENS_PER_NEURON = 4  # a linear fit on fewer tokens would describe these tokens, not the states


class Measures(dict[str, float]):
    """Measures by name; `kl_of_blocks` (n,) has the KL of every held-out block, nan for a block without labels.

    It is None for sentence encoders.
    """

    def __init__(self, values: dict[str, float], kl_of_blocks: Tensor | None):
        super().__init__(values)
        self.kl_of_blocks = kl_of_blocks


@torch.no_grad()
def discrepancy(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks,
    batch_size: int = 16,
    neurons: Tensor | None = None,
    heads: Tensor | None = None,
    layers: list[int] | None = None,
) -> Measures:
    """The prediction discrepancy and related measures on held-out blocks.

    Args:
        student, teacher: models with their heads over one vocabulary, or sentence encoders; measured in eval mode, then
            set back.
        blocks: held-out blocks with `labels` for the masked tokens, or in causal models for all that have a next one;
            for sentence encoders the sentences of `load_sentences`.
        batch_size: blocks per forward; affects memory only.
        neurons: for a student under masks, the indices of the hidden neurons that are not masked; None: all.
        heads: (L, Hs), the index of the teacher's head for each head of the student; None: the same heads.
        layers: the teacher's layer for each of the student; None: evenly spaced ones, all for the same depth.

    Returns, for sentence encoders:
        cosine_distance: 1 - cosine of the student's and the teacher's embedding, mean over sentences; in [0, 2].
        rank_correlation: Spearman's correlation of the similarities of all pairs of sentences; 1.0 if identical.
        recall: fraction of the teacher's 10 nearest neighbours of a sentence that are among the 10 embeddings of the
            teacher nearest to the student's embedding of that sentence; 1.0 if identical.

        The first and the last are left out if the embeddings differ in dimension.

    Returns, for language models:
        kl: KL(teacher || student), nats per labelled token (the paper's discrepancy); 0.0 if identical.
        kl_standard_error: of `kl` as an estimate for text like these blocks, nats, from the spread over blocks; 0.0
            if identical. Left out for a single block.
        agreement: fraction of labelled tokens with the same top-1 prediction; 1.0 if identical.
        mlm, teacher_mlm: cross-entropy of the student and of the teacher, nats per labelled token.
        accuracy, teacher_accuracy: fraction of labelled tokens predicted correctly.

    Returns, for both:
        hidden: mean squared error of a linear least-squares prediction of the teacher's hidden states from the
            student's, which may have another width. Fitted on every other block, measured on the rest; mean over
            layers and elements; 0.0 up to rounding if identical.
        hidden_1 to hidden_L: this error of each layer over the mean square of its states; about 1 if unrelated. These
            and the next are numbered by the teacher's layers, without those that the student lacks; the student's last
            state is compared with the teacher's last.
        attention_1 to attention_L: KL(teacher || student) of the attention probabilities, nats, mean over heads and
            tokens; 0.0 if identical. Left out if the student has fewer heads and `heads` is None.

        The hidden measures are left out where the fit has fewer than four tokens for each neuron of the student.

    Raises ValueError if the blocks have no labelled token.
    """
    depth, shape = teacher.config.num_hidden_layers, Widths.of(student)
    layers = spaced_layers(depth, shape.layers) if layers is None else layers
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    if heads is None and shape.heads == Widths.of(teacher).heads:
        heads = torch.arange(shape.heads).repeat(shape.layers, 1)
    sums, counts, of_blocks, fits, read, encoder = Counter(), Counter(), [], {}, 0, is_encoder(teacher)
    for batch in batches(blocks, batch_size, device=student.device):
        mask = batch.get("attention_mask")  # (B, S)
        loss_positions = None if encoder else batch["labels"] != IGNORED  # (B, S)
        student_outputs = forward(student, batch["input_ids"], loss_positions, mask)
        teacher_outputs = forward(teacher, batch["input_ids"], loss_positions, mask, layers=layers)
        if encoder:
            of_blocks.append((student_outputs.embeddings, teacher_outputs.embeddings))
        else:
            kl = divergences(student_outputs.logits, teacher_outputs.logits)  # (N,)
            of_blocks.append(_sums_of_blocks(kl, loss_positions))
        labels = () if encoder else batch["labels"][loss_positions]  # (N,)
        for name, mean, count in _means(student_outputs, teacher_outputs, labels, heads, layers, mask):
            sums[name] += float(mean) * count
            counts[name] += count
        hidden_states = zip(student_outputs.hidden_states[1:], teacher_outputs.hidden_states[1:], strict=True)
        real = (torch.ones_like(batch["input_ids"]) if mask is None else mask).bool()
        for layer, (states, targets) in zip(compared_states(layers, depth)[1:], hidden_states, strict=True):
            if neurons is not None and states.shape[-1] == student.config.hidden_size:
                states = states[..., neurons.to(states.device)]
            fits.setdefault(layer, _LinearFit()).add(states, targets, real, read)
        read += len(real)
    student.train(modes[0]), teacher.train(modes[1])
    if encoder:
        first, kl_of_blocks = embedding_measures(*map(torch.cat, zip(*of_blocks, strict=True))), None
    else:
        first, kl_of_blocks = _mean_of_blocks(torch.cat(of_blocks))
    means = first | {name: total / counts[name] for name, total in sums.items()}
    if all(fit.enough for fit in fits.values()):
        errors, shares = zip(*(fit.errors() for fit in fits.values()), strict=True)
        means |= {"hidden": sum(errors) / len(errors)}
        means |= {f"hidden_{layer}": share for layer, share in zip(fits, shares, strict=True)}
    return Measures(means, kl_of_blocks)


def main_measure(teacher: PreTrainedModel) -> str:
    """The name of the measure that stands for the discrepancy."""
    return "cosine_distance" if is_encoder(teacher) else "kl"


def embedding_measures(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """The measures of embeddings (N, E) of length 1."""
    student, teacher = doubled(student), doubled(teacher)
    alike = student.shape == teacher.shape
    # half the squared distance, which is 1 - cosine, and exactly 0 for identical embeddings
    measures = {"cosine_distance": float((student - teacher).square().sum(-1).mean() / 2)} if alike else {}
    pairs = torch.ones(len(teacher), len(teacher), dtype=torch.bool, device=teacher.device).triu(1)
    if len(teacher) > 2:
        values = [(each @ each.T)[pairs] for each in (student, teacher)]
        ranks = [each.argsort(stable=True).argsort().to(each) for each in values]  # equal ones in their order
        measures["rank_correlation"] = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    if alike and len(teacher) > 1:
        itself = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
        scores = [(each @ teacher.T).masked_fill(itself, -torch.inf) for each in (student, teacher)]
        found, wanted = (each.topk(min(NEAREST, len(teacher) - 1)).indices for each in scores)
        measures["recall"] = float((found[:, :, None] == wanted[:, None]).any(1).double().mean())
    return measures


def _sums_of_blocks(of_tokens: Tensor, loss_positions: Tensor) -> Tensor:
    """The sum of (N,) values at the loss positions (B, S) and their number, for each block: (B, 2), float64, on CPU."""
    counts = loss_positions.sum(1).tolist()
    return torch.tensor([[part.sum(), len(part)] for part in of_tokens.cpu().double().split(counts)], dtype=float)


def _mean_of_blocks(of_blocks: Tensor) -> tuple[dict[str, float], Tensor]:
    """The mean over tokens and its standard error (of a ratio of sums), and the mean of each block, from (n, 2)."""
    (total, count), (sums, counts), blocks = of_blocks.sum(0), of_blocks.T, len(of_blocks)
    if count == 0:
        raise ValueError("the held-out blocks have no labelled position: pass the validation blocks of load_corpus")
    means = {"kl": float(total / count)}
    if blocks > 1:
        variance = (sums - total / count * counts).square().sum() / (blocks - 1)
        means["kl_standard_error"] = float((blocks * variance).sqrt() / count)
    return means, sums / counts


def _means(student, teacher, labels: Tensor, heads, layers, attention_mask) -> Iterator[tuple[str, Tensor, int]]:
    """Name, mean and number of tokens of each measure, from the outputs on one batch; labels (N,), heads (L, Hs)."""
    if len(labels):  # the mean over no token is not a number
        top, teacher_top = student.logits.argmax(-1), teacher.logits.argmax(-1)  # (N,)
        yield "agreement", (top == teacher_top).float().mean(), len(labels)
        yield "mlm", mlm_loss(student.logits, labels), len(labels)
        yield "teacher_mlm", mlm_loss(teacher.logits, labels), len(labels)
        yield "accuracy", (top == labels).float().mean(), len(labels)
        yield "teacher_accuracy", (teacher_top == labels).float().mean(), len(labels)
    tokens = student.hidden_states[0][..., 0].numel() if attention_mask is None else int(attention_mask.sum())
    attentions = student.attentions, teacher.attentions
    for layer, kept, *pair in () if heads is None else zip(layers, heads, *attentions, strict=True):
        pair = (select_heads(each, kept) for each in pair)
        yield f"attention_{layer + 1}", attention_divergence(*pair, attention_mask), tokens


class _LinearFit:
    """Least-squares prediction of teacher states Y from student states X, from running sums: memory does not grow.

    The sums over the tokens of the fitted and of the other blocks: `inner` X'X (Ds, Ds), `cross` X'Y (Ds, Dt) and
    `squares` Y^2.
    """

    def __init__(self):
        self.fitted, self.measured = Counter(), Counter()

    def add(self, states: Tensor, targets: Tensor, real: Tensor, read: int) -> None:
        """Add states (B, S, Ds) and (B, S, Dt) at the real tokens (B, S), after `read` blocks: even ones are fitted."""
        for sums, first in ((self.fitted, read % 2), (self.measured, 1 - read % 2)):
            rows = slice(first, None, 2)
            x, y = (doubled(each[rows][real[rows]]) for each in (states, targets))  # (N, Ds), (N, Dt)
            sums.update(tokens=len(x), inner=x.T @ x, cross=x.T @ y, squares=y.square().sum())

    @property
    def enough(self) -> bool:
        fitted = self.fitted["tokens"]
        return self.measured["tokens"] > 0 and fitted >= TOKENS_PER_NEURON * len(self.fitted["inner"])

    def errors(self) -> tuple[float, float]:
        """Mean squared error, and as a share of the targets' mean square; nan if a state was not finite."""
        inner, cross = (self.fitted[name].cpu() for name in ("inner", "cross"))
        own, own_cross = (self.measured[name].cpu() for name in ("inner", "cross"))
        if not inner.isfinite().all() or not own.isfinite().all():
            return float("nan"), float("nan")
        weights = torch.linalg.lstsq(inner, cross, driver="gelsd").solution  # (Ds, Dt); of any rank, on CPUs only
        squares = float(self.measured["squares"])
        error = squares + float((weights * (own @ weights - 2 * own_cross)).sum())
        error = max(error, 0.0)  # rounding can make the difference slightly negative
        return error / (self.measured["tokens"] * weights.shape[1]), error / squares
