"""Impossible arguments are refused before training, with a message that names the value and a remedy."""

import json

import fsspec
import pandas as pd
import pytest
import torch
import transformers
import zstandard
from transformers import BertModel

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.data import Blocks

from conftest import random_bert, sentences
from models import random_model


@pytest.fixture
def short(tmp_path):
    """A config of two steps."""
    return {"steps": 2, "batch_size": 4, "target": 0.5, "eval_blocks": 2}


def refused(words: str, error=ValueError):
    return pytest.raises(error, match=words)


# --- the corpus


def test_a_corpus_that_is_not_there(tmp_path, tokenizer):
    with refused("no file or folder", FileNotFoundError):
        hdlib.load_corpus(tmp_path / "nowhere", tokenizer, 16)


def test_one_of_several_files_that_is_not_there(text_file, tokenizer):
    with refused("no file or folder .*nowhere.txt", FileNotFoundError):
        hdlib.load_corpus([text_file, text_file.with_name("nowhere.txt")], tokenizer, 16)


def test_a_folder_without_text(tmp_path, tokenizer):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with refused("holds no text.*\\.parquet"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


def test_an_empty_file(tmp_path, tokenizer):
    (tmp_path / "empty.txt").touch()
    with refused("empty.txt is empty"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


def test_a_file_of_blank_lines(tmp_path, tokenizer):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with refused("too little text for one block"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


@pytest.mark.parametrize("place", [0, 7, 4_194_303, 4_194_305])
def test_text_that_is_not_utf8(tmp_path, tokenizer, place):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a" * place + "é".encode("latin-1") + b" word" * 3)
    with refused(f"latin.txt is not UTF-8 text: byte {place} "):
        hdlib.load_corpus(path, tokenizer, 16)


def test_a_character_cut_off_at_the_end_is_not_utf8(tmp_path, tokenizer):
    path = tmp_path / "cut.txt"
    path.write_bytes(b"word " * 10 + "é".encode()[:1])
    with refused("cut.txt is not UTF-8 text: byte 50 "):
        hdlib.load_corpus(path, tokenizer, 16)


def test_a_character_across_two_reads_is_utf8(tmp_path, tokenizer):
    path = tmp_path / "whole.txt"
    path.write_bytes(b"the student learns. " * 209_715 + b"abc" + "é".encode() + b" the end")
    assert len(hdlib.load_corpus(path, tokenizer, 32)[0]) > 1000


@pytest.mark.parametrize("end", [".gz", ".zst", ".xz", ".bz2"])
def test_a_compressed_file_that_was_cut_off(tmp_path, tokenizer, end):
    whole = tmp_path / f"a.txt{end}"
    with fsspec.open(str(whole), "wt", compression="infer") as file:
        file.write("\n\n".join(sentences(300)))
    whole.write_bytes(whole.read_bytes()[:-40])
    with refused(rf"a\.txt\{end} cannot be read to its end"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


def test_a_compressed_file_of_several_frames_is_whole(tmp_path, tokenizer):
    texts = ["\n\n".join(sentences(60, seed)) + "\n\n" for seed in range(3)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(zstandard.compress(text.encode()) for text in texts))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("".join(texts))
    plain, _ = hdlib.load_corpus(tmp_path / "plain", tokenizer, 16)
    assert hdlib.load_corpus(tmp_path / "a.txt.zst", tokenizer, 16)[0]["input_ids"] == plain["input_ids"]


def test_a_column_that_is_not_there(tmp_path, tokenizer):
    pd.DataFrame({"body": sentences(10), "id": range(10)}).to_parquet(tmp_path / "a.parquet")
    with refused("no column 'text'.*'body'"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)
    assert len(hdlib.load_corpus(tmp_path, tokenizer, 16, text_column="body")[0]) > 1


def test_lines_that_are_not_json(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    with refused("could not be read as json"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


def test_files_of_several_kinds(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "text"}))
    with refused("several kinds"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


def test_a_hub_corpus_without_network(tokenizer):
    with refused("'some/corpus' is no local file.*embedded", FileNotFoundError):
        hdlib.load_corpus("some/corpus", tokenizer, 16)


def test_no_tokenizer():
    with refused("needs the teacher's tokenizer"):
        hdlib.load_corpus("embedded")


def test_blocks_longer_than_the_tokenizer_allows(text_file, tokenizer):
    with refused("from 8 to the 32 positions"):
        hdlib.load_corpus(text_file, tokenizer, 64)


# --- the teacher


def test_a_hub_teacher_without_network():
    with refused("'some/model' is no local file or folder.*embedded", FileNotFoundError):
        hdlib.load_teacher("some/model")


def test_a_teacher_that_is_not_there(tmp_path):
    with refused("there is no file or folder", FileNotFoundError):
        hdlib.load_teacher(tmp_path / "nowhere")


def test_a_folder_that_holds_no_model(tmp_path):
    with refused("no language model"):
        hdlib.load_teacher(tmp_path)


def test_a_teacher_without_its_head(tmp_path, tokenizer):
    """The folder of a bare encoder is a teacher; one whose config names a language model lacks its head."""
    BertModel(random_bert(vocabulary=len(tokenizer)).config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hdlib.load_teacher(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("lacks weights.*cls.predictions.transform.dense.weight"):
        hdlib.load_teacher(tmp_path)


def test_a_teacher_that_is_pickled(teacher, tokenizer, tmp_path):
    """A pickle can execute any code when it is opened."""
    teacher.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(teacher.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        hdlib.load_teacher(tmp_path)


def test_a_teacher_that_brings_code(teacher, tokenizer, tmp_path):
    teacher.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForMaskedLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    with pytest.raises(ValueError, match="no language model"):
        hdlib.load_teacher(tmp_path)
    assert not (tmp_path / "was run").exists()


def test_a_tokenizer_of_another_vocabulary(tmp_path, tokenizer):
    for vocabulary in (len(tokenizer) - 1, len(tokenizer) + 2000):
        folder = tmp_path / str(vocabulary)
        random_bert(vocabulary=vocabulary).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with refused(f"do not belong together.*{len(tokenizer)} entries.*{vocabulary} rows"):
            hdlib.load_teacher(folder)


def test_half_precision_is_trained_in_float32(tmp_path, tokenizer):
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        random_bert(vocabulary=len(tokenizer)).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model, _ = hdlib.load_teacher(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "model, config, tiny",
    [
        ("T5ForConditionalGeneration", "T5Config", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}),
        ("MambaForCausalLM", "MambaConfig", {"hidden_size": 8, "num_hidden_layers": 1}),
        ("ViTModel", "ViTConfig", {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}),
    ],
)
def test_an_unsupported_family(model, config, tiny, tmp_path, tokenizer):
    config = getattr(transformers, config)(**tiny | ({} if "ViT" in config else {"vocab_size": 60}))
    model = getattr(transformers, model)(config)
    words = (
        f"architecture '{config.model_type}'; supported: albert, bert, .*A new family is one table in hdlib/families"
    )
    with refused(words, hdlib.UnsupportedArchitecture):
        hdlib.width_groups(model)
    with refused(words, hdlib.UnsupportedArchitecture):
        hdlib.narrow(model, Widths(hidden=4))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with refused(words, hdlib.UnsupportedArchitecture):
        hdlib.load_teacher(tmp_path)


def test_something_that_is_no_model():
    with refused("Linear is no Hugging Face model", hdlib.UnsupportedArchitecture):
        hdlib.width_groups(torch.nn.Linear(2, 2))


def test_a_decoder_with_cross_attention():
    config = random_bert().config
    config.is_decoder = config.add_cross_attention = True
    with refused("cross-attention", hdlib.UnsupportedArchitecture):
        hdlib.width_groups(transformers.BertLMHeadModel(config))


def test_a_parameter_that_no_table_declares():
    model = random_bert()
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(24)))
    with refused("parameter extra of shape \\(24,\\)", hdlib.UnsupportedArchitecture):
        hdlib.width_groups(model)


def test_an_albert_of_several_layers_to_a_group():
    with refused("inner_group_num", hdlib.UnsupportedArchitecture):
        hdlib.width_groups(random_model("albert", inner_group_num=2))


# --- widths and scores


@pytest.mark.parametrize(
    "widths, words",
    [
        (Widths(hidden=0), "hidden=0 is impossible"),
        (Widths(hidden=48), "hidden=48 is impossible.*the model's 24"),
        (Widths(hidden=14), "hidden=14 with heads=4 .*take hidden=12 or 16"),
        (Widths(ffn=0), "ffn=0 is impossible"),
        (Widths(ffn=57), "ffn=57 is impossible.*56"),
        (Widths(heads=5, hidden=20), "heads=5 is impossible"),
        (Widths(heads=0), "heads=0 is impossible"),
        (
            Widths(hidden=12, heads=4, head_dim=4),
            "hidden=12 with heads=4 and head_dim=4 is impossible.*hidden is heads x head_dim",
        ),
        (Widths(hidden=-12), "hidden=-12 is impossible"),
        (Widths(ffn=3.5), "ffn=3.5 is impossible"),
    ],
)
def test_an_impossible_width(widths, words, teacher, tokenizer, blocks, short, tmp_path):
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    with refused(words):
        hdlib.narrow(teacher, widths)
    assert all(torch.equal(before[name], parameter) for name, parameter in teacher.named_parameters())
    with refused(words):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**short | {"target": widths}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.1])
def test_an_impossible_ratio(ratio, teacher):
    with refused("in \\(0, 1\\]"):
        Widths.at(teacher, ratio)
    with refused("target is a fraction"):
        DistillConfig(target=ratio)


def test_a_multiple_that_does_not_fit(teacher):
    with refused("no multiple of 64"):
        Widths.at(teacher, 0.5, multiple_of=64)


def test_impossible_scores(teacher):
    good = {name: torch.ones(group.size) for name, group in hdlib.width_groups(teacher).items()}
    for change, words in (
        ({"hidden": torch.ones(3)}, "shape \\(3,\\)"),
        ({"hidden": torch.full((24,), float("nan"))}, "not all finite"),
    ):
        with refused(words):
            hdlib.narrow(teacher, Widths(hidden=12), good | change)
    del good["layer.0.ffn"]
    with refused("no scores for the width group 'layer.0.ffn'"):
        hdlib.narrow(teacher, Widths(hidden=12), good)


def test_an_optimizer_of_another_model(teacher):
    optimizer = torch.optim.AdamW(random_bert().parameters())
    with refused("does not hold"):
        hdlib.narrow(teacher, Widths(hidden=12), None, optimizer)
    assert teacher.config.hidden_size == 24


# --- the run


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"prune_start": 0.7, "prune_end": 0.3}, "start before it ends"),
        ({"prune_start": 0.5, "prune_end": 0.5}, "start before it ends"),
        ({"prune_end": 1.2}, "start before it ends"),
        ({"steps": 10, "prune_start": 0.5, "prune_end": 0.52}, "prune_end=0.52: no step of 10 lies between them"),
        ({"target": {"width": 12}}, "target has no width .*width.*: give hidden, ffn"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": -4}, "batch_size must be at least 1"),
        ({"learning_rate": "3e-4"}, "learning_rate must be of type float; got '3e-4'"),
        ({"steps": 10.5}, "steps must be of type int"),
        ({"steps": True}, "steps must be of type int"),
        ({"schedule": "cosine"}, "schedule is one of cubic"),
        ({"scorer": "taylor"}, "scorer is one of sensitivity"),
        ({"precision": "fp8"}, "precision is one of auto, float32, bfloat16"),
        ({"hidden": -1.0}, "at least 0"),
        ({"attention_target": "logits"}, "'scores' or 'probs'"),
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"target": "small"}, "target is a fraction to keep, .* or Widths .*; got 'small'"),
        ({"warmup": 2.0}, "warmup"),
    ],
)
def test_an_impossible_config(arguments, words):
    with refused(words):
        DistillConfig(**arguments)


def test_a_teacher_whose_weights_are_not_finite(teacher, tokenizer, blocks, short, tmp_path):
    teacher.cls.predictions.transform.dense.weight.data[0, 0] = float("nan")
    with refused("not all finite: cls.predictions.transform.dense.weight"):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**short), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_state_cannot_be_sliced(teacher, blocks):
    from transformers.optimization import Adafactor

    optimizer = Adafactor(teacher.parameters(), lr=1e-3, relative_step=False)
    teacher(torch.tensor(blocks[0][:2]["input_ids"])).logits.sum().backward()
    optimizer.step()
    with refused("exp_avg_sq_row.*cannot be sliced"):
        hdlib.narrow(teacher, Widths(hidden=12), None, optimizer)
    assert teacher.config.hidden_size == 24


def test_fewer_blocks_than_a_batch(teacher, tokenizer, blocks, short, tmp_path):
    with refused("3 blocks, fewer than one batch of 4"):
        hdlib.distill(teacher, tokenizer, blocks[0].take(3), blocks[1], DistillConfig(**short), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_longer_than_the_teacher(tokenizer, text_file, short, tmp_path):
    long = hdlib.load_corpus(text_file, tokenizer, 32)
    teacher = random_bert(vocabulary=len(tokenizer), positions=20)
    with refused("32 tokens, the teacher only 20 positions"):
        hdlib.distill(teacher, tokenizer, *long, DistillConfig(**short), tmp_path / "run")


def test_a_tokenizer_that_is_not_the_teachers(tokenizer, blocks, short, tmp_path):
    with refused("do not belong together"):
        hdlib.distill(random_bert(vocabulary=40), tokenizer, *blocks, DistillConfig(**short), tmp_path / "run")


def test_validation_that_has_no_labels(teacher, tokenizer, blocks, short, tmp_path):
    with refused("no labels"):
        hdlib.distill(teacher, tokenizer, blocks[0], blocks[0], DistillConfig(**short), tmp_path / "run")


def test_a_folder_that_holds_another_run(teacher, tokenizer, blocks, short, tmp_path):
    run = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**short), tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    with refused("already holds a run", FileExistsError):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**short), tmp_path)
    with refused("another config: steps was 2, is 3"):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**short | {"steps": 3}), tmp_path, resume=True)
    other = random_bert(vocabulary=len(tokenizer), seed=5)
    with refused("another content: teacher was"):
        hdlib.distill(other, tokenizer, *blocks, DistillConfig(**short), tmp_path, resume=True)
    text = Blocks(blocks[0].with_format("torch")[:]["input_ids"].flip(1))
    with refused("another content: train was"):
        hdlib.distill(teacher, tokenizer, text, blocks[1], DistillConfig(**short), tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics and run.finished


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_another_student(teacher, tokenizer, blocks, short, tmp_path, resume):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("years of work")
    with refused("already holds a run \\(student\\)", FileExistsError):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**short), tmp_path, resume=resume)
    assert (tmp_path / "student" / "thesis.txt").read_text() == "years of work"


def test_training_blocks_with_padding(teacher, tokenizer, blocks, short, tmp_path):
    padded = blocks[0].take(20).map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    with refused("attention_mask.*packed without padding"):
        hdlib.distill(teacher, tokenizer, padded, blocks[1], DistillConfig(**short), tmp_path / "run")


def test_a_folder_that_is_no_run(tmp_path):
    with refused("is no run folder", FileNotFoundError):
        hdlib.Run.load(tmp_path)
