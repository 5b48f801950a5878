"""Fade a layer out before it is removed, so that the model's function changes continuously.

A layer adds to the residual stream what two output matrices give, that of its attention and that of its feed-forward
block. With both at 0, a layer of a pre-norm family is the identity. In a post-norm family two norms remain, of which
each rescales every token. They are led to the scale and shift with which they return what they read, up to the
differences in scale between tokens; these are what the removal changes.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import HIDDEN
from .narrowing import layers_of
from .reconstruction import input_axis
from .widths import axes_of, family


@torch.no_grad()
def fade(model: PreTrainedModel, layer: int, factor: float) -> None:
    """Multiply the outputs of a layer by `factor`, in [0, 1], in place; lead its norms to the identity as far."""
    prefix, axes = f"{layers_of(model)}.{layer}.", axes_of(model)
    for name in (name for name in axes if name.startswith(prefix) and name.endswith(".weight")):
        module = model.get_submodule(name.removesuffix(".weight"))
        read = axes[name][axis] if (axis := input_axis(module)) is not None else None
        if read and read[0].group != HIDDEN:
            for parameter in module.parameters():
                parameter.mul_(factor)
    if not _pre_norm(model):
        (*_, before), after = (_norms(model, each) for each in (layer - 1, layer))
        for norm in after if before.weight is not None else ():
            scale, shift = _identity(before)
            norm.weight.lerp_(scale, 1 - factor)
            norm.bias.lerp_(shift, 1 - factor)


def _pre_norm(model: PreTrainedModel) -> bool:
    return family(model).pre_norm or getattr(model.config, "do_layer_norm_before", False)


def _norms(model: PreTrainedModel, layer: int) -> list[nn.LayerNorm]:
    """Of a post-norm layer: after its attention, and after its feed-forward block."""
    modules = model.get_submodule(f"{layers_of(model)}.{layer}").modules()
    return [module for module in modules if isinstance(module, nn.LayerNorm)]


def _identity(norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (D,), with which a norm would return what this one gives.

    They are the deviation and the mean over the neurons of g n + b, for n of uncorrelated entries of variance 1.
    """
    mean = norm.bias.mean()
    deviation = (norm.weight.square().mean() + (norm.bias - mean).square().mean()).sqrt()
    return deviation.expand_as(norm.weight), mean.expand_as(norm.bias)
