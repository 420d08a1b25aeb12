"""MeanCache: the released code's loop, written out, and its schedules."""

import pytest
import torch
from trajectories import Slow, assert_close, steered

from cache4diffusion.gates import ScaledSchedule, Step
from cache4diffusion.methods import MeanCache


class Released(Slow):
    """``compute_current_jvp`` and the loop around it."""

    def __init__(self, strip, look_back):
        super().__init__(len(strip))
        self.strip, self.look_back = strip, look_back
        self.log = {"v": [], "latents_pre": [], "latents": [], "sigmas_pre": [], "sigmas": []}

    def velocity(self, i, x):
        if self.strip[i] == "F":
            v = self.compute(i, x)
        else:
            length = len(self.log["v"])
            edge = self.strip[:i].count("F") - 1
            steps = min(self.look_back[min(edge, len(self.look_back) - 1)], length)
            i1, i0 = length - 1, length - steps
            span = self.log["sigmas"][i1] - self.log["sigmas_pre"][i0]
            average = (self.log["latents"][i1] - self.log["latents_pre"][i0]) / span
            jvp = (self.log["v"][i0] - average) / span
            v = self.log["v"][-1] - jvp * (self.sigmas[i + 1] - self.sigmas[i])
        self.log["v"].append(v)
        self.log["latents_pre"].append(x)
        self.log["sigmas_pre"].append(self.sigmas[i])
        self.log["sigmas"].append(self.sigmas[i + 1])
        return v

    def advance(self, i, x, velocity):
        x = super().advance(i, x, velocity)
        self.log["latents"].append(x)
        return x


def strip_of(full_steps, steps):
    gate = ScaledSchedule(full_steps, 50)
    return "".join("c" if gate.propose(None, Step(i, steps), None) else "F" for i in range(steps))


@pytest.mark.parametrize("look_back", [(1,), (2,), (1, 3, 5)])
def test_every_step_equals_the_released_code(look_back):
    full_steps = (0, 4, 8, 20, 36)
    strip = strip_of(full_steps, 13)
    assert strip == "FFFccFcccFccc"
    found, seen, _ = steered("meancache", 13, full_steps=full_steps, look_back=look_back)
    assert seen == strip
    assert_close(found, Released(strip, look_back).run(), 1e-4)


def test_one_step_back_is_plain_reuse():
    class Reused(Slow):
        def velocity(self, i, x):
            self.last = self.compute(i, x) if strip[i] == "F" else self.last
            return self.last

    strip = strip_of((0, 4, 20), 10)
    found, _, _ = steered("meancache", 10, full_steps=(0, 4, 20), look_back=(1,))
    assert_close(found, Reused(10).run())


def test_a_velocity_linear_in_sigma_moves_to_the_mean_of_the_coming_step():
    """Euler's own latents of such a velocity: J is half its slope over the steps looked back, up to the grid."""
    predictor = MeanCache(look_back=(3,)).compose().predictor
    sigmas = [1 - i / 64 for i in range(9)]
    state, x = predictor.init(None), torch.zeros(1, 1, dtype=torch.float64)
    predictor.see_sigmas(state, sigmas)
    for i in range(6):
        v = torch.full((1, 1), 2.0 * sigmas[i], dtype=torch.float64)
        after = x + (sigmas[i + 1] - sigmas[i]) * v
        predictor.update(state, [v, x, after], float(i))
        x = after
    (found,) = predictor.predict(state, 6.0)
    last, mean = 2 * sigmas[5], sigmas[6] + sigmas[7]
    assert mean < float(found) < last, "moved from the last velocity towards the mean of the step from 6 to 7"


def test_the_published_schedules_have_an_entry_per_full_step_and_are_stretched():
    for what, given in MeanCache.info.published.items():
        settings = MeanCache(**given).settings
        full_steps, look_back = settings["full_steps"], settings["look_back"]
        assert len(full_steps) == int(what.split(", ")[2].split()[0])
        assert len(look_back) in (len(full_steps) - 1, len(full_steps))
    gate = ScaledSchedule((0, 1, 5), made_for=10)
    assert [i for i in range(20) if not gate.propose(None, Step(i, 20), None)] == [0, 2, 10]


def test_off_is_the_plain_run():
    assert_close(steered("meancache", 6, full_steps=None)[0], Slow(6).run())
