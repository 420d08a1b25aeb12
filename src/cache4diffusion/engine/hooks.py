"""What diffusers hooks onto a denoiser's modules, as far as calls that do not happen change its meaning.

Hooks that look at one module (casting of weights, offload of leaves) rest with it. Two kinds do not: those that keep
something from call to call are caches, and a group of modules whose weights come with the call of its first and go with
the call of its last must also work where these do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from cache4diffusion.errors import AlreadyAcceleratedError
from cache4diffusion.shadow import Shadow
from cache4diffusion.wrap import ForwardWrapper


def _hooks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Path, module, name and hook, of all that are registered."""
    for path, module in denoiser.named_modules():
        registry = module.__dict__.get("_diffusers_hook")
        for name, hook in getattr(registry, "hooks", {}).items():
            yield path, module, name, hook


def refuse_caches(name: str, denoiser: nn.Module) -> None:
    """Refuse a denoiser that something else caches.

    Raises:
        AlreadyAcceleratedError: hooks keep something from one call to the next.
    """
    found = {hook: path for path, _, hook, value in _hooks(denoiser) if getattr(value, "_is_stateful", False)}
    if found:
        places = ", ".join(f"{hook} at {path or 'the whole'}" for hook, path in found.items())
        raise two_caches(name, denoiser, f"is cached by diffusers' own hooks ({places})")


def two_caches(name: str, denoiser: nn.Module, fact: str) -> AlreadyAcceleratedError:
    """The error where two caches meet."""
    return AlreadyAcceleratedError(
        f"{name} ({type(denoiser).__name__}) {fact}, and one cache would take what the other predicts for what was "
        f"computed. Use one of them: call disable_cache() on the denoiser before accelerate(), or remove() on the "
        "handle before enable_cache(). Most of diffusers' caches are methods here, too: 'fbcache', 'magcache', "
        "'taylorseer', 'fastercache', 'seacache'."
    )


def keep_alone(name: str, denoiser: nn.Module) -> Shadow | None:
    """Refuse ``denoiser.enable_cache()`` from now on; None where there is no such method."""
    if not callable(getattr(denoiser, "enable_cache", None)):
        return None

    def enable_cache(*args: Any, **kwargs: Any) -> None:
        raise two_caches(name, denoiser, "is accelerated, so that diffusers' own cache was not enabled")

    return Shadow(denoiser, "enable_cache", enable_cache)


class _Group:
    """Modules whose weights come and go together."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.is_here = False
        self.wrappers: list[ForwardWrapper] = []

    def wrap(self, module: nn.Module) -> None:
        """Let the weights come with this module's call if they did not come before, whichever it is."""

        def make(found: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.bring(module)
                output = found(*args, **kwargs)
                self.is_here = self.is_here and self.group.offload_leader is not module
                return output

            return forward

        self.wrappers.append(ForwardWrapper(module, make))

    def bring(self, module: nn.Module) -> None:
        """The host's hook does it for the first module, and for whichever comes first where none is named."""
        if not self.is_here and self.group.onload_leader not in (None, module):
            self.group.onload_()
            if self.group.stream is not None:
                self.group.stream.synchronize()
        self.is_here = True

    def settle(self) -> None:
        """After a call of the denoiser: what the last module would have taken away goes."""
        if self.is_here:
            self.group.offload_()
            self.is_here = False


class GroupLoading:
    """Keeps diffusers' group offload right where the first or the last of a group is passed over.

    Args:
        denoiser: its groups are looked for anew before every run (`refresh`).
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self._groups: list[_Group] = []

    def refresh(self) -> None:
        """Wrap the modules of groups with several; what was wrapped for groups that are gone is unwrapped."""
        members: dict[int, tuple[Any, list[nn.Module]]] = {}
        for _, module, _, hook in _hooks(self.denoiser):
            group = getattr(hook, "group", None)
            if callable(getattr(group, "onload_", None)):
                members.setdefault(id(group), (group, []))[1].append(module)
        shared = {key: found for key, found in members.items() if len(found[1]) > 1}
        is_known = [id(known.group) for known in self._groups] == list(shared)
        if is_known and all(wrapper.is_in_place for known in self._groups for wrapper in known.wrappers):
            return
        self.remove()
        for group, modules in shared.values():
            self._groups.append(_Group(group))
            for module in modules:
                self._groups[-1].wrap(module)

    def settle(self) -> None:
        """After a call of the denoiser."""
        for group in self._groups:
            group.settle()

    def remove(self) -> None:
        """Unwrap."""
        for group in self._groups:
            for wrapper in group.wrappers:
                wrapper.remove()
        self._groups = []
