"""A method is a named composition: settings that stand for four axes, site x gate x predictor x token rule."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from cache4diffusion.beside import BESIDE
from cache4diffusion.calibration import Calibration, Calibrator, Entry
from cache4diffusion.calibration.store import command, misshapen, opened
from cache4diffusion.composition import Composition, Decide
from cache4diffusion.errors import CalibrationError, UnknownNameError, closest
from cache4diffusion.info import FAMILIES, TRAINED, Dial, Family, Fidelity, MethodInfo
from cache4diffusion.settings import check, check_names, describe

METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method: frozen settings that compose the four axes.

    A subclass declares its settings with `setting`, its `info`, and `compose`. Making it checks the settings.
    """

    info: ClassVar[MethodInfo]
    calibrator: ClassVar[type[Calibrator] | None] = None  # what a calibration of it makes; settings: calibration, ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "info" in cls.__dict__:
            METHODS[cls.info.name] = cls

    def __new__(cls, *args: Any, **settings: Any) -> Method:
        """Refuse unknown settings in words; Python's own TypeError would not name the nearest one."""
        check_names(f"Method {cls.info.name!r}", settings, [entry.name for entry in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check(self)
        made = self.loaded
        if made is None and self.info.needs_calibration:
            return  # compose() says what is missing; until then it can be shown, and calibrated
        names = list(made.entries) if made is not None else []
        for each in [self.of(name) for name in names] if len(names) > 1 else [self]:
            each.compose()  # contradictory settings fail here, not on the first step

    @abstractmethod
    def compose(self) -> Composition:
        """The composition these settings stand for."""

    def outline(self) -> Composition:
        """A composition that holds as many bytes as this one, also where its numbers are not measured yet.

        Raises:
            CalibrationError: how much is held depends on what is measured.
        """
        return self.compose()

    # -- calibration -----------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> Calibration | None:
        """The calibration among its settings, if one is given.

        Raises:
            FileFormatError: the file cannot be used.
            CalibrationError: it was made for another method.
        """
        given = getattr(self, "calibration", None)
        if given is None:
            return None
        made = opened(given, self.info.name)
        if made.method != self.info.name:
            raise CalibrationError(
                f"{made!r} was made for {made.method}, not for {self.info.name}. Make one: {command(self.info.name)}"
            )
        return made

    @property
    def measured(self) -> Entry:
        """What was measured of the denoiser, for `compose`.

        Raises:
            CalibrationError: there is no calibration; the command that makes one is named. Or its numbers have the
                wrong shape.
        """
        made = self.loaded
        if made is None:
            name = self.info.name
            raise CalibrationError(
                f"{name} needs a calibration made on your denoiser, and has none. Make one: {command(name)} (or "
                f"cache4diffusion.calibrate(pipe, {name!r}, prompts)), then give it: "
                f"accelerate(pipe, {name!r}, calibration='{name}.safetensors')."
            )
        problem = misshapen(made.statistic, made.entry.fit, made.provenance.steps)
        if problem:
            raise CalibrationError(f"{made!r}: {problem}")
        return made.entry

    def of(self, denoiser: str) -> Method:
        """This method for one of a pipeline's denoisers: with its own entry of the calibration."""
        made = self.loaded
        return self if made is None else dataclasses.replace(self, calibration=made.only(denoiser))  # type: ignore[call-arg]

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """Name and value of every setting."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Name, default, range and meaning of every setting."""
        return describe(cls)

    @classmethod
    def row(cls) -> dict[str, Any]:
        """The registry row, as ``c4d methods --json`` prints it."""
        return cls.info.row(needs_num_steps=cls.info.needs_calibration or cls().compose().needs_num_steps)

    def is_off(self) -> bool:
        """Whether these settings never cache (as far as the registry's `off` row says)."""
        return all(getattr(self, name) == value for name, value in self.info.off.items())


def method(name: str, **settings: Any) -> Method:
    """Make a method by its slug.

    Raises:
        UnknownNameError: no method of that name; the nearest is named.
        SettingError: a setting is unknown or out of range.
    """
    return method_class(name)(**settings)


def method_class(name: str) -> type[Method]:
    """The class of a method, by its slug.

    Raises:
        UnknownNameError: no method of that name; the nearest is named.
    """
    if name in BESIDE:
        raise UnknownNameError(f"{name!r} cannot be attached: it has {BESIDE[name].needs}.")
    if name not in METHODS:
        raise UnknownNameError(
            f"There is no method {name!r}{closest(name, METHODS) or '.'} Known: {', '.join(sorted(METHODS))}."
        )
    return METHODS[name]


__all__ = [
    "FAMILIES",
    "METHODS",
    "TRAINED",
    "Composition",
    "Decide",
    "Dial",
    "Family",
    "Fidelity",
    "Method",
    "MethodInfo",
    "method",
    "method_class",
]
