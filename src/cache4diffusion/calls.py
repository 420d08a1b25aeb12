"""Calling a pipeline from outside: the arguments it takes, and those it gives to its denoiser."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cache4diffusion.errors import SettingError, closest
from cache4diffusion.shadow import Shadow

Call = tuple[tuple[Any, ...], dict[str, Any]]


_PROMPTS = {
    "prompt": ["a red circle on a gray background", "a blue star left of a green square on a white background"],
    "class_labels": [0, 1],
}


class _Enough(BaseException):
    """What was to be seen has been seen."""


def first_step(denoiser: nn.Module, schedulers: Sequence[Any], sample: Callable[[], Any]) -> list[Call]:
    """Arguments of the denoiser's calls in the first step of ``sample()`` that has any; it goes no further.

    Args:
        denoiser: whose calls are noted.
        schedulers: the ``step`` of any of them ends the step; none: the first call alone, which is then not run.
        sample: runs the pipeline.
    """
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))
        if not schedulers:
            raise _Enough

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)  # hosts inspect the signature
        def stop(*args: Any, **kwargs: Any) -> Any:
            if calls:
                raise _Enough
            return step(*args, **kwargs)  # of a step that was another denoiser's

        return stop

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    shadows = [Shadow(scheduler, "step", watched(scheduler.step)) for scheduler in schedulers]
    try:
        sample()
    except _Enough:
        pass
    finally:
        hook.remove()
        for shadow in shadows:
            shadow.remove()
    return calls


class Sampling:
    """A short run of a pipeline that asks for nothing in particular and decodes nothing.

    Args:
        pipe: a diffusers pipeline.
        call: arguments of its call; without a prompt (or embeddings) two simple ones are drawn.
        steps: of the run.

    Raises:
        SettingError: an argument is not known.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], steps: int) -> None:
        check_call(pipe, call)
        call, name = dict(call), subject(pipe)
        call.pop("num_inference_steps", None)
        embeddings = call.get("prompt_embeds")
        prompts = call.pop(name, examples(pipe) if embeddings is None else None)
        self.pipe, self.steps = pipe, steps
        self.prompts = [prompts] if isinstance(prompts, (str, int)) else prompts
        self.rows = len(embeddings) if self.prompts is None else len(self.prompts)  # type: ignore[arg-type]
        self._sample = sampler(pipe, {**call, "output_type": "latent"})

    def __call__(self) -> Any:
        """Run it: latents."""
        return self._sample(self.prompts, list(range(self.rows)), self.steps)

    def first_steps(self, denoisers: Mapping[str, nn.Module], schedulers: Sequence[Any]) -> dict[str, list[Call]]:
        """Arguments of each denoiser's calls in its first step.

        Raises:
            SettingError: none of them is called.
        """
        with torch.no_grad():
            calls = {name: first_step(module, schedulers, self) for name, module in denoisers.items()}
        if not any(calls.values()):
            raise SettingError(
                f"A run of {type(self.pipe).__name__} with {self.steps} steps calls none of {', '.join(denoisers)}: "
                "there is nothing to look at."
            )
        return calls


def subject(pipe: Any) -> str:
    """Name of the argument that says what to draw: ``prompt``, or ``class_labels`` for class-to-image pipelines.

    Raises:
        SettingError: the pipeline takes neither.
    """
    names = inspect.signature(type(pipe).__call__).parameters
    for name in ("prompt", "class_labels"):
        if name in names:
            return name
    raise SettingError(f"{type(pipe).__name__} takes neither 'prompt' nor 'class_labels', so it cannot be called here.")


def examples(pipe: Any) -> list[Any]:
    """Two things to draw, in the words that the pipeline takes."""
    return list(_PROMPTS[subject(pipe)])


def default_steps(pipe: Any) -> int:
    """Sampling steps the pipeline takes unless told otherwise."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    default = parameter.default if parameter is not None else None
    return default if isinstance(default, int) else 50


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments the pipeline does not take.

    Raises:
        SettingError: names the nearest.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in call:
        if name not in parameters:
            raise SettingError(f"{type(pipe).__name__} takes no argument {name!r}{closest(name, parameters) or '.'}")


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own."""
    had = "_progress_bar_config" in getattr(pipe, "__dict__", {})
    before = dict(pipe._progress_bar_config) if had else None
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if had:
            pipe._progress_bar_config = before
        elif hasattr(pipe, "_progress_bar_config"):
            del pipe._progress_bar_config


def sampler(pipe: Any, call: Mapping[str, Any]) -> Callable[..., Any]:
    """A function ``(captions, seeds, steps, on_step=None) -> images`` for `measure.bench`.

    Each image's noise comes from its own seed, drawn on the CPU, so that it is the same in every batch and device.

    Args:
        pipe: a diffusers pipeline.
        call: further arguments of its call, the same for every image. With ``prompt_embeds`` among them ``captions``
            may be None.
    """
    check_call(pipe, call)
    subject_name = subject(pipe)
    parameters = inspect.signature(type(pipe).__call__).parameters

    def sample(captions: Sequence[Any] | None, seeds: Sequence[int], steps: int, on_step: Any = None) -> Any:
        arguments: dict[str, Any] = {
            "num_inference_steps": steps,
            "output_type": "np",
            "return_dict": False,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **call,
        }
        if captions is not None:
            arguments[subject_name] = list(captions)
        if on_step is not None and "callback_on_step_end" in parameters:

            def after(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                on_step(values["latents"])
                return {}

            arguments |= {"callback_on_step_end": after, "callback_on_step_end_tensor_inputs": ["latents"]}
        return pipe(**arguments)[0]

    return sample
