"""What can be told of a denoiser without a forward: enough to refuse a method that cannot work on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cache4diffusion.anatomy.arguments import parameter_names, timestep_name
from cache4diffusion.anatomy.undisturbed import unwrapped

_LEVELS = (("down", "up"), ("input_blocks", "output_blocks"), ("in_blocks", "out_blocks"), ("encoder", "decoder"))


@dataclass(frozen=True)
class Outline:
    """A denoiser from the outside.

    Args:
        denoiser: class name.
        lists: ``(path, number of blocks)`` of every outermost list of at least two block-like modules.
        is_unet_like: whether two lists go by the names of a U-Net's two sides. A forward may show otherwise.
        timestep: name of the forward's parameter that is the clock, None if no name is known for one.
        parameters: names of the forward's parameters.
    """

    denoiser: str
    lists: tuple[tuple[str, int], ...]
    is_unet_like: bool
    timestep: str | None
    parameters: tuple[str, ...]


def describe(denoiser: nn.Module) -> Outline:
    """Return the static facts of ``denoiser``. Costs microseconds; nothing is run."""
    denoiser = unwrapped(denoiser)
    names = parameter_names(denoiser)
    found: list[tuple[str, int]] = []
    for path, module in denoiser.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{p}.") for p, _ in found):
            continue
        blocks = [child for child in module if _is_block(child)]
        if len(blocks) >= 2 and len(blocks) == len(module):
            found.append((path, len(module)))
    sides = [path for path, module in denoiser.named_children() if isinstance(module, nn.ModuleList)]
    is_unet_like = any(
        any(down in path for path in sides) and any(up in path for path in sides) for down, up in _LEVELS
    )
    return Outline(type(denoiser).__name__, tuple(found), is_unet_like, timestep_name(names), tuple(names))


def _is_block(module: nn.Module) -> bool:
    """Whether a module consists of several modules that have weights: more than a projection or a norm."""
    inside = list(unwrapped(module).modules())[1:]
    return sum(any(True for _ in child.parameters(recurse=False)) for child in inside) >= 2
