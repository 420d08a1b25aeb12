"""Token reduction, slowly: transcriptions of the methods' pseudo-code that loop over rows, windows and tokens."""

import copy
import itertools
import zlib

import torch


def drawn(key):
    """The generator of a draw; the key is of our making."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def windows_of(height, width, side):
    """Tokens of every full window, row by row of windows, each row by row."""
    for top in range(0, height // side * side, side):
        for left in range(0, width // side * side, side):
            yield [(top + i) * width + left + j for i in range(side) for j in range(side)]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def matched(x, height, width, side, key, twins=False):
    """tomesd's matching: destinations, and per row [(cosine, source, destination), ...] by falling cosine."""
    found = list(windows_of(height, width, side))
    picks = torch.randint(side * side, (len(found),), generator=drawn(key)).tolist()
    dst = sorted(window[pick] for window, pick in zip(found, picks, strict=True))
    rows = []
    for row in range(len(x)):
        pairs = []
        for i in range(height * width):
            if i in dst:
                continue
            values = [cosine(x[row, i], x[row, j]) for j in dst]
            if twins:
                other = (row + len(x) // 2) % len(x)
                values = [(v + cosine(x[other, i], x[other, j])) / 2 for v, j in zip(values, dst, strict=True)]
            best = max(range(len(dst)), key=lambda j: values[j])
            pairs.append((values[best], i, dst[best]))
        rows.append(sorted(pairs, reverse=True))
    return dst, rows


def important(x, signal, r, share, key, count):
    """Importance-based merging's released rule for one row: destinations, and as which token every token goes on."""
    length = len(x)
    ties, draws = torch.rand(2, length, generator=drawn(key)).tolist()
    heat = signal.tolist()
    pool = sorted(range(length), key=lambda i: (-heat[i], ties[i]))[
        : min(max(int((length - r) * share), count), length)
    ]
    dst = sorted(pool, key=lambda i: -draws[i])[:count]
    pairs = []
    for i in range(length):
        if i not in dst:
            value, target = max((cosine(x[i], x[j]), j) for j in dst)
            pairs.append((heat[i] < heat[pool[-1]], value, i, target))
    merged = {i: target for _, _, i, target in sorted(pairs, reverse=True)[:r]}
    return sorted(dst), [merged.get(i, i) for i in range(length)]


def formed(tokens, form):
    """What a group of tokens goes on as; its destination is the last."""
    if form == "pick":
        return tokens[-1]
    mean = sum(tokens) / len(tokens)
    return mean if form == "mean" else mean / mean.norm() * max(token.norm() for token in tokens)


def merged_attention(attend, x, pairs, r, form):
    """Of one row ``[N, D]``: ``unmerge(attend(merge(x)))``, where the first r pairs are merged."""
    groups = {i: [] for i in range(len(x)) if i not in {source for _, source, _ in pairs[:r]}}
    owner = {i: i for i in groups}
    for _, source, target in pairs[:r]:
        groups[target].append(source)
        owner[source] = target
    order = list(groups)
    short = torch.stack([formed([*(x[i] for i in members), x[at]], form) for at, members in groups.items()])
    out = attend(short[None])[0]
    return torch.stack([out[order.index(owner[i])] for i in range(len(x))])


class SlowMerging:
    """ToMe, ToFu or CA-ToMe in the self-attention of DiT's blocks.

    Args:
        denoiser: DiT; a copy is changed.
        grid: rows and columns of tokens.
        count: how many of a row's sorted pairs are merged, from all rows of them.
        forms: of every block.
        renewed: whether a step makes plans anew.
    """

    def __init__(self, denoiser, grid, count, forms, renewed=lambda step: True, twins=False):
        self.denoiser, self.grid, self.count, self.renewed = copy.deepcopy(denoiser), grid, count, renewed
        self.step, self.plans = -1, {}
        for layer, block in enumerate(self.denoiser.transformer_blocks):
            self.change(layer, block, forms[layer], twins)

    def change(self, layer, block, form, twins):
        run, attend = block.forward, block.attn1.forward
        path = f"transformer_blocks.{layer}"

        def forward(hidden_states, *args, **kwargs):
            if self.renewed(self.step):
                key = f"0/{self.step}/{path}"
                self.plans[layer] = matched(hidden_states, *self.grid, 2, key, twins)[1]
            return run(hidden_states, *args, **kwargs)

        def merged(x, *args, **kwargs):
            rows = self.plans[layer]
            r = self.count(rows)
            return torch.stack([merged_attention(attend, x[b], rows[b], r, form) for b in range(len(x))])

        block.forward, block.attn1.forward = forward, merged

    def __call__(self, **kwargs):
        self.step += 1
        return self.denoiser(**kwargs)


def tiles_slowly(height, width, side):
    """Tokens of every tile: each axis is cut into ``round(length / side)`` pieces that differ by one at most."""

    def pieces(length):
        count = max(round(length / side), 1)
        bounds = [0]
        for i in range(count):
            bounds.append(bounds[-1] + length // count + (i < length % count))
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    return [[y * width + x for y in rows for x in columns] for rows in pieces(height) for columns in pieces(width)]


def coverage(x, members, chosen):
    """``sum_i max_{j in D} (1 + cos(x_i, x_j))``; 0 for an empty D."""
    return sum(max((1 + cosine(x[i], x[j]) for j in chosen), default=0.0) for i in members)


def located(x, members, count):
    """Greedy facility location, which evaluates the objective anew for every candidate."""
    chosen = []
    for _ in range(count):
        values = {j: coverage(x, members, [*chosen, j]) for j in members if j not in chosen}
        chosen.append(next(j for j, value in values.items() if value >= max(values.values()) - 1e-4))
    return chosen


class SlowToMA:
    """ToMA of one row ``[N, D]``, token by token: ``W^T f(A x)``.

    Args:
        x: the tokens destinations and weights are made from.
    """

    def __init__(self, x, height, width, ratio, side, temperature):
        self.tiles = tiles_slowly(height, width, side)
        smallest = min(map(len, self.tiles))
        count = max(smallest - int(ratio * smallest + 1e-9), 1)
        self.chosen = [located(x, members, count) for members in self.tiles]
        self.weights = []
        for members, chosen in zip(self.tiles, self.chosen, strict=True):
            columns = [torch.tensor([cosine(x[j], x[i]) / temperature for j in chosen]).softmax(0) for i in members]
            self.weights.append(torch.stack(columns, 1))

    def __call__(self, f, x):
        merged = []
        for members, w in zip(self.tiles, self.weights, strict=True):
            merged += [sum(w[j, i] * x[m] for i, m in enumerate(members)) / w[j].sum() for j in range(len(w))]
        out = f(torch.stack(merged)[None])[0]
        restored, start = torch.empty(len(x), out.shape[-1]), 0
        for members, w in zip(self.tiles, self.weights, strict=True):
            for i, m in enumerate(members):
                restored[m] = sum(w[j, i] * out[start + j] for j in range(len(w)))
            start += len(w)
        return restored
