"""CacheQuant: full steps where drifting features ask for them, and a scale and shift that follow the drift.

Source: arXiv:2503.01323 (CVPR 2025); released code BienLuky/CacheQuant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.affine import AffineFits
from cache4diffusion.errors import SettingError
from cache4diffusion.gates import Timetable
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse, ScaleShift
from cache4diffusion.settings import setting


@dataclass(frozen=True)
class CacheQuant(Method):
    """Steps are cut into groups that drift least, and the first of each is computed; the others mend what it left.

    Dynamic programming schedule (DPS): T steps make ``K = ceil(T / interval)`` groups of ``ceil(interval / 2)`` to ``2
    interval`` steps with the least sum of ``cost(j, n) = sum over i = j .. n-1 of |X_i - X_j|_1``. Decoupled error
    correction (DEC): step i of the group that begins at j goes on with ``a_i F_j + b_i`` per channel, always from the
    feature as it was computed, so errors do not add up. ``a_i = cov(X_i, X_j) / var(X_j)`` and ``b_i`` are one for both
    CFG branches. What was computed at another step than j (where guidance ends, say) is reused as it is. Where features
    drift evenly, 9 steps at an interval of 3 are ``FccFccFcc``.

    Distances, a and b are measured by ``c4d calibrate`` once, for every interval up to ``(reach + 1) / 2``. What is
    cached is a U-Net's level, as in `DeepCache`; on transformers calibrate with ``--set unit=span``: then it is the
    residual of all blocks.

    **Quantisation in the loop** takes two steps, each of them yours. Quantise the denoiser (`quantised`, or diffusers'
    ``TorchAoConfig``) and then calibrate it: schedule, a and b are those of the quantised network. And keep the cache
    in few bits: calibrate with ``--set cache_dtype=int8`` and accelerate with ``cache_dtype="int8"``.

    Cost: one feature map, and two numbers per channel and step; a cached step runs what is shallower. No host sync.
    Differences from the code: a and b of the quantised network are fitted to its own features and cached numbers. The
    released second correction, of what the two quantised convolutions that read the feature make of it, is left out:
    torchao leaves convolutions alone, and `quantised` the norm and projection behind a transformer's blocks, so that
    nothing that reads a cached feature is quantised.
    """

    interval: int = setting(
        5, "steps to a full one, on average; 1 never caches. Code: 5 (SD), 2 (LSUN), 20 (ImageNet), 10 (CIFAR)", ge=1
    )
    correction: bool = setting(True, "whether features are scaled and shifted; without it, DeepCache's reuse")
    calibration: Given = setting(None, "distances, scales and shifts: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = AffineFits
    info: ClassVar[MethodInfo] = MethodInfo(
        name="cachequant",
        title="CacheQuant",
        arxiv="2503.01323",
        site="unet level",
        gate="calibrated schedule",
        predictor="scaled and shifted reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="U-Net",
        when="the denoiser is quantised, or its cache: the schedule and a correction are measured on it as it is",
        ladder=({"interval": 2}, {"interval": 3}, {"interval": 5}),
        citation="Liu et al., CacheQuant: Comprehensively Accelerated Diffusion Models, CVPR 2025",
        needs_calibration=True,
        published={
            "Stable Diffusion 1.4, 50 steps": {"interval": 5},
            "LDM-4 ImageNet, 250 steps": {"interval": 20},
        },
    )

    def compose(self) -> Composition:
        """U-Net level (or all blocks) x searched schedule x scaled and shifted reuse."""
        entry, made = self.measured, self.loaded
        assert made is not None and isinstance(made.statistic, AffineFits)  # `measured` has seen to it
        is_mended = self.correction and self.interval > 1
        if is_mended and self.resample:
            raise SettingError(
                "CacheQuant(resample=True): scale and shift belong to the steps they were measured at. Calibrate for "
                "these steps, or give correction=False."
            )
        errors = entry.fit["errors"].tolist()
        full = grouped(errors, self.interval)
        predictor = Reuse()
        if is_mended:
            numbers = tables(entry.fit, full)
            predictor = ScaleShift(numbers, dict.fromkeys(numbers, full))
        return Composition(
            site=made.statistic.site,
            gate=Timetable({"": full}, len(errors), entry.levels, resample=self.resample),
            predictor=predictor,
        )


def grouped(errors: Sequence[Sequence[float]], interval: int) -> tuple[int, ...]:
    """The first steps of the groups with the least sum of distances from the first; of equal ones the earlier steps.

    Args:
        errors: by step and, from 1 on, number of steps before it, the distance of their features.
        interval: mean length of a group, 1 or more.

    Raises:
        SettingError: no groups are that long, or distances were not measured that far.
    """
    steps, reach = len(errors), len(errors[0])
    count, shortest, longest = -(-steps // interval), -(-interval // 2), min(2 * interval, steps)
    if shortest > steps:
        raise SettingError(
            f"CacheQuant(interval={interval}): {steps} steps cannot be cut into groups of {shortest} to {2 * interval} "
            f"steps. Use an interval of 1 to {2 * steps}."
        )
    if longest - 1 > reach:
        raise SettingError(
            f"CacheQuant(interval={interval}): a group may have {longest} steps, and distances were measured over "
            f"{reach}. Use an interval up to {(reach + 1) // 2}, or calibrate with reach={longest - 1} "
            f"(--set reach={longest - 1})."
        )
    costs = [  # [j][length - 1]
        list(accumulate((errors[j + r][r - 1] for r in range(1, min(longest, steps - j))), initial=0.0))
        for j in range(steps)
    ]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by end of the groups so far
    for _ in range(count):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for j, (total, path) in best.items():
            for end in range(j + shortest, min(j + longest, steps) + 1):
                found = (total + costs[j][end - j - 1], (*path, j))
                if end not in longer or found < longer[end]:
                    longer[end] = found
        best = longer
    return best[steps][1]


def tables(fit: Mapping[str, Tensor], full: Sequence[int]) -> dict[str, tuple[tuple[Tensor, Tensor], ...]]:
    """Scale and shift by site, of every tensor of its feature and step: 1 and 0 where it is computed.

    Args:
        fit: of a calibration; its names end with the tensor's place in the feature and its axes behind the channels.
        full: the steps that are computed, rising from 0.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in sorted(name for name in fit if name.startswith("scale ")):
        site, _, behind = name.removeprefix("scale ").rsplit(" ", 2)
        pair = []
        for values, neutral in ((fit[name], 1.0), (fit[f"shift{name.removeprefix('scale')}"], 0.0)):
            table, last = torch.full((values.shape[0], values.shape[2]), neutral, dtype=values.dtype), 0
            for step in range(len(table)):
                if step in full:
                    last = step
                else:
                    table[step] = values[step, step - last - 1]
            pair.append(table.reshape(*table.shape, *[1] * int(behind)))
        found.setdefault(site, []).append((pair[0], pair[1]))
    return {site: tuple(pairs) for site, pairs in found.items()}
