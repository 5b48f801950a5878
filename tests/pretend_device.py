"""A pretend accelerator: device "shadow", whose tensors hold CPU memory and refuse to meet CPU tensors.

It shows on a machine without a GPU where code mixes devices or dtypes, and where it waits for the device or copies to
it. Autocast casts matrix products as on a GPU. `pretend_device` is the fixture; while it is active `hdlib.distill` runs
on the device.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from hdlib import config, narrowing

_setup_privateuseone_for_python_backend("shadow")
torch.shadow.get_amp_supported_dtype = lambda: [torch.bfloat16]
DEVICE = torch.device("shadow:0")
LIBRARY = str(Path(narrowing.__file__).parent)
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default}
PRODUCTS |= {aten.baddbmm.default, aten.scaled_dot_product_attention.default}  # in autocast's dtype
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


def tree_map(function, value):
    """Like that of torch, five times as fast, for the arguments and results of operations."""
    if isinstance(value, list | tuple):
        return type(value)([tree_map(function, each) for each in value])
    if isinstance(value, dict):
        return {name: tree_map(function, each) for name, each in value.items()}
    return function(value)


def tensors_of(value) -> list[torch.Tensor]:
    leaves = []
    tree_map(leaves.append, value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


OTHERS = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
OTHERS.fallback(torch.library.fallthrough_kernel)
AUTOCAST = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
for _product in PRODUCTS:

    def _cast(*arguments, product=_product, **options):
        def lower(value):
            low = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device.type == "shadow"
            return value.to(torch.get_autocast_dtype("shadow")) if low else value

        with torch.autocast("shadow", enabled=False):
            return product(*tree_map(lower, arguments), **tree_map(lower, options))

    AUTOCAST.impl(_product, _cast)


class Shadow(torch.Tensor):
    """A tensor of the device; `inner` is its memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"Shadow({self.inner})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise RuntimeError(f"{function} on a tensor of the pretend device outside of its fixture")


class PretendDevice(TorchDispatchMode):
    """Runs every operation on the memory inside; `waits` and `copies` count its meetings with the host by place."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()  # the host waits for the device: a number or a mask is read
        self.copies: Counter[str] = Counter()  # a CPU tensor is copied to the device
        self.doubles: Counter[str] = Counter()  # numbers in float64 on the device, which Apple's devices do not have

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        tensors = tensors_of((arguments, options))
        shadows = [tensor for tensor in tensors if isinstance(tensor, Shadow)]
        target = options.get("device")
        wrap = bool(shadows) if target is None else torch.device(target).type == "shadow"
        if function is aten.copy_.default:
            wrap = isinstance(arguments[0], Shadow)
        self._count(function, arguments, shadows, tensors, wrap)
        if wrap and target is not None:
            options = options | {"device": torch.device("cpu")}
        with _disable_current_modes(), torch.no_grad():
            out = function(*tree_map(_inside, arguments), **tree_map(_inside, options))
        if wrap and any(tensor.dtype == torch.float64 for tensor in tensors_of(out)):
            self.doubles[_place()] += 1
        wrappers = {id(tensor.inner): tensor for tensor in shadows}  # what was changed in place is the same tensor
        given = {id(tensor) for tensor in tensors}

        def outside(value):
            if not isinstance(value, torch.Tensor) or id(value) in given:
                return value
            if id(value) in wrappers:
                return wrappers[id(value)]
            return Shadow(value) if wrap else value

        return tree_map(outside, out)

    def _count(self, function, arguments, shadows: list, tensors: list, wrap: bool) -> None:
        """Count a wait or a copy; raise RuntimeError where a GPU would: for tensors on two devices."""
        if function in (aten.copy_.default, aten._to_copy.default):
            source = arguments[1] if function is aten.copy_.default else arguments[0]
            if isinstance(source, Shadow) != wrap:
                (self.copies if wrap else self.waits)[_place()] += 1
            return
        if not shadows:
            return
        if function in WAITING:
            self.waits[_place()] += 1
        others = [tensor for tensor in tensors if not isinstance(tensor, Shadow) and tensor.dim() > 0]
        if function in INDEXING:  # a GPU takes indices of the CPU, copied each time, for a tensor of its own
            indices = [index for index in arguments[1] if index is not None]
            self.waits[_place()] += any(index.dtype == torch.bool for index in indices)
            self.copies[_place()] += any(not isinstance(index, Shadow) for index in indices)
            others = [] if isinstance(arguments[0], Shadow) else [arguments[0]]
        if others:
            shapes = [tuple(tensor.shape) for tensor in others]
            raise RuntimeError(f"{function} meets CPU tensors of shapes {shapes} on the device, at {_place()}")


def _inside(value):
    return value.inner if isinstance(value, Shadow) else value


def _place() -> str:
    """File, line and text of the innermost frame in the library."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    if frame is None:
        return "outside of the library"
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).relative_to(LIBRARY)}:{line} {linecache.getline(file, line).strip()}"


@pytest.fixture
def pretend_device(monkeypatch):
    """`hdlib.distill` runs on the device; files are written and read through the CPU, which safetensors cannot do."""
    check, save_pretrained = narrowing.check_narrowable, PreTrainedModel.save_pretrained
    torch_save, torch_load = torch.save, torch.load
    device = PretendDevice()

    def check_narrowable(model, widths):
        if model.device.type != "shadow":
            return check(model, widths)
        # The real check refuses every subclass of Tensor.
        return narrowing.stock_model(model, replace(widths, layers=model.config.num_hidden_layers))

    def save(model, *arguments, **options):
        save_pretrained(deepcopy(model).cpu(), *arguments, **options)

    def save_state(state, file):
        torch_save(tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, state), file)

    def load_state(file, map_location="cpu", **options):
        state = torch_load(file, map_location="cpu", **options)
        return tree_map(lambda leaf: leaf.to(map_location) if isinstance(leaf, torch.Tensor) else leaf, state)

    # Module.to makes new parameters of a subclass of Tensor, which cuts ties, unless it may swap them.
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    monkeypatch.setattr(torch.random, "fork_rng", partial(torch.random.fork_rng, devices=[]))
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    for module in (narrowing, config):
        monkeypatch.setattr(module, "check_narrowable", check_narrowable)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    monkeypatch.setattr(torch, "save", save_state)
    monkeypatch.setattr(torch, "load", load_state)
    with device:
        yield device
