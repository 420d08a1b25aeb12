"""Writing files: whole or not at all, and refused before work is done for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cache4diffusion.errors import FileFormatError


def write_whole(path: str | Path, content: str | Callable[[Path], object]) -> Path:
    """Write a file under another name and put it in place when it is complete; folders are made.

    Args:
        path: of the file; replaced if it exists.
        content: its text (UTF-8), or what writes a file to the path it is called with.

    Returns:
        ``path``.

    Raises:
        FileFormatError: it cannot be written there; what was there is still there.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if callable(content):
                content(draft)
            else:
                draft.write_text(content, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def check_writable(path: str | Path) -> None:
    """Refuse a path that `write_whole` could not write, as far as one can tell; nothing is created.

    Raises:
        FileFormatError: it is a folder, lies in none, or may not be written.
    """
    path = Path(path)
    if path.is_dir():
        raise FileFormatError(f"{path} cannot be written: it is a folder.")
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise FileFormatError(f"{path} cannot be written: {folder} is no folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileFormatError(f"{path} cannot be written: {folder} may not be written to.")
