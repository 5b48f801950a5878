"""Text to blocks of tokens, packed without padding: [CLS] ... [SEP] for masked models, plain text for causal ones.

Blocks are made once, with all cores, and read from the cache of `datasets`. Their names in the cache depend on the
content of the files, not on their paths or dates.
"""

from __future__ import annotations

import codecs
import hashlib
import lzma
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from os.path import exists
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value, concatenate_datasets
from filelock import FileLock
from huggingface_hub import HfApi
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import Masking, NextToken, labelled_once
from ..models import check_reachable, hub_timeout
from .documentation import gather
from .reading import HELD_OUT_NAMES, LONGEST, READERS, documents, extension, opened, pieces, text_files, text_of

HELD_OUT = 50  # without such a file, one document of this many is held out
DRAWN_TOGETHER = 1_000_000  # documents per draw of the held-out ones, 47 bytes of memory for each
SHORTEST = 8  # tokens a block
RECIPE = 5  # raise it when a change in this file or in `reading` changes the blocks
TOGETHER = 1000  # documents that are packed together; their last incomplete block is dropped
ENCODED_TOGETHER = 64  # documents whose tokens are held as Python objects
PART = 100_000  # documents per file of the cache; an interrupted call continues after the last complete file
PART_OF_STREAM = 10_000  # the same for a stream; this many documents are in memory
FIRST_OF_STREAM = 1000  # documents of a stream that are held out if it has no validation part
UNKNOWN = 0.03  # a larger share of unknown tokens gives a warning
COMPARED = 10_000  # held-out documents that are looked up in the training part

Corpus = str | Path | list[str | Path] | Dataset | DatasetDict | IterableDataset | IterableDatasetDict


def load_corpus(
    name_or_path: Corpus = "embedded",
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

    A document is a row of jsonl, json or parquet, or in txt the text between blank lines; in a txt file without blank
    lines, each line. A document of more than 50,000 characters is cut into several. Special tokens in a text, such as
    a literal [MASK], are encoded as plain text.

    The words "validation", "valid", "val", "dev" and "test" in a name mark held-out text. The nearest folder with such
    a word or "train" decides for its files, else the name of the file. Folders above the given one do not count.
    Without held-out files, one document in 50 is held out. Hidden files and copies of another file are not read.

    Args:
        name_or_path: "embedded", the documentation on this machine; a file or folder of txt, jsonl or json (also
            compressed: gz, zst, bz2, xz) or parquet, or a list of them; a folder written by `save_to_disk`; the name
            of a data set on the hub; or a data set of the library `datasets` in memory.
        tokenizer: of the teacher.
        length: S, tokens a block, [CLS] and [SEP] included.
        text_column: the column of the text in all but txt files; "a.b" is the field b of column a.
        subset: the configuration of a hub data set that has several.
        causal: predict the next token instead of masked ones. None: if the tokenizer has no mask token.
        streaming: store the blocks of hub data, not its text. Without a validation part, hold out 1,000 documents.
        validation_blocks: the maximum number of held-out blocks, drawn from all of them.
        seed: of the masks of the held-out blocks, and of the choice of held-out documents and blocks.

    Returns:
        (train, validation): `train` has the column `input_ids`, S tokens a row. `validation` has `input_ids` with fixed
        masks (causal: unchanged) and `labels`, the tokens to predict, -100 at all other positions.

    Raises:
        FileNotFoundError: a path that does not exist, or a hub that cannot be reached.
        ValueError: no text, text that is not UTF-8 (with file and byte), or a length too large for the teacher; a
            column that does not exist or holds no text (with file and row); only unknown tokens.
    """
    if tokenizer is None:
        raise ValueError("load_corpus needs the teacher's tokenizer: load_corpus(path, tokenizer)")
    if not SHORTEST <= length <= tokenizer.model_max_length:
        raise ValueError(
            f"length must be from {SHORTEST} to the {tokenizer.model_max_length} positions of the teacher; got {length}"
        )
    if validation_blocks < 1 or seed < 0:
        raise ValueError(f"validation_blocks must be at least 1 and seed 0; got {validation_blocks} and {seed}")
    causal = tokenizer.mask_token_id is None if causal is None else causal
    documents = {split: [part] for split, part in load_documents(name_or_path, text_column, subset, streaming).items()}
    if "validation" not in documents:
        documents = _hold_out(*documents["train"], seed)
    if "validation" in documents:
        _warn_of_common_documents(**documents, column=text_column)
    blocks = {split: _pack(parts, tokenizer, length, text_column, causal) for split, parts in documents.items()}
    drawn = np.random.default_rng(seed).permutation(len(blocks.get("validation", blocks["train"])))
    if "validation" not in blocks:  # too few documents to draw from: hold out blocks
        drawn, rest = np.split(drawn, [max(1, len(drawn) // HELD_OUT)])
        blocks = {"train": blocks["train"].select(np.sort(rest)), "validation": blocks["train"]}
    blocks["validation"] = blocks["validation"].select(drawn[:validation_blocks])
    source = name_or_path if isinstance(name_or_path, str | Path | list | tuple) else "the data set"
    for split, part in blocks.items():
        if len(part) == 0:
            raise ValueError(f"{source}: the {split} part has too little text for one block of {length} tokens")
        _check_unknown(part, tokenizer, f"{source}: the {split} part")
    task = NextToken() if causal else Masking.of(tokenizer)
    held_out = labelled_once(blocks["validation"].with_format("torch")[:]["input_ids"], task, seed)
    return blocks["train"], Dataset.from_dict({name: column.tolist() for name, column in held_out.columns.items()})


def load_documents(
    name_or_path: Corpus, text_column: str = "text", subset: str | None = None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """The texts of `train` and, if the source has one, of `validation`. Arguments and errors as for `load_corpus`."""
    if not isinstance(text_column, str):
        raise ValueError(f"text_column must be the name of a column; got {text_column!r}")
    if isinstance(name_or_path, Dataset | IterableDataset | DatasetDict | IterableDatasetDict):
        return _from_datasets(name_or_path, text_column, "the data set")
    names = list(name_or_path) if isinstance(name_or_path, list | tuple) else [name_or_path]
    if wrong := [name for name in names or [names] if not isinstance(name, str | Path) or not str(name).strip()]:
        raise ValueError(f"a corpus is a path, a list of paths, a data set or a name on the hub; got {wrong[0]!r:.50}")
    paths = [Path(os.path.expanduser(gather() if name == "embedded" else name)) for name in names]
    if len(paths) == 1 and not exists(paths[0]):
        return _from_hub(str(names[0]), text_column, subset, streaming)
    if len(paths) == 1 and any((paths[0] / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_disk(paths[0], text_column)
    return _from_files(paths, text_column, streaming)


def _from_hub(name: str, column: str, subset: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    cached = exists(Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"))
    check_reachable(name, lambda: cached or HfApi().dataset_info(name, timeout=hub_timeout()), "data set")
    try:
        found = datasets.load_dataset(name, subset, streaming=streaming)
    except Exception as error:  # has many causes: no connection, no such configuration, a script
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"the data set {name!r} could not be loaded: {' '.join(str(error).split())}") from error
    return _from_datasets(found, column, name)


def _from_disk(folder: Path, column: str) -> dict[str, Dataset]:
    """What `save_to_disk` wrote."""
    path = str(folder.absolute())
    try:
        if "::" in path:
            raise ValueError("`datasets` takes :: for a chain of addresses; rename the folder")
        found = datasets.load_from_disk(path)
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise ValueError(f"{folder} could not be read as a folder of save_to_disk: {error}") from error
    return _from_datasets(found, column, str(folder))


def _from_datasets(found: Dataset | IterableDataset | dict, column: str, where: str) -> dict:
    """The text of the part `train`, and of the first part with a name of held-out text."""
    parts = found if isinstance(found, dict) else {"train": found}
    if "train" not in parts:
        raise ValueError(f"{where} has no part `train` but {', '.join(parts)}: pass the data set of one part")
    held_out = [name for name in HELD_OUT_NAMES if name in parts][:1]
    names = zip(("train", "validation"), ("train", *held_out), strict=False)
    return {split: _only_text(parts[name], column, f"{where}, part {name}") for split, name in names}


def _only_text(part: Dataset | IterableDataset, column: str, where: str) -> Dataset | IterableDataset:
    def text(row: dict, number: int) -> dict[str, str | None]:
        return {column: text_of(dict(row), column, f"{where}, row {number + 1}")}

    part = part.with_format(None)
    if (part.features or {}).get(column) not in (Value("string"), Value("large_string")):
        part = part.map(text, with_indices=True)  # raises an error at the first row without text
    return part.select_columns([column])


def _from_files(paths: list[Path], column: str, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    held_out, where = text_files(paths), ", ".join(map(str, paths))
    kinds = sorted({READERS[extension(file)] for file in held_out})
    if not held_out:
        raise ValueError(f"{where} holds no text: files of type {', '.join(READERS)} are read")
    if len(kinds) > 1:
        raise ValueError(f"{where} has files of several kinds ({', '.join(kinds)}): keep one kind in a corpus")
    state = {file: _state(file) for file in held_out}
    digests = {file: _checked(file) for file in held_out}

    def require_unchanged() -> None:
        if changed := [file for file in held_out if _state(file) != state[file]]:
            raise ValueError(f"{changed[0]} was changed while it was being read: load the corpus again")

    found = {}
    for split, files in _without_copies(held_out, digests, where).items():
        found[split] = IterableDataset.from_generator(documents, gen_kwargs={"files": files, "column": column})
        if not streaming:
            name = _digest(kinds, [digests[file] for file in files], column, LONGEST, RECIPE)
            schema = pa.schema({column: pa.string()})
            found[split] = _stored("hdlib_documents", name, schema, found[split].iter(TOGETHER), require_unchanged)
    return found


def _state(file: Path) -> tuple[int, int]:
    """Size and time of the last change. Raises FileNotFoundError for a file that has disappeared."""
    return file.stat().st_size, file.stat().st_mtime_ns


def _without_copies(held_out: dict[Path, bool], digests: dict[Path, str], where: str) -> dict[str, list[Path]]:
    """The files of each part, the first one of each content; of equal files in both parts, the held-out one."""
    by_part = sorted(held_out, key=held_out.get, reverse=True)
    first = {digests[file]: file for file in reversed(by_part)}
    parts = {"train": [], "validation": []}
    for file in (file for file in held_out if first[digests[file]] == file):
        parts["validation" if held_out[file] else "train"].append(file)
    if copies := [f"{file} (as {first[digests[file]]})" for file in held_out if first[digests[file]] != file]:
        named = ", ".join(copies[:3])
        warnings.warn(f"{len(copies)} files have the content of another file and are not read: {named}", stacklevel=5)
    if all(held_out.values()):
        named = ", ".join(map(str, parts["validation"][:3]))
        warnings.warn(f"all files have names of held-out text and are read as one corpus: {named}", stacklevel=5)
        return {"train": parts["validation"]}
    if not parts["train"]:
        raise ValueError(f"{where} has no file to train on that is not also held out: remove the copies")
    return {split: files for split, files in parts.items() if files}


def _stored(
    folder: str, name: str, schema: pa.Schema, batches: Iterable[dict[str, list]], check: Callable = lambda: None
) -> Dataset:
    """The rows, from the cache; the first of several processes writes them. `check` raises to prevent it."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / folder / f"{name}.arrow"
    draft = path.with_suffix(".draft")
    with FileLock(path.with_suffix(".lock")):
        if missing := not path.exists():
            with pa.ipc.new_stream(str(draft), schema) as writer:
                for columns in batches:
                    writer.write_table(pa.table(columns, schema))
        check()
        if missing:
            draft.rename(path)
    stored = Dataset.from_file(str(path))
    stored._fingerprint = name
    return stored


def _checked(file: Path) -> str:
    """A digest of the file's content. Raises ValueError for a file that is empty, damaged or not UTF-8."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: remove it")
    digest, decoder, read = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with opened(file) as stream:
            for chunk in chain(iter(lambda: stream.read(1 << 22), b""), [b""]):
                digest.update(chunk)
                read += len(chunk)
                if extension(file) != ".parquet":
                    decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        byte = read - len(error.object) + error.start
        raise ValueError(f"{file} is not UTF-8 text: byte {byte} cannot be decoded ({error.reason})") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{file} cannot be read to its end: {error}") from error
    return digest.hexdigest()


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


def _pack(documents: list, tokenizer: PreTrainedTokenizerBase, length: int, column: str, causal: bool) -> Dataset:
    """Documents to blocks; [SEP], or for causal models the end-of-text token, is between the documents."""
    cls, sep, eos = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id
    between, edges = (sep if eos is None else eos, 0) if causal else (sep, 1)
    if between is None or (cls is None and not causal):
        needed = "causal text needs eos_token or sep_token" if causal else "masked text needs cls_token and sep_token"
        raise ValueError(f"the tokenizer has no token to put between documents: {needed}")
    encode, definition = _encoder(tokenizer)
    room = length - 2 * edges

    def pack(texts: list[str | None]) -> dict[str, list[np.ndarray]]:
        cut, ids = [piece for text in texts if text for piece in pieces([text])], [np.empty(0, dtype=np.int32)]
        for start in range(0, len(cut), ENCODED_TOGETHER):
            encoded = encode(cut[start : start + ENCODED_TOGETHER])
            ids += [np.array([*tokens, between], dtype=np.int32) for tokens in encoded if tokens]
        stream = np.concatenate(ids)
        blocks = stream[: len(stream) // room * room].reshape(-1, room)
        blocks = np.pad(blocks, [(0, 0), (edges, edges)], constant_values=[(0, 0), (cls or 0, sep or 0)])
        return {"input_ids": list(blocks)}

    made, schema = [], pa.schema({"input_ids": pa.list_(pa.int32())})
    count = None if isinstance(documents[0], IterableDataset) else sum(map(len, documents))
    with tqdm(total=count, unit="document", desc=f"blocks of {length} tokens", delay=2) as bar:
        for part in _parts(documents):
            name = _digest(part._fingerprint, definition, length, column, causal, cls, between, TOGETHER, RECIPE)
            batches = (pack(batch[column]) for batch in part.iter(TOGETHER))
            made.append(_stored("hdlib_blocks", name, schema, batches))
            bar.update(len(part))
    if not made and count is None:
        raise ValueError("a part of the corpus is empty: a stream needs more documents than are held out of it")
    return concatenate_datasets(made or [Dataset.from_dict({"input_ids": []})])


def _encoder(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[list[str]], list[list[int]]], str]:
    """A function from texts to token ids that takes special tokens for plain text, and a digest of its definition."""
    names = sorted({name for name in tokenizer.all_special_tokens if len(name) > 1})[::-1]  # a prefix is last
    special, unknown = set(tokenizer.convert_tokens_to_ids(names)), tokenizer.unk_token_id
    pattern = re.compile("|".join(map(re.escape, names)))
    definition = [tokenizer.backend_tokenizer.to_str()] if tokenizer.is_fast else [str(type(tokenizer))]
    if tokenizer.is_fast:
        copy = Tokenizer.from_str(definition[0])  # the tokenizer keeps its truncation and padding
        copy.no_truncation(), copy.no_padding()
        copy.encode_special_tokens = True  # as plain text
    else:
        with TemporaryDirectory() as folder:
            with suppress(NotImplementedError):  # by some classes
                tokenizer.save_pretrained(folder)
            definition += [file.read_bytes() for file in sorted(Path(folder).iterdir())]
        definition += sorted(tokenizer.get_vocab().items())

    def encode(texts: list[str]) -> list[list[int]]:
        if tokenizer.is_fast:
            return [tokens.ids for tokens in copy.encode_batch_fast(texts, add_special_tokens=False)]
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def plain(texts: list[str]) -> list[list[int]]:
        encoded = encode(texts)
        for number, text in enumerate(texts):
            if not special.isdisjoint(encoded[number]):  # some tokenizers find them in their vocabulary
                apart = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
                ids = encode([apart])[0] if apart != text else encoded[number]
                encoded[number] = [token for token in ids if token not in special or token == unknown]
        return encoded

    return plain, _digest(definition, names, sorted(special), unknown)


def _check_unknown(blocks: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Warn if many tokens of up to 1,000 blocks are unknown. Raises ValueError if all are."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id):
        return
    ids = np.asarray(blocks[np.unique(np.linspace(0, len(blocks) - 1, 1000).astype(int))]["input_ids"])
    share = np.mean(ids[~np.isin(ids, list({*tokenizer.all_special_ids} - {unknown}))] == unknown)
    advice = "the tokenizer does not know the script of this text; take a teacher that was trained on such text"
    if share == 1:
        raise ValueError(f"{where}: all tokens are unknown ({tokenizer.unk_token}): {advice}")
    if share > UNKNOWN:
        warnings.warn(f"{where}: {share:.0%} of the tokens are unknown ({tokenizer.unk_token}): {advice}", stacklevel=3)


def _warn_of_common_documents(train: list, validation: list, column: str) -> None:
    """Look up the first 10,000 held-out documents in the training part, unless one of them is a stream."""
    if any(isinstance(part, IterableDataset) for part in train + validation):
        return
    wanted = set(filter(None, validation[0][:COMPARED][column]))
    common = {text for part in train for batch in part.iter(10_000) for text in wanted.intersection(batch[column])}
    if common:
        warnings.warn(
            f"{len(common)} of {len(wanted)} different held-out documents are also in the training part and lower the "
            f"held-out loss, such as {min(common)[:50]!r}: remove the copies",
            stacklevel=3,
        )


def _parts(documents: list[Dataset] | list[IterableDataset]) -> Iterator[Dataset]:
    """The documents in parts that are one file of the cache each."""
    for several in documents:
        if isinstance(several, IterableDataset):
            yield from map(Dataset.from_dict, several.iter(PART_OF_STREAM))
        else:
            yield from (several.skip(start).take(PART) for start in range(0, len(several), PART))
