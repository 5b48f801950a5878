"""A corpus as token blocks of equal length, packed without padding.

Blocks are [CLS] ... [SEP] for masked models and the plain stream of tokens for causal ones. They are stored in the
cache of `datasets` under a fingerprint of the files' content, so a corpus may be moved or copied.
"""

from __future__ import annotations

import codecs
import hashlib
import lzma
import re
import zlib
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
HELD_OUT_NAMES = {"validation", "valid", "dev", "test"}  # files with such a word in their names are held out
HELD_OUT = 50  # without such a file, one document in 50 is held out
DRAWN_TOGETHER = 1_000_000  # documents sampled at a time, to bound memory (47 bytes each)
SHORTEST = 8  # tokens a block
RECIPE = 2  # raise it when blocks change, so that no old cache is used
TOGETHER = 1000  # documents packed together; the remainder of less than one block is dropped
PART = 100_000  # documents a cache file; an interrupted start continues after the last complete one
PART_OF_STREAM = 10_000  # the same for a stream, whose part is held in memory
FIRST_OF_STREAM = 1000  # documents held out of a stream without a validation part


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
        name_or_path: "embedded" for the English documentation on this disk; a file or folder of txt, jsonl (both also
            gz, zst, bz2 or xz) or parquet, or a list of them; or the name of a data set on the hub.
        tokenizer: of the teacher.
        length: S, tokens a block, [CLS] and [SEP] included.
        text_column: column of the text in jsonl, parquet and hub data.
        subset: configuration of a hub data set that has several.
        causal: label the next token instead of masked ones; None: if the tokenizer has no mask token.
        streaming: pack the text while it is downloaded, and store only the blocks. Without a validation part the
            first 1,000 documents are held out.
        validation_blocks: at most so many held-out blocks are returned.
        seed: of the held-out masks, and of the hold-out if the data has no validation part.

    Returns:
        (train, validation), each a `datasets.Dataset`. `train` has `input_ids` (S,). `validation` has masked
        `input_ids` and the fixed `labels`, -100 where nothing is predicted; for causal models plain `input_ids` and
        the next tokens. Held out are files named "validation", "valid", "dev" or "test", else one document in 50.

    Raises:
        FileNotFoundError: the path does not exist, or the hub cannot be reached.
        ValueError: no text, text that is not UTF-8 (names file and byte), no such column, or an impossible length.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is missing: load_corpus(path, tokenizer) needs the tokenizer of the teacher")
    if not SHORTEST <= length <= tokenizer.model_max_length:
        raise ValueError(
            f"length must be from {SHORTEST} to {tokenizer.model_max_length}, the teacher's positions; got {length}"
        )
    causal = tokenizer.mask_token_id is None if causal is None else causal
    documents = {split: [part] for split, part in load_documents(name_or_path, text_column, subset, streaming).items()}
    if "validation" not in documents:
        documents = _hold_out(*documents["train"], seed)
    blocks = {split: _pack(part, tokenizer, length, text_column, causal) for split, part in documents.items()}
    if "validation" not in blocks:  # few long documents: hold out the last blocks
        count = max(0, len(blocks["train"]) - max(1, len(blocks["train"]) // HELD_OUT))
        blocks = {"train": blocks["train"].take(count), "validation": blocks["train"].skip(count)}
    for split, part in blocks.items():
        if len(part) == 0:
            raise ValueError(
                f"{name_or_path}: the {split} part has too little text for one block of {length} tokens. Add text or "
                "use a smaller length"
            )
    validation = blocks["validation"].select(range(min(validation_blocks, len(blocks["validation"]))))
    task = NextToken() if causal else Masking.of(tokenizer)
    held_out = labelled_once(validation.with_format("torch")[:]["input_ids"], task, seed)
    return blocks["train"], Dataset.from_dict({name: column.tolist() for name, column in held_out.columns.items()})


def check_there(name_or_path: str) -> None:
    """Raise FileNotFoundError for a path that does not exist; a possible hub name passes without a request."""
    check_reachable(str(Path(name_or_path).expanduser()), False, lambda: None, "data set")


def load_documents(
    name_or_path: str | Path | list[str | Path],
    text_column: str = "text",
    subset: str | None = None,
    streaming: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """The texts as `train` and, if the source has one, `validation`. Arguments as for `load_corpus`."""
    if name_or_path == "embedded":
        name_or_path = gather()
    paths = [Path(path).expanduser() for path in (name_or_path if isinstance(name_or_path, list) else [name_or_path])]
    if not paths:
        raise ValueError("the corpus is an empty list: pass a file, a folder, or the name of a data set")
    local = len(paths) > 1 or exists(paths[0])
    documents, contents = (
        _from_files(paths, streaming) if local else (_from_hub(str(name_or_path), subset, streaming), {})
    )
    for split, part in documents.items():
        columns = part.column_names or list(next(iter(part), {}))  # unknown for some streams before reading
        if text_column not in columns:
            raise ValueError(
                f"{name_or_path} ({split}) has no column {text_column!r}; it has {columns}: "
                "pass one of them as text_column"
            )
    if streaming:
        return {split: part.select_columns([text_column]) for split, part in documents.items()}
    contents = {split: part._fingerprint for split, part in documents.items()} | contents
    return {
        split: part.select_columns([text_column], new_fingerprint=_digest(contents[split], text_column))
        for split, part in documents.items()
    }


def _from_files(paths: list[Path], streaming: bool) -> tuple[dict, dict[str, str]]:
    """The documents of each part, and a fingerprint of its files."""
    for path in paths:
        if not exists(path):
            raise FileNotFoundError(f"there is no file or folder {path}")
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    for file in found:
        if file.is_symlink() and not file.exists():
            raise FileNotFoundError(f"{file} is a link to {file.readlink()}, which does not exist")
    files = [file for file in found if file.is_file() and _kind(file) in READERS]
    where = ", ".join(map(str, paths))
    if not files:
        raise ValueError(f"{where} has no text files: add files of type {', '.join(READERS)}")
    kinds = sorted({READERS[_kind(file)] for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{where} mixes files of several kinds ({', '.join(kinds)}): use one kind for a corpus")
    digests = {file: _checked(file) for file in files}
    held_out = [file for file in files if HELD_OUT_NAMES.intersection(re.split(r"[^a-z]+", file.stem.lower()))]
    parts = {"train": [file for file in files if file not in held_out], "validation": held_out}
    if not parts["train"]:  # a single test file is a corpus too
        parts = {"train": held_out}
    options = {"sample_by": "paragraph"} if kinds == ["text"] else {}
    data_files = {split: [str(file) for file in part] for split, part in parts.items() if part}
    try:
        documents = load_dataset(kinds[0], data_files=data_files, streaming=streaming, **options)
    except (DatasetGenerationError, FileNotFoundError) as error:
        if gone := [str(file) for file in files if not file.exists()]:
            raise FileNotFoundError(f"{', '.join(gone)} disappeared while the corpus was read") from error
        raise ValueError(f"{where} could not be read as {kinds[0]}: {error.__cause__ or error}") from error
    return documents, {split: _digest(kinds, [digests[file] for file in part]) for split, part in parts.items()}


def _from_hub(name: str, subset: str | None, streaming: bool) -> dict:
    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    check_reachable(name, cached, lambda: HfApi().dataset_info(name, timeout=5), "data set")
    found = load_dataset(name, subset, streaming=streaming)
    return {split: found[split] for split in ("train", "validation") if split in found}


def _kind(file: Path) -> str:
    """The lower-case suffix that determines the reader, without that of a compression."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSED else file
    return name.suffix.lower()


def _checked(file: Path) -> str:
    """SHA-256 of the decompressed file. Raises ValueError for a file that is empty, damaged or not UTF-8."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: remove it from the corpus")
    digest, is_text = hashlib.sha256(), _kind(file) != ".parquet"
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for chunk in chain(_decompressed(file), [b""]):
            digest.update(chunk)
            if is_text:
                held_back = len(decoder.getstate()[0])
                decoder.decode(chunk, final=not chunk)
                done += len(chunk)
    except UnicodeDecodeError as error:
        byte = done - held_back + error.start
        raise ValueError(f"{file} is not UTF-8 text: byte {byte} ({error.reason}). Convert it to UTF-8") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read to its end: {error}. Restore or remove it") from error
    return digest.hexdigest()


def _decompressed(file: Path) -> Iterator[bytes]:
    """Chunks of the file. Raises EOFError or an error of the compression for a truncated file."""
    if file.suffix.lower() != ".zst":
        with fsspec.open(str(file), "rb", compression="infer") as stream:
            yield from iter(lambda: stream.read(1 << 22), b"")
        return
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError(f'{file} needs the package zstandard: pip install "hdlib[zst]"') from error
    frame = zstandard.ZstdDecompressor().decompressobj()  # the package's streams accept a truncated file
    with file.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            while chunk:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame is truncated")


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _pack(
    documents: list[Dataset] | list[IterableDataset],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str,
    causal: bool,
) -> Dataset:
    """Pack documents into blocks [CLS] tokens [SEP], with [SEP] between documents.

    For causal models: the plain stream of tokens, with the end-of-text token between documents.
    """
    frame = ([], []) if causal else ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    between = tokenizer.sep_token_id
    if causal and tokenizer.eos_token_id is not None:
        between = tokenizer.eos_token_id
    if between is None or None in frame[0]:
        raise ValueError(
            "the tokenizer has no separator for documents: "
            + ("causal text needs eos_token or sep_token" if causal else "masked text needs cls_token and sep_token")
        )
    room = length - len(frame[0]) - len(frame[1])
    recipe = (tokenizer.backend_tokenizer.to_str(), length, text_column, frame, between, TOGETHER, PART, RECIPE)
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy keeps the original unchanged
    encoder.no_truncation(), encoder.no_padding()

    def pack(texts: list[str | None]) -> dict[str, np.ndarray]:
        encoded = encoder.encode_batch_fast([text for text in texts if text], add_special_tokens=False)
        documents = [np.array([*tokens.ids, between], dtype=np.int32) for tokens in encoded if len(tokens)]
        stream = np.concatenate([np.empty(0, dtype=np.int32), *documents])
        pieces = stream[: len(stream) // room * room].reshape(-1, room)
        start, end = ([np.full((len(pieces), 1), token, dtype=np.int32) for token in part] for part in frame)
        return {"input_ids": np.hstack([*start, pieces, *end])}

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "hdlib_blocks"
    cache.mkdir(parents=True, exist_ok=True)
    made, count = [], None if isinstance(documents[0], IterableDataset) else sum(map(len, documents))
    bar = tqdm(total=count, unit="document", desc=f"blocks of {length} tokens", delay=2)
    with bar, _one_progress_bar():
        for identity, part in _parts(documents, text_column):
            name = _digest(identity, recipe)
            with FileLock(cache / f"{name}.lock"):  # one of several processes packs, the others wait
                blocks = part.map(
                    pack,
                    batched=True,
                    batch_size=TOGETHER,
                    input_columns=text_column,
                    remove_columns=[text_column],
                    cache_file_name=str(cache / f"{name}.arrow"),
                    new_fingerprint=name,
                )
            made.append(blocks)
            bar.update(len(part))
    if not made:
        raise ValueError("a part of the corpus is empty: a stream needs more documents than are held out")
    return concatenate_datasets(made)


def _parts(documents: list[Dataset] | list[IterableDataset], text_column: str) -> Iterator[tuple[tuple, Dataset]]:
    """Parts of the documents, each with its identity for the cache."""
    for several in documents:
        if isinstance(several, IterableDataset):
            for batch in several.iter(PART_OF_STREAM):
                yield ("stream", _digest(batch[text_column])), Dataset.from_dict({text_column: batch[text_column]})
            continue
        for start in range(0, len(several), PART):
            part = several.select(range(start, min(start + PART, len(several))))
            yield (several._fingerprint, start), part


@contextmanager
def _one_progress_bar() -> Iterator[None]:
    """Hide the progress bar that `datasets` shows for each part."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _hold_out(documents: Dataset | IterableDataset, seed: int) -> dict[str, list]:
    """Hold out one document in 50; of a stream the first 1,000; of fewer than 50 documents none."""
    if isinstance(documents, IterableDataset):
        return {"train": [documents.skip(FIRST_OF_STREAM)], "validation": [documents.take(FIRST_OF_STREAM)]}
    if len(documents) < HELD_OUT:
        return {"train": [documents]}
    draws = -(-len(documents) // DRAWN_TOGETHER)
    parts = [
        documents.shard(draws, number, contiguous=False).train_test_split(1 / HELD_OUT, seed=seed + number)
        for number in range(draws)  # every shard spans the whole corpus
    ]
    return {"train": [part["train"] for part in parts], "validation": [part["test"] for part in parts]}
