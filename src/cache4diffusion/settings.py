"""Settings of methods and components: declared once, checked when made, printed by the CLI.

A setting is a dataclass field made with `setting`, which carries its range and its line of documentation. `check`
validates a whole object, so that a wrong value fails where it is written and with the words a user needs.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any

from cache4diffusion.errors import SettingError, UnknownNameError, closest


@dataclass(frozen=True)
class Range:
    """Accepted values of a setting; a bound that is None is open."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def __str__(self) -> str:
        words = []
        if self.minimum is not None:
            words.append(f"{self.minimum:g} or more")
        if self.above is not None:
            words.append(f"more than {self.above:g}")
        if self.maximum is not None:
            words.append(f"at most {self.maximum:g}")
        return " and ".join(words)

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies inside (NaN never does)."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and value == value
        )


def setting(
    default: Any, doc: str, *, ge: float | None = None, le: float | None = None, gt: float | None = None
) -> Any:
    """Declare a setting of a method.

    Args:
        default: its default value.
        doc: one line: meaning, unit, the published value.
        ge: smallest accepted value.
        le: largest accepted value.
        gt: accepted values are larger than this.
    """
    return field(default=default, metadata={"doc": doc, "range": Range(ge, le, gt)})


# What papers' codes and other libraries call our settings; only used to name ours in an error.
PEER_NAMES = {
    # TeaCache
    "rel_l1_thresh": "threshold",
    # ParaAttention, cache-dit, diffusers
    "residual_diff_threshold": "threshold",
    "fn_compute_blocks": "front",
    "bn_compute_blocks": "back",
    "max_warmup_steps": "warmup",
    "warmup_steps": "warmup",
    "max_cached_steps": "max_cached",
    "max_continuous_cached_steps": "max_run",
    "max_accumulated_residual_diff_threshold": "max_accumulated",
    "steps_computation_mask": "mask",
    "steps_computation_policy": "mask_policy",
    "taylorseer_order": "order",
    "cache_interval": "interval",
    "disable_cache_before_step": "warmup",
    "skip_range": "interval",
    "unconditional_batch_skip_range": "interval",
    # TaylorSeer, SpeCa, ToCa
    "fresh_threshold": "interval",
    "first_enhance": "warmup",
    "max_order": "order",
    "base_threshold": "threshold",
    "decay_rate": "decay",
    "min_taylor_steps": "min_run",
    "max_taylor_steps": "max_run",
    "error_metric": "metric",
    "fresh_ratio": "recompute_ratio",
    "fresh_ratio_schedule": "schedule",
    "soft_fresh_weight": "age_weight",
    "cache_type": "score",
    # DeepCache
    "cache_branch_id": "block and layer",  # 3 block + layer
    "cache_block_id": "block",
    "cache_layer_id": "layer",
    "pow": "power",
}


def check_names(owner: str, given: typing.Iterable[str], accepted: typing.Iterable[str]) -> None:
    """Refuse names that are not settings of ``owner``, naming the nearest valid one.

    Raises:
        SettingError: a name is unknown.
    """
    accepted = list(accepted)
    for name in given:
        if name in accepted:
            continue
        ours = PEER_NAMES.get(name.lower(), name).split(" and ")
        is_known = all(word in accepted for word in ours)
        hint = f"; here it is called {' and '.join(map(repr, ours))}." if is_known else closest(name, accepted)
        listed = ", ".join(accepted) or "none"
        raise SettingError(f"{owner} has no setting {name!r}{hint or '.'} Its settings: {listed}.")


def check(owner: Any) -> None:
    """Check every declared setting of a dataclass instance: type, range, choices.

    Raises:
        SettingError: a value has the wrong type or lies outside its range.
    """
    hints = typing.get_type_hints(type(owner))
    for entry in dataclasses.fields(owner):
        if "range" not in entry.metadata:
            continue
        value, wanted = getattr(owner, entry.name), hints[entry.name]
        label = f"{type(owner).__name__}({entry.name}={value!r})"
        if not _is_a(value, wanted):
            raise SettingError(f"{label}: {entry.name} must be {_words(wanted)}.")
        limits: Range = entry.metadata["range"]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not limits.contains(value):
            raise SettingError(f"{label}: {entry.name} must be {limits or 'a number'}.")


def _is_a(value: Any, wanted: Any) -> bool:
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(wanted))
    if origin is typing.Literal:
        return value in typing.get_args(wanted)
    if origin is tuple:
        item = typing.get_args(wanted)[0]
        return isinstance(value, tuple) and all(_is_a(entry, item) for entry in value)
    if isinstance(origin, type):
        return isinstance(value, origin)
    if wanted is Any:
        return True
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted is type(None):
        return value is None
    return isinstance(value, wanted)


def _words(wanted: Any) -> str:
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(wanted))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(wanted))
    if origin is tuple:
        return "a tuple of " + _words(typing.get_args(wanted)[0])
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(wanted, getattr(wanted, "__name__", str(wanted)))


def describe(cls: type) -> list[dict[str, Any]]:
    """The settings of a dataclass, for documentation: name, default, range, meaning."""
    rows = []
    for entry in dataclasses.fields(cls):
        if "range" in entry.metadata:
            default = entry.default if entry.default is not MISSING else None
            rows.append(
                {
                    "name": entry.name,
                    "default": default,
                    "accepts": str(entry.metadata["range"]) or _words(typing.get_type_hints(cls)[entry.name]),
                    "doc": entry.metadata["doc"],
                }
            )
    return rows


def plain(settings: typing.Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON takes them: tuples as lists, objects in words."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return [of(entry) for entry in value]
        return value if isinstance(value, (bool, int, float, str, list, dict)) or value is None else repr(value)

    return {name: of(value) for name, value in settings.items()}


def read_call(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of ``"newton(order=1)"`` or ``"newton"``.

    Values are Python literals; a single word is text without quotes, and so is what looks like a call:
    ``"taylorseer-lite(gate=widening(window=3), cache_dtype=bf16)"``.

    Args:
        text: what the user wrote.
        what: what it names, for the error.

    Raises:
        SettingError: it cannot be read.
    """
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name.strip(), {}
    source = f"f({rest}"
    try:
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError(text)
        given = {keyword.arg: _read_value(keyword.value, source) for keyword in call.keywords}
        if None in given:
            raise ValueError(text)
    except (SyntaxError, ValueError) as error:
        raise SettingError(
            f"Cannot read the {what} {text!r}: write it like 'name(setting=value)'. A value is a number, a word or "
            "'a text'."
        ) from error
    return name.strip(), {str(key): value for key, value in given.items()}


def call_text(name: str, settings: typing.Mapping[str, typing.Any]) -> str:
    """A name and its settings as `read_call` reads them: ``"newton(order=1)"``, or the name alone."""
    words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({words})" if words else name


def _read_value(node: ast.expr, source: str) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return ast.get_source_segment(source, node)
    return ast.literal_eval(node)


def component(text: str, table: dict[str, type], what: str) -> Any:
    """Make a component from ``"newton(order=1)"`` or ``"newton"``.

    Args:
        text: name, optionally with keyword settings in brackets; values are Python literals.
        table: names and classes.
        what: the axis, for the error.

    Raises:
        UnknownNameError: no such name.
        SettingError: the brackets cannot be read, or a setting is unknown or out of range.
    """
    name, settings = read_call(text, what)
    if name not in table:
        raise UnknownNameError(
            f"There is no {what} {name!r}{closest(name, table) or '.'} Known: {', '.join(sorted(table))}."
        )
    cls = table[name]
    check_names(f"{what} {name!r}", settings, [entry.name for entry in dataclasses.fields(cls)])
    hints = typing.get_type_hints(cls)
    for setting_name, value in settings.items():
        if isinstance(value, list):
            value = settings[setting_name] = tuple(value)
        if not _is_a(value, hints[setting_name]):
            raise SettingError(
                f"{what} {name!r}: {setting_name}={value!r}, but {setting_name} must be {_words(hints[setting_name])}."
            )
    return cls(**settings)
