"""Living with ``torch.compile``: what runs outside of compiled regions stays out of them.

The wrappers around calls, and everything they run, are plain Python between compiled regions. Where somebody compiles
the denoiser from outside (``torch.compile(denoiser)``), Dynamo sees their frames too; it is told to leave them alone
and to go on with the host's own frames below. Being left alone does not keep a function from being traced as a part of
something else, as the wrappers of parts are inside a compiled block.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.composition import Composition
from cache4diffusion.sites import Denoiser, GatedParts, Parts, Trajectory

try:  # private, as what `leave_us_alone` needs; without them a denoiser compiled from outside never reaches a site
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
except ImportError:
    get_eval_frame_callback = None

_LEFT_ALONE: set[str] = set()  # modules of this package

WHOLE = (
    "was compiled as a whole, which hides the blocks and parts inside that this method must reach. Compile the blocks "
    "instead (denoiser.compile_repeated_blocks(fullgraph=True), or block.compile() for each), or use a method for the "
    "whole denoiser ('taylorseer-lite')."
)
TOKENS = (
    "token rules look into the blocks while they run, so the blocks must not be compiled. Use a method without a token "
    "rule ('taylorseer', 'fora'), or leave the blocks as they are."
)
GATED = (
    "parts that decide for themselves are asked while their blocks run, so the blocks must not be compiled. Use a "
    "method whose decisions fall before the call ('fora', 'l2c'), or leave the blocks as they are."
)

TURNS = (
    "parts of blocks that run several times in a call are told apart by counting, so the blocks must not be compiled. "
    "Use a method for spans ('fbcache') or the whole denoiser ('taylorseer-lite'), or leave the blocks as they are."
)


def forbids_compiled_blocks(composition: Composition) -> str | None:
    """Why the blocks must not be compiled, in words; None if they may be."""
    if composition.tokens is not None:
        return TOKENS
    return GATED if isinstance(composition.site, GatedParts) else None


def hides_sites(composition: Composition) -> bool:
    """Whether compiling the denoiser as a whole would hide what the composition must reach."""
    watch = composition.gate.watch if composition.gate is not None else None
    looks_inside = watch is not None and watch.needs_stack
    return looks_inside or (composition.site is not None and not isinstance(composition.site, (Denoiser, Trajectory)))


def is_under_compile() -> bool:
    """Whether a ``torch.compile`` around the caller is at work: of the denoiser as a whole, or of the whole loop."""
    return get_eval_frame_callback is not None and callable(get_eval_frame_callback())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, also underneath wrappers of ours."""
    call = module.__dict__.get("_compiled_call_impl")
    while (wrapper := getattr(call, "c4d_wrapper", None)) is not None:
        call = wrapper.compiled
    return call is not None


def is_compiled_whole(denoiser: nn.Module) -> bool:
    """Whether a denoiser is compiled as a whole: itself, or what is wrapped around it."""
    plain = unwrapped(denoiser)
    while denoiser is not plain:
        if "_orig_mod" in denoiser._modules or is_compiled(denoiser):
            return True
        (denoiser,) = denoiser.children()
    return is_compiled(plain)


def graphs_per_graph(composition: Composition) -> int:
    """How many graphs a compiled block needs where it needs one without a cache.

    Parts are computed in one graph and predicted in another; with several decisions in a block there is one for each
    combination. Groups of rows differ in size, and Dynamo makes one graph
    for the first size, one for a single row and one for all others.
    """
    splits_rows = composition.decide == "row" or composition.cfg is not None
    site = composition.site
    combinations = {"one": 2, "kind": 8, "part": 16}[site.decisions] if isinstance(site, Parts) else 1
    return combinations * (3 if splits_rows else 1)


def room_for(graphs: int) -> AbstractContextManager[Any]:
    """A context for calls of compiled blocks, which may be entered again and again.

    Dynamo limits how many graphs it makes of one function; the limit is meant for what the host does, so it is raised
    by what is needed on top. And predictions reach a compiled block by way of the part's module: Dynamo takes the size
    of whatever it finds on a module of torch's own (a part may be a plain ``nn.Linear``) for fixed, and would make
    graphs anew for every resolution. Sizes of parameters and buffers stay fixed.

    Args:
        graphs: how many are needed in place of one.
    """
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # as torch 2.6 calls it
    changes = {limit: graphs * getattr(config, limit), "force_nn_module_property_static_shapes": False}
    return config.patch(**changes)


def drop_graphs(denoiser: nn.Module) -> None:
    """Forget what was compiled of a denoiser's blocks, which compile anew when they are called next.

    For when wrappers that are traced go away: nothing will ask for these graphs again, but Dynamo counts them against
    the limit, and the host would find its own refused.
    """
    for module in denoiser.modules():
        code = getattr(module.forward, "__code__", None) if is_compiled(module) else None
        if code is not None:
            torch._dynamo.eval_frame.remove_from_cache(code)


def leave_us_alone() -> None:
    """Tell Dynamo not to compile the frames of this package by themselves; modules imported since then are added.

    It lasts: ``torch._dynamo.reset()`` forgets what Dynamo has seen, and these it never sees.
    """
    try:  # not before something is attached: Dynamo takes a second to import
        from torch._dynamo.decorators import skip_code
    except ImportError:
        return
    package = __name__.partition(".")[0]
    mine = [name for name in list(sys.modules) if name.startswith(package) and name not in _LEFT_ALONE]
    for name in mine:
        if name == package or name.startswith(f"{package}."):
            _LEFT_ALONE.add(name)
            module = sys.modules[name]
            for value in list(vars(module).values()):
                if getattr(value, "__module__", None) == name:
                    for code in _codes(value, set()):
                        skip_code(code)


def _codes(value: Any, seen: set[int]) -> Iterator[types.CodeType]:
    """The code of a function or of a class's methods, and all code nested in it.

    Args:
        value: a function, a class, or anything else (which has none).
        seen: classes looked into already: a class may hold itself, as those of command-line options do.
    """
    if isinstance(value, type):
        if id(value) in seen:
            return
        seen.add(id(value))
        for member in list(vars(value).values()):
            yield from _codes(member.fget if isinstance(member, property) else member, seen)
        return
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    pending = [code] if isinstance(code, types.CodeType) else []
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
