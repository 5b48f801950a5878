"""Width groups (what is removed together with one neuron) and the shapes that a model can take.

A neuron owns slices of many parameters: hidden neuron i is entry i of the residual stream, which every layer reads and
writes; query dimension i is multiplied by key dimension i. A *width group* is a set of neurons with all their slices.
The groups follow from the tables in families.py. Depth is a width too: the number of layers, of which the first always
stays. L layers, H heads, D hidden width, F feed-forward width.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from math import gcd, lcm
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families import EMBEDDING, FAMILIES, FFN, FIXED, HEADS, HIDDEN, KEY, QUERY, SHARED_HEADS, VALUE, Family

QUERY_KEY = "query_key"  # the group that QUERY and KEY form
LAYERS = "layers"  # beside groups of neurons: the layers themselves
NUMBER = re.compile(r"(?<=[.])\d+(?=[.])")  # of a layer, in the name of a group, module or parameter


class UnsupportedArchitecture(ValueError):
    """No table for the model's family, or a model that is not in its stock form."""


def family_of(model_type: str) -> Family:
    """The table of an architecture. Raises UnsupportedArchitecture if there is none."""
    if model_type not in FAMILIES:
        raise UnsupportedArchitecture(
            f"no width groups are declared for the architecture {model_type!r}; supported: "
            f"{', '.join(sorted(FAMILIES))}. A new family is one table in hdlib/families.py."
        )
    return FAMILIES[model_type]


def family(model: PreTrainedModel) -> Family:
    """The table of the model's architecture. Raises UnsupportedArchitecture if there is none."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} is no Hugging Face model. If it wraps one, pass that: merge_and_unload() of PEFT, "
            "_orig_mod of torch.compile (compile after narrowing), module of a parallel wrapper."
        )
    config, declared = model.config, family_of(model.config.model_type)
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UnsupportedArchitecture(f"this {config.model_type!r} model has cross-attention: use one without it")
    if getattr(config, "inner_group_num", 1) != 1:
        raise UnsupportedArchitecture(f"inner_group_num is {config.inner_group_num}: use an ALBERT in which it is 1")
    return declared


@dataclass(frozen=True)
class WidthGroup:
    """A set of neurons, and all slices of parameters that they own."""

    name: str  # "hidden", or "layer.3.ffn"
    kind: str  # hidden, ffn, query_key, value_output, head_groups or heads
    size: int  # number of neurons
    members: list[tuple[str, int, int, int]]  # (parameter, axis, start, unit), with start and unit as in Block


class Block(NamedTuple):
    """A stretch of an axis: `size` neurons of a group; neuron i owns `unit` indices from start + i * unit."""

    group: str
    size: int
    unit: int
    start: int
    scaled: bool  # a change of the attention scale is folded into these weights

    def indices(self, neurons: Tensor) -> Tensor:
        """The indices of the axis that these neurons own, in order."""
        first = self.start + neurons[:, None] * self.unit
        return (first + torch.arange(self.unit, device=neurons.device)).flatten()

    def narrowed(self, kept: dict[str, Tensor]) -> Self:
        """This block after a prune; `kept` is the result of `hdlib.narrow`."""
        size = len(kept[self.group])
        (group,) = renumbered({self.group: size}, new_numbers(kept))
        return self._replace(group=group, size=size, start=self.start // self.size * size)


Axis = tuple[Block, ...] | None  # the blocks of an axis from first to last; None: never narrowed


def axes_of(model: PreTrainedModel) -> dict[str, tuple[Axis, ...]]:
    """The blocks on each axis of each parameter.

    Raises UnsupportedArchitecture for a parameter without a row of its rank in the table: it would stay wide.
    """
    declared, named = family(model), {}
    for name, parameter in model.named_parameters():
        row = _row(declared, name)
        if row is None or len(row) != parameter.dim():
            raise UnsupportedArchitecture(
                f"parameter {name} of shape {tuple(parameter.shape)} has no row for {model.config.model_type!r}: an "
                "adapter must be merged, a quantised, sharded or altered model restored; or add a row to families.py"
            )
        sizes = zip(row, parameter.shape, strict=True)
        named[name] = tuple(_axis(model, declared, name, kinds, length) for kinds, length in sizes)
    return named


@cache
def _row(declared: Family, name: str) -> tuple | None:
    """The table's entry for a parameter; found once, since a step asks for all of them."""
    return next((row for pattern, row in declared.axes.items() if fnmatchcase(name, pattern)), None)


def _axis(model: PreTrainedModel, declared: Family, name: str, kinds, length: int) -> Axis:
    """The blocks of an axis whose table entry is `kinds`; its blocks have equal lengths."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if kinds == (EMBEDDING,):
        kinds = (HIDDEN if _separate_embedding(model, declared) is None else FIXED,)
    if kinds == (FIXED,) or kinds[0] in declared.fixed:
        return None
    blocks, each = [], length // len(kinds)
    for number, kind in enumerate(kinds):
        group = QUERY_KEY if kind in (QUERY, KEY) else kind
        size = _key_value_heads(model) if kind == HEADS else each
        if each % size or each * len(kinds) != length:
            raise UnsupportedArchitecture(f"{name} has an axis of {length}, not a multiple of {len(kinds)} x {size}")
        if group not in (HIDDEN, SHARED_HEADS):
            group = f"layer.{NUMBER.search(name)[0]}.{group}"
        blocks.append(Block(group, size, each // size, number * each, kind == QUERY))
    return tuple(blocks)


def all_neurons(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every neuron and head of a model, in the form in which `hdlib.narrow` returns those it kept."""
    kept = {name: torch.arange(group.size) for name, group in width_groups(model).items()}
    layers, heads = torch.arange(model.config.num_hidden_layers), torch.arange(Widths.of(model).heads)
    return kept | {LAYERS: layers} | {f"layer.{layer}.heads": heads for layer in layers.tolist()}


def renumbered(named: Mapping, layers: Mapping[int, int]) -> dict:
    """Entries by name, with the old number of a layer in each name replaced by the new one; `layers` maps old to new.

    Entries of other layers are left out. Those of no layer, such as "hidden", stay.
    """
    stay = (name for name in named if all(int(number) in layers for number in NUMBER.findall(name)[:1]))
    return {NUMBER.sub(lambda number: str(layers[int(number[0])]), name, count=1): named[name] for name in stay}


def new_numbers(kept: dict[str, Tensor]) -> dict[int, int]:
    """The number of each layer that stays, before to after; `kept` is the result of `hdlib.narrow`."""
    return {old: new for new, old in enumerate(kept[LAYERS].tolist())}


class WidthGroups(dict[str, WidthGroup]):
    """Group name to WidthGroup, displayed in a notebook as a table with one row per kind of group."""

    changes: str  # which widths can change, as a sentence

    def __repr__(self) -> str:
        return "\n".join([self.changes, *(f"{group.name}: {group.size} neurons" for group in self.values())])

    def _repr_html_(self) -> str:
        cell, rows = '<td style="text-align: left">', {}
        for group in self.values():
            modules = (re.sub(r"[.]\d+[.]", ".*.", parameter).rpartition(".")[0] for parameter, *_ in group.members)
            owned = ", ".join(dict.fromkeys(modules))
            rows[group.kind] = f"<tr>{cell}{group.kind}{cell}{group.size} neurons{cell}{owned}"
        return f"<p>{self.changes}</p><table>{''.join(rows.values())}</table>"


def width_groups(model: PreTrainedModel) -> WidthGroups:
    """The width groups of a Hugging Face model of a supported family, with or without a head.

    Returns:
        Group name to WidthGroup: "hidden", and for each layer l "layer.l.ffn". Where head_dim can change also
        "layer.l.query_key" and "layer.l.value_output", else "layer.l.head_groups". Layers that share weights
        share groups; a width that cannot change has no group.

    Raises UnsupportedArchitecture without a table for this family, or for a model that is not in its stock form.
    """
    wide, groups = Widths.of(model), WidthGroups()
    groups.changes = _changes(model)
    sizes = {HIDDEN: wide.hidden, FFN: wide.ffn, HEADS: _key_value_heads(model), SHARED_HEADS: wide.heads}
    sizes |= dict.fromkeys((QUERY_KEY, VALUE), wide.heads * wide.head_dim)
    for name, axes in axes_of(model).items():
        for axis, blocks in enumerate(axes):
            for block in blocks or ():
                kind = block.group.rpartition(".")[2]
                if block.size != sizes[kind]:
                    raise UnsupportedArchitecture(
                        f"{name} has {block.size} neurons of group {block.group}, but the config {sizes[kind]}: "
                        "restore a sharded or altered model to its stock form."
                    )
                group = groups.setdefault(block.group, WidthGroup(block.group, kind, block.size, []))
                group.members.append((name, axis, block.start, block.unit))
    return groups


@dataclass(frozen=True)
class Widths:
    """A shape: hidden width D, feed-forward width F, dimensions per head, heads per layer, layers.

    A width that is None is taken from the model on which the shape is used. Where the stock class has
    hidden = heads x head_dim, a missing one of these three follows from the others.
    """

    hidden: int | None = None
    ffn: int | None = None
    head_dim: int | None = None
    heads: int | None = None
    layers: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The present shape of a model."""
        declared, config = family(model), model.config  # family() checks the model
        heads, hidden = config.num_attention_heads, config.hidden_size
        head_dim = hidden // heads if declared.linked else getattr(config, "head_dim", None) or hidden // heads
        # GPT-2's n_inner may be None, which stands for four times the hidden width.
        return cls(hidden, getattr(config, declared.ffn) or 4 * hidden, head_dim, heads, config.num_hidden_layers)

    @classmethod
    def at(cls, model: PreTrainedModel, ratio: float, multiple_of: int = 1) -> Self:
        """The possible shape nearest to `ratio` times the model's widths. All layers stay.

        Whole heads are removed, as many as possible, so that the others stay wide (ledger, "Whole heads").

        Args:
            ratio: the fraction of every width to keep, in (0, 1].
            multiple_of: hidden and ffn become multiples of this; 8 suits tensor cores.

        Raises ValueError for a ratio outside (0, 1], or if no multiple is at or below the model's width.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio} is not a fraction of the widths: take one in (0, 1]")
        wide, declared = cls.of(model), family(model)
        if ratio == 1:
            return wide
        shape = replace(wide, ffn=_nearest_multiple(ratio * wide.ffn, multiple_of, wide.ffn, "ffn"))
        if "head_dim" in declared.fixed and not declared.linked:
            heads = min(_possible_heads(model, declared), key=lambda n: abs(n - ratio * wide.heads))
            shape = replace(shape, heads=heads)
        if declared.linked and "head_dim" not in declared.fixed:
            shape = replace(shape, heads=_heads_at(wide, ratio, multiple_of))
        if HIDDEN not in declared.fixed:
            grain = lcm(_hidden_grain(shape, declared), multiple_of)
            limit = shape.heads * shape.head_dim if declared.linked else wide.hidden
            hidden = _nearest_multiple(ratio * wide.hidden, grain, limit, "hidden")
            if hidden == _separate_embedding(model, declared):
                hidden += -grain if hidden > grain else grain
            shape = replace(shape, hidden=hidden)
        if declared.linked:  # the dimensions of heads follow, or their number
            shape = cls(shape.hidden, shape.ffn, heads=None if "head_dim" in declared.fixed else shape.heads)
        return shape.resolved(model)

    def resolved(self, model: PreTrainedModel) -> Self:
        """This shape with every missing width filled in, checked against what the model can become.

        Raises ValueError for a width below 1 or above the model's, one that this family cannot change, or a combination
        that the stock class does not have; the message gives a possible value.
        """
        wide, declared = Widths.of(model), family(model)
        given = {name: width for name, width in asdict(self).items() if width is not None}
        for name, width in given.items():
            limit = getattr(wide, name)
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= limit:
                raise ValueError(f"{name}={width} is impossible: take an integer from 1 to the model's {limit}")
        if declared.linked:
            given = _completed(given, wide, declared)
        shape = replace(wide, **given)
        _check_possible(shape, wide, model, declared)
        return shape

    def between(self, narrow: Self, progress: float, model: PreTrainedModel, multiple_of: int = 1) -> Self:
        """The possible shape at a fraction `progress`, in [0, 1], of the path from this shape to `narrow`.

        Before progress 1, hidden and ffn are rounded up to multiples of `multiple_of`, at most to this shape's
        widths. Where hidden must be a multiple of heads, a shape may not fit in that of a smaller progress.
        """
        wide, goal, declared = asdict(self), asdict(narrow), family(model)
        now = {name: round(wide[name] + (goal[name] - wide[name]) * progress) for name in wide}
        grains, free = {"hidden": multiple_of, "ffn": multiple_of}, declared.linked and "head_dim" not in declared.fixed
        if free:
            grains["head_dim"] = multiple_of // gcd(multiple_of, wide["heads"] if wide["heads"] == goal["heads"] else 1)
        for name, grain in grains.items():
            if progress < 1 and goal[name] < wide[name]:
                now[name] = min(wide[name], _rounded_up(now[name], grain))
        if free and progress < 1:
            grain = multiple_of // gcd(multiple_of, now["head_dim"])
            now["heads"] = min(wide["heads"], _rounded_up(now["heads"], grain))
        if "head_dim" in declared.fixed:
            possible = [n for n in _possible_heads(model, declared) if goal["heads"] <= n <= wide["heads"]]
            now["heads"] = min(possible, key=lambda n: abs(n - now["heads"]))
        if declared.linked:
            if now["heads"] * now["head_dim"] == _separate_embedding(model, declared):
                now["head_dim" if now["head_dim"] < wide["head_dim"] else "heads"] += 1
            now["hidden"] = now["heads"] * now["head_dim"]
        elif declared.divisible:
            fits = (n for n in possible if n >= now["heads"] and _rounded_up(now["hidden"], n) <= wide["hidden"])
            now["heads"] = next(fits)
            now["hidden"] = _rounded_up(now["hidden"], now["heads"])
        return Widths(**now)

    def fits_in(self, other: Self) -> bool:
        """Whether a model of the shape `other` can be narrowed to this one: no width is larger."""
        return all(width <= getattr(other, name) for name, width in asdict(self).items())


def set_widths(model: PreTrainedModel, config, widths: Widths, layers: list[int] | None = None) -> None:
    """Write a shape into the config of a model (its own, or a copy). `layers` stay; None: the first ones."""
    declared, hidden = family(model), config.hidden_size
    for name in (declared.embedding, *declared.follows):
        if name and getattr(config, name, None) == hidden:
            setattr(config, name, widths.hidden)
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = widths.heads * config.num_key_value_heads // config.num_attention_heads
    if not declared.linked:
        config.head_dim = widths.head_dim
    config.hidden_size = widths.hidden
    config.num_attention_heads = widths.heads
    setattr(config, declared.ffn, widths.ffn)
    config.num_hidden_layers = widths.layers
    if getattr(config, "layer_types", None):  # whether a layer attends to all tokens or to a window
        config.layer_types = [config.layer_types[layer] for layer in layers or range(widths.layers)]


def source_layers(model: PreTrainedModel) -> list[int]:
    """For each layer of the forward pass, the layer whose parameters it uses: 0, 1, 2, ..., except in ALBERT."""
    layers = model.config.num_hidden_layers
    groups = getattr(model.config, "num_hidden_groups", layers)
    return [layer * groups // layers for layer in range(layers)]


def spaced_layers(depth: int, count: int) -> list[int]:
    """`count` of `depth` layers, evenly spaced, the first and the last among them if there are two."""
    return torch.linspace(0, depth - 1, count).round().long().tolist() if count > 1 else [0]


def compared_states(layers: list[int], depth: int) -> list[int]:
    """Which of the 1 + `depth` hidden states of a model those of one with these layers only are compared with.

    The last one, which the head reads, always with the last.
    """
    return [0, *(layer + 1 for layer in layers[:-1]), depth]


def _completed(given: dict[str, int], wide: Widths, declared: Family) -> dict[str, int]:
    """Fill in the missing ones of hidden = heads x head_dim."""
    hidden, heads, head_dim = given.get("hidden"), given.get("heads"), given.get("head_dim")
    if heads is None and head_dim is None and "head_dim" in declared.fixed:
        head_dim = wide.head_dim
    heads = heads or (max(1, hidden // head_dim) if hidden and head_dim else wide.heads)
    hidden = hidden or heads * (head_dim or wide.head_dim)
    head_dim = head_dim or max(1, hidden // heads)
    return given | {"hidden": hidden, "heads": heads, "head_dim": head_dim}


def _check_possible(shape: Widths, wide: Widths, model: PreTrainedModel, declared: Family) -> None:
    kind, group = model.config.model_type, wide.heads // _key_value_heads(model)
    for name, reason in _fixed(model).items():
        given, only = getattr(shape, name), getattr(wide, name)
        if given != only:
            raise ValueError(f"{name}={given} is impossible for {kind!r}: {name} stays {only}, since {reason}")
    if shape.heads % group:
        raise ValueError(f"heads={shape.heads}: {group} query heads share a key/value head; take a multiple of {group}")
    grain = _hidden_grain(shape, declared)
    if shape.hidden % grain or (declared.linked and shape.hidden != shape.heads * shape.head_dim):
        below = shape.hidden // grain * grain
        near = " or ".join(str(n) for n in (below, below + grain) if 0 < n <= wide.hidden)
        rule = "is heads x head_dim" if declared.linked else "is a multiple of heads"
        asked = f"hidden={shape.hidden} with heads={shape.heads} and head_dim={shape.head_dim}"
        raise ValueError(f"{asked} is impossible: in a stock {kind!r} hidden {rule}; take hidden={near}")
    if shape.hidden == _separate_embedding(model, declared):
        raise ValueError(f"hidden={shape.hidden} is the width of the embeddings, leaving no projection: take another")


def _hidden_grain(shape: Widths, declared: Family) -> int:
    """The hidden width of the stock class is a multiple of this."""
    if declared.linked and "head_dim" in declared.fixed:
        return shape.head_dim
    return shape.heads if declared.linked or declared.divisible else 1


def _changes(model: PreTrainedModel) -> str:
    """Which widths can change and which cannot, with their present values."""
    wide, declared, embedding = Widths.of(model), family(model), _separate_embedding(model, family(model))
    widths = {name: f"{name} {width}" for name, width in asdict(wide).items()}
    fixed = [widths.pop(name) for name in _fixed(model)] + ([f"embeddings {embedding}"] if embedding else [])
    group = wide.heads // _key_value_heads(model)
    changes = f"{type(model).__name__} can change: {', '.join(widths.values())}"
    changes += f" in multiples of {group}" if group > 1 else ""
    changes += ", where hidden = heads x head_dim." if declared.linked else "."
    return f"{changes} Fixed: {', '.join(fixed)}." if fixed else changes


def _fixed(model: PreTrainedModel) -> dict[str, str]:
    """The widths that cannot change, with the reason; for depth it may depend on the config."""
    config, fixed = model.config, dict(family(model).fixed)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        fixed[LAYERS] = "each divides its attention scores by its own number"
    if getattr(config, "conv_kernel_size", 0):
        fixed[LAYERS] = "a convolution follows the first"
    return fixed


def _key_value_heads(model: PreTrainedModel) -> int:
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def _possible_heads(model: PreTrainedModel, declared: Family) -> list[int]:
    """Head counts that keep all query heads of each kept key/value head, smallest first."""
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    group, divides = heads // _key_value_heads(model), declared.divisible and HIDDEN in declared.fixed
    return [n for n in range(group, heads + 1, group) if not divides or hidden % n == 0]


def _separate_embedding(model: PreTrainedModel, declared: Family) -> int | None:
    """The width of the embeddings if it is not the hidden width, else None: no student may have this hidden width."""
    width = getattr(model.config, declared.embedding, None) if declared.embedding else None
    return width if width and width != model.config.hidden_size else None


def _heads_at(wide: Widths, ratio: float, multiple_of: int) -> int:
    """The fewest heads, no wider than before, that make up `ratio` of the hidden width as exactly as all heads can."""
    distances = {}
    for heads in range(1, wide.heads + 1):
        grain, limit = lcm(heads, multiple_of), heads * wide.head_dim
        if grain <= limit:
            hidden = _nearest_multiple(ratio * wide.hidden, grain, limit, "hidden")
            distance = abs(hidden - ratio * wide.hidden)
            distances[heads] = distance if distance > min(grain, max(wide.heads, multiple_of)) / 2 else 0.0
    return min(distances, key=distances.get, default=wide.heads)  # without any, _nearest_multiple says so


def _nearest_multiple(value: float, multiple: int, limit: int, name: str) -> int:
    if multiple > limit:
        raise ValueError(f"{name} has no multiple of {multiple} at or below the model's {limit}: lower multiple_of")
    return min(max(1, round(value / multiple)), limit // multiple) * multiple


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
