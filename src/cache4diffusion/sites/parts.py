"""Where: the parts of every block, and modules inside and beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import MAP_KINDS, PART_KINDS, MapKind, PartKind, Site


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
