"""Editing a picture by changing its prompt: what the change does not touch is taken from the recorded run.

Source: FISEdit, arXiv:2305.17423 (AAAI 2024); released code Hankpipi/diffusers-hetu.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cache4diffusion.edit.layers import Call, Layers, bytes_of
from cache4diffusion.edit.masks import from_differences, resized
from cache4diffusion.engine.compiling import is_compiled
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.errors import AlreadyAcceleratedError, AnatomyError, RunError, SettingError
from cache4diffusion.storage import Storage, Store
from cache4diffusion.wrap import CallWrapper, owner_of


def record(
    pipe: Any,
    *,
    cache_dtype: Any = None,
    cache_device: Any = None,
    least: float = 1 / 16,
    least_attention: float = 1 / 4,
    **call: Any,
) -> Recording:
    """Sample a picture, and keep what the layers of the U-Net made at every step, for edits of it.

    Example::

        with c4d.edit.record(pipe, prompt="a red circle", cache_device="cpu") as picture:
            before = picture.result.images[0]
            after = picture.edit(prompt="a blue circle").images[0]

    Args:
        pipe: a pipeline of diffusers with a U-Net.
        cache_dtype: as in `accelerate`.
        cache_device: as in `accelerate`; the published code keeps everything in the host's memory.
        least: layers run sparsely on maps with this share of the latent's places or more, 0 to 1. Code: 24 x 24 of
            96 x 96.
        least_attention: likewise, for the queries of attention. Code: 48 x 48 of 96 x 96.
        **call: arguments of the pipeline's call. Without a generator, one is made, so that edits begin from one noise.

    Returns:
        The recording; it holds memory, and its wrappers, until ``remove()`` or the end of its ``with`` block.

    Raises:
        SettingError: a share is out of range.
        AnatomyError: the pipeline has no U-Net, or it is compiled.
        AlreadyAcceleratedError: the U-Net is accelerated.
    """
    for name, share in (("least", least), ("least_attention", least_attention)):
        if not 0 <= share <= 1:
            raise SettingError(f"record({name}={share}): a share of the latent's places, 0 to 1.")
    denoiser = getattr(pipe, "unet", None)
    if not isinstance(denoiser, nn.Module):
        raise AnatomyError(f"{type(pipe).__name__} has no U-Net, and the layers that are edited here are those of one.")
    if owner_of(denoiser) is not None:
        raise AlreadyAcceleratedError(
            f"unet is already accelerated by {owner_of(denoiser).label}. Call remove() on that handle first."
        )
    if any(is_compiled(module) for module in denoiser.modules()):
        raise AnatomyError("unet is compiled, and its layers must be reached one by one. Record before compiling it.")
    if call.get("generator") is None:
        call["generator"] = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return Recording(pipe, denoiser, Store(Storage.of(cache_dtype, cache_device)), (least, least_attention), call)


class Recording:
    """One picture and what its layers were. Made by `record`.

    Attributes:
        result: what the pipeline returned.
        mask: where the newest edit computed, ``[H, W]`` of the latent; None before there is one.
        label: how it is called in messages.
    """

    label = "edit.record"

    def __init__(
        self, pipe: Any, denoiser: nn.Module, store: Store, least: tuple[float, float], call: dict[str, Any]
    ) -> None:
        self.pipe, self.call = pipe, call
        self.mask: Tensor | None = None
        self._calls: list[Call] = []
        self._is_done = False
        self._inputs = inputs_of(denoiser)
        self._states = [generator.get_state() for generator in self._generators]
        self._layers = Layers(denoiser, store, *least)
        self._edit: _Edit | None = None
        self._wrapper = CallWrapper(denoiser, self._on_call, owner=self)
        try:
            self.result = pipe(**call)
        except BaseException:
            self.remove()
            raise
        self._is_done = True

    @property
    def _generators(self) -> list[torch.Generator]:
        given = self.call["generator"]
        return list(given) if isinstance(given, (list, tuple)) else [given]

    @property
    def memory(self) -> int:
        """Bytes that are held."""
        return bytes_of(self._calls)

    def edit(self, *, mask: Any = None, dense: float = 0.2, **changes: Any) -> Any:
        """Sample again from the same noise with some arguments changed, computing where the picture changes.

        Without a mask the first steps are dense, and where latents have come apart by then is the mask; the other steps
        are sparse. With a mask the first steps are sparse, and the last ones dense, which hides seams.

        Args:
            mask: of any size, ``[H, W]``, above 0.5 where the picture may change: a tensor, array or image.
            dense: share of the steps that are dense, 0 to 1. Code: 10 of 50.
            **changes: arguments of the pipeline's call in place of the recorded ones, such as ``prompt``.

        Returns:
            What the pipeline returns.

        Raises:
            SettingError: an argument that edits cannot change.
            RunError: the recording was removed, or the run is not the recorded one's counterpart step by step.
        """
        if not self._is_done or not self._calls:
            raise RunError("The recording was removed. Make a new one: c4d.edit.record(pipe, prompt=...).")
        if not 0 <= dense <= 1:
            raise SettingError(f"edit(dense={dense}): a share of the steps, 0 to 1.")
        fixed = {"generator", "latents", "num_inference_steps", "height", "width"} & changes.keys()
        if fixed:
            raise SettingError(f"edit({', '.join(sorted(fixed))}=...): an edit has the recorded run's. Record anew.")
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        latent = self._calls[0].latent
        given = None if mask is None else resized(_as_mask(mask), *latent.shape[-2:]).to(latent.device)
        self._edit = _Edit(given, dense, len(self._calls))
        try:
            result = self.pipe(**{**self.call, **changes})
        finally:
            edit, self._edit = self._edit, None
        if edit.index != len(self._calls):
            raise RunError(
                f"The edit called the U-Net {edit.index} times, and the recorded run {len(self._calls)} times."
            )
        self.mask = edit.mask
        return result

    def remove(self) -> None:
        """Let go of everything; the U-Net is what it was."""
        self._wrapper.remove()
        self._layers.remove()
        self._calls = []

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    # -- calls of the denoiser -------------------------------------------------------------------------------------

    def _on_call(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        timestep, latent, _ = self._inputs.split(args, kwargs)
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        edit = self._edit
        if edit is None:
            if self._is_done:  # a call of somebody else's
                return inner(*args, **kwargs)
            self._calls.append(Call(latent.clone(), value))
            with self._layers.recording(self._calls[-1]):
                return inner(*args, **kwargs)
        if edit.index >= len(self._calls):
            raise RunError(f"The edit calls the U-Net more often than the recorded run, {len(self._calls)} times.")
        call = self._calls[edit.index]
        if call.latent.shape != latent.shape or call.timestep != value:
            raise RunError(
                f"Call {edit.index} of the edit has a latent {list(latent.shape)} at timestep {value:g}, the recorded "
                f"one {list(call.latent.shape)} at {call.timestep:g}: guidance, scheduler and size must "
                "be the recorded ones."
            )
        if edit.index == 0 and not torch.equal(call.latent, latent):
            raise RunError("The edit begins from other noise than the recorded run.")
        mask = edit.at(self._calls, latent)
        edit.index += 1
        if mask is None:
            return inner(*args, **kwargs)
        with self._layers.sparse(call, mask):
            return inner(*args, **kwargs)


class _Edit:
    """One run of an edit: at which calls it is sparse, and where.

    Args:
        mask: where, if it was given.
        dense: share of the calls that are dense.
        calls: how many there are.
    """

    def __init__(self, mask: Tensor | None, dense: float, calls: int) -> None:
        self.mask, self.index = mask, 0
        self._is_given, self._latents = mask is not None, list[Tensor]()
        self._dense = round(dense * calls)
        self._calls = calls

    def at(self, old: list[Call], latent: Tensor) -> Tensor | None:
        """The mask of the call that begins; None if it is dense."""
        if self._is_given:
            return self.mask if self.index < self._calls - self._dense else None
        if self.mask is None:
            self._latents.append(latent.clone())
            if self.index < max(self._dense, 1):
                return None
            before = [call.latent for call in old[1 : self.index + 1]]
            self.mask = from_differences(before, self._latents[1:])
            self._latents = []
        return self.mask


def _as_mask(given: Any) -> Tensor:
    """Truths ``[H, W]`` of what a user calls a mask.

    Raises:
        SettingError: it has another shape.
    """
    if not isinstance(given, Tensor):
        import numpy as np

        found = np.asarray(given)
        given = torch.from_numpy(copy.copy(found).astype("float32") / (255 if found.dtype == np.uint8 else 1))
    mask = given.float().squeeze()
    if mask.ndim == 3 and mask.shape[-1] in (3, 4):
        mask = mask[..., :3].amax(-1)
    if mask.ndim != 2:
        raise SettingError(f"edit(mask=...) has the shape {list(given.shape)}: give [height, width].")
    return mask > 0.5
