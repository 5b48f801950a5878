"""Masks, for what narrowing cannot do: neurons that return, quotas over all layers, and the dense baseline.

A masked neuron stays in the model, but nothing reads it: during forward and backward the weights that multiply it are
zero, and norms compute their statistics over the other neurons. So a masked model computes what the narrowed model
would, at full cost. The weights are restored afterwards. Where neurons may return, these weights keep their gradients
(straight through), so that masked neurons are ranked with the others at the next prune.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import FFN, HEADS, HIDDEN, SHARED_HEADS, VALUE
from .losses import DistillationLoss
from .narrowing import check_scores, choose, narrow
from .widths import QUERY_KEY, Widths, all_neurons, axes_of, source_layers, width_groups

SCOPES = ("local", "global")
INPUT_AXIS = {nn.Linear: 1, Conv1D: 0, nn.Conv1d: 1}  # the axis of a module's weight that multiplies its input


class Masks:
    """Which neurons of a model are kept and which are masked; at first all are kept.

    Args:
        model: of a supported family. Its weights are changed while `applied` is open only.
        loss: its projections read the residual stream, so they are masked too.
        scope: "local", the same number of neurons in every layer (as in the paper), or "global", one ranking over
            all layers for each kind of group; layers then have different widths. ValueError for another scope.
        recover: masked neurons may return at the next `choose`.
    """

    def __init__(self, model: PreTrainedModel, loss: DistillationLoss | None = None, scope="local", recover=False):
        if scope not in SCOPES:
            raise ValueError(f"scope is one of {', '.join(SCOPES)}; got {scope!r}")
        self.model, self.loss, self.scope, self.recover = model, loss, scope, recover
        self._groups, self._axes = width_groups(model), axes_of(model)
        self.widths = Widths.of(model)
        self.kept = all_neurons(model)
        self._masked: list[tuple[nn.Parameter, int, Tensor]] = []  # of `_masked_weights`, on their device

    def choose(self, widths: Widths, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the highest scores, as many as `widths` gives, and mask the others; returns those kept.

        Without recovery, masked neurons stay masked. Scores, result and errors as for `hdlib.narrow`; also ValueError
        for fewer layers, which are no neurons, and without recovery for a shape wider than the masked one.
        """
        widths = widths.resolved(self.model)
        if widths.layers != (depth := self.model.config.num_hidden_layers):
            raise ValueError(f"layers={widths.layers}: layers cannot be masked; take layers={depth}, or leave them out")
        if not (self.recover or widths.fits_in(self.widths)):
            raise ValueError(f"{widths} is wider than {self.widths}, and masked neurons stay masked: give every width")
        check_scores(self._groups, scores)
        if self.scope == "global":
            self.kept = self.kept | self._choose_globally(widths, scores)
        else:
            wide = Widths.of(self.model) if self.recover else self.widths
            candidates = all_neurons(self.model) if self.recover else self.kept
            left = {name: score[candidates[name].to(score.device)] for name, score in scores.items()}
            chosen = choose(left, wide, widths, source_layers(self.model))
            self.kept = {name: candidates[name][indices.cpu()] for name, indices in chosen.items()}
        self.widths = widths
        self._place()
        return self.kept

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make forward and backward those of the masked model while open. Close it before the optimiser's step."""
        with ExitStack() as stack:
            for hook in self._mask_norms():
                stack.callback(hook.remove)
            for parameter, axis, indices in self._masked:
                stack.enter_context(_zeroed(parameter, axis, indices))
            yield

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Without recovery, set the gradients of masked weights to 0, as if these were removed."""
        if not self.recover:
            for parameter, axis, indices in self._masked:
                if parameter.grad is not None:
                    parameter.grad.index_fill_(axis, indices, 0.0)

    def export(self) -> None:
        """Remove the masked neurons, so that the model is a stock model. Raises ValueError for scope "global"."""
        if self.scope == "global":
            raise ValueError("scope='global' makes layers differ, which no stock class reads: use scope='local'")
        sizes = {name: group.size for name, group in self._groups.items()}
        narrow(self.model, self.widths, {n: torch.zeros(s).index_fill(0, self.kept[n], 1.0) for n, s in sizes.items()})

    def num_parameters(self) -> int:
        """The number of parameters without masked neurons."""

        def length(size: int, blocks) -> int:
            return size if blocks is None else sum(len(self.kept[block.group]) * block.unit for block in blocks)

        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        return sum(math.prod(map(length, shape, self._axes[name])) for name, shape in shapes.items())

    def state_dict(self) -> dict:
        return {"kept": self.kept, "widths": vars(self.widths)}

    def load_state_dict(self, state: dict) -> None:
        self.kept = {name: neurons.cpu() for name, neurons in state["kept"].items()}
        self.widths = Widths(**state["widths"])
        self._place()

    def _place(self) -> None:
        """Copy the indices that every step needs to the device, once for each choice."""
        self._masked = [*self._masked_weights()]
        if self.loss is not None:
            device, layers = self.loss.heads.device, range(len(self.loss.heads))
            self.loss.heads = torch.stack([self.kept[f"layer.{layer}.heads"] for layer in layers]).to(device)

    def _choose_globally(self, widths: Widths, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The highest scores over all layers, for each kind of group; at least one neuron in each layer."""
        inside, wide = widths.heads * widths.head_dim, Widths.of(self.model)
        quota = {HIDDEN: widths.hidden, FFN: widths.ffn, QUERY_KEY: inside, VALUE: inside, SHARED_HEADS: wide.heads}
        kept = {}
        for kind in {group.kind for group in self._groups.values()}:
            members = [name for name, group in self._groups.items() if group.kind == kind]
            count = quota[kind] if kind != HEADS else widths.heads * self._groups[members[0]].size // wide.heads
            ranked = []
            for name in members:
                score = scores[name].cpu().double().clone()  # Apple's devices have no float64
                if not self.recover:
                    score[_complement(self.kept[name], len(score))] = -1.0
                score[score.argmax()] += torch.finfo(torch.float64).max / 2  # the best of each layer is kept
                ranked.append(score)
            highest = torch.cat(ranked).sort(descending=True, stable=True).indices[: count * len(members)]
            is_kept = torch.zeros(sum(map(len, ranked)), dtype=torch.bool).index_fill(0, highest, True)
            layers = is_kept.split([len(score) for score in ranked])
            kept |= {name: layer.nonzero()[:, 0] for name, layer in zip(members, layers, strict=True)}
        return kept

    def _masked_weights(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """(parameter, axis, indices) of the weights that multiply masked neurons; for a query, its key is masked."""
        inputs = {(self.model.get_input_embeddings().weight, 1)}  # the output layer's weight too, where tied
        for module in self.model.modules():
            inputs |= {(module.weight, axis) for kind, axis in INPUT_AXIS.items() if isinstance(module, kind)}
        for name, axes in self._axes.items():
            parameter = self.model.get_parameter(name)
            for axis, blocks in enumerate(axes):
                is_input = (parameter, axis) in inputs
                read = [b for b in blocks or () if is_input or (b.group.endswith(QUERY_KEY) and not b.scaled)]
                masked = [block.indices(_complement(self.kept[block.group], block.size)) for block in read]
                if any(map(len, masked)):
                    yield parameter, axis, torch.cat(masked).to(parameter.device)
        if self.loss is not None and HIDDEN in self._groups:
            hidden = _complement(self.kept[HIDDEN], self._groups[HIDDEN].size)
            for projection in self.loss.parameters() if len(hidden) else ():
                yield projection, 0, hidden.to(projection.device)

    def _mask_norms(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Let norms over the residual stream compute their statistics over the kept neurons."""
        width, kept = self.model.config.hidden_size, self.kept.get(HIDDEN)
        if kept is None or len(kept) == width:
            return
        kept = kept.to(self.model.device)
        of_stream = {name for name, axes in self._axes.items() if [axis and axis[0].group for axis in axes] == [HIDDEN]}
        for name, module in self.model.named_modules():
            plain = isinstance(module, nn.LayerNorm) and module.weight is None and module.normalized_shape == (width,)
            if plain or (isinstance(module, nn.LayerNorm) and f"{name}.weight" in of_stream):
                yield module.register_forward_hook(_masked_layer_norm(kept))
            elif f"{name}.weight" in of_stream:  # a root mean square norm
                before, after = _masked_rms_norm(kept)
                yield module.register_forward_pre_hook(before)
                yield module.register_forward_hook(after)


def applied(masks: Masks | None) -> AbstractContextManager:
    """`masks.applied()`, or nothing if neurons are removed instead of masked."""
    return masks.applied() if masks is not None else nullcontext()


def _masked_layer_norm(kept: Tensor):
    """Mean and variance over the kept neurons; masked ones, being 0, would lower both."""

    def hook(norm: nn.LayerNorm, inputs, _output):
        counted = inputs[0][..., kept]
        mean = counted.mean(-1, keepdim=True)
        variance = (counted - mean).square().mean(-1, keepdim=True)
        normed = (inputs[0] - mean) / (variance + norm.eps).sqrt()
        if norm.weight is not None:
            normed = normed * norm.weight
        return normed if norm.bias is None else normed + norm.bias

    return hook


def _masked_rms_norm(kept: Tensor):
    """Scale the input so that its mean square over all neurons is that of the kept ones; undo it on the output."""
    ratios = []

    def before(_norm, inputs):
        states = inputs[0]
        counted = states[..., kept].square().mean(-1, keepdim=True)
        ratios.append((counted / states.square().mean(-1, keepdim=True)).sqrt())
        return states * ratios[-1], *inputs[1:]

    return before, lambda _norm, _inputs, output: output / ratios.pop()


def _complement(indices: Tensor, size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bool).index_fill(0, indices, False).nonzero()[:, 0]


@contextmanager
def _zeroed(parameter: nn.Parameter, axis: int, indices: Tensor) -> Iterator[None]:
    """Set part of a parameter to 0 in place while open."""
    weights = parameter.detach()  # the same memory
    values = weights.index_select(axis, indices)
    weights.index_fill_(axis, indices, 0.0)
    try:
        yield
    finally:
        weights.index_copy_(axis, indices, values)
