"""Choose neurons and layers and remove the others, so that an ordinary, smaller model remains.

Narrowing replaces every parameter that holds a removed neuron by a smaller one and slices the optimiser's moments with
it. Everything else follows the stock constructor. It builds an empty model of the new shape, whose parameter shapes
must equal the result. The values it derives from the widths (feature counts, attention scale) are copied.
"""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import FFN, HEADS, HIDDEN, SHARED_HEADS, VALUE
from .widths import (
    LAYERS,
    NUMBER,
    QUERY_KEY,
    Axis,
    UnsupportedArchitecture,
    Widths,
    axes_of,
    set_widths,
    source_layers,
    width_groups,
)


@torch.no_grad()
def narrow(
    model: PreTrainedModel,
    widths: Widths,
    scores: dict[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor]:
    """Remove neurons and layers from a model in place, until it has the given widths.

    The highest scores are kept (the lower index on a tie), or the first neurons where no scores are given. Whole
    heads and layers are ranked by the sum over their neurons; the first layer always stays. The order of neurons and
    all ties are preserved. Where head_dim changes, queries are multiplied by sqrt(new / old), so that the attention
    scores of the kept neurons do not change; gradients and moments of the queries are converted accordingly.

    Args:
        model: a Hugging Face model of a supported family; changed in place.
        widths: the new shape; a width that is None stays as it is.
        scores: group name to a vector of importances, at least 0, one per neuron of the group.
        optimizer: an optimiser of the model's parameters; it receives the new ones, and its state is sliced.

    Returns:
        Group name to the sorted indices of the kept neurons, in the numbering before this call; also
        "layer.l.heads", the kept query heads of layer l, and "layers", those that stay. Groups of a removed layer are
        among them.

    Raises:
        ValueError: an impossible shape; scores that are missing, of the wrong length or not finite; weights
            that cannot be sliced (quantised, sharded, on the meta device). The model is unchanged.
        UnsupportedArchitecture: no table for this family, or a model that is not in its stock form.
    """
    axes, groups = axes_of(model), width_groups(model)
    old, new = Widths.of(model), widths.resolved(model)
    stock = check_narrowable(model, new)
    scores = {name: torch.zeros(group.size) for name, group in groups.items()} if scores is None else scores
    check_scores(groups, scores)
    kept = choose(scores, old, new, source_layers(model))
    _check_shapes(model, stock, axes, kept)
    _check_optimizer(model, optimizer)
    # A GPT-2 may not scale its attention.
    scale = math.sqrt(new.head_dim / old.head_dim) if getattr(model.config, "scale_attn_weights", True) else 1.0
    sites, stock_parameters = sites_of(model), dict(stock.named_parameters())
    for name, parameter in list(model.named_parameters()):
        if parameter.shape != stock_parameters[name].shape:
            _narrow_parameter(parameter, sites[parameter], axes[name], kept, scale, optimizer)
    layers = kept[LAYERS].tolist()
    if new.layers < old.layers:
        _remove_layers(model, layers, optimizer)
        stock = stock_model(model, new)
    set_widths(model, model.config, new, layers)
    copy_derived_attributes(model, stock)
    return kept


def choose(scores: dict[str, Tensor], wide: Widths, narrow: Widths, layers: list[int]) -> dict[str, Tensor]:
    """The neurons that `narrow` keeps of a model of shape `wide`; `layers` is the result of `source_layers`."""
    counts, by_head, kept = {HIDDEN: narrow.hidden, FFN: narrow.ffn}, _scores_of_shared_heads(scores, wide), {}
    for name, score in scores.items():
        kind = name.rpartition(".")[2]
        if kind in counts:
            kept[name] = _highest(score, counts[kind])
        elif kind == HEADS:
            shared_by = wide.heads // len(score)  # query heads per key/value head
            kept[name] = _highest(score, narrow.heads // shared_by)
            heads = kept[name][:, None] * shared_by + torch.arange(shared_by, device=score.device)
            kept[_beside(name, SHARED_HEADS)] = heads.flatten()
        elif kind == QUERY_KEY:
            kept |= _choose_inside_heads(name, scores, wide, narrow, by_head)
    if SHARED_HEADS in scores:
        kept[SHARED_HEADS] = kept["layer.0.heads"]
    kept[LAYERS] = choose_layers(scores, wide.layers, narrow.layers)
    return kept | {f"layer.{layer}.heads": kept[f"layer.{source}.heads"] for layer, source in enumerate(layers)}


def _scores_of_shared_heads(scores: dict[str, Tensor], wide: Widths) -> Tensor | None:
    """The scores of heads over all layers, (heads,), where all layers must keep the same heads; else None."""
    if SHARED_HEADS not in scores:
        return None
    inside = [score for name, score in scores.items() if name.endswith((QUERY_KEY, VALUE))]
    return scores[SHARED_HEADS] + sum(score.reshape(wide.heads, wide.head_dim).sum(1) for score in inside)


def _choose_inside_heads(query_key: str, scores, wide: Widths, narrow: Widths, by_head: Tensor | None):
    """The kept heads of one layer; inside each, query/key and value/output dimensions are ranked separately."""
    pairs = {name: scores[name].reshape(wide.heads, wide.head_dim) for name in (query_key, _beside(query_key, VALUE))}
    by_head = sum(score.sum(1) for score in pairs.values()) if by_head is None else by_head  # (heads,)
    heads = _highest(by_head, narrow.heads)
    kept = {_beside(query_key, SHARED_HEADS): heads}
    for name, score in pairs.items():
        inside = score[heads].sort(dim=1, descending=True, stable=True).indices  # (heads kept, head_dim)
        inside = inside[:, : narrow.head_dim].sort(dim=1).values
        kept[name] = (heads[:, None] * wide.head_dim + inside).flatten()
    return kept


def choose_layers(scores: dict[str, Tensor], depth: int, count: int | None) -> Tensor:
    """The first layer and, of the others, those of the highest scores, summed over the groups of a layer."""
    if count in (None, depth):
        return torch.arange(depth)
    groups = [[score.sum() for name, score in scores.items() if name.startswith(f"layer.{n}.")] for n in range(depth)]
    sums = torch.stack([*map(sum, groups)])
    sums[0] = math.inf
    return _highest(sums, count)


def take(tensor: Tensor, axes: tuple[Axis, ...], kept: dict[str, Tensor]) -> Tensor:
    """The kept slices of a tensor along each of its axes, contiguous; the tensor itself where all are kept."""
    return _selected(tensor, _indices(axes, kept))


def _indices(axes: tuple[Axis, ...], kept: dict[str, Tensor]) -> list[Tensor | None]:
    return [blocks and kept_indices(blocks, kept) for blocks in axes]


def _selected(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    for axis, kept in enumerate(indices):
        if kept is not None and len(kept) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor.contiguous()


def kept_indices(blocks: Axis, kept: dict[str, Tensor]) -> Tensor:
    """The indices of an axis that the kept neurons own, in order."""
    return torch.cat([block.indices(kept[block.group]) for block in blocks])


def _kept_length(blocks: Axis, kept: dict[str, Tensor]) -> int:
    return sum(len(kept[block.group]) * block.unit for block in blocks)


def replace_parameter(
    old: nn.Parameter,
    new: nn.Parameter,
    sites: list[tuple[nn.Module, str]],
    optimizer: torch.optim.Optimizer | None,
    take: Callable[[Tensor], Tensor],
    factor: Tensor | None = None,
) -> None:
    """Replace a parameter by a smaller one, in every module that holds it and in the optimiser.

    It must be a new nn.Parameter: autograd keeps the old shape of a tensor whose data is replaced in place. Where
    the new values were multiplied by `factor`, the gradient and Adam's first moment are divided by it and the
    second moment by its square.
    """
    for module, name in sites:
        module._parameters[name] = new
    if old.grad is not None:
        new.grad = _divided(take(old.grad), factor, 1)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    powers = dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2)
    state = optimizer.state[new] = optimizer.state.pop(old)
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == old.shape:
            state[key] = _divided(take(value), factor, powers.get(key, 1))


def forget_parameters(removed: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Remove parameters from an optimiser, with their state."""
    removed = set(removed) if optimizer is not None else ()
    for parameter in removed:
        optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            group["params"] = [each for each in group["params"] if each is not parameter]


def layers_of(model: PreTrainedModel) -> str:
    """The name of the list that holds the layers of the forward pass."""
    first = next(name for name, _ in model.named_parameters() if NUMBER.search(name))
    return NUMBER.split(first)[0].rstrip(".")


def _remove_layers(model: PreTrainedModel, kept: list[int], optimizer: torch.optim.Optimizer | None) -> None:
    layers = model.get_submodule(layers_of(model))
    for layer in sorted(set(range(len(layers))) - set(kept), reverse=True):
        forget_parameters(layers[layer].parameters(), optimizer)
        del layers[layer]


def _narrow_parameter(parameter: nn.Parameter, sites, axes, kept, scale: float, optimizer) -> None:
    kept_slices = partial(_selected, indices=_indices(axes, kept))  # once for weight, gradient and moments
    data, factor = kept_slices(parameter.data), _query_factor(axes, kept, scale)
    if factor is not None:
        factor = factor.to(data)
        data.mul_(factor)
    smaller = nn.Parameter(data, requires_grad=parameter.requires_grad)
    replace_parameter(parameter, smaller, sites, optimizer, kept_slices, factor)


def _query_factor(axes: tuple[Axis, ...], kept, scale: float) -> Tensor | None:
    """The factor of a narrowed parameter, in a shape that broadcasts: `scale` for queries, else 1. None: no queries."""
    for axis, blocks in enumerate(axes):
        if scale != 1.0 and any(block.scaled for block in blocks or ()):
            factors = torch.tensor([scale if block.scaled else 1.0 for block in blocks], dtype=torch.float64)
            lengths = torch.tensor([_kept_length((block,), kept) for block in blocks])
            return factors.repeat_interleave(lengths).reshape([-1 if n == axis else 1 for n in range(len(axes))])
    return None


def _divided(tensor: Tensor, factor: Tensor | None, power: int) -> Tensor:
    return tensor if factor is None else tensor / factor**power


def _beside(name: str, kind: str) -> str:
    """The group of another kind in the same layer."""
    return f"{name.rpartition('.')[0]}.{kind}"


def _highest(scores: Tensor, count: int) -> Tensor:
    """The sorted indices of the `count` highest scores; on a tie the lower index is kept."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def sites_of(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds each parameter: more than one where weights are tied."""
    sites: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, attribute = name.rpartition(".")
        sites.setdefault(parameter, []).append((model.get_submodule(module), attribute))
    return sites


def stock_model(model: PreTrainedModel, widths: Widths, device: str = "meta") -> PreTrainedModel:
    """A model of these widths from the stock constructor; on the meta device, without memory for its weights."""
    config = deepcopy(model.config)
    set_widths(model, config, widths)
    with torch.device(device):
        return type(model)(config)


def copy_derived_attributes(model: nn.Module, stock: nn.Module) -> None:
    """Copy every plain number that the stock constructor derives from the widths: in_features, scaling, ..."""
    for module, fresh in zip(model.modules(), stock.modules(), strict=True):
        for name, value in vars(fresh).items():
            if type(value) in (int, float, tuple, torch.Size):
                setattr(module, name, value)


def check_narrowable(model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
    """Check that the weights can be sliced; returns an empty stock model of the new shape, of all layers.

    Raises:
        ValueError: weights that are quantised, sharded or on the meta device.
        UnsupportedArchitecture: other parameters than those of the stock class.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised and cannot be sliced: load it in float32 or bfloat16")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__} on the {parameter.device} device of {parameter.dtype}, "
                "quantised, sharded or offloaded: load the model into memory, whole and in float32 or bfloat16"
            )
    stock = stock_model(model, replace(widths, layers=model.config.num_hidden_layers))
    if differ := dict(model.named_parameters()).keys() ^ dict(stock.named_parameters()).keys():
        raise UnsupportedArchitecture(
            f"the parameters of this model and of a stock {type(model).__name__} differ: {', '.join(sorted(differ))}. "
            "Restore ties between weights and layers that were replaced, as by quantisation"
        )
    return stock


def _check_shapes(model: PreTrainedModel, stock: PreTrainedModel, axes, kept: dict[str, Tensor]) -> None:
    """Compare the shapes that narrowing will give with those of the stock constructor."""
    expected = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        blocks = zip(axes[name], parameter.shape, strict=True)
        shape = tuple(size if axis is None else _kept_length(axis, kept) for axis, size in blocks)
        if shape != expected[name]:
            raise UnsupportedArchitecture(
                f"{name} would have shape {shape}, in a stock model {expected[name]}: "
                "correct its row in hdlib/families.py"
            )


def check_scores(groups, scores: dict[str, Tensor]) -> None:
    for name, group in groups.items():
        if name not in scores:
            raise ValueError(f"no scores for the width group {name!r}: pass scores for every group of width_groups")
        if tuple(scores[name].shape) != (group.size,):
            raise ValueError(f"scores of {name!r} have shape {tuple(scores[name].shape)}: it must be ({group.size},)")
    finite = torch.stack([torch.isfinite(scores[name]).all() for name in groups]).tolist()  # one synchronisation
    if broken := [name for name, each in zip(groups, finite, strict=True) if not each]:
        raise ValueError(f"scores of {broken[0]!r} are not all finite: check the gradients they were computed from")


def _check_optimizer(model: nn.Module, optimizer) -> None:
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(f"the optimiser does not hold the trainable parameter {name}: pass this model's optimiser")
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(f"the optimiser's {key} of {name} cannot be sliced: use one such as AdamW or SGD")
