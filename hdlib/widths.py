"""What one neuron owns, and which shapes a model can take.

Cutting one matrix on its own breaks the model: the neurons of the residual stream are written and
read by every layer, a query dimension only means something beside its key dimension. So neurons are
removed in *groups*: all slices of all parameters that belong to the same set of neurons. What the axes
of a parameter count is declared in families.py. Shapes: V vocabulary, L layers, H heads, D hidden width, F
feed-forward width.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families import EMBEDDING, FAMILIES, FFN, FIXED, HEADS, HIDDEN, KEY, QUERY, SHARED_HEADS, VALUE, Family

if TYPE_CHECKING:
    import pandas as pd

QUERY_KEY = "query_key"  # the group of QUERY and KEY
WIDTH_OF = {  # which width counts the neurons of a group
    HIDDEN: "hidden",
    FFN: "ffn",
    QUERY_KEY: "heads x head_dim",
    VALUE: "heads x head_dim",
    HEADS: "heads",
    SHARED_HEADS: "heads",
}


class UnsupportedArchitecture(ValueError):
    """The model's family has no table of width groups; the message names those that have one."""


def unsupported(kind: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"no width groups are declared for the architecture {kind!r}; supported: {', '.join(sorted(FAMILIES))}. "
        "A new family is one table in hdlib/families.py."
    )


def family(model: PreTrainedModel) -> Family:
    """The table of the model's architecture, or UnsupportedArchitecture naming those that have one."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} is no Hugging Face model but perhaps a wrapper of one. Pass the model inside: "
            "merge_and_unload() of PEFT, _orig_mod of torch.compile (compile afterwards), module of a parallel wrapper"
        )
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise unsupported(kind)
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise UnsupportedArchitecture(f"this {kind!r} model has cross-attention, whose width groups are not declared")
    if getattr(model.config, "inner_group_num", 1) != 1:
        raise UnsupportedArchitecture("an ALBERT with inner_group_num other than 1 has no width groups declared")
    return FAMILIES[kind]


class Slice(NamedTuple):
    """Where neurons lie on one axis of a parameter: neuron i owns `unit` places from start + i * unit on."""

    parameter: str
    axis: int
    start: int = 0
    unit: int = 1


@dataclass(frozen=True)
class WidthGroup:
    """Neurons that are removed together: `size` of them, each owning one piece of every member."""

    name: str  # "hidden", or "layer.3.ffn"
    kind: str  # hidden, ffn, query_key, value_output, head_groups or heads
    size: int  # neurons in the group now
    members: tuple[Slice, ...]


class Block(NamedTuple):
    """One stretch of an axis: `size` neurons of a group, `unit` places each."""

    group: str
    size: int
    unit: int
    scaled: bool  # absorbs a change of the attention scale

    def places(self, neurons: Tensor) -> Tensor:
        """Neuron indices to indices within this stretch, in order."""
        if self.unit == 1:
            return neurons
        return (neurons[:, None] * self.unit + torch.arange(self.unit, device=neurons.device)).flatten()


Axis = tuple[Block, ...] | None  # the stretches of an axis from its start to its end; None: never narrowed


def axes_of(model: PreTrainedModel) -> dict[str, tuple[Axis, ...]]:
    """What each axis of each parameter is made of.

    Every parameter must have a row of its own rank in the family's table: a parameter that nobody
    declared would stay wide, so it raises UnsupportedArchitecture with its name.
    """
    declared, named = family(model), {}
    for name, parameter in model.named_parameters():
        row = next((row for pattern, row in declared.axes.items() if fnmatchcase(name, pattern)), None)
        if row is None or len(row) != parameter.dim():
            raise UnsupportedArchitecture(
                f"parameter {name} of shape {tuple(parameter.shape)} has no row in the table of "
                f"{model.config.model_type!r}: an adapter must be merged, a quantised, sharded or altered model "
                "brought back to its stock form; for a part of the architecture, say what its axes count in "
                "hdlib/families.py"
            )
        named[name] = tuple(
            _axis(model, declared, name, kind, width) for kind, width in zip(row, parameter.shape, strict=True)
        )
    return named


def _axis(model: PreTrainedModel, declared: Family, name: str, kinds, width: int) -> Axis:
    """The declared row of one axis, with its groups named and its stretches measured."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if kinds == (EMBEDDING,):
        kinds = (HIDDEN if _embedding_width(model, declared) == model.config.hidden_size else FIXED,)
    if kinds == (FIXED,) or kinds[0] in declared.fixed:
        return None
    blocks = []
    for kind in kinds:
        group = QUERY_KEY if kind in (QUERY, KEY) else kind
        size = _key_value_heads(model) if kind == HEADS else width // len(kinds)
        if group not in (HIDDEN, SHARED_HEADS):
            layer = re.search(r"[.](\d+)[.]", name)[1]
            group = f"layer.{layer}.{group}"
        blocks.append(Block(group, size, width // len(kinds) // size, kind == QUERY))
    if sum(block.size * block.unit for block in blocks) != width:
        raise UnsupportedArchitecture(f"an axis of {name} has {width} places, which do not share out evenly: {blocks}")
    return tuple(blocks)


def all_neurons(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is kept before anything has gone, in the form in which `hdlib.narrow` returns it."""
    kept = {name: torch.arange(group.size) for name, group in width_groups(model).items()}
    layers, heads = range(model.config.num_hidden_layers), Widths.of(model).heads
    return kept | {f"layer.{layer}.heads": torch.arange(heads) for layer in layers}


def narrowed_axis(blocks: Axis, kept: dict[str, Tensor]) -> Axis:
    """The axis after a prune; `kept` is what `hdlib.narrow` returned."""
    return blocks and tuple(block._replace(size=len(kept[block.group])) for block in blocks)


class WidthGroups(dict):
    """Group name to WidthGroup; shows itself as a table, in a terminal and in a notebook."""

    def __init__(self, groups: dict[str, WidthGroup], changes: str):
        super().__init__(groups)
        self.changes = changes  # which widths this model can change, in words

    def table(self) -> pd.DataFrame:
        """One row for each kind of group; the layers that have a group each are counted."""
        import pandas as pd

        rows: dict[tuple, dict] = {}
        for group in self.values():
            names = (re.sub(r"[.](weight|bias)$", "", member.parameter) for member in group.members)
            members = list(dict.fromkeys(re.sub(r"[.]\d+[.]", ".*.", name) for name in names))
            row = rows.setdefault((group.kind, group.size), {"sets": 0, "members": members})
            row["sets"] += 1
        return pd.DataFrame(
            {
                "group": kind,
                "sets": row["sets"],
                "neurons": size,
                "width": WIDTH_OF[kind],
                "owned together": ", ".join(row["members"]),
            }
            for (kind, size), row in rows.items()
        )

    def __repr__(self) -> str:
        lines = [self.changes, ""]
        for row in self.table().itertuples(index=False):
            lines.append(f"{row[0]}: {row[1]} x {row[2]} neurons ({row[3]})")
            lines += [f"    {member}" for member in row[4].split(", ")]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        left = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
        return f"<p>{self.changes}</p>" + self.table().style.hide(axis="index").set_table_styles(left).to_html()


def width_groups(model: PreTrainedModel) -> WidthGroups:
    """The width groups of a Hugging Face model, by name; printed, a table of which matrices share neurons.

    Args:
        model: any model of a supported family, with or without a head.

    Returns:
        Group name to WidthGroup: "hidden", and for each layer l "layer.l.ffn" and, where dimensions can
        leave a head, "layer.l.query_key" and "layer.l.value_output", else "layer.l.head_groups". Layers
        that share weights share groups; a width that cannot change has none.

    Raises:
        UnsupportedArchitecture: no table for this family, or a parameter that the table does not know.
    """
    members: dict[str, list[Slice]] = {}
    sizes: dict[str, set[int]] = {}
    for name, axes in axes_of(model).items():
        for axis, blocks in enumerate(axes):
            start = 0
            for block in blocks or ():
                members.setdefault(block.group, []).append(Slice(name, axis, start, block.unit))
                sizes.setdefault(block.group, set()).add(block.size)
                start += block.size * block.unit
    wide = Widths.of(model)
    says = {HIDDEN: wide.hidden, FFN: wide.ffn, QUERY_KEY: wide.heads * wide.head_dim, HEADS: _key_value_heads(model)}
    says |= {VALUE: says[QUERY_KEY], SHARED_HEADS: wide.heads}
    groups = {}
    for group, slices in members.items():
        kind = group.rpartition(".")[2]
        if sizes[group] != {says[kind]}:
            raise UnsupportedArchitecture(
                f"the config gives group {group} {says[kind]} neurons, its weights have {sorted(sizes[group])}: "
                "a sharded or altered model must be brought back to its stock form first"
            )
        groups[group] = WidthGroup(group, kind, says[kind], tuple(slices))
    return WidthGroups(groups, _changes(model))


@dataclass(frozen=True)
class Widths:
    """A shape: hidden width D, feed-forward width F, dimensions a head, heads a layer.

    What is left out is taken from the model that the shape is used on; where a stock class has
    hidden = heads x head_dim, the missing one of these three follows from the others.
    """

    hidden: int | None = None
    ffn: int | None = None
    head_dim: int | None = None
    heads: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Widths:
        """The shape that a model has now."""
        config, declared = model.config, family(model)
        heads, hidden = config.num_attention_heads, config.hidden_size
        head_dim = hidden // heads if declared.linked else getattr(config, "head_dim", None) or hidden // heads
        # GPT-2's n_inner may be None, which stands for four times the hidden width.
        return cls(hidden, getattr(config, declared.ffn) or 4 * hidden, head_dim, heads)

    @classmethod
    def at(cls, model: PreTrainedModel, ratio: float, multiple_of: int = 1) -> Widths:
        """The possible shape nearest to `ratio` times the model's widths.

        All heads are kept and lose dimensions, where head dimensions can go; else whole heads go.

        Args:
            model: the wide model.
            ratio: the fraction of every width to keep, in (0, 1].
            multiple_of: hidden and feed-forward widths are multiples of this (8 suits tensor cores);
                where hidden = heads x head_dim, the hidden width is a multiple of what stays of the two besides.

        Raises:
            ValueError: ratio outside (0, 1], or no multiple at or below the model's width.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is the fraction of the width to keep, in (0, 1]; got {ratio}")
        wide, declared = cls.of(model), family(model)
        if ratio == 1:
            return wide
        ffn = _nearest_multiple(ratio * wide.ffn, multiple_of, wide.ffn, "ffn")
        heads, head_dim, hidden = wide.heads, wide.head_dim, wide.hidden
        if declared.whole_heads and not declared.linked:
            heads = _nearest(ratio * heads, _possible_heads(model, declared))
        if HIDDEN not in declared.fixed:
            grain = head_dim if declared.linked and declared.whole_heads else heads
            grain = grain if declared.linked or declared.divisible else 1
            grain = lcm(grain, multiple_of)
            hidden = _nearest_multiple(ratio * hidden, grain, hidden, "hidden")
            if hidden == _avoided(model, declared):
                hidden = hidden - grain if hidden > grain else hidden + grain
        if declared.linked:
            heads, head_dim = (hidden // head_dim, head_dim) if declared.whole_heads else (heads, hidden // heads)
        return cls(hidden, ffn, head_dim, heads)

    def resolved(self, model: PreTrainedModel) -> Widths:
        """This shape with everything left out filled in, checked against what the model can become.

        Raises:
            ValueError: a width below 1 or above the model's, one that this family cannot change, or a
                combination that no stock class has; the message names what can be had.
        """
        wide, declared = Widths.of(model), family(model)
        given = {name: width for name, width in asdict(self).items() if width is not None}
        for name, width in given.items():
            limit = getattr(wide, name)
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= limit:
                raise ValueError(f"the width {name}={width} cannot be: a whole number from 1 to the model's {limit}")
        if declared.linked:
            given = _completed(given, wide, declared)
        shape = replace(wide, **given)
        _check_possible(shape, wide, model, declared)
        return shape

    def between(self, narrow: Widths, progress: float, model: PreTrainedModel, multiple_of: int = 1) -> Widths:
        """The possible shape that is a fraction `progress` in [0, 1] of the way from this one to `narrow`.

        Everything is rounded to what a stock model can have: where hidden = heads x head_dim, the hidden
        width moves in steps of the number of heads, or of the head dimension where whole heads go. Where
        hidden must be a multiple of heads, a shape may not fit in one of a smaller progress. On the way hidden and
        feed-forward widths are rounded up to multiples of `multiple_of`, as far as this shape goes.
        """
        wide, goal, declared = asdict(self), asdict(narrow), family(model)
        now = {name: round(wide[name] + (goal[name] - wide[name]) * progress) for name in wide}
        if progress < 1:
            grains = {"ffn": multiple_of, "hidden": multiple_of, "heads": 1, "head_dim": 1}
            if declared.linked and not declared.whole_heads:
                grains["head_dim"] = multiple_of // gcd(multiple_of, wide["heads"])
            now = {
                name: min(wide[name], -(-width // grains[name]) * grains[name]) if goal[name] < wide[name] else width
                for name, width in now.items()
            }
        if declared.whole_heads:
            possible = [n for n in _possible_heads(model, declared) if goal["heads"] <= n <= wide["heads"]]
            now["heads"] = _nearest(now["heads"], possible)
        if declared.linked:
            now["hidden"] = now["heads"] * now["head_dim"]
            if now["hidden"] == _avoided(model, declared):  # one grain wider
                now["head_dim"] += 1
                now["hidden"] = now["heads"] * now["head_dim"]
        elif declared.divisible:
            fitting = [n for n in possible if n >= now["heads"] and -(-now["hidden"] // n) * n <= wide["hidden"]]
            now["heads"] = fitting[0]
            now["hidden"] = -(-now["hidden"] // now["heads"]) * now["heads"]  # rounded up
        return Widths(**now)

    def fits_in(self, other: Widths) -> bool:
        """Whether a model of the shape `other` can be narrowed to this one: no width is larger."""
        return all(width <= getattr(other, name) for name, width in asdict(self).items())

    def ratio_to(self, wide: Widths) -> float:
        """The fraction of the hidden width that is kept of `wide`: 1.0 for the same shape."""
        return self.hidden / wide.hidden


def set_widths(model: PreTrainedModel, config, widths: Widths) -> None:
    """Write a shape into the config of a model (its own, or a copy)."""
    declared, hidden = family(model), config.hidden_size
    for name in (*declared.follows, *([declared.embedding] if declared.embedding else [])):
        if getattr(config, name, None) == hidden:
            setattr(config, name, widths.hidden)
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = widths.heads * config.num_key_value_heads // config.num_attention_heads
    if not declared.linked:
        config.head_dim = widths.head_dim
    config.hidden_size = widths.hidden
    config.num_attention_heads = widths.heads
    setattr(config, declared.ffn, widths.ffn)


def layer_of_parameters(model: PreTrainedModel) -> list[int]:
    """For each layer that runs, in order, the layer whose parameters it uses: 0, 1, 2, ..., but for ALBERT."""
    layers = model.config.num_hidden_layers
    groups = getattr(model.config, "num_hidden_groups", layers)
    return [layer * groups // layers for layer in range(layers)]


def _completed(given: dict[str, int], wide: Widths, declared: Family) -> dict[str, int]:
    """Fill in what hidden = heads x head_dim says of the width that is missing."""
    hidden, heads, head_dim = given.get("hidden"), given.get("heads"), given.get("head_dim")
    if heads is None and head_dim is None and declared.whole_heads:
        head_dim = wide.head_dim
    if heads is None:
        heads = max(1, hidden // head_dim) if hidden and head_dim else wide.heads
    if hidden is None:
        hidden = heads * (head_dim or wide.head_dim)
    if head_dim is None:
        head_dim = max(1, hidden // heads)
    return given | {"hidden": hidden, "heads": heads, "head_dim": head_dim}


def _check_possible(shape: Widths, wide: Widths, model: PreTrainedModel, declared: Family) -> None:
    kind = model.config.model_type
    for name, reason in declared.fixed.items():
        if getattr(shape, name) != getattr(wide, name):
            raise ValueError(f"the {name} width of {kind!r} cannot change from {getattr(wide, name)}: {reason}")
    if declared.linked and shape.hidden != shape.heads * shape.head_dim:
        grain = shape.head_dim if declared.whole_heads else shape.heads
        below = shape.hidden // grain * grain
        near = " or ".join(str(n) for n in (below, below + grain) if 0 < n <= wide.hidden)
        with_what = f"heads of {grain}" if declared.whole_heads else f"{grain} heads"
        raise ValueError(
            f"hidden={shape.hidden} is not heads x head_dim = {shape.heads} x {shape.head_dim}: a stock {kind!r} "
            f"splits its hidden width evenly over the heads. With {with_what} take hidden={near}."
        )
    if declared.whole_heads and shape.head_dim != wide.head_dim:
        raise ValueError(
            f"head_dim={shape.head_dim}: the head dimensions of {kind!r} are rotated together and stay {wide.head_dim}"
            "; narrow it by whole heads"
        )
    group = wide.heads // _key_value_heads(model)
    if shape.heads % group:
        raise ValueError(
            f"heads={shape.heads}: in this model {group} query heads share a key/value head and go together; "
            f"take a multiple of {group}"
        )
    if declared.divisible and shape.hidden % shape.heads:
        raise ValueError(
            f"hidden={shape.hidden}, heads={shape.heads}: the stock config of {kind!r} wants hidden to be a multiple "
            f"of heads. With {shape.heads} heads take hidden={shape.hidden // shape.heads * shape.heads}."
        )
    if shape.hidden == _avoided(model, declared):
        raise ValueError(
            f"hidden={shape.hidden} is the width of the embeddings of this model: a stock {kind!r} has no projection "
            f"between the two then, whose weights would be lost. Take another hidden width."
        )


def _changes(model: PreTrainedModel) -> str:
    """Which widths can change, in words, for the table of groups."""
    wide, declared = Widths.of(model), family(model)
    group = wide.heads // _key_value_heads(model)
    together = f", {group} at a time with their key/value head" if group > 1 else ""
    parts = [f"ffn {wide.ffn}"]
    if declared.linked:
        way = f"whole heads of {wide.head_dim}" if declared.whole_heads else "dimensions of every head, or whole heads"
        parts.insert(0, f"hidden {wide.hidden} = heads {wide.heads} x head_dim {wide.head_dim}, by {way}")
    else:
        parts += [f"heads {wide.heads}{together}"]
        parts = parts if HIDDEN in declared.fixed else [f"hidden {wide.hidden}", *parts]
    stay = [f"{name} {getattr(wide, name)}" for name in declared.fixed]
    stay += [f"head_dim {wide.head_dim}"] if declared.whole_heads else []
    if (avoided := _avoided(model, declared)) is not None:
        stay.append(f"embeddings {avoided}")
    changes = f"{type(model).__name__} can change: {'; '.join(parts)}."
    return changes + (f" What stays: {', '.join(stay)}." if stay else "")


def _key_value_heads(model: PreTrainedModel) -> int:
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def _possible_heads(model: PreTrainedModel, declared: Family) -> list[int]:
    """Head counts of which every key/value head keeps the query heads it serves, smallest first."""
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    group = heads // _key_value_heads(model)
    divides = declared.divisible and HIDDEN in declared.fixed
    return [n for n in range(group, heads + 1, group) if not divides or hidden % n == 0]


def _embedding_width(model: PreTrainedModel, declared: Family) -> int:
    name = declared.embedding
    return (getattr(model.config, name, None) if name else None) or model.config.hidden_size


def _avoided(model: PreTrainedModel, declared: Family) -> int | None:
    """A hidden width that would make the stock class leave out the projection from its embeddings."""
    width = _embedding_width(model, declared)
    return width if width != model.config.hidden_size else None


def _nearest(value: float, possible: list[int]) -> int:
    return min(possible, key=lambda n: abs(n - value))


def _nearest_multiple(value: float, multiple: int, limit: int, name: str) -> int:
    if multiple > limit:
        raise ValueError(f"{name}: no multiple of {multiple} at or below the model's width {limit}")
    return min(max(1, round(value / multiple)), limit // multiple) * multiple
