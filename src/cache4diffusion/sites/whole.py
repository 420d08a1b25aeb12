"""Where: the denoiser as a whole, and the trajectory that it is called along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import Site


@dataclass(frozen=True)
class Denoiser(Site):
    """The denoiser's output. A cached step runs nothing at all, not even the embedders.

    Args:
        form: what is recorded and predicted: the ``"output"``, or the ``"residual"``, which is the output minus the
            latent that went in (its first channels, where the output has more): a cached step adds today's latent.

    Memory: the predictor's snapshots of one output-sized tensor per branch.

    Raises:
        SettingError: another form.
    """

    name: ClassVar[str] = "denoiser"
    words: ClassVar[str] = "the whole denoiser"

    form: Literal["output", "residual"] = "output"

    def __post_init__(self) -> None:
        if self.form not in ("output", "residual"):
            raise SettingError(f"Denoiser(form={self.form!r}): form must be 'output' or 'residual'.")


@dataclass(frozen=True)
class Trajectory(Site):
    """The sampling trajectory: what reaches ``scheduler.step`` after guidance, and the latent it makes of that.

    A cached step runs nothing of the denoiser, in no branch; its calls return placeholders, and what the loop makes of
    them is replaced at the scheduler. For solvers without a history only: a solver that remembers earlier outputs would
    remember placeholders' too. All branches of a step are decided together.

    Memory: the predictor's snapshots, once per run and not per branch.

    Args:
        feature: ``"velocity"``, the output after guidance; ``"state"``, the latent after the step; ``"all"``, the
            velocity, the latent before and the latent after, of which the velocity is predicted.
        solvers: classes of schedulers it works with.

    Raises:
        SettingError: an unknown feature.
    """

    name: ClassVar[str] = "trajectory"
    words: ClassVar[str] = "the trajectory"

    feature: Literal["velocity", "state", "all"] = "velocity"
    solvers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler")

    def __post_init__(self) -> None:
        if self.feature not in ("velocity", "state", "all"):
            raise SettingError(f"Trajectory(feature={self.feature!r}): feature must be 'velocity', 'state' or 'all'.")
