"""What observation cannot know, declared: a row per class that needs one, and what users say of their own denoisers.

Both are a `Hint`. What is said of one denoiser goes before what is said of its class, and that before the table. Every
hint is held against what one forward shows (`observe`): one that does not hold is an error.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from cache4diffusion.anatomy.facts import PartKind
from cache4diffusion.anatomy.undisturbed import unwrapped


@dataclass(frozen=True)
class Hint:
    """Declared facts of one class or denoiser. What is left out is seen.

    Args:
        why: what cannot be seen.
        latent: name of the argument that is denoised.
        timestep: name of the argument that is the clock.
        has_clock: whether an argument tells the noise level.
        conditioning: names of the arguments that vary with the prompt.
        blocks: paths of the lists of blocks, or of single blocks, in any order.
        image: name of the blocks' argument that is the image, where the text may reach the output as well.
        parts: kinds of the residual sub-layers, by their path in a block; no others are cached then.
        frames: axis of a video's frames, by the name of each argument that has one.
        first_frame: name of the argument that says which place in the video the first frame has.
    """

    why: str = ""
    latent: str | None = None
    timestep: str | None = None
    has_clock: bool = True
    conditioning: tuple[str, ...] | None = None
    blocks: tuple[str, ...] = ()
    image: str | None = None
    parts: Mapping[str, PartKind] = field(default_factory=dict)
    frames: Mapping[str, int] = field(default_factory=dict)
    first_frame: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is declared, without the reason."""
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {name: value for name, value in given.items() if name != "why" and value != getattr(NOTHING, name)}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.facts.items())

    def over(self, other: Hint) -> Hint:
        """This one, and for what it leaves out the other."""
        why = "; ".join(dict.fromkeys(filter(None, (other.why, self.why))))
        return dataclasses.replace(other, **self.facts, why=why)


NOTHING = Hint()

HINTS: dict[str, Hint] = {
    "Cosmos3OmniTransformer": Hint(
        "its first argument is the prompt; text and image are packed into one row, from which both are read",
        latent="vision_tokens",
        image="gen_seq",
    ),
    "T5FilmDecoder": Hint("its first argument is what was encoded", latent="decoder_input_tokens"),
    "UVit2DModel": Hint(
        "it denoises indices of a codebook, and masked ones among them show how far the run is",
        latent="input_ids",
        has_clock=False,
    ),
}
"""By class name."""

_SAID: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by denoiser, and by class


def hint_of(denoiser: nn.Module) -> Hint:
    """All that is declared of a denoiser; `NOTHING` if nothing is."""
    denoiser = unwrapped(denoiser)
    kind = type(denoiser)
    found = HINTS.get(kind.__name__, NOTHING)
    said = next((_SAID[cls] for cls in kind.__mro__ if cls in _SAID), None)
    for hint in (said, _SAID.get(denoiser)):
        if hint is not None:
            found = hint.over(found)
    return found


def matching(paths: Iterable[str], pattern: str) -> list[str]:
    """The module paths that a pattern stands for; ``*`` and ``?`` do not go past a dot."""
    wanted = pattern.split(".")

    def is_meant(path: str) -> bool:
        names = path.split(".")
        return len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))

    return [path for path in paths if is_meant(path)]


def said_of(target: Any) -> Hint | None:
    """What a user has said of this very denoiser, or of this class."""
    return _SAID.get(target)


def is_said_of(denoiser: nn.Module) -> bool:
    """Whether a user has said anything of a denoiser or of its class."""
    denoiser = unwrapped(denoiser)
    return any(key in _SAID for key in (denoiser, *type(denoiser).__mro__))


def say(target: Any, hint: Hint | None) -> None:
    """Put down what a user says of a denoiser or class; None: nothing any more."""
    if hint is None:
        _SAID.pop(target, None)
    else:
        _SAID[target] = hint


def say_as_of(twin: nn.Module, denoiser: nn.Module) -> None:
    """What is said of a denoiser holds of this copy of it, too."""
    hint = _SAID.get(unwrapped(denoiser))
    if hint is not None:
        say(twin, hint)
