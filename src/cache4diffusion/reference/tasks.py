"""What the reference models draw, and how each is judged: one `Task` per world.

| task | asked for by | drawn | judged by |
|---|---|---|---|
| `Scenes` | a caption of some of the six families | a still scene, 128 x 128 | `checker.check` |
| `Classes` | a number: a colour and a shape | one such object, 128 x 128, any background | `checker.judge` |
| `Clips` | a caption that names a direction | one moving object, 8 frames of 96 x 96 | `motion.check_clip` |
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from cache4diffusion.reference import checker, motion
from cache4diffusion.reference.scenes import (
    COLOURS,
    FAMILIES,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    SHAPES,
    TRAINING_MIX,
    article,
    draw_scene,
    held_out_combinations,
    held_out_scenes,
    render,
)

CLASS_NAMES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The 48 classes; a class's number is its position."""


class Judged(Protocol):
    """A verdict: each demand, and whether all are met."""

    met: dict[str, bool]

    @property
    def ok(self) -> bool:
        """Whether every demand is met."""
        ...


@dataclass(frozen=True)
class Task(ABC):
    """What is drawn, what it is asked for by, and what counts as right.

    Args:
        mix: share of each family in training.
    """

    mix: Mapping[str, float]

    side: ClassVar[int] = IMAGE_SIZE
    frames: ClassVar[int | None] = None
    prompts: ClassVar[str] = "captions"
    demands: ClassVar[tuple[str, ...]] = checker.DEMANDS

    @property
    def families(self) -> tuple[str, ...]:
        """Of what is drawn."""
        return tuple(self.mix)

    def training(self, rng: random.Random, n: int, mix: Mapping[str, float] | None = None) -> list[Any]:
        """``n`` examples to train on, families in the proportions of ``mix``."""
        mix = mix or self.mix
        families = rng.choices(tuple(mix), weights=tuple(mix.values()), k=n)
        return [self.draw(rng, family) for family in families]

    @abstractmethod
    def draw(self, rng: random.Random, family: str, held_out: bool = False) -> Any:
        """One example; with ``held_out``, of a combination that training never draws, where the family has any."""

    @abstractmethod
    def render(self, drawn: Any) -> np.ndarray:
        """Its pixels: uint8 ``[H, W, 3]``, or ``[F, H, W, 3]``."""

    @abstractmethod
    def prompt(self, drawn: Any) -> Any:
        """What the pipeline is asked for to draw it."""

    @abstractmethod
    def held_out(self, n: int, seed: int = 0) -> list[Any]:
        """``n`` examples to judge by."""

    @abstractmethod
    def check(self, picture: Any, prompt: Any) -> Judged:
        """Compare a picture (uint8 array or PIL; a clip: its frames) with what was asked for."""

    @abstractmethod
    def contradict(self, prompt: Any, rng: random.Random) -> Any:
        """Something else to ask for, which no picture can meet together with ``prompt``."""

    @abstractmethod
    def family_of(self, prompt: Any) -> str:
        """The family of what is asked for.

        Raises:
            ValueError: it cannot be read.
        """

    def describe_held_out(self) -> str:
        """What training never draws, in a sentence for the model card; empty if nothing."""
        return ""


@dataclass(frozen=True)
class Scenes(Task):
    """Still scenes by caption; see `cache4diffusion.reference.scenes`."""

    mix: Mapping[str, float] = field(default_factory=lambda: dict(TRAINING_MIX))

    def draw(self, rng: random.Random, family: str, held_out: bool = False) -> Any:
        """As `draw_scene`."""
        return draw_scene(rng, family, held_out)

    def render(self, drawn: Any) -> np.ndarray:
        """As `render`."""
        return render(drawn)

    def prompt(self, drawn: Any) -> str:
        """The caption."""
        return drawn.caption

    def held_out(self, n: int, seed: int = 0) -> list[Any]:
        """As `held_out_scenes`, of these families alone."""
        scenes = held_out_scenes(n * len(FAMILIES) // len(self.mix) + len(FAMILIES), seed)
        return [scene for scene in scenes if scene.family in self.mix][:n]

    def check(self, picture: Any, prompt: str) -> checker.Verdict:
        """As `checker.check`."""
        return checker.check(picture, prompt)

    def contradict(self, prompt: str, rng: random.Random) -> str:
        """As `checker.contradict`."""
        return checker.contradict(prompt, rng)

    def family_of(self, prompt: str) -> str:
        """By what the caption asks for."""
        return checker.family_of(prompt)

    def describe_held_out(self) -> str:
        """The combinations of words."""
        return (
            f"{len(held_out_combinations())} combinations of words are never drawn in training; they follow from the "
            f"seed {HELD_OUT_SEED} (`cache4diffusion.reference.scenes.held_out_combinations`)."
        )


@dataclass(frozen=True)
class Classes(Task):
    """Single objects by class, on any background; families are shapes. No class can be held out: the noise is new."""

    mix: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(SHAPES, 1.0))

    prompts: ClassVar[str] = "class labels"
    demands: ClassVar[tuple[str, ...]] = ("count", "objects", "colours")

    def draw(self, rng: random.Random, family: str, held_out: bool = False) -> _OfClass:
        """An object of this shape and any colour."""
        return _OfClass(family, rng.choice(tuple(COLOURS)), rng.getrandbits(62))

    def render(self, drawn: _OfClass) -> np.ndarray:
        """Its pixels."""
        return render(drawn.scene)

    def prompt(self, drawn: _OfClass) -> int:
        """The number of the class."""
        return CLASS_NAMES.index(f"{drawn.colour} {drawn.family}")

    def held_out(self, n: int, seed: int = 0) -> list[Any]:
        """The classes in turn, in a shuffled order."""
        rng = random.Random(f"held out {seed}")
        found: list[_OfClass] = []
        while len(found) < n:
            kinds = [(colour, shape) for shape in SHAPES for colour in COLOURS]
            rng.shuffle(kinds)
            found += [_OfClass(shape, colour, rng.getrandbits(62)) for colour, shape in kinds]
        return found[:n]

    def check(self, picture: Any, prompt: int) -> checker.Verdict:
        """One object, of the class's colour and shape."""
        colour, shape = self._named(prompt)
        return checker.judge(picture, checker.Demands(None, ((colour, shape),)))

    def contradict(self, prompt: int, rng: random.Random) -> int:
        """Another class."""
        self._named(prompt)
        return rng.choice([number for number in range(len(CLASS_NAMES)) if number != prompt])

    def family_of(self, prompt: int) -> str:
        """The shape."""
        return self._named(prompt)[1]

    @staticmethod
    def _named(prompt: int) -> tuple[str, str]:
        if not isinstance(prompt, int) or not 0 <= prompt < len(CLASS_NAMES):
            raise ValueError(f"there is no class {prompt!r}; the classes are 0 to {len(CLASS_NAMES) - 1}.")
        colour, shape = CLASS_NAMES[prompt].split()
        return colour, shape


@dataclass(frozen=True)
class _OfClass:
    family: str  # its shape
    colour: str
    seed: int

    @property
    def scene(self) -> Any:
        """A single object of this class, wherever the seed puts it."""
        scene = draw_scene(random.Random(self.seed), "colors")
        thing = replace(scene.objects[0], shape=self.family, colour=self.colour)
        caption = f"{article(self.colour)} {self.colour} {self.family} on a {scene.background} background"
        return replace(scene, caption=caption, objects=(thing,))


@dataclass(frozen=True)
class Clips(Task):
    """Moving scenes by caption; families are directions. See `cache4diffusion.reference.motion`."""

    mix: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(motion.DIRECTIONS, 1.0))

    side: ClassVar[int] = motion.FRAME_SIZE
    frames: ClassVar[int | None] = motion.FRAMES
    demands: ClassVar[tuple[str, ...]] = motion.DEMANDS

    def draw(self, rng: random.Random, family: str, held_out: bool = False) -> motion.Clip:
        """As `motion.draw_clip`."""
        return motion.draw_clip(rng, family, held_out)

    def render(self, drawn: motion.Clip) -> np.ndarray:
        """As `motion.render_clip`."""
        return motion.render_clip(drawn)

    def prompt(self, drawn: motion.Clip) -> str:
        """The caption."""
        return drawn.caption

    def held_out(self, n: int, seed: int = 0) -> list[motion.Clip]:
        """As `motion.held_out_clips`."""
        return motion.held_out_clips(n, seed)

    def check(self, picture: Any, prompt: str) -> motion.MotionVerdict:
        """As `motion.check_clip`."""
        return motion.check_clip(picture, prompt)

    def contradict(self, prompt: str, rng: random.Random) -> str:
        """As `motion.contradict_motion`."""
        return motion.contradict_motion(prompt, rng)

    def family_of(self, prompt: str) -> str:
        """The direction."""
        return motion.parse_motion(prompt).direction

    def describe_held_out(self) -> str:
        """The combinations of words."""
        return (
            f"{len(motion.held_out_motions())} of the {4 * len(CLASS_NAMES)} combinations of direction, colour and "
            f"shape are never drawn in training; they follow from the seed {HELD_OUT_SEED} "
            "(`cache4diffusion.reference.motion.held_out_motions`)."
        )
