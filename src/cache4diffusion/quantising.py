"""Weights in few bits, by torchao, that can be had back.

A cache takes steps away, few bits take bytes and time from those that are left. They meet in `CacheQuant`, which
measures a denoiser as it is: so it is quantised first, here or by the user's own means (diffusers' ``TorchAoConfig``,
quanto, bitsandbytes), never behind anybody's back.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cache4diffusion.accelerate import denoisers_of
from cache4diffusion.errors import AlreadyAcceleratedError, SettingError, closest
from cache4diffusion.wrap import owner_of

CONFIGS = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8WeightOnlyConfig",
}
"""torchao's configurations, by the names they have here."""


@dataclass(frozen=True)
class _Layer:
    """A layer as it was."""

    parent: nn.Module
    name: str
    linear: nn.Linear
    weight: nn.Parameter
    device: torch.device
    attributes: dict[str, Any]

    def put_back(self) -> None:
        """The weight as it was, to where the layer is now; if that cannot be told, to where it was."""
        now = self.linear.weight.device
        self.weight.data = self.weight.data.to(self.device if now.type == "meta" else now)
        self.linear.weight = self.weight
        for name in set(self.linear.__dict__) - set(self.attributes):
            del self.linear.__dict__[name]  # what describes the quantised layer
        setattr(self.parent, self.name, self.linear)


class Quantised:
    """What `quantised` did; `remove` undoes it, and so does leaving it as a context manager."""

    def __init__(self, layers: list[_Layer], bits: str) -> None:
        self._layers, self.bits = layers, bits

    def __repr__(self) -> str:
        return f"<{len(self._layers)} linear layers in {self.bits}>"

    def __len__(self) -> int:
        """Layers that are quantised now."""
        return len(self._layers)

    def remove(self) -> None:
        """Put the weights back that were there. A second time changes nothing."""
        layers, self._layers = self._layers, []
        for layer in layers:
            layer.put_back()

    def __enter__(self) -> Quantised:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def quantised(target: Any, bits: Any = "int8") -> Quantised:
    """Quantise the linear layers inside the blocks of a pipeline's denoisers (or of one denoiser), until ``remove()``.

        with c4d.quantised(pipe, "int8"):
            made = c4d.calibrate(pipe, "cachequant", prompts, unit="span", cache_dtype="int8")
            with c4d.accelerate(pipe, "cachequant", calibration=made, cache_dtype="int8"):
                ...

    Before `accelerate`, and before a calibration that is to know of it. Embeddings, modulation outside of blocks, the
    last projection and convolutions stay as they are, and so does a weight that two layers share. The weights
    themselves wait in the host's memory. torchao does the work; some of its kernels need a certain accelerator.

    Args:
        target: a diffusers pipeline, or a denoiser.
        bits: ``"int8"`` (weights alone), ``"int8-dynamic"`` (activations as well, with scales found on the way),
            ``"fp8"`` (weights alone), or a configuration of torchao's own.

    Raises:
        SettingError: torchao is not installed, another name, or there is nothing to quantise.
        AlreadyAcceleratedError: the denoiser is accelerated.
    """
    try:
        torchao = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise SettingError(
            "quantised() needs torchao, which is not installed: pip install torchao. Or quantise the denoiser by other "
            "means; a calibration takes it as it is."
        ) from error
    if isinstance(bits, str):
        if bits not in CONFIGS:
            raise SettingError(
                f"quantised(bits={bits!r}){closest(bits, CONFIGS) or '.'} Use one of {', '.join(CONFIGS)}, or a "
                "configuration of torchao's."
            )
        config, words = getattr(torchao, CONFIGS[bits])(), bits
    else:
        config, words = bits, type(bits).__name__
    found = denoisers_of(target)
    for name, denoiser in found.items():
        if owner_of(denoiser) is not None:
            raise AlreadyAcceleratedError(
                f"{name} is accelerated: what is cached was computed with the weights it has. Quantise first, or call "
                "handle.remove()."
            )
    layers = [layer for denoiser in found.values() for layer in _layers(denoiser)]
    if not layers:
        raise SettingError(
            f"quantised({type(target).__name__}): there is no linear layer with weights of floating-point numbers "
            "inside a list of blocks; quantised ones cannot be quantised again."
        )
    made = Quantised(layers, words)
    chosen = {layer.linear for layer in layers}
    try:
        for denoiser in found.values():
            torchao.quantize_(denoiser, config, filter_fn=lambda module, path: module in chosen)
    except BaseException:
        made.remove()
        raise
    for layer in layers:
        if layer.linear.weight is not layer.weight:
            layer.weight.data = layer.weight.data.to("cpu")
    return made


def _layers(denoiser: nn.Module) -> Iterator[_Layer]:
    """The linear layers inside lists of modules whose weights are plain and their own."""
    shared = Counter(id(parameter) for _, parameter in denoiser.named_parameters(remove_duplicate=False))
    lists = [f"{path}." for path, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in denoiser.named_modules():
        if type(module) is not nn.Linear or not path.startswith(tuple(lists)):
            continue
        weight = module._parameters["weight"]
        if (
            weight is not None
            and type(weight.data) is torch.Tensor
            and weight.is_floating_point()
            and shared[id(weight)] == 1
        ):
            parent, _, name = path.rpartition(".")
            yield _Layer(denoiser.get_submodule(parent), name, module, weight, weight.device, dict(module.__dict__))
