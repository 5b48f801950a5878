"""Text to blocks and blocks to batches: complete, held-out text separate, the same for every process."""

import bz2
import gzip
import json
import lzma
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
import torch
import zstandard

import hdlib.text.corpus
from hdlib.data import Blocks, Masking, TrainingBatches, sample

from conftest import sentences


def test_blocks_hold_the_text_in_order(tmp_path, tokenizer):
    texts = sentences(60)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": " ".join(sentences(50, seed=1))}) + "\n")
    train, _ = hdlib.load_corpus(tmp_path, tokenizer, 16)
    stream = [token for block in train["input_ids"] for token in block[1:-1]]
    separator = tokenizer.sep_token_id
    expected = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        expected += [*ids, separator]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 14
    assert all(block[0] == tokenizer.cls_token_id and block[-1] == separator for block in train["input_ids"])
    assert {len(block) for block in train["input_ids"]} == {16}


OPEN = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstandard.open}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", *(f"txt{end}" for end in OPEN if end), "jsonl.zst"])
def test_every_kind_of_file_gives_the_same_blocks(tmp_path, tokenizer, kind):
    texts, path = sentences(80), tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pd.DataFrame({"text": texts}).to_parquet(path)
    else:
        lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
        with OPEN[path.suffix if path.suffix in OPEN else ""](path, "wt") as file:
            file.write(lines if kind.startswith("jsonl") else "\n\n".join(texts))
    train, validation = hdlib.load_corpus(path, tokenizer, 16)
    again = hdlib.load_corpus(str(tmp_path), tokenizer, 16)
    assert train["input_ids"] == again[0]["input_ids"] and validation["labels"] == again[1]["labels"]
    held_out = {tuple(t for t in block if t >= 0) for block in validation["labels"]}
    assert len(train) > 30 and held_out
    reference = tmp_path / "reference.jsonl"
    reference.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert hdlib.load_corpus(reference, tokenizer, 16)[0]["input_ids"] == train["input_ids"]


class Counted:
    """Replaces Tokenizer; `seen` holds the documents that were encoded."""

    def __init__(self, monkeypatch, stop_after=None, pause=0.0):
        self.seen, self.stop_after = [], stop_after
        original = hdlib.text.corpus.Tokenizer.from_str

        def counting(definition):
            encoder = original(definition)

            class Counting:
                no_truncation, no_padding = encoder.no_truncation, encoder.no_padding

                def encode_batch_fast(this, texts, **options):
                    self.seen += texts
                    time.sleep(pause)
                    if self.stop_after and len(self.seen) > self.stop_after:
                        raise KeyboardInterrupt
                    return encoder.encode_batch_fast(texts, **options)

            return Counting()

        monkeypatch.setattr(hdlib.text.corpus, "Tokenizer", SimpleNamespace(from_str=counting))


@pytest.fixture
def small_parts(monkeypatch):
    """10 documents are packed together, 20 are one file of the cache."""
    monkeypatch.setattr(hdlib.text.corpus, "TOGETHER", 10)
    monkeypatch.setattr(hdlib.text.corpus, "PART", 20)


def test_the_cache_depends_on_the_text_and_not_on_the_path(tmp_path, tokenizer, small_parts, monkeypatch):
    path, seed = tmp_path / "a.txt", str(tmp_path)  # text that no earlier run of this test has cached
    path.write_text("\n\n".join(f"{seed} {text}" for text in sentences(70)))
    first, _ = hdlib.load_corpus(path, tokenizer, 16)
    seen = Counted(monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "b.txt")
    again, _ = hdlib.load_corpus(moved, tokenizer, 16)
    assert again["input_ids"] == first["input_ids"] and not seen.seen
    path.write_text("\n\n".join(f"{seed} {text}" for text in sentences(70, seed=9)))
    assert hdlib.load_corpus(path, tokenizer, 16)[0]["input_ids"] != first["input_ids"] and seen.seen


def test_concurrent_calls_make_the_blocks_once(tmp_path, tokenizer, small_parts, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"{tmp_path} {text}" for text in sentences(120)))
    hdlib.text.corpus.load_documents(path)  # cached, so that both calls reach the blocks at the same time
    counted = Counted(monkeypatch, pause=0.05)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: hdlib.load_corpus(path, tokenizer, 16)[0]["input_ids"], range(2))
    assert list(one) == list(two) and len(counted.seen) == len(set(counted.seen)) == 120


def test_held_out_documents_of_a_large_corpus_are_drawn_in_several_shares(tmp_path, tokenizer, monkeypatch):
    """Every document is in one part once, one in fifty is held out, and every share spans the whole corpus."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} and some words"}) + "\n" for number in range(1030)))
    documents = hdlib.text.corpus.load_documents(path)["train"]
    one_draw, whole = (
        hdlib.text.corpus._hold_out(documents, seed=3),
        documents.train_test_split(1 / hdlib.text.corpus.HELD_OUT, seed=3),
    )
    assert [part["text"][:] for part in one_draw["train"]] == [whole["train"]["text"][:]]
    train, _ = hdlib.load_corpus(path, tokenizer, 16)
    monkeypatch.setattr(hdlib.text.corpus, "DRAWN_TOGETHER", 300)
    parts = hdlib.text.corpus._hold_out(documents, seed=3)
    numbers = {split: [[int(text.split()[0]) for text in part["text"]] for part in parts[split]] for split in parts}
    assert [len(part) for part in numbers["validation"]] == [6, 6, 6, 6]
    shares = [chosen + held_out for chosen, held_out in zip(*numbers.values(), strict=True)]
    assert sorted(chain(*shares)) == list(range(1030))
    assert all(max(share) - min(share) > 1020 for share in shares)
    indices = [[number // 4 for number in part] for part in numbers["validation"]]
    assert indices[0] != indices[1], "every share has its own draw"
    assert abs(len(hdlib.load_corpus(path, tokenizer, 16)[0]) - len(train)) <= 4


def test_an_interrupted_call_is_continued(tmp_path, tokenizer, small_parts, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"{tmp_path} {text}" for text in sentences(120)))
    interrupted = Counted(monkeypatch, stop_after=55)
    with pytest.raises(KeyboardInterrupt):
        hdlib.load_corpus(path, tokenizer, 16)
    monkeypatch.undo()
    monkeypatch.setattr(hdlib.text.corpus, "TOGETHER", 10)
    monkeypatch.setattr(hdlib.text.corpus, "PART", 20)
    rest = Counted(monkeypatch)
    train, _ = hdlib.load_corpus(path, tokenizer, 16)
    assert set(interrupted.seen[:40]).isdisjoint(rest.seen), "two complete parts are not made again"
    assert set(interrupted.seen) | set(rest.seen) == {f"{tmp_path} {text}" for text in sentences(120)}
    monkeypatch.setattr(hdlib.text.corpus, "PART", 1000)
    assert hdlib.load_corpus(path, tokenizer, 16)[0]["input_ids"] == train["input_ids"], (
        "the blocks do not depend on the parts"
    )


def test_a_stream_gives_the_same_blocks_and_is_not_stored(tmp_path, tokenizer, small_parts, monkeypatch):
    monkeypatch.setattr(hdlib.text.corpus, "PART_OF_STREAM", 20)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "text").mkdir()
    for name, texts in (("a", sentences(90)), ("validation", sentences(30, seed=1))):
        pd.DataFrame({"text": texts, "id": range(len(texts))}).to_parquet(tmp_path / "text" / f"{name}.parquet")
    streamed = hdlib.load_corpus(tmp_path / "text", tokenizer, 16, streaming=True)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.arrow")} == {"hdlib_blocks"}
    for found, expected in zip(streamed, hdlib.load_corpus(tmp_path / "text", tokenizer, 16), strict=True):
        assert found["input_ids"] == expected["input_ids"]
    with pytest.raises(ValueError, match="has no column 'story'"):
        hdlib.load_corpus(tmp_path / "text", tokenizer, 16, streaming=True, text_column="story")


def test_the_first_documents_of_a_stream_are_held_out(tmp_path, tokenizer, monkeypatch):
    texts = ["the student learns. " * 20] * 40 + ["a quick teacher. " * 20] * 60
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="more documents than are held out"):
        hdlib.load_corpus(tmp_path, tokenizer, 16, streaming=True)
    monkeypatch.setattr(hdlib.text.corpus, "FIRST_OF_STREAM", 40)
    train, validation = hdlib.load_corpus(tmp_path, tokenizer, 16, streaming=True)
    assert "student" not in tokenizer.decode([*chain(*train["input_ids"])])
    assert "teacher" not in tokenizer.decode([*chain(*validation["input_ids"])])


def test_files_are_held_out_by_whole_words_of_their_names(tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text("a slow neuron. " * 100)
    (tmp_path / "latest_devices.txt").write_text("the student learns. " * 200)
    (tmp_path / "part-dev-0.txt").write_text("a quick teacher. " * 100)
    train, validation = hdlib.load_corpus(tmp_path, tokenizer, 16)
    assert "student" in tokenizer.decode([*chain(*train["input_ids"])])
    assert "student" not in tokenizer.decode([*chain(*validation["input_ids"])])


def test_a_list_of_files(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the student learns. " * 200)
    (tmp_path / "b.txt").write_text("a quick teacher. " * 200)
    train, _ = hdlib.load_corpus([tmp_path / "a.txt", str(tmp_path / "b.txt")], tokenizer, 16)
    text = tokenizer.decode([*chain(*train["input_ids"])])
    assert "student" in text and "teacher" in text


def test_files_with_validation_in_their_names_are_held_out(tmp_path, tokenizer):
    (tmp_path / "part_1.txt").write_text("the student learns. " * 200)
    (tmp_path / "my_validation.txt").write_text("a quick teacher. " * 100)
    train, validation = hdlib.load_corpus(tmp_path, tokenizer, 16)
    assert "teacher" not in tokenizer.decode([*chain(*train["input_ids"])])
    assert "student" not in tokenizer.decode([*chain(*validation["input_ids"])])


def test_masking_is_that_of_bert(tokenizer, blocks):
    masking = Masking.of(tokenizer)
    plain = torch.tensor(blocks[0][:300]["input_ids"]).repeat(20, 1)  # (B, S)
    masked, labels = masking(plain, torch.Generator().manual_seed(3))
    chosen = labels != -100
    assert torch.equal(labels[chosen], plain[chosen]) and torch.equal(masked[~chosen], plain[~chosen])
    special = torch.isin(plain, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    assert set(chosen.sum(1).tolist()) == {round(0.15 * 16)}
    masks = (masked[chosen] == tokenizer.mask_token_id).float().mean().item()
    kept = (masked[chosen] == plain[chosen]).float().mean().item()
    assert masks == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.02)
    columns = chosen.float().mean(0)[1:-1]
    assert columns.max() < 1.5 * columns.mean(), "every position is equally likely to be masked"


def test_the_batch_of_a_step_is_a_function_of_seed_and_step(tokenizer, blocks):
    train = blocks[0].take(25)
    batches = TrainingBatches(train, Masking.of(tokenizer), batch_size=10, seed=4)
    again = TrainingBatches(train, Masking.of(tokenizer), batch_size=10, seed=4)
    steps = [batches[step] for step in range(6)]
    for step in (5, 0, 3):
        assert torch.equal(again[step]["input_ids"], steps[step]["input_ids"])
        assert torch.equal(again[step]["labels"], steps[step]["labels"])
    indices = {tuple((step["labels"] != -100).flatten().tolist()) for step in steps}
    assert len(indices) == 6, "every step masks other positions"
    other = TrainingBatches(train, Masking.of(tokenizer), batch_size=10, seed=5)
    assert not torch.equal(other[0]["input_ids"], steps[0]["input_ids"])


def test_every_block_once_in_each_epoch(tokenizer, blocks):
    train = blocks[0].take(20)
    batches = TrainingBatches(train, Masking.of(tokenizer), batch_size=5, seed=0)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(4 * epoch, 4 * epoch + 4):
            batch = batches[step]
            seen += batch["input_ids"].where(batch["labels"] == -100, batch["labels"]).tolist()
        assert sorted(seen) == sorted(train["input_ids"])
        orders.append(seen)
    assert orders[0] != orders[1], "another order in each"


def test_processes_divide_the_batch_of_one_process(tokenizer, blocks):
    masking = Masking.of(tokenizer)
    whole = TrainingBatches(blocks[0], masking, batch_size=8, seed=1)[3]
    shares = [TrainingBatches(blocks[0], masking, 8, seed=1, share=(rank, 4))[3] for rank in range(4)]
    for name in ("input_ids", "labels"):
        together = torch.stack([share[name] for share in shares], dim=1).flatten(0, 1)
        assert torch.equal(together, whole[name])
    assert len({int((share["labels"] != -100).sum()) for share in shares}) == 1, "equal shares, equal means"


def test_a_sample_is_drawn_over_all_blocks_and_in_their_order():
    blocks = Blocks(torch.arange(100)[:, None])
    drawn = [sample(blocks, 20, seed)[:20]["input_ids"][:, 0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted({*drawn[0]}) and len(drawn[0]) == 20
    assert all(min(each) < 25 and max(each) >= 75 for each in drawn)
    assert len(sample(blocks, 200)) == 100
