"""Small real things to test with: a BERT with random weights, a WordPiece tokenizer, text in files."""

from __future__ import annotations

import os
import random
import socket

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

import hdlib

settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")

WORDS = ["a", "quick", "student", "teacher", "neuron", "layer", "width", "loss", "step", "keeps", "learns", "slow"]


def random_bert(heads=4, head_dim=6, ffn=56, layers=2, vocabulary=60, positions=32, seed=0) -> BertForMaskedLM:
    """A BERT with random weights, biases and norms included: nothing about it is symmetric or zero."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_batch(vocabulary=60, size=3, length=16, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, (B, S) each, a few positions of every row labelled."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, vocabulary, (size, length), generator=generator)
    labels = torch.full_like(input_ids, -100)
    labels[:, 2::5] = torch.randint(5, vocabulary, labels[:, 2::5].shape, generator=generator)
    return input_ids, labels


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up sentences with some order in them, so that there is something to learn."""
    draw = random.Random(seed)
    return [" ".join(["the", *draw.choices(WORDS, k=draw.randint(5, 20))]) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A corpus of 400 short documents, blank lines between them."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join("\n".join(sentences(8, seed)) for seed in range(400)))
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file):
    trained = BertWordPieceTokenizer()
    trained.train([str(text_file)], vocab_size=60, show_progress=False)
    return BertTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=32)


@pytest.fixture
def teacher(tokenizer):
    return random_bert(vocabulary=len(tokenizer))


@pytest.fixture(scope="session")
def blocks(text_file, tokenizer):
    return hdlib.load_corpus(text_file, tokenizer, 16)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing in these tests may leave the machine: a connection to another host fails at once."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise OSError(f"the tests allow no connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", guarded)
