"""A denoiser class at a size that runs in milliseconds: its configuration, and the arguments of a real call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Arguments = dict[str, Any]


def noise(*shape: int) -> Tensor:
    """Normal noise."""
    return torch.randn(*shape)


def places(*sizes: int, axes: int) -> Tensor:
    """``[tokens, axes]``: the place of every token of a grid, on the last of the axes (zeros on the others)."""
    grid = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
    first = (axes - len(sizes) + 1) // 2
    return torch.nn.functional.pad(grid, (first, axes - len(sizes) - first)).float()


def nothing(batch: int) -> Arguments:
    """No argument but those that follow from the signature."""
    return {}


@dataclass(frozen=True)
class Tiny:
    """One class of diffusers, small.

    What follows from the signature of its ``forward`` and from the rest is not written down: see `_RULES`.

    Args:
        kind: name of the class.
        config: its configuration; lengths and widths differ, so that no axis is taken for another.
        latent: shape of what is denoised, the first argument, without the batch; empty: it is in ``more``.
        text: length and width of the text.
        grid: of the latent's tokens, where they are handed over in a row.
        time: the clock's value: one of 0 .. 1000, or of 0 .. 1.
        more: what no rule knows, by batch size; None leaves out what a rule gives.
        batches: whether it takes a batch; some take one sample in a packed row of tokens.
        adapt: what is done to a fresh module.
        is_padded: whether the last row's text is shorter than the others', where a mask tells.
    """

    kind: str
    config: Mapping[str, Any]
    latent: tuple[int, ...] = ()
    text: tuple[int, int] | None = None
    grid: tuple[int, ...] = ()
    time: float = 500.0
    more: Callable[[int], Arguments] = field(default=nothing)
    batches: bool = True
    adapt: Callable[[nn.Module], None] | None = None
    is_padded: bool = False

    @property
    def cls(self) -> type[nn.Module]:
        """The class."""
        import diffusers

        return getattr(diffusers, self.kind)

    def make(self, batch: int = 2) -> Case:
        """The denoiser with weights of noise, and arguments of a call.

        All matrices are noise, as some classes leave theirs as the memory was; so are vectors that a fresh model has at
        zero, as a gate of zero would hide what it gates. The same denoiser every time; nobody's random numbers change.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.cls(**self.config)
            if self.adapt is not None:
                self.adapt(module)
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                elif not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
            torch.manual_seed(1)
            kwargs = self.arguments(batch)
        return module.eval().requires_grad_(False), (), kwargs

    def arguments(self, batch: int) -> Arguments:
        """Arguments of a call, by name."""
        names = list(inspect.signature(self.cls.forward).parameters)[1:]
        given: Arguments = {names[0]: noise(batch, *self.latent)} if self.latent else {}
        for name in names:
            if name in _RULES:
                given[name] = _RULES[name](self, batch)
        given |= self.more(batch)
        return {name: value for name, value in given.items() if value is not None}


def _clock(tiny: Tiny, batch: int) -> Tensor:
    return torch.full((batch,), tiny.time)


def _text(tiny: Tiny, batch: int) -> Tensor | None:
    return None if tiny.text is None else noise(batch, *tiny.text)


def _mask(tiny: Tiny, batch: int) -> Tensor | None:
    if tiny.text is None:
        return None
    mask = torch.ones(batch, tiny.text[0], dtype=torch.bool)
    mask[-1, tiny.text[0] - tiny.is_padded :] = False
    return mask


def _pooled(tiny: Tiny, batch: int) -> Tensor | None:
    width = tiny.config.get("pooled_projection_dim")
    return None if width is None else noise(batch, width)


def _guidance(tiny: Tiny, batch: int) -> Tensor | None:
    return torch.full((batch,), 3.5) if tiny.config.get("guidance_embeds") else None


def _image_places(tiny: Tiny, batch: int) -> Tensor | None:
    return places(*tiny.grid, axes=len(tiny.config["axes_dims_rope"])) if tiny.grid else None


def _text_places(tiny: Tiny, batch: int) -> Tensor | None:
    return None if tiny.text is None or not tiny.grid else torch.zeros(tiny.text[0], len(tiny.config["axes_dims_rope"]))


_RULES: dict[str, Callable[[Tiny, int], Any]] = {
    "timestep": _clock,
    "timesteps": _clock,
    "encoder_hidden_states": _text,
    "encoder_attention_mask": _mask,
    "encoder_hidden_states_mask": _mask,
    "pooled_projections": _pooled,
    "guidance": _guidance,
    "img_ids": _image_places,
    "txt_ids": _text_places,
}
"""What an argument of this name is made from; None if it is not given."""
