"""MagCache: the residual's magnitude follows a law that is known before sampling.

Source: arXiv:2506.09045; released code Zehong-Ma/MagCache, diffusers' hooks/mag_cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.magnitudes import MagnitudeRatios
from cache4diffusion.data import magcache_ratios
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import MagnitudeError
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class MagCache(Method):
    """Reuse the residual of all blocks until its magnitude must have drifted too far.

    ``ratio_i`` is the mean over tokens of ``|R_i| / |R_(i-1)|`` for the residual R of all blocks: nearly the same for
    every prompt, so it is measured once per denoiser. ``A *= ratio_i``, ``error += |1 - A|`` since the last full step;
    cached while ``error < threshold`` and at most ``max_run`` times in a row. The cached residual is added as it is,
    not rescaled by A. Nothing is watched while sampling.

    ``ratios`` is a set's name from the published table (``"flux"``; not re-measured here) or numbers, one per step of a
    run of any length. ``"flux"`` fits FLUX.1-dev only: for another denoiser give its own, or a ``calibration``, which
    has them for each CFG branch. A run of other steps or noise levels than the calibration's needs ``resample=True``.

    Cost: one residual per stream that is read afterwards. A cached step runs no block.
    Differences from the code: ``<`` instead of ``<=``, so that 0 is off; ratios of a table of another length are
    interpolated as a law (the code takes the nearest step's, although shorter steps change less).
    ``variant="official"`` does both as the FLUX code and never caches the step that stands for number 11 of 28.
    """

    threshold: float = setting(0.24, "accumulated error at which a step is full; 0 is off. Code: 0.24 (FLUX)", ge=0)
    max_run: int = setting(5, "most cached steps in a row. Code: 5 (FLUX), 3 (diffusers), 2 (Wan)", ge=0)
    retention: float = setting(0.1, "first fraction of the steps that is full. Code: 0.1 (FLUX), 0.2", ge=0, le=1)
    ratios: str | tuple[float, ...] = setting("flux", "name of a published set, or numbers, one per step")
    variant: Literal["default", "official"] = setting("default", "'official': the FLUX code's comparison and table")
    calibration: Given = setting(None, "ratios of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps than the calibration's; its law is interpolated")

    calibrator = MagnitudeRatios

    info: ClassVar[MethodInfo] = MethodInfo(
        name="magcache",
        title="MagCache",
        arxiv="2506.09045",
        site="span",
        gate="magnitude law",
        predictor="reuse of the residual",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="reuse of blocks and parts",
        when="the denoiser's magnitude ratios are known, and deciding should cost nothing",
        ladder=({"threshold": 0.02}, {"threshold": 0.08}, {"threshold": 0.5}),
        citation="Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, NeurIPS 2025",
        published={
            "FLUX.1-dev": {"threshold": 0.24, "max_run": 5, "retention": 0.1, "ratios": "flux"},
            "FLUX.1-dev, diffusers": {"threshold": 0.06, "max_run": 3, "retention": 0.2, "ratios": "flux"},
        },
    )

    def compose(self) -> Composition:
        """All blocks x magnitude law x reuse."""
        is_official, branches, made_for = self.variant == "official", {}, None
        ratios = magcache_ratios(self.ratios) if isinstance(self.ratios, str) else self.ratios
        if self.calibration is not None:
            if self.ratios != "flux":
                raise SettingError(f"MagCache(ratios={self.ratios!r}, calibration=...): give one of the two.")
            entry = self.measured
            measured = {name: tuple(values.tolist()) for name, values in entry.fit.items()}
            ratios = measured.pop("ratios")
            branches = {name.removeprefix("ratios/"): values for name, values in measured.items()}
            made_for = None if self.resample else (len(ratios), entry.levels)
        return Composition(
            site=Span(),
            gate=MagnitudeError(
                ratios=ratios,
                threshold=self.threshold,
                max_run=self.max_run,
                retention=self.retention,
                resample="nearest" if is_official else "law",
                is_inclusive=is_official,
                exempt=(11,) if is_official and self.ratios == "flux" and self.calibration is None else (),
                branches=branches,
            ),
            predictor=Reuse(),
            made_for=made_for,
        )
