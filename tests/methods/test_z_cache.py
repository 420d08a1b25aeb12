"""Z-Cache: the switch in FreqCa's code, with its rewinding loop written out, against ours that never rewinds."""

import math

import pytest
import torch
from trajectories import Slow, assert_close, start, steered

from cache4diffusion.gates import LookAhead, Step
from cache4diffusion.predictors import TwoSided


def taylor(ladder, k):
    return sum(d * k**i / math.factorial(i) for i, d in ladder.items())


class Rewinding(Slow):
    """``cal_type``, ``derivative_approximation`` and ``cache_step_merge`` around a loop that goes back."""

    def __init__(self, steps, first_enhance, interval, forecast_steps, order):
        super().__init__(steps)
        self.e, self.n, self.l, self.order = first_enhance, interval, forecast_steps, order

    def derive(self, value, old, gap, step):
        new = {0: value}
        for i in range(self.order):
            if i in old and step > self.e - 2:
                new[i + 1] = (new[i] - old[i]) / gap
            else:
                break
        return new

    def run(self):
        step, counter, merge, update, prev, backup = 0, 0, False, False, 0, None
        cache, last_cache, activated = {}, {}, [0]
        x, latents, self.evaluated = start()[0], {}, []
        while step < self.steps:
            weight = None
            if step < self.e:
                kind, counter = "full", 0
                activated.append(step)
            else:
                if step == self.e or (merge and update):
                    merge, update, prev = False, False, step + self.l
                if prev < self.steps - 1 - self.l:
                    if not merge and not update:
                        if counter != self.l - 1:
                            kind = "cache" if step != self.e else "full"
                            if kind == "full":
                                activated.append(step)
                            backup = x.clone() if backup is None else backup
                            counter += 1
                        else:
                            kind, merge, counter = "full", True, 0
                            activated.append(step)
                    elif merge and not update:
                        kind = "cache"
                        if backup is not None:
                            x, backup, step = backup.clone(), None, prev - self.l
                        span, total = abs(activated[-2] - step), abs(activated[-2] - activated[-1])
                        weight = math.log(span + 1) / math.log(total + 1)
                        if counter == self.n - 1:
                            update, counter = True, -1
                        counter += 1
                elif counter == self.n - 1:
                    kind, counter = "full", 0
                    activated.append(step)
                else:
                    kind, counter = "cache", counter + 1
            if kind == "full":
                v = self.compute(step, x)
                self.evaluated.append(step)
                gap = activated[-1] - activated[-2]
                last_cache, cache = cache, self.derive(v, cache, gap, step)
            elif weight is None:
                v = taylor(cache, step - activated[-1])
            else:
                past, future = taylor(last_cache, step - activated[-2]), taylor(cache, step - activated[-1])
                v = (1 - weight) * past + weight * future
                if update:
                    activated[-1] = step
                    cache = self.derive(v, last_cache, activated[-1] - activated[-2], step)
            x = self.advance(step, x, v)
            latents[step] = x
            step += 1
        return [latents[i] for i in range(self.steps)]


@pytest.mark.parametrize(
    ("steps", "interval", "ahead", "order"), [(20, 3, 3, 1), (22, 3, 4, 2), (24, 4, 4, 2), (9, 3, 3, 1)]
)
def test_every_step_equals_the_rewinding_loop(steps, interval, ahead, order):
    slow = Rewinding(steps, 3, interval, ahead, order)
    expected = slow.run()
    found, strip, _ = steered("z-cache", steps, interval=interval, ahead=ahead, order=order, basis="taylor")
    assert strip.count("F") == len(slow.evaluated)
    assert_close(found, expected, 1e-4)


def test_the_strip_is_the_docstrings():
    gate = LookAhead(warmup=3, interval=3, ahead=3)
    strip = ""
    for i in range(20):
        step = Step(i, 20)
        strip += "c" if gate.propose(None, step, None) else "F" if gate.target(step) is None else "A"
    assert f"``{strip}``" in LookAhead.__doc__


def test_between_two_true_anchors_a_line_is_exact_and_the_ends_are_theirs():
    predictor = TwoSided(1, "taylor", interval=4, ahead=4)
    state = predictor.init(None, 12)

    def line(i):
        return torch.tensor([[2.0 * i + 1]], dtype=torch.float64)

    for i in (0, 1, 2, 6):
        predictor.update(state, [line(i)], float(i))
    for i in (3, 4, 5, 6):
        torch.testing.assert_close(predictor.predict(state, float(i))[0], line(i))
    predictor.update(state, [line(6) + 5], 6.0)  # a future that disagrees
    torch.testing.assert_close(predictor.predict(state, 2.0 + 1e-9)[0], line(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(predictor.predict(state, 6.0)[0], line(6) + 5)


def test_off_is_the_plain_run():
    assert_close(steered("z-cache", 6, interval=1)[0], Slow(6).run())


def test_hermite_is_the_default_and_differs():
    hermite, _, _ = steered("z-cache", 20, interval=3, ahead=3)
    taylors, _, _ = steered("z-cache", 20, interval=3, ahead=3, basis="taylor")
    assert not torch.allclose(hermite[-1], taylors[-1], rtol=1e-5)
