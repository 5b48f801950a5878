"""Shared fixtures: a BERT with random weights, a WordPiece tokenizer, text in files, no network."""

from __future__ import annotations

import os
import random
import socket

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # also of subprocesses: the workers share the cores

import papermill
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertForMaskedLM, BertTokenizerFast, PreTrainedTokenizerFast
from transformers.utils import logging

import hdlib
from hdlib.config import PAPER
from hdlib.lab.cost import flops

from models import random_model

logging.disable_progress_bar()

_CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=30, derandomize=True, **_CALM)
settings.register_profile("full", max_examples=200, derandomize=True, **_CALM)
settings.register_profile("long", max_examples=10_000, **_CALM)
settings.load_profile("default")
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite-golden", action="store_true", help="store the present results of the notebooks as the expected ones"
    )


WORDS = ["a", "quick", "student", "teacher", "neuron", "layer", "width", "loss", "step", "keeps", "learns", "slow"]


def full(*cases) -> list:
    """Cases of a parametrised test that only the full set runs."""
    return [pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.full) for case in cases]


def execute_notebook(notebook, executed, parameters: dict, folder) -> None:
    """Execute a notebook in a folder; once more if its kernel has died, because another process took its port."""
    for last in (False, True):
        try:
            # A kernel starts slowly on a busy machine.
            papermill.execute_notebook(
                notebook, executed, parameters, cwd=folder, kernel_name="python3", progress_bar=False, start_timeout=600
            )
            return
        except RuntimeError as error:
            if last or "Kernel died before replying" not in str(error):
                raise


COUNTED: dict[tuple[str, int], int] = {}


def flops_once(config, length: int) -> int:
    """The operations of a shape, counted by the first test that asks for them."""
    key = config.to_json_string(), length
    COUNTED[key] = COUNTED[key] if key in COUNTED else flops(config, length)
    return COUNTED[key]


def random_bert(positions=32, **shape) -> BertForMaskedLM:
    return random_model("bert", max_position_embeddings=positions, **shape)


def random_batch(vocabulary=60, size=3, length=16, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, (B, S) each; a few positions of every row are labelled."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, vocabulary, (size, length), generator=generator)
    labels = torch.full_like(input_ids, -100)
    labels[:, 2::5] = torch.randint(5, vocabulary, labels[:, 2::5].shape, generator=generator)
    return input_ids, labels


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random sentences from a small vocabulary; a model can learn their statistics."""
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


SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
SPECIAL |= {"unk_token": "[UNK]"}


def masked(model, pre_tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of BERT."""
    plain = Tokenizer(model)
    plain.pre_tokenizer, plain.decoder = pre_tokenizer, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **SPECIAL)


@pytest.fixture(scope="session")
def letters():
    """A token a byte: encodes every text, and decodes it exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return masked(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []), pre_tokenizers.ByteLevel(False))


@pytest.fixture
def teacher(tokenizer):
    return random_bert(vocabulary=len(tokenizer))


ARGUMENTS = PAPER | {
    "steps": 24,
    "batch_size": 8,
    "target": 0.5,
    "prune_every": 2,
    "eval_every": 6,
    "eval_blocks": 8,
    "checkpoint_every": 5,
    "learning_rate": 3e-3,
    "precision": "float32",  # "auto" would depend on the machine
}


@pytest.fixture(scope="session")
def whole_run(tokenizer, blocks, tmp_path_factory) -> hdlib.Run:
    """The finished run of `teacher` with ARGUMENTS, for all tests that only read it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return hdlib.distill(
        random_bert(vocabulary=len(tokenizer)), tokenizer, *blocks, hdlib.DistillConfig(**ARGUMENTS), folder
    )


@pytest.fixture(scope="session")
def blocks(text_file, tokenizer):
    return hdlib.load_corpus(text_file, tokenizer, 16)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to another host fails immediately."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise OSError(f"the tests allow no connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", guarded)
