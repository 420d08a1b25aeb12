"""Exact checker: does an image show what its caption asks for?

    image -> background colour (median) -> what differs from it -> connected components
          -> per component: colour (median of its core), shape (overlap with the six shapes drawn in its bounding box)
          -> compared with the parsed caption, demand by demand

Plain numpy; no learned part, so an answer is a fact about the image. Every extra object counts against it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from cache4diffusion.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    IMAGE_SIZE,
    PLURALS,
    RELATIONS,
    SHAPES,
    shape_mask,
)

DEMANDS = ("background", "count", "objects", "colours", "position")

MIN_OVERLAP = 0.7
"""Least overlap (soft intersection over union, in 0..1) of a component with the shape it is taken for."""

_MIN_CONTRAST = 40.0  # RGB distance from the background at which a pixel may belong to an object
_MIN_AREA = 60  # pixels; smaller components are specks. The smallest object drawn covers about 430
_MAX_COLOUR_DISTANCE = 75.0  # RGB distance of an object's median colour from its palette entry
_MAX_BACKGROUND_DISTANCE = 45.0
_MIN_PURITY = 0.75  # share of an object's core that must be of its own colour
_MAX_ASPECT = 1.3
_MIN_DISTANCE = 16.0  # pixels between two centres, along the axis of a relation
_GRID = 24  # side of the raster on which shapes are compared


@dataclass(frozen=True)
class Demands:
    """What a caption asks for.

    Args:
        background: a key of `BACKGROUNDS`; None where any will do.
        objects: (colour, shape) of each object; the colour is None where the caption names none.
        relation: one of `RELATIONS`, said of the first object towards the second, or None.
    """

    background: str | None
    objects: tuple[tuple[str | None, str], ...]
    relation: str | None = None


@dataclass(frozen=True)
class Found:
    """One component of an image. ``shape`` and ``colour`` are None where none fits; lengths in pixels of the image."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    area: int
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """What was found, and for each demand the caption makes whether it is met; ``ok`` if all are."""

    met: dict[str, bool]
    background: str | None
    objects: tuple[Found, ...]

    @property
    def ok(self) -> bool:
        """Whether every demand is met."""
        return all(self.met.values())


_KIND = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_PATTERN_ONE = re.compile(rf"an? {_KIND}")
_PATTERN_TWO = re.compile(rf"an? {_KIND} (and|{'|'.join(RELATIONS)}) an? {_KIND}")
_PATTERN_COUNT = re.compile(rf"({'|'.join(COUNTS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(PLURALS.values())})")
_PATTERN_BACKGROUND = re.compile(rf"(.+) on an? ({'|'.join(BACKGROUNDS)}) background")


def parse_caption(caption: str) -> Demands:
    """Read a caption of one of the six families.

    Raises:
        ValueError: the caption is not of that language.
    """
    outer = _PATTERN_BACKGROUND.fullmatch(" ".join(caption.lower().split()))
    if outer:
        words, background = outer.groups()
        if match := _PATTERN_ONE.fullmatch(words):
            return Demands(background, ((match[1], match[2]),))
        if match := _PATTERN_TWO.fullmatch(words):
            relation = None if match[3] == "and" else match[3]
            return Demands(background, ((match[1], match[2]), (match[4], match[5])), relation)
        if match := _PATTERN_COUNT.fullmatch(words):
            shape = next(shape for shape, plural in PLURALS.items() if plural == match[3])
            return Demands(background, ((match[2], shape),) * COUNTS[match[1]])
    raise ValueError(
        f"the caption {caption!r} does not describe a scene; write for example 'a red circle left of a blue star on a "
        f"gray background'. Shapes: {', '.join(SHAPES)}; colours: {', '.join(COLOURS)}; backgrounds: "
        f"{', '.join(BACKGROUNDS)}; numbers: {', '.join(COUNTS)}; relations: and, {', '.join(RELATIONS)}."
    )


def family_of(caption: str) -> str:
    """Task family of a caption, by what it asks for.

    Raises:
        ValueError: the caption cannot be read.
    """
    demands = parse_caption(caption)
    kinds = set(demands.objects)
    if demands.relation is not None:
        return "position"
    if len(demands.objects) == 1:
        return "colors" if demands.objects[0][0] is not None else "single_object"
    if len(kinds) == 1:
        return "counting"
    return "color_attr" if all(colour is not None for colour, _ in demands.objects) else "two_object"


def format_caption(demands: Demands) -> str:
    """The caption of some demands: the inverse of `parse_caption`."""

    def name(kind: tuple[str | None, str]) -> str:
        words = " ".join(word for word in kind if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    objects = demands.objects
    if len(objects) == 1:
        words = name(objects[0])
    elif demands.relation is None and len(set(objects)) == 1:
        count = next(word for word, n in COUNTS.items() if n == len(objects))
        words = " ".join(word for word in (count, objects[0][0], PLURALS[objects[0][1]]) if word)
    else:
        words = f"{name(objects[0])} {demands.relation or 'and'} {name(objects[1])}"
    return f"{words} on a {demands.background} background"


def check(image: Image.Image | np.ndarray, caption: str) -> Verdict:
    """Compare an image with its caption.

    Args:
        image: a PIL image, or uint8 ``[H, W, 3]`` in 0..255; square, resized to 128 x 128 if it has another size.
        caption: of one of the six families; see `parse_caption`.

    Raises:
        ValueError: the caption cannot be read, or the image is no square RGB image.
    """
    return judge(image, parse_caption(caption))


def judge(image: Image.Image | np.ndarray, demands: Demands) -> Verdict:
    """As `check`, for demands that no caption need be read for."""
    background, found = find_objects(image)
    met = {} if demands.background is None else {"background": background == demands.background}
    met["count"] = len(found) == len(demands.objects)
    shapes = sorted(str(thing.shape) for thing in found)
    met["objects"] = shapes == sorted(shape for _, shape in demands.objects)
    matches = [order for order in permutations(found) if _is_match(demands, order)] if met["objects"] else []
    if any(colour for colour, _ in demands.objects):
        met["colours"] = bool(matches)
    if demands.relation:
        met["position"] = any(_is_related(order[0], order[1], demands.relation) for order in matches)
    return Verdict(met, background, tuple(found))


def _is_match(demands: Demands, order: tuple[Found, ...]) -> bool:
    return all(
        thing.shape == shape and (colour is None or thing.colour == colour)
        for thing, (colour, shape) in zip(order, demands.objects, strict=True)
    )


def _is_related(first: Found, second: Found, relation: str) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along >= _MIN_DISTANCE and along > abs(across)


def find_objects(image: Image.Image | np.ndarray, side: int | None = IMAGE_SIZE) -> tuple[str | None, list[Found]]:
    """Name of the background (None if no palette entry is near) and the components on it, largest first.

    Args:
        image: a PIL image, or uint8 ``[H, W, 3]`` in 0..255; square.
        side: what it is resized to; None leaves it as it is.

    Raises:
        ValueError: the image is no square RGB image.
    """
    pixels = _pixels(image, side)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    background = _nearest(ground, BACKGROUNDS, _MAX_BACKGROUND_DISTANCE)
    mask = np.linalg.norm(pixels - ground, axis=-1) > _MIN_CONTRAST
    labels = label_components(mask)
    areas = np.bincount(labels.ravel())
    found = [_describe(pixels, ground, labels == i) for i in range(1, len(areas)) if areas[i] >= _MIN_AREA]
    return background, sorted(found, key=lambda thing: -thing.area)


def _describe(pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> Found:
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    core = mask & (contrast >= 0.5 * contrast[mask].max())
    core = _erode(core) if _erode(core).any() else core
    paint = np.median(pixels[core], axis=0)
    colour = _nearest(paint, COLOURS, _MAX_COLOUR_DISTANCE)
    if colour is not None:
        palette = np.array(list(COLOURS.values()), dtype=np.float32)
        nearest = np.linalg.norm(pixels[core][:, None] - palette, axis=-1).argmin(axis=1)
        if (nearest == list(COLOURS).index(colour)).mean() < _MIN_PURITY:
            colour = None
    # Coverage of each pixel: how far it lies on the way from the background's colour to the object's.
    way = paint - ground
    coverage = np.clip((pixels - ground) @ way / max(float(way @ way), 1e-6), 0, 1) * _dilate(mask)
    rows, columns = np.flatnonzero((coverage > 0.5).any(axis=1)), np.flatnonzero((coverage > 0.5).any(axis=0))
    if not len(rows):
        return Found(None, colour, 0.0, 0.0, int(mask.sum()), 0.0)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    x, y = (left + right) / 2, (top + bottom) / 2
    height, width = bottom - top, right - left
    shape, overlap = None, 0.0
    if max(height, width) <= _MAX_ASPECT * min(height, width):
        raster = _raster(coverage[top:bottom, left:right])
        overlaps = {name: _overlap(raster, _template(name, max(height, width))) for name in SHAPES}
        best = max(overlaps, key=overlaps.__getitem__)
        overlap = overlaps[best]
        shape = best if overlap >= MIN_OVERLAP else None
    return Found(shape, colour, float(x), float(y), int(mask.sum()), float(overlap))


def _pixels(image: Image.Image | np.ndarray, side: int | None) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(
            f"an image must be square and RGB, uint8 [H, H, 3]; this one is {image.dtype} {list(image.shape)}."
        )
    if side is not None and image.shape[0] != side:
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
    return image.astype(np.float32)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(entry))) for name, entry in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= limit else None


def _neighbours(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]


def _erode(mask: np.ndarray) -> np.ndarray:
    return mask & np.logical_and.reduce(_neighbours(mask))


def _dilate(mask: np.ndarray) -> np.ndarray:
    return mask | np.logical_or.reduce(_neighbours(mask))


def label_components(mask: np.ndarray) -> np.ndarray:
    """Number the 4-connected components of a bool ``[H, W]``: int ``[H, W]``, 0 outside, then 1, 2, ..."""
    # Every pixel takes the largest number within reach, run by run along rows and columns, until nothing changes.
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        before = labels
        for _ in range(2):
            labels = _spread_along_rows(_spread_along_rows(labels)[:, ::-1])[:, ::-1].T
        if np.array_equal(labels, before):
            break
    return np.unique(labels, return_inverse=True)[1].reshape(mask.shape) + (1 if mask.all() and mask.size else 0)


def _spread_along_rows(labels: np.ndarray) -> np.ndarray:
    # A running maximum that starts anew at each gap: gaps raise the level of everything after them.
    level = np.cumsum(labels == 0, axis=1) * (labels.size + 1)
    return np.where(labels > 0, np.maximum.accumulate(labels + level, axis=1) - level, 0)


def _raster(coverage: np.ndarray) -> np.ndarray:
    resized = Image.fromarray((255 * coverage).astype(np.uint8)).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32) / 255


@lru_cache(maxsize=1024)
def _template(shape: str, extent: int) -> np.ndarray:
    """The raster of a shape whose longer side is ``extent`` pixels: as drawn, so that both are rounded alike."""
    masks = [_crop(shape_mask(shape, size)) for size in range(max(8, extent - 4), extent + 13, 2)]
    return _raster(min(masks, key=lambda mask: abs(max(mask.shape) - extent)))


def _crop(coverage: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero((coverage > 0.5).any(axis=1)), np.flatnonzero((coverage > 0.5).any(axis=0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / max(float(np.maximum(a, b).sum()), 1e-6))


def contradict(caption: str, rng: random.Random | int) -> str:
    """The caption with one demand changed, so that no image can meet both: for testing the checker.

    Changes the background, the number, one shape, one colour (or exchanges the two), or the relation.

    Raises:
        ValueError: the caption cannot be read.
    """
    if not isinstance(rng, random.Random):
        rng = random.Random(rng)
    demands = parse_caption(caption)
    objects = demands.objects
    is_counting = len(objects) > 1 and len(set(objects)) == 1
    changed = []

    def other(value: str | None, values) -> str:
        return rng.choice([v for v in values if v != value])

    changed.append(replace(demands, background=other(demands.background, BACKGROUNDS)))
    which = rng.randrange(len(objects))
    colour, shape = objects[which]
    kinds = [(colour, other(shape, SHAPES))]
    if colour:
        kinds.append((other(colour, COLOURS), shape))
    for kind in kinds:
        new = (kind,) * len(objects) if is_counting else (*objects[:which], kind, *objects[which + 1 :])
        changed.append(replace(demands, objects=new))
    if is_counting:
        n = rng.choice([n for n in COUNTS.values() if n != len(objects)])
        changed.append(replace(demands, objects=objects[:1] * n))
    if demands.relation:
        changed.append(replace(demands, relation=other(demands.relation, RELATIONS)))
    if len(objects) == 2 and objects[0][0] != objects[1][0] and objects[0][1] != objects[1][1]:
        first, second = objects
        changed.append(replace(demands, objects=((second[0], first[1]), (first[0], second[1]))))
    if len(objects) == 1:
        return format_caption(rng.choice(changed))
    # Two equal objects read as a number, which then says something else than "and".
    sane = [d for d in changed if d.relation or is_counting or len(set(d.objects)) == len(d.objects)]
    return format_caption(rng.choice(sane))
