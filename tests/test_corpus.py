"""What is read, and as what: exact files, splits, documents, columns, special and unknown tokens."""

import gzip
import json
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import hdlib
from hdlib.text.corpus import load_documents

from conftest import SPECIAL, masked, sentences

ASKED, DECOY = "the student learns. ", "a quick teacher. "


def text_of(blocks, tokenizer) -> str:
    """Of training blocks; of held-out blocks, with the tokens to be predicted."""
    rows = blocks["input_ids"]
    if "labels" in blocks.column_names:
        rows = [
            [label if label >= 0 else token for token, label in zip(*pair, strict=True)]
            for pair in zip(rows, blocks["labels"], strict=True)
        ]
    return "".join(tokenizer.decode(row[1:-1]) + " " for row in rows)


def documents_of(source, **options) -> list[str]:
    return list(load_documents(source, **options)["train"][options.get("text_column", "text")])


def refused(words, source, tokenizer, error=ValueError, **options):
    with pytest.raises(error, match=words) as caught:
        hdlib.load_corpus(source, tokenizer, 16, **options)
    assert "\n\n" not in str(caught.value)


# --- the held-out blocks


def test_held_out_blocks_are_drawn_from_all_documents(tmp_path, letters):
    (tmp_path / "a.txt").write_text(ASKED * 50)
    (tmp_path / "test.txt").write_text("\n\n".join(letter * 280 for letter in "abcdefghij"))
    drawn = [hdlib.load_corpus(tmp_path, letters, 16, validation_blocks=40, seed=seed)[1] for seed in (0, 0, 1)]
    assert len(set(text_of(drawn[0], letters)) & set("abcdefghij")) > 7
    assert len(set(text_of(drawn[0].take(20), letters)) & set("abcdefghij")) > 6, "the first ones are a sample too"
    assert drawn[0]["labels"] == drawn[1]["labels"] != drawn[2]["labels"]
    everything = hdlib.load_corpus(tmp_path, letters, 16, validation_blocks=9999)[1]
    assert len(everything) == 2810 // 14 and sorted(text_of(everything, letters).split()) == sorted(
        text_of(hdlib.load_corpus(tmp_path, letters, 16, validation_blocks=201, seed=1)[1], letters).split()
    )
    refused("validation_blocks must be at least 1", tmp_path, letters, validation_blocks=0)
    refused("seed", tmp_path, letters, seed=-1)
    refused("text_column must be", tmp_path, letters, text_column=5)


def test_blocks_held_out_of_few_documents_are_drawn_from_all(tmp_path, letters):
    (tmp_path / "a.txt").write_text("\n\n".join(letter * 1400 for letter in "abcdefghij"))
    train, validation = hdlib.load_corpus(tmp_path, letters, 16)
    assert len(validation) == 1000 // 50 and len(train) == 980
    assert len(set(text_of(validation, letters)) & set("abcdefghij")) > 5


# --- which files


NAMES = [
    "a[1]",
    "[ab]",
    "what?",
    "*",
    "**",
    "gzip::a",
    "a,b",
    "a b",
    "#1",
    "50%41",
    "-rf",
    "文é",
    "file:",
    "~",
    "{a,b}",
    "'\"",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_literally(tmp_path, letters, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for decoy in ("a1", "a", "whatx", "b", "A", "aA", "ab"):
        (tmp_path / f"{decoy}.txt").write_text(DECOY * 300)
    for folder in ("a1", "a", "whatx", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(DECOY * 300)
    (tmp_path / f"{name}.txt").write_text(ASKED * 50 + name)
    (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "folder" / name / "x.txt").write_text(ASKED * 60 + name)
    pd.DataFrame({"text": [ASKED * 70 + name]}).to_parquet(f"folder/{name}.parquet")
    (tmp_path / "saved" / name).mkdir(parents=True)
    for source in (tmp_path / f"{name}.txt", f"{name}.txt", f"folder/{name}", [f"folder/{name}.parquet"]):
        text = " ".join(documents_of(source))
        assert text.startswith(ASKED) and text.endswith(name) and DECOY not in text
        blocks = hdlib.load_corpus(source, letters, 16)
        assert not any("q" in text_of(part, letters) for part in blocks)


def test_a_pattern_that_is_no_file_reads_nothing(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text(DECOY * 300)
    for source in (str(tmp_path / "*.txt"), [tmp_path / "?.txt", tmp_path / "a.txt"], f"file://{tmp_path}/a.txt"):
        refused("no file or folder|no local file", source, tokenizer, FileNotFoundError)
    monkeypatch.chdir(tmp_path)
    for source in ("", " ", ["a.txt", ""], 3, [b"a.txt"], ["a.txt", None]):
        refused("a corpus is a path", source, tokenizer)


def test_the_home_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text(ASKED * 50)
    (tmp_path / "b.txt").write_text(ASKED * 60)
    for source in ("~/a.txt", Path("~/a.txt"), ["~/a.txt"], ("~/a.txt",)):
        assert documents_of(source) == [(ASKED * 50).strip()]
    assert len(documents_of(["~/a.txt", Path("~/b.txt")])) == len(documents_of("~")) == 2
    refused("no file or folder", "~nobody-here/a/b.txt", tokenizer, FileNotFoundError)


def test_a_hub_data_set_that_cannot_be_loaded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "some___corpus").mkdir()  # as if it had been loaded before
    for problem, kind in ((ConnectionError("away"), FileNotFoundError), (RuntimeError("a\n\nscript"), ValueError)):

        def fail(*_, problem=problem, **__):
            raise problem

        monkeypatch.setattr(datasets, "load_dataset", fail)
        refused("'some/corpus' could not be loaded: a", "some/corpus", tokenizer, kind)
    with_test = DatasetDict({name: Dataset.from_dict({"text": [name]}) for name in ("train", "test", "unsupervised")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: with_test)
    found = load_documents("some/corpus")
    assert {split: part["text"][:] for split, part in found.items()} == {"train": ["train"], "validation": ["test"]}


def test_a_named_file_of_another_type(tmp_path, tokenizer):
    for name in ("a.txt", "b.md", "c"):
        (tmp_path / name).write_text(ASKED * 50)
    for name in ("b.md", "c"):
        refused(rf"{name} holds no text.*\.parquet", [tmp_path / "a.txt", tmp_path / name], tokenizer)
    assert len(documents_of(tmp_path)) == 1


def test_hidden_files_are_not_read(tmp_path):
    for name in (".git/a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt", "._a.txt", "in/.cache/x/a.txt"):
        (tmp_path / ".given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".given" / name).write_text(DECOY * 50 + name)
    (tmp_path / ".given" / "a.txt").write_text(ASKED)
    (tmp_path / ".given" / ".cache").symlink_to(tmp_path / "nowhere")
    assert documents_of(tmp_path / ".given") == [ASKED.strip()]
    assert len(documents_of(tmp_path / ".given" / "._a.txt")) == 1, "a hidden file that is named is read"


def test_a_file_is_read_once_by_whatever_name(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(ASKED)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / "b.txt").symlink_to(tmp_path / "in" / "a.txt")
    with warnings.catch_warnings(action="error"):
        for source in (tmp_path, [tmp_path, tmp_path / "in" / "a.txt"], [tmp_path / "b.txt"] * 2, tmp_path / "in"):
            assert documents_of(source) == [ASKED.strip()]
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    refused("c.txt: it points to", tmp_path, tokenizer, FileNotFoundError)


def test_folders_behind_links_are_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text(ASKED)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train").symlink_to(tmp_path / "elsewhere")
    assert documents_of(tmp_path / "corpus") == [ASKED.strip()]


def test_files_of_equal_content_are_read_once(tmp_path):
    for name in ("a.txt", "a (copy).txt"):
        (tmp_path / name).write_text(ASKED)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(ASKED)
    with pytest.warns(UserWarning, match=r"2 files have the content of another.*a\.txt \(as .*a \(copy\)\.txt\)"):
        assert documents_of(tmp_path) == [ASKED.strip()]


# --- splits


@pytest.mark.parametrize("held_out", ["test", "Validation", "valid", "dev", "val", "wiki-test"])
def test_folders_decide_the_split(tmp_path, held_out):
    texts = {"train/test_a.txt": "one", f"{held_out}/train.txt": "two", f"{held_out}/deep/er/b.txt": "three"}
    texts |= {"other/c.txt": "four", "other/c-dev.txt": "five", "latest/d.txt": "six"}
    for name, text in texts.items():
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name).write_text(text)
    found = load_documents(tmp_path / "test")
    assert sorted(found["train"]["text"]) == ["four", "one", "six"]
    assert sorted(found["validation"]["text"]) == ["five", "three", "two"]


def test_folders_in_a_list_decide_the_split(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    for source in (
        [tmp_path / "train", tmp_path / "test"],
        [tmp_path / "test/a.txt", tmp_path],
        [tmp_path, tmp_path / "test/a.txt"],
    ):
        found = load_documents(source)
        assert [*found["train"]["text"], *found["validation"]["text"]] == ["train", "test"]


def test_a_corpus_of_held_out_names_only(tmp_path, tokenizer):
    for name in ("test-1.txt", "test-2.txt"):
        (tmp_path / name).write_text(ASKED * 50 + name)
    with pytest.warns(UserWarning, match="all files have names of held-out text.*test-1"):
        assert list(load_documents(tmp_path)) == ["train"]


def test_training_text_that_is_also_held_out(tmp_path, tokenizer):
    (tmp_path / "test.txt").write_text(ASKED * 50)
    (tmp_path / "train.txt").write_text(ASKED * 50)
    (tmp_path / "more.txt").write_text(DECOY * 50)
    with pytest.warns(UserWarning, match="train.txt .as .*test.txt"):
        found = load_documents(tmp_path)
    assert [*found["train"]["text"], *found["validation"]["text"]] == [(DECOY * 50).strip(), (ASKED * 50).strip()]
    (tmp_path / "more.txt").unlink()
    with pytest.warns(UserWarning):
        refused("no file to train on", tmp_path, tokenizer)
    (tmp_path / "train.txt").write_text("\n\n".join([*sentences(300), ASKED * 50]))
    with pytest.warns(UserWarning, match="1 of 1 different held-out documents are also in the training part"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


# --- documents


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
        ("one\rtwo\r\rthree", ["one\ntwo", "three"]),
        ("\ufeffone\n \t \n\n  two  \n\x0c\nthree", ["one", "  two", "three"]),
        ("one\ntwo\nthree\n\n\n", ["one", "two", "three"]),
        ("\n\none\ntwo\nthree", ["one", "two", "three"]),
        ("one", ["one"]),
        ("one\u2028two\x85three\n\nfour", ["one\u2028two\x85three", "four"]),
    ],
)
def test_documents_of_text_files(tmp_path, written, expected):
    (tmp_path / "a.txt").write_bytes(written.encode())
    assert documents_of(tmp_path) == expected
    assert list(row["text"] for row in load_documents(tmp_path, streaming=True)["train"]) == expected


def test_a_long_document_is_cut_between_lines_or_words(tmp_path, letters):
    text = "word " * 30_000 + "\n" + ("line of words\n" * 10_000) + "x" * 120_000
    (tmp_path / "a.txt").write_text(text + "\n\nend")
    found = documents_of(tmp_path)
    assert max(map(len, found)) <= 50_000 and len(found) > 6
    assert "".join(found[:-1]).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert {piece[0] for piece in found[1:-1]} <= {" ", "\n", "x"}
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert max(map(len, documents_of(tmp_path))) <= 50_000
    from_memory = hdlib.load_corpus(Dataset.from_dict({"text": [text]}), letters, 16)
    assert sum(map(len, from_memory)) == (len(text) + 8) // 14


# --- columns


def test_only_the_column_of_the_text_is_read(tmp_path):
    pd.DataFrame({"text": ["one"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"id": ["x"], "text": ["two"], "more": [[1]]}).to_parquet(tmp_path / "b.parquet")
    pq.write_table(
        pa.table({"text": pa.array(["three", None], pa.large_string()).dictionary_encode()}), tmp_path / "c.parquet"
    )
    assert documents_of(tmp_path) == ["one", "two", "three"]
    for name in "abc":
        (tmp_path / f"{name}.parquet").unlink()
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": "x"}, {"id": [{}]}, {"text": None}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps([{"x": None, "text": "three"}, {"text": "four"}], indent=1))
    (tmp_path / "c.json").write_text('\ufeff {"text": "five\ttabs", "id": 1}\r\n{"text": "six"}')
    assert documents_of(tmp_path) == ["one", "two", "three", "four", "five\ttabs", "six"]
    assert documents_of(tmp_path, streaming=False) == [
        row["text"] for row in load_documents(tmp_path, streaming=True)["train"]
    ]


VALUES = {"list": ["a", "b"], "dict": {"a": "b"}, "int": 5, "float": 0.5, "bool": True}


@pytest.mark.parametrize("kind", VALUES)
def test_a_column_that_is_no_text(tmp_path, tokenizer, kind):
    rows = [{"text": None, "n": 1}, {"text": VALUES[kind], "n": 2}]
    frame = pd.DataFrame(rows)
    frame["text"] = frame["text"].astype({"int": "Int64", "float": "Float64", "bool": "boolean"}.get(kind, "object"))
    frame.to_parquet(tmp_path / "a.parquet")
    expected = f"row 2, column 'text' holds no text but the {kind} "
    refused(rf"a\.parquet, {expected}", tmp_path, tokenizer)
    refused(rf"a\.parquet, {expected}", tmp_path, tokenizer, streaming=True)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(rf"b\.jsonl, {expected}", tmp_path, tokenizer)
    for source in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        refused(f"the data set, part train, {expected}", source, tokenizer)


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{"text": two}\n', r"a\.jsonl could not be read as json: line 3: "),
        ("a.jsonl", '{"text": "one"}\n["text"]\n', r"a\.jsonl, row 2 is a list"),
        ("a.jsonl", '{"text": "one"}\n"text"\n', r"a\.jsonl, row 2 is a str"),
        ("a.jsonl", '{"text": "one"}\n{"text": "\\ud800"}\n', r"a\.jsonl, row 2, column 'text'"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl could not be read as json: "),
        ("a.jsonl", '{"a":' * 100_000, r"a\.jsonl could not be read as json: line 1: "),
        ("a.json", '[{"text": "one"}, {"text": 1}]', r"a\.json, row 2, column 'text'"),
        ("a.json", '[{"text": "one"},', r"a\.json could not be read as json: "),
        ("a.json", '{\n "text": "one"\n}', r"a\.json could not be read as json: line 1: .*one object a line"),
        ("a.json", '{"body": "one"}', r"a\.json has no column 'text': set text_column to one of \['body'\]"),
        ("a.parquet", "no parquet", r"a\.parquet could not be read as parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, tokenizer, name, written, words):
    (tmp_path / name).write_text(written)
    refused(words, tmp_path, tokenizer)


def test_one_file_without_the_column(tmp_path, tokenizer):
    pd.DataFrame({"text": sentences(9)}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"content": sentences(9)}).to_parquet(tmp_path / "b.parquet")
    refused(r"b\.parquet has no column 'text'.*\['content'\]", tmp_path, tokenizer)


def test_a_field_of_a_column(tmp_path, tokenizer):
    rows = [
        {"a": {"b": {"c": "one"}, "d": 1}, "e": "x"},
        {"a": None, "e": "y"},
        {"a": {"b": {"c": "two"}, "d": 2}, "e": ""},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    memory = Dataset.from_list(rows)
    memory.to_parquet(tmp_path / "b.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "b.parquet", memory):
        found = documents_of(source, text_column="a.b.c")
        assert [text for text in found if text] == ["one", "two"]
        refused("no column 'a.b.x'|no column 'a.x'", source, tokenizer, text_column="a.b.x")
        refused("holds no text but the dict", source, tokenizer, text_column="a.b")
    stream = load_documents(memory.to_iterable_dataset(), text_column="a.b.c")["train"]
    assert [row["a.b.c"] for row in stream if row["a.b.c"]] == ["one", "two"]
    literal = [{"a.b": "literal", "a": {"b": "nested"}, "text": "x"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(literal[0]))
    pq.write_table(pa.Table.from_pylist(literal), tmp_path / "b.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "b.parquet", Dataset.from_list(literal)):
        assert documents_of(source, text_column="a.b") == ["literal"]
    train, _ = hdlib.load_corpus(Dataset.from_list([{"a": {"b": ASKED * 99}}]), tokenizer, 16, text_column="a.b")
    assert len(train) > 9


def test_data_sets_in_memory_and_of_save_to_disk(tmp_path, tokenizer):
    texts = {"train": sentences(60), "test": sentences(30, seed=1), "validation": sentences(40, seed=2)}
    for split in texts:
        (tmp_path / "files" / split).mkdir(parents=True)
        if split != "test":
            pd.DataFrame({"text": texts[split]}).to_parquet(tmp_path / "files" / split / "a.parquet")
    expected = hdlib.load_corpus(tmp_path / "files", tokenizer, 16)
    both = DatasetDict(
        {split: Dataset.from_dict({"text": part, "n": range(len(part))}) for split, part in texts.items()}
    )
    both.save_to_disk(tmp_path / "both [1]")
    both["train"].save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "a::b")
    streams = datasets.IterableDatasetDict({split: part.to_iterable_dataset() for split, part in both.items()})
    for source in (both, tmp_path / "both [1]", str(tmp_path / "both [1]"), streams):
        for found, part in zip(hdlib.load_corpus(source, tokenizer, 16), expected, strict=True):
            assert found["input_ids"] == part["input_ids"]
    for source in (both["train"], tmp_path / "one", both["train"].with_format("numpy")):
        assert documents_of(source) == texts["train"]
    stream = load_documents(IterableDataset.from_generator(lambda: iter(both["train"])))
    assert [row["text"] for row in stream["train"]] == texts["train"]
    refused("rename the folder", tmp_path / "a::b", tokenizer)
    refused("no part `train` but test", DatasetDict({"test": both["test"]}), tokenizer)
    refused(r"no column 'body': set text_column to one of \['text', 'n'\]", both, tokenizer, text_column="body")
    refused(r"no column 'body': set text_column to one of \['text', 'n'\]", streams, tokenizer, text_column="body")
    (tmp_path / "one" / "state.json").write_text("{}")
    refused("one could not be read as a folder of save_to_disk", tmp_path / "one", tokenizer)


# --- tokens


def word_level(**options):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "student", "learns", "[", "]", "MASK", "MASK]", "x"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    return masked(model, pre_tokenizers.WhitespaceSplit(), **options)


def unigram():
    pieces = [*SPECIAL.values(), "▁", *"thesudnlar[]MASKPDCLNU<>/x"]
    model = models.Unigram([(piece, -1.0 if len(piece) > 1 else -9.0) for piece in dict.fromkeys(pieces)], unk_id=4)
    return masked(model, pre_tokenizers.Metaspace())


class Words(PreTrainedTokenizer):
    """Without a Rust backend."""

    def __init__(self, words, **options):
        self.vocab = OrderedDict((word, i) for i, word in enumerate([*SPECIAL.values(), *words]))
        super().__init__(**SPECIAL, **options)

    vocab_size = property(lambda self: len(self.vocab))

    def get_vocab(self):
        return self.vocab | self.added_tokens_encoder

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.vocab.get(token, self.vocab["[UNK]"])

    def _convert_id_to_token(self, index):
        return list(self.vocab)[index]


KINDS = {
    "wordpiece": lambda request: request.getfixturevalue("tokenizer"),
    "bytes": lambda request: request.getfixturevalue("letters"),
    "words": lambda request: word_level(),
    "unigram": lambda request: unigram(),
    "slow": lambda request: Words(["the", "student", "learns", "x"], model_max_length=64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_plain_text(tmp_path, request, kind):
    tokenizer = KINDS[kind](request)
    text = " ".join(["the student [MASK] learns[SEP] x [PAD]", "[CLS][MASK]", "the student learns x"] * 50)
    (tmp_path / "a.txt").write_text(text)
    train, _ = hdlib.load_corpus(tmp_path, tokenizer, 16)
    inner = {token for block in train["input_ids"] for token in block[1:-1]}
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert len(train) > 5 and not inner & special, "the only separator is at the end of the text"
    if kind == "bytes":
        assert text_of(train.take(1), tokenizer).strip() == text[:14].strip()


def test_end_of_text_in_a_causal_text_is_plain_text(tmp_path, letters):
    causal = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(letters.backend_tokenizer.to_str()),
        **dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|endoftext|>"),
        model_max_length=64,
    )
    (tmp_path / "a.txt").write_text("the student <|endoftext|> learns\n\n" * 100)
    train, _ = hdlib.load_corpus(tmp_path, causal, 16)
    stream = [*chain(*train["input_ids"])]
    found = [place for place, token in enumerate(stream) if token == causal.eos_token_id]
    assert {after - before for before, after in pairwise(found)} == {33}


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path, request):
    for tokenizer in (word_level(), Words(["the"], model_max_length=64)):
        tokenizer.add_tokens([AddedToken("<unit>", special=False)])
        (tmp_path / "a.txt").write_text("the<unit> [MASK] " * 200)
        train, _ = hdlib.load_corpus(tmp_path, tokenizer, 16)
        assert tokenizer.convert_tokens_to_ids("<unit>") in chain(*train["input_ids"])


def test_tokenizers_without_a_rust_backend(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join([*sentences(120), str(tmp_path)]))
    words = sorted({word for text in sentences(120) for word in text.split()})
    slow, reversed_words = (Words(each, model_max_length=64) for each in (words, words[::-1]))
    train, validation = hdlib.load_corpus(path, slow, 16)
    expected = [slow.vocab.get(word, slow.unk_token_id) for word in sentences(120)[0].split()]
    everything = [*chain(*(block[1:-1] for block in train["input_ids"]))]
    assert len(validation) > 0 and slow.mask_token_id not in everything
    assert any(everything[start : start + len(expected)] == expected for start in range(len(everything)))
    assert hdlib.load_corpus(path, reversed_words, 16)[0]["input_ids"] != train["input_ids"]

    class Backwards(Words):
        def _tokenize(self, text):
            return text.split()[::-1]

    assert hdlib.load_corpus(path, Backwards(words, model_max_length=64), 16)[0]["input_ids"] != train["input_ids"]
    again = Words(words, model_max_length=64)
    slow._tokenize = again._tokenize = None  # the cache is read
    assert hdlib.load_corpus(path, again, 16)[0]["input_ids"] == train["input_ids"]


def test_unknown_tokens(tmp_path, tokenizer, letters):
    texts = sentences(300)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    with warnings.catch_warnings(action="error"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:200] + ["слово и дело"] * 100))
    with pytest.warns(UserWarning, match=r"a\.txt: the train part: \d+% of the tokens are unknown .\[UNK\].*script"):
        hdlib.load_corpus(tmp_path / "a.txt", tokenizer, 16)
    (tmp_path / "a.txt").write_text("слово и дело " * 900)
    refused("all tokens are unknown", tmp_path, tokenizer)
    hdlib.load_corpus(tmp_path, letters, 16)


# --- the cache


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, tokenizer, monkeypatch):
    path, checked = tmp_path / "a.txt", hdlib.text.corpus._checked
    path.write_text(ASKED * 100 + str(tmp_path))

    def check_and_change(file):
        digest = checked(file)
        file.write_text(DECOY * 200)
        return digest

    monkeypatch.setattr(hdlib.text.corpus, "_checked", check_and_change)
    refused("changed while it was being read", path, tokenizer)
    monkeypatch.undo()
    path.write_text(ASKED * 100 + str(tmp_path))
    assert documents_of(path) == [ASKED * 100 + str(tmp_path)]


def test_the_documents_depend_on_the_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "body": "two"}))
    assert [documents_of(tmp_path, text_column=name) for name in ("text", "body")] == [["one"], ["two"]]


def test_documents_whose_reading_was_interrupted_are_read_again(tmp_path, monkeypatch):
    texts = [f"{tmp_path} {text}" for text in sentences(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    whole = hdlib.text.corpus.documents

    def interrupted(files, column):
        yield from islice(whole(files, column), 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(hdlib.text.corpus, "TOGETHER", 10)
    monkeypatch.setattr(hdlib.text.corpus, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_documents(tmp_path)
    monkeypatch.setattr(hdlib.text.corpus, "documents", whole)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(documents_of, [tmp_path] * 2)) == [texts] * 2
    monkeypatch.setattr(hdlib.text.corpus, "documents", interrupted)
    assert documents_of(tmp_path) == texts, "from the cache"
