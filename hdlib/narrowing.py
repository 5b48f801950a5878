"""Choose neurons and remove them, so that what is left is an ordinary, smaller model.

Narrowing replaces every parameter that holds a removed neuron by a smaller one and slices the
optimiser's moments with it. The stock constructor stays the authority on everything else: it is asked
for an empty model of the new shape, its parameter shapes must be those obtained, and what it derives
from the widths (feature counts, head sizes, the attention scale) is taken over from it.
"""

from __future__ import annotations

import math
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .widths import FFN, HIDDEN, Widths, axes_of, family, set_widths, width_groups


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
        "layer.l.heads" besides.

    Raises:
        ValueError: an impossible shape, or scores that are missing, of the wrong length or not finite.
            Nothing has been touched then.
        UnsupportedArchitecture: no table for this family.
    """
    old, new = Widths.of(model), widths.resolved(model)
    kept = choose(model, new, scores)
    stock = _empty_stock_model(model, new)
    _check_optimizer(model, optimizer)
    scale = math.sqrt(new.head_dim / old.head_dim)
    folded = family(model).scaled
    sites = _sites(model)
    for name, axes in axes_of(model).items():
        parameter = model.get_parameter(name)
        factor = scale if any(fnmatchcase(name, pattern) for pattern in folded) else 1.0
        smaller = _sliced_parameter(parameter, axes, kept, factor)
        if smaller.shape != stock.get_parameter(name).shape:
            raise RuntimeError(f"{name} became {tuple(smaller.shape)}, but a stock model has another shape there")
        replace_parameter(parameter, smaller, sites[parameter], optimizer, partial(_take, axes=axes, kept=kept), factor)
    set_widths(model.config, new)
    _take_over_derived_attributes(model, stock)
    return kept


def choose(model: PreTrainedModel, widths: Widths, scores: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The neurons that stay: group name to sorted indices (see `narrow`). Changes nothing."""
    groups, wide = width_groups(model), Widths.of(model)
    if scores is None:
        scores = {name: torch.zeros(group.size) for name, group in groups.items()}
    _check_scores(groups, scores)
    kept = {}
    for name, group in groups.items():
        if group.kind in (HIDDEN, FFN):
            kept[name] = _highest(scores[name], widths.hidden if group.kind == HIDDEN else widths.ffn)
    for layer in sorted({name.rpartition(".")[0] for name, group in groups.items() if group.kind != HIDDEN}):
        # (H, head_dim): the query/key and the value/output dimensions of a head go or stay with the head,
        # but inside it each pair has a ranking of its own.
        pairs = {f"{layer}.{pair}": None for pair in ("query_key", "value_output")}
        pairs = {name: scores[name].reshape(wide.heads, wide.head_dim) for name in pairs}
        heads = _highest(sum(score.sum(1) for score in pairs.values()), widths.heads)
        kept[f"{layer}.heads"] = heads
        for name, score in pairs.items():
            inside = [head * wide.head_dim + _highest(score[head], widths.head_dim) for head in heads.tolist()]
            kept[name] = torch.cat(inside)
    return kept


def replace_parameter(old, new, sites, optimizer=None, take=lambda tensor: tensor, factor: float = 1.0) -> None:
    """Put a smaller parameter where an old one was: in every module that holds it, and in the optimiser.

    A new nn.Parameter is needed: autograd keeps the old shape of a tensor whose data is exchanged in
    place. For a parameter multiplied by `factor` the gradient is divided by it, so Adam's first moment
    is too, and its second by the square: the next update is the one that would have come.
    """
    for module, name in sites:
        module._parameters[name] = new
    if old.grad is not None:
        new.grad = take(old.grad) / factor
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        powers = dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2)
        optimizer.state[new] = {
            key: take(value) / factor ** powers.get(key, 1)
            if torch.is_tensor(value) and value.shape == old.shape
            else value
            for key, value in state.items()
        }


def _sliced_parameter(parameter: nn.Parameter, axes, kept, factor: float) -> nn.Parameter:
    data = _take(parameter.data, axes, kept)
    return nn.Parameter(data * factor if factor != 1.0 else data, requires_grad=parameter.requires_grad)


def _take(tensor: Tensor, axes, kept: dict[str, Tensor]) -> Tensor:
    """The kept slices of a tensor along each of its axes, as a new contiguous tensor."""
    for axis, group in enumerate(axes):
        if group is not None:
            tensor = tensor.index_select(axis, kept[group].to(tensor.device))
    return tensor.contiguous()


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


def _empty_stock_model(model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
    """A model of the new shape as the stock constructor builds it, without memory for its weights."""
    config = deepcopy(model.config)
    set_widths(config, widths)
    with torch.device("meta"):
        return type(model)(config)


def _take_over_derived_attributes(model: nn.Module, stock: nn.Module) -> None:
    """Copy every plain number that the stock constructor derived from the widths: in_features, scaling, ..."""
    for module, fresh in zip(model.modules(), stock.modules(), strict=True):
        for name, value in vars(fresh).items():
            if type(value) in (int, float, tuple, torch.Size):
                setattr(module, name, value)


def _check_scores(groups, scores: dict[str, Tensor]) -> None:
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
