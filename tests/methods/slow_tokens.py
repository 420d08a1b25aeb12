"""Token-wise caching, slowly: transcriptions of the methods' pseudo-code that loop over rows and tokens."""

import torch

from small_denoisers import TEXT, Plainly, SlowFlux


class ToCaParts(Plainly):
    """The card's ToCa on FLUX, text and image tokens selected apart; loops over rows and tokens."""

    def __init__(self, model, interval, ratio, schedule, warmup=3, age_weight=0.25, score="attention"):
        self.model, self.interval, self.ratio, self.schedule = model, interval, ratio, schedule
        self.score = score
        self.warmup, self.age_weight, self.counter = warmup, age_weight, 0
        self.cache, self.influence, self.age, self.unprojected, self.changed = {}, {}, {}, {}, []

    def begin(self, step):
        self.step = step
        self.is_full = step < self.warmup or self.counter == self.interval - 1
        self.counter = 0 if self.is_full else self.counter + 1

    def received(self, query, key, value):
        """Column mean of the softmax map, heads and queries averaged; or ``sum_h (1 - ||v_h||)``. Of ``[B, N, H, d]``.
        """
        if self.score == "value_norm":
            return sum(1 - value[:, :, head].square().sum(-1).sqrt() for head in range(value.shape[2]))
        logits = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
        return logits.softmax(-1).mean((1, 2))

    def attn(self, name, block, image, text, rope):
        if self.is_full:
            with Maps() as maps:
                self.cache[name] = super().attn(name, block, image, text, rope)
            influence, layer = self.received(*maps.seen[0]), name.split(".")[1]
            self.influence[f"double.{layer}.text_ffn"] = influence[:, :TEXT]
            self.influence[f"double.{layer}.ffn"] = influence[:, TEXT:]
        return self.cache[name]

    def share(self, layer, kind):
        if self.schedule == "constant":
            return self.ratio
        return min(max(self.ratio * (1.5 - layer / 27) * (1.6 if kind == "fused" else 0.4), 0), 1)

    def chosen(self, name, spans, share, row):
        """Indices of one row, per span, by sorting its scores."""
        index = []
        for start, stop in spans:
            base = self.influence[name][row, start:stop]
            score = base / base.norm() + self.age_weight * self.age[name][row, start:stop] / self.interval
            count = int(share * (stop - start) + 1e-9)
            index += [start + int(i) for i in score.sort(descending=True).indices[:count]]
        return index

    def ffn(self, name, module, x, layer, stream):
        if self.is_full:
            self.cache[name], self.age[name] = module(x).clone(), torch.zeros(x.shape[:2])
            return self.cache[name]
        for row in range(x.shape[0]):
            index = self.chosen(name, [(0, x.shape[1])], self.share(layer, "ffn"), row)
            self.age[name][row] += 1
            for token in index:
                self.age[name][row, token] = 0
                self.cache[name][row, token] = module(x[row : row + 1, token : token + 1])[0, 0]
        return self.cache[name]

    def fused(self, name, block, x, rope, layer):
        if self.is_full:
            with Maps() as maps:
                self.unprojected[name] = self.inner_attn(block, x, rope).clone()
            self.influence[name] = self.received(*maps.seen[0])
            self.cache[name] = Plainly.fused(self, name, block, x, rope, layer).clone()
            self.age[name] = torch.zeros(x.shape[:2])
            return self.cache[name]
        for row in range(x.shape[0]):
            spans = [(0, TEXT), (TEXT, x.shape[1])]
            index = self.chosen(name, spans, self.share(layer, "fused"), row)
            self.age[name][row] += 1
            for token in index:
                self.age[name][row, token] = 0
                kept = self.unprojected[name][row, token]
                mlp = block.act_mlp(block.proj_mlp(x[row, token]))
                self.cache[name][row, token] = block.proj_out(torch.cat([kept, mlp]))
        return self.cache[name]


class Maps(torch.overrides.TorchFunctionMode):
    """Queries, keys and values ``[B, N, H, d]`` of every attention inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs = kwargs or {}
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            self.seen.append(tuple(given[name].transpose(1, 2) for name in ("query", "key", "value")))
        return func(*args, **(kwargs or {}))


class SlowDuCa(SlowFlux):
    """The card's DuCa: on an aggressive step every block is the identity, and what last left them goes on.

    Args:
        model: FLUX.
        parts: ToCa's, for conservative steps.
        aggressive: the steps.
    """

    def __init__(self, model, parts, aggressive):
        super().__init__(model, parts)
        self.aggressive, self.saved = aggressive, None

    def through(self, image, text, temb, rope):
        if self.step not in self.aggressive:
            self.saved = super().through(image, text, temb, rope)
        return self.saved
