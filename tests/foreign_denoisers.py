"""Denoisers that nobody registered, as people write them: tiny, random, and each with a habit of its own.

Every maker returns a module with the arguments of a call: the latent first, then the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from weights import ready

WIDTH, TOKENS = 16, 6
Foreign = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Clock(nn.Module):
    """Sines of the time, and two layers."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None].float() * torch.exp(-math.log(100) * torch.arange(4, device=t.device) / 4)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Block(nn.Module):
    """adaLN-zero, as in the original research repository of DiT."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Tokens(nn.Module):
    """The frame of the denoisers below: tokens in, blocks in the middle (`through`), tokens out."""

    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        self.embed, self.clock = nn.Linear(4, WIDTH), Clock()
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.final = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> Any:
        return self.final(self.through(self.embed(x), self.clock(t) + y))

    def through(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


def call(batch: int) -> tuple[torch.Tensor, ...]:
    """Latent tokens, time and conditioning."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(batch, TOKENS, 4, generator=g), torch.full((batch,), 0.5), torch.randn(batch, WIDTH, generator=g)


def of(make: Callable[[], nn.Module]) -> Callable[..., Foreign]:
    """A maker of a denoiser that is called as `Tokens` is."""

    def build(batch: int = 2) -> Foreign:
        torch.manual_seed(3)
        return ready(make()), call(batch), {}

    return build


# The original research repository's DiT ----


class DiT(nn.Module):
    """Patches by a convolution, positions as a parameter, classes with a token for none, a last layer with adaLN."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, WIDTH, 2, stride=2)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH), requires_grad=False)
        self.t_embedder, self.y_embedder = Clock(), nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {"norm": nn.LayerNorm(WIDTH, elementwise_affine=False), "linear": nn.Linear(WIDTH, 2 * 2 * 8)}
        )
        self.final_modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(self.final_layer["norm"](x), shift, scale))
        x = x.reshape(x.shape[0], 4, 4, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 8, 8, 8)

    def forward_with_cfg(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float) -> torch.Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)


def research(batch: int = 2) -> Foreign:
    torch.manual_seed(3)
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(batch, 4, 8, 8, generator=g), torch.arange(batch) % 10
    return ready(DiT()), (x, torch.full((batch,), 500.0), y), {}


# U-ViT ----


class SkipBlock(nn.Module):
    """Joins what a block on the way down left, before anything else."""

    def __init__(self, has_skip: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp()
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if has_skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Time, classes and patches as tokens of one row; long skips from the first half of the blocks to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.label_emb, self.time_embed = (
            nn.Conv2d(4, WIDTH, 2, stride=2),
            nn.Embedding(10, WIDTH),
            Clock(),
        )
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + 16, WIDTH))
        self.in_blocks = nn.ModuleList(SkipBlock(False) for _ in range(2))
        self.mid_block = SkipBlock(False)
        self.out_blocks = nn.ModuleList(SkipBlock(True) for _ in range(2))
        self.norm, self.decoder_pred = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.time_embed(timesteps).unsqueeze(1), self.label_emb(y).unsqueeze(1), x], dim=1)
        x = x + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        return x.reshape(len(x), 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), 4, 8, 8)


def uvit(batch: int = 2) -> Foreign:
    torch.manual_seed(3)
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return ready(UViT()), (x, torch.full((batch,), 500.0), torch.arange(batch) % 10), {}


# Blocks that return containers ----


class DictBlock(Block):
    """Returns a dict."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> dict[str, Any]:
        return {"hidden": super().forward(x, c), "attention": None}


class DictTokens(Tokens):
    def through(self, x, c):
        for block in self.blocks:
            x = block(x, c)["hidden"]
        return x


class DictStateBlock(Block):
    """Takes the whole state as a dict and returns the next one; what it does not change, it hands on."""

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "x": super().forward(state["x"], state["c"])}


class DictStateTokens(Tokens):
    def through(self, x, c):
        state = {"x": x, "c": c, "scale": 1.0, "mask": None}
        for block in self.blocks:
            state = block(state)
        return state["x"]


class PutsBlock(Block):
    """Puts the next tokens into the dict that it was given, and returns that."""

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        state["x"] = super().forward(state["x"], state["c"])
        return state


class PutsTokens(Tokens):
    """Goes on with its own dict, and leaves what the blocks return lying."""

    def through(self, x, c):
        state = {"x": x, "c": c}
        for block in self.blocks:
            block(state)
        return state["x"]


@dataclass
class State:
    x: torch.Tensor
    c: torch.Tensor
    layer: int = 0


@dataclass(frozen=True)
class Result:
    hidden: torch.Tensor
    weights: torch.Tensor | None = None


class DataclassBlock(Block):
    """Returns a dataclass."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> Result:
        return Result(super().forward(x, c))


class DataclassTokens(Tokens):
    """So does the denoiser."""

    def forward(self, x, t, y):
        return Result(super().forward(x, t, y))

    def through(self, x, c):
        for block in self.blocks:
            x = block(x, c).hidden
        return x


class StateBlock(Block):
    """Takes and returns a dataclass."""

    def forward(self, state: State) -> State:
        return dataclasses.replace(state, x=super().forward(state.x, state.c))


class StateTokens(Tokens):
    def through(self, x, c):
        state = State(x, c)
        for block in self.blocks:
            state = block(state)
        return state.x


class ResultAttention(Attention):
    def forward(self, x: torch.Tensor) -> Result:
        return Result(super().forward(x))


class ResultPartBlock(Block):
    """An attention that returns a dataclass, an MLP that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = ResultAttention(), DictMLP()

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa)).hidden
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))["out"]


class DictMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.net(x)}


# Shared blocks ----


class TwiceInARow(Tokens):
    """Every block runs twice before the next one does."""

    def through(self, x, c):
        for block in self.blocks:
            x = block(block(x, c), c)
        return x


class AroundTwice(Tokens):
    """The whole list runs twice."""

    def through(self, x, c):
        for _ in range(2):
            for block in self.blocks:
                x = block(x, c)
        return x


class ListedTwice(Tokens):
    """A list in which every block stands twice, as weights are shared between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([*self.blocks, *self.blocks])


class MiddleTwice(Tokens):
    """One of the blocks runs once more at the end."""

    def through(self, x, c):
        return self.blocks[1](super().through(x, c), c)


class SharedAttentionBlock(Block):
    """One attention for both of its residual branches: a part that runs twice in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = None

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.attn(modulate(self.norm2(x), shift_mlp, scale_mlp))


# Blocks that write into what they are given ----


class WritingBlock(Block):
    """Adds to its input in place and returns that very tensor."""

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x += gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x += gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class ViewingBlock(WritingBlock):
    """Adds to its input in place and returns another look at it."""

    def forward(self, x, c):
        return super().forward(x, c).view_as(x)


FOREIGN: dict[str, Callable[..., Foreign]] = {
    "research": research,
    "uvit": uvit,
    "dicts": of(lambda: DictTokens(DictBlock)),
    "dict states": of(lambda: DictStateTokens(DictStateBlock)),
    "dataclasses": of(lambda: DataclassTokens(DataclassBlock)),
    "dataclass states": of(lambda: StateTokens(StateBlock)),
    "parts that return containers": of(lambda: Tokens(ResultPartBlock)),
    "blocks twice in a row": of(TwiceInARow),
    "blocks twice around": of(AroundTwice),
    "blocks listed twice": of(ListedTwice),
    "one block twice": of(MiddleTwice),
    "blocks that write": of(lambda: Tokens(WritingBlock)),
    "blocks that write and return a view": of(lambda: Tokens(ViewingBlock)),
}


def loop(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int = 8, *, frozen: bool = False):
    """The outputs of a plain sampling loop; ``frozen``: the same input at every step."""
    x, t, *rest = args
    found = []
    with torch.no_grad():
        for step in range(steps):
            out = denoiser(x.clone(), t * (1 - step / steps), *rest, **kwargs) if not frozen else None
            if frozen:
                out = denoiser(x.clone(), t, *rest, **kwargs)
            found.append(tensor_of(out).clone())
            if not frozen:
                x = x - 0.1 * found[-1].narrow(1, 0, x.shape[1])
    return found


def tensor_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.hidden


class Products(TorchFunctionMode):
    """Counts products with the weights of some modules, or all: what was really computed, whatever hooks say."""

    def __init__(self, modules: Iterable[nn.Module] | None = None) -> None:
        super().__init__()
        self.weights = None if modules is None else {id(w) for module in modules for w in module.parameters()}
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_computed = type(result) is torch.Tensor  # and not only observed
        if func is nn.functional.linear and is_computed and (self.weights is None or id(args[1]) in self.weights):
            self.count += 1
        return result


# A denoiser that nobody could guess ----


class Mixed(nn.Module):
    """A block with other names, whose parts are joined by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.mix, self.two, self.map = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), mlp()

    def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        z = z + self.mix(self.one(z) * c.unsqueeze(1))
        return z + self.map(self.two(z))


class Odd(nn.Module):
    """Tells the time by an argument of another name, takes the prompt first, and has blocks outside of any list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.clock = nn.Linear(4, WIDTH), Clock()
        self.first, self.layers, self.last = Mixed(), nn.ModuleList(Mixed() for _ in range(2)), Mixed()
        self.final = nn.Linear(WIDTH, 4)

    def forward(self, words: torch.Tensor, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        z, c = self.embed(z), self.clock(noise) + words
        z = self.first(z, c)
        for layer in self.layers:
            z = layer(z, c)
        return self.final(self.last(z, c))


def odd(batch: int = 2, kind: type[nn.Module] = Odd) -> Foreign:
    """With arguments by name."""
    torch.manual_seed(3)
    z, noise, words = call(batch)
    return ready(kind()), (), {"z": z, "noise": noise, "words": words}
