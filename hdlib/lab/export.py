"""Export a student to `torch.export` and ONNX, and compare the result with the model."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..widths import family


def to_program(model: PreTrainedModel, path: str | Path) -> float:
    """Write a model with its language-model head as a `torch.export` program (.pt2) for any batch size and length.

    Input: input_ids and attention_mask, (B, S); output: logits, (B, S, V).

    Returns:
        The largest difference between the logits of the file and of the model, as a fraction of the largest logit; 0 if
        identical. Measured on a padded batch whose shape differs from the traced one.
    """
    torch.export.save(_traced(model), str(path))
    return _difference(model, torch.export.load(str(path)).module())


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
        torch.onnx.export(_traced(model), dynamo=True, verbose=False, output_names=["logits"]).save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return _difference(model, run)


class _Logits(torch.nn.Module):
    """A model that returns its logits alone: caches cannot be exported."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if family(model).causal else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) token ids and mask to (B, S, V) logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def _traced(model: PreTrainedModel) -> ExportedProgram:
    inputs = _inputs(model, 2, 16, padded=0)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        return torch.export.export(_Logits(model.eval()), (), inputs, dynamic_shapes=shapes)


def _inputs(model: PreTrainedModel, batch_size: int, length: int, padded: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, model.config.vocab_size, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, length - padded :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _difference(model: PreTrainedModel, exported) -> float:
    inputs = _inputs(model, 3, 27, padded=9)
    with torch.no_grad():
        expected, found = model(**inputs).logits, exported(**inputs)  # (B, S, V) each
    tokens = inputs["attention_mask"].bool()  # logits of padding are not used
    return float((found - expected)[tokens].abs().max() / expected[tokens].abs().max())
