"""The one harness of every training: the frozen denoiser, with what trains in the place of its sites.

The pipeline samples as ever. At each call of a denoiser the teacher runs, which is the denoiser as it is, and then the
student, which is the same denoiser with other outputs at its sites. Wrappers sit on instances, as the engine's do, and
are taken away whatever happens; weights neither change nor collect gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cache4diffusion.accelerate import denoisers_of
from cache4diffusion.calibration.calibrator import Sums
from cache4diffusion.calibration.fingerprint import fingerprint_of
from cache4diffusion.calibration.observer import Forgetting, Listening
from cache4diffusion.calibration.store import Entry
from cache4diffusion.calibration.training import Answer, Leaves, Numbers, Reached, Spot, Training
from cache4diffusion.engine.blocks import BlockView
from cache4diffusion.engine.compiling import is_compiled
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import Layout, take_apart
from cache4diffusion.engine.parts import blocks_of, entering_of, entrance_of, parts_of
from cache4diffusion.engine.span import BlocksDriver
from cache4diffusion.errors import AlreadyAcceleratedError, AnatomyError, CalibrationError, CompositionError
from cache4diffusion.method import Composition
from cache4diffusion.run import RunTracker
from cache4diffusion.sites import Blocks, Parts
from cache4diffusion.trace import Trace
from cache4diffusion.wrap import CallWrapper, ForwardWrapper, owner_of

Inner = Callable[..., Any]


@dataclass
class Forward:
    """One forward of the denoiser, as the sites see it.

    Args:
        answer: what they hand out; None: what they compute, of which copies are kept in ``cache``.
        step: index of the step.
        num_steps: of the run.
        cache: what was kept at every site, by name.
    """

    answer: Callable[[Reached], Leaves] | None
    step: int
    num_steps: int
    cache: dict[str, Leaves]
    charges: list[Tensor] = field(default_factory=list)
    kept: dict[str, Leaves] = field(default_factory=dict)
    entering: dict[str, Leaves] = field(default_factory=dict)  # of parts whose input is seen before they are called


class Stage:
    """The sites of one denoiser, each handing out what the forward in progress says."""

    def __init__(self, host: Host, site: Parts | Blocks) -> None:
        self.host = host
        self.forward: Forward | None = None
        self.spots: dict[str, Spot] = {}  # known after the first full forward
        self._layouts: dict[str, Layout] = {}
        self._wrappers: list[ForwardWrapper | CallWrapper] = []
        try:
            self._wrap_blocks(site) if isinstance(site, Blocks) else self._wrap_parts(site)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Unwrap everything."""
        for wrapper in reversed(self._wrappers):
            wrapper.remove()
        self._wrappers = []

    @contextmanager
    def playing(self, forward: Forward) -> Iterator[Forward]:
        """The denoiser's next call is this forward."""
        self.forward = forward
        try:
            yield forward
        finally:
            self.forward = None

    def _wrap_parts(self, site: Parts) -> None:
        found = [part for _, block in blocks_of(self.host) for part in parts_of(block, site)]
        if not found:
            assert self.host.anatomy is not None
            raise AnatomyError(
                f"{self.host.anatomy.denoiser} has no parts of the kinds {', '.join(site.kinds)} that can be told "
                "apart, so nothing can be trained there."
            )
        modules = dict(self.host.denoiser.named_modules())
        for part in found:
            entrance = entrance_of(part)
            if entrance is not None:
                self._wrappers.append(ForwardWrapper(modules[entrance.path], self._noting(part, modules)))
            self._wrappers.append(ForwardWrapper(modules[part.path], self._answering(part, modules[part.path])))

    def _noting(self, part: Any, modules: Mapping[str, nn.Module]) -> Callable[[Inner], Inner]:
        """In front of a fused part: keep its modulated input."""

        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.forward is not None:
                    self.forward.entering[part.path] = entering_of(part, modules[part.path], args, kwargs)
                return found(*args, **kwargs)

            return forward

        return make

    def _answering(self, part: Any, module: nn.Module) -> Callable[[Inner], Inner]:
        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                playing = self.forward
                if playing is None:
                    return found(*args, **kwargs)
                entering = playing.entering.get(part.path) or entering_of(part, module, args, kwargs)

                def compute() -> Leaves:
                    leaves, self._layouts[part.path] = take_apart(found(*args, **kwargs))
                    return leaves

                leaves = self._meet(part.path, part.kind, entering, compute, part.is_tokenwise)
                leaves = [leaf.clone() for leaf in leaves] if part.is_mutated else leaves
                return self._layouts[part.path].fill(leaves)

            return forward

        return make

    def _wrap_blocks(self, site: Blocks) -> None:
        driver = BlocksDriver(self.host, site)  # type: ignore[arg-type] - as in the table of drivers
        driver.install(self.host.anatomy)  # only looks: every block's output must be one that can be rebuilt
        for stretch in driver.stretches:
            module, kept = self.host.modules[stretch.first], driver.kept(stretch)
            handler = self._adding(stretch.name, stretch.first, self.host.blocks[stretch.first], kept)
            self._wrappers.append(CallWrapper(module, handler))

    def _adding(self, name: str, position: int, block: BlockView, kept: Sequence[int]) -> Any:
        """Around a block, whose site is what it adds to the streams that are read afterwards."""

        def handler(inner: Inner, args: Any, kwargs: Any) -> Any:
            if self.forward is None:
                return inner(*args, **kwargs)
            streams = [stream.clone() for stream in self.host.stream_inputs(position, args, kwargs)]
            left = list(streams)

            def compute() -> Leaves:
                left[:] = self.host.stream_outputs(position, args, kwargs, inner(*args, **kwargs))
                return [left[i] - streams[i] for i in kept]

            leaves = self._meet(name, "block", [], compute)
            for i, leaf in zip(kept, leaves, strict=True):
                left[i] = streams[i] + leaf
            return block.rebuild(left)

        return handler

    def _meet(
        self, name: str, kind: str, entering: Leaves, compute: Callable[[], Leaves], is_tokenwise: bool = False
    ) -> Leaves:
        """A site is reached."""
        playing = self.forward
        assert playing is not None
        if playing.answer is None or name not in playing.cache:
            leaves = compute()
            if name not in self.spots:
                before, after = (tuple(leaf.shape[-1] for leaf in several) for several in (entering, leaves))
                self.spots[name] = Spot(name, kind, before, after, is_tokenwise)
            playing.kept[name] = [leaf.detach().clone() for leaf in leaves]
            return leaves
        reached = Reached(
            self.spots[name], playing.step, playing.num_steps, entering, playing.cache[name], compute, playing.charges
        )
        leaves = playing.answer(reached)
        if reached.kept is not None:
            playing.kept[name] = reached.kept
        return leaves


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
        found = {name: [[_mean(values)] for values in runs if values] for name, runs in by_run.items()}
        found |= {name: [[_mean(values)]] for name, values in self.verdict.items()}
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


class Trainer:
    """Attached to a pipeline (or a denoiser) while it samples; a context manager.

        with Trainer(pipe, training, seed=0, measured={}) as trainer:
            trainer.look(sample)
            for number in range(training.runs):
                trainer.teach(number, sample)
        entries = trainer.entries()

    Args:
        target: the pipeline, or a denoiser called in a loop of your own.
        training: what is learned.
        seed: of random numbers.
        measured: by denoiser, what `Training.first` made of it.

    Raises:
        AlreadyAcceleratedError: it carries a handle, so it would not be the uncached denoiser that teaches.
        CompositionError: its blocks are compiled, and sites inside could not be reached.
    """

    def __init__(
        self, target: Any, training: Training, seed: int, measured: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        self.target, self.training, self.seed, self.measured = target, training, seed, measured
        self.denoisers: dict[str, nn.Module] = denoisers_of(target)
        for name, denoiser in self.denoisers.items():
            owner = owner_of(denoiser)
            if owner is not None:
                raise AlreadyAcceleratedError(
                    f"{name} is accelerated by {owner.label}, and a training must see it uncached. Call remove() on "
                    "that handle first."
                )
            if hasattr(denoiser, "_orig_mod") or any(is_compiled(module) for module in denoiser.modules()):
                raise CompositionError(
                    f"{name} is compiled, which hides the sites that are trained. Calibrate it before it is compiled; "
                    "what was learned serves it afterwards."
                )
        self.pupils: list[Pupil] = []

    def __enter__(self) -> Trainer:
        def over(run: Any, aborted: bool) -> None:
            for pupil in self.pupils:
                pupil.forget(run.id)

        self.tracker = RunTracker(lambda run: None, over)
        try:
            for name, denoiser in self.denoisers.items():
                known = self.measured.get(name, {})
                self.pupils.append(Pupil(name, denoiser, self.training, self.tracker, self.seed, known))
                self.tracker.watch_denoiser(denoiser)
            if not isinstance(self.target, nn.Module):
                self.tracker.watch_pipeline(self.target)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.tracker.unwatch(aborted=bool(error) and error[0] is not None)
        finally:
            for pupil in self.pupils:
                pupil.remove()

    @contextmanager
    def run(self, timesteps: Sequence[float] | None = None, num_steps: int | None = None) -> Iterator[None]:
        """Say where one sampling run begins and ends, in a loop of your own; see `Handle.run`."""
        with self.tracker.run(timesteps, num_steps):
            yield

    def look(self, sample: Callable[[], Any]) -> None:
        """One uncached run, in which the sites are found."""
        sample()
        for pupil in self.pupils:
            pupil.is_looking = False

    def teach(self, number: int, sample: Callable[[], Any]) -> float:
        """One sampling run, which ``sample`` makes and returns the latents of; returns its mean loss."""
        for pupil in self.pupils:
            self._weigh(pupil, number, sample)
            pupil.is_judged = number >= self.training.runs - max(self.training.runs // 10, 1)
            pupil.losses.append([])
            pupil.errors.append([])
        sample()
        losses = [loss for pupil in self.pupils for loss in pupil.losses[-1]]
        return _mean(losses)

    def _weigh(self, pupil: Pupil, number: int, sample: Callable[[], Any]) -> None:
        def rehearse(answer: Answer) -> Tensor:
            pupil.rehearsed = answer
            try:
                return take_apart(sample())[0][0].detach().float()
            finally:
                pupil.rehearsed = None

        if pupil.numbers is not None:  # else no step of the run is its
            pupil.weights = self.training.weigh(pupil.numbers, number, rehearse) or pupil.weights

    def entries(self) -> dict[str, Entry]:
        """What was learned, by denoiser.

        Raises:
            CalibrationError: nothing was.
        """
        found = {pupil.name: entry for pupil in self.pupils if (entry := pupil.entry()) is not None}
        if not found:
            raise CalibrationError("Nothing was learned: the denoiser was not called.")
        return found


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
