"""Where: the places of a denoiser whose feature is recorded on full steps and predicted on cached ones.

A site is a frozen description. Finding it in a denoiser is the anatomy's work, putting it to use the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.errors import SettingError

PartKind = Literal["attn", "cross_attn", "ffn", "fused", "other"]
PART_KINDS: tuple[PartKind, ...] = ("attn", "cross_attn", "ffn", "fused", "other")
MapKind = Literal["transformer", "conv"]
MAP_KINDS: tuple[MapKind, ...] = ("transformer", "conv")
"""What a U-Net's levels have besides the parts of transformer blocks."""


# Names under which a site can be given in a composition, as in site="span(front=1)". Filled by `Site`.
SITES: dict[str, type[Site]] = {}


class Site:
    """Base of every site: a frozen dataclass whose driver is named in ``engine/drivers.py``.

    A subclass says what it is called in a composition (``name``) and in a sentence (``words``).
    """

    name: ClassVar[str]
    words: ClassVar[str]

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        return False

    def __init_subclass__(cls) -> None:
        SITES[cls.name] = cls


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


@dataclass(frozen=True)
class Parts(Site):
    """The outputs of the residual sub-layers of every block, before their adaLN gate.

    On a cached step no part runs; gates, shifts and scales of the current timestep still apply.

    Args:
        kinds: which parts: ``attn``, ``cross_attn``, ``ffn``, ``fused`` (attention and MLP with one projection, as in
            FLUX's single-stream blocks), ``other``. On U-Nets further ``transformer``, what a whole transformer adds to
            its feature map, whose parts are then left alone; and ``conv``, the first convolution of a ResNet block,
            before the timestep is added.
        decisions: how many are taken in a step: ``"one"`` for all parts; ``"kind"``, one per kind, called by the
            kind's name; ``"part"``, one per part, called by its path. Several need a gate that watches nothing.
        required: kinds without which a denoiser is refused.

    Raises:
        SettingError: an unknown kind, or none; another word for decisions.
    """

    name: ClassVar[str] = "parts"
    words: ClassVar[str] = "the parts"
    able: ClassVar[tuple[str, ...]] = (*PART_KINDS, *MAP_KINDS)  # kinds it may be given

    kinds: tuple[PartKind | MapKind, ...] = PART_KINDS
    decisions: Literal["one", "kind", "part"] = "one"
    required: tuple[PartKind, ...] = ()

    def __post_init__(self) -> None:
        if self.decisions not in ("one", "kind", "part"):
            raise SettingError(f"Parts(decisions={self.decisions!r}): use 'one', 'kind' or 'part'.")
        unknown = [kind for kind in self.kinds if kind not in self.able]
        if unknown or not self.kinds:
            raise SettingError(f"{type(self).__name__}(kinds={self.kinds}): use one or more of {', '.join(self.able)}.")
        if not set(self.required) <= set(self.kinds):
            raise SettingError(f"Parts(required={self.required}): only kinds that are cached, {self.kinds}.")


@dataclass(frozen=True)
class Linears(Parts):
    """The outputs of the linear layers inside parts: of queries, keys, values, projections and MLPs.

    On a cached step everything else of a part still runs: attention itself, activations, norms. Layers that run more
    than once in a block are left alone.

    Args:
        kinds: in which parts, as in `Parts`.
        decisions: how many are taken in a step; ``"kind"`` means the part's, ``"part"`` one for each layer.
    """

    name: ClassVar[str] = "linears"
    words: ClassVar[str] = "the linear layers"
    able: ClassVar[tuple[str, ...]] = PART_KINDS


@dataclass(frozen=True)
class GatedParts(Parts):
    """The parts, each of which decides for itself by what enters it, in the middle of the call.

    The norms in front of parts always run, as the decision needs them. In a batch whose rows differ, a part runs on the
    rows that want it; only the attention inside a fused part then runs on all.

    Args:
        kinds: which parts, as in `Parts`.
        decisions: always ``"part"``.
    """

    name: ClassVar[str] = "gated_parts"
    words: ClassVar[str] = "the parts, each by itself"
    able: ClassVar[tuple[str, ...]] = PART_KINDS

    decisions: Literal["one", "kind", "part"] = "part"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decisions != "part":
            raise SettingError(f"GatedParts(decisions={self.decisions!r}): each part decides; use 'part'.")


@dataclass(frozen=True)
class Attentions(Parts):
    """The attentions, each kind of which has a decision of its own, and the MLPs of some blocks.

    The decisions are called ``"spatial"`` (self-attention within a frame, or over all tokens), ``"temporal"`` (over the
    frames), ``"cross"`` and ``"mlp"``. A fused part holds an attention over all tokens, so it is spatial.

    Args:
        kinds: which parts, as in `Parts`; of the ``ffn`` parts only those in ``mlp_blocks``.
        decisions: always ``"kind"``.
        mlp_blocks: numbers of blocks, counted in every list of blocks by itself.

    Raises:
        SettingError: another word for decisions, a kind without attention, or a number is negative.
    """

    name: ClassVar[str] = "attentions"
    words: ClassVar[str] = "the attentions"
    able: ClassVar[tuple[str, ...]] = PART_KINDS

    kinds: tuple[PartKind | MapKind, ...] = ("attn", "cross_attn", "fused", "ffn")
    decisions: Literal["one", "kind", "part"] = "kind"
    mlp_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decisions != "kind":
            raise SettingError(f"Attentions(decisions={self.decisions!r}): each kind of attention decides; use 'kind'.")
        if "other" in self.kinds or min(self.mlp_blocks, default=0) < 0:
            raise SettingError(
                f"Attentions(kinds={self.kinds}, mlp_blocks={self.mlp_blocks}): use kinds of attn, cross_attn, fused "
                "and ffn, and numbers from 0."
            )


@dataclass(frozen=True)
class PromptModules(Parts):
    """The outermost modules whose output is a function of the prompt alone, wherever they are in the denoiser.

    In a denoiser with cross-attention those are the keys' and values' projections of every block, and what prepares the
    text for them. Where text runs along with the image and is modulated by the timestep, it is only what prepares it.

    Args:
        kinds, decisions: as they are; these are no parts of blocks.
    """

    name: ClassVar[str] = "prompt_modules"
    words: ClassVar[str] = "the modules that see the prompt alone"
    able: ClassVar[tuple[str, ...]] = PART_KINDS


@dataclass(frozen=True)
class SingleContext(Parts):
    """The cross-attentions that attend to one token: softmax over one key is 1, so all queries get the same output.

    Of that output one token is kept. A denoiser with longer contexts is refused.

    Args:
        kinds: always cross-attentions.
        decisions: how many are taken in a step, as in `Parts`.

    Raises:
        SettingError: other kinds.
    """

    name: ClassVar[str] = "single_context"
    words: ClassVar[str] = "cross-attentions to a single token"
    able: ClassVar[tuple[str, ...]] = PART_KINDS

    kinds: tuple[PartKind | MapKind, ...] = ("cross_attn",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kinds != ("cross_attn",):
            raise SettingError(f"SingleContext(kinds={self.kinds}): only cross-attentions have a context.")


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


@dataclass(frozen=True)
class UNetLevel(Site):
    """The feature that enters one up-layer of a U-Net; everything deeper is bypassed on a cached step.

    Levels are counted from the output side, as in DeepCache: ``block=0, layer=0`` keeps only the last up-layer, fed by
    ``conv_in`` through the outermost skip connection.

    Args:
        block: up-block, counted from the output; 0 or more.
        layer: layer of that up-block, counted from its end; 0 or more.

    Raises:
        SettingError: a value is negative.
    """

    name: ClassVar[str] = "unet_level"
    words: ClassVar[str] = "a U-Net level"

    block: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        if self.block < 0 or self.layer < 0:
            raise SettingError(f"UNetLevel(block={self.block}, layer={self.layer}): both must be 0 or more.")


@dataclass(frozen=True)
class ReducedLevel(UNetLevel):
    """A U-Net level, the denoiser's output, and parts on fewer tokens: three decisions in a step.

    They are called ``"output"``: cached, nothing runs, and the output is the last one that was computed; ``"level"``:
    cached, what is deeper than the level is bypassed, as in `UNetLevel`; ``"tokens"``: cached, parts that run are
    computed on fewer tokens, as in `Reduced`. So they need a gate that watches nothing, and a token rule that leaves
    tokens out.

    Args:
        block, layer: as in `UNetLevel`.
        kinds, max_downsample: as in `Reduced`.

    Memory: the feature that enters the level, and the output, per branch.

    Raises:
        SettingError: as they do.
    """

    name: ClassVar[str] = "reduced_level"
    words: ClassVar[str] = "a U-Net level and parts on fewer tokens"
    decisions: ClassVar[tuple[str, ...]] = ("output", "level", "tokens")

    kinds: tuple[PartKind, ...] = ("attn",)
    max_downsample: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.reduced  # refuses what it does not take

    @property
    def level(self) -> UNetLevel:
        """Where the level is cut."""
        return UNetLevel(self.block, self.layer)

    @property
    def reduced(self) -> Reduced:
        """Which parts are computed on fewer tokens."""
        return Reduced(self.kinds, self.max_downsample)


@dataclass(frozen=True)
class UNetEncoder(Site):
    """What the encoder of a U-Net hands to its decoder: every skip tensor, and what leaves the middle.

    On a cached step the decoder alone runs, at the current timestep; the latent is not read.

    Args:
        parallel: cached steps up to the next full one are decoded together, each at its own timestep, in a batch so
            many times as large. Needs the timesteps of the run, and a gate that watches nothing.
    """

    name: ClassVar[str] = "unet_encoder"
    words: ClassVar[str] = "the encoder of a U-Net"

    parallel: bool = False


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
class Reduced(Site):
    """The parts of every block, computed on fewer tokens: nothing is kept from step to step but plans of tokens.

    A token rule that makes such plans says which tokens are left, and the gate at which steps; all parts of a block
    follow one plan. Parts that text enters along with the image, and attention that is given positions, are left out.

    Args:
        kinds: which parts.
        max_downsample: only blocks whose grid is at most so many times coarser, per side, than the finest one.

    Raises:
        SettingError: an unknown kind, or none; a number below 1.
    """

    name: ClassVar[str] = "reduced"
    words: ClassVar[str] = "parts on fewer tokens"

    kinds: tuple[PartKind, ...] = ("attn",)
    max_downsample: float = 1.0

    @classmethod
    def around_attention(cls, *, ffn: bool, cross_attn: bool, max_downsample: float) -> Reduced:
        """Self-attention, and with it MLPs or cross-attention where they are asked for."""
        asked: dict[PartKind, bool] = {"attn": True, "ffn": ffn, "cross_attn": cross_attn}
        return cls(tuple(kind for kind, is_asked in asked.items() if is_asked), max_downsample)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - {"attn", "cross_attn", "ffn"} or not self.max_downsample >= 1:
            raise SettingError(
                f"Reduced(kinds={self.kinds}, max_downsample={self.max_downsample}): kinds are one or more of attn, "
                "cross_attn, ffn, and max_downsample is 1 or more."
            )


@dataclass(frozen=True)
class ReducedAttention(Reduced):
    """The self-attention of every block, computed for fewer queries, and with fewer keys and values.

    Within the attention, where queries and keys have been normalised and carry their positions: projections run on all
    tokens. Queries have one plan; values have another, and keys follow it. Of a joint attention, the tokens of the
    image are reduced and those of the text stay.

    Args:
        kinds: always self-attentions, those inside fused parts among them.
        max_downsample: as in `Reduced`.

    Raises:
        SettingError: other kinds; a number below 1.
    """

    name: ClassVar[str] = "reduced_attention"
    words: ClassVar[str] = "attention on fewer tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kinds != ("attn",):
            raise SettingError(f"ReducedAttention(kinds={self.kinds}): only self-attentions, ('attn',).")


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
