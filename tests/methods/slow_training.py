"""Trainings written out: loops over runs and steps with one optimiser per step, on FLUX with its parts in the open.

`train` is the package's, on the same noise, so that the numbers of both can be compared.
"""

import torch

from cache4diffusion.calibration.trainer import Trainer
from small_denoisers import FLUX_PARTS, Alike, SlowFlux, flux_inputs, path_of, sample

NAMES = list(FLUX_PARTS)


def train(model, training, steps, batch=1, seed=0, measured=None):
    """The package's training of FLUX in a bare loop; run i begins with noise i. Returns its entry."""

    def run(number):
        inputs = flux_inputs(batch, seed=number)
        with trainer.run(num_steps=steps):
            outputs = sample(model, inputs, steps)
        return inputs["hidden_states"] - sum(outputs) / steps

    with Trainer(model, training, seed, {"denoiser": measured or {}}) as trainer:
        trainer.look(lambda: run(0))
        for number in range(training.runs):
            trainer.teach(number, lambda number=number: run(number))
        return trainer.entries()["denoiser"]


class Taught(Alike):
    """Parts whose outputs are kept, or, while there is a student, are what it makes of them.

    ``student(name, entering, compute, kept)``: ``entering`` are the modulated inputs, ``kept`` the outputs by name; all
    are lists of tensors, as attention has two.
    """

    def __init__(self):
        self.kept, self.student = {}, None

    def give(self, name, kind, entering, compute):
        def listed():
            out = compute()
            return list(out) if isinstance(out, tuple) else [out]

        if self.student is None:
            out = listed()
            self.kept[name] = [leaf.detach() for leaf in out]
        else:
            out = self.student(name, entering, listed, self.kept)
        return tuple(out) if len(out) > 1 else out[0]


class Slow:
    """The denoiser with taught parts."""

    def __init__(self, model):
        self.parts = Taught()
        self.flux = SlowFlux(model, self.parts)

    def full(self, x, step, steps, inputs):
        """Uncached; the parts' outputs are kept."""
        self.parts.student = None
        return self._call(x, step, steps, inputs)

    def target(self, x, step, steps, inputs):
        """Uncached; nothing is kept."""
        kept, self.parts.kept = self.parts.kept, {}
        out = self.full(x, step, steps, inputs)
        self.parts.kept = kept
        return out

    def taught(self, student, x, step, steps, inputs):
        """With what the student makes of the parts."""
        self.parts.student = student
        with torch.enable_grad():
            return self._call(x, step, steps, inputs)

    def _call(self, x, step, steps, inputs):
        time = torch.full((x.shape[0],), 1 - step / steps)
        return self.flux(**{**inputs, "hidden_states": x, "timestep": time})[0]


def update(optimizer, loss, numbers, limit=float("inf")):
    """One step, and what is clamped after it."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for number in numbers:
            number.clamp_(-limit, limit)


def adam(numbers, rate):
    return torch.optim.AdamW(numbers, lr=rate, weight_decay=0.0)


def logits(steps, seed=0):
    """N(0, 1), drawn step by step, in the order in which parts run."""
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn((), generator=generator).requires_grad_() for name in NAMES} for _ in range(steps)]


def by_step(vectors, steps):
    """Of each part a row per step; 0 at steps that were not taught."""
    parts = next(iter(vectors.values()))
    tables = {name: torch.zeros(steps, len(vector)) for name, vector in parts.items()}
    for s, name in ((s, name) for s in vectors for name in parts):
        tables[name][s] = vectors[s][name].detach()
    return tables


def blend(p, fresh, cached):
    return [p * f + (1 - p) * c for f, c in zip(fresh, cached, strict=True)]


def assert_same_numbers(entry, expected, tolerance=1e-4):
    """The fit's rows are these, by the slow names of parts; at least one of them has moved."""
    assert set(entry.fit) == {path_of(name) for name in expected}
    for name, row in expected.items():
        torch.testing.assert_close(entry.fit[path_of(name)].float(), row, rtol=tolerance, atol=tolerance)
