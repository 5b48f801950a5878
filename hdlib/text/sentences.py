"""Text to sentences or passages of their natural length, for sentence encoders."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from itertools import islice

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import Sentences
from ..sentences import token_ids
from .corpus import HELD_OUT, Corpus, _check_unknown, _digest, _encoder, _hold_out, _stored, load_documents

END = re.compile(  # of a sentence: a stop, but not of an initial or a title; then white space, and no small letter
    r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))(?<!\b\w\.)(?<!\b[A-Z][a-z]\.)\s+(?=\W?[^\W_a-z])|(?<=[。！？])"""
)
TOGETHER = 1000  # sentences that are encoded together
MANY = 0.1  # a larger fraction of sentences that are cut gives a warning
RECIPE = 1  # raise it when a change in this file changes the sentences


def load_sentences(
    name_or_path: Corpus = "embedded",
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 128,
    *,
    prompt: str | None = None,
    passages: bool = False,
    text_column: str = "text",
    subset: str | None = None,
    validation_sentences: int = 1024,
    seed: int = 0,
) -> tuple[Sentences, Sentences]:
    """Load a corpus as sentences of their natural length; each is kept once, and empty ones are left out.

    Documents, files, held-out parts and errors are those of `hdlib.load_corpus`.

    Args:
        name_or_path, text_column, subset: as for `hdlib.load_corpus`.
        tokenizer: of the teacher.
        length: the most tokens of a sentence, special tokens included; the end of a longer one is not read, as in
            sentence-transformers.
        prompt: text to put before every sentence, if the teacher was trained with one; "" for none.
        passages: take every line of a document as it is; False: divide it into its sentences.
        validation_sentences: the maximum number of held-out sentences, drawn from all of them.
        seed: of the choice of held-out documents and sentences.

    Returns:
        (train, validation). No sentence is in both.
    """
    if tokenizer is None:
        raise ValueError("load_sentences needs the teacher's tokenizer: load_sentences(path, tokenizer)")
    if not 3 <= length <= tokenizer.model_max_length:
        raise ValueError(f"length must be from 3 to the teacher's {tokenizer.model_max_length} tokens; got {length}")
    documents = {part: [rows] for part, rows in load_documents(name_or_path, text_column, subset).items()}
    if "validation" not in documents:
        documents = _hold_out(*documents["train"], seed)
    encoded = partial(_encoded, text_column, tokenizer, length, prompt or "", passages)
    found = {part: Sentences(*encoded(rows), tokenizer.pad_token_id, prompt) for part, rows in documents.items()}
    held_out = found.get("validation", found["train"])
    count = len(held_out) if "validation" in found else max(1, len(held_out) // HELD_OUT)
    drawn = np.random.default_rng(seed).permutation(len(held_out))[: min(count, validation_sentences)]
    validation = held_out.select(np.sort(drawn))
    train = _without(found["train"], validation)
    for part, sentences in (("training", train), ("validation", validation)):
        if len(sentences) == 0:
            raise ValueError(f"{name_or_path}: no sentence is left for the {part} part: pass more text")
        _check_unknown(sentences, tokenizer, f"{name_or_path}: the {part} part")
        if (full := float((sentences.lengths == length).double().mean())) > MANY:
            what = f"{full:.0%} of the {part} sentences have {length} tokens, and their ends may be missing"
            warnings.warn(f"{name_or_path}: {what}: raise length", stacklevel=2)
    return train, validation


def sentences_of(text: str, passages: bool = False) -> Iterator[str]:
    """The sentences of a text, or its lines, without empty ones and those without a letter or digit."""
    for line in text.splitlines():
        for sentence in [line] if passages else END.split(line):
            if re.search(r"[^\W_]", sentence):
                yield sentence.strip()


def _encoded(column: str, tokenizer, length: int, prompt: str, passages: bool, documents: list[Dataset]):
    """The tokens (T,) and lengths (N,) of the different sentences of the documents, from the cache."""
    tokens, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for part in documents:
        recipe = (_encoder(tokenizer)[1], column, length, prompt, passages, RECIPE)
        texts = _different(part, column, passages)
        several = iter(lambda: list(islice(texts, TOGETHER)), [])  # noqa: B023
        batches = ({"input_ids": token_ids(tokenizer, each, prompt, length)} for each in several)
        schema = pa.schema({"input_ids": pa.list_(pa.int32())})
        stored = _stored("hdlib_sentences", _digest(part._fingerprint, *recipe), schema, batches)
        for chunk in stored.data.column("input_ids").chunks:
            tokens.append(chunk.flatten().to_numpy())
            lengths.append(chunk.value_lengths().to_numpy())
    return np.concatenate(tokens), np.concatenate(lengths)


def _different(documents: Dataset, column: str, passages: bool) -> Iterator[str]:
    seen = set()
    for batch in documents.iter(TOGETHER):
        for sentence in (each for text in batch[column] if text for each in sentences_of(text, passages)):
            digest = blake2b(sentence.encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                yield sentence


def _without(sentences: Sentences, others: Sentences) -> Sentences:
    """The sentences that are not among the others."""
    excluded = set(_contents(others))
    kept = [row for row, content in enumerate(_contents(sentences)) if content not in excluded]
    return sentences if len(kept) == len(sentences) else sentences.select(kept)


def _contents(sentences: Sentences) -> Iterator[bytes]:
    rows = zip(sentences.starts.tolist(), sentences.lengths.tolist(), strict=True)
    return (sentences.token_ids[start : start + length].tobytes() for start, length in rows)
