"""Denoisers people run, at their real size and without weights: for what can be known from shapes alone.

Configurations are those of the published weights (``config.json`` beside them), which are also the defaults of their
diffusers classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cache4diffusion.errors import SettingError, UnknownNameError, closest


@dataclass(frozen=True)
class Shape:
    """One of `SHAPES`.

    Args:
        name: as on the command line.
        kind: name of the diffusers class.
        resolution: side of the image it is made for, in pixels.
        frames: of the video it is made for; 1 for images.
        multiple: of pixels that a side must be.
        config: where it differs from the class's defaults.
        inputs: arguments of one call, from batch size, height, width (in pixels), frames and dtype.
        branches: calls per step in its usual pipeline: 2 with classifier-free guidance.
    """

    name: str
    kind: str
    resolution: int
    frames: int
    multiple: int
    config: dict[str, Any]
    inputs: Callable[[int, int, int, int, torch.dtype], dict[str, Any]]
    branches: int

    def denoiser(self, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
        """The denoiser without weights: every tensor has a shape, and none has data.

        Args:
            dtype: of its parameters.
            **changes: to its configuration, such as ``num_layers=1``.
        """
        with FakeTensorMode(allow_non_fake_inputs=True):
            return self.with_weights(dtype, **changes)

    def with_weights(self, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
        """The denoiser with random weights, on the default device. It may need tens of gigabytes."""
        import diffusers

        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return getattr(diffusers, self.kind)(**{**self.config, **changes}).eval()
        finally:
            torch.set_default_dtype(before)

    def calls(
        self,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> list[dict[str, Any]]:
        """Arguments of the calls of one step, one for each CFG branch; the data is zeros, and ones for the second text.

        Raises:
            SettingError: a side is no multiple of what the denoiser takes.
        """
        height = self.resolution if height is None else height
        width = height if width is None else width
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise SettingError(f"{self.name}: {height} x {width} pixels; sides must be multiples of {self.multiple}.")
        calls = []
        for branch in range(self.branches):
            call = self.inputs(batch, height, width, self.frames if frames is None else frames, dtype)
            calls.append({**call, "encoder_hidden_states": call["encoder_hidden_states"] + branch})
        return calls


def _flux(batch: int, height: int, width: int, frames: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, columns = height // 16, width // 16
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return {
        "hidden_states": torch.zeros(batch, rows * columns, 64, dtype=dtype),
        "encoder_hidden_states": torch.zeros(batch, 512, 4096, dtype=dtype),
        "pooled_projections": torch.zeros(batch, 768, dtype=dtype),
        "timestep": _times(batch, dtype, 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": ids.view(-1, 3).to(dtype),
        "txt_ids": torch.zeros(512, 3, dtype=dtype),
    }


def _qwen_image(batch: int, height: int, width: int, frames: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, columns, text = height // 16, width // 16, 128
    return {
        "hidden_states": torch.zeros(batch, rows * columns, 64, dtype=dtype),
        "encoder_hidden_states": torch.zeros(batch, text, 3584, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(batch, text, dtype=torch.long),
        "timestep": _times(batch, dtype, 0.5),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def _wan(batch: int, height: int, width: int, frames: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, height, width, frames, dtype),
        "timestep": _times(batch, torch.float32, 500.0),
        "encoder_hidden_states": torch.zeros(batch, 512, 4096, dtype=dtype),
    }


def _hunyuan_video(batch: int, height: int, width: int, frames: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, height, width, frames, dtype),
        "timestep": _times(batch, torch.float32, 500.0),
        "encoder_hidden_states": torch.zeros(batch, 256, 4096, dtype=dtype),
        "encoder_attention_mask": torch.ones(batch, 256, dtype=torch.long),
        "pooled_projections": torch.zeros(batch, 768, dtype=dtype),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype),
    }


def _times(batch: int, dtype: torch.dtype, value: float) -> Tensor:
    return torch.full((batch,), value, dtype=dtype)


def _video(batch: int, height: int, width: int, frames: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8, dtype=dtype)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("flux.1-dev", "FluxTransformer2DModel", 1024, 1, 16, {"guidance_embeds": True}, _flux, 1),
        Shape("qwen-image", "QwenImageTransformer2DModel", 1328, 1, 16, {}, _qwen_image, 2),
        Shape("wan2.2-t2v-a14b", "WanTransformer3DModel", 480, 81, 16, {}, _wan, 2),
        Shape("hunyuan-video", "HunyuanVideoTransformer3DModel", 544, 61, 16, {}, _hunyuan_video, 1),
    )
}
"""Denoisers of published weights by name, with what each usually makes."""


def shape(name: str) -> Shape:
    """One of `SHAPES`.

    Raises:
        UnknownNameError: there is none of that name; the nearest is named.
    """
    if name not in SHAPES:
        raise UnknownNameError(f"There is no shape {name!r}{closest(name, SHAPES) or '.'} Known: {', '.join(SHAPES)}.")
    return SHAPES[name]
