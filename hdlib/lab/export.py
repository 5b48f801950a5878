"""Export a student to `torch.export` and ONNX, and compare the result with the model; save a sentence encoder."""

from __future__ import annotations

import inspect
import logging
import warnings
from copy import copy
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import save_folder
from ..models import num_positions
from ..widths import family


def to_program(model: PreTrainedModel, path: str | Path) -> float:
    """Write a model, with any head or none, as a `torch.export` program (.pt2) for any batch size and length.

    Inputs, (B, S) each: input_ids, attention_mask and, if the model has several token types, token_type_ids. Outputs:
    all tensors of the model's output in their order, such as the logits (B, S, V) of a language model; of a sentence
    encoder also sentence_embedding (B, E), with pooling and what follows it.

    Returns:
        The largest difference between an output of the file and of the model, as a fraction of the largest value of
        that output; 0 if identical. Measured on a padded batch whose shape differs from the traced one.
    """
    program, path = _traced(model), expanduser(path)
    torch.export.save(program, path)
    return _difference(model, torch.export.load(path).module())


def to_onnx(model: PreTrainedModel, path: str | Path) -> float:
    """Write a model as ONNX; arguments and result as for `to_program`.

    Raises ModuleNotFoundError if the packages of the extra `export` are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  used by torch.onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is missing: pip install -e ".[export]"') from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs every optional package that is not installed
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about internals of PyTorch
        names, path = list(_outputs(model, _inputs(model, 2, 8))), expanduser(path)
        torch.onnx.export(_traced(model), dynamo=True, verbose=False, output_names=names).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> list[Tensor]:
        return [*map(torch.from_numpy, session.run(None, {name: each.numpy() for name, each in inputs.items()}))]

    return _difference(model, run)


def save_sentence_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, teacher_space: bool = True
) -> None:
    """Write a folder that `SentenceTransformer(folder)` and `AutoModel` open.

    Args:
        model, tokenizer: a student from `Run.student`, or another sentence encoder.
        folder: is replaced if it exists.
        teacher_space: keep the dense layers that map into the space of the teacher, so that the student searches an
            index built by the teacher; False: embeddings have the narrow dimension of the student.
    """
    model = copy(model)
    if not teacher_space:
        model.sentence_pooling = replace(model.sentence_pooling, dense=(), projection=None)
    save_folder(Path(expanduser(folder)), model, tokenizer)


class _Tensors(torch.nn.Module):
    """A model that returns a tuple of the tensors of its output."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return tuple(_outputs(self.model, inputs).values())


def _outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {"use_cache": False} if family(model).causal else {}  # caches cannot be exported
    found = {name: each for name, each in model(**inputs, **options).items() if isinstance(each, Tensor)}
    if pooling := getattr(model, "sentence_pooling", None):
        found["sentence_embedding"] = pooling(found["last_hidden_state"], inputs["attention_mask"])
    return found


def _traced(model: PreTrainedModel) -> ExportedProgram:
    inputs = _inputs(model, 2, 16)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        return torch.export.export(_Tensors(model.eval()), (), inputs, dynamic_shapes=shapes)


def _inputs(model: PreTrainedModel, batch_size: int, length: int, padded: int = 0) -> dict[str, Tensor]:
    generator, shape = torch.Generator().manual_seed(0), (batch_size, min(length, num_positions(model)))
    input_ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, shape[1] - padded :] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    types = getattr(model.config, "type_vocab_size", 0)
    if types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.randint(types, shape, generator=generator)
    return inputs


def _difference(model: PreTrainedModel, exported) -> float:
    inputs = _inputs(model, 3, 27, padded=9)
    with torch.no_grad():
        expected, found = _outputs(model, inputs).values(), exported(**inputs)
    return max(map(_distance, expected, found, [inputs["attention_mask"].bool()] * len(expected)))


def _distance(expected: Tensor, found: Tensor, tokens: Tensor) -> float:
    if expected.shape[:2] == tokens.shape:  # values of padding are not used
        expected, found = expected[tokens], found[tokens]
    return float((found - expected).abs().max() / expected.abs().max())
