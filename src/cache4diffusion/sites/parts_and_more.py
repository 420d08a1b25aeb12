"""Where: the parts, and beside them what becomes of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import PART_KINDS
from cache4diffusion.sites.parts import Parts


@dataclass(frozen=True)
class MixedScore(Parts):
    """The parts, and the denoiser's output beside them: a cached step mixes what the two predict.

    ``lam = clip((slope * (step / num_steps - bias) + 2) / 4, 0, 1)`` is the weight of the output made with cached
    parts, ``1 - lam`` that of the output of the last full step. Where ``lam = 0`` nothing of the denoiser runs. The
    ramp from 0 to 1 is ``4 / slope`` of the run wide and has its middle at ``bias``.

    Args:
        kinds: which parts, as in `Parts`.
        slope: steepness of the ramp, above 0.
        bias: middle of the ramp, as a fraction of the steps; well below 0 is always 1, well above 1 always 0.

    Raises:
        SettingError: a value is out of range.
    """

    name: ClassVar[str] = "mixed_score"
    words: ClassVar[str] = "the parts and the output"

    slope: float = 30.0
    bias: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decisions != "one":
            raise SettingError(f"MixedScore(decisions={self.decisions!r}): one weight serves the step; use 'one'.")
        if not self.slope > 0:
            raise SettingError(f"MixedScore(slope={self.slope}): slope must be above 0.")

    @property
    def needs_num_steps(self) -> bool:
        """The weight follows the progress of the run."""
        return True

    def weight(self, progress: float) -> float:
        """``lam`` at a fraction of the run."""
        return min(max((self.slope * (progress - self.bias) + 2) / 4, 0.0), 1.0)


@dataclass(frozen=True)
class PartsAndStream(Parts):
    """The parts, and what leaves the last block beside them: some cached steps go on with that, and run no block.

    On a *jump* every block passes its input through, and the last one returns what it returned at the last step that
    was none, full or cached; the denoiser's head sees today's timestep. The other cached steps are as in `Parts`.

    Args:
        kinds: which parts, as in `Parts`.
        pattern: what a cached step is, by its distance of 1, 2, ... steps: ``"c"``, as in `Parts`, or ``"j"``, a jump;
            repeated as often as needed.
        counted: the distance is that ``"since"`` the last full step, or that ``"until"`` the next one (or the end of
            the run), which needs a gate that watches nothing, and the length of the run.

    Raises:
        SettingError: the pattern has other letters, or none; another word.
    """

    name: ClassVar[str] = "parts_and_stream"
    words: ClassVar[str] = "the parts and the last block's stream"
    able: ClassVar[tuple[str, ...]] = PART_KINDS

    pattern: str = "cj"
    counted: Literal["since", "until"] = "since"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decisions != "one":
            raise SettingError(f"PartsAndStream(decisions={self.decisions!r}): a jump is the whole step's; use 'one'.")
        if not self.pattern or set(self.pattern) - {"c", "j"} or self.counted not in ("since", "until"):
            raise SettingError(
                f"PartsAndStream(pattern={self.pattern!r}, counted={self.counted!r}): a pattern consists of 'c' "
                "(cached) and 'j' (a jump), and is counted 'since' or 'until' a full step."
            )

    @property
    def needs_num_steps(self) -> bool:
        """To see how far the next full step is."""
        return self.counted == "until" and "c" in self.pattern and "j" in self.pattern

    def jumps(self, is_full: Sequence[bool], index: int) -> bool:
        """Whether a cached step is a jump.

        Args:
            is_full: of every step so far; with ``counted="until"`` of every step of the run.
            index: of the step.
        """
        if self.counted == "since":
            distance = next(d for d in range(1, index + 1) if is_full[index - d])
        else:
            distance = next((d for d in range(1, len(is_full) - index) if is_full[index + d]), len(is_full) - index)
        return self.pattern[(distance - 1) % len(self.pattern)] == "j"


@dataclass(frozen=True)
class ScaledParts(Parts):
    """The parts, and on every step, full or cached, the denoiser's output divided by a number.

    Where the output has more channels than the latent (a learned variance), only the first ones are divided. Guidance
    is linear, so that dividing each branch is dividing what it makes of them.

    Args:
        kinds: which parts, as in `Parts`.
        decisions: how many are taken in a step, as in `Parts`.
        divisor: 1 leaves the output as it is.

    Raises:
        SettingError: the divisor is not above 0.
    """

    name: ClassVar[str] = "scaled_parts"
    words: ClassVar[str] = "the parts and the output's scale"

    divisor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.divisor > 0:
            raise SettingError(f"ScaledParts(divisor={self.divisor}): divisor must be above 0.")
