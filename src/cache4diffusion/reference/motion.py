"""Moving scenes: one shape that crosses a plain background, its caption, and the checker that follows it.

    "a red circle moves left over a gray background"

A clip has eight frames of 96 x 96 pixels. The checker finds the shape in every frame, as that of still scenes does, and
compares the track of its centres with the direction that the caption names. A quarter of the combinations of direction,
colour and shape is never drawn in training (`held_out_motions`); `held_out_clips` asks for exactly those.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from cache4diffusion.reference.checker import Found, find_objects
from cache4diffusion.reference.scenes import BACKGROUNDS, COLOURS, HELD_OUT_SEED, SHAPES, SceneObject, article, paint

FRAMES = 8
"""Frames of a clip."""

FRAME_SIZE = 96
"""Height and width of a frame in pixels."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Which way a shape moves, as (x, y) with y down."""

WORDS = ("moves", "over", "up", "down")
"""Words of these captions that those of still scenes lack."""

DEMANDS = ("background", "count", "objects", "colours", "motion")

MIN_TRAVEL = 16.0
"""Pixels that a shape must have moved from the first frame to the last; those drawn move 28 to 44."""

MIN_SHARE = 0.75
"""Share of the frames in which the shape, and its colour, must be the ones asked for."""

_SIZES = (32, 40)
_TRAVELS = (28, 44)
_MARGIN = 3  # pixels between a shape's box and the edge
_MAX_ACROSS = 0.5  # of the way along
_MAX_BACKWARD = 1.5  # pixels between two frames: less than the smallest step drawn


@dataclass(frozen=True)
class Clip:
    """A moving shape: where its centre is in the first and in the last frame, in pixels (x right, y down)."""

    background: str
    colour: str
    shape: str
    direction: str
    size: int
    first: tuple[int, int]
    last: tuple[int, int]

    @property
    def family(self) -> str:
        """The direction: what accuracies are told apart by."""
        return self.direction

    @property
    def caption(self) -> str:
        """What it shows, in words."""
        return format_motion(Motion(self.background, self.colour, self.shape, self.direction))


@dataclass(frozen=True)
class Motion:
    """What the caption of a clip asks for."""

    background: str
    colour: str
    shape: str
    direction: str


@dataclass(frozen=True)
class MotionVerdict:
    """For each of `DEMANDS` whether it is met; ``ok`` if all are.

    ``track`` has what was found in each frame: the shape that stands alone there, or None.
    """

    met: dict[str, bool]
    track: tuple[Found | None, ...]

    @property
    def ok(self) -> bool:
        """Whether every demand is met."""
        return all(self.met.values())


@lru_cache(maxsize=1)
def held_out_motions() -> frozenset[tuple[str, str, str]]:
    """The (direction, colour, shape) that training never draws: 48 of 192, a function of `HELD_OUT_SEED` alone."""
    rng = random.Random(f"motions {HELD_OUT_SEED}")
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return frozenset((direction, *kind) for direction in DIRECTIONS for kind in rng.sample(kinds, 12))


def draw_clip(rng: random.Random | int, direction: str | None = None, held_out: bool = False) -> Clip:
    """Draw one clip; with ``held_out`` one of `held_out_motions`, else none of them."""
    if not isinstance(rng, random.Random):
        rng = random.Random(rng)
    while True:
        kind = (direction or rng.choice(tuple(DIRECTIONS)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        if (kind in held_out_motions()) == held_out:
            break
    size = rng.randrange(_SIZES[0], _SIZES[1] + 1, 2)
    low, high = size // 2 + _MARGIN, FRAME_SIZE - size // 2 - _MARGIN
    travel = rng.randint(_TRAVELS[0], min(_TRAVELS[1], high - low))
    along, across = rng.randint(low, high - travel), rng.randint(low, high)
    forward = sum(DIRECTIONS[kind[0]]) > 0
    start, end = (along, along + travel) if forward else (along + travel, along)
    first, last = ((start, across), (end, across)) if DIRECTIONS[kind[0]][0] else ((across, start), (across, end))
    direction, colour, shape = kind
    return Clip(rng.choice(tuple(BACKGROUNDS)), colour, shape, direction, size, first, last)


def held_out_clips(n: int, seed: int = 0) -> list[Clip]:
    """``n`` clips to judge by, the directions in turn, all of held-out combinations."""
    rng = random.Random(f"held out {seed}")
    directions = tuple(DIRECTIONS)
    return [draw_clip(rng, directions[i % len(directions)], held_out=True) for i in range(n)]


def render_clip(clip: Clip) -> np.ndarray:
    """The frames of a clip: uint8 ``[8, 96, 96, 3]``, RGB in 0..255."""
    frames = []
    for i in range(FRAMES):
        x, y = (round(a + (b - a) * i / (FRAMES - 1)) for a, b in zip(clip.first, clip.last, strict=True))
        thing = SceneObject(clip.shape, clip.colour, x, y, clip.size)
        frames.append(paint(clip.background, (thing,), FRAME_SIZE))
    return np.stack(frames)


_PATTERN = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moves ({'|'.join(DIRECTIONS)}) over an? "
    rf"({'|'.join(BACKGROUNDS)}) background"
)


def parse_motion(caption: str) -> Motion:
    """Read the caption of a clip.

    Raises:
        ValueError: the caption is not of that language.
    """
    match = _PATTERN.fullmatch(" ".join(caption.lower().split()))
    if not match:
        raise ValueError(
            f"the caption {caption!r} does not describe a moving scene; write for example 'a red circle moves left "
            f"over a gray background'. Shapes: {', '.join(SHAPES)}; colours: {', '.join(COLOURS)}; directions: "
            f"{', '.join(DIRECTIONS)}; backgrounds: {', '.join(BACKGROUNDS)}."
        )
    colour, shape, direction, background = match.groups()
    return Motion(background, colour, shape, direction)


def format_motion(motion: Motion) -> str:
    """The caption of what is asked for: the inverse of `parse_motion`."""
    return (
        f"{article(motion.colour)} {motion.colour} {motion.shape} moves {motion.direction} over "
        f"{article(motion.background)} {motion.background} background"
    )


def check_clip(frames: Sequence[Image.Image] | np.ndarray, caption: str) -> MotionVerdict:
    """Compare a clip with its caption.

    Background and number of objects must be right in every frame, shape and colour in `MIN_SHARE` of them. The motion
    is right if the centre goes at least `MIN_TRAVEL` pixels (of 96) the right way from the first frame to the last, at
    most half as far across, and nowhere back.

    Args:
        frames: PIL images, or uint8 ``[F, H, W, 3]`` in 0..255; square, two or more.
        caption: see `parse_motion`.

    Raises:
        ValueError: the caption cannot be read, or there are less than two frames.
    """
    wanted = parse_motion(caption)
    if len(frames) < 2:
        raise ValueError(f"motion needs two frames or more, got {len(frames)}.")
    grounds, track = [], []
    for frame in frames:
        ground, found = find_objects(frame, side=FRAME_SIZE)
        grounds.append(ground)
        track.append(found[0] if len(found) == 1 else None)
    needed = MIN_SHARE * len(track)
    return MotionVerdict(
        {
            "background": all(ground == wanted.background for ground in grounds),
            "count": None not in track,
            "objects": sum(thing is not None and thing.shape == wanted.shape for thing in track) >= needed,
            "colours": sum(thing is not None and thing.colour == wanted.colour for thing in track) >= needed,
            "motion": None not in track and _goes(wanted.direction, np.array([(t.x, t.y) for t in track if t])),
        },
        tuple(track),
    )


def _goes(direction: str, centres: np.ndarray) -> bool:
    towards = np.array(DIRECTIONS[direction])
    along = centres @ towards
    across = centres @ towards[::-1]
    travel = along[-1] - along[0]
    return bool(
        travel >= MIN_TRAVEL and np.ptp(across) <= _MAX_ACROSS * travel and np.diff(along).min() >= -_MAX_BACKWARD
    )


def contradict_motion(caption: str, rng: random.Random | int) -> str:
    """The caption with its background, colour, shape or direction changed, so that no clip can meet both.

    Raises:
        ValueError: the caption cannot be read.
    """
    if not isinstance(rng, random.Random):
        rng = random.Random(rng)
    motion = parse_motion(caption)
    palettes = {"background": BACKGROUNDS, "colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
    name = rng.choice(tuple(palettes))
    other = rng.choice([value for value in palettes[name] if value != getattr(motion, name)])
    return format_motion(replace(motion, **{name: other}))
