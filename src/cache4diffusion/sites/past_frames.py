"""Where: what attention over time remembers of frames that are done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import Site


@dataclass(frozen=True)
class PastFrames(Site):
    """Keys and values of attention over time, of frames that are done, in a video that is made chunk by chunk.

    A call brings clean frames in front, with the timestep ``clean``, and behind them the frames that are denoised. If
    attention over time is causal, what the clean ones are computed to depends neither on the others nor on the step:
    they run once. From then on only the others run, and attend to the keys that are kept. These make a queue: frames
    that the loop does not bring any more are let go, new ones are put behind the others.

    Args:
        capacity: the most clean frames that a call may bring, 1 or more.
        clean: their timestep.

    Raises:
        SettingError: there is no room for a frame.
    """

    name: ClassVar[str] = "past_frames"
    words: ClassVar[str] = "keys and values of past frames"

    capacity: int = 25
    clean: float = 0.0

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise SettingError(f"PastFrames(capacity={self.capacity}): capacity must be 1 frame or more.")
