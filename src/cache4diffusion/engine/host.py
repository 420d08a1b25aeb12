"""The denoiser that carries the sites, as their drivers see it: its blocks, and how its calls are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cache4diffusion.anatomy import Anatomy, Axes, LeafPath, observe
from cache4diffusion.anatomy.tree import argument_leaves
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.composition import Composition
from cache4diffusion.engine.blocks import BlockView, views_of
from cache4diffusion.engine.group import ALONE, Alone
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.leaves import get_output, parameter_names, take_rows
from cache4diffusion.engine.listener import Listener
from cache4diffusion.engine.passage import Passage
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import Front
from cache4diffusion.storage import PLAIN, Store
from cache4diffusion.trace import Trace

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Host:
    """One denoiser, the composition at work in it, and what is known of how it is built.

    Args:
        denoiser: the network called in the sampling loop.
        composition: what runs in it.
        trace: where notes go.
        name: of the denoiser, for records and messages.
        listener: hears of what is recorded.
        store: how snapshots are kept.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        composition: Composition,
        trace: Trace,
        name: str,
        listener: Listener | None = None,
        store: Store = PLAIN,
    ) -> None:
        self.denoiser, self.composition, self.trace, self.name = denoiser, composition, trace, name
        self.listener, self.store = listener, store
        self.gate, self.predictor = composition.gate, composition.predictor
        self.sees: str | None = getattr(self.predictor, "sees", None)  # of the step itself, if it is a corrector
        self.inputs = inputs_of(denoiser)
        self.anatomy: Anatomy | None = None
        self.blocks: list[BlockView] = []  # the main blocks of all lists
        self.modules: list[nn.Module] = []  # theirs
        self.group: Alone = ALONE  # the processes that share the call in progress
        self.writes = False  # whether streams are known to be written into, so that copies must be looked at
        self._axes: dict[Any, dict[LeafPath, int]] = {}  # of the denoiser's arguments, by kind of call

    def examine(self, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy | None = None) -> None:
        """Find out how the denoiser is built, from the arguments of a call; ``anatomy`` if it is known already.

        Raises:
            AnatomyError: the composition needs a stack of blocks and there is none.
        """
        self.anatomy = anatomy or observe(self.denoiser, args, kwargs)
        self._axes = {}
        self.blocks = views_of(self.anatomy)
        self.modules = [self.plain.get_submodule(view.path) for view in self.blocks]
        self.writes = any(block.mutates or block.is_written for stack in self.anatomy.main for block in stack.blocks)
        for note in self.anatomy.notes:
            self.note(note)
        if self.composition.needs_stack is not None and not self.anatomy.main:
            raise no_stack(self.anatomy.denoiser, self.composition)

    def note(self, text: str) -> None:
        """Tell the user something about this denoiser, once."""
        self.trace.note(f"{self.name}: {text}")

    @property
    def plain(self) -> nn.Module:
        """The denoiser without what is wrapped around it: module paths begin there."""
        return unwrapped(self.denoiser)

    @property
    def words(self) -> str:
        """What asks for the site, in messages."""
        return type(self.composition.tokens or self.gate or self.predictor).__name__

    @property
    def is_unet(self) -> bool:
        """Whether the denoiser has U-Net levels."""
        return self.anatomy is not None and self.anatomy.unet is not None

    @property
    def watched_blocks(self) -> int:
        """Blocks in front of the gate's watch point; they always run."""
        watch = self.gate.watch if self.gate is not None else None
        return watch.blocks if isinstance(watch, Front) else 0

    # -- blocks ----------------------------------------------------------------------------------------------------

    def stream_inputs(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What enters a block, one tensor per stream."""
        return self.blocks[position].inputs(self.modules[position], args, kwargs)

    def stream_outputs(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Tensor]:
        """What leaves a block, one tensor per stream; what enters, where the block does not return it."""
        return [
            entered if stream.output is None else get_output(output, stream.output)
            for stream, entered in zip(
                self.blocks[position].streams, self.stream_inputs(position, args, kwargs), strict=True
            )
        ]

    def passage(self, streams: Sequence[Tensor]) -> Passage:
        """Begin to look at what blocks make of streams."""
        return Passage.begin(streams, self.writes)

    def is_sound(self, passage: Passage) -> bool:
        """Whether what blocks added can be told; if not, streams are looked at through copies from the next call on."""
        if not passage.end():
            self.writes = True
            self.note("streams are written into between blocks; copies are compared.")
        return not passage.is_spoilt

    def pass_through(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's output as if it had done nothing."""
        return self.rebuild(position, self.stream_inputs(position, args, kwargs), args, kwargs)

    def rebuild(self, position: int, values: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's output around what its streams became."""
        return self.blocks[position].rebuild(values, self.modules[position], args, kwargs)

    # -- rows ------------------------------------------------------------------------------------------------------

    def block_rows(
        self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int]
    ) -> Arguments:
        """A block's arguments for some rows.

        Raises:
            AnatomyError: which arguments carry the batch was not established.
        """
        return self.module_rows(self.blocks[position].path, self.modules[position], args, kwargs, rows)

    def module_rows(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int]
    ) -> Arguments:
        """The arguments of a block or part for some rows.

        Raises:
            AnatomyError: which of them carry the batch was not established.
        """
        assert self.anatomy is not None
        axes = self.anatomy.batch_axes.get(path)
        if axes is None:
            raise AnatomyError(
                f"Which arguments of {path} carry the batch could not be established, so rows cannot be treated apart. "
                "Use decide='any' or decide='batch'."
            )
        known = {leaf: axis for leaf, axis in axes.arguments.items() if axis is not None}
        return take_rows(module, args, kwargs, known, rows)

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int], batch: int) -> Arguments:
        """The denoiser's arguments for some rows of the batch.

        Raises:
            AnatomyError: which arguments carry the batch was not established.
        """
        return take_rows(self.plain, args, kwargs, self._batch_axes(args, kwargs, batch), rows)

    def _batch_axes(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> dict[LeafPath, int]:
        """Batch axis of every argument of the denoiser that has one; found anew for every new kind of call."""
        names = parameter_names(type(self.plain))
        tensors = {path: leaf for path, leaf in argument_leaves(args, kwargs) if isinstance(leaf, Tensor)}
        kind = tuple((path, leaf.ndim) for path, leaf in tensors.items())
        if kind not in self._axes:
            assert self.anatomy is not None
            found = observe(self.denoiser, args, kwargs) if self._axes else self.anatomy
            axes: dict[LeafPath, int] = {}
            known = {_by_name(names, path): axis for path, axis in found.batch_axes.get("", Axes()).arguments.items()}
            for path, leaf in tensors.items():
                axis = known.get(_by_name(names, path), -1)
                if axis == -1 and batch in leaf.shape:
                    raise AnatomyError(
                        f"Whether argument {_words(_by_name(names, path))} of {found.denoiser} carries the batch could "
                        "not be established, so rows cannot be treated apart. Use a method that runs both CFG "
                        "branches and decide='batch'."
                    )
                if axis is not None and axis >= 0:
                    axes[path] = axis
            self._axes[kind] = axes
        return self._axes[kind]


def no_stack(denoiser: str, composition: Composition) -> AnatomyError:
    """The error where a composition needs a stack of blocks and there is none."""
    return AnatomyError(
        f"{denoiser} has no stack of blocks that carries the latent, and this method needs one: "
        f"{composition.needs_stack}. On U-Nets these work: 'deepcache' (levels), 'fora' and 'taylorseer' (the parts of "
        "the transformer blocks inside levels), 'block-caching' (calibrated with unit='transformer'), 'frdiff', "
        "'taylorseer-lite' (the whole denoiser), 'fastercache' (CFG branches). If it has blocks that were not found, "
        "say which they are: c4d.declare(denoiser, blocks=['first', 'layers'])."
    )


def _by_name(names: Sequence[str], path: LeafPath) -> LeafPath:
    """An argument's path with its name in front, however it was passed."""
    head = path[0]
    return (names[head], *path[1:]) if isinstance(head, int) and head < len(names) else path


def _words(path: LeafPath) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
