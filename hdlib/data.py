"""Blocks of tokens to batches with labels.

The batch of step t is a pure function of (seed, t): a resumed run reads the same batches as an uninterrupted one, and
N processes divide the batch of one process among them. `corpus` makes the blocks from text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .losses import IGNORED, Share

POOL = 50  # batches among which sentences are sorted by length


class Blocks(torch.utils.data.Dataset):
    """Blocks of S tokens as arrays, in memory or memory-mapped.

    Args:
        input_ids: (N, S), tensor or array of integers.
        labels: (N, S), for held-out blocks: the token to predict, -100 where there is none.
    """

    def __init__(self, input_ids: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None):
        self.columns = {"input_ids": input_ids} | ({} if labels is None else {"labels": labels})

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, rows: int | slice | list[int]) -> dict[str, Tensor]:
        """The blocks at an index (S,), or at a slice or list of indices (n, S), int64."""
        return {
            name: torch.as_tensor(np.asarray(column[rows]).astype(np.int64)) for name, column in self.columns.items()
        }


class Sentences(Blocks):
    """Sentences or passages of their natural length, for sentence encoders. Several are padded to the longest of them.

    Args:
        token_ids: (T,), the tokens of all sentences.
        lengths: (N,), the number of tokens of each.
        pad_token_id: fills the padding.
        prompt: the text that was put before each sentence; None: not given.
    """

    def __init__(self, token_ids: np.ndarray, lengths: Sequence[int], pad_token_id: int | None, prompt=None):
        self.token_ids, self.lengths = np.asarray(token_ids), torch.as_tensor(lengths, dtype=torch.int64)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.pad_token_id, self.prompt = pad_token_id or 0, prompt

    @classmethod
    def of(cls, sentences: Iterable[Sequence[int]], pad_token_id: int | None = None, prompt: str | None = None) -> Self:
        """From the token ids of each sentence."""
        arrays = [np.asarray(tokens, dtype=np.int32) for tokens in sentences]
        return cls(np.concatenate([np.empty(0, np.int32), *arrays]), [*map(len, arrays)], pad_token_id, prompt)

    @property
    def column_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: int | slice | list[int]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, 1 for real tokens and 0 for padding: (S,) each, or (n, S); int64."""
        lengths, starts = self.lengths[rows, None], self.starts[rows, None]
        places = torch.arange(int(lengths.max()) if lengths.numel() else 0)
        real = places < lengths
        tokens = torch.from_numpy(self.token_ids[(starts + places).where(real, 0).numpy()].astype(np.int64))
        return {"input_ids": tokens.where(real, self.pad_token_id), "attention_mask": real.long()}

    def select(self, rows: Tensor) -> Self:
        """Some of the sentences, in the given order."""
        spans = zip(self.starts[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        sentences = (self.token_ids[start : start + length] for start, length in spans)
        return type(self).of(sentences, self.pad_token_id, self.prompt)

    def order(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """A random order of an epoch in which a batch has sentences of similar length, without a last partial one."""
        pools = torch.randperm(len(self), generator=generator).split(POOL * batch_size)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        whole = [pool[: len(pool) // batch_size * batch_size].view(-1, batch_size) for pool in pools]
        in_batches = torch.cat(whole)
        return in_batches[torch.randperm(len(in_batches), generator=generator)].flatten()


def as_blocks(blocks):
    """Return `Blocks` for an array (N, S); set a `datasets.Dataset` to the format of tensors."""
    if isinstance(blocks, Tensor | np.ndarray):
        return Blocks(blocks)
    return blocks if isinstance(blocks, Blocks) else blocks.with_format("torch")


@dataclass(frozen=True)
class Masking:
    """BERT's masking: 15 % of the tokens are to be predicted; 80 % of these become [MASK], 10 % a random token.

    Special tokens, the unknown one among them, are never masked: a block with few others has fewer labels, or none.
    """

    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]  # never masked
    probability: float = 0.15

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15) -> Self:
        return cls(tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids), probability)

    def __call__(self, input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, S) token ids to masked ids and labels, both (B, S); labels are -100 at positions not to be predicted."""
        special = torch.isin(input_ids, torch.tensor(self.special_ids))  # (B, S)
        count = max(1, round(self.probability * input_ids.shape[1]))
        draw = torch.rand(input_ids.shape, generator=generator).masked_fill(special, 2.0)  # special tokens last
        chosen = torch.zeros_like(special).scatter(1, draw.argsort(1)[:, :count], True) & ~special
        labels = input_ids.where(chosen, IGNORED)
        fate = torch.rand(input_ids.shape, generator=generator)  # (B, S): < 0.8 mask, < 0.9 replace
        random_ids = torch.randint(self.vocab_size, input_ids.shape, generator=generator)
        masked = input_ids.where(~(chosen & (fate < 0.9)), random_ids)
        return masked.masked_fill(chosen & (fate < 0.8), self.mask_token_id), labels


class NextToken:
    """Causal language modelling: the label of each token is the next token."""

    def __call__(self, input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, S) token ids to the same ids and labels, (B, S); the last label of a block is -100."""
        return input_ids, torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORED)], 1)


def longest(blocks) -> int:
    """The number of tokens of the longest block."""
    return int(blocks.lengths.max()) if isinstance(blocks, Sentences) else len(blocks[0]["input_ids"])


def sample(blocks, count: int, seed: int = 0) -> Blocks:
    """`count` blocks drawn over all of them, in their order, sentences by length; all if there are fewer."""
    blocks = as_blocks(blocks)
    drawn = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    if isinstance(blocks, Sentences):
        return blocks.select(drawn[blocks.lengths[drawn].argsort(stable=True)])
    columns = blocks[drawn.tolist()]
    return Blocks(columns["input_ids"], columns.get("labels"))


class TrainingBatches(torch.utils.data.Dataset):
    """Item t is the batch of step t.

    It has `input_ids` (b, S), `labels` (b, S) and their number `label_count`, or for sentences `attention_mask` (b, S);
    and `size` (3,): blocks, tokens and pairs of tokens in a block. Numbers are those of the batch of all processes.

    Args:
        blocks: training blocks with `input_ids`, or sentences.
        task: makes inputs and labels of the blocks; None: there are no labels.
        batch_size: B, blocks a step over all processes.
        seed: of order and masks. Every epoch has another order.
        share: (rank, processes): this process gets every processes-th block; `label_count` is that of all.
    """

    def __init__(self, blocks, task: Masking | NextToken | None, batch_size: int, seed: int, share=(0, 1)):
        self.blocks, self.task, self.batch_size, self.seed = as_blocks(blocks), task, batch_size, seed
        self.rank, self.processes = share
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # (epoch, permutation)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = step * self.batch_size
        indices = [self._index(first + i) for i in range(self.batch_size)]
        own = slice(self.rank, None, self.processes)
        if self.task is None:
            return self.blocks[indices[own]] | {"size": _size(self.blocks.lengths[indices])}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        input_ids, labels = self.task(self.blocks[indices]["input_ids"], generator)
        batch = {"input_ids": input_ids[own], "labels": labels[own], "label_count": (labels != IGNORED).sum()}
        return batch | {"size": _size(torch.full((self.batch_size,), input_ids.shape[1]))}

    def _index(self, position: int) -> int:
        by_length, count = isinstance(self.blocks, Sentences), len(self.blocks)
        epoch, offset = divmod(position, count // self.batch_size * self.batch_size if by_length else count)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = self.blocks.order(self.batch_size, generator) if by_length else None
            self._order = (epoch, torch.randperm(count, generator=generator) if order is None else order)
        return int(self._order[1][offset])


def micro_batches(batch: dict[str, Tensor], size: int) -> Iterator[tuple[dict[str, Tensor], Share]]:
    """The tensors (b, S) of every `size` blocks (0: all) of a batch, and their share of the batch of all processes."""
    columns, blocks = {name: each for name, each in batch.items() if each.dim() == 2}, len(batch["input_ids"])
    for start in range(0, blocks, size or blocks):
        part = {name: each[start : start + (size or blocks)] for name, each in columns.items()}
        lengths = part.get("attention_mask", torch.ones_like(part["input_ids"])).sum(1)
        yield part, Share(*(_size(lengths) / batch["size"]).tolist())


def _size(lengths: Tensor) -> Tensor:
    """The number of blocks, of tokens, and of pairs of tokens in a block, (3,), from the lengths of the blocks."""
    lengths = lengths.double()
    return torch.stack([torch.ones_like(lengths).sum(), lengths.sum(), lengths.square().sum()])


def on_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors on a device; a GPU copies them from pinned memory, without a host synchronisation."""
    pins = device.type == "cuda"
    return [(each.pin_memory() if pins else each).to(device, non_blocking=pins) for each in tensors]


def batches(blocks, batch_size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Blocks in their order as batches of (B, S) tensors; the last batch may be smaller."""
    blocks = as_blocks(blocks)
    for start in range(0, len(blocks), batch_size):
        batch = blocks[start : start + batch_size]
        yield {name: column.to(device) for name, column in batch.items()}


def labelled_once(input_ids: Tensor, task: Masking | NextToken, seed: int) -> Blocks:
    """Held-out blocks (N, S) with fixed labels."""
    input_ids, labels = task(input_ids, torch.Generator().manual_seed(seed))
    return Blocks(input_ids, labels)
