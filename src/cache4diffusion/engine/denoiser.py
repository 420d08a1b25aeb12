"""The whole-denoiser site: on a cached step nothing of the denoiser runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cache4diffusion.engine.driver import Driver, Inner, go_on_with, take_in
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import own, take_apart
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.predictors import Corrector, Predictor
from cache4diffusion.predictors.corrector import paired
from cache4diffusion.sites import Denoiser
from cache4diffusion.storage import PLAIN, Store


class OutputMemory:
    """Remembers the denoiser's output, and how it is made of tensors for each way of calling it.

    Args:
        predictor: makes the output of a cached step.
        name: of the site in the branch's state.
        store: how snapshots are kept.
    """

    def __init__(self, predictor: Predictor, name: str = "output", store: Store = PLAIN) -> None:
        self.predictor, self.name, self.store = predictor, name, store

    def is_ready(self, context: Context) -> bool:
        """After the first full step, if the output's kind is known for this way of calling."""
        history = context.state.sites.get(self.name)
        is_known = self._kind(context) in context.state.extra.get("layouts", {})
        return history is not None and is_known and self.predictor.is_ready(history)

    @staticmethod
    def _kind(context: Context) -> Any:
        return context.kwargs.get("return_dict", True)

    def record(self, context: Context, output: Any, base: Tensor | None = None) -> None:
        """Take in the output of a full step, minus ``base``."""
        tensors, layout = take_apart(output)
        if not tensors:
            raise AnatomyError(
                f"The denoiser returns a {type(output).__name__} in which no tensor is found, so there is nothing to "
                "cache. Let it return a tensor, or tensors in a tuple, list, dict or dataclass."
            )
        context.state.extra.setdefault("layouts", {})[self._kind(context)] = layout
        if base is not None:
            tensors = [shifted(*pair, -1) for pair in zip(tensors, bases(tensors, base), strict=True)]
        if not isinstance(self.predictor, Corrector):
            take_in(self.predictor, context, self.name, tensors, store=self.store)
            return
        latents = () if context.latent is None else (context.latent,)
        pairs = paired(tensors, latents)
        if pairs is None:
            raise AnatomyError(
                f"{type(self.predictor).__name__} maps what enters to what leaves, and the output has places that the "
                "latent has not. Use a predictor such as 'reuse'."
            )
        context.state.extra["pairs"] = pairs
        take_in(self.predictor, context, self.name, tensors, [latents[i] for i in pairs], store=self.store)

    def predicted(self, context: Context, base: Tensor | None = None) -> Any:
        """The output of a cached step: the prediction, plus ``base``."""
        state = context.state.sites[self.name]
        seen = []
        if isinstance(self.predictor, Corrector):
            assert context.latent is not None  # or nothing would have been recorded
            seen = [context.latent for _ in context.state.extra["pairs"]]
        tensors = go_on_with(self.predictor, context, self.name, seen)
        if base is not None:
            tensors = [shifted(*pair, 1) for pair in zip(tensors, bases(tensors, base), strict=True)]
        return context.state.extra["layouts"][self._kind(context)].fill(own(tensors, state))


def bases(outputs: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
    """What each output is the residual of: the latent, or its own sample where there is one output per sample."""
    if len(outputs) == len(latent) and all(output.ndim == latent.ndim - 1 for output in outputs):
        return list(latent)
    return [latent] * len(outputs)


def shifted(output: Tensor, latent: Tensor, sign: int) -> Tensor:
    """``output + sign * latent``; where the output has more channels (a learned variance), on the first ones.

    Raises:
        AnatomyError: the two are not of one shape.
    """
    if output.shape == latent.shape:
        return output + sign * latent.to(output.dtype)
    result = output.clone()
    _first_channels(result, latent, "it has no residual").add_(latent.to(output.dtype), alpha=sign)
    return result


def scaled(output: Tensor, latent: Tensor, factor: float) -> Tensor:
    """``factor * output``; where the output has more channels than the latent, of the first ones.

    Raises:
        AnatomyError: the two are not of one shape.
    """
    if output.shape == latent.shape:
        return output * factor
    result = output.clone()
    _first_channels(result, latent, "it is not known what to scale").mul_(factor)
    return result


def _first_channels(output: Tensor, latent: Tensor, lack: str) -> Tensor:
    differs = [i for i, (a, b) in enumerate(zip(output.shape, latent.shape, strict=False)) if a != b]
    if output.ndim != latent.ndim or len(differs) != 1 or output.shape[differs[0]] < latent.shape[differs[0]]:
        raise AnatomyError(
            f"The output {tuple(output.shape)} is not of the latent's shape {tuple(latent.shape)}, so {lack}. "
            "Use site='denoiser' (its output), or a method for the blocks."
        )
    return output.narrow(differs[0], 0, latent.shape[differs[0]])


class DenoiserDriver(Driver):
    """Predicts the denoiser's output.

    Where the gate must look inside first, the blocks after the decision pass their input through and what the host
    makes of it is thrown away: its own code runs to the end, so nothing of the host is left half done.
    """

    site: Denoiser

    def __init__(self, host: Host, site: Any) -> None:
        super().__init__(host, site)
        watch = host.gate.watch if host.gate is not None else None
        self.needs_anatomy = watch is not None and watch.needs_stack
        self.needs_blocks = watch is not None and watch.is_inside
        self.memory = OutputMemory(host.predictor, store=host.store)

    def is_ready(self, context: Context, key: int) -> bool:
        """After the first full step."""
        return self.memory.is_ready(context)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute and record, or predict."""
        base = context.latent if self.site.form == "residual" else None
        if 0 in context.verdicts and context.verdicts[0].is_cached:
            return self.memory.predicted(context, base)
        output = inner(*args, **kwargs)
        verdict = context.verdict
        if verdict is None:  # the watch point was not reached; the engine says so
            return output
        if verdict.is_cached:  # decided on the way
            return self.memory.predicted(context, base)
        self.memory.record(context, output, base)
        return output

    def on_block(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pass through once the step is known to be cached."""
        verdict = context.verdicts.get(0)
        if verdict is not None and verdict.is_cached:
            return self.host.pass_through(position, args, kwargs)
        return inner(*args, **kwargs)

    def bypassed(self) -> list[str]:
        """Everything."""
        return [""]
