"""A tiny random denoiser that makes videos chunk by chunk, and loops and references for it.

As Ca2-VDM's: attention within each frame, causal attention over time with cyclic places added in front of it, cross-
attention to a prompt, a timestep for each frame.
"""

from __future__ import annotations

import torch
from torch import nn

from weights import ready

WIDTH, HEADS, CHANNELS, SIDE = 16, 2, 3, 4
PERIOD = 12  # places repeat after so many frames
CHUNK, WINDOW = 2, 5  # frames of a chunk, and clean ones that the loop brings at most
TIMES = (900.0, 600.0, 300.0)


class Attention(nn.Module):
    """Causal if it is told so, or under a mask of the test's own."""

    mask = None

    def __init__(self, causal=False, rotary=False):
        super().__init__()
        self.causal, self.rotary = causal, rotary
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, context=None, places=None):
        source = x if context is None else context
        q, k, v = (
            of(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for of, tokens in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        if self.rotary:
            q, k = rotated(q, places), rotated(k, places)
        mask = Attention.mask if self.causal else None
        is_causal = self.causal and mask is None
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


def rotated(x, places):
    angles = places[:, None] * 10.0 ** -torch.arange(x.shape[-1] // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, causal, rotary):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(WIDTH) for _ in range(4))
        self.attn, self.attn_temp, self.cross_attn = Attention(), Attention(causal, rotary), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, text, gate, places, frames):
        batch, _, width = x.shape
        x = x + gate * self.attn(self.norm1(x).reshape(batch * frames, -1, width)).reshape(x.shape)
        at_places = self.norm2(x).unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
        through_time = self.attn_temp(at_places, places=places)
        x = x + gate * through_time.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gate * self.mlp(self.norm4(x))


class Video(nn.Module):
    def __init__(self, causal=True, rotary=False, mixes=False, depth=2):
        super().__init__()
        self.rotary = rotary
        self.embed, self.clock, self.prompt = nn.Linear(CHANNELS, WIDTH), nn.Linear(2, WIDTH), nn.Linear(6, WIDTH)
        self.tpe = nn.Parameter(torch.randn(PERIOD, WIDTH))
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1) if mixes else None
        self.blocks = nn.ModuleList(Block(causal, rotary) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHANNELS)

    def through(self, latent, timestep, text, first_frame, return_dict):
        batch, _, frames, height, width = latent.shape
        x = self.embed(latent.flatten(3).permute(0, 2, 3, 1))  # [B, F, S, D]
        places = first_frame + torch.arange(frames)
        if not self.rotary:
            x = x + self.tpe[places % PERIOD][:, None]
        if self.mix is not None:
            x = x + self.mix(x.permute(0, 2, 3, 1).flatten(0, 1)).unflatten(0, (batch, -1)).permute(0, 3, 1, 2)
        angles = timestep[..., None] / 1000
        gate = self.clock(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        gate = gate[:, :, None].expand_as(x).flatten(1, 2)
        x, text = x.flatten(1, 2), self.prompt(text)
        for block in self.blocks:
            x = block(x, text, gate, places, frames)
        x = self.out(self.norm(x)).unflatten(1, (frames, -1)).permute(0, 3, 1, 2)
        sample = x.unflatten(3, (height, width))
        return {"sample": sample} if return_dict else (sample,)


class CausalVideo(Video):
    """With ``causal=False``, or ``mixes=True`` (a convolution over time), it is not."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, first_frame=0, return_dict=True):
        return self.through(hidden_states, timestep, encoder_hidden_states, first_frame, return_dict)


class CountingVideo(Video):
    """Places are counted within the call."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        return self.through(hidden_states, timestep, encoder_hidden_states, 0, return_dict)


FRAMES = {"hidden_states": 2, "timestep": 1}
DECLARED = {"frames": FRAMES, "first_frame": "first_frame"}


def made(kind=CausalVideo, seed=0, **options):
    torch.manual_seed(seed)
    return ready(kind(**options))


def prompt(seed=1, batch=1):
    return torch.randn(batch, 3, 6, generator=torch.Generator().manual_seed(seed))


def noise(place, batch=1, frames=CHUNK, side=SIDE):
    return torch.randn(batch, CHANNELS, frames, side, side, generator=torch.Generator().manual_seed(100 + place))


def inputs(clean, chunk, text, time, place):
    """The arguments of a call."""
    times = torch.tensor([0.0] * clean.shape[2] + [time] * chunk.shape[2]).expand(len(clean), -1)
    return {
        "hidden_states": torch.cat([clean, chunk], dim=2),
        "timestep": times.clone(),
        "encoder_hidden_states": text,
        "first_frame": place,
    }


@torch.no_grad()
def video(denoiser, text, chunks=2, times=TIMES, window=WINDOW, batch=1, side=SIDE, start=0, on_call=None):
    """Frames made chunk by chunk behind a given first one, and the denoiser's outputs of every call."""
    frames, outputs = noise(-1 - start, batch, 1, side), []
    for _ in range(chunks):
        clean = frames[:, :, -window:]
        place = start + frames.shape[2] - clean.shape[2]
        chunk = noise(start + frames.shape[2], batch, CHUNK, side)
        for time in times:
            if on_call is not None:
                on_call(len(outputs))
            output = denoiser(**inputs(clean, chunk, text, time, place), return_dict=False)[0]
            outputs.append(output)
            chunk = chunk - output[:, :, clean.shape[2] :] / len(times)
        frames = torch.cat([frames, chunk], dim=2)
    return frames, outputs


@torch.no_grad()
def slow_video(denoiser, text, chunks, times=TIMES, window=WINDOW):
    """The same by recomputing the whole video at every step. Each frame sees what was in sight when it ran: a clean one
    the frames that were held when its chunk was done."""
    frames, outputs, sights = noise(-1, 1, 1), [], [0]  # of each frame: the first that it sees
    for _ in range(chunks):
        count = frames.shape[2]
        first = max(count - window, 0)
        chunk = noise(count)
        mask = torch.zeros(count + CHUNK, count + CHUNK, dtype=torch.bool)
        for row, sight in enumerate([*sights, *[first] * CHUNK]):
            mask[row, sight : row + 1] = True
        Attention.mask = mask
        try:
            for time in times:
                output = denoiser(**inputs(frames, chunk, text, time, 0), return_dict=False)[0]
                outputs.append(output[:, :, first:])
                chunk = chunk - output[:, :, count:] / len(times)
        finally:
            Attention.mask = None
        frames, sights = torch.cat([frames, chunk], dim=2), sights + [first] * CHUNK
    return frames, outputs
