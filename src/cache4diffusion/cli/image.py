"""Images on disk: one with its settings inside, and those of a benchmark beside its results; clips as filmstrips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cache4diffusion.errors import FileFormatError
from cache4diffusion.files import write_whole
from cache4diffusion.measure.video import FORMATS, animate, filmstrip, split

METADATA = "cache4diffusion"
"""Key of the PNG text chunk that holds the settings as JSON."""


def save_image(image: Any, path: Path, facts: dict[str, Any]) -> Path:
    """Write an image (float ``[H, W, 3]`` in 0..1, or PIL) as PNG with ``facts`` in its metadata.

    A clip (``[F, H, W, 3]``) becomes a filmstrip; or, without the facts, an animated file where ``path`` ends like one.

    Raises:
        FileFormatError: it cannot be written there.
    """
    if not isinstance(image, Image.Image):
        pixels = np.rint(255 * np.clip(np.asarray(image, dtype=np.float64), 0, 1)).astype(np.uint8)
        if pixels.ndim == 4:
            clip = [Image.fromarray(frame) for frame in pixels]
            if path.suffix.lower() in FORMATS:
                return animate(path, clip)
            image = filmstrip(clip)
        else:
            image = Image.fromarray(pixels)
    info = PngInfo()
    info.add_text(METADATA, json.dumps(facts, ensure_ascii=True, default=repr))
    return write_whole(path, lambda draft: image.save(draft, format="PNG", pnginfo=info))


def save_images(folder: Path, bench: Any) -> None:
    """Keep the report's images beside the results, so that the report can be written again; clips as filmstrips.

    Those of an earlier benchmark are replaced. The index comes last: without it nothing is there.

    Raises:
        FileFormatError: they cannot be written there.
    """
    index = folder / "index.json"
    rows = {
        name: [f"{number:02d}-{position:02d}.png" for position in range(len(images))]
        for number, (name, images) in enumerate(bench.images.items())
    }
    try:
        index.unlink(missing_ok=True)
        for stale in folder.glob("[0-9][0-9]-[0-9][0-9].png"):
            stale.unlink()
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be written: {error.strerror or error}.") from error
    frames = None  # of clips
    for name, images in bench.images.items():
        for file, image in zip(rows[name], images, strict=True):
            if isinstance(image, list):
                image, frames = filmstrip(image), len(image)
            write_whole(folder / file, lambda draft, image=image: image.save(draft, format="PNG"))
    content = {"captions": [str(caption) for caption in bench.captions], "rows": rows, "frames": frames}
    write_whole(index, json.dumps(content, indent=1, ensure_ascii=False))


def load_images(folder: Path, results: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """What `save_images` wrote, for the rows that ``results`` have; nothing if the folder is not there.

    Raises:
        FileFormatError: the folder is incomplete.
    """
    index = folder / "index.json"
    if not index.exists():
        return {}, []
    names = {row.name for row in results.rows}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        images: dict[str, list[Any]] = {
            name: [Image.open(folder / file).copy() for file in files]
            for name, files in content["rows"].items()
            if name in names
        }
        if frames := content.get("frames"):
            return {name: [split(strip, frames) for strip in strips] for name, strips in images.items()}, list(
                content["captions"]
            )
        return images, list(content["captions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"The images in {folder} cannot be used ({error}); remove the folder.") from error
