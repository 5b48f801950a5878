"""Models with any head, exported from PyTorch, compute what they did."""

import onnxruntime
import pytest
import torch
import transformers

from hdlib.lab import export

from conftest import full
from models import random_model

HEADS = {
    "classifier": (transformers.BertForSequenceClassification, ["logits"]),
    "questions": (transformers.BertForQuestionAnswering, ["start_logits", "end_logits"]),
    "token classifier": (transformers.BertForTokenClassification, ["logits"]),
    "encoder": (transformers.BertModel, ["last_hidden_state", "pooler_output"]),
    "pre-training": (transformers.BertForPreTraining, ["prediction_logits", "seq_relationship_logits"]),
    "language model": (transformers.BertForMaskedLM, ["logits"]),
    "causal classifier": (transformers.GPT2ForSequenceClassification, ["logits"]),
}


@pytest.mark.parametrize("head", ["encoder", *full(*(head for head in HEADS if head != "encoder"))])
def test_any_head_is_exported_and_reads_pairs_of_texts(head, tokenizer, tmp_path):
    kind, outputs = HEADS[head]
    family = "gpt2" if head.startswith("causal") else "bert"
    model = kind(random_model(family, vocabulary=len(tokenizer), layers=1).config).eval()
    assert export.to_onnx(model, tmp_path / "model.onnx") <= 1e-5
    assert export.to_program(model, tmp_path / "model.pt2") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == outputs
    texts = ["the student learns", "a step"], ["a slow step", "the teacher keeps a neuron"]
    pairs = tokenizer(*texts, padding=True, return_tensors="pt")
    fed = {each.name: pairs[each.name].numpy() for each in session.get_inputs()}
    assert ("token_type_ids" in fed) == (not head.startswith("causal"))
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(each) for name, each in fed.items()})
    for name, found in zip(outputs, session.run(None, fed), strict=True):
        assert torch.allclose(expected[name], torch.from_numpy(found), atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("write, name", [(export.to_program, "model.pt2"), (export.to_onnx, "model.onnx")])
def test_a_model_with_few_positions_is_exported_below_the_home_folder(write, name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model("roberta", vocabulary=len(tokenizer), max_position_embeddings=14, layers=1)
    assert write(model, f"~/{name}") <= 1e-5 and (tmp_path / name).exists()
