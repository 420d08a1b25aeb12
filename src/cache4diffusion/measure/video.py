"""Video against a reference: frame by frame, and from frame to frame; filmstrips and animated files.

Videos are ``[N, F, H, W, 3]`` in 0..1, arrays or tensors, or lists of clips; a clip is a list of PIL images. Every
metric returns one value per video, `frame_by_frame` one per frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_whole
from .errors import MeasureError
from .metrics import as_images, as_pil, flip, psnr, ssim

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".webp": "WEBP", ".gif": "GIF"}
"""Animated files that `animate` writes, by their suffix. A GIF has 256 colours; a WebP here loses nothing."""

COLUMNS = 4
"""Frames beside each other in a `filmstrip`."""

_WALL = 4096  # pixels: the longest side of an animated wall


def is_video(pictures: Any) -> bool:
    """Whether a batch is one of videos: five dimensions, or a list of clips."""
    if isinstance(pictures, list | tuple):
        return bool(pictures) and isinstance(pictures[0], list | tuple)
    return getattr(pictures, "ndim", 0) == 5


def as_videos(videos: Any) -> np.ndarray:
    """Bring ``videos`` to a float32 array ``[N, F, H, W, 3]`` in 0..1.

    Raises:
        MeasureError: another shape, clips of different lengths, NaN or Inf, or values outside 0..1.
    """
    if isinstance(videos, list | tuple) and is_video(videos):
        lengths = sorted({len(clip) for clip in videos})
        if len(lengths) > 1:
            raise MeasureError(f"Clips of {', '.join(map(str, lengths))} frames cannot be one batch.")
        return np.stack([as_images(clip) for clip in videos])
    array: Any = videos
    if getattr(array, "ndim", 0) != 5:
        shape = list(getattr(array, "shape", ())) or type(array).__name__
        raise MeasureError(f"Videos have shape {shape}, expected [N, F, H, W, 3].")
    frames = as_images(array.reshape(-1, *array.shape[2:]))
    return frames.reshape(tuple(array.shape))


def as_clips(videos: Any) -> list[list[Image]]:
    """8-bit PIL images of a batch of videos, a list per video."""
    return [as_pil(frames) for frames in as_videos(videos)]


def frame_by_frame(metric: Callable[[Any, Any], np.ndarray], videos: Any, reference: Any) -> np.ndarray:
    """A metric of images, such as `psnr`, of every frame: float64 ``[N, F]``."""
    videos, reference = _pair(videos, reference)
    values = metric(videos.reshape(-1, *videos.shape[2:]), reference.reshape(-1, *reference.shape[2:]))
    return values.reshape(videos.shape[:2])


def temporal_error(videos: Any, reference: Any) -> np.ndarray:
    """How differently two videos change from frame to frame: the mean of ``|(v' - v) - (r' - r)|``, 0 to 2.

    0 if every frame differs from its reference by the same picture, however large that difference is: what flickers
    where the reference does not, or moves otherwise, has an error, what is merely drawn otherwise has none.

    Args:
        videos, reference: of two frames or more.
    Returns:
        float64 ``[N]``.
    """
    videos, reference = _pair(videos, reference)
    if videos.shape[1] < 2:
        raise MeasureError("temporal_error needs videos of two frames or more.")
    change = np.diff(videos.astype(np.float64), axis=1) - np.diff(reference.astype(np.float64), axis=1)
    return np.abs(change).mean(axis=(1, 2, 3, 4))


def _pair(videos: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    videos, reference = as_videos(videos), as_videos(reference)
    if videos.shape != reference.shape:
        raise MeasureError(f"Videos {list(videos.shape)} and their reference {list(reference.shape)} differ in shape.")
    return videos, reference


@dataclass(frozen=True)
class Closeness:
    """How close pictures are to their reference, a value each; of videos also ``[N, F]`` per frame, by metric.

    A video's PSNR is that of its mean squared error over all frames; SSIM and FLIP are means over frames.
    """

    psnr: np.ndarray
    ssim: np.ndarray
    flip: np.ndarray
    temporal: np.ndarray | None = None
    frames: dict[str, np.ndarray] | None = None


def closeness(pictures: Any, reference: Any) -> Closeness:
    """Images or videos against their reference."""
    if not is_video(pictures):
        return Closeness(psnr(pictures, reference), ssim(pictures, reference), _share(flip(pictures, reference)))
    metrics = {"psnr": psnr, "ssim": ssim, "flip": flip}
    frames = {name: frame_by_frame(metric, pictures, reference) for name, metric in metrics.items()}
    frames["flip"] = _share(frames["flip"])
    errors = 10 ** (
        -frames["psnr"] / 10
    )  # frames are of one size: the mean of their mean squared errors is the video's
    with np.errstate(divide="ignore"):
        whole = -10 * np.log10(errors.mean(axis=1))
    temporal = temporal_error(pictures, reference)
    return Closeness(whole, frames["ssim"].mean(axis=1), frames["flip"].mean(axis=1), temporal, frames)


def _share(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 1)  # rounding leaves it a little


def filmstrip(clip: Sequence[Image]) -> Image:
    """All frames of a clip in one image, `COLUMNS` of them beside each other, the first at the top left."""
    from PIL import Image

    width, height = clip[0].size
    columns = min(COLUMNS, len(clip))
    strip = Image.new("RGB", (width * columns, height * math.ceil(len(clip) / columns)))
    for i, frame in enumerate(clip):
        strip.paste(frame.convert("RGB"), (width * (i % columns), height * (i // columns)))
    return strip


def split(strip: Image, frames: int) -> list[Image]:
    """The frames of a `filmstrip`."""
    columns = min(COLUMNS, frames)
    width, height = strip.width // columns, strip.height // math.ceil(frames / columns)
    corners = [(width * (i % columns), height * (i // columns)) for i in range(frames)]
    return [strip.crop((x, y, x + width, y + height)) for x, y in corners]


def animate(path: str | Path, clip: Sequence[Image], fps: float = 8.0) -> Path:
    """Write an animated file that repeats for ever: WebP or GIF, by the suffix.

    Raises:
        MeasureError: another suffix, or no frame.
        FileFormatError: it cannot be written there.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise MeasureError(f"{path.name}: animated files are {' or '.join(FORMATS)}.")
    if not clip:
        raise MeasureError(f"{path.name}: a clip has at least one frame.")
    frames = [frame.convert("RGB") for frame in clip]
    options: dict[str, Any] = {"append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    kind = FORMATS[path.suffix.lower()]
    if kind == "WEBP":
        options["lossless"] = True
    return write_whole(path, lambda draft: frames[0].save(draft, kind, save_all=True, **options))


def wall(rows: Sequence[Sequence[Sequence[Image]]], gap: int = 4) -> list[Image]:
    """One clip of many that run side by side: a row of clips for each of ``rows``, all of one size and length.

    Shrunk where it would be longer than 4096 pixels.
    """
    from PIL import Image

    width, height = rows[0][0][0].size
    columns = max(map(len, rows))
    full = columns * (width + gap) - gap, len(rows) * (height + gap) - gap
    scale = min(1.0, _WALL / max(full))
    size = max(1, int(full[0] * scale)), max(1, int(full[1] * scale))
    frames = []
    for i in range(len(rows[0][0])):
        canvas = Image.new("RGB", full, "white")
        for y, clips in enumerate(rows):
            for x, clip in enumerate(clips):
                canvas.paste(clip[i].convert("RGB"), (x * (width + gap), y * (height + gap)))
        frames.append(canvas if scale == 1 else canvas.resize(size))
    return frames
