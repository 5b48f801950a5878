"""Masks, for what cannot be had by removing neurons: recovery, quotas over all layers, the dense baseline.

A masked neuron is still there but nobody reads it: the weights with which others read it are zero
whenever the model computes, and norms take their statistics over the neurons that count. So a masked
model computes what the narrowed one would, at the full price. The weights themselves wait beside, and
where neurons may return they keep their gradients (straight through), so that a masked neuron competes
with the others at the next ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import FFN, HEADS, HIDDEN, SHARED_HEADS, VALUE
from .losses import DistillationLoss
from .narrowing import check_scores, choose_among, narrow
from .widths import QUERY_KEY, Widths, all_neurons, axes_of, layer_of_parameters, width_groups

# The axis along which a module reads: its input.
READING_AXIS = {nn.Linear: 1, Conv1D: 0, nn.Conv1d: 1}


class Masks:
    """Which neurons of a model count; all of them at first.

    Args:
        model: of a supported family. Its weights are only changed while `applied`.
        loss: its projections read the residual stream, so they are masked along.
        scope: "local", the same number of neurons in every layer (the paper's quota), or "global", the
            neurons of all layers in one ranking for each kind of group: layers get widths of their own.
        recover: neurons that were masked may return when neurons are chosen again.

    Raises:
        ValueError: an unknown scope.
    """

    def __init__(
        self, model: PreTrainedModel, loss: DistillationLoss | None = None, scope="local", recover: bool = False
    ):
        if scope not in SCOPES:
            raise ValueError(f"scope is one of {', '.join(SCOPES)}; got {scope!r}")
        self.model, self.loss, self.scope, self.recover = model, loss, scope, recover
        self._groups, self._axes = width_groups(model), axes_of(model)
        self.widths = Widths.of(model)
        self.kept = all_neurons(model)

    def choose(self, widths: Widths, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the highest scores count, as many as `widths` says; returns them, as `hdlib.narrow` does.

        Without recovery the choice is among the neurons that still count.
        """
        check_scores(self._groups, scores)
        if self.scope == "global":
            self.kept |= self._choose_globally(widths, scores)
        elif self.recover:
            chosen = choose_among(scores, Widths.of(self.model), widths, layer_of_parameters(self.model))
            self.kept = {name: indices.cpu() for name, indices in chosen.items()}
        else:
            left = {name: score[self.kept[name]] for name, score in scores.items()}
            chosen = choose_among(left, self.widths, widths, layer_of_parameters(self.model))
            self.kept = {name: self.kept[name][indices.cpu()] for name, indices in chosen.items()}
        self.widths = widths
        self._pair_heads()
        return self.kept

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While this is open, forward and backward are those of the masked model. Close it before the optimiser."""
        with ExitStack() as stack:
            hidden = self.kept.get(HIDDEN)
            if hidden is not None and len(hidden) < self.model.config.hidden_size:
                for hook in self._mask_norms(hidden):
                    stack.callback(hook.remove)
            hidden_away = [
                (parameter, axis, out, _zero(parameter, axis, out)) for parameter, axis, out in self._reading()
            ]
            try:
                yield
            finally:
                # Backwards: what two of them have in common was still there when the first was hidden.
                for parameter, axis, out, values in reversed(hidden_away):
                    _put_back(parameter, axis, out, values)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Without recovery, what is masked has no gradient, as if it were not there."""
        if not self.recover:
            for parameter, axis, out in self._reading():
                if parameter.grad is not None:
                    parameter.grad.index_fill_(axis, out, 0.0)

    def export(self) -> None:
        """Remove from the model what is masked, so that it is a stock model of the masked one's behaviour.

        Raises:
            ValueError: after a global quota, since no stock class has layers of different widths.
        """
        if self.scope == "global":
            raise ValueError(
                "neurons were ranked over all layers (scope='global'), so layers have different widths, which no stock "
                "class can hold: such a student exists under its masks only. scope='local' gives one that can be saved"
            )
        chosen = {
            name: torch.zeros(group.size).index_fill(0, self.kept[name].cpu(), 1.0)
            for name, group in self._groups.items()
        }
        narrow(self.model, self.widths, chosen)

    def num_parameters(self) -> int:
        """Of the model without what is masked."""

        def length(size: int, blocks) -> int:
            return size if blocks is None else sum(len(self.kept[block.group]) * block.unit for block in blocks)

        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        return sum(math.prod(map(length, shape, self._axes[name])) for name, shape in shapes.items())

    def state_dict(self) -> dict:
        return {"kept": self.kept, "widths": vars(self.widths)}

    def load_state_dict(self, state: dict) -> None:
        self.kept, self.widths = dict(state["kept"]), Widths(**state["widths"])
        self._pair_heads()

    def _pair_heads(self) -> None:
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
                score = scores[name].double().clone()
                if not self.recover:
                    left = self.kept[name].to(score.device)
                    score = torch.full_like(score, -1.0).index_copy(0, left, score[left])
                score[score.argmax()] += torch.finfo(torch.float64).max / 2  # the best of each layer stays
                ranked.append(score)
            highest = torch.cat(ranked).sort(descending=True, stable=True).indices[: count * len(members)]
            counts = torch.zeros(sum(map(len, ranked)), dtype=torch.bool).index_fill(0, highest.cpu(), True)
            parts = counts.split([len(score) for score in ranked])
            kept |= {name: part.nonzero()[:, 0] for name, part in zip(members, parts, strict=True)}
        return kept

    def _reading(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """(parameter, axis, indices): with what masked neurons are read. A query is read by its key."""
        read = {(self.model.get_input_embeddings().weight, 1)}  # by the output, where the two are tied
        for module in self.model.modules():
            read |= {(module.weight, axis) for kind, axis in READING_AXIS.items() if isinstance(module, kind)}
        for name, axes in self._axes.items():
            parameter = self.model.get_parameter(name)
            for axis, blocks in enumerate(axes):
                keys = any(block.group.endswith(QUERY_KEY) and not block.scaled for block in blocks or ())
                if blocks and (keys or (parameter, axis) in read):
                    out = self._masked_places(blocks, keys_only=(parameter, axis) not in read)
                    if len(out):
                        yield parameter, axis, out.to(parameter.device)
        if self.loss is not None and HIDDEN in self._groups:
            out = _complement(self.kept[HIDDEN], self._groups[HIDDEN].size)
            if len(out):
                yield from ((projection, 0, out.to(projection.device)) for projection in self.loss.parameters())

    def _masked_places(self, blocks, keys_only: bool) -> Tensor:
        """Where masked neurons lie on an axis; of a fused query-key-value matrix, where their keys do."""

        def counted(block) -> Tensor:
            everything = keys_only and (block.scaled or not block.group.endswith(QUERY_KEY))
            return torch.arange(block.size) if everything else self.kept[block.group].cpu()

        starts, start = [], 0
        for block in blocks:
            starts.append(start + block.places(counted(block)))
            start += block.size * block.unit
        return _complement(torch.cat(starts), start)

    def _mask_norms(self, hidden: Tensor) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Norms over the residual stream take their statistics over the neurons that count."""
        width, counts = self.model.config.hidden_size, hidden.to(self.model.device)
        of_stream = {name for name, axes in self._axes.items() if len(axes) == 1 and axes[0] and _is_hidden(axes[0])}
        for name, module in self.model.named_modules():
            plain = isinstance(module, nn.LayerNorm) and module.weight is None and module.normalized_shape == (width,)
            if plain or (isinstance(module, nn.LayerNorm) and f"{name}.weight" in of_stream):
                yield module.register_forward_hook(_masked_layer_norm(counts))
            elif f"{name}.weight" in of_stream:  # a root mean square norm
                before, after = _masked_rms_norm(counts)
                yield module.register_forward_pre_hook(before)
                yield module.register_forward_hook(after)


SCOPES = ("local", "global")


def applied(masks: Masks | None) -> AbstractContextManager:
    """`masks.applied()`, or nothing where neurons are removed instead."""
    return masks.applied() if masks is not None else nullcontext()


def _masked_layer_norm(counts: Tensor):
    """Mean and variance over the neurons that count: with zeroed coordinates among them both would shrink."""

    def hook(norm: nn.LayerNorm, inputs, _output):
        counted = inputs[0][..., counts]
        mean = counted.mean(-1, keepdim=True)
        variance = (counted - mean).square().mean(-1, keepdim=True)
        normed = (inputs[0] - mean) / (variance + norm.eps).sqrt()
        if norm.weight is not None:
            normed = normed * norm.weight
        return normed if norm.bias is None else normed + norm.bias

    return hook


def _masked_rms_norm(counts: Tensor):
    """The mean square over the neurons that count: inputs are scaled so that the module finds just that one.

    Whatever else the module does is its own affair, and linear in the states that it is given.
    """
    ratios = []

    def before(_norm, inputs):
        states = inputs[0]
        counted = states[..., counts].square().mean(-1, keepdim=True)
        ratios.append((counted / states.square().mean(-1, keepdim=True)).sqrt())
        return states * ratios[-1], *inputs[1:]

    return before, lambda _norm, _inputs, output: output / ratios.pop()


def _is_hidden(blocks) -> bool:
    return len(blocks) == 1 and blocks[0].group == HIDDEN


def _complement(indices: Tensor, size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bool).index_fill(0, indices.cpu(), False).nonzero()[:, 0]


@torch.no_grad()
def _zero(parameter: nn.Parameter, axis: int, indices: Tensor) -> Tensor:
    values = parameter.index_select(axis, indices)
    parameter.index_fill_(axis, indices, 0.0)
    return values


@torch.no_grad()
def _put_back(parameter: nn.Parameter, axis: int, indices: Tensor, values: Tensor) -> None:
    parameter.index_copy_(axis, indices, values)
