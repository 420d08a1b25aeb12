"""Every method at its settings from gentle to hard: what ``c4d bench --methods all`` measures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cache4diffusion.calibration.store import command
from cache4diffusion.data import calibrated_models, shipped_calibrations
from cache4diffusion.errors import FileFormatError
from cache4diffusion.method import METHODS, Method, method


class Ladder(NamedTuple):
    """Methods to measure, and why the others are not among them."""

    methods: list[Method]
    left_out: dict[str, str]  # by slug


def ladder(calibrations: str | Path | None = None) -> Ladder:
    """Every method of the registry at each setting of its `MethodInfo.ladder`.

    Args:
        calibrations: a folder with a ``METHOD.safetensors`` for each method that takes a calibration, or the reference
            model whose shipped ones are used; None: methods that need one are left out, others go without.

    Raises:
        FileFormatError: there is no such folder or model, or a calibration cannot be used.
        CalibrationError: it was made for another method.
    """
    if calibrations is not None and not Path(calibrations).is_dir() and str(calibrations) not in calibrated_models():
        raise FileFormatError(
            f"There is no folder {calibrations} of calibrations. Shipped ones are for {', '.join(calibrated_models())}."
        )
    found, left_out = Ladder([], {}), {}
    for name in sorted(METHODS):
        info, given = METHODS[name].info, _calibration(name, calibrations)
        if info.needs_calibration and given is None:
            where = f"in {calibrations}" if calibrations is not None else "given"
            left_out[name] = f"it needs a calibration, and none is {where}: {command(name)}"
            continue
        more = {} if given is None else {"calibration": given}
        found.methods.extend(method(name, **{**more, **rung}) for rung in info.ladder)
    return found._replace(left_out=left_out)


def _calibration(name: str, calibrations: str | Path | None) -> str | None:
    if calibrations is None or METHODS[name].calibrator is None:
        return None
    file = Path(calibrations) / f"{name}.safetensors"
    if file.is_file():
        return str(file)
    return str(calibrations) if str(calibrations) in shipped_calibrations(name) else None


__all__ = ["Ladder", "ladder"]
