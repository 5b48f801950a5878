"""Choose neurons and remove them, so that what is left is an ordinary, smaller model.

Narrowing replaces every parameter that holds a removed neuron by a smaller one and slices the
optimiser's moments with it. The stock constructor stays the authority on everything else: it is asked
for an empty model of the new shape, its parameter shapes must be those obtained, and what it derives
from the widths (feature counts, head sizes, the attention scale) is taken over from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import FFN, HEADS, HIDDEN, SHARED_HEADS, VALUE
from .widths import (
    QUERY_KEY,
    Axis,
    UnsupportedArchitecture,
    Widths,
    axes_of,
    layer_of_parameters,
    set_widths,
    width_groups,
)


@torch.no_grad()
def narrow(
    model: PreTrainedModel,
    widths: Widths,
    scores: dict[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor]:
    """Remove neurons from a model in place, until it has the widths asked for.

    The highest scores stay (the lower index on a tie), or the first neurons where no scores are given;
    whole heads go by the sum of their dimensions. Order is kept, ties stay ties. Where head dimensions
    go, the queries are multiplied by sqrt(new / old), so that the stock model's attention scores are
    those of the same neurons at the old scale; their gradients and moments are converted with them.

    Args:
        model: a Hugging Face model of a supported family; changed in place.
        widths: the shape to reach; what it leaves out stays as it is.
        scores: group name to a vector of importances, at least 0, one for each neuron of the group.
        optimizer: any optimiser over the model's parameters; they are re-pointed and its state sliced.

    Returns:
        What was kept: group name to sorted indices into the group as it was, and for each layer
        "layer.l.heads" besides, the query heads that stay.

    Raises:
        ValueError: an impossible shape; scores that are missing, of the wrong length or not finite; weights
            that cannot be sliced (quantised, sharded, on the meta device). Nothing has been touched then.
        UnsupportedArchitecture: no table for this family, or a model that is not in its stock form.
    """
    axes, old, new = axes_of(model), Widths.of(model), widths.resolved(model)
    stock = check_narrowable(model, new)
    kept = choose(model, new, scores)
    _check_shapes(model, stock, axes, kept)
    _check_optimizer(model, optimizer)
    scale = _attention_scale(model, old, new)
    sites = _sites(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.shape != stock.get_parameter(name).shape:
            _narrow_parameter(parameter, sites[parameter], axes[name], kept, scale, optimizer)
    set_widths(model, model.config, new)
    _take_over_derived_attributes(model, stock)
    return kept


def choose(model: PreTrainedModel, widths: Widths, scores: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The neurons that stay: group name to sorted indices (see `narrow`). Changes nothing."""
    groups = width_groups(model)
    if scores is None:
        scores = {name: torch.zeros(group.size) for name, group in groups.items()}
    check_scores(groups, scores)
    return choose_among(scores, Widths.of(model), widths, layer_of_parameters(model))


def choose_among(scores: dict[str, Tensor], wide: Widths, narrow: Widths, layers: list[int]) -> dict[str, Tensor]:
    """`choose`, from the scores alone: those of a shape `wide`, of which `narrow` stays."""
    counts = {HIDDEN: narrow.hidden, FFN: narrow.ffn}
    shared = _scores_of_shared_heads(scores, wide)
    kept = {}
    for name, score in scores.items():
        kind = name.rpartition(".")[2]
        if kind in counts:
            kept[name] = _highest(score, counts[kind])
        elif kind == HEADS:
            shared_by = wide.heads // len(score)  # query heads to a key/value head
            kept[name] = _highest(score, narrow.heads // shared_by)
            kept[_beside(name, SHARED_HEADS)] = _spread(kept[name], shared_by)
        elif kind == QUERY_KEY:
            kept |= _choose_inside_heads(name, scores, wide, narrow, shared)
    if SHARED_HEADS in scores:
        kept[SHARED_HEADS] = kept["layer.0.heads"]
    heads = [kept[f"layer.{layer}.heads"] for layer in layers]
    return kept | {f"layer.{layer}.heads": each for layer, each in enumerate(heads)}


def _choose_inside_heads(query_key: str, scores, wide: Widths, narrow: Widths, shared: Tensor | None):
    """Heads of one layer, and dimensions inside each of them.

    The query/key and the value/output dimensions of a head go or stay with the head, but inside it
    each of the two has a ranking of its own.
    """
    pairs = {name: scores[name].reshape(wide.heads, wide.head_dim) for name in (query_key, _beside(query_key, VALUE))}
    by_head = sum(score.sum(1) for score in pairs.values()) if shared is None else shared  # (H,)
    heads = _highest(by_head, narrow.heads)
    kept = {_beside(query_key, SHARED_HEADS): heads}
    for name, score in pairs.items():
        inside = score[heads].sort(dim=1, descending=True, stable=True).indices  # (heads, head_dim)
        inside = inside[:, : narrow.head_dim].sort(dim=1).values
        kept[name] = (heads[:, None] * wide.head_dim + inside).flatten()
    return kept


def _scores_of_shared_heads(scores: dict[str, Tensor], wide: Widths) -> Tensor | None:
    """Where all layers must keep the same heads: what each head is worth in all of them together, (H,)."""
    if SHARED_HEADS not in scores:
        return None
    inside = [score for name, score in scores.items() if name.endswith((QUERY_KEY, VALUE))]
    return scores[SHARED_HEADS] + sum(score.reshape(wide.heads, wide.head_dim).sum(1) for score in inside)


def take(tensor: Tensor, axes: tuple[Axis, ...], kept: dict[str, Tensor]) -> Tensor:
    """The kept slices of a tensor along each of its axes, contiguous; the tensor itself where all stay."""
    for axis, blocks in enumerate(axes):
        if blocks is not None:
            stay = places(blocks, kept)
            if len(stay) < tensor.shape[axis]:
                tensor = tensor.index_select(axis, stay.to(tensor.device))
    return tensor.contiguous()


def places(blocks: Axis, kept: dict[str, Tensor]) -> Tensor:
    """Where on an axis the kept neurons lie."""
    if len(blocks) == 1:
        return blocks[0].places(kept[blocks[0].group])
    ends = torch.tensor([block.size * block.unit for block in blocks]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([start + block.places(kept[block.group]) for start, block in zip(starts, blocks, strict=True)])


def replace_parameter(
    old: nn.Parameter,
    new: nn.Parameter,
    sites: list[tuple[nn.Module, str]],
    optimizer: torch.optim.Optimizer | None,
    take: Callable[[Tensor], Tensor],
    factor: Tensor | float = 1.0,
) -> None:
    """Put a smaller parameter where an old one was: in every module that holds it, and in the optimiser.

    A new nn.Parameter is needed: autograd keeps the old shape of a tensor whose data is exchanged in
    place. For a parameter multiplied by `factor` the gradient is divided by it, so Adam's first moment
    is too, and its second by the square: the next update is the one that would have come.
    """
    for module, name in sites:
        module._parameters[name] = new
    if old.grad is not None:
        new.grad = _divided(take(old.grad), factor)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        powers = dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2)
        optimizer.state[new] = {
            key: _divided(take(value), factor ** powers.get(key, 1))
            if torch.is_tensor(value) and value.shape == old.shape
            else value
            for key, value in state.items()
        }


def _narrow_parameter(parameter: nn.Parameter, sites, axes, kept, scale: float, optimizer) -> None:
    def kept_slices(tensor: Tensor) -> Tensor:
        return take(tensor, axes, kept)

    factor = _folded_scale(axes, kept, scale)
    data = kept_slices(parameter.data)
    if factor is not None:
        data.mul_(factor.to(data))
    smaller = nn.Parameter(data, requires_grad=parameter.requires_grad)
    replace_parameter(parameter, smaller, sites, optimizer, kept_slices, 1.0 if factor is None else factor.to(data))


def _folded_scale(axes: tuple[Axis, ...], kept, scale: float) -> Tensor | None:
    """What a narrowed parameter is multiplied by, so that it fits in shape: `scale` where queries are, else 1."""
    for axis, blocks in enumerate(axes):
        if scale != 1.0 and any(block.scaled for block in blocks or ()):
            factors = [scale if block.scaled else 1.0 for block in blocks]
            lengths = [len(kept[block.group]) * block.unit for block in blocks]
            along = torch.cat([torch.full((n,), c, dtype=torch.float64) for n, c in zip(lengths, factors, strict=True)])
            return along.reshape([-1 if other == axis else 1 for other in range(len(axes))])
    return None


def _attention_scale(model: PreTrainedModel, old: Widths, new: Widths) -> float:
    """What queries must be multiplied by: 1 where the stock class does not scale by 1/sqrt(head_dim) (a GPT-2 can)."""
    return math.sqrt(new.head_dim / old.head_dim) if getattr(model.config, "scale_attn_weights", True) else 1.0


def _divided(tensor: Tensor, factor: Tensor | float) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor / factor


def _beside(name: str, kind: str) -> str:
    """The group of another kind in the same layer."""
    return f"{name.rpartition('.')[0]}.{kind}"


def _spread(neurons: Tensor, unit: int) -> Tensor:
    return (neurons[:, None] * unit + torch.arange(unit, device=neurons.device)).flatten()


def _highest(scores: Tensor, count: int) -> Tensor:
    """The sorted indices of the `count` highest scores; on a tie the lower index stays."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _sites(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds each parameter: more than one where weights are tied."""
    sites: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sites.setdefault(parameter, []).append((module, name))
    return sites


def empty_stock_model(model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
    """A model of the new shape as the stock constructor builds it, without memory for its weights."""
    config = deepcopy(model.config)
    set_widths(model, config, widths)
    with torch.device("meta"):
        return type(model)(config)


def _take_over_derived_attributes(model: nn.Module, stock: nn.Module) -> None:
    """Copy every plain number that the stock constructor derived from the widths: in_features, scaling, ..."""
    for module, fresh in zip(model.modules(), stock.modules(), strict=True):
        for name, value in vars(fresh).items():
            if type(value) in (int, float, tuple, torch.Size):
                setattr(module, name, value)


def check_narrowable(model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
    """Refuse a model of which slices could not really be taken; returns an empty stock model of the new shape.

    Raises:
        ValueError: weights that are quantised, sharded or on the meta device.
        UnsupportedArchitecture: other parameters than the stock class has.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised, and its weights cannot be sliced: load it in float32 or bfloat16")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device: its weights are offloaded or not loaded yet. Load the model into memory"
            )
        if type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__} of {parameter.dtype}, quantised or sharded, and cannot "
                "be sliced: load the model whole and in float32 or bfloat16"
            )
    stock = empty_stock_model(model, widths)
    differ = dict(model.named_parameters()).keys() ^ dict(stock.named_parameters()).keys()
    if differ:
        raise UnsupportedArchitecture(
            f"this model and a stock {type(model).__name__} do not have the same parameters: "
            f"{', '.join(sorted(differ))}. Ties that were cut or made, or layers that were exchanged (as quantisation "
            "does), must be undone first"
        )
    return stock


def _check_shapes(model: PreTrainedModel, stock: PreTrainedModel, axes, kept: dict[str, Tensor]) -> None:
    """The stock constructor's word on what must come out."""
    for name, parameter in model.named_parameters():
        blocks = zip(axes[name], parameter.shape, strict=True)
        shape = tuple(size if axis is None else len(places(axis, kept)) for axis, size in blocks)
        if shape != stock.get_parameter(name).shape:
            raise UnsupportedArchitecture(
                f"{name} would become {shape}, but is {tuple(stock.get_parameter(name).shape)} in a stock "
                f"{type(model).__name__} of these widths"
            )


def check_scores(groups, scores: dict[str, Tensor]) -> None:
    for name, group in groups.items():
        if name not in scores:
            raise ValueError(f"no scores for the width group {name!r}; every group needs them: {sorted(groups)}")
        if tuple(scores[name].shape) != (group.size,):
            raise ValueError(
                f"scores of {name!r} have shape {tuple(scores[name].shape)}, the group {group.size} neurons"
            )
        if not torch.isfinite(scores[name]).all():
            raise ValueError(f"scores of {name!r} are not all finite: the gradients they come from were not")


def _check_optimizer(model: nn.Module, optimizer) -> None:
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(
                f"the optimiser does not hold the trainable parameter {name}: pass the one that trains this model"
            )
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's state {key!r} of {name} has shape {tuple(value.shape)}, which does not follow "
                    "the neurons: take one whose state has the parameters' shapes, as AdamW or SGD"
                )
