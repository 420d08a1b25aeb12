"""Token reduction, slowly: transcriptions of the methods' pseudo-code that loop over rows, windows and tokens."""

import copy
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
