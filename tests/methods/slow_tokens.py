"""Token-wise caching, slowly: transcriptions of the methods' pseudo-code that loop over rows and tokens."""

import math
import zlib

import torch

from small_denoisers import TEXT, Plainly, SlowFlux, path_of


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
        """Column mean of the softmax map, heads and queries averaged; or ``sum_h (1 - ||v_h||)``."""
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


def drawn(key):
    """The generator of a draw; the key is of our making."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def slow_kmeans(x, centroids, iterations):
    """K-means of one row ``[N, D]`` on L1 distances; a cluster without tokens keeps its centroid."""
    labels = []
    for _ in range(iterations):
        labels = [min(range(len(centroids)), key=lambda c: float((token - centroids[c]).abs().sum())) for token in x]
        for c in range(len(centroids)):
            members = [token for token, label in zip(x, labels, strict=True) if label == c]
            if members:
                centroids[c] = sum(members) / len(members)
    return labels


class SlowClusCa(Plainly):
    """The card's ClusCa on FLUX: Taylor factors, one computed token per cluster in the MLPs of two-stream blocks."""

    def __init__(self, model, interval, order, warmup, clusters, gamma, variant):
        self.model, self.interval, self.order, self.warmup = model, interval, order, warmup
        self.clusters, self.gamma, self.variant, self.counter = clusters, gamma, variant, 0
        self.factors, self.since, self.labels, self.centroids = {}, {}, {}, {}

    def begin(self, step):
        self.step = step
        self.is_full = step < self.warmup or self.counter == self.interval - 1
        self.counter = 0 if self.is_full else self.counter + 1

    def keep(self, name, feature):
        """``f_{i+1} = (f_i - old f_i) / (s - s_before)``, as far as there are old factors."""
        before, made = self.factors.get(name, []), [feature.clone()]
        for i in range(self.order):
            if i >= len(before) or self.step < self.warmup - 1:
                break
            made.append((made[i] - before[i]) / (self.step - self.since[name]))
        self.factors[name], self.since[name] = made, self.step
        return feature

    def taylor(self, name):
        d = self.step - self.since[name]
        return sum(f * d**i / math.factorial(i) for i, f in enumerate(self.factors[name]))

    def attn(self, name, block, image, text, rope):
        if self.is_full:
            a, b = super().attn(name, block, image, text, rope)
            return self.keep(name, a), self.keep(f"{name}.text", b)
        return self.taylor(name), self.taylor(f"{name}.text")

    def fused(self, name, block, x, rope, layer):
        return self.keep(name, super().fused(name, block, x, rope, layer)) if self.is_full else self.taylor(name)

    def survey(self, kind, x):
        """After the last two-stream block of a full step."""
        rows = []
        for row in range(x.shape[0]):
            if (kind, row) not in self.centroids:
                first = torch.randperm(x.shape[1], generator=drawn(f"0/{kind}"))[: self.clusters]
                self.centroids[kind, row] = [x[row, i] for i in first]
            rows.append(slow_kmeans(x[row], self.centroids[kind, row], 10))
        self.labels[kind] = rows

    def ffn(self, name, module, x, layer, stream):
        if self.is_full:
            return self.keep(name, module(x))
        noise = torch.rand(1, x.shape[1], generator=drawn(f"0/{self.step}/{path_of(name)}/0"))[0]
        predicted, f0 = self.taylor(name).clone(), self.factors[name][0]
        for row, labels in enumerate(self.labels[stream]):
            fresh = {}
            for c in set(labels):
                members = [i for i, label in enumerate(labels) if label == c]
                chosen = max(members, key=lambda i: float(noise[i]))
                fresh[chosen] = module(x[row : row + 1, chosen : chosen + 1])[0, 0]
            of_cluster = {labels[i]: y for i, y in fresh.items()}
            target = predicted if self.variant == "ours" else f0
            if self.variant == "official":
                for i, y in fresh.items():
                    f0[row, i] = y
            if self.gamma > 0 and stream == "image":
                for i, label in enumerate(labels):
                    target[row, i] = self.gamma * of_cluster[label] + (1 - self.gamma) * target[row, i]
            if self.variant == "ours":
                for i, y in fresh.items():
                    predicted[row, i] = y
        return predicted if self.variant == "ours" else self.taylor(name)


class SurveyedFlux(SlowFlux):
    """Clusters are found behind the last two-stream block."""

    def double(self, layer, image, text, temb, rope):
        image, text = super().double(layer, image, text, temb, rope)
        if layer == len(self.model.transformer_blocks) - 1 and self.parts.is_full:
            self.parts.survey("image", image)
            self.parts.survey("text", text)
        return image, text
