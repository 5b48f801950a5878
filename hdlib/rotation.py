"""Rotation of heads before the first step: no logit changes, and fewer dimensions carry the work of a head.

H heads of E dimensions, N tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import VALUE
from .models import forward
from .precision import doubled
from .reconstruction import input_axis, real_tokens
from .widths import QUERY_KEY, Block, Widths, axes_of


@torch.no_grad()
def rotate_heads(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> None:
    """Rotate the dimensions inside every head, in place, so that few of them carry most of its work; no logit changes.

    Queries take T and keys its inverse transpose, where both then have the singular values of C_q^1/2 C_k^1/2 as second
    moments (a constant over keys does not count: softmax ignores it). Values and their output matrix W_o likewise take
    the basis of W_o C_v^1/2. Nothing to do where a family removes whole heads.

    Args:
        batches: `input_ids` and, with padding, `attention_mask`, (B, S) each, whose second moments C decide the basis.
    """
    members = _members_of_heads(model)
    if not members:
        return
    heads = Widths.of(model).heads
    moments = _moments_of_heads(model, members, batches, heads)
    for group, parts in members.items():
        query_key = group.endswith(QUERY_KEY)
        maps = _query_key_maps(**moments[group]) if query_key else _value_maps(parts, **moments[group])
        for part in parts:
            part.rotate(maps[part.role])


class _Part(NamedTuple):
    """The slice of a parameter that belongs to the heads of a layer: dimension e of head h is index h E + e."""

    module: str
    parameter: nn.Parameter
    axis: int
    block: Block
    role: str  # query, key, value or output

    def rows(self) -> Tensor:
        """(H E, ...), a view."""
        start = self.block.start
        return self.parameter.data.movedim(self.axis, 0)[start : start + self.block.size]

    def rotate(self, maps: Tensor) -> None:
        """Multiply the rows of every head by its map, (H, E, E)."""
        rows = self.rows()
        by_head = rows.reshape(*maps.shape[:2], -1).to(maps)  # (H, E, M)
        rows.copy_((maps @ by_head).reshape(rows.shape))


def _members_of_heads(model: PreTrainedModel) -> dict[str, list[_Part]]:
    """The parts of each group of query/key and of value/output dimensions."""
    parts: dict[str, list[_Part]] = {}
    for name, axes in axes_of(model).items():
        module, parameter = name.rpartition(".")[0], model.get_parameter(name)
        read = input_axis(model.get_submodule(module)) if parameter.dim() > 1 else None
        for axis, blocks in enumerate(axes):
            for block in blocks or ():
                roles = {QUERY_KEY: "query" if block.scaled else "key", VALUE: "output" if axis == read else "value"}
                if role := roles.get(block.group.rpartition(".")[2]):
                    parts.setdefault(block.group, []).append(_Part(module, parameter, axis, block, role))
    return parts


def _moments_of_heads(model, members: dict[str, list[_Part]], batches, heads: int) -> dict[str, dict[str, Tensor]]:
    """Mean products (H, E, E) of queries, centred ones of keys and of the values that the output matrix reads."""
    read: dict[tuple[str, str], list[Tensor]] = {}
    mask = None  # of the present batch

    def add(group: str, part: _Part, _module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        role, states = "values", inputs[0]
        if part.role != "output":
            role, states = part.role, output[..., part.block.start : part.block.start + part.block.size]
        states = doubled(real_tokens(states, mask).unflatten(-1, (heads, -1)).transpose(0, 1))  # (H, N, E)
        sums = [torch.tensor(float(states.shape[1])), states.sum(1), states.mT @ states]
        past = read.get((group, role), [0.0, 0.0, 0.0])
        read[group, role] = [before + now for before, now in zip(past, sums, strict=True)]

    with ExitStack() as hooks:
        for group, part in ((group, part) for group, parts in members.items() for part in parts):
            if part.role != "value" and part.parameter.dim() > 1:
                module = model.get_submodule(part.module)
                hooks.enter_context(module.register_forward_hook(partial(add, group, part)))
        for batch in batches:
            input_ids, mask = batch["input_ids"], batch.get("attention_mask")
            forward(model, input_ids, torch.zeros_like(input_ids, dtype=torch.bool), mask)
    means: dict[str, dict[str, Tensor]] = {}
    for (group, role), (tokens, total, products) in read.items():
        centre = total / tokens * (role != "query")  # a constant over keys has no effect
        means.setdefault(group, {})[role] = products / tokens - centre[..., None] * centre[:, None]
    return means


def _query_key_maps(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """T' for queries and T^-1 for keys, (H, E, E), from their mean products: q' T T^-1 k stays q' k."""
    root_q, root_k = _root(query), _root(key)  # lower triangles
    left, values, right = torch.linalg.svd(root_q.mT @ root_k)
    values, scale = values[..., None], _bounded(values).sqrt()[..., None]
    of_query = scale * torch.linalg.solve_triangular(root_q.mT, left, upper=True).mT
    of_key = values / scale * torch.linalg.solve_triangular(root_k.mT, right.mT, upper=True).mT
    return {"query": of_query, "key": of_key}


def _value_maps(parts: list[_Part], values: Tensor) -> dict[str, Tensor]:
    """T' for values and T^-1 for the rows of the output matrix, (H, E, E), from the mean products of the values."""
    (output,) = (part for part in parts if part.role == "output")
    rows = output.rows().reshape(*values.shape[:2], -1).to(values)  # (H, E, D)
    root = _root(values)
    _, sizes, right = torch.linalg.svd(rows.mT @ root, full_matrices=False)  # (H, E, E)
    scale = _bounded(sizes).sqrt()[..., None]
    of_value = scale * torch.linalg.solve_triangular(root.mT, right.mT, upper=True).mT
    return {"value": of_value, "output": (right @ root.mT) / scale}


def _root(products: Tensor) -> Tensor:
    """Cholesky factors of mean products (H, E, E), with a small ridge."""
    ridge = 1e-4 * products.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + torch.finfo(products.dtype).tiny
    return torch.linalg.cholesky(products + ridge * torch.eye(products.shape[-1]).to(products))


def _bounded(values: Tensor) -> Tensor:
    largest = values.max(-1, keepdim=True).values
    return values.clamp(min=torch.where(largest > 0, 1e-4 * largest, 1.0))  # 0: a head without effect
