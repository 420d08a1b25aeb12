"""How snapshots are kept: in which dtype, on which device, and the buffers they lie in.

By default a snapshot has the feature's own dtype and lies on its device. In another dtype it takes less room; on
another device it is offloaded on full steps and brought back, ahead of its time, for cached ones. What is read is on
the feature's device again, and sums of snapshots are accumulated in float32 whatever they are kept in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cache4diffusion.copies import Coming, CopyEngine, copy_engine
from cache4diffusion.errors import SettingError, closest

FP8 = getattr(torch, "float8_e4m3fn", None)
_LARGEST: dict[torch.dtype, float] = {torch.int8: 127.0, **({FP8: 448.0} if FP8 is not None else {})}
"""Dtypes that need a scale, and their largest number."""
_SMALLEST = torch.finfo(torch.float32).tiny  # of a scale: what is smaller than its steps is kept as 0

GROUP_BYTES = 256 * 2**20
"""The most that operations on many features at once hold beside the cache: of predictions that are made ahead (with
what they are added up in), and of features that are yet to be copied into it. A single feature may be larger."""

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    **({"fp8": FP8, "float8_e4m3fn": FP8} if FP8 is not None else {}),
}
"""What ``cache_dtype`` may be, by name."""


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Storage:
    """Where and in what snapshots are kept.

    Args:
        dtype: of floating-point features; None: the feature's own. ``float8_e4m3fn`` has a scale for each row of the
            batch in each snapshot, ``int8`` for each row and channel (see `scaled_axes`).
        device: None: the feature's own.
    """

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, dtype: Any = None, device: Any = None) -> Storage:
        """From what a user writes: names or torch's own objects.

        Raises:
            SettingError: a dtype or device that is not known, or that is not there.
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise SettingError(
                    f"cache_dtype={dtype!r}{closest(dtype, DTYPES) or '.'} Use one of {', '.join(DTYPES)}, or a dtype."
                )
            dtype = DTYPES[dtype]
        if dtype is not None and dtype not in DTYPES.values():
            raise SettingError(f"cache_dtype={dtype!r}: use one of {', '.join(DTYPES)}, or the torch dtype.")
        if device is not None:
            try:
                device = torch.device(device)
                torch.empty(0, device=device)
            except (RuntimeError, TypeError, AssertionError, ValueError) as error:
                reason = (str(error).splitlines() or [""])[0]
                raise SettingError(f"cache_device={str(device)!r} cannot be used ({reason}). Use 'cpu'.") from error
            if device.type == "meta":
                raise SettingError("cache_device='meta' holds no data. Use 'cpu', or a device.")
        return cls(dtype, device)

    @property
    def is_plain(self) -> bool:
        """Whether everything stays as it is."""
        return self.dtype is None and self.device is None

    @property
    def given(self) -> dict[str, str]:
        """What differs from the default, as it is written."""
        found = {} if self.dtype is None else {"cache_dtype": name_of(self.dtype)}
        return found | ({} if self.device is None else {"cache_device": str(self.device)})

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.given.items())


class Store:
    """Makes the buffers of one denoiser's cache.

    Args:
        storage: how snapshots are kept.
        copies: makes what copies to and from another device.
        pretends: whether features count as being on another device than ``storage.device`` wherever they are: to know
            what an accelerator would hold where there is none.
    """

    def __init__(
        self,
        storage: Storage | None = None,
        copies: Callable[[torch.device], CopyEngine] = copy_engine,
        *,
        pretends: bool = False,
    ) -> None:
        self.storage, self._make, self.pretends = storage or Storage(), copies, pretends
        self.writes = Writes()
        self._engines: dict[torch.device, CopyEngine] = {}
        self._hosted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # buffers that only pretend to be elsewhere

    @property
    def may_be_away(self) -> bool:
        """Whether a snapshot may lie on another device than its feature."""
        return self.storage.device is not None

    @property
    def engines(self) -> list[CopyEngine]:
        """What copied, so far."""
        return list(self._engines.values())

    def copies(self, device: torch.device) -> CopyEngine:
        """What copies to and from a device."""
        if device not in self._engines:
            self._engines[device] = self._make(device)
        return self._engines[device]

    def is_away(self, device: torch.device) -> bool:
        """Whether snapshots of a feature on ``device`` lie on another one."""
        wanted = self.storage.device
        if wanted is None:
            return False
        is_same = wanted.type == device.type and wanted.index in (None, device.index)
        return self.pretends or not is_same

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """What a feature of ``dtype`` is kept in."""
        return self.storage.dtype if self.storage.dtype is not None and dtype.is_floating_point else dtype

    def ring(self, capacity: int, shape: tuple[int, ...], like: Tensor, kept: torch.dtype | None = None) -> Ring:
        """Room for ``capacity`` snapshots of a tensor like ``like``, of another ``shape``.

        Args:
            capacity, shape, like: see above.
            kept: what they are kept in, whatever the storage says; None: what it says.
        """
        return Ring(self, capacity, shape, like, kept)

    def keep(self, tensor: Tensor) -> Kept:
        """A copy of one tensor."""
        return Kept(self, tensor)

    def remember(self, memory: dict[str, Any], name: str, tensor: Tensor) -> None:
        """A copy of one tensor as ``memory[name]``, in the place of an earlier one."""
        kept = memory.get(name)
        if isinstance(kept, Kept) and kept.fits(tensor):
            kept.set(tensor)
        else:
            memory[name] = self.keep(tensor)

    def place_of(self, tensor: Tensor) -> tuple[str, str]:
        """Device and dtype of a tensor that is held, for the ledger."""
        if self.pretends:
            device = str(self.storage.device) if tensor in self._hosted else "accelerator"
        else:
            device = str(tensor.device)
        return device, name_of(tensor.dtype)

    def _note(self, buffer: Tensor) -> None:
        if self.pretends:
            self._hosted[buffer] = True


@dataclass(frozen=True)
class _Write:
    """A copy that waits."""

    ring: Ring
    slot: int
    leaf: Tensor
    version: int  # of the leaf when it was to be copied
    on_change: Callable[[], None]


class Writes:
    """Copies into the slots of rings that wait for one another, to be made in one operation.

    A copy waits only where somebody vouches for its source (`waiting`), and no longer than until

    - sources of `GROUP_BYTES` wait (more is kept alive for no copy's sake),
    - somebody reads its slot or writes it anew: a `Ring` sees to that,
    - `make` is called, which whoever vouched must do.
    """

    def __init__(self) -> None:
        self._waiting: list[_Write] = []
        self._bytes = 0
        self._on_change: Callable[[], None] | None = None

    @contextmanager
    def waiting(self, on_change: Callable[[], None]) -> Iterator[None]:
        """What is written in here may wait: nobody is known to write into it in the meantime.

        Args:
            on_change: called if somebody did after all. The copy is then not what was to be kept.
        """
        before, self._on_change = self._on_change, on_change
        try:
            yield
        finally:
            self._on_change = before

    def take(self, ring: Ring, slot: int, leaf: Tensor) -> bool:
        """Whether the copy waits from here on; if not, it is to be made at once.

        In inference mode nobody would notice that a tensor was written into, and a tensor of the cache itself may be.
        """
        if self._on_change is None or leaf.is_inference() or ring.holds(leaf):
            return False
        size = leaf.untyped_storage().nbytes()  # all that a view keeps alive
        if self._waiting and self._bytes + size > GROUP_BYTES:
            self.make()
        self._waiting.append(_Write(ring, slot, leaf, leaf._version, self._on_change))
        self._bytes += size
        return True

    def make(self) -> None:
        """Make the copies that wait."""
        if not self._waiting:
            return
        writes, self._waiting, self._bytes = self._waiting, [], 0
        places = [write.ring.land(write.slot) for write in writes]
        torch._foreach_copy_(places, [write.leaf for write in writes])
        for on_change in dict.fromkeys(w.on_change for w in writes if w.leaf._version != w.version):
            on_change()


class Ring:
    """Snapshots of one tensor: ``capacity`` slots, each as large as it. Made by `Store.ring`.

    Slots lie in memory like the tensor itself: a prediction in another memory format (channels last, say) would lead
    the host to other kernels, which round differently.
    """

    def __init__(
        self, store: Store, capacity: int, shape: tuple[int, ...], like: Tensor, kept: torch.dtype | None = None
    ) -> None:
        self._store = store
        self.dtype, self.device = like.dtype, like.device
        self.is_away = store.is_away(like.device)
        self._order = axes_in_memory(like)
        self.shape = tuple(shape)
        self._kept = store.dtype_for(like.dtype) if kept is None else kept
        self._is_scaled = self._kept in _LARGEST and self._kept != like.dtype
        self._axes = scaled_axes(self._kept, len(shape))
        self._coming: dict[int, tuple[Coming, Coming | None]] = {}  # by slot
        self._awaited: set[int] = set()  # slots whose copies wait
        self._fill(*self._empty(capacity))

    def _empty(self, capacity: int) -> tuple[Tensor, Tensor | None]:
        device = self._store.storage.device if self.is_away else self.device
        assert device is not None

        def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if not self.is_away:
                return torch.empty(shape, dtype=dtype, device=device)
            return self._store.copies(self.device).room(shape, dtype, device)

        data = stacked(lambda shape: make(shape, self._kept), capacity, self.shape, self._order)
        sizes = [self.shape[axis] for axis in self._axes]
        scales = make((capacity, *sizes), torch.float32) if self._is_scaled else None
        if self.is_away:
            self._store._note(data)
            if scales is not None:
                self._store._note(scales)
        return data, scales

    def _fill(self, data: Tensor, scales: Tensor | None) -> None:
        self._data, self._slots, self.scales = data, data.unbind(), scales

    @property
    def data(self) -> Tensor:
        """The slots, ``[capacity, *shape]``, as they are kept."""
        self._settle(self._awaited)
        return self._data

    @property
    def capacity(self) -> int:
        """Slots there are now."""
        return len(self._slots)

    @property
    def kept(self) -> torch.dtype:
        """What the slots are kept in."""
        return self._kept

    @property
    def is_direct(self) -> bool:
        """Whether slots can be read and written as they lie: nothing has to be fetched or unpacked."""
        return not self.is_away and not self._is_scaled

    def tensors(self) -> Iterator[Tensor]:
        """Everything held: the slots, and what is on its way to the feature's device."""
        yield self._data
        if self.scales is not None:
            yield self.scales
        for pair in list(self._coming.values()):
            yield from (coming.tensor for coming in pair if coming is not None)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the slots itself."""
        return tensor.untyped_storage()._cdata == self._data.untyped_storage()._cdata

    def fits(self, leaf: Tensor, is_some_rows: bool) -> bool:
        """Whether a tensor (or some rows of it) is like the one this was made for."""
        if self.dtype != leaf.dtype or self.device != leaf.device or len(self.shape) != leaf.ndim:
            return False
        return self.shape[1:] == leaf.shape[1:] if is_some_rows else self.shape == leaf.shape

    def grow(self, capacity: int) -> None:
        """Have more slots."""
        if self.is_away:
            self._store.copies(self.device).finish()
        before, scales = self.data, self.scales
        self._fill(*self._empty(capacity))
        self._data[: before.shape[0]].copy_(before)
        if scales is not None and self.scales is not None:
            self.scales[: scales.shape[0]].copy_(scales)

    def write(self, slot: int, leaf: Tensor, row: int | None = None) -> None:
        """Fill a slot, or one row of it, with a copy of ``leaf``."""
        self._settle((slot,))
        self._coming.pop(slot, None)
        place = self._slots[slot] if row is None else self._slots[slot][row]
        if self.is_direct:
            if row is None and self._store.writes.take(self, slot, leaf):
                self._awaited.add(slot)
            else:
                place.copy_(leaf)
            return
        axes = self._axes if row is None else tuple(axis - 1 for axis in self._axes if axis)
        packed, scale = _pack(leaf, place, axes) if self._is_scaled else (_like(place, leaf), None)
        places = [(packed, place)]
        if scale is not None:
            assert self.scales is not None
            places.append((scale, self.scales[slot] if row is None else self.scales[slot, row]))
        for source, target in places:
            if self.is_away:
                self._store.copies(self.device).offload(source, target)
            else:
                target.copy_(source)

    def land(self, slot: int) -> Tensor:
        """The slot that a copy which waited is made into now."""
        self._awaited.discard(slot)
        return self._slots[slot]

    def _settle(self, slots: Collection[int]) -> None:
        """Make copies that wait, if one of them goes into one of these slots."""
        if self._awaited and not self._awaited.isdisjoint(slots):
            self._store.writes.make()

    def prefetch(self, slot: int) -> None:
        """Begin to bring a slot, if it lies elsewhere."""
        if self.is_away and slot not in self._coming:
            self._coming[slot] = self._bring(slot)

    def _bring(self, slot: int) -> tuple[Coming, Coming | None]:
        copies = self._store.copies(self.device)
        scales = None if self.scales is None else copies.prefetch(self.scales[slot])
        return copies.prefetch(self._slots[slot]), scales

    def read(self, slot: int) -> Tensor:
        """A slot, on the feature's device: in its dtype, in that it is kept in, or in float32. Not to be written."""
        self._settle((slot,))
        data, scales = self._slots[slot], None if self.scales is None else self.scales[slot]
        if self.is_away:
            copies = self._store.copies(self.device)
            coming = self._coming.pop(slot, None) or self._bring(slot)
            data, scales = copies.fetch(coming[0]), None if coming[1] is None else copies.fetch(coming[1])
        if scales is None:
            return data
        return data.float() * scales.reshape([n if axis in self._axes else 1 for axis, n in enumerate(data.shape)])

    def value(self, slot: int) -> Tensor:
        """A slot, on the feature's device and in its dtype. Not to be written."""
        return self.read(slot).to(self.dtype)


class Kept:
    """A copy of one tensor that is needed again at a later step. Made by `Store.keep`."""

    def __init__(self, store: Store, tensor: Tensor) -> None:
        self._ring = store.ring(1, tuple(tensor.shape), tensor)
        self._ring.write(0, tensor)

    def set(self, tensor: Tensor) -> None:
        """Keep another one of the same kind."""
        self._ring.write(0, tensor)

    def fits(self, tensor: Tensor) -> bool:
        """Whether it is of the same kind."""
        return self._ring.fits(tensor, is_some_rows=False)

    def prefetch(self) -> None:
        """Begin to bring it, if it lies elsewhere."""
        self._ring.prefetch(0)

    def read(self) -> Tensor:
        """The tensor, on its device and in its dtype. Not to be written."""
        return self._ring.value(0)

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        yield from self._ring.tensors()


def axes_in_memory(tensor: Tensor) -> list[int]:
    """The axes of a tensor, from that of the largest steps in memory to that of the smallest."""
    return sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride(axis), axis))


def stacked(
    make: Callable[[tuple[int, ...]], Tensor], count: int, shape: Sequence[int], order: Sequence[int]
) -> Tensor:
    """Room ``[count, *shape]`` for tensors that lie in memory one after the other, each with its axes in ``order``.

    Args:
        make: makes a contiguous tensor of a shape.
        count: of the tensors.
        shape: of each.
        order: as `axes_in_memory` gives it.
    """
    inside = make((count, *[shape[axis] for axis in order]))
    return inside.permute(0, *[1 + order.index(axis) for axis in range(len(shape))])


def _like(place: Tensor, leaf: Tensor) -> Tensor:
    """A copy of ``leaf`` on its own device, in the dtype and memory format of its place in the cache.

    The host may write into the leaf before an offload has read it.
    """
    return torch.empty_like(place, device=leaf.device).copy_(leaf)


def scaled_axes(dtype: torch.dtype, ndim: int) -> tuple[int, ...]:
    """The axes of a snapshot along which its scales differ: the rows of the batch, and of int8 the channels as well.

    Those are the last axis of tokens ``[B, N, D]``, axis 1 of maps ``[B, C, H, W]`` and of all larger ones. A vector
    has one scale per row.
    """
    if dtype == torch.int8 and ndim > 2:
        return (0, 2 if ndim == 3 else 1)
    return (0,) if ndim else ()


def _pack(leaf: Tensor, place: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Numbers in few bits, and their scales: ``x / s`` for the ``s`` that brings the largest to the dtype's largest.

    Rounded to the nearest in int8, so that a number is off by ``s / 2`` at most. What has one scale with a NaN or an
    Inf comes back as NaN, all of it: whoever looks for such numbers finds them.

    Args:
        leaf: what is kept.
        place: where, for its dtype and memory format.
        axes: of the leaf, along which scales differ.
    """
    wide, sizes = leaf.float(), [leaf.shape[axis] for axis in axes]
    if not leaf.numel():
        return torch.empty_like(place, device=leaf.device), wide.new_ones(sizes)
    dims = [axis for axis in range(leaf.ndim) if axis not in axes]
    largest = wide.abs().amax(dims, keepdim=True) if dims else wide.abs()
    scale = largest / _LARGEST[place.dtype]
    scale = torch.where(scale < _SMALLEST, torch.ones_like(scale), scale)
    numbers = wide / scale
    if place.dtype == torch.int8:
        numbers = numbers.round_().nan_to_num_(0.0)  # what a NaN becomes in whole numbers is nobody's promise
    return torch.empty_like(place, device=leaf.device).copy_(numbers), scale.reshape(sizes)


PLAIN = Store()
"""Snapshots as they are, where they are."""
