"""Procedural scenes: shaded shapes on a plain background, with a caption in one of the six GenEval task families.

The world is small on purpose (six shapes, eight colours, five backgrounds, up to four objects), so that a network of a
few million parameters, trained on a CPU, can be judged by what its captions ask for. A scene is a function of its seed.

| family | caption | demands |
|---|---|---|
| ``single_object`` | ``a circle on a gray background`` | one object of that shape, any colour |
| ``two_object`` | ``a circle and a star on a white background`` | two objects of these shapes, any colours |
| ``counting`` | ``three green squares on a black background`` | exactly that many, all of that shape and colour |
| ``colors`` | ``a red circle on a beige background`` | one object of that shape and colour |
| ``position`` | ``a red circle left of a blue star on a gray background`` | both objects, and where they stand |
| ``color_attr`` | ``a red circle and a blue star on a slate background`` | both objects, each in its own colour |

Some combinations are never drawn in training (`held_out_combinations`); `held_out_captions` asks for exactly those.
Scenes and captions are dedicated to the public domain (CC0).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 128
"""Height and width of a scene in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 45),
    "green": (40, 165, 60),
    "cyan": (40, 205, 220),
    "blue": (40, 80, 220),
    "purple": (130, 50, 175),
    "pink": (250, 120, 190),
}
"""Colours of objects, RGB in 0..255. All are saturated; backgrounds are not."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 240),
    "gray": (140, 140, 140),
    "black": (22, 22, 24),
    "beige": (224, 204, 172),
    "slate": (76, 96, 122),
}
"""Colours of backgrounds, RGB in 0..255."""

RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

TRAINING_MIX = {
    "single_object": 0.10,
    "two_object": 0.14,
    "counting": 0.20,
    "colors": 0.12,
    "position": 0.22,
    "color_attr": 0.22,
}
"""Share of each family in training; the families that bind several words get more."""

HELD_OUT_SEED = 20240
"""Seed of the list of combinations that training never draws."""

_SHADING = 0.14  # relative brightness of an object's lit (top left) and dark (bottom right) side
_OVERSAMPLING = 4  # antialiasing: sub-pixels per pixel and axis
_SINGLE_SIZES = (40, 64)
_SEVERAL_SIZES = (36, 48)
_CELL = IMAGE_SIZE // 2  # several objects stand in different quadrants, so they never touch


@dataclass(frozen=True)
class SceneObject:
    """One shape: its name, the name of its colour, its centre in pixels (x right, y down) and its size in pixels."""

    shape: str
    colour: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """What is in an image, and the caption that describes it. ``family`` is one of `FAMILIES`."""

    family: str
    caption: str
    background: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Combination:
    """Words that training never draws together.

    ``relation`` is one of `RELATIONS` or `COUNTS`, and ``subjects`` the one (colour, shape) it is said of; or it is
    ``"and"``, and ``subjects`` the two (colour, shape) that the family ``color_attr`` never draws beside each other.
    """

    relation: str
    subjects: tuple[tuple[str, str], ...]


@lru_cache(maxsize=1)
def held_out_combinations() -> tuple[Combination, ...]:
    """The combinations that training never draws, in a fixed order: a function of `HELD_OUT_SEED` alone.

    48 of the 192 (relation, colour, shape), e.g. never "a red circle left of ..."; 24 of the 144 (count, colour,
    shape); 48 of the 1,128 pairs of (colour, shape) in colour attribution, in either order.
    """
    rng = random.Random(HELD_OUT_SEED)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    combinations = [Combination(relation, (kind,)) for relation in RELATIONS for kind in rng.sample(kinds, 12)]
    combinations += [Combination(count, (kind,)) for count in COUNTS for kind in rng.sample(kinds, 8)]
    pairs = [
        (first, second)
        for i, first in enumerate(kinds)
        for second in kinds[i + 1 :]
        if _may_stand_together(first, second)
    ]
    combinations += [Combination("and", pair) for pair in rng.sample(pairs, 48)]
    return tuple(combinations)


@lru_cache(maxsize=1)
def _held_out() -> frozenset[Combination]:
    return frozenset(held_out_combinations())


def _may_stand_together(first: tuple[str, str], second: tuple[str, str]) -> bool:
    # Two colours, or there is nothing to bind; the shape may repeat ("a red circle and a blue circle").
    return first[0] != second[0]


def _pair(first: tuple[str, str], second: tuple[str, str]) -> Combination:
    order = {colour: i for i, colour in enumerate(COLOURS)}
    key = sorted((first, second), key=lambda kind: (order[kind[0]], SHAPES.index(kind[1])))
    return Combination("and", tuple(key))


def draw_scene(rng: random.Random | int, family: str | None = None, held_out: bool = False) -> Scene:
    """Draw one scene.

    Args:
        rng: a source of randomness, or a seed. The same seed gives the same scene on every platform.
        family: one of `FAMILIES`; by default drawn from `TRAINING_MIX`.
        held_out: draw only held-out combinations, where the family has them (``position``, ``counting`` and
            ``color_attr``). By default they are never drawn.

    Raises:
        ValueError: ``family`` is unknown.
    """
    if not isinstance(rng, random.Random):
        rng = random.Random(rng)
    if family is None:
        family = rng.choices(tuple(TRAINING_MIX), weights=tuple(TRAINING_MIX.values()))[0]
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; the families are {', '.join(FAMILIES)}.")
    background = rng.choice(tuple(BACKGROUNDS))
    words, kinds, centres, size = _DRAW[family](rng, held_out)
    objects = tuple(
        SceneObject(shape, colour, x, y, size) for (colour, shape), (x, y) in zip(kinds, centres, strict=True)
    )
    return Scene(family, f"{words} on a {background} background", background, objects)


def training_scenes(seed: int) -> Iterator[Scene]:
    """Endless scenes in the proportions of `TRAINING_MIX`, without the held-out combinations."""
    rng = random.Random(seed)
    while True:
        yield draw_scene(rng)


def held_out_scenes(n: int, seed: int = 0) -> list[Scene]:
    """``n`` scenes to judge by, the families in turn, their captions all different where the family has that many.

    The families with held-out combinations go through these combinations in a shuffled order, so that ``n = 480`` meets
    each position once or twice. The scenes of the other families merely are others than those of training.
    """
    rng = random.Random(f"held out {seed}")
    queues: dict[str, list[Combination]] = {family: [] for family in FAMILIES}
    seen: set[str] = set()
    scenes = []
    for i in range(n):
        family = FAMILIES[i % len(FAMILIES)]
        scene = draw_scene(rng, family, held_out=True)
        if family in _RELATIONS_OF:
            if not queues[family]:
                queues[family] = [c for c in held_out_combinations() if c.relation in _RELATIONS_OF[family]]
                rng.shuffle(queues[family])
            wanted = queues[family].pop()
            while wanted not in combinations_of(scene) or scene.caption in seen:
                scene = draw_scene(rng, family, held_out=True)
        else:
            for _ in range(20):  # a family with few captions runs out of new ones
                if scene.caption not in seen:
                    break
                scene = draw_scene(rng, family, held_out=True)
        seen.add(scene.caption)
        scenes.append(scene)
    return scenes


def held_out_captions(n: int = 480, seed: int = 0) -> list[str]:
    """The captions of `held_out_scenes`: what the models are judged by."""
    return [scene.caption for scene in held_out_scenes(n, seed)]


_RELATIONS_OF = {"position": RELATIONS, "counting": tuple(COUNTS), "color_attr": ("and",)}


def combinations_of(scene: Scene) -> tuple[Combination, ...]:
    """What of a scene may be held out: none or one `Combination`."""
    kinds = [(o.colour, o.shape) for o in scene.objects]
    if scene.family == "position":
        relation = next(relation for relation in RELATIONS if f" {relation} " in scene.caption)
        return (Combination(relation, (kinds[0],)),)
    if scene.family == "counting":
        return (Combination(scene.caption.split()[0], (kinds[0],)),)
    if scene.family == "color_attr":
        return (_pair(*kinds),)
    return ()


# How each family is drawn: (rng, held_out) -> words, [(colour, shape)], [(x, y)], size.


def article(word: str) -> str:
    """``a`` or ``an``."""
    return "an" if word[0] in "aeiou" else "a"


def _a(*words: str) -> str:
    return " ".join((article(words[0]), *words))


def _kind(rng: random.Random) -> tuple[str, str]:
    return rng.choice(tuple(COLOURS)), rng.choice(SHAPES)


def _single(rng: random.Random) -> tuple[list[tuple[int, int]], int]:
    size = rng.randrange(_SINGLE_SIZES[0], _SINGLE_SIZES[1] + 1, 2)
    low, high = size // 2 + 6, IMAGE_SIZE - size // 2 - 6
    return [(rng.randint(low, high), rng.randint(low, high))], size


def _in_cells(rng: random.Random, cells: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    size = rng.randrange(_SEVERAL_SIZES[0], _SEVERAL_SIZES[1] + 1, 2)
    slack = (_CELL - size) // 2 - 3
    centres = [
        (
            _CELL * column + _CELL // 2 + rng.randint(-slack, slack),
            _CELL * row + _CELL // 2 + rng.randint(-slack, slack),
        )
        for column, row in cells
    ]
    return centres, size


_QUADRANTS = [(0, 0), (1, 0), (0, 1), (1, 1)]


def _draw_single_object(rng: random.Random, held_out: bool):
    kind = _kind(rng)
    return _a(kind[1]), [kind], *_single(rng)


def _draw_colors(rng: random.Random, held_out: bool):
    kind = _kind(rng)
    return _a(*kind), [kind], *_single(rng)


def _draw_two_object(rng: random.Random, held_out: bool):
    first_shape, second_shape = rng.sample(SHAPES, 2)
    kinds = [(rng.choice(tuple(COLOURS)), shape) for shape in (first_shape, second_shape)]
    return f"{_a(first_shape)} and {_a(second_shape)}", kinds, *_in_cells(rng, rng.sample(_QUADRANTS, 2))


def _draw_counting(rng: random.Random, held_out: bool):
    while True:
        count, kind = rng.choice(tuple(COUNTS)), _kind(rng)
        if (Combination(count, (kind,)) in _held_out()) == held_out:
            break
    n = COUNTS[count]
    return f"{count} {kind[0]} {PLURALS[kind[1]]}", [kind] * n, *_in_cells(rng, rng.sample(_QUADRANTS, n))


def _draw_pair(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    while True:
        first, second = _kind(rng), _kind(rng)
        if _may_stand_together(first, second):
            return first, second


def _draw_color_attr(rng: random.Random, held_out: bool):
    while True:
        first, second = _draw_pair(rng)
        if (_pair(first, second) in _held_out()) == held_out:
            break
    words = f"{_a(*first)} and {_a(*second)}"
    return words, [first, second], *_in_cells(rng, rng.sample(_QUADRANTS, 2))


def _draw_position(rng: random.Random, held_out: bool):
    while True:
        relation, (first, second) = rng.choice(RELATIONS), _draw_pair(rng)
        if (Combination(relation, (first,)) in _held_out()) == held_out:
            break
    cells = [(0, 0), (1, 0)] if relation in ("left of", "right of") else [(0, 0), (0, 1)]
    if relation in ("right of", "below"):
        cells.reverse()
    centres, size = _in_cells(rng, cells)
    # The pair as a whole stands anywhere along the other axis.
    shift = rng.randint(0, _CELL)
    sideways = relation in ("left of", "right of")
    centres = [(x, y + shift) if sideways else (x + shift, y) for x, y in centres]
    return f"{_a(*first)} {relation} {_a(*second)}", [first, second], centres, size


_DRAW = {
    "single_object": _draw_single_object,
    "two_object": _draw_two_object,
    "counting": _draw_counting,
    "colors": _draw_colors,
    "position": _draw_position,
    "color_attr": _draw_color_attr,
}


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: uint8 ``[128, 128, 3]``, RGB in 0..255."""
    return paint(scene.background, scene.objects, IMAGE_SIZE)


def paint(background: str, objects: tuple[SceneObject, ...], side: int) -> np.ndarray:
    """Objects, each wholly inside, on a background: uint8 ``[side, side, 3]``, RGB in 0..255."""
    image = np.empty((side, side, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[background]
    for thing in objects:
        coverage = shape_mask(thing.shape, thing.size)  # [S, S], S even: the centre falls between two pixels
        extent = coverage.shape[0]
        top, left = thing.y - extent // 2, thing.x - extent // 2
        ramp = np.linspace(-1.0, 1.0, extent, dtype=np.float32)
        light = 1.0 - _SHADING * (ramp[:, None] + ramp[None, :]) / 2 * extent / thing.size
        colour = np.clip(np.asarray(COLOURS[thing.colour], dtype=np.float32) * light[..., None], 0, 255)
        region = image[top : top + extent, left : left + extent]
        region += coverage[..., None] * (colour - region)
    return np.rint(image).astype(np.uint8)


@lru_cache(maxsize=1024)
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage in 0..1 of a shape drawn at ``size`` pixels: float32 ``[size + 4, size + 4]``, read-only, centred.

    Raises:
        ValueError: ``shape`` is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}.")
    scale, side = _OVERSAMPLING, size + 4
    canvas = Image.new("L", (side * scale, side * scale), 0)
    pen = ImageDraw.Draw(canvas)
    middle, radius = side * scale / 2 - 0.5, size * scale / 2

    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return middle - half_width, middle - half_height, middle + half_width, middle + half_height

    if shape == "circle":
        pen.ellipse(box(0.96 * radius, 0.96 * radius), fill=255)
    elif shape == "ring":
        pen.ellipse(box(radius, radius), fill=255)
        pen.ellipse(box(0.46 * radius, 0.46 * radius), fill=0)
    elif shape == "square":
        pen.rectangle(box(0.84 * radius, 0.84 * radius), fill=255)
    elif shape == "cross":
        pen.rectangle(box(0.36 * radius, radius), fill=255)
        pen.rectangle(box(radius, 0.36 * radius), fill=255)
    elif shape == "triangle":
        corners = [(0.0, -0.92), (1.0, 0.88), (-1.0, 0.88)]
        pen.polygon([(middle + radius * x, middle + radius * y) for x, y in corners], fill=255)
    else:  # star
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        lengths = radius * np.where(np.arange(10) % 2 == 0, 1.06, 0.47)
        drop = 0.06 * radius  # a five-pointed star is lower than its circle
        points = [(middle + r * np.cos(a), middle + drop + r * np.sin(a)) for a, r in zip(angles, lengths, strict=True)]
        pen.polygon(points, fill=255)
    mask = np.asarray(canvas, dtype=np.float32).reshape(side, scale, side, scale).mean(axis=(1, 3)) / 255
    mask.setflags(write=False)
    return mask
