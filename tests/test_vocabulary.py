"""A trimmed vocabulary: entries, ids and logits of what stays, stock folders, every kind of tokenizer, refusals."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import hdlib
from hdlib import DistillConfig
from hdlib.data import Masking, labelled_once
from hdlib.lab.cost import vocabulary_table
from hdlib.models import language_model_class

from conftest import ARGUMENTS, SPECIAL, full, random_bert, sentences
from models import KINDS, random_encoder, random_model

TEXTS = ["the teacher keeps a width.", "a slow, slow student", "日 is Zoë"]
OTHERS = [*sentences(9, seed=9), "Zoë reads: 100 % off", "日本"]
SOME = ("bert", "bert untied", "mpnet", "gpt2", "gemma3")
BERT = Path("/work/shared/data/bert-base-uncased-tokenizer")


def trained(model, trainer, pre_tokenizer, decoder, normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer of about 250 entries; its texts get [CLS] and [SEP]."""
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    backend.normalizer = normalizer or normalizers.NFC()
    backend.train_from_iterator([*sentences(400), *OTHERS], trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **SPECIAL)


def options(size: int = 250, **more) -> dict:
    return {"vocab_size": size, "special_tokens": [*SPECIAL.values()], "show_progress": False} | more


def bytes_bpe():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(**options(360, initial_alphabet=alphabet))
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(False), decoders.ByteLevel())


def edited(tokenizer, change):
    """The tokenizer after a function has changed its JSON."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    change(backend)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return tokenizer


def backwards(tokenizer):
    """The same with its ids in reverse, so that the special ones are last."""
    last = len(tokenizer) - 1

    def reverse(backend):
        entries = backend["model"]
        if entries["type"] == "Unigram":
            entries["vocab"].reverse()
            entries["unk_id"] = last - entries["unk_id"]
        else:
            entries["vocab"] = {token: last - index for token, index in entries["vocab"].items()}
        for added in backend["added_tokens"]:
            added["id"] = last - added["id"]
        for special in backend["post_processor"]["special_tokens"].values():
            special["ids"] = [last - index for index in special["ids"]]

    return edited(tokenizer, reverse)


def pairs_bpe():
    """As SentencePiece's BPE is converted: every pair of entries that forms an entry is a merge."""

    def all_pairs(backend):
        entries = backend["model"]["vocab"]
        cuts = ((token[:place], token[place:]) for token in entries for place in range(1, len(token)))
        merges = [cut for cut in cuts if {*cut} <= entries.keys()]
        backend["model"]["merges"] = sorted(merges, key=lambda cut: entries["".join(cut)])

    bpe = trained(models.BPE(), trainers.BpeTrainer(**options()), pre_tokenizers.Metaspace(), decoders.Metaspace())
    return backwards(edited(bpe, all_pairs))


def word_piece():
    trainer = trainers.WordPieceTrainer(**options())
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), decoders.WordPiece())


def unigram():
    trainer = trainers.UnigramTrainer(**options(unk_token="[UNK]"))
    return backwards(trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace()))


TOKENIZERS = (bytes_bpe, pairs_bpe, word_piece, unigram)


@pytest.fixture(scope="module")
def bpe():
    return bytes_bpe()


def names_of(tokenizer) -> list[str]:
    """The entries in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def tokens_of(tokenizer, texts) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


def reopened(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModel if model.base_model is model else language_model_class(config)
    found, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return found.eval(), AutoTokenizer.from_pretrained(folder)


def outputs(model, tokenizer):
    """Logits (B, S, W), or states, and the mask (B, S) of real tokens."""
    batch = dict(tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False))
    with torch.no_grad():
        return model(**batch)[0], batch["attention_mask"].bool()


# --- the model


@pytest.mark.parametrize("kind", [*SOME, *full(*(kind for kind in KINDS if kind not in SOME))])
def test_logits_of_what_stays_in_a_stock_model(kind, bpe, tmp_path):
    model = random_model(kind, vocabulary=len(bpe) + 3, max_position_embeddings=64)
    before = copy.deepcopy(model.state_dict())
    small, tokenizer = hdlib.trim_vocabulary(model, bpe, TEXTS)
    assert len(tokenizer) == small.config.vocab_size == small.get_input_embeddings().weight.shape[0] < len(bpe)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items()), "the model is unchanged"
    kept = [bpe.get_vocab()[token] for token in names_of(tokenizer)]
    (wide, real), (narrow, same) = outputs(model, bpe), outputs(small, tokenizer)
    assert torch.equal(real, same)
    torch.testing.assert_close(narrow[real], wide[real][:, kept], rtol=1e-5, atol=1e-5)
    assert small.num_parameters() == type(model)(small.config).num_parameters()
    stock, opened = reopened(small, tokenizer, tmp_path)
    assert torch.equal(outputs(stock, opened)[0], narrow)
    tied = [each.get_input_embeddings().weight is each.get_output_embeddings().weight for each in (model, small, stock)]
    assert len({*tied}) == 1


@pytest.mark.parametrize("kind", ["mpnet", *full("bert", "modernbert")])
def test_a_sentence_encoder(kind, bpe, tmp_path):
    model = random_encoder(kind, vocabulary=len(bpe), max_position_embeddings=64)
    small, tokenizer = hdlib.trim_vocabulary(model, bpe, TEXTS)
    wide = hdlib.encode(model, bpe, TEXTS)
    torch.testing.assert_close(hdlib.encode(small, tokenizer, TEXTS), wide, rtol=1e-5, atol=1e-5)
    stock, _ = reopened(small, tokenizer, tmp_path)
    assert type(stock) is type(model)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_ids_of_special_tokens_follow(kind, bpe):
    """Also a list of them, in the settings of generation, and in the embedding, whose padding gets no gradient."""
    names = names_of(bpe)
    model = random_model(kind, vocabulary=len(bpe), pad_token_id=310, eos_token_id=[300, 301])
    if kind == "gpt2":
        model.generation_config.eos_token_id = 302
    small, tokenizer = hdlib.trim_vocabulary(model, bpe, TEXTS)
    now = names_of(tokenizer)
    assert [now[index] for index in small.config.eos_token_id] == names[300:302]
    assert now[small.config.pad_token_id] == names[310]
    if kind == "gpt2":
        assert now[small.generation_config.eos_token_id] == names[302]
    else:
        embedding = small.get_input_embeddings()
        assert embedding.padding_idx == small.config.pad_token_id and embedding.num_embeddings == len(now)


def test_padding_before_which_nothing_else_would_stay(bpe):
    """Positions of a RoBERTa start after the id of padding: it may not move."""
    model = random_model("roberta", vocabulary=len(bpe), pad_token_id=330, max_position_embeddings=400)
    small, tokenizer = hdlib.trim_vocabulary(model, bpe, TEXTS)
    assert small.config.pad_token_id == 330 and names_of(tokenizer)[:331] == names_of(bpe)[:331]


# --- the tokenizer


@pytest.mark.parametrize("make", TOKENIZERS)
def test_used_entries_divide_text_as_before(make, tmp_path):
    tokenizer = make()
    model = random_bert(vocabulary=len(tokenizer), positions=64)
    small, trimmed = hdlib.trim_vocabulary(model, tokenizer, iter(TEXTS))
    assert tokens_of(trimmed, TEXTS) == tokens_of(tokenizer, TEXTS)
    order = {token: place for place, token in enumerate(names_of(tokenizer))}
    assert names_of(trimmed) == sorted(names_of(trimmed), key=order.get), "the order is that of before"
    assert trimmed.all_special_tokens == tokenizer.all_special_tokens and len(trimmed) < len(tokenizer)
    used = {token for text in tokens_of(tokenizer, TEXTS) for token in text}
    assert used <= set(names_of(trimmed))
    _, opened = reopened(small, trimmed, tmp_path)
    assert opened.get_vocab() == trimmed.get_vocab()
    assert opened(OTHERS, OTHERS[::-1])["input_ids"] == trimmed(OTHERS, OTHERS[::-1])["input_ids"]
    (before, after) = vocabulary_table({"before": (model, tokenizer), "after": (small, trimmed)}, OTHERS).to_dict(
        "records"
    )
    assert after["entries"] == len(trimmed) and after["parameters"] == small.num_parameters() < before["parameters"]
    assert after["tokens"] > before["tokens"] and after["unknown"] == before["unknown"] and after["same_text"] == 1


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("texts", [None, OTHERS])
def test_asked_is_got_and_every_entry_can_be_reached(make, texts):
    """At every size up to all: what merges into an entry stays with it."""
    tokenizer = make()
    model = random_bert(vocabulary=len(tokenizer))
    with pytest.raises(
        ValueError, match=r"size=1 is impossible: take a number of entries from \d+, which special tokens"
    ):
        hdlib.trim_vocabulary(model, tokenizer, texts, 1)
    for size in range(len(tokenizer), 0, -29):
        try:
            small, trimmed = hdlib.trim_vocabulary(model, tokenizer, texts, size)
        except ValueError as error:
            least = int(re.search(r"from (\d+)", str(error))[1])
            assert size < least <= len(trimmed)
            break
        assert len(trimmed) == small.config.vocab_size == size
        merges = json.loads(trimmed.backend_tokenizer.to_str())["model"].get("merges")
        characters = {token for token in trimmed.get_vocab() if len(token) == 1}
        made = {"".join(pair) for pair in merges or ()}
        assert merges is None or made | characters | {*SPECIAL.values()} == trimmed.get_vocab().keys()
    else:
        pytest.fail("no size was too small")


def test_the_most_used_stay(bpe):
    model = random_bert(vocabulary=len(bpe))
    texts = [" teacher"] * 9 + [" width"] * 5 + [" neuron"] * 2
    kept = [{*names_of(hdlib.trim_vocabulary(model, bpe, texts, size)[1])} for size in (270, 275, None)]
    words = ["Ġteacher", "Ġwidth", "Ġneuron", "Ġstudent"]
    assert [sum(word in names for word in words) for names in kept] == [1, 2, 3]


def test_padding_of_the_serialisation_follows(bpe):
    padded = copy.deepcopy(bpe)
    padded.backend_tokenizer.enable_padding(pad_id=bpe.pad_token_id, pad_token=bpe.pad_token)
    _, trimmed = hdlib.trim_vocabulary(random_bert(vocabulary=len(bpe)), padded, TEXTS)
    assert trimmed.backend_tokenizer.padding["pad_id"] == trimmed.pad_token_id


def test_an_added_token_beyond_the_model_of_the_tokenizer(bpe):
    added = copy.deepcopy(bpe)
    added.add_tokens(["homodistil"])
    _, trimmed = hdlib.trim_vocabulary(random_bert(vocabulary=len(added)), added, TEXTS)
    assert trimmed.get_vocab()["homodistil"] == len(trimmed) - 1 and "homodistil" in trimmed.tokenize(" a homodistil")


def test_the_score_of_an_unknown_character_stays():
    """It is 10 below the lowest score: without "zz" the first character and "yñ" would lose to "xy" and unknown."""
    scores = {"[UNK]": 0.0, "x": -12.0, "y": -2.0, "z": -2.0, "xy": -1.0, "yñ": -15.0, "zz": -20.0, "xx": -19.0}
    backend = Tokenizer(models.Unigram([*scores.items()], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    model = random_bert(vocabulary=len(tokenizer))
    _, trimmed = hdlib.trim_vocabulary(model, tokenizer, ["xyñ", "xy"])
    assert "xx" not in trimmed.get_vocab()
    assert tokens_of(trimmed, ["xyñ", "ñ"]) == tokens_of(tokenizer, ["xyñ", "ñ"]) == [["x", "yñ"], ["[UNK]"]]


@pytest.mark.skipif(not BERT.is_dir(), reason="the tokenizer of BERT-base is not on this machine")
def test_the_tokenizer_of_bert_base(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BERT)
    model = random_bert(vocabulary=len(tokenizer))
    small, trimmed = hdlib.trim_vocabulary(model, tokenizer, OTHERS, 5000)
    _, opened = reopened(small, trimmed, tmp_path)
    assert type(opened) is type(tokenizer) and len(opened) == 5000
    assert tokens_of(opened, OTHERS) == tokens_of(tokenizer, OTHERS)


# --- a run


def test_a_trimmed_teacher_is_distilled_and_resumed(tmp_path):
    _, tokenizer = hdlib.load_teacher("embedded")
    teacher, trimmed = hdlib.trim_vocabulary(random_bert(vocabulary=len(tokenizer)), tokenizer, OTHERS)
    rows = [ids[:16] for ids in trimmed(sentences(40))["input_ids"] if len(ids) >= 16]
    ids = torch.tensor(rows)
    blocks = ids, labelled_once(ids[:8], Masking.of(trimmed), seed=0)
    config = DistillConfig(**ARGUMENTS | {"steps": 6, "checkpoint_every": 3})
    whole = hdlib.distill(teacher, trimmed, *blocks, config, tmp_path / "whole")

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, trimmed, *blocks, config, tmp_path / "run", on_step=stop)
    run = hdlib.distill(teacher, trimmed, *blocks, config, tmp_path / "run", resume=True)
    assert run.metrics["total"].equals(whole.metrics["total"]) and (run.metrics["held_out_kl"].dropna() > 0).any()
    student, opened = run.student()
    assert student.config.vocab_size == len(opened) == len(trimmed) < len(tokenizer)


# --- what is refused


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    "change, words",
    [
        ({"texts": []}, "texts hold no token: .* or a size"),
        ({"texts": ["", ""], "size": 300}, "texts hold no token"),
        ({"texts": None}, "texts hold no token"),
        ({"texts": "abc"}, "texts is a single string"),
        ({"size": 10}, r"size=10 is impossible: take a number of entries from 26\d"),
        ({"size": 10**6}, "size=1000000 is impossible: .* to 334, which are all"),
        ({"tokenizer": Slow()}, "Slow is a slow tokenizer: open it as a fast one"),
        ({"model": random_bert(vocabulary=60)}, "the tokenizer has 334 entries, the teacher's embedding 60 rows"),
        (
            {"model": random_model("gpt2", vocabulary=400, bos_token_id=399)},
            "bos_token_id=399 of GPT2Config is no entry",
        ),
    ],
)
def test_what_is_refused(change, words, bpe):
    arguments = {"model": random_bert(vocabulary=len(bpe)), "tokenizer": bpe, "texts": TEXTS, "size": None} | change
    with pytest.raises(ValueError, match=words) as refusal:
        hdlib.trim_vocabulary(**arguments)
    assert "\n" not in str(refusal.value)


def test_marks_of_words_in_bpe(bpe):
    trainer = trainers.BpeTrainer(**options(end_of_word_suffix="</w>"))
    marked = trained(models.BPE(), trainer, pre_tokenizers.Whitespace(), decoders.BPEDecoder())
    with pytest.raises(ValueError, match="marks parts of words"):
        hdlib.trim_vocabulary(random_bert(vocabulary=len(marked)), marked, TEXTS)
