"""The fingerprint of a denoiser: how it is built, and, apart from that, a digest of its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cache4diffusion.anatomy.undisturbed import unwrapped

_PARAMETERS, _VALUES = 32, 16  # how many are looked at for the digest, and how many numbers of each


@dataclass(frozen=True)
class Fingerprint:
    """How a denoiser is built.

    Args:
        denoiser: name of its class.
        config: its configuration, where it has one.
        shapes: names of its parameters with ``*`` for numbers, and their shapes; how many there are of each. Adapters
            (LoRA) do not count.
        weights: digest of some of the weights, rounded to bfloat16; of what is made of several tensors (quantised
            numbers and their scales), of those. None where they cannot be read.
    """

    denoiser: str
    config: dict[str, Any]
    shapes: dict[str, int]
    weights: str | None = None

    def differences(self, other: Fingerprint) -> list[str]:
        """Fields in which another denoiser is built otherwise, each with both values; weights do not count."""
        if self.denoiser != other.denoiser:
            return [f"denoiser is {other.denoiser}, the calibration's {self.denoiser}"]
        found = []
        for field in ("config", "shapes"):
            mine, theirs = getattr(self, field), getattr(other, field)
            found += [
                f"{field}.{key} is {_words(theirs, key)}, the calibration's {_words(mine, key)}"
                for key in sorted(mine.keys() | theirs.keys())
                if mine.get(key) != theirs.get(key)
            ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def fingerprint_of(denoiser: nn.Module) -> Fingerprint:
    """Take the fingerprint of a denoiser, compiled or accelerated or not."""
    plain = unwrapped(denoiser)
    config = getattr(plain, "config", None)
    entries = dict(config) if hasattr(config, "keys") else {}  # type: ignore[arg-type]
    entries = {key: value for key, value in entries.items() if not str(key).startswith("_")}
    parameters = {_plain_name(name): value for name, value in plain.named_parameters() if "lora_" not in name}
    shapes = Counter(f"{_pattern(name)} {list(value.shape)}" for name, value in parameters.items())
    return Fingerprint(
        type(plain).__name__,
        json.loads(json.dumps(entries, default=str)),
        dict(sorted(shapes.items())),
        _digest(parameters),
    )


def _plain_name(name: str) -> str:
    """Without what adapters and compilation put into it."""
    return name.replace("_orig_mod.", "").replace("base_layer.", "")


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _digest(parameters: dict[str, Any]) -> str | None:
    names = sorted(parameters)
    digest = hashlib.sha256()
    for name in names[:: max(len(names) // _PARAMETERS, 1)]:
        digest.update(name.encode())
        pieces = _pieces(parameters[name])
        for value in pieces:
            is_packed = len(pieces) == 1 and not value.is_floating_point()
            if value.is_meta or is_packed or not value.numel():
                return None
            flat = value.detach().flatten()
            picked = flat[:: max(flat.numel() // _VALUES, 1)][:_VALUES]
            digest.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _pieces(value: Tensor) -> list[Tensor]:
    """The tensors that a parameter is made of, where there are several, else itself."""
    names = value.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(value) else ()
    return [getattr(value, name) for name in names] if len(names) > 1 else [value]


def _words(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "missing"
