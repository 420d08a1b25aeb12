"""Block Caching: each block's output is reused as long as it was seen to change little, and mended per channel.

Source: arXiv:2312.03209 (Cache Me if You Can, CVPR 2024); no code is out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.scale_shift import ScaleShift as Trained
from cache4diffusion.calibration.scale_shift import site_of
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import Timetable, accumulated_steps
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse, ScaleShift
from cache4diffusion.settings import setting


@dataclass(frozen=True)
class BlockCaching(Method):
    """Every block has a schedule, by its summed changes, and what it reuses is scaled and shifted.

    ``r[i] = |C_i - C_(i-1)|_1 / |C_i|_1`` of what a block adds is measured by ``c4d calibrate``, a mean over prompts; a
    block is cached while the sum of r since it last ran stays at ``threshold`` or below. At such a step it goes on
    with ``a * C + d``, where ``a`` and ``d``, per channel, step and block, were trained by the same command on your
    denoiser, which stays as it is, against its own uncached outputs. They belong to one schedule: ``--set
    threshold=0.2`` when calibrating decides about it. Without them (``scale_shift=False``) any threshold can be had.
    What was computed at another step than the schedule's (where guidance ends, say) is reused as it is.

    Changes of 0.2 with a threshold of 0.5 over 7 steps are ``FccFccF``. A run of other steps or noise levels than the
    calibration's needs ``resample=True`` and ``scale_shift=False``.

    On U-Nets calibrate with ``--set unit=transformer``: blocks are then what the paper caches, whole spatial
    transformers, with the projections around their transformer blocks, and ResNet blocks always run. With ``--set
    unit=part`` each part of their transformer blocks is cached by itself.

    Cost: 1 copy of what every block adds; a cached block does not run. No host sync.
    Differences from the paper: it caches in U-Nets only. A threshold of 0 is off. Its threshold and the training's
    settings are not known; ours are.
    """

    threshold: float | None = setting(
        None, "largest sum of changes that is cached; 0 is off, None is what it was calibrated for", ge=0
    )
    scale_shift: bool = setting(True, "whether what is reused is scaled and shifted")
    calibration: Given = setting(None, "changes, scale and shift: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = Trained
    info: ClassVar[MethodInfo] = MethodInfo(
        name="block-caching",
        title="Block Caching",
        arxiv="2312.03209",
        site="blocks",
        gate="calibrated schedule per block",
        predictor="scaled and shifted reuse",
        tokens=None,
        fidelity="paper",
        off={"threshold": 0.0},
        family="reuse of blocks and parts",
        when="blocks may have schedules measured on your denoiser, and scale and shift trained against artefacts",
        ladder=({"threshold": 0.05, "scale_shift": False}, {"threshold": 0.1, "scale_shift": False}, {}),
        citation="Wimbauer et al., Cache Me if You Can: Accelerating Diffusion Models through Block Caching, CVPR 2024",
        needs_calibration=True,
    )

    def compose(self) -> Composition:
        """Blocks (or parts) x schedule of each x scaled and shifted reuse."""
        entry, trained = self.measured, self.trained
        threshold = trained.threshold if self.threshold is None else self.threshold
        is_mended = self.scale_shift and threshold > 0
        if is_mended and threshold != trained.threshold:
            raise SettingError(
                f"BlockCaching(threshold={threshold}): scale and shift were trained for the schedule of threshold "
                f"{trained.threshold}. Calibrate with --set threshold={threshold}, or give scale_shift=False."
            )
        if is_mended and self.resample:
            raise SettingError(
                "BlockCaching(resample=True): scale and shift belong to the steps they were trained at. Calibrate for "
                "these steps, or give scale_shift=False."
            )
        changes = {key.split(" ", 1)[1]: row.tolist() for key, row in entry.fit.items() if key.startswith("change ")}
        num_steps = len(next(iter(changes.values())))
        full = {name: accumulated_steps(row, threshold) for name, row in changes.items()}
        return Composition(
            site=site_of(trained.unit),
            gate=Timetable(full, num_steps, entry.levels, resample=self.resample),
            predictor=ScaleShift({name: _tables(entry.fit, name) for name in full}, full) if is_mended else Reuse(),
        )

    @property
    def trained(self) -> Trained:
        """What it was calibrated with."""
        made = self.loaded
        assert made is not None and isinstance(made.statistic, Trained)  # `measured` has seen to it
        return made.statistic


def _tables(fit: Mapping[str, Tensor], name: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Scale and shift of each tensor of a block's feature; none if it is never cached."""
    count = sum(key.startswith(f"scale {name} ") for key in fit)
    return tuple((fit[f"scale {name} {leaf}"], fit[f"shift {name} {leaf}"]) for leaf in range(count))
