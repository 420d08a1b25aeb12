"""Images on disk: one with its settings inside, and those of a benchmark beside its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cache4diffusion.errors import FileFormatError
from cache4diffusion.files import write_whole

METADATA = "cache4diffusion"
"""Key of the PNG text chunk that holds the settings as JSON."""


def save_image(image: Any, path: Path, facts: dict[str, Any]) -> Path:
    """Write an image (float ``[H, W, 3]`` in 0..1, or PIL) as PNG with ``facts`` in its metadata.

    Raises:
        FileFormatError: it cannot be written there.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.rint(255 * np.clip(np.asarray(image, dtype=np.float64), 0, 1)).astype(np.uint8))
    info = PngInfo()
    info.add_text(METADATA, json.dumps(facts, ensure_ascii=True, default=repr))
    return write_whole(path, lambda draft: image.save(draft, format="PNG", pnginfo=info))


def save_images(folder: Path, bench: Any) -> None:
    """Keep the report's images beside the results, so that the report can be written again.

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
    for name, images in bench.images.items():
        for file, image in zip(rows[name], images, strict=True):
            write_whole(folder / file, lambda draft, image=image: image.save(draft, format="PNG"))
    captions = [str(caption) for caption in bench.captions]
    write_whole(index, json.dumps({"captions": captions, "rows": rows}, indent=1, ensure_ascii=False))


def load_images(folder: Path, results: Any) -> tuple[dict[str, list[Image.Image]], list[str]]:
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
        images = {
            name: [Image.open(folder / file).copy() for file in files]
            for name, files in content["rows"].items()
            if name in names
        }
        return images, list(content["captions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"The images in {folder} cannot be used ({error}); remove the folder.") from error
