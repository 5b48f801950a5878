"""What one neuron owns: the width groups of each architecture, declared as data.

Cutting one matrix on its own breaks the model: the neurons of the residual stream are written and
read by every layer, a query dimension only means something beside its key dimension. So neurons are
removed in *groups*: all (parameter, axis) slices that belong to the same set of neurons. A family is
one table, a row for each parameter, that says what every axis of it counts. Shapes: V vocabulary,
L layers, H heads, D hidden width, F feed-forward width.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import lcm

from transformers import PreTrainedModel

# What an axis can count. Hidden is one set for the whole model, the others are one set for each layer.
HIDDEN = "hidden"  # D, the residual stream: written and read by all layers
FFN = "ffn"  # F, the inner neurons of one feed-forward block
QUERY_KEY = "query_key"  # H * head_dim: query dimension i only ever meets key dimension i
VALUE_OUTPUT = "value_output"  # H * head_dim: value dimension j only ever meets column j of the output matrix
FIXED = None  # vocabulary, positions, token types, classes: never narrowed


class UnsupportedArchitecture(ValueError):
    """The model's family has no table of width groups; the message names those that have one."""


@dataclass(frozen=True)
class Family:
    """One architecture: what each axis of each parameter counts, and the few names that differ."""

    head: str  # module whose input is the last hidden state and whose output leads to the logits
    axes: dict[str, tuple]  # parameter name pattern -> what its axes count; the first match holds
    scaled: tuple[str, ...]  # parameters that absorb a change of the attention scale 1/sqrt(head_dim)


BERT = Family(
    head="cls",
    axes={
        "*embeddings.*_embeddings.weight": (FIXED, HIDDEN),
        "*.self.query.weight": (QUERY_KEY, HIDDEN),
        "*.self.query.bias": (QUERY_KEY,),
        "*.self.key.weight": (QUERY_KEY, HIDDEN),
        "*.self.key.bias": (QUERY_KEY,),
        "*.self.value.weight": (VALUE_OUTPUT, HIDDEN),
        "*.self.value.bias": (VALUE_OUTPUT,),
        "*.attention.output.dense.weight": (HIDDEN, VALUE_OUTPUT),
        "*.intermediate.dense.weight": (FFN, HIDDEN),
        "*.intermediate.dense.bias": (FFN,),
        "*.output.dense.weight": (HIDDEN, FFN),
        "*.output.dense.bias": (HIDDEN,),
        "*LayerNorm.weight": (HIDDEN,),
        "*LayerNorm.bias": (HIDDEN,),
        "*pooler.dense.weight": (HIDDEN, HIDDEN),
        "*pooler.dense.bias": (HIDDEN,),
        # The transform feeds the decoder, which is tied to the embedding: its output is the same set.
        "cls.predictions.transform.dense.weight": (HIDDEN, HIDDEN),
        "cls.predictions.transform.dense.bias": (HIDDEN,),
        "cls.predictions.decoder.weight": (FIXED, HIDDEN),
        "cls.predictions*bias": (FIXED,),
        "cls.seq_relationship.weight": (FIXED, HIDDEN),
        "cls.seq_relationship.bias": (FIXED,),
        "classifier.weight": (FIXED, HIDDEN),
        "classifier.bias": (FIXED,),
        "qa_outputs.weight": (FIXED, HIDDEN),
        "qa_outputs.bias": (FIXED,),
    },
    scaled=("*.self.query.weight", "*.self.query.bias"),
)

FAMILIES = {"bert": BERT}


def family(model: PreTrainedModel) -> Family:
    """The table of the model's architecture, or UnsupportedArchitecture naming those that have one."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise UnsupportedArchitecture(
            f"no width groups are declared for the architecture {kind!r}; supported: {', '.join(sorted(FAMILIES))}. "
            "A new family is one table in hdlib/widths.py."
        )
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise UnsupportedArchitecture(f"this {kind!r} model has cross-attention, whose width groups are not declared")
    return FAMILIES[kind]


@dataclass(frozen=True)
class WidthGroup:
    """Neurons that are removed together: `size` of them, each owning one slice of every member."""

    name: str  # "hidden", or "layer.3.ffn"
    kind: str  # HIDDEN, FFN, QUERY_KEY or VALUE_OUTPUT
    size: int  # neurons in the group now
    members: tuple[tuple[str, int], ...]  # (parameter name, axis)


def axes_of(model: PreTrainedModel) -> dict[str, tuple[str | None, ...]]:
    """The group that each axis of each parameter belongs to (None: the axis is never narrowed).

    Every parameter must have a row of its own rank in the family's table: a parameter that nobody
    declared would stay wide, so it raises UnsupportedArchitecture with its name.
    """
    table, named = family(model).axes, {}
    for name, parameter in model.named_parameters():
        row = next((row for pattern, row in table.items() if fnmatchcase(name, pattern)), None)
        if row is None or len(row) != parameter.dim():
            raise UnsupportedArchitecture(
                f"parameter {name} of shape {tuple(parameter.shape)} has no row in the table of "
                f"{model.config.model_type!r}: add what its axes count to hdlib/widths.py"
            )
        layer = re.search(r"\.(\d+)\.", name)
        named[name] = tuple(axis if axis in (HIDDEN, FIXED) else f"layer.{layer[1]}.{axis}" for axis in row)
    return named


def width_groups(model: PreTrainedModel) -> dict[str, WidthGroup]:
    """The width groups of a Hugging Face model, by name.

    Args:
        model: any model of a supported family, with or without a head.

    Returns:
        Group name to WidthGroup: "hidden", and for each layer l "layer.l.query_key",
        "layer.l.value_output" and "layer.l.ffn".

    Raises:
        UnsupportedArchitecture: no table for this family, or a parameter that the table does not know.
    """
    members: dict[str, list[tuple[str, int]]] = {}
    for name, axes in axes_of(model).items():
        for axis, group in enumerate(axes):
            if group is not None:
                members.setdefault(group, []).append((name, axis))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    groups = {}
    for group, slices in members.items():
        sizes = {shapes[name][axis] for name, axis in slices}
        if len(sizes) != 1:
            raise UnsupportedArchitecture(f"members of group {group} disagree about its size: {sorted(sizes)}")
        groups[group] = WidthGroup(group, group.rpartition(".")[2], sizes.pop(), tuple(slices))
    return groups


@dataclass(frozen=True)
class Widths:
    """A shape: hidden width D, feed-forward width F, dimensions a head, heads a layer.

    What is left out is taken from the model that the shape is used on; a stock BERT has
    hidden = heads x head_dim, so of these three the missing one follows from the others.
    """

    hidden: int | None = None
    ffn: int | None = None
    head_dim: int | None = None
    heads: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Widths:
        """The shape that a model has now."""
        config = model.config
        heads = config.num_attention_heads
        return cls(config.hidden_size, config.intermediate_size, config.hidden_size // heads, heads)

    @classmethod
    def at(cls, model: PreTrainedModel, ratio: float, multiple_of: int = 1) -> Widths:
        """The possible shape nearest to `ratio` times the model's widths, all heads kept.

        Args:
            model: the wide model.
            ratio: the fraction of every width to keep, in (0, 1].
            multiple_of: hidden and feed-forward widths are multiples of this (8 suits tensor cores);
                the hidden width is a multiple of the number of heads besides.

        Raises:
            ValueError: ratio outside (0, 1], or no multiple at or below the model's width.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is the fraction of the width to keep, in (0, 1]; got {ratio}")
        wide = cls.of(model)
        if ratio == 1:
            return wide
        hidden = _nearest_multiple(ratio * wide.hidden, lcm(wide.heads, multiple_of), wide.hidden, "hidden")
        ffn = _nearest_multiple(ratio * wide.ffn, multiple_of, wide.ffn, "ffn")
        return cls(hidden, ffn, hidden // wide.heads, wide.heads)

    def resolved(self, model: PreTrainedModel) -> Widths:
        """This shape with everything left out filled in, checked against what the model can become.

        Raises:
            ValueError: a width below 1 or above the model's, or hidden != heads x head_dim.
        """
        wide = Widths.of(model)
        heads, head_dim, hidden = self.heads, self.head_dim, self.hidden
        if heads is None:
            heads = hidden // head_dim if hidden and head_dim else wide.heads
        if hidden is None:
            hidden = heads * (head_dim or wide.head_dim) if (self.heads or head_dim) else wide.hidden
        if head_dim is None:
            head_dim = max(1, hidden // heads) if heads > 0 else wide.head_dim
        shape = Widths(hidden, wide.ffn if self.ffn is None else self.ffn, head_dim, heads)
        shape._check(wide)
        return shape

    def between(self, narrow: Widths, progress: float) -> Widths:
        """The shape that is a fraction `progress` in [0, 1] of the way from this one to `narrow`.

        Heads and head dimensions are rounded to whole numbers, and hidden = heads x head_dim as in
        every stock BERT, so the hidden width moves in steps of the number of heads.
        """
        wide, goal = asdict(self), asdict(narrow)
        now = {name: round(wide[name] + (goal[name] - wide[name]) * progress) for name in wide}
        return Widths(**(now | {"hidden": now["heads"] * now["head_dim"]}))

    def ratio_to(self, wide: Widths) -> float:
        """The fraction of the hidden width that is kept of `wide`: 1.0 for the same shape."""
        return self.hidden / wide.hidden

    def _check(self, wide: Widths) -> None:
        for name, width in asdict(self).items():
            limit = getattr(wide, name)
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= limit:
                raise ValueError(f"the width {name}={width} cannot be: a whole number from 1 to the model's {limit}")
        if self.hidden != self.heads * self.head_dim:
            below = self.hidden // self.heads * self.heads
            near = " or ".join(str(n) for n in (below, below + self.heads) if 0 < n <= wide.hidden)
            raise ValueError(
                f"hidden={self.hidden} is not heads x head_dim = {self.heads} x {self.head_dim}: a stock BERT splits "
                f"its hidden width evenly over the heads. With {self.heads} heads take hidden={near}."
            )


def set_widths(config, widths: Widths) -> None:
    """Write a shape into a Hugging Face config."""
    config.hidden_size = widths.hidden
    config.intermediate_size = widths.ffn
    config.num_attention_heads = widths.heads


def _nearest_multiple(value: float, multiple: int, limit: int, name: str) -> int:
    if multiple > limit:
        raise ValueError(f"{name}: no multiple of {multiple} at or below the model's width {limit}")
    return min(max(1, round(value / multiple)), limit // multiple) * multiple
