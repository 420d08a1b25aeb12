"""What a gate is: it decides, before or early in a denoiser call, whether features are computed or predicted.

The contract, drawn once::

    state = gate.begin(num_steps)                 # once per run, branch and unit
    for each call of the denoiser:
        score  = <what gate.watch observes>       # by the engine; None for a static gate
        cached = gate.propose(state, step, score) # pure: may be asked twice, changes nothing
        cached = <guards may overrule>
        gate.commit(state, step, cached, score)   # exactly once, also when overruled

A *unit* is what takes one decision: the whole batch, or one row of it (``decide="row" | "any"``). A gate is scalar
logic for one unit; the engine keeps one state per unit, so rows never see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where in the run a decision is taken. All a gate may know of time."""

    index: int  # 0 .. num_steps - 1
    num_steps: int | None  # None when the run's length is not known

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the last step (False where the length is unknown)."""
        return self.num_steps is not None and self.index == self.num_steps - 1


@dataclass(frozen=True)
class Watch:
    """Base of what a gate can watch; ``engine/observers/`` names the observer of each kind.

    The score is a number, or several where a gate watches several things at once; guards are told the first.
    """

    is_inside: ClassVar[bool] = False  # seen while the blocks run, so that the decision is taken there
    needs_stack: ClassVar[bool] = False  # seen in the blocks that carry the latent
    is_feedback: ClassVar[bool] = False  # seen at one step, and the score of the next

    @property
    def mixes_tokens(self) -> bool:
        """Whether the score is no sum over tokens, so that a share of them says nothing of a sample."""
        return False


@dataclass(frozen=True)
class Signal(Watch):
    """Watch the first block's modulated input: what its first part would read. The block itself does not run.

    The score is ``mean|now - before| / mean|before|`` in float32, where *before* is the previous step.
    """

    is_inside: ClassVar[bool] = True
    needs_stack: ClassVar[bool] = True


@dataclass(frozen=True)
class Spectral(Watch):
    """Watch the first block's modulated input as `Signal` does, through a filter that follows the noise level.

    The score is ``mean|now - before| / mean|before|`` of the filtered signal; *before* is the previous step's, filtered
    at its own noise level. The filter is a Wiener filter on the grid of tokens: per axis ``g(f) = a S / (a^2 S + b^2)``
    with ``S = 1 / |f|^power``, ``a = 1 - sigma``, ``b = sigma``; the gains of the axes are multiplied and divided by
    their mean. ``sigma`` is the timestep of a flow-matching run, as a fraction.

    Args:
        power: falling power of natural images' spectra. Code: 2 for images, 3 for video.
        grid: rows and columns of tokens (frames first, for video); () finds them from the latent or from position ids.
    """

    is_inside: ClassVar[bool] = True
    needs_stack: ClassVar[bool] = True

    power: float = 2.0
    grid: tuple[int, ...] = ()

    @property
    def mixes_tokens(self) -> bool:
        """The filter needs the whole grid."""
        return True


@dataclass(frozen=True)
class Front(Watch):
    """Watch what the first ``blocks`` blocks make; they are computed on every step.

    The score is ``mean|now - then| / mean|then|`` in float32.

    Args:
        blocks: how many.
        of: ``"residual"``, what they add to the image stream; or ``"stream"``, what leaves them.
        reference: *then* is the ``"last_full"`` step, or the ``"last_step"``.
        is_excess: the score is ``|score - change of what enters the first block|``, both against the same step.
    """

    is_inside: ClassVar[bool] = True
    needs_stack: ClassVar[bool] = True

    blocks: int = 1
    of: Literal["residual", "stream"] = "residual"
    reference: Literal["last_full", "last_step"] = "last_full"
    is_excess: bool = False


@dataclass(frozen=True)
class Drift(Watch):
    """Watch the denoiser's input and output from outside.

    The score is how much the output should change in this step, relative to its size: ``k * mean|x_i - x_(i-1)| /
    mean|y|`` in float32, for the latents ``x`` of this and the previous step and the last computed output ``y``. ``k``
    is the mean change of the output over that of the latent, from one full step to the next; None until there were two.
    """


@dataclass(frozen=True)
class Outputs(Watch):
    """Watch what blocks make on full steps; the score at the next step compares the last two full ones.

    It is ``mean|now - then| / mean|then|`` in float32 of the image stream, a mean over the watched blocks; with
    ``frames`` a pair of that and of the motion, see `AdaptiveInterval`. None unless the step before was full and not
    the first.

    Args:
        blocks: ``"all"``, or one: its place in the stack as a fraction of the depth (0 the first, 1 the last).
        of: ``"residual"``, what a block adds; or ``"stream"``, what leaves it.
        frames: whether the motion between latent frames is measured: ``mean|q_f - q_(f-1)| / (mean|q_f| +
            mean|q_(f-1)|)`` over neighbouring frames f of what is watched. Needs a video latent.
    """

    needs_stack: ClassVar[bool] = True
    is_feedback: ClassVar[bool] = True

    blocks: float | Literal["all"] = "all"
    of: Literal["residual", "stream"] = "stream"
    frames: bool = False

    @property
    def mixes_tokens(self) -> bool:
        """The motion is that between whole frames."""
        return self.frames


@dataclass(frozen=True)
class Entrance(Watch):
    """Watch what enters each block, which decides for itself.

    The score is ``mean|x - x_ref| / mean|x_ref|`` in float32, where *x_ref* entered the block when it last ran.

    Args:
        leaders: 0, or the score is a pair of that and of the mean of those scores above 0 among the first so many of
            the step, of blocks before this one (None where there is none).
        norm: ``"l1"``, as above; or ``"l2"``, the Frobenius norm in place of the mean size.
        with_size: whether the score is a pair of that and of how many numbers of one row enter.
        with_angle: whether the score is a pair of that and of ``1 - cos`` between what entered the block and what left
            it, when it last ran (None where that cannot be told).
    """

    is_inside: ClassVar[bool] = True
    needs_stack: ClassVar[bool] = True

    leaders: int = 0
    norm: Literal["l1", "l2"] = "l1"
    with_size: bool = False
    with_angle: bool = False


@dataclass(frozen=True, eq=False)
class PartInput(Watch):
    """Watch what enters each part: its normalised and modulated input ``z``. The part decides for itself.

    The score is ``sigmoid(sum of z_nd w_d)`` in float32 over the part's tokens and channels, with weights of the part's
    own for every step; 0.5 where there are none. A part with two streams has weights for the channels of both, one
    after the other.

    Args:
        weights: by the path of the part, ``[steps, channels]``.
        num_steps: length of the run the weights are for. None: of any; steps beyond the weights have none.
        levels: the scheduler's timestep at each of its steps; None where it is not known.
        resample: whether a run of other levels is accepted, at each step with the weights of the nearest level.
    """

    is_inside: ClassVar[bool] = True

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    num_steps: int | None = None
    levels: tuple[float, ...] | None = None
    resample: bool = False


@dataclass(frozen=True)
class Verification(Watch):
    """Watch the prediction itself: on checked cached steps the last block is also computed from its own input.

    The score is the error of the prediction *at the step before*; ``None`` where nothing was checked.

    Args:
        metric: ``relative_l1`` is ``mean(|pred - true| / (|true| + eps))``, elementwise as in SpeCa's code; ``l1``,
            ``l2`` (root mean square), ``relative_l2`` (root mean square of the elementwise relative error) and
            ``cosine`` (1 - cosine similarity) are its other options.
        eps: added to the denominators; official code 1e-10 (FLUX, DiT) and 1e-8 (HunyuanVideo).
    """

    needs_stack: ClassVar[bool] = True
    is_feedback: ClassVar[bool] = True

    metric: Literal["relative_l1", "l1", "l2", "relative_l2", "cosine"] = "relative_l1"
    eps: float = 1e-10


# Names under which a watch can be given to a gate that takes several, as in gate="accumulated(of='drift')".
WATCHES: dict[str, type[Watch]] = {"signal": Signal, "spectral": Spectral, "front": Front, "drift": Drift}


@dataclass(frozen=True)
class Place:
    """Which decision of which run a gate's state is for.

    Args:
        num_steps: of the run, if known.
        levels: the scheduler's timestep of every step, which stands for the noise level, if known.
        branch: the CFG branch.
        decision: its name, where a site takes several in a step: a kind of part, a block, a part; else empty.
    """

    num_steps: int | None = None
    levels: tuple[float, ...] | None = None
    branch: str = ""
    decision: str = ""


@runtime_checkable
class Placed(Protocol):
    """A gate that goes by more than the length of the run; everything else of it is a `Gate`."""

    def begin_at(self, place: Place) -> Any:
        """Return the state of one unit at the start of a run; called instead of `Gate.begin`."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Decides full or cached, for one unit. The object is frozen settings; its state belongs to the engine."""

    @property
    def watch(self) -> Watch | None:
        """What the engine must observe before it can ask; None for a schedule known before sampling."""
        ...

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    def begin(self, num_steps: int | None) -> Any:
        """Return the state of one unit at the start of a run."""
        ...

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Whether this step should be cached. Pure."""
        ...

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Take note of what was decided, by this gate or over its head."""
        ...


@runtime_checkable
class Remarking(Protocol):
    """A gate that takes some scores for others."""

    def remark(self, score: float) -> str | None:
        """What is to be said of a score, if anything; the report says how often it was said."""
        ...


@runtime_checkable
class Sated(Protocol):
    """A gate that at some point of a run has seen enough."""

    def is_sated(self, state: Any) -> bool:
        """Whether no score will matter any more in this run, so that nothing need be observed for it."""
        ...


@dataclass(frozen=True)
class StaticGate:
    """Base of gates that watch nothing: the step index alone decides, and no host sync is ever needed."""

    @property
    def watch(self) -> Watch | None:
        """Nothing is watched."""
        return None

    @property
    def needs_num_steps(self) -> bool:
        """Most schedules do not need the length of the run."""
        return False

    def begin(self, num_steps: int | None) -> Any:
        """No state."""
        return None

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Nothing to remember."""
