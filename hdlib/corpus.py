"""Text to fixed-length token blocks, and blocks to batches with something to predict.

Blocks are packed without padding, [CLS] ... [SEP] for masked models, the bare stream of text for causal
ones. They are made once, by all cores, and kept in the cache of `datasets` under a name that follows from what the
files hold, so that a corpus may be moved or copied; they are read from there as they are needed, whatever their size.
The batch of step t is a pure function of (seed, t): a resumed run sees what the undisturbed one saw, and N processes
share out the batch that one process would have had.
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
from datasets import (
    Dataset,
    IterableDataset,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from huggingface_hub import HfApi
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import Masking, NextToken, labelled_once
from .documentation import gather

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # after one of the above: corpus.txt.zst
HELD_OUT_NAMES = {"validation", "valid", "dev", "test"}  # files with such a word in their names are not trained on
HELD_OUT = 50  # without such a file, one document in so many is
DRAWN_TOGETHER = 1_000_000  # documents it is drawn from at a time, 47 bytes of memory for each
SHORTEST = 8  # tokens a block
RECIPE = 2  # raise it when blocks are made in another way, so that no old cache is taken for the new
TOGETHER = 1000  # documents that are made into blocks together; what is left of them at the end is dropped
PART = 100_000  # documents to a file of the cache; what is killed meanwhile goes on after the last whole one
PART_OF_STREAM = 10_000  # the same of a stream, of which so many are held in memory
FIRST_OF_STREAM = 1000  # documents of a stream that are held out where it has no validation part


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
    """A corpus as blocks of `length` tokens.

    Args:
        name_or_path: "embedded" for the English documentation on this installation's disk; a file or a
            folder of txt, jsonl (both perhaps gz, zst, bz2 or xz) or parquet, or a list of them; or a data set's name
            on the hub.
        tokenizer: the teacher's.
        length: S, tokens a block, [CLS] and [SEP] included.
        text_column: where the text is in jsonl, parquet and hub data.
        subset: the configuration of a hub data set that has several.
        causal: the next token is to be predicted instead of masked ones; None: if the tokenizer has no mask token.
        streaming: make blocks of the text as it comes down, and keep nothing but them on disk: for hub data that
            would not fit there. Without a validation part its first 1,000 documents are held out.
        validation_blocks: at most so many blocks are held out.
        seed: of the held-out masks (and of the hold-out, where the data has no validation part).

    Returns:
        (train, validation): `train` with `input_ids`; `validation` with `input_ids` that are masked once
        and for all and the `labels` of the masked positions (-100 elsewhere), or, causal, the plain `input_ids` and
        as the label of each the token after it. Files with the word "validation",
        "valid", "dev" or "test" in their names are held out; without any, one document in fifty is.

    Raises:
        FileNotFoundError: nothing there, or the hub cannot be reached.
        ValueError: no text, text that is not UTF-8 (names file and byte), no such column, or a length
            that the tokenizer's model cannot take.
    """
    if tokenizer is None:
        raise ValueError("load_corpus needs the teacher's tokenizer: load_corpus(path, tokenizer)")
    if not SHORTEST <= length <= tokenizer.model_max_length:
        raise ValueError(
            f"length is from {SHORTEST} to the {tokenizer.model_max_length} positions of the teacher; got {length}"
        )
    causal = tokenizer.mask_token_id is None if causal is None else causal
    documents = {split: [part] for split, part in load_documents(name_or_path, text_column, subset, streaming).items()}
    if "validation" not in documents:
        documents = _hold_out(*documents["train"], seed)
    blocks = {split: _pack(part, tokenizer, length, text_column, causal) for split, part in documents.items()}
    if "validation" not in blocks:  # a few long documents: the end of the last one
        count = max(0, len(blocks["train"]) - max(1, len(blocks["train"]) // HELD_OUT))
        blocks = {"train": blocks["train"].take(count), "validation": blocks["train"].skip(count)}
    for split, part in blocks.items():
        if len(part) == 0:
            raise ValueError(f"{name_or_path}: the {split} part has too little text for one block of {length} tokens")
    validation = blocks["validation"].select(range(min(validation_blocks, len(blocks["validation"]))))
    task = NextToken() if causal else Masking.of(tokenizer)
    held_out = labelled_once(validation.with_format("torch")[:]["input_ids"], task, seed)
    return blocks["train"], Dataset.from_dict({name: column.tolist() for name, column in held_out.columns.items()})


def check_there(name_or_path: str) -> None:
    """Raise FileNotFoundError for a path to nothing; what may be a name on the hub passes without being asked for."""
    only_a_path = name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~"))
    if only_a_path and not exists(Path(name_or_path).expanduser()):
        raise FileNotFoundError(f"there is no file or folder {name_or_path}")


def load_documents(
    name_or_path: str | Path | list[str | Path],
    text_column: str = "text",
    subset: str | None = None,
    streaming: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """The texts, split into train and, where the source has one, validation. Arguments as for `load_corpus`."""
    if name_or_path == "embedded":
        name_or_path = gather()
    paths = [Path(path).expanduser() for path in (name_or_path if isinstance(name_or_path, list) else [name_or_path])]
    if not paths:
        raise ValueError("the corpus is an empty list: name a file, a folder, or a data set on the hub")
    local = len(paths) > 1 or exists(paths[0])
    documents, contents = (
        _from_files(paths, streaming) if local else (_from_hub(str(name_or_path), subset, streaming), {})
    )
    for split, part in documents.items():
        columns = part.column_names or list(next(iter(part), {}))  # a stream may not know before it is read
        if text_column not in columns:
            raise ValueError(
                f"{name_or_path} ({split}) has no column {text_column!r}; it has {columns}: "
                "say which of them with text_column"
            )
    if streaming:
        return {split: part.select_columns([text_column]) for split, part in documents.items()}
    contents = {split: part._fingerprint for split, part in documents.items()} | contents
    return {
        split: part.select_columns([text_column], new_fingerprint=_digest(contents[split], text_column))
        for split, part in documents.items()
    }


def _from_files(paths: list[Path], streaming: bool) -> tuple[dict, dict[str, str]]:
    """The documents of each part, and what tells its files' content from any other."""
    for path in paths:
        if not exists(path):
            raise FileNotFoundError(f"there is no file or folder {path}")
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    for file in found:
        if file.is_symlink() and not file.exists():
            raise FileNotFoundError(f"{file} points to {file.readlink()}, which is not there")
    files = [file for file in found if file.is_file() and _kind(file) in READERS]
    where = ", ".join(map(str, paths))
    if not files:
        raise ValueError(f"{where} holds no text: files of type {', '.join(READERS)} are read")
    kinds = sorted({READERS[_kind(file)] for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{where} mixes files of several kinds ({', '.join(kinds)}): keep one kind in a corpus")
    digests = {file: _checked(file) for file in files}
    held_out = [file for file in files if HELD_OUT_NAMES.intersection(re.split(r"[^a-z]+", file.stem.lower()))]
    parts = {"train": [file for file in files if file not in held_out], "validation": held_out}
    if not parts["train"]:  # nothing but a test file is still a corpus
        parts = {"train": held_out}
    options = {"sample_by": "paragraph"} if kinds == ["text"] else {}
    data_files = {split: [str(file) for file in part] for split, part in parts.items() if part}
    try:
        documents = load_dataset(kinds[0], data_files=data_files, streaming=streaming, **options)
    except (DatasetGenerationError, FileNotFoundError) as error:
        if gone := [str(file) for file in files if not file.exists()]:
            raise FileNotFoundError(f"{', '.join(gone)} disappeared while the corpus was being read") from error
        raise ValueError(f"{where} could not be read as {kinds[0]}: {error.__cause__ or error}") from error
    return documents, {split: _digest(kinds, [digests[file] for file in part]) for split, part in parts.items()}


def _from_hub(name: str, subset: str | None, streaming: bool) -> dict:
    check_there(name)
    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists():
        try:
            HfApi().dataset_info(name, timeout=5)
        except Exception as error:
            raise FileNotFoundError(
                f"{name!r} is no local file or folder, and the hub could not be asked for a data set of that name "
                f'({type(error).__name__}). Pass a folder of txt, jsonl or parquet files, or "embedded".'
            ) from error
    found = load_dataset(name, subset, streaming=streaming)
    return {split: found[split] for split in ("train", "validation") if split in found}


def _kind(file: Path) -> str:
    """The ending that says how a file is read, in small letters; that of a compression comes after it."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSED else file
    return name.suffix.lower()


def _checked(file: Path) -> str:
    """What tells the file's content from any other. Raises ValueError for a file that is empty, broken or not UTF-8."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
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
        raise ValueError(f"{file} is not UTF-8 text: byte {byte} cannot be decoded ({error.reason})") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read to its end: {error}") from error
    return digest.hexdigest()


def _decompressed(file: Path) -> Iterator[bytes]:
    """The file's content. Raises an error of its compression, or EOFError, where that does not come to its end."""
    if file.suffix.lower() != ".zst":
        with fsspec.open(str(file), "rb", compression="infer") as stream:
            yield from iter(lambda: stream.read(1 << 22), b"")
        return
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError(f'{file} needs a package to be read: pip install "hdlib[zst]"') from error
    frame = zstandard.ZstdDecompressor().decompressobj()  # its streams take any end for a good one
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
        raise EOFError("the last frame is cut off")


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _pack(
    documents: list[Dataset] | list[IterableDataset],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str,
    causal: bool,
) -> Dataset:
    """Documents to blocks [CLS] tokens [SEP], the documents separated by [SEP] inside them.

    Causal models read the stream as it comes, with the end-of-text token between documents.
    """
    frame = ([], []) if causal else ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    between = tokenizer.sep_token_id
    if causal and tokenizer.eos_token_id is not None:
        between = tokenizer.eos_token_id
    if between is None or None in frame[0]:
        raise ValueError(
            "the tokenizer has no token to put between documents: "
            + ("causal text needs eos_token or sep_token" if causal else "masked text needs cls_token and sep_token")
        )
    room = length - len(frame[0]) - len(frame[1])
    recipe = (tokenizer.backend_tokenizer.to_str(), length, text_column, frame, between, TOGETHER, PART, RECIPE)
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, so that the tokenizer stays as it is
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
    with bar, _without_bars():
        for identity, part in _parts(documents, text_column):
            name = _digest(identity, recipe)
            with FileLock(cache / f"{name}.lock"):  # the first of several processes makes them
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
        raise ValueError("a part of the corpus is empty: a stream needs more documents than are held out of it")
    return concatenate_datasets(made)


def _parts(documents: list[Dataset] | list[IterableDataset], text_column: str) -> Iterator[tuple[tuple, Dataset]]:
    """Documents a part at a time, each with what tells it from any other."""
    for several in documents:
        if isinstance(several, IterableDataset):
            for batch in several.iter(PART_OF_STREAM):
                yield ("stream", _digest(batch[text_column])), Dataset.from_dict({text_column: batch[text_column]})
            continue
        for start in range(0, len(several), PART):
            part = several.select(range(start, min(start + PART, len(several))))
            yield (several._fingerprint, start), part


@contextmanager
def _without_bars() -> Iterator[None]:
    """None of `datasets` for each part: one bar counts them all."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def _hold_out(documents: Dataset | IterableDataset, seed: int) -> dict[str, list]:
    """One document in fifty; of a stream, which nobody can pick from, the first ones; of a few none."""
    if isinstance(documents, IterableDataset):
        return {"train": [documents.skip(FIRST_OF_STREAM)], "validation": [documents.take(FIRST_OF_STREAM)]}
    if len(documents) < HELD_OUT:
        return {"train": [documents]}
    draws = -(-len(documents) // DRAWN_TOGETHER)
    parts = [
        documents.shard(draws, number, contiguous=False).train_test_split(1 / HELD_OUT, seed=seed + number)
        for number in range(draws)  # each draws from the whole corpus: a few of them are as good as all
    ]
    return {"train": [part["train"] for part in parts], "validation": [part["test"] for part in parts]}
