"""TaoCache: the reconstruction on its card, step by step after guidance."""

import pytest
import torch
from forecasts import assert_same, walk, wavy
from trajectories import Slow, assert_close, steered

from cache4diffusion.predictors import Newton, Reuse
from cache4diffusion.predictors.tao import ScaledDelta, fit_changes

STRIP = "FFFFFFFcFcFc"


class Tao(Slow):
    """Keep e_prev and d_prev, predicted values included."""

    def __init__(self, strip, ratio, cosine):
        super().__init__(len(strip))
        self.strip, self.ratio, self.cosine, self.e, self.d = strip, ratio, cosine, None, None

    def velocity(self, i, x):
        new = self.compute(i, x) if self.strip[i] == "F" else self.e + self.ratio * self.cosine * self.d
        self.d, self.e = (None if self.e is None else new - self.e), new
        return new


@pytest.mark.parametrize(("ratio", "cosine"), [(1.0, 1.0), (0.8, 0.9), (0.0, 1.0)])
def test_every_step_equals_the_card_after_guidance(ratio, cosine):
    found, strip, _ = steered("taocache", 12, ratios=(ratio,), cosines=(cosine,))
    assert strip == STRIP
    assert_close(found, Tao(STRIP, ratio, cosine).run())


def test_a_scale_of_1_is_a_line_and_of_0_reuse():
    assert_same(walk(ScaledDelta(), wavy, "FFc"), walk(Newton(1), wavy, "FFc"))
    assert_same(walk(ScaledDelta((0.0,)), wavy, STRIP), walk(Reuse(), wavy, STRIP))


def test_a_geometric_sequence_of_changes_is_exact_and_is_what_the_fit_finds():
    def feature(i):
        return torch.tensor([[3.0, -1.0]], dtype=torch.float64) * (1 - 0.8**i) + 2

    ratios, cosines = fit_changes([[feature(i) for i in range(8)], [2 * feature(i) for i in range(8)]])
    assert ratios[2:] == pytest.approx([0.8] * 6)
    assert cosines == pytest.approx([1.0] * 8)
    assert_same(walk(ScaledDelta(ratios, cosines), feature, "FFcccccc"), [feature(i) for i in range(8)])


def test_off_is_the_plain_run_and_others_differ():
    plain = Slow(8).run()
    assert_close(steered("taocache", 8, interval=1)[0], plain)
    assert not torch.allclose(steered("taocache", 8)[0][-1].double(), plain[-1], rtol=1e-4)
