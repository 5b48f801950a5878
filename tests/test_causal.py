"""Next-token distillation (GPT-2, Qwen and others), and every family through the whole loop."""

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.data import NextToken, sample
from hdlib.losses import attention_loss, pairs_that_count, prediction_loss
from hdlib.models import forward

from conftest import ARGUMENTS, full, random_batch
from invariants import loss_for
from models import KINDS, PLAIN, VARIANTS, random_model
from test_loop import weights


@pytest.fixture(scope="session")
def causal_tokenizer(text_file):
    trained = ByteLevelBPETokenizer()
    trained.train([str(text_file)], vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=32,
    )


@pytest.fixture(scope="session")
def causal_blocks(text_file, causal_tokenizer):
    return hdlib.load_corpus(text_file, causal_tokenizer, 16)


def test_blocks_are_slices_of_the_stream_and_labels_the_next_tokens(causal_tokenizer, causal_blocks, text_file):
    train, validation = causal_blocks
    first = validation[0]
    assert first["labels"] == [*first["input_ids"][1:], -100] and len(first["input_ids"]) == 16
    documents = text_file.read_text().split("\n\n")
    stream = [token for text in documents for token in [*causal_tokenizer(text)["input_ids"], 0]]
    text = " ".join(map(str, stream))
    for block in train.take(5)["input_ids"]:
        assert " ".join(map(str, block)) in text
    assert 0 in np.ravel(train[:50]["input_ids"]), "documents are separated"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.causal])
def test_the_loss_by_hand(name):
    """The mlm term is the stock model's own next-token loss; no term depends on masked pairs of tokens."""
    teacher, student = random_model(name), random_model(name, seed=1)
    input_ids, labels = NextToken()(random_batch()[0], torch.Generator())
    teacher_outputs, student_outputs = forward(teacher, input_ids), forward(student, input_ids)
    terms = loss_for(teacher)(student_outputs, teacher_outputs, labels)
    torch.testing.assert_close(terms.mlm, student(input_ids, labels=input_ids).loss)
    logits = [outputs.logits[:, :-1].flatten(0, 1) for outputs in (student_outputs, teacher_outputs)]
    torch.testing.assert_close(terms.prediction, prediction_loss(*logits))
    window = getattr(teacher.config, "sliding_window", None)
    types = getattr(teacher.config, "layer_types", None) or ["full_attention"] * 2
    # Mistral has no layer types: all layers have the window.
    types = ["sliding_attention"] * 2 if teacher.config.model_type == "mistral" else types
    attention = []
    for kind, s, t in zip(types, student_outputs.attentions, teacher_outputs.attentions, strict=True):
        past = torch.ones(16, 16).tril().bool()
        if kind == "sliding_attention":
            past &= ~torch.ones(16, 16).tril(-window).bool()
        attention.append((s.scores() - t.scores()).square()[..., past].mean())
    torch.testing.assert_close(terms.attention, sum(attention))


@pytest.mark.parametrize("name", KINDS)
def test_every_family_handles_padding(name):
    """The recording forward gives the stock logits, and pairs with padding in them do not count."""
    model, other = random_model(name), random_model(name, seed=1)
    input_ids, labels = random_batch()
    mask = torch.ones_like(input_ids)
    mask[0, 11:] = 0
    output = forward(model, input_ids, attention_mask=mask)
    expected = model(input_ids, attention_mask=mask).logits
    torch.testing.assert_close(output.logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    labels[0, 11:] = -100
    terms = loss_for(model)(output, forward(other, input_ids, attention_mask=mask), labels, mask)
    changed = input_ids.clone()
    changed[0, 11:] = 7  # tokens of the padding must not matter
    again = loss_for(model)(
        forward(model, changed, attention_mask=mask), forward(other, changed, attention_mask=mask), labels, mask
    )
    if name != "deberta-v2":  # its convolution reads padding
        for term, value in terms.named().items():
            torch.testing.assert_close(again.named()[term], value, rtol=1e-4, atol=1e-5, msg=term)


def test_pairs_of_real_tokens_that_attend_to_each_other_count():
    past, real = torch.ones(4, 4, dtype=torch.bool).tril(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = pairs_that_count(past[None, None], real)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, :3, :3], expected[1, :1, :1] = past[:3, :3], True
    assert torch.equal(found, expected[:, None])


def test_pairs_outside_a_mask_have_no_effect():
    """Not even infinite scores."""
    student, teacher = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4)
    past = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    expected = ((student - teacher) ** 2)[..., past[0, 0]].mean()
    loss = attention_loss(student, teacher.masked_fill(~past, float("inf")), pairs_that_count(past, None))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(student.grad).all() and (student.grad[..., ~past[0, 0]] == 0).all()


@pytest.mark.parametrize("name", [*PLAIN, *full(*VARIANTS)])
def test_every_family_through_the_whole_loop(name, tokenizer, causal_tokenizer, blocks, causal_blocks, tmp_path):
    """Save a teacher, load it, distil and narrow it, kill and resume the run, load the student."""
    its_tokenizer, text = (causal_tokenizer, causal_blocks) if KINDS[name].causal else (tokenizer, blocks)
    special = {"pad_token_id": its_tokenizer.pad_token_id} if its_tokenizer.pad_token_id is not None else {}
    random_model(name, vocabulary=len(its_tokenizer), **special).save_pretrained(tmp_path / "teacher")
    its_tokenizer.save_pretrained(tmp_path / "teacher")
    teacher, its_tokenizer = hdlib.load_teacher(tmp_path / "teacher")
    config = DistillConfig(**ARGUMENTS | {"steps": 4, "eval_every": 4, "checkpoint_every": 2})
    run = hdlib.distill(teacher, its_tokenizer, *text, config, tmp_path / "run")
    assert run.metrics.loc[0, "held_out_kl"] == 0.0 and run.metrics.loc[0, "held_out_agreement"] == 1.0
    assert all(run.metrics.loc[1, term] == 0.0 for term in ("prediction", "hidden", "attention", "embedding"))
    assert all(run.metrics.loc[4, term] > 0.0 for term in ("mlm", "prediction", "hidden", "attention"))
    student, _ = run.student()
    assert type(student) is type(teacher) and Widths.of(student) == Widths.at(teacher, 0.5)
    measured = hdlib.discrepancy(student.eval(), teacher, sample(text[1], 8))
    assert measured["kl"] == pytest.approx(run.metrics["held_out_kl"].iloc[-1], rel=1e-4)

    def kill(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, its_tokenizer, *text, config, tmp_path / "killed", on_step=kill)
    resumed = weights(hdlib.distill(teacher, its_tokenizer, *text, config, tmp_path / "killed", resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(run).items())


def test_a_student_comes_closer_to_a_causal_teacher(causal_tokenizer, causal_blocks, tmp_path):
    """Without the mlm term: the teacher is random, and the text would pull the student away from it."""
    teacher = random_model("qwen3", vocabulary=len(causal_tokenizer))
    config = DistillConfig(**ARGUMENTS | {"steps": 150, "eval_every": 150, "checkpoint_every": 150, "mlm": 0.0})
    run = hdlib.distill(teacher, causal_tokenizer, *causal_blocks, config, tmp_path)
    bare = hdlib.models.student_of(teacher)
    hdlib.narrow(bare, Widths.at(teacher, 0.5))
    untrained = hdlib.discrepancy(bare, teacher, causal_blocks[1].take(8))["kl"]
    assert run.metrics["held_out_kl"].iloc[-1] < 0.75 * untrained


def test_blocks_of_the_other_task_raise(teacher, tokenizer, blocks, text_file, causal_tokenizer, tmp_path):
    config = DistillConfig(steps=2, batch_size=4, target=0.5, eval_blocks=2, precision="float32")
    unmasked = hdlib.load_corpus(text_file, tokenizer, 16, causal=True)
    with pytest.raises(ValueError, match=r"predicts masked tokens, but .* of next ones.*causal=False"):
        hdlib.distill(teacher, tokenizer, *unmasked, config, tmp_path / "run")
    gpt = random_model("gpt2", vocabulary=len(tokenizer))
    with pytest.raises(ValueError, match=r"predicts next tokens, but .* of masked ones.*causal=True"):
        hdlib.distill(gpt, tokenizer, *blocks, config, tmp_path / "run")
    with pytest.raises(ValueError, match="needs cls_token and sep_token"):
        hdlib.load_corpus(text_file, causal_tokenizer, 16, causal=False)
    assert not (tmp_path / "run").exists()


def test_positions_that_start_after_the_padding_token(tokenizer, text_file, tmp_path):
    """A RoBERTa counts positions from pad_token_id + 1; longer blocks would be an index error in training."""
    long = hdlib.load_corpus(text_file, tokenizer, 32)
    teacher = random_model("roberta", vocabulary=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    assert teacher.config.max_position_embeddings == 34
    config = DistillConfig(steps=2, batch_size=4, target=0.5, eval_blocks=2, precision="float32")
    assert hdlib.distill(teacher, tokenizer, *long, config, tmp_path / "fits").finished
    short = random_model(
        "roberta", vocabulary=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=32
    )
    with pytest.raises(ValueError, match="32 tokens, the teacher only 31 positions"):
        hdlib.distill(short, tokenizer, *long, config, tmp_path / "run")
