"""FBCache, DBCache, TeaCache and TaylorSeer written down from their cards, for one batch and one decision.

The first three are plain loops over blocks, TaylorSeer is what becomes of each part.
"""

from __future__ import annotations

import copy
import math
from itertools import chain

import torch
from torch import nn

from small_denoisers import Plainly, SlowFlux


class FluxBlocks(SlowFlux):
    """FLUX as lists of blocks on ``[image, text]``, and what the host adds behind each block (ControlNet)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, Plainly())

    def enter(self, kwargs):
        image, text, temb, rope = self.embed(kwargs)
        count = len(self.model.transformer_blocks)
        blocks = [lambda streams, b=b: list(b(*streams, temb, rope)) for b in self.blocks()]
        return [image, text], temb, [blocks[:count], blocks[count:]]

    def glue(self, kwargs):
        """What is added to the image stream behind each block, by list."""
        return [
            kwargs.get(name) or [0.0] * len(blocks)
            for name, blocks in [
                ("controlnet_block_samples", self.model.transformer_blocks),
                ("controlnet_single_block_samples", self.model.single_transformer_blocks),
            ]
        ]

    def leave(self, streams, temb):
        return self.head(streams[0], temb)

    def signal(self, streams, temb):
        """Block 0's modulated norm1 output."""
        return self.model.transformer_blocks[0].norm1(streams[0], emb=temb)[0]


class DiTBlocks:
    """DiT as one list of blocks on ``[tokens]``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def enter(self, kwargs):
        t, labels = kwargs["timestep"], kwargs["class_labels"]
        blocks = [
            lambda streams, b=b: [b(streams[0], timestep=t, class_labels=labels)] for b in self.model.transformer_blocks
        ]
        return [self.model.pos_embed(kwargs["hidden_states"])], (t, labels), [blocks]

    def glue(self, kwargs):
        return [[0.0] * len(self.model.transformer_blocks)]

    def leave(self, streams, context):
        model, x = self.model, streams[0]
        conditioning = model.transformer_blocks[0].norm1.emb(*context, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(nn.functional.silu(conditioning)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        side, patch, channels = math.isqrt(x.shape[1]), model.patch_size, model.out_channels
        x = x.reshape(-1, side, side, patch, patch, channels)
        return (torch.einsum("nhwpqc->nchpwq", x).reshape(-1, channels, side * patch, side * patch),)

    def signal(self, streams, context):
        t, labels = context
        return self.model.transformer_blocks[0].norm1(streams[0], t, labels, hidden_dtype=streams[0].dtype)[0]


def relative(now, before):
    """``mean|now - before| / mean|before|``."""
    return float((now - before).abs().mean() / before.abs().mean())


class SlowCache:
    """Runs lists of blocks under a rule; remembers the strip and the scores."""

    def __init__(self, net) -> None:
        self.net, self.step, self.strip, self.scores = net, -1, "", []

    def __call__(self, **kwargs):
        self.step += 1
        streams, context, lists = self.net.enter(kwargs)
        streams = self.through(streams, context, lists, self.net.glue(kwargs))
        return self.net.leave(streams, context)

    @staticmethod
    def run(blocks, glue, streams):
        """Run blocks; returns the streams and the sum of the blocks' own residuals."""
        total = [torch.zeros_like(s) for s in streams]
        for block, added in zip(blocks, glue, strict=True):
            after = block(streams)
            total = [r + (b - a) for r, a, b in zip(total, streams, after, strict=True)]
            streams = [after[0] + added, *after[1:]]
        return streams, total

    @staticmethod
    def skip(residual, glue, streams):
        """Add a stored residual, and what the host adds behind each block."""
        streams = [s + r for s, r in zip(streams, residual, strict=True)]
        return [streams[0] + sum(glue), *streams[1:]]


class SlowDBCache(SlowCache):
    """The card's DBCache; FBCache is ``front=1, back=0, warmup=0``. One rule over all lists, or one per list."""

    def __init__(self, net, threshold, front=1, back=0, warmup=0, per_list=False):
        super().__init__(net)
        self.threshold, self.front, self.back, self.warmup = threshold, front, back, warmup
        self.per_list, self.kept = per_list, {}

    def through(self, streams, context, lists, glue):
        if not self.per_list:
            lists, glue = [list(chain(*lists))], [list(chain(*glue))]
        shown = ""
        for key, (blocks, added) in enumerate(zip(lists, glue, strict=True)):
            streams, symbol = self.one_list(key, blocks, added, streams)
            shown += symbol
        self.strip += shown[0]
        self.strips = [*getattr(self, "strips", []), shown]
        return streams

    def one_list(self, key, blocks, glue, streams):
        n, stop = self.front, len(blocks) - self.back
        streams, probe = self.run(blocks[:n], glue[:n], streams)
        kept, symbol = self.kept.setdefault(key, {}), "F"
        score = relative(probe[0], kept["probe"]) if "probe" in kept else None
        self.scores.append(score)
        if self.step >= self.warmup and score is not None and (self.threshold >= 1 or score < self.threshold):
            streams, symbol = self.skip(kept["residual"], glue[n:stop], streams), "c"
        else:
            streams, kept["residual"] = self.run(blocks[n:stop], glue[n:stop], streams)
            kept["probe"] = probe[0]
        return self.run(blocks[stop:], glue[stop:], streams)[0], symbol


class SlowTeaCache(SlowCache):
    """The card's TeaCache, first and last step forced."""

    def __init__(self, net, threshold, num_steps, coefficients=(1.0, 0.0), forced_last=True):
        super().__init__(net)
        self.threshold, self.num_steps, self.coefficients = threshold, num_steps, coefficients
        self.forced_last, self.before, self.total, self.signals = forced_last, None, 0.0, []

    def through(self, streams, context, lists, glue):
        signal = self.net.signal(streams, context)
        self.signals.append(signal)
        is_full = self.step == 0 or (self.forced_last and self.step == self.num_steps - 1)
        if is_full:
            self.total = 0.0
        else:
            score = relative(signal, self.before)
            self.scores.append(score)
            power = len(self.coefficients) - 1
            self.total += sum(c * score ** (power - i) for i, c in enumerate(self.coefficients))
            if self.total >= self.threshold:
                is_full, self.total = True, 0.0
        self.before = signal
        blocks, added = list(chain(*lists)), list(chain(*glue))
        self.strip += "F" if is_full else "c"
        if is_full:
            streams, self.residual = self.run(blocks, added, streams)
            return streams
        return self.skip(self.residual, added, streams)


class TaylorParts(Plainly):
    """Every part's output from the released recursion; ``first_enhance`` and ``order`` as on the card."""

    def __init__(self, interval, order, first_enhance=3):
        self.interval, self.order, self.first_enhance = interval, order, first_enhance
        self.state, self.activated, self.counter, self.is_full = {}, [0], 0, True
        self.full_steps = []

    def begin(self, step):
        self.step = step
        if step < self.first_enhance or self.counter == self.interval - 1:
            self.is_full, self.counter = True, 0
            self.activated.append(step)
            self.full_steps.append(step)
        else:
            self.is_full, self.counter = False, self.counter + 1

    def value(self, name, compute):
        if self.is_full:
            fresh, old = compute(), self.state.get(name, {})
            new, gap = {0: fresh.clone()}, self.activated[-1] - self.activated[-2]
            for i in range(self.order):
                if i in old and self.step > self.first_enhance - 2:
                    new[i + 1] = (new[i] - old[i]) / gap
                else:
                    break
            self.state[name] = new
            return fresh
        k = self.step - self.activated[-1]
        return sum(term * k**i / math.factorial(i) for i, term in self.state[name].items())

    def attn(self, name, block, image, text, rope):
        computed = []

        def compute(index):
            if not computed:
                computed.extend(super(TaylorParts, self).attn(name, block, image, text, rope))
            return computed[index]

        return tuple(self.value(f"{name}.{index}", lambda index=index: compute(index)) for index in (0, 1))

    def ffn(self, name, module, x, layer, stream):
        return self.value(name, lambda: module(x))

    def fused(self, name, block, x, rope, layer):
        return self.value(name, lambda: super(TaylorParts, self).fused(name, block, x, rope, layer))
