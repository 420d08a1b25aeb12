"""Profiles: a method with its settings in a YAML or JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cache4diffusion.errors import FileFormatError
from cache4diffusion.files import write_whole
from cache4diffusion.options import OPTIONS


class Profile(BaseModel):
    """A saved choice.

    Example::

        method: dbcache
        settings: {threshold: 0.1, front: 4}
        axes: {predictor: "newton(order=1)", cfg: fastercache}
        cache_dtype: bf16
        memory_budget: 2GiB
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    method: str
    settings: dict[str, Any] = {}
    axes: dict[str, str] = {}
    cache_dtype: str | None = None
    cache_device: str | None = None
    memory_budget: int | str | None = None
    allow_downgrade: bool = False
    strict: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options of `accelerate` that are not at their default."""
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name)}


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        FileFormatError: the file is missing, no YAML or JSON, or has other fields than `Profile`; each is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise FileFormatError(f"The profile {path} cannot be read: {reason}.") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(f"The profile {path} is not valid {path.suffix[1:].upper()}: {reason}.") from error
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise FileFormatError(
            f"The profile {path} cannot be used ({problems}). It has the fields method, settings and axes, and "
            f"may have {', '.join(OPTIONS)}."
        ) from error
    for name, value in profile.settings.items():
        if isinstance(value, list):
            profile.settings[name] = tuple(value)
    return profile


def save_profile(path: Path, profile: Profile) -> None:
    """Write a profile, whole or not at all.

    Raises:
        FileFormatError: it cannot be written there.
    """
    content = profile.model_dump(mode="json", include={"method", "settings", "axes", *profile.options})
    write_whole(
        path, json.dumps(content, indent=2) if path.suffix == ".json" else yaml.safe_dump(content, sort_keys=False)
    )
