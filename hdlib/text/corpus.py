"""Text to blocks of tokens, packed without padding: [CLS] ... [SEP] for masked models, plain text for causal ones.

Blocks are made once, with all cores, and read from the cache of `datasets`. Their names in the cache depend on the
content of the files, not on their paths or dates.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from os.path import exists
from pathlib import Path

import datasets
import fsspec
import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from huggingface_hub import HfApi
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import Masking, NextToken, labelled_once
from ..models import check_reachable
from .documentation import gather

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # after one of the above: corpus.txt.zst
HELD_OUT_NAMES = {"validation", "valid", "dev", "test"}  # a file with such a word in its name is held out
HELD_OUT = 50  # without such a file, one document of this many is held out
DRAWN_TOGETHER = 1_000_000  # documents per draw of the held-out ones, 47 bytes of memory for each
SHORTEST = 8  # tokens a block
RECIPE = 3  # raise it when a change in this file changes the blocks
TOGETHER = 1000  # documents that are packed together; their last incomplete block is dropped
PART = 100_000  # documents per file of the cache; an interrupted call continues after the last complete file
PART_OF_STREAM = 10_000  # the same for a stream; this many documents are in memory
FIRST_OF_STREAM = 1000  # documents of a stream that are held out if it has no validation part


def load_corpus(
    name_or_path: str | Path | list[str | Path] = "embedded",
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 128,
    *,
    text_column: str = "text",
    subset: str | None = None,
    causal: bool | None = None,
    streaming: bool = False,
    validation_blocks: int = 1024,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Load a corpus as blocks of `length` tokens.

    Args:
        name_or_path: "embedded", the documentation on this machine; a file or folder of txt or jsonl (also compressed:
            gz, zst, bz2, xz) or parquet, or a list of them; or the name of a data set on the hub.
        tokenizer: of the teacher.
        length: S, tokens a block, [CLS] and [SEP] included.
        text_column: the column of the text in jsonl, parquet and hub data.
        subset: the configuration of a hub data set that has several.
        causal: predict the next token instead of masked ones. None: if the tokenizer has no mask token.
        streaming: store the blocks of hub data, not its text. Without a validation part, hold out 1,000 documents.
        validation_blocks: the maximum number of held-out blocks.
        seed: of the masks of the held-out blocks, and of the choice of held-out documents.

    Returns:
        (train, validation): `train` has the column `input_ids`, S tokens a row. `validation` has `input_ids` with fixed
        masks (causal: unchanged) and `labels`, the tokens to predict, -100 at all other positions. Files with the
        word "validation", "valid", "dev" or "test" in their names are held out; if there are none, one document in 50.

    Raises:
        FileNotFoundError: a path that does not exist, or a hub that cannot be reached.
        ValueError: no text, text that is not UTF-8 (with file and byte), a column that does not exist, or a length
            that is too large for the teacher.
    """
    if tokenizer is None:
        raise ValueError("load_corpus needs the teacher's tokenizer: load_corpus(path, tokenizer)")
    if not SHORTEST <= length <= tokenizer.model_max_length:
        raise ValueError(
            f"length must be from {SHORTEST} to the {tokenizer.model_max_length} positions of the teacher; got {length}"
        )
    causal = tokenizer.mask_token_id is None if causal is None else causal
    documents = {split: [part] for split, part in load_documents(name_or_path, text_column, subset, streaming).items()}
    if "validation" not in documents:
        documents = _hold_out(*documents["train"], seed)
    blocks = {split: _pack(parts, tokenizer, length, text_column, causal) for split, parts in documents.items()}
    if "validation" not in blocks:  # too few documents to draw from: hold out the last blocks
        count = max(0, len(blocks["train"]) - max(1, len(blocks["train"]) // HELD_OUT))
        blocks = {"train": blocks["train"].take(count), "validation": blocks["train"].skip(count)}
    for split, part in blocks.items():
        if len(part) == 0:
            raise ValueError(f"{name_or_path}: the {split} part has too little text for one block of {length} tokens")
    validation = blocks["validation"].take(min(validation_blocks, len(blocks["validation"])))
    task = NextToken() if causal else Masking.of(tokenizer)
    held_out = labelled_once(validation.with_format("torch")[:]["input_ids"], task, seed)
    return blocks["train"], Dataset.from_dict({name: column.tolist() for name, column in held_out.columns.items()})


def load_documents(
    name_or_path: str | Path | list[str | Path],
    text_column: str = "text",
    subset: str | None = None,
    streaming: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """The texts of `train` and, if the source has one, of `validation`. Arguments and errors as for `load_corpus`."""
    if name_or_path == "embedded":
        name_or_path = gather()
    paths = [Path(path).expanduser() for path in (name_or_path if isinstance(name_or_path, list) else [name_or_path])]
    if not paths:
        raise ValueError("the corpus is an empty list: name a file, a folder, or a data set on the hub")
    local = len(paths) > 1 or exists(paths[0])
    documents = _from_files(paths, streaming) if local else _from_hub(str(name_or_path), subset, streaming)
    for part in documents.values():
        columns = part.column_names or list(next(iter(part), {}))  # the columns of a stream may be in its rows only
        if text_column not in columns:
            raise ValueError(f"{name_or_path} has no column {text_column!r}: set text_column to one of {columns}")
    return {split: part.select_columns([text_column]) for split, part in documents.items()}


def _from_hub(name: str, subset: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    cached = exists(Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"))
    check_reachable(name, cached, lambda: HfApi().dataset_info(name, timeout=5), "data set")
    found = load_dataset(name, subset, streaming=streaming)
    return {split: found[split] for split in ("train", "validation") if split in found}


def _from_files(paths: list[Path], streaming: bool) -> dict[str, Dataset | IterableDataset]:
    files, where = _files(paths), ", ".join(map(str, paths))
    kinds = sorted({READERS[_kind(file)] for file in files})
    if not files:
        raise ValueError(f"{where} holds no text: files of type {', '.join(READERS)} are read")
    if len(kinds) > 1:
        raise ValueError(f"{where} has files of several kinds ({', '.join(kinds)}): keep one kind in a corpus")
    digests = {file: _checked(file) for file in files}
    held_out = [file for file in files if HELD_OUT_NAMES.intersection(re.split(r"[^a-z]+", file.stem.lower()))]
    train = [file for file in files if file not in held_out]
    parts = {"train": train, "validation": held_out} if train and held_out else {"train": files}
    options = {"sample_by": "paragraph"} if kinds == ["text"] else {}
    data_files = {split: [str(file) for file in part] for split, part in parts.items()}
    try:
        documents = load_dataset(kinds[0], data_files=data_files, streaming=streaming, **options)
    except (DatasetGenerationError, FileNotFoundError) as error:
        if gone := [str(file) for file in files if not file.exists()]:
            raise FileNotFoundError(f"{', '.join(gone)} disappeared while the corpus was being read") from error
        raise ValueError(f"{where} could not be read as {kinds[0]}: {error.__cause__ or error}") from error
    for split, part in documents.items():
        part._fingerprint = _digest(kinds, [digests[file] for file in parts[split]])
    return documents


def _files(paths: list[Path]) -> list[Path]:
    """The text files at these paths and in these folders. Raises FileNotFoundError if one does not exist."""
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    for file in found:
        if not exists(file):
            target = f": it points to {file.readlink()}" if file.is_symlink() else ""
            raise FileNotFoundError(f"there is no file or folder {file}{target}")
    return [file for file in found if file.is_file() and _kind(file) in READERS]


def _kind(file: Path) -> str:
    """The extension in lower case, without that of a compression."""
    return Path(file.stem if file.suffix.lower() in COMPRESSED else file.name).suffix.lower()


def _checked(file: Path) -> str:
    """A digest of the file's content. Raises ValueError for a file that is empty, damaged or not UTF-8."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: remove it")
    digest, decoder, start = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for chunk in chain(_decompressed(file), [b""]):
            digest.update(chunk)
            if _kind(file) != ".parquet":
                undecoded = len(decoder.getstate()[0])
                decoder.decode(chunk, final=not chunk)
                start += len(chunk)
    except UnicodeDecodeError as error:
        byte = start - undecoded + error.start
        raise ValueError(f"{file} is not UTF-8 text: byte {byte} cannot be decoded ({error.reason})") from error
    except ModuleNotFoundError as error:
        raise ValueError(f'{file} cannot be read without a package: pip install "hdlib[zst]"') from error
    except Exception as error:  # each compression has its own
        raise ValueError(f"{file} cannot be read to its end: {error}") from error
    return digest.hexdigest()


def _decompressed(file: Path) -> Iterator[bytes]:
    """The file's content in pieces. Raises an error if the end is missing."""
    if file.suffix.lower() != ".zst":
        with fsspec.open(str(file), "rb", compression="infer") as stream:
            yield from iter(lambda: stream.read(1 << 22), b"")
        return
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()  # its file objects do not notice a missing end
    with file.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            while chunk:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame is cut off")


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _hold_out(documents: Dataset | IterableDataset, seed: int) -> dict[str, list]:
    """One document in fifty; the first documents of a stream; none of fewer than fifty."""
    if isinstance(documents, IterableDataset):
        return {"train": [documents.skip(FIRST_OF_STREAM)], "validation": [documents.take(FIRST_OF_STREAM)]}
    if len(documents) < HELD_OUT:
        return {"train": [documents]}
    draws = -(-len(documents) // DRAWN_TOGETHER)  # each from the whole corpus, to bound memory
    parts = [
        documents.shard(draws, number, contiguous=False).train_test_split(1 / HELD_OUT, seed=seed + number)
        for number in range(draws)
    ]
    return {"train": [part["train"] for part in parts], "validation": [part["test"] for part in parts]}


def _pack(
    documents: list[Dataset] | list[IterableDataset],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str,
    causal: bool,
) -> Dataset:
    """Documents to blocks; [SEP], or for causal models the end-of-text token, is between the documents."""
    cls, sep, eos = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id
    between, edges = (sep if eos is None else eos, 0) if causal else (sep, 1)
    if between is None or (cls is None and not causal):
        needed = "causal text needs eos_token or sep_token" if causal else "masked text needs cls_token and sep_token"
        raise ValueError(f"the tokenizer has no token to put between documents: {needed}")
    definition, room = tokenizer.backend_tokenizer.to_str(), length - 2 * edges
    encoder = Tokenizer.from_str(definition)  # a copy: the tokenizer keeps its truncation and padding
    encoder.no_truncation(), encoder.no_padding()

    def pack(texts: list[str | None]) -> dict[str, np.ndarray]:
        encoded = encoder.encode_batch_fast([text for text in texts if text], add_special_tokens=False)
        ids = [np.array([*tokens.ids, between], dtype=np.int32) for tokens in encoded if len(tokens)]
        stream = np.concatenate([np.empty(0, dtype=np.int32), *ids])
        pieces = stream[: len(stream) // room * room].reshape(-1, room)
        return {"input_ids": np.pad(pieces, [(0, 0), (edges, edges)], constant_values=[(0, 0), (cls or 0, sep or 0)])}

    cache, made = Path(datasets.config.HF_DATASETS_CACHE) / "hdlib_blocks", []
    count = None if isinstance(documents[0], IterableDataset) else sum(map(len, documents))
    with _no_progress_bars(), tqdm(total=count, unit="document", desc=f"blocks of {length} tokens", delay=2) as bar:
        for part in _parts(documents, text_column):
            name = _digest(part._fingerprint, definition, length, text_column, causal, cls, between, TOGETHER, RECIPE)
            options = {"input_columns": text_column, "remove_columns": [text_column], "new_fingerprint": name}
            options |= {"batched": True, "batch_size": TOGETHER, "cache_file_name": str(cache / f"{name}.arrow")}
            with FileLock(cache / f"{name}.lock"):  # the first of several processes makes them
                made.append(part.map(pack, **options))
            bar.update(len(part))
    if not made:
        raise ValueError("a part of the corpus is empty: a stream needs more documents than are held out of it")
    return concatenate_datasets(made)


def _parts(documents: list[Dataset] | list[IterableDataset], text_column: str) -> Iterator[Dataset]:
    """The documents in parts that are one file of the cache each."""
    for several in documents:
        if isinstance(several, IterableDataset):
            for batch in several.iter(PART_OF_STREAM):
                yield Dataset.from_dict({text_column: batch[text_column]})
        else:
            for start in range(0, len(several), PART):
                yield several.select(range(start, min(start + PART, len(several))))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hides the bars of `datasets`, one a part."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
