"""The trajectory site: denoiser calls of a cached step return placeholders, and the scheduler is given the prediction.

One step, drawn once::

    denoiser(x, t, branch 1)     full: runs.   cached: the prediction is made, a placeholder returned     run
    denoiser(x, t, branch 2)     as the first branch                                                      run
    guidance, by the loop
    scheduler.step(v, t, x)      cached: v is replaced by the prediction                                  before_step
    -> x'                        cached, if x' is what is predicted: replaced; recorded or committed      after_step
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.devices import in_double
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import Layout, Spec, take_apart
from cache4diffusion.engine.state import BranchState, Context, Verdict
from cache4diffusion.errors import AnatomyError, CompositionError, RunError
from cache4diffusion.gates import LookAhead
from cache4diffusion.run import Run
from cache4diffusion.sites import Trajectory

SITE = "trajectory"


@runtime_checkable
class SeesSigmas(Protocol):
    """A predictor that needs the noise levels of the run."""

    def see_sigmas(self, state: Any, sigmas: Sequence[float]) -> None:
        """Take in sigma by step; one more than there are steps."""
        ...


@dataclass
class Pending:
    """A step between the first call of the denoiser and ``scheduler.step``. Held by its first branch's state.

    Args:
        context: of the first branch's call, without its state, which holds this.
        state: of the first branch.
        is_cached: whether the prediction is used.
        predicted: what takes the velocity's (or the state's) place, if it is.
        before: the latent before the step, kept where it is recorded.
        target: the step that is computed instead of this one, if it looks ahead.
        is_outdated: the conditioning of a branch called later was replaced, so what is kept belongs to another run.
    """

    context: Context
    state: weakref.ref[BranchState]
    is_cached: bool
    predicted: Tensor | None = None
    before: Tensor | None = None
    target: int | None = None
    is_outdated: bool = False


class TrajectoryDriver(Driver):
    """Predicts what the scheduler is given, or what it makes.

    The branch that is called first in a step keeps the history; were it another one than before, it has none, and the
    step is full.
    """

    needs_anatomy = False
    is_late = True
    site: Trajectory

    def __init__(self, host: Host, site: Trajectory) -> None:
        super().__init__(host, site)
        self._pending: weakref.WeakValueDictionary[int, Pending] = weakref.WeakValueDictionary()  # by run

    # -- the denoiser's calls --------------------------------------------------------------------------------------

    def is_ready(self, context: Context, key: int) -> bool:
        """Once an output of this kind was seen and, in the first branch of a step, something was recorded."""
        if self._kind(context) not in context.state.extra.get("outputs", {}):
            return False
        if self._of_this_step(context) is not None:
            return True
        kept = context.state.sites.get(SITE)
        return kept is not None and self.host.predictor.is_ready(kept)

    def was_reached(self, context: Context) -> bool:
        """It records at the scheduler, later."""
        return True

    @staticmethod
    def _kind(context: Context) -> Any:
        return context.kwargs.get("return_dict", True)

    def _of_this_step(self, context: Context) -> Pending | None:
        pending = self._pending.get(context.call.run.id)
        if pending is not None and pending.context.step.index != context.step.index:
            raise RunError(
                f"{type(self.host.predictor).__name__} acts on the trajectory, in scheduler.step, and none was called "
                f"after step {pending.context.step.index}. In a loop of your own call "
                "handle.watch_scheduler(scheduler) before it begins; without a scheduler use a method for the "
                "denoiser, such as 'taylorseer-lite'."
            )
        return pending

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run, or make the prediction and return a placeholder."""
        verdict = context.verdicts[0]
        pending = self._of_this_step(context)
        if pending is None:
            pending = self._begin(context, verdict.is_cached)
            if verdict.is_full and isinstance(self.host.gate, LookAhead):
                self._look_ahead(context, pending, self.host.gate.target(context.step))
        elif pending.context.call.branch == context.call.branch:  # once more: the prediction was not finite
            pending.is_cached = verdict.is_cached
        if context.call.is_edited:
            pending.is_outdated = True
        if verdict.is_cached and pending.is_cached:
            return self._placeholder(context, pending)
        if verdict.is_cached:
            context.verdicts[0] = Verdict((False,) * len(verdict.cached), "the first branch was recomputed")
        if pending.target is not None:
            args, kwargs = self._moved(context, pending, args, kwargs)
        output = inner(*args, **kwargs)
        tensors, layout = take_apart(output)
        specs = [Spec(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        context.state.extra.setdefault("outputs", {})[self._kind(context)] = (layout, specs)
        return output

    def _begin(self, context: Context, is_cached: bool) -> Pending:
        kept = Context(context.call, context.step, BranchState(None), context.batch)
        pending = Pending(kept, weakref.ref(context.state), is_cached)
        if is_cached:
            pending.predicted = self.host.predictor.predict(context.state.sites[SITE], context.time)[0]
        context.state.extra["pending"] = pending
        self._pending[context.call.run.id] = pending
        return pending

    def _look_ahead(self, context: Context, pending: Pending, target: int | None) -> None:
        """Walk to step ``target`` with predicted velocities, on a latent of its own."""
        kept = context.state.extra
        if target is None or "sigmas" not in kept or SITE not in context.state.sites:  # nothing to walk with
            return
        sigmas: list[float] = kept["sigmas"]
        pending.target = target
        latent: Tensor = kept["latent"].read()
        ahead = latent.float()
        for step in range(context.step.index, target):
            velocity = self.host.predictor.predict(context.state.sites[SITE], float(step))[0]
            ahead = ahead + (sigmas[step + 1] - sigmas[step]) * velocity
        kept["ahead"] = ahead.to(latent.dtype)

    def _moved(
        self, context: Context, pending: Pending, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call at the step ahead: its latent, repeated as the loop repeats it, and its timestep."""
        state, inputs, times = pending.state(), self.host.inputs, context.call.run.timesteps
        assert state is not None and pending.target is not None
        timestep, latent, _ = inputs.split(args, kwargs)
        ahead: Tensor = state.extra["ahead"]
        copies, rest = divmod(latent.shape[0], ahead.shape[0])
        if rest or latent.shape[1:] != ahead.shape[1:]:
            raise AnatomyError(
                f"{type(self.host.predictor).__name__} calls the denoiser with a latent of its own, of shape "
                f"{tuple(ahead.shape)}, but the loop gives it {tuple(latent.shape)}: more than the latent. Use another "
                "method, such as 'taylorseer'."
            )
        if times is None:
            raise RunError("Looking ahead needs the timesteps of the run: with handle.run(timesteps=timesteps).")
        scale = times[pending.target] / times[context.step.index]
        moved = (in_double(timestep) * scale).to(timestep) if isinstance(timestep, Tensor) else timestep * scale
        ahead = ahead.to(latent.dtype).repeat(copies, *[1] * (ahead.ndim - 1))
        return inputs.at(args, kwargs, moved, ahead)

    def _placeholder(self, context: Context, pending: Pending) -> Any:
        """Zeros of the output's kind, or NaN if the prediction is not finite: then the engine's check sees it."""
        assert pending.predicted is not None
        mark = (pending.predicted.float() * 0).sum()
        layout: Layout
        layout, specs = context.state.extra["outputs"][self._kind(context)]
        return layout.fill([mark.to(spec.device, spec.dtype).repeat(spec.shape) for spec in specs])

    def bypassed(self) -> list[str]:
        """Everything."""
        return [""]

    # -- the scheduler's step --------------------------------------------------------------------------------------

    def before_step(self, run: Run, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Refuse a solver that this cannot work with; give it the predicted velocity."""
        pending = self._pending.get(run.id)
        if pending is None:
            return
        refuse(scheduler, self.site, arguments)
        state = pending.state()
        if pending.target is not None and state is not None:
            self._correct(pending, state, arguments)
        if self.site.feature == "all":
            pending.before = arguments["sample"].clone()
        if pending.is_cached and self.site.feature != "state":
            velocity: Tensor = arguments["model_output"]
            assert pending.predicted is not None
            arguments["model_output"] = pending.predicted.to(velocity.dtype).clone()

    def _correct(self, pending: Pending, state: BranchState, arguments: dict[str, Any]) -> None:
        """What was computed belongs to the step ahead; this step goes on with a value between it and the past."""
        assert pending.target is not None
        velocity: Tensor = arguments["model_output"]
        self.host.predictor.update(state.sites[SITE], [velocity], float(pending.target))
        pending.predicted = self.host.predictor.predict(state.sites[SITE], pending.context.time)[0]
        pending.is_cached = True
        state.extra.pop("ahead", None)

    def after_step(self, run: Run, scheduler: Any, arguments: dict[str, Any], result: Any) -> Any:
        """Record a full step, or commit what a cached one went on with; hand on the predicted state."""
        pending = self._pending.pop(run.id, None)
        state = pending.state() if pending is not None else None
        if pending is None or state is None:
            return result
        state.extra.pop("pending", None)
        latent: Tensor = result[0]
        if pending.is_cached and self.site.feature == "state":
            assert pending.predicted is not None
            latent = pending.predicted.to(latent.dtype).clone()
            if isinstance(result, tuple):
                result = (latent, *result[1:])
            else:
                result.prev_sample = latent
        context = Context(pending.context.call, pending.context.step, state, pending.context.batch)
        if pending.is_outdated:
            state.sites.pop(SITE, None)
            state.extra.pop("sigmas", None)
        leaves = self._leaves(pending, arguments["model_output"], latent)
        if not pending.is_cached:
            self.keep(context, SITE, leaves)
            if self.host.listener is not None:
                self.host.listener.hear_call(context, ())
        elif not pending.is_outdated:
            self.host.predictor.commit(state.sites[SITE], leaves, context.time)
        if isinstance(self.host.gate, LookAhead):
            self.host.store.remember(state.extra, "latent", latent)
            state.extra.setdefault("sigmas", sigmas_of(scheduler, context.step.index))
        if isinstance(self.host.predictor, SeesSigmas) and SITE in state.sites and "sigmas" not in state.extra:
            state.extra["sigmas"] = sigmas_of(scheduler, context.step.index)
            self.host.predictor.see_sigmas(state.sites[SITE], state.extra["sigmas"])
        self.bring_first(state, context.time + 1)
        return result

    def _leaves(self, pending: Pending, velocity: Tensor, latent: Tensor) -> list[Tensor]:
        if self.site.feature == "state":
            return [latent]
        if self.site.feature == "velocity":
            return [velocity]
        assert pending.before is not None
        return [velocity, pending.before, latent]


def refuse(scheduler: Any, site: Trajectory, arguments: dict[str, Any] | None = None) -> None:
    """Raise if the trajectory of this solver cannot be acted on.

    Args:
        scheduler: the solver.
        site: what it must be one of.
        arguments: of the step, if it is being made.

    Raises:
        CompositionError: another solver, or one that adds noise in every step.
    """
    name = type(scheduler).__name__
    if name not in site.solvers:
        raise CompositionError(
            f"{name} cannot be steered by this method: it may remember earlier outputs, or step in another way than "
            f"assumed. Use {' or '.join(site.solvers)}, or a method for the denoiser, such as 'taylorseer-lite'."
        )
    options = {"s_churn": 0.0, "eta": 0.0, **(arguments or {})}
    is_noisy = bool(getattr(getattr(scheduler, "config", None), "stochastic_sampling", False))
    if is_noisy or options["s_churn"] or options["eta"]:
        raise CompositionError(
            f"{name} adds noise in every step with these settings (stochastic_sampling, s_churn or eta), so its "
            "trajectory cannot be predicted. Set them to False or 0."
        )


def sigmas_of(scheduler: Any, step: int) -> list[float]:
    """Noise levels by step of the run, read after the step of index ``step``."""
    sigmas = torch.as_tensor(scheduler.sigmas).cpu().double().tolist()
    return sigmas[scheduler.step_index - 1 - step :]
