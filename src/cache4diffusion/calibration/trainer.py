"""The one harness of every training: the frozen denoiser, with what trains in the place of its sites.

The pipeline samples as ever, and a `Pupil` for each of its denoisers learns from the calls. Its wrappers are taken away
whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cache4diffusion.calibration.observer import uncached
from cache4diffusion.calibration.outputs import numbers_of
from cache4diffusion.calibration.pupil import Pupil, mean
from cache4diffusion.calibration.store import Entry
from cache4diffusion.calibration.training import Answer, Training
from cache4diffusion.engine.compiling import is_compiled, is_compiled_whole
from cache4diffusion.errors import CalibrationError, CompositionError
from cache4diffusion.run import RunTracker


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
        CompositionError: its blocks are compiled, and sites inside could not be reached; or as of `uncached`.
    """

    def __init__(
        self, target: Any, training: Training, seed: int, measured: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        self.target, self.training, self.seed, self.measured = target, training, seed, measured
        self.denoisers = uncached(target, "training")
        for name, denoiser in self.denoisers.items():
            if is_compiled_whole(denoiser) or any(is_compiled(module) for module in denoiser.modules()):
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
        return mean(losses)

    def _weigh(self, pupil: Pupil, number: int, sample: Callable[[], Any]) -> None:
        def rehearse(answer: Answer) -> Tensor:
            pupil.rehearsed = answer
            try:
                return numbers_of(sample())
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
