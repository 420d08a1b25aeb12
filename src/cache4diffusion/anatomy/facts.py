"""What the anatomy of a denoiser consists of: plain frozen facts, no modules and no tensors.

A *stack* is a list of blocks that run one after another; a *stream* is a sequence of tokens that runs through them
(image, text, or both joined); a *part* is a residual sub-layer of a block, cached before its gate is applied; an
*inner* module runs only to feed parts and may rest while they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cache4diffusion.anatomy.tree import LeafPath, Mark, leaves, map_leaves

StreamKind = Literal["image", "other", "text", "joint", "unknown"]
BESIDE = ("text", "other")
"""Kinds of streams that run beside the image: tokens that lie in no picture."""

PartKind = Literal["attn", "cross_attn", "ffn", "fused", "other"]
MapKind = Literal["transformer", "conv"]
Over = Literal["all", "space", "time"]
InnerRole = Literal["nan_token", "zero_width", "one_token"]


def call_name(path: str, turn: int) -> str:
    """What one of the calls of a module goes by: its path, and a number from the second call on."""
    return path if turn == 0 else f"{path}#{turn + 1}"


@dataclass(frozen=True)
class Stream:
    """A sequence of tokens that enters a block as an argument and leaves it as an output.

    Args:
        argument: where it enters.
        output: where it leaves; None if the block is the last to use it (the text of SD3's last block).
        kind: what the tokens stand for, by where they came from; ``other``: what else is denoised, such as sound.
        feeds_output: whether what leaves here can still reach the denoiser's output.
    """

    argument: LeafPath
    output: LeafPath | None
    kind: StreamKind
    feeds_output: bool


@dataclass(frozen=True)
class Inner:
    """A module of a block that need not run while every part in ``feeds`` is bypassed.

    Args:
        path: module path from the denoiser.
        role: what may stand for each of its output leaves. ``nan_token``: ``x.new_full((B, 1, D), nan)``, which
            broadcasts through scale and shift; of a map, ``x.new_full((B, C, 1, 1), nan)``. ``zero_width``:
            ``x.new_empty((B, N, 0))``, which vanishes in the concatenation in front of a fused projection.
            ``one_token``: as ``nan_token``, in the width of what it returns. Which leaves there are is seen when it
            runs.
        kind: ``attn``, ``norm``, or ``tokenwise`` (a projection or an activation).
        feeds: paths of all the parts that read it. It may rest only if all of them do.
    """

    path: str
    role: InnerRole
    kind: Literal["attn", "tokenwise", "norm"]
    feeds: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A residual sub-layer: ``f`` in ``x + gate * f(norm(x))``, as one call of a module makes it.

    Args:
        path: module path from the denoiser.
        kind: ``attn`` (queries and keys both from the streams), ``cross_attn`` (keys from elsewhere), ``ffn``,
            ``fused`` (a projection that an attention inside the block feeds) or ``other``. In a U-Net's levels further
            ``transformer``, a whole one that is added to the feature map, and ``conv``, the first convolution of a
            block of convolutions: what they make are maps ``[B, C, ...]``.
        outputs: the leaves of its output that are added to a stream, with that stream's kind (``joint``: to several).
        segments: for each of ``outputs``, the streams (by index in ``Block.streams``) whose tokens it holds, in the
            order in which they follow one another: ``(0, 1)`` for FLUX's single blocks, text then image.
        is_tokenwise: whether this module maps every token by itself, so that it may run on some of them.
        inputs: its arguments that depend on the block's streams.
        inner: modules of the block that run only to feed parts, this one among them.
        is_mutated: whether the block changes its output in place: hand out copies.
        calls: how often the module runs per denoiser call. Where that is more than once, each call is a part.
        turn: which of these calls this is; 0 is the first.
        linears: paths of the linear layers that run once in it, or in a module that runs only to feed it.
        over: what a token's self-attention reaches: ``space``, the tokens of its own frame; ``time``, those at its own
            place in all frames; ``all``.
        context: how many tokens a cross-attention attends to, those of all its contexts together; 0 if it is none.
        adds_to: the argument that the module itself adds its feature to; None where what it returns is the feature.
    """

    path: str
    kind: PartKind | MapKind
    outputs: tuple[tuple[LeafPath, StreamKind], ...]
    is_tokenwise: bool
    inputs: tuple[LeafPath, ...]
    segments: tuple[tuple[int, ...], ...] = ()
    inner: tuple[Inner, ...] = ()
    is_mutated: bool = False
    calls: int = 1
    linears: tuple[str, ...] = ()
    turn: int = 0
    over: Over = "all"
    context: int = 0
    adds_to: LeafPath | None = None

    @property
    def is_of_maps(self) -> bool:
        """Whether it makes maps, of channels first, and no tokens."""
        return self.kind in get_args(MapKind)

    @property
    def name(self) -> str:
        """Tells it from all other parts: its path, and a number from the module's second call on."""
        return call_name(self.path, self.turn)


@dataclass(frozen=True)
class StreamRef(Mark):
    """Stands in an output template for a block's stream, by its index in ``Block.streams``."""

    index: int


@dataclass(frozen=True)
class Handed(Mark):
    """Stands in an output template for what was given as this argument, and is handed on as it is."""

    argument: LeafPath


@dataclass(frozen=True)
class OtherLeaf(Mark):
    """Stands in an output template for a leaf that is no stream; ``is_tensor`` False: a number, a string, ..."""

    is_tensor: bool


@dataclass(frozen=True)
class Block:
    """One block of a stack, as it was called. A module that runs several times is as many blocks.

    Args:
        path: module path from the denoiser.
        streams: what runs through it.
        parts: its residual sub-layers in the order in which they run.
        output_template: the block's output with a `StreamRef`, `Handed` or `OtherLeaf` for each leaf; None stays None.
        mutates: stream arguments that the block changes in place.
        puts: where it puts what it makes into a container that it is given.
        inputs: its other tensor arguments (timestep embedding, rotary tables, conditioning, ...).
        calls: how often the module runs per denoiser call.
        turn: which of these calls this is; 0 is the first.
        read_by: who reads what it left, besides the main block after it: names of later blocks (long skips), ``""`` for
            the denoiser's own code.
        is_written: whether the denoiser's own code writes into what it left, before the main block after it.
    """

    path: str
    streams: tuple[Stream, ...]
    parts: tuple[Part, ...]
    output_template: Any
    mutates: tuple[LeafPath, ...] = ()
    puts: tuple[LeafPath, ...] = ()
    inputs: tuple[LeafPath, ...] = ()
    calls: int = 1
    turn: int = 0
    read_by: tuple[str, ...] = ()
    is_written: bool = False

    @property
    def name(self) -> str:
        """Tells it from all other blocks: its path, and a number from the module's second call on."""
        return call_name(self.path, self.turn)

    @property
    def strangers(self) -> tuple[LeafPath, ...]:
        """Where the output holds what is neither a stream nor handed on: only running the block can make that."""
        known = (StreamRef, Handed, type(None))
        return tuple(path for path, leaf in leaves(self.output_template) if not isinstance(leaf, known))

    @property
    def can_rebuild(self) -> bool:
        """Whether all that the block does can be done without running it, once it is known what its streams become."""
        return not self.strangers and not self.puts

    def rebuild(self, values: Sequence[Any], argument: Callable[[LeafPath], Any] = lambda _: None) -> Any:
        """Return the block's output around ``values``, one per stream.

        Args:
            values: one per stream.
            argument: of the call, by path; for what is handed on. Other leaves become None.
        """

        def fill(_: LeafPath, leaf: Any) -> Any:
            if isinstance(leaf, StreamRef):
                return values[leaf.index]
            return argument(leaf.argument) if isinstance(leaf, Handed) else None

        return map_leaves(fill, self.output_template)


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another.

    Args:
        path: of the list.
        blocks: in the order in which they run.
        is_main: whether they are on the way of the image stream through the whole denoiser.
        breaks: numbers of the blocks that do not go on with what the one before left: the denoiser makes something else
            of it in between. What is merely added to it, and does not depend on it, is no break.
    """

    path: str
    blocks: tuple[Block, ...]
    is_main: bool
    breaks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """Consecutive sub-modules of a U-Net level that belong to one skip tensor.

    Args:
        modules: paths of the direct sub-modules (an item of a list counts as direct), in the order in which they run.
        skip: number of the skip tensor that a down layer produces or an up layer consumes; 0 is the outermost.
        leaf: where that tensor sits in the down block's output, or in the up block's arguments; the up block's own
            ``argument`` if the denoiser joins the two before it calls the block.
    """

    modules: tuple[str, ...]
    skip: int
    leaf: LeafPath


@dataclass(frozen=True)
class Level:
    """One down or up block of a U-Net.

    Args:
        path: module path from the denoiser.
        argument, output: where the main feature map enters and leaves.
        layers: in the order in which they run.
        tail: the sub-modules after the last layer: the downsampler (which then also produces ``tail_skip``, found at
            ``tail_leaf`` of the output) or the upsampler.
        output_template: the block's output with None for each tensor, to build real containers.
    """

    path: str
    argument: LeafPath
    output: LeafPath
    layers: tuple[Layer, ...]
    tail: tuple[str, ...] = ()
    tail_skip: int | None = None
    tail_leaf: LeafPath | None = None
    output_template: Any = None


@dataclass(frozen=True)
class UNet:
    """Down blocks, the block in the middle if there is one, and up blocks that consume the skips in reverse.

    Args:
        head: the module in front of the first down block whose output is skip 0 (None if no up layer uses it).
        down, mid, up: in the order in which they run.
        skips: how many tensors are handed across.
        units: what may be cached inside the levels besides the parts of transformer blocks, in the order in which they
            run: every transformer as a whole, and the first convolution of every block of convolutions.
    """

    head: str | None
    down: tuple[Level, ...]
    mid: str | None
    up: tuple[Level, ...]
    skips: int
    units: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Invariant:
    """A module whose output depends on the prompt alone. ``is_mutated``: somebody writes into it afterwards."""

    path: str
    is_mutated: bool


@dataclass(frozen=True)
class Signal:
    """The first part of the first main block and the argument that brings it the modulated, normalised stream."""

    path: str
    argument: LeafPath


@dataclass(frozen=True)
class Axes:
    """Batch axes of one module's arguments and outputs. None: carries no batch. A leaf not listed: not established.

    With a batch of one, an argument of length one that all samples share cannot be told from one that carries the
    batch: check its length before taking rows of it.
    """

    arguments: Mapping[LeafPath, int | None] = field(default_factory=dict)
    outputs: Mapping[LeafPath, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Anatomy:
    """How a denoiser is built, as seen in one forward.

    Args:
        denoiser: class name.
        stacks: every list of token blocks, also the small and the nested ones.
        main: those that carry the image stream, in order; of lists that take turns, every turn is a stack.
        seams: for each pair of consecutive main stacks, whether the second goes on with what the first left (one span
            may then cover both).
        unet: the levels, if it is a U-Net.
        timestep, latent: where they are among the denoiser's arguments; None if not established.
        others: what is denoised besides the latent: arguments of the shape of another output.
        conditioning: the other tensor arguments that vary with the prompt.
        outputs: where tensors are in the denoiser's output.
        batch_axes: by module path (``""`` is the denoiser): which axis carries the batch.
        signal: what a gate like TeaCache's watches.
        tokens: length of the image stream in front of the first main block; None if other tokens are joined to it.
        invariant: the outermost modules that run once, on nothing that changes from step to step.
        notes: what was assumed, and what could not be established.
    """

    denoiser: str
    stacks: tuple[Stack, ...] = ()
    main: tuple[Stack, ...] = ()
    seams: tuple[bool, ...] = ()
    unet: UNet | None = None
    timestep: LeafPath | None = None
    latent: LeafPath | None = None
    others: tuple[LeafPath, ...] = ()
    conditioning: tuple[LeafPath, ...] = ()
    outputs: tuple[LeafPath, ...] = ()
    batch_axes: Mapping[str, Axes] = field(default_factory=dict)
    signal: Signal | None = None
    tokens: int | None = None
    invariant: tuple[Invariant, ...] = ()
    notes: tuple[str, ...] = ()
