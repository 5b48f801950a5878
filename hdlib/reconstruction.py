"""What a prune removes, expressed by what it keeps: rotation of heads, least-squares fold, refit of norms.

A layer that reads x = (x_K, x_P), kept and removed neurons, can read x_P ~ A x_K + c instead: W_K += W_P A and
b += W_P c. A and c are a ridge regression on moments of x, which come from the training batches. The student stays a
dense stock model. Sources: He et al., ICCV 2017, for channels; Kurtic et al., 2023 (ZipLM, arXiv 2302.04089).

Shapes: N tokens, D neurons that a layer reads, K kept and P removed ones among them, H heads, E dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import HIDDEN, VALUE
from .losses import DistillationLoss
from .models import base_model, forward
from .narrowing import kept_indices, sites_of
from .widths import QUERY_KEY, Axis, Block, Widths, axes_of, width_groups

INPUT_AXIS = {nn.Linear: 1, Conv1D: 0}  # the axis of a layer's weight that multiplies its input
WINDOW = 8  # steps before a prune whose batches give moments
RIDGE = 1e-6  # of the mean square of the kept neurons
LAST = "last_hidden_state"
STATES = "hidden_states."  # followed by a layer: what a projection of the loss reads


class Moments(NamedTuple):
    """Sums over tokens: their number (), what a layer reads (D,), and its products (D, D)."""

    tokens: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, states: Tensor) -> Moments:
        """Of states (N, D)."""
        return cls(states.new_tensor(float(len(states))), states.sum(0), states.T @ states)

    def plus(self, new: Moments) -> Moments:
        return Moments(*map(torch.add, self, new))

    def decayed(self, decay: float) -> Moments:
        return Moments(*(decay * each for each in self))

    def of_neurons(self, indices: Tensor) -> Moments:
        indices = indices.to(self.total.device)
        return Moments(self.tokens, self.total[indices], self.products[indices][:, indices])

    def over_processes(self) -> Moments:
        if PartialState().num_processes == 1:
            return self
        return Moments(*(reduce(each.clone(), "sum") for each in self))

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x (D,) and of x x' (D, D), float64, on the CPU for an Apple device, which has none."""
        tokens, total, products = ((each.cpu() if each.device.type == "mps" else each).double() for each in self)
        return total / tokens, products / tokens


class Compensation:
    """Running moments of what the layers of a student read, and the weights that make its next prune cheap.

    Args:
        decay: weight of the past at each step.
    """

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self._moments: dict[str, Moments] = {}
        self._source: dict[str, str] = {}  # reader to the name of its moments: layers that read the same share them
        self._read: dict[str, list[Tensor]] = {}  # in this forward pass

    def start_step(self) -> None:
        self._moments = {name: moments.decayed(self.decay) for name, moments in self._moments.items()}

    @contextmanager
    def recording(self, model: PreTrainedModel) -> Iterator[None]:
        """Add the moments of a forward pass."""
        hooks = []
        if HIDDEN in width_groups(model):  # else the residual stream keeps its width
            hooks.append(base_model(model).register_forward_hook(self._after_base))
        for name, module, _ in (*readers(model), *readers(model, tied=True)):
            hooks.append(
                module.register_forward_pre_hook(lambda _module, inputs, name=name: self._add(name, inputs[0]))
            )
        for name, module, _ in norms(model):
            hooks.append(module.register_forward_hook(lambda _module, _inputs, out, name=name: self._add(name, out)))
        try:
            yield
        finally:
            read, self._read = self._read, {}
            for hook in hooks:
                hook.remove()
        self._sum(read, inside=set(dict(base_model(model).named_modules(prefix=_base_name(model)))))

    def _add(self, name: str, states: Tensor) -> None:
        self._read.setdefault(name, []).append(states)

    def _after_base(self, _base, _inputs, outputs) -> None:
        if outputs.hidden_states is None:  # called by the head, with given states
            return
        self._add(LAST, outputs.last_hidden_state)
        for layer, states in enumerate(outputs.hidden_states):
            self._add(f"{STATES}{layer}", states)

    @torch.no_grad()
    def _sum(self, read: dict[str, list[Tensor]], inside: set[str]) -> None:
        outside = [name for name in read if name not in inside and name != LAST and not name.startswith(STATES)]
        if outside and LAST in read:  # the head reads the last states, at the few loss positions only
            read[outside[0]] = read[LAST]
        same: dict[tuple, list[str]] = {}
        for name, states in read.items():
            same.setdefault(tuple(map(id, states)), []).append(name)
        for first, *others in same.values():
            self._source |= dict.fromkeys([first, *others], first)
            new = Moments.of(torch.cat([states.detach().flatten(0, -2) for states in read[first]]).float())
            self._moments[first] = self._moments[first].plus(new) if first in self._moments else new

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, loss: DistillationLoss, kept: dict[str, Tensor]) -> None:
        """Change weights so that `hdlib.narrow` to the neurons `kept` changes outputs and projections little."""
        axes = {name: axis for name, _, axis in (*readers(model), *readers(model, tied=True), *norms(model))}
        hidden = (Block(HIDDEN, model.config.hidden_size, 1, 0, False),)
        axes |= {name: hidden for name in self._source if name == LAST or name.startswith(STATES)}
        fits = _Fits({name: m.over_processes() for name, m in self._moments.items()}, self._source, axes, kept)
        for name, module, _ in readers(model):
            if fits.removes(name):
                weight = module.weight.T if isinstance(module, nn.Linear) else module.weight  # (D, out)
                fold(weight, module.bias, *fits.fit(name, centred=module.bias is not None))
        targets = {}  # of the norm before a decoder that shares its weights with the embedding: they cannot be folded
        for name, module, _ in readers(model, tied=True):
            if fits.removes(name):
                targets[self._source[name]] = expressed(module, *fits.means(name)[:1], fits.indices(name))
        for name, module, _ in norms(model):
            if fits.removes(name):
                target = targets.get(self._source[name])
                refit_norm(module, *fits.means(name), fits.indices(name), target)
        for layer, projection in enumerate([loss.embedding_projection, *loss.hidden_projections]):
            if fits.removes(name := f"{STATES}{layer}"):
                fold(projection, None, *fits.fit(name, centred=False))
        self._moments = {name: m.of_neurons(kept_indices(axes[name], kept)) for name, m in self._moments.items()}

    def state_dict(self) -> dict:
        return {"moments": {name: tuple(m) for name, m in self._moments.items()}, "source": dict(self._source)}

    def load_state_dict(self, state: dict) -> None:
        self._moments = {name: Moments(*m) for name, m in state["moments"].items()}
        self._source = dict(state["source"])


class _Fits:
    """The regressions of a prune, each made once for all layers that read the same."""

    def __init__(self, moments: dict[str, Moments], source: dict[str, str], axes: dict[str, Axis], kept):
        self.moments, self.source, self.axes, self.kept, self._made = moments, source, axes, kept, {}

    def indices(self, name: str) -> Tensor:
        return kept_indices(self.axes[name], self.kept).cpu()

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        return self.moments[self.source[name]].means()

    def removes(self, name: str) -> bool:
        return name in self.source and len(self.indices(name)) < len(self.moments[self.source[name]].total)

    def fit(self, name: str, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        key = self.source[name], centred
        if key not in self._made:
            self._made[key] = regression(*self.means(name), self.indices(name), centred)
        return self._made[key]


def regression(
    mean: Tensor, products: Tensor, kept: Tensor, centred: bool, ridge: float = RIDGE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predict the removed neurons from the kept ones.

    Args:
        mean, products: of x, (D,), and of x x', (D, D), float64.
        kept: indices (K,).
        centred: with a constant c; without, c is 0.
        ridge: added to the diagonal, in units of its mean.

    Returns:
        (kept, removed, A, c): indices (K,), (P,); A (P, K) and c (P,) of least squared error of A x_K + c from x_P.
    """
    kept = kept.to(mean.device)
    removed = torch.ones_like(mean, dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
    covariance = products - torch.outer(mean, mean) if centred else products
    own = covariance[kept][:, kept]
    own.diagonal().add_(ridge * own.diagonal().mean() + torch.finfo(own.dtype).tiny)
    weights = torch.cholesky_solve(covariance[kept][:, removed], torch.linalg.cholesky(own)).T  # (P, K)
    constant = mean[removed] - weights @ mean[kept] if centred else torch.zeros_like(mean[removed])
    return kept, removed, weights, constant


def fold(weight: Tensor, bias: Tensor | None, kept: Tensor, removed: Tensor, weights: Tensor, constant: Tensor) -> None:
    """Let a layer read A x_K + c instead of x_P, in place: W_K += A' W_P and b += W_P' c. weight (D, out)."""
    lost = weight[removed].to(weights)  # (P, out)
    weight[kept] += (weights.T @ lost).to(weight)
    if bias is not None:
        bias += (constant @ lost).to(bias)


def expressed(decoder: nn.Linear, mean: Tensor, kept: Tensor) -> Tensor:
    """The map (K, D) from states x to the kept ones whose logits are nearest to those of all, over the vocabulary.

    What it leaves of the mean logits is added to the decoder's bias, in place.
    """
    kept, weight = kept.to(mean.device), decoder.weight.to(mean.device)
    gram = (weight.T @ weight).double()  # (D, D)
    own = gram[kept][:, kept]
    own.diagonal().add_(RIDGE * own.diagonal().mean())
    targets = torch.cholesky_solve(gram[kept], torch.linalg.cholesky(own))
    if decoder.bias is not None:
        rest = mean.index_add(0, kept, targets @ mean, alpha=-1)
        decoder.bias += (weight @ rest.to(weight)).to(decoder.bias)
    return targets


def refit_norm(norm: nn.Module, mean: Tensor, products: Tensor, kept: Tensor, targets: Tensor | None = None) -> None:
    """Scale and shift of a norm over the kept neurons for which its output is nearest to `targets` x, in place.

    A norm divides by a deviation that changes with the set of neurons. Only the moments of its output x are known, so
    that deviation is taken as equal for all tokens. targets (K, D); None: its output of before.
    """
    kept, layer_norm = kept.to(mean.device), isinstance(norm, nn.LayerNorm)
    targets = torch.eye(len(mean)).to(mean)[kept] if targets is None else targets
    shifted = layer_norm and norm.bias is not None
    scale, shift = norm.weight.to(mean)[kept], norm.bias.to(mean)[kept] if shifted else torch.zeros_like(mean[kept])
    inverse = torch.where(scale.abs() > 1e-4 * scale.abs().max(), 1 / scale, 0.0)  # x = scale n + shift, n normed
    center = mean if shifted else torch.zeros_like(mean)
    covariance = products - torch.outer(center, center)
    own = covariance[kept][:, kept] * torch.outer(inverse, inverse)  # of n
    with_targets = inverse[:, None] * (covariance[kept] @ targets.T)  # of n_j and target i
    of_n = (mean[kept] - shift) * inverse
    second = products[kept][:, kept] * torch.outer(inverse, inverse) if not shifted else own + torch.outer(of_n, of_n)
    deviation, across = second.diagonal().mean(), torch.zeros_like(of_n)
    if layer_norm:  # the mean over neurons is subtracted
        deviation = deviation - second.mean()
        of_n = of_n - of_n.mean()
        across = own.mean(1)
        own_of = own.diagonal() - 2 * across + own.mean()
        with_own = with_targets.diagonal() - with_targets.mean(0)
    else:
        own_of, with_own = own.diagonal(), with_targets.diagonal()
    new = deviation.sqrt() * with_own / own_of.clamp(min=torch.finfo(own.dtype).tiny)
    norm.weight[kept] = new.to(norm.weight)
    if shifted:
        norm.bias[kept] = (targets @ mean - new * of_n / deviation.sqrt()).to(norm.bias)


def readers(model: PreTrainedModel, tied: bool = False) -> Iterator[tuple[str, nn.Module, Axis]]:
    """Name, module and input axis of the linear layers that read neurons, with weights of their own or `tied` ones."""
    axes, sites = axes_of(model), sites_of(model)
    for name, module in model.named_modules():
        kind = next((kind for kind in INPUT_AXIS if isinstance(module, kind)), None)
        if kind is None or (len(sites[module.weight]) > 1) != tied:
            continue
        parameter = next(name for name, parameter in model.named_parameters() if parameter is module.weight)
        if axis := axes[parameter][INPUT_AXIS[kind]]:
            yield name, module, axis


def norms(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Axis]]:
    """Name, module and axis of the norms over the residual stream."""
    for name, axes in axes_of(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and len(axes) == 1 and axes[0] and axes[0][0].group == HIDDEN:
            yield name.rpartition(".")[0], module, axes[0]


def _base_name(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is base_model(model))


@torch.no_grad()
def rotate_heads(model: PreTrainedModel, batches: Iterator[Tensor]) -> None:
    """Rotate the dimensions inside every head, in place, so that few of them carry most of its work; no logit changes.

    Queries take T and keys its inverse transpose, where both then have the singular values of C_q^1/2 C_k^1/2 as second
    moments (a constant over keys does not count: softmax ignores it). Values and their output matrix W_o likewise take
    the basis of W_o C_v^1/2. Nothing to do where a family removes whole heads.

    Args:
        batches: token ids (B, S), whose second moments C decide the basis.
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
        module = name.rpartition(".")[0]
        kind = next((kind for kind in INPUT_AXIS if isinstance(model.get_submodule(module), kind)), None)
        for axis, blocks in enumerate(axes):
            for block in blocks or ():
                if block.group.endswith((QUERY_KEY, VALUE)):
                    is_input = name.endswith("weight") and axis == INPUT_AXIS[kind]
                    if block.group.endswith(QUERY_KEY):
                        role = "query" if block.scaled else "key"
                    else:
                        role = "output" if is_input else "value"
                    part = _Part(module, model.get_parameter(name), axis, block, role)
                    parts.setdefault(block.group, []).append(part)
    return parts


def _moments_of_heads(model, members: dict[str, list[_Part]], batches, heads: int) -> dict[str, dict[str, Tensor]]:
    """Mean products (H, E, E) of queries, centred ones of keys and of the values that the output matrix reads."""
    read: dict[tuple[str, str], list[Tensor]] = {}

    def add(group: str, role: str, states: Tensor) -> None:
        states = states.flatten(0, -2).unflatten(-1, (heads, -1)).transpose(0, 1).double()  # (H, N, E)
        sums = [torch.tensor(float(states.shape[1])), states.sum(1), states.mT @ states]
        past = read.get((group, role), [0.0, 0.0, 0.0])
        read[group, role] = [before + now for before, now in zip(past, sums, strict=True)]

    def before(group: str, _part: _Part, _module, inputs) -> None:
        add(group, "values", inputs[0])

    def after(group: str, part: _Part, _module, _inputs, output: Tensor) -> None:
        add(group, part.role, output[..., part.block.start : part.block.start + part.block.size])

    hooks = []
    for group, part in ((group, part) for group, parts in members.items() for part in parts):
        module = model.get_submodule(part.module)
        if part.role == "output":
            hooks.append(module.register_forward_pre_hook(partial(before, group, part)))
        elif part.role != "value" and part.parameter.dim() > 1:
            hooks.append(module.register_forward_hook(partial(after, group, part)))
    try:
        for input_ids in batches:
            forward(model, input_ids, torch.zeros_like(input_ids, dtype=torch.bool))
    finally:
        for hook in hooks:
            hook.remove()
    means: dict[str, dict[str, Tensor]] = {}
    for (group, role), (tokens, total, products) in read.items():
        mean = 0.0 if role == "query" else total / tokens  # a constant over keys has no effect
        centred = products / tokens - (mean[..., None] * mean[:, None] if role != "query" else 0.0)
        means.setdefault(group, {})[role] = centred
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
    return values.clamp(min=1e-4 * values.max(-1, keepdim=True).values)
