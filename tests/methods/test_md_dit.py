"""MD-DiT on a frozen denoiser: the tokens that are routed, and the training of routers, against slow references."""

import functools
import math

import pytest
import torch
from slow_training import Slow, adam, assert_same_numbers, blend, by_step, train, update

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.token_routers import TokenRouters
from cache4diffusion.errors import CalibrationError, SettingError
from cache4diffusion.gates import PartInput, Step
from cache4diffusion.tokens import RoutedTokens, Segment, TokenPlace, routed_count
from small_denoisers import (
    FLUX_PARTS,
    Plainly,
    SlowFlux,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux_inputs,
    made_by_hand,
    sample,
)

STEPS, WIDTH = 7, 32
ROUTED = [name for name, kind in FLUX_PARTS.items() if kind != "attn"]
by_hand = functools.partial(made_by_hand, "md-dit")


def random_routers(seed=0, steps=STEPS):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(steps, WIDTH, generator=g) for name in ROUTED}


class Routed(Plainly):
    """Every third step is full; on others, the tokens with the largest scores are computed, and attention is not."""

    def __init__(self, routers, capacity, interval=3):
        self.routers, self.capacity, self.interval, self.kept = routers, capacity, interval, {}

    def begin(self, step):
        self.step = step

    def put(self, name, x, compute):
        """``compute`` on all tokens, of which only the routed ones are used."""
        if self.step % self.interval == 0:
            self.kept[name] = compute(x)
            return self.kept[name]
        scores, out = x @ self.routers[name][self.step], self.kept[name].clone()
        for row in range(len(x)):
            chosen = scores[row].topk(math.ceil(self.capacity * x.shape[1])).indices.sort().values
            out[row, chosen] = compute(x)[row, chosen]
        self.kept[name] = out
        return out

    def attn(self, name, block, image, text, rope):
        if self.step % self.interval == 0:
            self.kept[name] = super().attn(name, block, image, text, rope)
        return self.kept[name]

    def ffn(self, name, module, x, layer, stream):
        return self.put(name, x, module)

    def fused(self, name, block, x, rope, layer):
        if self.step % self.interval == 0:
            self.kept[f"{name}.inner"] = self.inner_attn(block, x, rope)
        inner = self.kept[f"{name}.inner"]

        def compute(x):
            return block.proj_out(torch.cat([inner, block.act_mlp(block.proj_mlp(x))], dim=2))

        return self.put(name, x, compute)


@pytest.mark.parametrize("capacity", [0.25, 0.6])
def test_the_routed_tokens_are_computed_and_the_others_keep_theirs(model, capacity):
    routers = random_routers()
    expected = sample(SlowFlux(model, Routed(routers, capacity)), flux_inputs(2), STEPS)
    calibration = by_hand(routers, capacity=capacity)
    reached, trace, stats = accelerated(model, flux_inputs(2), STEPS, "md-dit", calibration=calibration)
    assert trace.strip() == "FppFppF"
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0


def test_a_capacity_of_0_is_reuse_and_of_1_computes_all_but_attention(model):
    calibration = by_hand(random_routers())
    nothing = accelerated(model, flux_inputs(1), STEPS, "md-dit", calibration=calibration, capacity=0.0)[0]
    fora = accelerated(model, flux_inputs(1), STEPS, "fora", interval=3)[0]
    assert differences(nothing, fora) == [0.0] * STEPS
    everything = accelerated(model, flux_inputs(1), STEPS, "md-dit", calibration=calibration, capacity=1.0)[0]
    every_token = {"interval": 3, "tokens": "top(recompute_ratio=1.0)"}
    assert max(differences(everything, accelerated(model, flux_inputs(1), STEPS, "fora", **every_token)[0])) <= 1e-5


def test_interval_1_is_bit_equal(model):
    reached, trace, _ = accelerated(
        model, flux_inputs(1), STEPS, "md-dit", calibration=by_hand(random_routers()), interval=1
    )
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(1), STEPS)) == [0.0] * STEPS


def place(entering, step=1, twins=None):
    segments = (Segment("image", 0, entering.shape[1]),)
    return TokenPlace("ff", "ffn", 0, 1, Step(step, 4), segments, len(entering), twins=twins, entering=entering)


@pytest.mark.parametrize("capacity", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_picked_tokens_are_unique_sorted_and_as_many_as_the_capacity_says(capacity):
    rule = RoutedTokens(capacity, PartInput({"ff": torch.randn(4, 8)}))
    entering = torch.randn(3, 12, 8)
    index = rule.select(None, place(entering), torch.device("cpu"))
    assert index.shape == (3, math.ceil(capacity * 12)) == (3, routed_count(capacity, 12))
    for row in range(3):
        assert index[row].tolist() == sorted(set(index[row].tolist()))
        scores = entering[row] @ rule.routers.weights["ff"][1]
        assert set(index[row].tolist()) == set(scores.topk(index.shape[1]).indices.tolist())


def test_halves_of_batched_guidance_compute_the_same_tokens():
    rule = RoutedTokens(0.5, PartInput({"ff": torch.randn(4, 8)}))
    entering = torch.randn(4, 10, 8)
    index = rule.select(None, place(entering, twins=torch.tensor([True] * 4)), torch.device("cpu"))
    assert torch.equal(index[:2], index[2:])
    apart = rule.select(None, place(entering, twins=torch.tensor([False] * 4)), torch.device("cpu"))
    assert not torch.equal(apart[:2], apart[2:])


def test_dit_routes_its_mlps():
    denoiser, g = dit(), torch.Generator().manual_seed(0)
    fit = {f"transformer_blocks.{i}.ff": torch.randn(STEPS, WIDTH, generator=g).double() for i in range(3)}
    calibration = Calibration.by_hand("md-dit", STEPS, fit)
    _, trace, _ = accelerated(denoiser, dit_inputs(2), STEPS, "md-dit", calibration=calibration)
    assert trace.strip() == "FppFppF"


def test_routers_belong_to_an_interval_and_to_their_steps(model):
    calibration = by_hand(random_routers())
    with pytest.raises(CalibrationError, match=r"trained for an interval of 3\. Calibrate with --set interval=4"):
        c4d.method("md-dit", calibration=calibration, interval=4)
    with pytest.raises(CalibrationError, match=r"calibrated for 7 steps, and the run has 5 steps\. .*resample=True"):
        accelerated(model, flux_inputs(1), 5, "md-dit", calibration=calibration)
    _, trace, _ = accelerated(model, flux_inputs(1), 5, "md-dit", calibration=calibration, resample=True)
    assert trace.strip() == "FppFp"
    with pytest.raises(SettingError, match="a share of tokens, 0 to 1"):
        RoutedTokens(1.5)


# -- what is trained ---------------------------------------------------------------------------------------------------


def slow_training(model, steps, runs, rate, price, capacity):
    """Full every third step; between them tokens are mixed by their scores, attention is the last full step's."""
    slow, cached = Slow(model), [s for s in range(steps) if s % 3]
    w = {s: {name: torch.zeros(WIDTH, requires_grad=True) for name in ROUTED} for s in cached}
    optimizers = {s: adam(w[s].values(), rate) for s in cached}
    for run in range(runs):
        inputs = flux_inputs(1, seed=run)
        x = inputs["hidden_states"]
        for s in range(steps):
            with torch.no_grad():
                y = slow.target(x, s, steps, inputs) if s in w else slow.full(x, s, steps, inputs)
            if s in w:
                cost = []

                def student(name, entering, compute, kept, s=s, cost=cost):
                    if name not in w[s]:
                        return kept[name]
                    scores = torch.sigmoid(entering[0] @ w[s][name])
                    cost.append((scores.mean() - capacity) ** 2)
                    return blend(scores[..., None], compute(), kept[name])

                mixed = slow.taught(student, x, s, steps, inputs)
                update(optimizers[s], ((y - mixed) ** 2).mean() + price * sum(cost), w[s].values())
            x = x - y / steps
    return by_step(w, steps)


def test_routers_are_trained_as_the_docstring_says(model):
    entry = train(model, TokenRouters(runs=3, rate=0.01, price=0.1, capacity=0.3), 5)
    assert_same_numbers(entry, slow_training(model, 5, 3, 0.01, 0.1, 0.3))
