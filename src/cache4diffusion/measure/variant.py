"""What can be measured: a method as the bench sees it, and how variants are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..units import value_text
from .errors import MeasureError


class Variant(Protocol):
    """A method to be measured.

    An optional attribute ``label`` tells variants of one name apart in tables and plots.
    """

    @property
    def name(self) -> str:
        """The method's name, as the results show it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it is called with; JSON-ready values."""
        ...

    @property
    def fidelity(self) -> str:
        """``code``, ``paper``, ``reconstructed``, ``ours``, or ``peer`` for another library's implementation."""
        ...

    def attach(self) -> AbstractContextManager[Any]:
        """Entered around every run and left after it.

        Yields an object whose attributes describe the *last* run: ``full_steps`` (a number), ``total_steps`` (int),
        ``strip`` (str), ``cache_bytes`` (int, at their largest); optional ``predicted_flops_speedup``, ``syncs``
        (numbers), ``notes`` (list of str). Yields None for "every step full".
        """
        ...


def labels_of(variants: Sequence[Variant]) -> list[str]:
    """A label for every variant whose name occurs twice: the name and the settings in which they differ.

    Raises:
        MeasureError: two have the same name and settings, or the name of a row that the bench itself makes.
    """
    labels = []
    for variant in variants:
        same = [other for other in variants if other.name == variant.name]
        label = str(getattr(variant, "label", "") or "")
        if not label and len(same) > 1:
            keys = dict.fromkeys(key for other in same for key in other.settings)
            differ = [key for key in keys if len({repr(other.settings.get(key)) for other in same}) > 1]
            said = ", ".join(f"{key}={value_text(variant.settings[key])}" for key in differ if key in variant.settings)
            label = f"{variant.name} ({said})" if said else variant.name
        labels.append(label)
    names = [label or variant.name for label, variant in zip(labels, variants, strict=True)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MeasureError(f"Several variants are called {', '.join(twice)} with the same settings; give each a label.")
    reserved = [name for name in names if name == "uncached" or name.startswith("fewer-steps-")]
    if reserved:
        raise MeasureError(f"A variant is called {reserved[0]!r}: that row is made by the bench itself.")
    return labels
