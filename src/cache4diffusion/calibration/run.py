"""Calibrating: sample the user's prompts, and measure, train or search for what the method asks for."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache4diffusion.calibration.fingerprint import fingerprint_of
from cache4diffusion.calibration.observer import Observer, uncached
from cache4diffusion.calibration.outputs import numbers_of
from cache4diffusion.calibration.search import Found, Genome, Search, evolve, front_of
from cache4diffusion.calibration.statistic import Statistic
from cache4diffusion.calibration.store import Calibration, Entry, Provenance, statistic_of
from cache4diffusion.calibration.trainer import Trainer
from cache4diffusion.calibration.training import Training
from cache4diffusion.calibration.trial import Trial
from cache4diffusion.calls import default_steps, quiet, sampler
from cache4diffusion.errors import Cache4DiffusionError, CalibrationError, RunError, SettingError
from cache4diffusion.few_steps import unconcerned
from cache4diffusion.files import check_writable
from cache4diffusion.method import Method, method_class
from cache4diffusion.run.taps import schedulers_of

OTHER_NOISE = 1_000_003  # added to the seeds for every further round over the prompts of a training


def calibrate(
    pipe: Any,
    method: str | Method,
    prompts: Sequence[Any],
    *,
    seeds: int | Sequence[int] = 0,
    steps: int | None = None,
    call: Mapping[str, Any] | None = None,
    trial: int = 4,
    out: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Calibration:
    """Measure (train, search for) on your own pipeline what a method needs to know before sampling. Nothing is left
    attached.

        made = c4d.calibrate(pipe, "teacache", prompts, call={"guidance_scale": 3.5}, out="teacache.safetensors")
        print(made.verdict())
        c4d.accelerate(pipe, "teacache", calibration="teacache.safetensors")

    Every prompt is sampled once, uncached; a training goes over them again and again, each time from other noise, and a
    search samples all of them with every strategy that it tries, at the settings of ``method``. Then the method samples
    some with what was made, beside what needs no calibration: see ``trial``.
    Calibrate with the steps, scheduler, guidance and size you will sample with.

    Args:
        pipe: a diffusers pipeline.
        method: its slug, or a method, whose settings are those of the trial.
        prompts: one run each: texts (class labels for class-to-image pipelines), or mappings of arguments of the
            pipeline's call (``prompt_embeds`` and the like).
        seeds: one per prompt, or the first of consecutive ones. Shards of one calibration need different samples.
        steps: sampling steps; None: the pipeline's default.
        call: further arguments of the pipeline's call.
        trial: that many of the prompts (at most) are sampled afterwards from other noise: uncached, with the method and
            its new calibration, and with plain reuse of as many FLOPs. The verdict says which came closer. 0: none.
        out: write the calibration there.
        progress: a progress bar on stderr.
        **options: settings of what is measured, as ``c4d show METHOD`` lists them.

    Raises:
        UnknownNameError, SettingError: a method, an option or an argument is not accepted.
        CalibrationError: the method measures nothing, or the runs differ in their steps.
        AnatomyError: the denoiser lacks what the method needs.

    Warns:
        UserWarning: the trial failed. The calibration is complete without it.
    """
    given = method if isinstance(method, Method) else method_class(method)()
    name = given.info.name
    statistic = statistic_of(name, options)
    samples = _samples(prompts, seeds)
    steps = default_steps(pipe) if steps is None else steps
    if steps < 2:
        raise SettingError(f"calibrate(steps={steps}): use 2 or more; one step has nothing to be compared with.")
    if trial < 0:
        raise SettingError(f"calibrate(trial={trial}): use 0 (none) or more.")
    if out is not None:
        check_writable(out)
    asked = dict(call or {})
    call = {"output_type": "latent", **asked}
    sampler(pipe, call)  # refuses arguments that the pipeline does not take

    def sample(prompt: Any, seed: int) -> Any:
        return _sample(pipe, call, prompt, seed, steps)

    with quiet(pipe):
        if isinstance(statistic, Training):
            entries = _train(pipe, statistic, samples, sample, progress)
        elif isinstance(statistic, Search):
            entries = _search(pipe, given, statistic, samples, sample, steps, progress)
        else:
            assert isinstance(statistic, Statistic)  # there is no fourth kind
            entries = _observe(pipe, statistic, samples, sample, progress)
        made = Calibration(
            name,
            {entry["name"]: _plain(getattr(statistic, entry["name"])) for entry in statistic.describe()},
            provenance_of(pipe, steps, call, [digest_of(p, s) for p, s in samples]),
            entries,
        )
        if out is not None:
            made.save(out)  # before the trial, so that nothing is lost if it is stopped
    if not trial:
        return made
    some = [seed for _, seed in samples[:trial]]
    try:
        chosen = replace(given, calibration=made)  # type: ignore[call-arg]
        made = replace(made, trial=try_out(pipe, chosen, prompts[:trial], seeds=some, steps=steps, call=asked))
    except Cache4DiffusionError as error:
        warnings.warn(f"The calibration of {name} is made, but its trial failed: {error}", stacklevel=2)
    if out is not None:
        made.save(out)
    return made


def try_out(
    pipe: Any,
    method: Method,
    prompts: Sequence[Any],
    *,
    seeds: int | Sequence[int] = 0,
    steps: int | None = None,
    call: Mapping[str, Any] | None = None,
) -> Trial:
    """Sample prompts uncached, with a calibrated method, and with plain reuse of as many FLOPs, which needs none.

        trial = try_out(pipe, c4d.method("teacache", threshold=0.1, calibration="teacache.safetensors"), prompts)
        print(trial.verdict())

    Args:
        pipe, prompts, seeds, steps, call: as `calibrate`; noise is drawn from other seeds than it would draw.
        method: with its calibration.

    Raises:
        SettingError: an argument is not accepted.
        CalibrationError: FLOPs cannot be counted, or the pipeline gives no numbers to compare.
        Cache4DiffusionError: as `accelerate`.

    Cost: three runs per prompt, two of them cached, and one cached run more.
    """
    from cache4diffusion.calibration.trying import tried

    samples, steps = _samples(prompts, seeds), default_steps(pipe) if steps is None else steps
    sampler(pipe, call or {})  # refuses arguments that the pipeline does not take

    def sample(prompt: Any, seed: int) -> Any:
        return _sample(pipe, call or {}, prompt, seed, steps)

    with quiet(pipe):
        return tried(pipe, method, samples, sample, steps)


def _samples(prompts: Sequence[Any], seeds: int | Sequence[int]) -> list[tuple[Any, int]]:
    if isinstance(prompts, str) or not len(prompts):
        raise SettingError("calibrate(prompts=...): give a list of one prompt or more.")
    chosen = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if len(chosen) != len(prompts):
        raise SettingError(f"calibrate(seeds=...): {len(chosen)} seeds for {len(prompts)} prompts.")
    return list(zip(prompts, chosen, strict=True))


def _observe(
    pipe: Any, statistic: Statistic, samples: Sequence[tuple[Any, int]], sample: Callable[[Any, int], Any], shown: bool
) -> dict[str, Entry]:
    """One uncached run per sample."""
    with Observer(pipe, statistic) as observer, torch.inference_mode(), _bar(shown, len(samples)) as advance:
        for prompt, seed in samples:
            sample(prompt, seed)
            advance("calibrate")
        return observer.entries()


def _train(
    pipe: Any, training: Training, samples: Sequence[tuple[Any, int]], sample: Callable[[Any, int], Any], shown: bool
) -> dict[str, Entry]:
    """As many runs as the training asks for, over the prompts in turn, each time from other noise."""
    measured: dict[str, Any] = {}
    if training.first is not None:
        seen = _observe(pipe, training.first, samples, sample, shown)
        measured = {name: entry.fit for name, entry in seen.items()}
    with (
        Trainer(pipe, training, samples[0][1], measured) as trainer,
        torch.inference_mode(False),
        torch.no_grad(),
        _bar(shown, training.runs) as advance,
    ):
        trainer.look(lambda: sample(*samples[0]))
        for number in range(training.runs):
            sweep, place = divmod(number, len(samples))
            prompt, seed = samples[place]
            loss = trainer.teach(number, functools.partial(sample, prompt, seed + sweep * OTHER_NOISE))
            advance(f"train, loss {loss:.3g}")
        return trainer.entries()


def _search(
    pipe: Any,
    method: Method,
    search: Search,
    samples: Sequence[tuple[Any, int]],
    sample: Callable[[Any, int], Any],
    steps: int,
    shown: bool,
) -> dict[str, Entry]:
    """The prompts uncached, then with one genome after the other. What is found serves all denoisers alike."""
    from cache4diffusion.accelerate import accelerate
    from cache4diffusion.calibration.trying import Bench

    denoisers, off = uncached(pipe, "search"), replace(method, **method.info.off)
    runs = [functools.partial(sample, prompt, seed) for prompt, seed in samples]
    total = search.population * (search.generations + 1)
    with torch.inference_mode(), _bar(shown, total) as advance:
        with unconcerned(), accelerate(pipe, off) as handle:  # refuses at once a denoiser that it cannot serve
            plain = [numbers_of(run()) for run in runs]
            levels = handle._run.timesteps if handle._run is not None else None
        bench = Bench(pipe, steps, runs, plain)

        def evaluate(genome: Genome) -> Found:
            settings = search.settings(genome)
            speedup, errors = bench.measure(replace(method, **settings))
            if not math.isfinite(sum(errors)):
                raise CalibrationError(f"With {settings} the result is not finite, so no search can go by it.")
            return Found(genome, 1 / speedup, sum(errors) / len(errors))

        tried = evolve(search, steps, evaluate, advance)
    front = front_of(tried)
    quality = search.judge(tried, front)
    sums = {"tried": torch.tensor([(found.cost, found.error) for found in tried], dtype=torch.float64)}
    return {
        name: Entry(fingerprint_of(denoiser), levels, search.tensors(front), quality, sums)
        for name, denoiser in denoisers.items()
    }


def provenance_of(target: Any, steps: int, call: Mapping[str, Any], samples: Sequence[str]) -> Provenance:
    """Where a calibration comes from."""
    from cache4diffusion import __version__
    from cache4diffusion.accelerate import denoisers_of

    schedulers = [] if isinstance(target, nn.Module) else schedulers_of(target)
    parameter = next(next(iter(denoisers_of(target).values())).parameters(), None)
    return Provenance(
        type(target).__name__,
        type(schedulers[0]).__name__ if schedulers else None,
        steps,
        {key: _plain(value) for key, value in sorted(call.items())},
        str(parameter.dtype).removeprefix("torch.") if parameter is not None else "none",
        __version__,
        tuple(samples),
    )


def digest_of(prompt: Any, seed: int) -> str:
    """A digest of one sample: what was asked for, and the seed."""
    digest = hashlib.sha256(f"{seed}/".encode())
    for piece in _pieces(prompt):
        digest.update(piece)
    return digest.hexdigest()[:24]


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield f"{key}=".encode()
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _pieces(entry)
    else:
        yield repr(value).encode()


def _plain(value: Any) -> Any:
    """A value of a call as JSON holds it; a digest in place of what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return f"{type(value).__name__} {digest_of(value, 0)}"


def _sample(pipe: Any, call: Mapping[str, Any], prompt: Any, seed: int, steps: int) -> Any:
    """One run; returns the first of the pipeline's outputs."""
    own = dict(prompt) if isinstance(prompt, Mapping) else {}
    sample = sampler(pipe, {**call, **own})
    try:
        return sample(None if own else [prompt], [seed], steps)
    except Cache4DiffusionError:
        raise
    except Exception as error:  # the host's own code may raise anything
        raise RunError(f"{type(pipe).__name__} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; yields what moves it on, with a word."""
    if not shown:
        yield lambda words: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("calibrate", total=total)
        yield lambda words: progress.update(task, description=words, advance=1)
