"""A student as other runtimes take it, `torch.export` and ONNX, each checked against the model it was made of."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..widths import family


def to_program(model: PreTrainedModel, path: str | Path) -> float:
    """Write a model as a `torch.export` program (.pt2) that takes any batch and length.

    Args:
        model: with its language-model head.
        path: where the program goes. It takes input_ids and attention_mask, both (B, S), and gives the
            logits, (B, S, V).

    Returns:
        The largest difference of a logit from the eager model's, as a fraction of the largest logit, read back from the
        file and measured on a padded batch of another shape than the one it was traced with; 0 for identical ones.
    """
    torch.export.save(_traced(model), str(path))
    program = torch.export.load(str(path)).module()
    return _difference(model, lambda inputs: program(**inputs))


def to_onnx(model: PreTrainedModel, path: str | Path) -> float:
    """Write a model as ONNX that takes any batch and length; arguments and result as for `to_program`.

    Raises:
        ModuleNotFoundError: the packages of the extra `export` are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, what torch.onnx translates with
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is missing: pip install -e ".[export]"') from error
    program = _traced(model)
    with _without_chatter():
        torch.onnx.export(program, dynamo=True, verbose=False, output_names=["logits"]).save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _difference(
        model, lambda inputs: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])
    )


@contextmanager
def _without_chatter():
    """PyTorch's exporter tells of packages that it could use, and warns of its own internals."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _traced(model: PreTrainedModel) -> ExportedProgram:
    inputs = _inputs(model, 2, 16, padded=0)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        return torch.export.export(_Logits(model.eval()), (), inputs, dynamic_shapes=shapes)


class _Logits(torch.nn.Module):
    """A model whose output is its logits alone: caches and the like do not leave PyTorch."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if family(model).causal else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) token ids and mask to (B, S, V) logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def _inputs(model: PreTrainedModel, batch_size: int, length: int, padded: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, model.config.vocab_size, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, length - padded :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _difference(model: PreTrainedModel, other) -> float:
    inputs = _inputs(model, 3, 27, padded=9)
    with torch.no_grad():
        expected, found = model(**inputs).logits, other(inputs)  # (B, S, V) each
    read = inputs["attention_mask"].bool()  # what stands in padding is nobody's
    return float((found - expected)[read].abs().max() / expected[read].abs().max())
