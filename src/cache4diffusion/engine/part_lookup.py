"""Which parts of a denoiser a site has, and what enters them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cache4diffusion.anatomy import Block, Inner, Part
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_argument
from cache4diffusion.sites import Parts


def units_of(host: Host, site: Parts) -> list[Part]:
    """The units of an examined U-Net's levels that a site has, in order; parts inside them are none of it."""
    assert host.anatomy is not None
    units = () if host.anatomy.unet is None else host.anatomy.unet.units
    return [unit for unit in units if unit.kind in site.kinds]


def blocks_of(host: Host) -> list[tuple[int, Block]]:
    """The blocks of an examined denoiser in which parts are cached, in order, each with its position.

    Blocks in front of a gate's watch point always run, so they are left alone.
    """
    assert host.anatomy is not None
    main = [block for stack in host.anatomy.main for block in stack.blocks]
    nested = [block for stack in host.anatomy.stacks if not stack.is_main for block in stack.blocks]
    if main and not host.is_unet:
        nested = []
    return list(enumerate(main))[host.watched_blocks :] + [(len(main) + i, block) for i, block in enumerate(nested)]


def parts_of(block: Block, site: Parts, units: Sequence[Part] = ()) -> list[Part]:
    """The parts of a block that a site has, none of them inside one of its units."""
    whole = tuple(f"{unit.path}." for unit in units)
    return [part for part in block.parts if part.kind in site.kinds and not part.path.startswith(whole)]


def entrance_of(part: Part) -> Inner | None:
    """The module that reads the part's modulated input first, if it is none of the part's own: in a fused block."""
    return next((inner for inner in part.inner if inner.role == "zero_width"), None)


def entering_of(part: Part, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The modulated inputs of a part, one per stream, from the arguments of its `entrance_of` or, if none, its own."""
    if entrance_of(part) is not None:
        return [first_tensor(args, kwargs)]
    found = [get_argument(module, args, kwargs, path) for path in part.inputs]
    return [value for value in found if isinstance(value, Tensor)]


def first_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The tokens that a module of one input is called with."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
