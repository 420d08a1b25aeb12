"""TokenCache: the two phases, the tokens and blocks that are computed, and the training, against slow references."""

import functools
import math

import pytest
import slow_training as slow_trainings
import torch
from slow_training import adam, train, update

from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.token_weights import TokenWeights, weights_of
from cache4diffusion.calibration.trainer import Trainer
from cache4diffusion.errors import CalibrationError, SettingError
from cache4diffusion.gates import PartInput, Step, TwoPhase
from cache4diffusion.tokens import Segment, TokenPlace, WeightedTokens, important_tokens, pruned_blocks
from small_denoisers import (
    IMAGE,
    Plainly,
    SlowFlux,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux_inputs,
    sample,
)

STEPS, BLOCKS = 9, 5
by_hand = functools.partial(Calibration.by_hand, "tokencache", STEPS)


def random_weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"block.{block}": torch.rand(STEPS, IMAGE, generator=g) for block in range(BLOCKS)}


def constant(value):
    return {f"block.{block}": torch.full((STEPS, IMAGE), float(value)) for block in range(BLOCKS)}


# -- when --------------------------------------------------------------------------------------------------------------


def strip(gate, steps):
    return "".join("c" if gate.propose(None, Step(i, steps), None) else "F" for i in range(steps))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((4, 2, 0.5), "FcccFcccFcFc"),
        ((2, 4, 0.5), "FcFcFcFcccFc"),
        ((5, 2, 0.5), "FccccFccccFc"),
        ((3, 1, 0.5), "FccFccFFFFFF"),
        ((1, 3, 0.25), "FFFFccFccFcc"),
        ((3, 3, 0.5), "FccFccFccFcc"),
        ((4, 2, 0.0), "FcFcFcFcFcFc"),
        ((4, 2, 1.0), "FcccFcccFccc"),
        ((1, 1, 0.5), "FFFFFFFFFFFF"),
    ],
)
def test_each_phase_has_full_steps_at_its_distance(settings, expected):
    assert strip(TwoPhase(*settings), 12) == expected


def test_two_phases_need_the_length_of_the_run_only_where_they_differ():
    assert TwoPhase(4, 2).needs_num_steps
    assert not TwoPhase(3, 3).needs_num_steps
    assert [TwoPhase(3, 3).propose(None, Step(i, None), None) for i in range(4)] == [False, True, True, False]
    with pytest.raises(SettingError, match="distances must be 1"):
        TwoPhase(0, 2)
    with pytest.raises(SettingError, match="switch a fraction"):
        TwoPhase(2, 2, 1.5)


# -- which -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_tokens_with_the_largest_weights_are_picked(share):
    weights = torch.rand(12, generator=torch.Generator().manual_seed(1))
    index = important_tokens(weights, share)
    assert index.tolist() == sorted(weights.topk(math.ceil(share * 12)).indices.tolist())


def test_weights_of_1_are_always_picked_and_of_0_never():
    assert important_tokens(torch.tensor([0.5, 1.0, 0.2, 1.0]), 0.25).tolist() == [1, 3]
    assert important_tokens(torch.tensor([0.0, 0.0, 0.2, 0.0]), 1.0).tolist() == [2]
    assert pruned_blocks([0.4, 0.2, 0.3, 0.2], 0.5) == {1, 3}
    assert pruned_blocks([0.4, 0.2, 0.3, 0.2], 0.25) == {1}, "of equal ones the first"
    assert pruned_blocks([1.0, 0.0, 0.5], 1.0) == {1, 2}
    assert pruned_blocks([1.0, 0.0, 0.5], 0.0) == {1}


def selected(rule, *segments, block=0):
    """By the rule, of a part with these segments, in the second of three steps."""
    place = TokenPlace("part", "ffn", 0, 2, Step(1, 3), segments, 2, block=block, num_blocks=2)
    return rule.select(None, place, torch.device("cpu")).tolist()


def test_text_is_computed_only_where_everything_is():
    weights = {"block.0": torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.1, 0.1]] * 3), "block.1": torch.full((3, 6), 0.9)}
    rule = WeightedTokens(0.5, 0.3, PartInput(weights))
    joint = Segment("text", 0, 4), Segment("image", 4, 10)
    assert selected(rule, *joint) == [[5, 7]] * 2
    assert selected(rule, Segment("text", 0, 4)) == [[]] * 2
    assert selected(rule, *joint, block=1) == [list(range(10))] * 2
    with pytest.raises(CalibrationError, match=r"for 6 image tokens, and here are 7\. Calibrate at this size"):
        selected(rule, Segment("image", 0, 7))
    with pytest.raises(SettingError, match="both must be shares, 0 to 1"):
        WeightedTokens(1.5)


# -- while sampling ----------------------------------------------------------------------------------------------------


class Weighted(Plainly):
    """The docstring: full steps; else blocks of little weight compute their best tokens, the others everything."""

    def __init__(self, tables, pruned, share, full):
        self.tables, self.count, self.share, self.full, self.kept = tables, int(pruned * BLOCKS), share, full, {}

    def begin(self, step):
        self.step = step
        means = [float(self.tables[f"block.{b}"][step].mean()) for b in range(BLOCKS)]
        self.pruned = sorted(range(BLOCKS), key=means.__getitem__)[: self.count]

    def is_computed(self, block):
        return self.step in self.full or block not in self.pruned

    def put(self, name, block, x, start, compute):
        """``compute`` on all tokens, of which only the chosen ones, the image's from ``start`` on, are used."""
        if self.is_computed(block):
            self.kept[name] = compute(x)
        elif start is not None:
            weights, out = self.tables[f"block.{block}"][self.step], self.kept[name].clone()
            chosen = weights.topk(math.ceil(self.share * IMAGE)).indices + start
            out[:, chosen] = compute(x)[:, chosen]
            self.kept[name] = out
        return self.kept[name]

    def attn(self, name, block, image, text, rope):
        if self.is_computed(int(name.split(".")[1])):
            self.kept[name] = super().attn(name, block, image, text, rope)
        return self.kept[name]

    def ffn(self, name, module, x, layer, stream):
        return self.put(name, layer, x, 0 if stream == "image" else None, module)

    def fused(self, name, block, x, rope, layer):
        if self.is_computed(2 + layer):
            self.kept[f"{name}.inner"] = self.inner_attn(block, x, rope)
        inner = self.kept[f"{name}.inner"]

        def compute(x):
            return block.proj_out(torch.cat([inner, block.act_mlp(block.proj_mlp(x))], dim=2))

        return self.put(name, 2 + layer, x, x.shape[1] - IMAGE, compute)


@pytest.mark.parametrize(("pruned", "share"), [(0.6, 0.25), (1.0, 0.5), (0.4, 0.0)])
def test_blocks_and_tokens_are_computed_by_their_weights(model, pruned, share):
    tables = random_weights()
    expected = sample(SlowFlux(model, Weighted(tables, pruned, share, (0, 4, 8))), flux_inputs(2), STEPS)
    calibration = by_hand(tables, pruned=pruned, share=share)
    reached, trace, stats = accelerated(model, flux_inputs(2), STEPS, "tokencache", calibration=calibration)
    assert trace.strip() == "FpppFpppF"
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0


def test_weights_of_1_are_bit_equal_and_weights_of_0_are_fora(model):
    plain = sample(model, flux_inputs(2), STEPS)
    everything, trace, _ = accelerated(model, flux_inputs(2), STEPS, "tokencache", calibration=by_hand(constant(1)))
    assert trace.strip() == "FpppFpppF"
    assert differences(everything, plain) == [0.0] * STEPS
    nothing = accelerated(model, flux_inputs(2), STEPS, "tokencache", calibration=by_hand(constant(0)))[0]
    fora = accelerated(model, flux_inputs(2), STEPS, "fora", gate="two-phase(early=4, late=2)")[0]
    assert differences(nothing, fora) == [0.0] * STEPS
    assert max(differences(nothing, plain)) > 0


def test_distances_of_1_are_bit_equal(model):
    reached, trace, _ = accelerated(
        model, flux_inputs(1), STEPS, "tokencache", calibration=by_hand(random_weights()), early=1, late=1
    )
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(1), STEPS)) == [0.0] * STEPS


def test_what_is_computed_does_not_depend_on_the_image(model, monkeypatch):
    chosen, select = [], WeightedTokens.select

    def noting(self, state, place, device):
        index = select(self, state, place, device)
        chosen[-1].append((place.part, place.step.index, index[0].tolist()))
        return index

    monkeypatch.setattr(WeightedTokens, "select", noting)
    for seed in (0, 1):
        chosen.append([])
        calibration = by_hand(random_weights())
        accelerated(model, flux_inputs(1, seed=seed), STEPS, "tokencache", calibration=calibration)
    assert chosen[0] == chosen[1]
    assert len({tuple(index) for _, _, index in chosen[0]}) > 5, "blocks and steps differ"


def test_a_block_that_is_pruned_runs_no_attention_and_the_others_do(model):
    ran, tables = [], constant(0.5) | {"block.0": torch.full((STEPS, IMAGE), 0.9)}
    hooks = [
        block.attn.to_q.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks])
    ]
    accelerated(model, flux_inputs(1), STEPS, "tokencache", calibration=by_hand(tables, pruned=0.8))
    for hook in hooks:
        hook.remove()
    assert [ran.count(number) for number in range(BLOCKS)] == [STEPS, 3, 3, 3, 3]


def test_dit_prunes_blocks_and_other_sizes_are_refused():
    denoiser, g = dit(), torch.Generator().manual_seed(0)
    fit = {f"block.{i}": torch.rand(STEPS, 16, generator=g) for i in range(3)}
    _, trace, stats = accelerated(denoiser, dit_inputs(2), STEPS, "tokencache", calibration=by_hand(fit))
    assert trace.strip() == "FpppFpppF"
    assert stats["syncs"] == 0
    fit = {name: table[:, :9] for name, table in fit.items()}
    with pytest.raises(CalibrationError, match="for 9 image tokens, and here are 16"):
        accelerated(denoiser, dit_inputs(1), STEPS, "tokencache", calibration=by_hand(fit))


def test_weights_belong_to_their_steps(model):
    calibration = by_hand(random_weights())
    with pytest.raises(CalibrationError, match=r"calibrated for 9 steps, and the run has 5 steps\. .*resample=True"):
        accelerated(model, flux_inputs(1), 5, "tokencache", calibration=calibration)
    _, trace, _ = accelerated(model, flux_inputs(1), 5, "tokencache", calibration=calibration, resample=True)
    assert trace.strip() == "FpppF"


# -- what is trained ---------------------------------------------------------------------------------------------------


class BlockByBlock(SlowFlux):
    """What every block adds is handed to ``unit(block, compute)``: image and text."""

    unit = staticmethod(lambda block, compute: compute())

    def through(self, image, text, temb, rope):
        for number, block in enumerate(self.blocks()):
            entered = (image, text)

            def compute(block=block, entered=entered):
                left = block(*entered, temb, rope)
                return [left[0] - entered[0], left[1] - entered[1]]

            added = self.unit(number, compute)
            image, text = image + added[0], text + added[1]
        return image, text


def slow_weights(logits, capacity):
    """Newton's method, through all of which the gradient goes."""
    shift = torch.zeros(())
    for _ in range(30):
        w = torch.sigmoid(torch.stack(logits) - shift)
        shift = shift + (w.mean() - capacity) / (w * (1 - w)).mean()
    return torch.sigmoid(torch.stack(logits) - shift)


@pytest.mark.parametrize("capacity", [0.1, 0.5, 0.9])
def test_weights_have_the_mean_that_is_given_and_gradients_that_keep_it(capacity):
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(7, generator=g).requires_grad_() for _ in range(3)]
    weights = torch.stack(weights_of(logits, capacity))
    assert float(weights.detach().mean()) == pytest.approx(capacity, abs=1e-6)
    torch.testing.assert_close(weights, slow_weights(logits, capacity))
    prices = torch.randn(3, 7, generator=g)
    found = torch.autograd.grad((weights * prices).sum(), logits)
    expected = torch.autograd.grad((slow_weights(logits, capacity) * prices).sum(), logits)
    torch.testing.assert_close(found, expected)
    together = torch.autograd.grad(torch.stack(weights_of(logits, capacity)).sum(), logits)
    assert float(torch.cat(together).sum()) == pytest.approx(0, abs=1e-5)


def slow_training(model, steps, runs, rate, capacity):
    """``w f + (1 - w) F`` for the image, with the block's mean weight for text; F is the step before's f."""
    slow = BlockByBlock(model, Plainly())
    logits = {s: [torch.zeros(IMAGE, requires_grad=True) for _ in range(BLOCKS)] for s in range(1, steps)}
    optimizers = {s: adam(logits[s], rate) for s in logits}
    for run in range(runs):
        inputs, kept = flux_inputs(1, seed=run), {}
        x = inputs["hidden_states"]
        for s in range(steps):
            call = {**inputs, "hidden_states": x, "timestep": torch.full((1,), 1 - s / steps)}

            def full(block, compute, kept=kept, s=s):
                added = compute()
                if s == 0:
                    kept[block] = [leaf.detach() for leaf in added]
                return added

            def student(block, compute, kept=kept, s=s):
                fresh, before, w = compute(), kept[block], slow_weights(logits[s], capacity)[block]
                kept[block] = [leaf.detach() for leaf in fresh]
                text = w.mean() * fresh[1] + (1 - w.mean()) * before[1]
                return [w[:, None] * fresh[0] + (1 - w[:, None]) * before[0], text]

            slow.unit = full
            with torch.no_grad():
                y = slow(**call)[0]
            if s:
                slow.unit = student
                loss = ((y - slow(**call)[0]) ** 2).mean()
                update(optimizers[s], loss, logits[s], 5.0)
            x = x - y / steps
    table = torch.stack([torch.ones(BLOCKS, IMAGE), *[slow_weights(logits[s], capacity).detach() for s in logits]])
    return {f"block.{b}": table[:, b] for b in range(BLOCKS)}


def test_weights_are_trained_as_the_docstring_says(model):
    training = TokenWeights(runs=3, rate=0.05, pruned=0.5, share=0.4)
    assert training.capacity == pytest.approx(0.7)
    entry = train(model, training, 4)
    expected = slow_training(model, 4, 3, 0.05, 0.7)
    assert set(entry.fit) == set(expected)
    for name, table in expected.items():
        torch.testing.assert_close(entry.fit[name].float(), table, rtol=1e-4, atol=1e-4)
    assert max(float((table[1:] - 0.7).abs().max()) for table in expected.values()) > 0.02, "something was learned"


def test_a_dit_is_trained_and_sampled_with_what_was_learned():
    denoiser = dit()
    with Trainer(denoiser, TokenWeights(runs=3, rate=0.3, pruned=0.7, share=0.5), 0, {}) as trainer:

        def run():
            with trainer.run(num_steps=STEPS):
                return sample(denoiser, dit_inputs(1), STEPS)[-1]

        trainer.look(run)
        for number in range(3):
            trainer.teach(number, run)
        fit = trainer.entries()["denoiser"].fit
    assert {name: table.shape for name, table in fit.items()} == {f"block.{i}": (STEPS, 16) for i in range(3)}
    calibration = by_hand(dict(fit), pruned=0.7, share=0.5)
    reached, trace, _ = accelerated(denoiser, dit_inputs(1), STEPS, "tokencache", calibration=calibration)
    assert trace.strip() == "FpppFpppF"
    assert 0 < max(differences(reached, sample(denoiser, dit_inputs(1), STEPS))) < 1


@pytest.mark.parametrize(("pruned", "share"), [(0.0, 0.5), (0.5, 1.0), (1.0, 0.0)])
def test_where_all_or_nothing_is_computed_there_is_nothing_to_train(model, pruned, share):
    with pytest.raises(CalibrationError, match=f"pruned={pruned} and share={share} a cached step computes all"):
        train(model, TokenWeights(runs=1, pruned=pruned, share=share), 3)


def test_training_reduces_the_loss_and_spends_the_capacity_unevenly(model, monkeypatch):
    monkeypatch.setattr(slow_trainings, "flux_inputs", lambda batch, seed: flux_inputs(batch))  # one image
    entry = train(model, TokenWeights(runs=20, rate=0.1, pruned=0.8, share=0.2), 3)
    losses = entry.sums["losses"]
    assert float(losses[-1]) < 0.9 * float(losses[0])
    weights = torch.stack(list(entry.fit.values()))[:, 1:]
    assert float(weights.mean()) == pytest.approx(0.36, abs=1e-4)
    assert float(weights.std()) > 0.05, "tokens differ"
    assert float(entry.sums["sampled"]) < float(entry.sums["plain"])
