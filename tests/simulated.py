"""A device that is none of those PyTorch knows: every operator runs on the host, and its tensors mix with no others.

It is registered once and for ever, and becomes the process's accelerator: only for processes of their own. It has no
streams, no events that tell the time, and no allocator that counts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "simulated"
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
_MEMORY: dict[int, Tensor] = {}  # bytes on the host, by storage
_VIEWS = ("as_strided", "view", "_reshape_alias", "unfold", "view.dtype")
_MADE = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm")  # PyTorch resizes these
_RESIZED = ("abs",)  # and these, which are given tensors
_LIBRARIES = []  # what is registered lives as long as these


class _Module:
    """What stands at ``torch.simulated``: no streams, no allocator."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def synchronize(self, device=None):
        pass

    def manual_seed_all(self, seed):
        pass

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """Make the device known to PyTorch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_on_the_host, "PrivateUse1")
    aten.impl("empty.memory_format", lambda size, dtype=None, **_: _room(size, None, dtype), "PrivateUse1")
    aten.impl("empty_strided", lambda size, stride, dtype=None, **_: _room(size, stride, dtype), "PrivateUse1")
    aten.impl("_copy_from", _copy, "PrivateUse1")
    aten.impl("_fused_sdp_choice", lambda *args, **kwargs: 0, "PrivateUse1")  # attention by plain operators
    aten.impl("convolution_overrideable", partial(_on_the_host, _operator("convolution")), "PrivateUse1")
    for name in _VIEWS:
        aten.impl(name, partial(_operator(name).redispatch, _META), "PrivateUse1")
    for name in _MADE:
        aten.impl(name, partial(_made, _operator(name)), "PrivateUse1")
    for name in _RESIZED:
        aten.impl(name, partial(_on_the_host, _operator(name)), "PrivateUse1")
    _LIBRARIES.extend((everything, aten))
    return torch.device(NAME, 0)


def can_register() -> bool:
    """Whether this PyTorch takes devices from Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def _operator(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _made(operator, *args, **kwargs) -> Tensor:
    return _moved(operator(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))


def _moved(x: Tensor) -> Tensor:
    tensor = _room(x.shape, x.stride(), x.dtype)
    _host(tensor).copy_(x)
    return tensor


def _room(size, stride, dtype) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    if stride is None or not len(size):
        size, stride = tuple(size), torch.empty(tuple(size), device="meta").stride()
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
    tensor = torch._C._acc.create_empty_tensor((count,), dtype)
    _MEMORY[tensor.untyped_storage()._cdata] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8)
    return tensor.as_strided(tuple(size), tuple(stride))


def _host(x):
    """The same memory, as a tensor of the host."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if not isinstance(x, Tensor) or x.device.type != NAME:
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim:
            raise RuntimeError("a tensor of the CPU was given to an operator of another device")
        return x
    flat = _MEMORY[x.untyped_storage()._cdata].view(x.dtype)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def _copy(source, target, non_blocking=False):
    into = _host(target) if target.device.type == NAME else target
    into.copy_(_host(source) if source.device.type == NAME else source)
    return target


def _on_the_host(operator, *args, **kwargs):
    if operator.is_view:
        raise NotImplementedError(f"the simulated device has no {operator}: it must share memory")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    hosts = [_host(leaf) for leaf in leaves]
    given = {id(host): leaf for host, leaf in zip(hosts, leaves, strict=True) if isinstance(leaf, Tensor)}
    args, kwargs = pytree.tree_unflatten(hosts, spec)

    def back(x):
        if not isinstance(x, Tensor) or id(x) in given:
            return given.get(id(x), x)
        return _moved(x)

    return pytree.tree_map(back, operator(*args, **kwargs))
