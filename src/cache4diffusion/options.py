"""Options that every method takes: how its cache is kept, how large it may be, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.storage import Storage
from cache4diffusion.units import size_of, size_text

OPTIONS = ("cache_dtype", "cache_device", "memory_budget", "allow_downgrade", "strict")
"""Names of the options; no method has a setting of such a name."""


@dataclass(frozen=True)
class Options:
    """What `accelerate` is told beside the method.

    Args:
        storage: how snapshots are kept.
        memory_budget: bytes that the cache may take on the denoisers' device; None for any.
        allow_downgrade: whether the first choice that fits is taken where the budget does not hold the one asked for.
        strict: whether warnings of a run that cannot gain, or of a calibration for other weights, are errors.
    """

    storage: Storage = field(default_factory=Storage)
    memory_budget: int | None = None
    allow_downgrade: bool = False
    strict: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From what a user writes; None is the default.

        Raises:
            SettingError: a value is not accepted.
        """
        flags = {name: given.get(name) or False for name in ("allow_downgrade", "strict")}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise SettingError(f"{name}={value!r}: use True or False.")
        budget = given.get("memory_budget")
        if flags["allow_downgrade"] and budget is None:
            raise SettingError("allow_downgrade=True needs a memory_budget=, such as '2GiB'.")
        return cls(
            Storage.of(given.get("cache_dtype"), given.get("cache_device")),
            None if budget is None else size_of(budget, "memory_budget"),
            **flags,
        )

    @property
    def unlimited(self) -> Options:
        """The same without a budget."""
        return replace(self, memory_budget=None, allow_downgrade=False)

    @property
    def given(self) -> dict[str, Any]:
        """What differs from the default, as it is written."""
        found: dict[str, Any] = dict(self.storage.given)
        if self.memory_budget is not None:
            found["memory_budget"] = size_text(self.memory_budget)
        return found | {name: True for name in ("allow_downgrade", "strict") if getattr(self, name)}


def take_options(settings: dict[str, Any]) -> dict[str, Any]:
    """The options among settings, taken out of them."""
    return {name: settings.pop(name) for name in OPTIONS if name in settings}
