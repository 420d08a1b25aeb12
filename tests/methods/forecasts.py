"""Walking a predictor along a run without a denoiser, and the cards' pseudo-code written out step by step."""

import math

import torch

from small_denoisers import Plainly, SlowFlux


def walk(predictor, feature, strip, rows=None):
    """What a site returns at every step of a run: ``feature(i)`` at full steps (F), the prediction at cached ones (c).

    Args:
        predictor: told of every step exactly as the engine does.
        feature: the true feature at a step, ``[B, ...]``.
        strip: what is done at every step, such as ``FFFcccF``.
        rows: size of the batch, where rows may decide for themselves.
    """
    state, used = predictor.init(rows, len(strip)), []
    for i, symbol in enumerate(strip):
        if symbol == "F":
            predictor.update(state, [feature(i)], float(i))
            used.append(feature(i))
        else:
            (value,) = predictor.predict(state, float(i))
            predictor.commit(state, [value], float(i))
            used.append(value.clone())
    return used


def wavy(i, size=6, rows=2):
    """A smooth feature that is no polynomial, in float64; every row another."""
    x = torch.arange(size * rows, dtype=torch.float64).view(rows, size)
    return torch.sin(0.11 * i * (1 + 0.2 * x) + x) + 0.05 * i * x


def assert_same(found, expected, tolerance=1e-9):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"step {i}: {text}")


def slow_ladder(feature, fulls, order, first_enhance=None):
    """TaylorSeer's recursion: the tensors D_0 .. D_order after the last of the full steps."""
    state = {}
    for n, s in enumerate(fulls):
        new = {0: feature(s)}
        for i in range(order):
            if i in state and (first_enhance is None or s > first_enhance - 2):
                new[i + 1] = (new[i] - state[i]) / (s - fulls[n - 1])
            else:
                break
        state = new
    return state


def slow_walk(feature, strip, cached):
    """``cached(fulls, used, s)`` is the card's value of a cached step; ``used`` is what earlier steps went on with."""
    fulls, used = [], []
    for s, symbol in enumerate(strip):
        if symbol == "F":
            fulls.append(s)
            used.append(feature(s))
        else:
            used.append(cached(fulls, used, s))
    return used


def slow_hicache(feature, strip, order, sigma, first_enhance):
    def h(n, x):
        return 1.0 if n == 0 else 2 * x if n == 1 else 2 * x * h(n - 1, x) - 2 * (n - 1) * h(n - 2, x)

    def cached(fulls, used, s):
        k = s - fulls[-1]
        ladder = slow_ladder(feature, fulls, order, first_enhance)
        return sum(d / math.factorial(i) * sigma**i * h(i, sigma * k) for i, d in ladder.items())

    return slow_walk(feature, strip, cached)


def slow_foca(feature, strip):
    """The recommended implementation of the card, line by line; what was reused for want of a slope tells of none."""
    used, full, s_full, slope, local, last = [], None, None, None, None, None
    for s, symbol in enumerate(strip):
        if symbol == "F":
            value = feature(s)
            had_slope, slope = slope is not None, (value - full) / (s - s_full) if full is not None else None
            local = value - last if had_slope else slope
            full, s_full = value, s
        elif slope is None:
            value = last
        else:
            local = (slope + local) / 2
            value = last + local
        last = value
        used.append(value)
    return used


def slow_anchored(feature, strip):
    """From the full step: y + k/2 (D + change between the last two values)."""

    def cached(fulls, used, s):
        if len(fulls) < 2:
            return feature(fulls[-1])
        now, before = fulls[-1], fulls[-2]
        slope = (feature(now) - feature(before)) / (now - before)
        local = slope if s == now + 1 and len(fulls) == 2 else used[s - 1] - used[s - 2]
        return feature(now) + (s - now) / 2 * (slope + local)

    return slow_walk(feature, strip, cached)


def slow_femo(feature, strip, order, beta, first_enhance):
    """Momentum of raw differences with Adam's bias correction, updated in place at every full step."""
    momentum, counts, fulls, used = {}, {}, [], []
    for s, symbol in enumerate(strip):
        if symbol == "F":
            fulls.append(s)
            for i, d in slow_ladder(feature, fulls, order, first_enhance).items():
                if i > 0:
                    momentum[i] = beta * momentum.get(i, 0) + (1 - beta) * d
                    counts[i] = counts.get(i, 0) + 1
            used.append(feature(s))
        else:
            k = s - fulls[-1]
            value = feature(fulls[-1])
            for i, v in momentum.items():
                value = value + v / (1 - beta ** counts[i]) * k**i / math.factorial(i)
            used.append(value)
    return used


def slow_regression(fulls, features, s, steps, degree, ridge):
    """Spectrum: design matrix, normal equations with a ridge, coefficients, value at ``s``."""

    def row(t):
        tau = 2 * t / steps - 1
        values = [1.0, tau]
        while len(values) < degree + 1:
            values.append(2 * tau * values[-1] - values[-2])
        return torch.tensor(values[: degree + 1], dtype=torch.float64)

    x, h = torch.stack([row(f) for f in fulls]), torch.stack([f.double().flatten() for f in features])
    coefficients = torch.linalg.inv(x.T @ x + ridge * torch.eye(degree + 1, dtype=torch.float64)) @ (x.T @ h)
    return (row(s) @ coefficients).view(features[0].shape).to(features[0].dtype)


def slow_queue(feature, strip, order, pushes_predictions):
    """AB-Cache: a queue of outputs, newest first, and binomial coefficients of alternating sign."""
    queue, used = [], []
    for s, symbol in enumerate(strip):
        if symbol == "F":
            value = feature(s)
        else:
            k = min(order, len(queue))
            value = sum((-1) ** (j + 1) * math.comb(k, j) * queue[j - 1] for j in range(1, k + 1))
        if symbol == "F" or pushes_predictions:
            queue = [value, *queue][:5]
        used.append(value)
    return used


def slow_goc(feature, strip, eta, steps):
    """``hist = [last, before_last]``, updated every step with whatever was used."""
    history, used = [], []
    for s, symbol in enumerate(strip):
        if symbol == "F":
            value = feature(s)
        elif s in steps and len(history) == 2:
            value = history[0] + eta * (history[0] - history[1])
        else:
            value = history[0]
        history = [value, *history][:2]
        used.append(value)
    return used


def slow_dmd(snapshots, k, rank=0, ridge=1e-8):
    """One row: ``[d, n]`` snapshots, oldest first, at equal distances; ``k`` in units of that distance."""
    x, y = snapshots[:, :-1], snapshots[:, 1:]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    r = rank or int((s > 1e-4 * s[0]).sum())
    u, s, v = u[:, :r], s[:r], vh[:r].T
    inverse = (1 / (s + ridge)).to(torch.complex128)
    values, w = torch.linalg.eig((u.T @ y @ v).to(torch.complex128) * inverse)
    phi = ((y @ v).to(torch.complex128) * inverse) @ w
    b = torch.linalg.lstsq(phi, snapshots[:, -1:].to(torch.complex128)).solution[:, 0]
    return (phi @ (values**k * b)).real


class Hidden(SlowFlux):
    """FLUX with the last hidden feature of cached steps made by a function of those of full ones."""

    def __init__(self, model, strip, forecast):
        super().__init__(model, Plainly())
        self.strip, self.forecast, self.seen = strip, forecast, {}

    def through(self, image, text, temb, rope):
        if self.strip[self.step] == "F":
            image, text = super().through(image, text, temb, rope)
            self.seen[self.step] = image
            return image, text
        return self.forecast(self.seen, self.step), text
