"""DuCa: conservative and aggressive steps, against a slow reference written from the card."""

import pytest
import torch
from slow_tokens import SlowDuCa, ToCaParts

import cache4diffusion as c4d
from cache4diffusion.engine import tokens as engine_tokens
from cache4diffusion.errors import AnatomyError, CompositionError, SettingError
from cache4diffusion.gates import AccumulatedChange, FixedInterval, Speculative
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import Parts, PartsAndStream
from cache4diffusion.strip import planned_strip
from cache4diffusion.tokens import TopScore
from small_denoisers import (
    Plainly,
    accelerated,
    differences,
    dit,
    dit_inputs,
    flux_inputs,
    sample,
    unet,
    unet_inputs,
)

STEPS = 12
GATE = FixedInterval(4, anchor="warmup", warmup=3)
RULE = TopScore(0.3, interval=4)


def composed(pattern, rule=RULE, counted="since"):
    return c4d.Composition(PartsAndStream(pattern=pattern, counted=counted), GATE, Reuse(), tokens=rule)


@pytest.mark.parametrize(
    ("settings", "strip"),
    [
        ({"interval": 3, "warmup": 1}, "FpcFpcFpcFpc"),
        ({"interval": 3, "warmup": 1, "order": "until"}, "FcpFcpFcpFcp"),
        ({"interval": 5, "warmup": 1}, "FpcpcFpcpcFp"),
        ({"interval": 4, "warmup": 1, "order": "until"}, "FpcpFpcpFpcp"),
        ({"interval": 4, "warmup": 3, "full_steps": "open-sora"}, "FFFpFpcpFpcp"),
        ({"interval": 1}, "FFFFFFFFFFFF"),
    ],
)
def test_strips_are_the_cards(model, settings, strip):
    assert planned_strip(c4d.method("duca", **settings).compose(), STEPS) == strip
    reached, trace, _ = accelerated(model, flux_inputs(1), STEPS, "duca", **settings)
    assert trace.strip() == strip
    assert len(reached) == STEPS


def test_steps_of_dit_alternate_by_the_count_down():
    """The card: residues odd are conservative, even aggressive, of a count that goes down to a full step at 0."""
    made = c4d.method("duca", interval=3, full_steps="dit", warmup=1, order="until").compose()
    strip = planned_strip(made, 50)
    full = [i for i, letter in enumerate(strip) if letter == "F"] + [50]
    for i, letter in enumerate(strip):
        until = next(step for step in full if step >= i) - i
        assert letter == ("F" if until == 0 else "p" if until % 2 else "c")


def test_without_tokens_the_interval_of_dit_is_not_modulated():
    """As in the code, and in ToCa: then it is FORA's, counted down."""
    settings = {"interval": 3, "full_steps": "dit", "warmup": 1, "order": "until"}
    made = c4d.method("duca", recompute_ratio=0.0, **settings).compose()
    assert planned_strip(made, 24) == "Fp" + "Fcp" * 7 + "F"


@pytest.mark.parametrize("score", ["attention", "value_norm"])
def test_runs_are_the_slow_references(model, score):
    inputs = flux_inputs(2)
    reference = SlowDuCa(model, ToCaParts(model, 4, 0.3, "constant", score=score), aggressive=(4, 8))
    expected = sample(reference, inputs, STEPS)
    settings = {"interval": 4, "recompute_ratio": 0.3, "score": score}
    reached, trace, _ = accelerated(model, inputs, STEPS, "duca", **settings)
    assert trace.strip() == "FFFpcpFpcpFp"
    assert max(differences(reached, expected)) <= 1e-5


def test_all_conservative_is_toca_bit_for_bit(model):
    inputs = flux_inputs(2)
    reached, trace, _ = accelerated(model, inputs, STEPS, composed("c"))
    expected, toca, _ = accelerated(model, inputs, STEPS, "toca", recompute_ratio=0.3, schedule="constant")
    assert trace.strip() == toca.strip() == "FFFpppFpppFp"
    assert differences(reached, expected) == [0.0] * STEPS


def test_all_aggressive_is_reuse_of_the_final_hidden_state(model):
    inputs = flux_inputs(2)
    aggressive = [i for i, letter in enumerate("FFFcccFcccFc") if letter == "c"]
    expected = sample(SlowDuCa(model, Plainly(), aggressive), inputs, STEPS)
    reached, trace, _ = accelerated(model, inputs, STEPS, composed("j"))
    assert trace.strip() == "FFFcccFcccFc"
    assert max(differences(reached, expected)) <= 1e-6


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_under_a_frozen_timestep_an_aggressive_step_is_the_step_before(model, case):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (dit(), dit_inputs(2))
    clock = torch.full((2,), 0.5) if case == "flux" else torch.full((2,), 500)
    outputs = []
    with c4d.accelerate(denoiser, "duca", interval=4, warmup=1, recompute_ratio=0.3) as handle, torch.no_grad():
        with handle.run(num_steps=5):
            for i in range(5):
                latent = inputs["hidden_states"] * (1 + 0.1 * i)
                (out,) = denoiser(**{**inputs, "hidden_states": latent, "timestep": clock})
                outputs.append(out.clone())
        assert handle.trace.strip() == "FpcpF"
    assert torch.equal(outputs[2], outputs[1])
    assert not torch.equal(outputs[1], outputs[0])
    assert not torch.equal(outputs[3], outputs[2])


def test_an_aggressive_step_runs_no_block_and_counts_so(model):
    inputs = flux_inputs(1)
    ran = []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    inside = [block.norm1.linear if hasattr(block, "norm1") else block.norm.linear for block in blocks]
    hooks = [module.register_forward_hook(lambda *a: ran.append(1)) for module in inside]
    with c4d.accelerate(model, "duca", interval=3, warmup=1, recompute_ratio=0.3) as handle:
        counts = []
        with handle.run(num_steps=6):
            sample(model, inputs, 6, before=lambda i: (counts.append(len(ran)), ran.clear()))
        counts.append(len(ran))
        rested = [dict(record.rested or ()) for record in handle.trace.of()]
    for hook in hooks:
        hook.remove()
    assert counts[1:] == [5, 5, 0, 5, 5, 0]
    assert set(rested[2].values()) == {1.0}
    assert len(rested[2]) == len(blocks)


def test_random_tokens_are_those_of_both_halves(monkeypatch):
    drawn, found = [], engine_tokens.put

    def put(x, index, values):
        drawn.append(index.clone())
        return found(x, index, values)

    monkeypatch.setattr(engine_tokens, "put", put)
    inputs = dit_inputs(2)
    inputs["hidden_states"] = inputs["hidden_states"][:1].repeat(2, 1, 1, 1)
    accelerated(dit(), inputs, 6, "duca", interval=3, warmup=1, recompute_ratio=0.3)
    assert drawn
    assert all(torch.equal(index[0], index[1]) for index in drawn)


def test_memory_is_that_of_toca_and_one_stream(model):
    inputs, held = flux_inputs(2), []
    for method in ("duca", "toca"):
        settings = {"recompute_ratio": 0.3, "schedule": "constant", "score": "value_norm"}
        with c4d.accelerate(model, method, **settings) as handle, handle.run(num_steps=5):
            sample(model, inputs, 5)
            held.append(handle.memory["held"])
    assert held[0] - held[1] == inputs["hidden_states"][..., 0].numel() * 32 * 4


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_a_u_net_is_refused_in_words():
    with pytest.raises(AnatomyError, match="what leaves its last block is kept"):
        accelerated(unet(), unet_inputs(1), 3, c4d.Composition(PartsAndStream(), GATE, Reuse()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decide": "row"}, "one for all rows"),
        ({"gate": AccumulatedChange(0.1), "site": PartsAndStream(counted="until")}, "does not know the next one"),
        ({"gate": Speculative(0.3)}, "no input on a cached step"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(changes, words):
    with pytest.raises(CompositionError, match=words):
        c4d.Composition(**{"site": PartsAndStream(), "gate": GATE, "predictor": Reuse(), **changes})


@pytest.mark.parametrize("settings", [{"pattern": ""}, {"pattern": "cx"}, {"counted": "from"}, {"decisions": "part"}])
def test_bad_patterns_are_refused(settings):
    with pytest.raises(SettingError, match="PartsAndStream"):
        PartsAndStream(**settings)


def test_flops_of_a_partial_step_are_those_of_its_tokens(model):
    """A ratio that varies over layers is counted as it was, part by part."""
    rule = TopScore(0.3, interval=4)
    composition = c4d.Composition(Parts(kinds=("ffn",)), GATE, Reuse(), tokens=rule)
    with c4d.accelerate(model, composition) as handle:
        with handle.run(num_steps=6):
            sample(model, flux_inputs(1), 6)
        rested = dict(handle.trace.of()[4].rested)
        image, text = int(0.3 * 12), int(0.3 * 5)
        assert rested["transformer_blocks.0.ff"] == pytest.approx(1 - image / 12)
        assert rested["transformer_blocks.0.ff_context"] == pytest.approx(1 - text / 5)
