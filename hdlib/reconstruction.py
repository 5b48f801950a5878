"""What a prune removes, expressed by what it keeps: least-squares fold and refit of norms.

A layer that reads x = (x_K, x_P), kept and removed neurons, can read x_P ~ A x_K + c instead: W_K += W_P A and
b += W_P c. A and c are a ridge regression on moments of x, which come from the training batches. The student stays a
dense stock model. Feed-forward neurons are removed as they are: they cost little, and their moments, of the widest
states, cost most. Sources: He et al., ICCV 2017, for channels; Kurtic et al., 2023 (ZipLM, arXiv 2302.04089).

Shapes: N tokens, D neurons that a layer reads, K kept and P removed ones among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import FFN, HIDDEN, VALUE
from .losses import DistillationLoss
from .models import base_model, base_name
from .narrowing import kept_indices, sites_of
from .precision import doubled
from .widths import LAYERS, Axis, Block, axes_of, compared_states, new_numbers, renumbered, width_groups

DECAY = 0.9  # weight of the past moments at each step
WINDOW = 4  # steps before a prune whose batches give moments
RIDGE = 1e-6  # of the mean square of the kept neurons; a fold of neurons that others express stays exact
RIDGE_OF_FEW = 1e-2  # for moments of fewer tokens than ENOUGH
ENOUGH = 50  # tokens for each neuron: fewer are often alike, and an exact fit of them does not carry over
STATES = "hidden_states"  # what the projections of the loss read, by number
LAST = f"{STATES}.last"  # what the head reads


class Moments(NamedTuple):
    """Sums over tokens: their number (), what a layer reads (D,), and its products (D, D)."""

    tokens: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, states: Tensor) -> Moments:
        """Of states (N, D)."""
        return cls(states.new_full((), len(states)), states.sum(0), states.T @ states)

    def of_neurons(self, indices: Tensor) -> Moments:
        indices = indices.to(self.total.device)
        return Moments(self.tokens, self.total[indices], self.products[indices][:, indices])

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x (D,) and of x x' (D, D), float64, on the CPU for a device that has none."""
        tokens, total, products = map(doubled, self)
        return total / tokens, products / tokens


class Compensation:
    """Running moments of what the layers of a student read, and the weights that make its next prune cheap."""

    def __init__(self):
        self._moments: dict[str, Moments] = {}
        self._source: dict[str, str] = {}  # layer to the name of its moments: layers that read the same share them
        self._read: dict[str, list[Tensor]] = {}  # in this forward pass
        self._layers: _Layers | None = None  # of the student between two prunes

    def start_step(self) -> None:
        self._moments = {name: Moments(*(DECAY * each for each in sums)) for name, sums in self._moments.items()}

    @contextmanager
    def recording(self, model: PreTrainedModel, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Add the moments of a forward pass, without padding where the mask (B, S) is 0."""
        layers = self._layers = self._layers or _Layers.of(model)
        with ExitStack() as hooks:
            hooks.callback(self._read.clear)
            if layers.hidden:
                hooks.enter_context(base_model(model).register_forward_hook(self._after_base))
            for name in (*layers.readers, *layers.tied, *layers.norms):
                after = partial(self._after, name, name in layers.norms)
                hooks.enter_context(model.get_submodule(name).register_forward_hook(after))
            yield
            base = base_name(model)
            self._sum(self._read, f"{base}." if base else "", attention_mask)

    def _after(self, name: str, is_norm: bool, _module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._read.setdefault(name, []).append(output if is_norm else inputs[0])

    def _after_base(self, _base, _inputs, outputs) -> None:
        if outputs.hidden_states is not None:  # not the call of the head, which has given states
            read = {f"{STATES}.{state}.": [states] for state, states in enumerate(outputs.hidden_states)}
            read |= {LAST: [outputs.last_hidden_state]}
            width = self._layers.hidden[0].size  # the last states of OPT-350m have another, which is fixed
            self._read |= {name: states for name, states in read.items() if states[0].shape[-1] == width}

    @torch.no_grad()
    def _sum(self, read: dict[str, list[Tensor]], base: str, attention_mask: Tensor | None) -> None:
        of_head = [name for name in read if not name.startswith((base, STATES))]
        if of_head and LAST in read:  # the head reads the last states, but at the few loss positions only
            read[of_head[0]] = read[LAST]
        same: dict[tuple, list[str]] = {}
        for name, states in read.items():
            same.setdefault(tuple(map(_identity, states)), []).append(name)
        for first, *others in same.values():
            self._source |= dict.fromkeys([first, *others], first)
            new = Moments.of(torch.cat([real_tokens(states, attention_mask) for states in read[first]]).float())
            past = self._moments.get(first)
            self._moments[first] = new if past is None else Moments(*map(torch.add, past, new))
        self._moments = {name: self._moments[name] for name in dict.fromkeys(self._source.values())}

    def share(self) -> None:
        """Give every process the mean of the moments of all; call it before `apply` and before a checkpoint."""
        for name, sums in self._moments.items():
            self._moments[name] = Moments(*(reduce(each, "mean") for each in sums))

    @torch.no_grad()
    def errors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The squared error that removing one neuron alone leaves in what layers make of it, by group, (N,) each.

        Of the residual stream and of the values of heads. After the fold it is |w_i|^2 / [C^-1]_ii, summed over all
        layers that read the neuron: w_i is the row of a layer's weight (D, out), C the covariance of what it reads
        (optimal brain surgeon, Hassibi et al., 1993).
        """
        layers, errors = self._layers or _Layers.of(model), {}
        fits = _Fits(self._moments, self._source, layers.readers, {})
        for name, (block, *_) in layers.readers.items():
            if name in self._source and block.group.endswith((HIDDEN, VALUE)):
                error = doubled(reader_weight(model, name).square().sum(1)) * fits.unexplained(name)
                errors[block.group] = errors.get(block.group, 0.0) + error
        return {group: error.float() for group, error in errors.items()}

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, loss: DistillationLoss, kept: dict[str, Tensor]) -> None:
        """Change weights so that `hdlib.narrow` to the neurons `kept` changes outputs and projections little."""
        layers = self._layers or _Layers.of(model)
        axes = layers.readers | layers.tied | layers.norms
        axes |= {name: layers.hidden for name in self._source if name.startswith(STATES)}
        fits = _Fits(self._moments, self._source, axes, kept)
        for name in filter(fits.narrows, layers.readers):
            bias = model.get_submodule(name).bias
            fold(reader_weight(model, name), bias, *fits.fit(name, centred=bias is not None))
        targets = {}  # of the norm before a decoder that shares its weights with the embedding: they cannot be folded
        for name in filter(fits.narrows, layers.tied):
            targets[self._source[name]] = expressed(model.get_submodule(name), fits.means(name)[0], fits.indices(name))
        for name in filter(fits.narrows, layers.norms):
            target = targets.get(self._source[name])
            refit_norm(model.get_submodule(name), *fits.means(name), fits.indices(name), target)
        for state, projection in enumerate([loss.embedding_projection, *loss.hidden_projections]):
            if fits.narrows(name := f"{STATES}.{state}."):
                fold(projection, None, *fits.fit(name, centred=False))
        self._moments = {name: sums.of_neurons(fits.indices(name)) for name, sums in self._moments.items()}
        if len(kept[LAYERS]) < len(loss.heads):
            self._keep_layers(kept, compared_states(kept[LAYERS].tolist(), len(loss.heads)))
        self._layers = None

    def _keep_layers(self, kept: dict[str, Tensor], states: list[int]) -> None:
        """Renumber the moments of layers that stay; layers that shared some may follow another layer from now on."""
        read = {name: self._moments[source] for name, source in self._source.items()}
        of_states = {name: read.pop(name) for name in list(read) if name.startswith(STATES)}
        new_states = {old: new for new, old in enumerate(states)}
        self._moments = renumbered(read, new_numbers(kept)) | renumbered(of_states, new_states)
        self._source = {name: name for name in self._moments}

    def state_dict(self) -> dict:
        return {"moments": {name: tuple(sums) for name, sums in self._moments.items()}, "source": dict(self._source)}

    def load_state_dict(self, state: dict) -> None:
        self._moments = {name: Moments(*sums) for name, sums in state["moments"].items()}
        self._source = dict(state["source"])


def _identity(states: Tensor) -> int:
    """The same for states and another view of all of them, which some models return."""
    base = states._base
    return id(states if base is None or base.numel() > states.numel() else base)


def real_tokens(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N, D) from states (B, S, D), without padding; other states, such as those of relative positions, are whole."""
    padded = attention_mask is not None and states.shape[:-1] == attention_mask.shape
    return states[attention_mask.to(states.device).bool()] if padded else states.flatten(0, -2)


class _Layers(NamedTuple):
    """The axes of the layers that read or scale neurons, by name."""

    readers: dict[str, Axis]  # linear layers with weights of their own
    tied: dict[str, Axis]  # a decoder whose weights are the embedding
    norms: dict[str, Axis]  # over the residual stream
    hidden: Axis  # the residual stream; None if its width is fixed

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Layers:
        axes, sites, readers, tied, norms = axes_of(model), sites_of(model), {}, {}, {}
        names = {parameter: name for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None:
                continue
            of_weight, axis = axes[names[weight]], input_axis(module)
            if axis is not None and of_weight[axis] and not of_weight[axis][0].group.endswith(FFN):
                (readers if len(sites[weight]) == 1 else tied)[name] = of_weight[axis]
            elif len(of_weight) == 1 and of_weight[0] and of_weight[0][0].group == HIDDEN:
                norms[name] = of_weight[0]
        hidden = (Block(HIDDEN, model.config.hidden_size, 1, 0, False),) if HIDDEN in width_groups(model) else None
        return cls(readers, tied, norms, hidden)


class _Fits:
    """The regressions of a prune, each made once for all layers that read the same."""

    def __init__(self, moments: dict[str, Moments], source: dict[str, str], axes: dict[str, Axis], kept):
        self.moments, self.source, self.axes, self.kept, self._made = moments, source, axes, kept, {}

    def indices(self, name: str) -> Tensor:
        return kept_indices(self.axes[name], self.kept).cpu()

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        return self.moments[self.source[name]].means()

    def narrows(self, name: str) -> bool:
        """Whether a layer has been read and loses neurons."""
        return name in self.source and len(self.indices(name)) < len(self.moments[self.source[name]].total)

    def fit(self, name: str, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        key = self.source[name], centred
        if key not in self._made:
            tokens, total, _ = self.moments[self.source[name]]
            read = PartialState().num_processes * tokens  # by all of them
            ridge = RIDGE if read > ENOUGH * len(total) else RIDGE_OF_FEW
            self._made[key] = regression(*self.means(name), self.indices(name), centred, ridge)
        return self._made[key]

    def unexplained(self, name: str) -> Tensor:
        """The variance of each neuron that a layer reads, (D,), which all others together do not explain."""
        key = self.source[name], ()
        if key not in self._made:
            mean, products = self.means(name)
            covariance = products - torch.outer(mean, mean)
            # After a norm each neuron is a function of all others, which a small ridge would take for no error.
            inverse = _solve(covariance, torch.eye(len(mean)).to(mean), RIDGE_OF_FEW)
            self._made[key] = 1 / inverse.diagonal()
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
    weights = _solve(covariance[kept][:, kept], covariance[kept][:, removed], ridge).T  # (P, K)
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
    targets = _solve(gram[kept][:, kept], gram[kept], RIDGE)
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
    shifted = layer_norm and norm.bias is not None
    scale, shift = norm.weight.to(mean)[kept], norm.bias.to(mean)[kept] if shifted else torch.zeros_like(mean[kept])
    inverse = torch.where(scale.abs() > 1e-4 * scale.abs().max(), 1 / scale, 0.0)  # x = scale n + shift, n normed
    center = mean if shifted else torch.zeros_like(mean)
    covariance = products - torch.outer(center, center)
    own = covariance[kept][:, kept] * torch.outer(inverse, inverse)  # of n
    with_targets = covariance[kept][:, kept] if targets is None else covariance[kept] @ targets.T
    with_targets = inverse[:, None] * with_targets  # of n_j and target i
    of_n = (mean[kept] - shift) * inverse
    second = products[kept][:, kept] * torch.outer(inverse, inverse) if not shifted else own + torch.outer(of_n, of_n)
    deviation = second.diagonal().mean()
    if layer_norm:  # the mean over neurons is subtracted
        deviation = deviation - second.mean()
        of_n = of_n - of_n.mean()
        own_of = own.diagonal() - 2 * own.mean(1) + own.mean()
        with_own = with_targets.diagonal() - with_targets.mean(0)
    else:
        own_of, with_own = own.diagonal(), with_targets.diagonal()
    new = deviation.sqrt() * with_own / own_of.clamp(min=torch.finfo(own.dtype).tiny)
    norm.weight[kept] = new.to(norm.weight)
    if shifted:
        mean_target = mean[kept] if targets is None else targets @ mean
        norm.bias[kept] = (mean_target - new * of_n / deviation.sqrt()).to(norm.bias)


def reader_weight(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of a linear layer, (D, out)."""
    module = model.get_submodule(name)
    return module.weight if input_axis(module) == 0 else module.weight.T


def input_axis(module: nn.Module) -> int | None:
    """The axis of a linear layer's weight that multiplies its input; None for other modules."""
    return 1 if isinstance(module, nn.Linear) else 0 if isinstance(module, Conv1D) else None


def _solve(products: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve (products + ridge x mean diagonal) X = right, with more ridge where rounding made a product negative."""
    size = products.diagonal().mean() + torch.finfo(products.dtype).tiny
    for factor in (1, 1e2, 1e4, 1e6):
        root, failed = torch.linalg.cholesky_ex(
            products + factor * ridge * size * torch.eye(len(products)).to(products)
        )
        if not failed:
            return torch.cholesky_solve(right, root)
    raise ArithmeticError("the moments of the states are not finite or not positive: lower learning_rate")
