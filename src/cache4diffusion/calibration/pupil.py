"""One denoiser in training.

At each of its calls the teacher runs, which is the denoiser as it is, and then the student, which is the same denoiser
with other outputs at its sites. Weights neither change nor collect gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cache4diffusion.calibration.calibrator import Sums
from cache4diffusion.calibration.fingerprint import fingerprint_of
from cache4diffusion.calibration.observer import Forgetting, Listening
from cache4diffusion.calibration.stage import Forward, Stage
from cache4diffusion.calibration.store import Entry
from cache4diffusion.calibration.training import Answer, Leaves, Numbers, Reached, Training
from cache4diffusion.composition import Composition
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import take_apart
from cache4diffusion.errors import CalibrationError
from cache4diffusion.run import RunTracker
from cache4diffusion.trace import Trace
from cache4diffusion.wrap import CallWrapper


class Pupil:
    """One denoiser in training: what it has learned, and how well.

    Args:
        name, denoiser: of the pipeline.
        training: what is learned.
        tracker: tells run, step and branch.
        seed: of random numbers.
        measured: what was measured before.
    """

    def __init__(
        self, name: str, denoiser: nn.Module, training: Training, tracker: RunTracker, seed: int, measured: Any
    ) -> None:
        self.name, self.denoiser, self.training, self.tracker = name, denoiser, training, tracker
        self.generator, self.measured = torch.Generator().manual_seed(seed), measured
        composition = Composition(site=training.site, gate=Listening(None), predictor=Forgetting())
        self.host = Host(denoiser, composition, Trace(), name)
        self.stage: Stage | None = None
        self.numbers: Numbers | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.levels: tuple[float, ...] | None = None
        self.num_steps: int | None = None
        self.weights: Mapping[int, float] = {}
        self.is_looking = True  # whether a run only shows what there is
        self.rehearsed: Answer | None = None  # set while a run only shows what these answers lead to
        self.is_judged = False  # whether the run's errors make the verdict
        self.taught: set[int] = set()
        self.losses: list[list[float]] = []  # of the calls of every run
        self.errors: list[list[float]] = []
        self.verdict: dict[str, list[float]] = {"plain": [], "sampled": [], "cached": []}
        self._memory: dict[tuple[int, str], dict[str, Leaves]] = {}  # cached outputs, by run and branch
        self._frozen = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._root = CallWrapper(denoiser, self._on_call, owner=self)

    @property
    def label(self) -> str:
        """What `owner_of` finds on the denoiser."""
        return f"a training of {type(self.training).__name__}"

    def remove(self) -> None:
        """Give the denoiser back as it was."""
        if self.stage is not None:
            self.stage.remove()
        self._root.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._memory.clear()

    def forget(self, run: int) -> None:
        """A run is over."""
        self._memory = {key: cache for key, cache in self._memory.items() if key[0] != run}

    # -- calls -----------------------------------------------------------------------------------------------------

    def _on_call(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._call(inner, args, kwargs)
        except BaseException:
            self.tracker.fail()
            raise

    def _call(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        timestep, latent, conditioning = self.host.inputs.split(args, kwargs)
        call = self.tracker.enter(id(self), timestep=timestep, conditioning=conditioning, latent=latent)
        step, num_steps = call.step, self._length(call.run)
        if self.stage is None:
            self.host.examine(args, kwargs)
            self.stage = Stage(self.host, self.training.site)  # type: ignore[arg-type] - parts or blocks
        cache = self._memory.setdefault((call.run.id, call.branch), {})

        def forward(answer: Answer | None) -> tuple[Any, Forward]:
            assert self.stage is not None
            numbers = self.numbers
            bound = functools.partial(answer, numbers) if answer is not None and numbers is not None else None
            with self.stage.playing(Forward(bound, step, num_steps, cache)) as played:
                output = inner(*args, **{key: _spare(value) for key, value in kwargs.items()})
            return output, played

        is_full = (
            not cache or self.numbers is None or self.is_looking or not self.training.is_taught(self.numbers, step)
        )
        if self.rehearsed is not None and not is_full:
            output, played = forward(self.rehearsed)
            cache.update(played.kept)
            return output
        target, full = forward(None)
        if self.numbers is None:
            self._start(num_steps)
        if is_full:
            cache.update(full.kept)
            return target
        if self.is_judged:
            self._judge(target, forward)
        with torch.enable_grad():
            output, played = forward(self.training.answer)
            self._learn(step, _error(target, output), played.charges)
        cache.update(played.kept)
        return _detached(output) if self.training.is_students else target

    def _length(self, run: Any) -> int:
        """Steps of the run; all runs must be alike."""
        if run.num_steps is None:
            raise CalibrationError("A training must know the number of steps, and this pipeline's runs do not tell it.")
        if self.num_steps is None:
            self.num_steps, self.levels = run.num_steps, run.timesteps
        elif (run.num_steps, run.timesteps) != (self.num_steps, self.levels):
            raise CalibrationError(
                f"Runs of one training must have the same steps and noise levels: the first had {self.num_steps}, this "
                f"one has {run.num_steps}, or other levels."
            )
        return run.num_steps

    # -- learning --------------------------------------------------------------------------------------------------

    def _start(self, num_steps: int) -> None:
        assert self.stage is not None
        spots = list(self.stage.spots.values())
        numbers = self.training.start(spots, num_steps, self.generator, self.measured)
        if not any(self.training.is_taught(numbers, step) for step in range(num_steps)):
            raise CalibrationError(f"There is nothing to train in {self.name}. {self.training.nothing_words}")
        device = next(self.denoiser.parameters()).device
        self.numbers = {
            step: {
                site: [value.to(device, torch.float32).requires_grad_() for value in values]
                for site, values in sites.items()
            }
            for step, sites in numbers.items()
        }
        everything = [value for sites in self.numbers.values() for values in sites.values() for value in values]
        self.optimizer = torch.optim.AdamW(everything, lr=self.training.rate, weight_decay=0.0)

    def _learn(self, step: int, error: Tensor, charges: Sequence[Tensor]) -> None:
        assert self.optimizer is not None and self.numbers is not None
        loss = self.weights.get(step, 1.0) * error + sum(charges, torch.zeros_like(error))
        if not math.isfinite(float(loss.detach())):
            raise CalibrationError(
                f"The loss of step {step} is not finite. Use a smaller rate than {self.training.rate}, or a denoiser "
                "in bfloat16 or float32."
            )
        self.optimizer.zero_grad(set_to_none=True)  # other steps' numbers have no gradient, and stay
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for values in self.numbers[step].values():
                for value in values:
                    value.clamp_(-self.training.limit, self.training.limit)
        self.taught.add(step)
        self.losses[-1].append(float(loss.detach()))
        self.errors[-1].append(float(error.detach()))

    def _judge(self, target: Any, forward: Callable[[Answer], tuple[Any, Forward]]) -> None:
        """What sampling would do here, and what caching everything would."""
        shares = []

        def as_sampled(numbers: Numbers, reached: Reached) -> Leaves:
            leaves, share = self.training.sampled(numbers, reached)
            shares.append(share)
            return leaves

        self.verdict["plain"].append(float(_error(target, forward(self.training.plain)[0])))
        self.verdict["sampled"].append(float(_error(target, forward(as_sampled)[0])))
        self.verdict["cached"].append(sum(shares) / max(len(shares), 1))

    @property
    def sums(self) -> Sums:
        """Losses, errors and what the verdict is made of."""
        by_run = {"losses": self.losses, "errors": self.errors}
        found = {name: [[mean(values)] for values in runs if values] for name, runs in by_run.items()}
        found |= {name: [[mean(values)]] for name, values in self.verdict.items()}
        return {name: torch.tensor(values, dtype=torch.float64).flatten() for name, values in found.items()}

    def entry(self) -> Entry | None:
        """What it has learned; None if no taught step is its own."""
        if self.numbers is None or self.num_steps is None or not self.taught:
            return None
        sums = self.sums
        kept = {step: sites for step, sites in self.numbers.items() if step in self.taught}
        tensors = {**self.measured, **self.training.tensors(kept, self.num_steps)}
        tensors = {key: value.detach().to("cpu", torch.float64) for key, value in tensors.items()}
        return Entry(fingerprint_of(self.denoiser), self.levels, tensors, self.training.judge(sums), sums)


def mean(values: Sequence[float]) -> float:
    """0 if there are none."""
    return sum(values) / len(values) if values else 0.0


def _error(target: Any, output: Any) -> Tensor:
    """Mean squared difference of two outputs, in float32, summed over their tensors."""
    pairs = zip(take_apart(target)[0], take_apart(output)[0], strict=True)
    return torch.stack([mse_loss(b.float(), a.float()) for a, b in pairs]).sum()


def _detached(output: Any) -> Any:
    tensors, layout = take_apart(output)
    return layout.fill([tensor.detach() for tensor in tensors])


def _spare(value: Any) -> Any:
    """Hosts use lists and dictionaries up, and every call is made several times."""
    return type(value)(value) if type(value) in (list, dict) else value
