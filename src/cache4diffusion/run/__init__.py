"""Which sampling run, step and CFG branch does this call of a denoiser belong to?

The sampling loop is the host's own and is not touched; it is only listened to. One run, and what is learnt where::

    scheduler.set_timesteps(20)                       # begin: number of steps, their timesteps
    with pipe.progress_bar(total=20) as bar:          # begin (the same run: still unused); its exit is the end
        for t in scheduler.timesteps:
            with denoiser.cache_context("cond"):      # name of the branch
                a = denoiser(x, t, cond)              # RunTracker.enter -> Call(run, step 0, "cond")
            with denoiser.cache_context("uncond"):
                b = denoiser(x, t, uncond)            # RunTracker.enter -> Call(run, step 0, "uncond")
            x = scheduler.step(b + 5 * (a - b), t, x) # the step is over

Every signal may be missing. Without a scheduler that fires, a step is told by the value of the timestep and by the
branches already called in it; without names, branches are told by the conditioning. What no signal can tell (time
travel, one-step runs in a bare loop) needs `RunTracker.run`.
"""

from __future__ import annotations

from cache4diffusion.run.path import Call, Run
from cache4diffusion.run.tracker import RunTracker

__all__ = ["Call", "Run", "RunTracker"]
