"""Where: spans of blocks, and single blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import Site


@dataclass(frozen=True)
class Span(Site):
    """What a span of blocks makes of each stream: all blocks but ``front`` first and ``back`` last ones.

    On a cached step the blocks of the span pass their input through and the last one adds the predicted residual, or
    returns the predicted output. What the denoiser's own loop adds between blocks (ControlNet residuals, adapters) is
    never part of the residual, so it is added exactly once; it is part of the output.

    Args:
        front: first blocks that always run, 0 or more.
        back: last blocks that always run, 0 or more.
        per_list: one span, gate state and decision for each list of blocks (double- and single-stream blocks of
            FLUX), as cache-dit does, instead of one over all lists. ``front`` and ``back`` then count in every list.
        form: what is predicted: the ``"residual"``, which is added to what enters; or the ``"output"``, whatever enters
            (with ``back=0``: what the final norm is given).

    Raises:
        SettingError: a count is negative, or another form.
    """

    name: ClassVar[str] = "span"
    words: ClassVar[str] = "a span of blocks"

    front: int = 0
    back: int = 0
    per_list: bool = False
    form: Literal["residual", "output"] = "residual"

    def __post_init__(self) -> None:
        if self.front < 0 or self.back < 0:
            raise SettingError(f"Span(front={self.front}, back={self.back}): both must be 0 or more blocks.")
        if self.form not in ("residual", "output"):
            raise SettingError(f"Span(form={self.form!r}): form must be 'residual' or 'output'.")


@dataclass(frozen=True)
class SwitchingSpan(Site):
    """The residual of the rear blocks in the early part of a run, and of the front blocks in the late part.

    The first step of the late part is full, because the front's residual is not known before.

    Args:
        share: share of all blocks whose residual is cached, 0 (none) to 1 (all, and then nothing switches).
        switch: where the late part begins, as a fraction of the steps: 0 always the front, 1 always the rear.

    Raises:
        SettingError: a value is out of range.
    """

    name: ClassVar[str] = "switching_span"
    words: ClassVar[str] = "a span that switches sides"

    share: float = 0.75
    switch: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 <= self.switch <= 1:
            raise SettingError(f"SwitchingSpan(share={self.share}, switch={self.switch}): both must be 0 to 1.")

    @property
    def needs_num_steps(self) -> bool:
        """A fraction of what is not known is not known."""
        return 0 < self.switch < 1


@dataclass(frozen=True)
class Blocks(Site):
    """The residual of each block by itself, with a decision and a gate state for each.

    Args:
        front: first blocks that always run, 0 or more.
        back: last blocks that always run, 0 or more.
        keep: numbers of further blocks that always run, counted over all lists.

    Raises:
        SettingError: a number is negative.
    """

    name: ClassVar[str] = "blocks"
    words: ClassVar[str] = "single blocks"

    front: int = 0
    back: int = 0
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min((self.front, self.back, *self.keep)) < 0:
            raise SettingError(
                f"Blocks(front={self.front}, back={self.back}, keep={self.keep}): all must be 0 or more."
            )
