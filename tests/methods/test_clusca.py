"""ClusCa: clusters, their representatives, and what these move, against a slow reference written from the card."""

import dataclasses

import pytest
import torch
from slow_tokens import SlowClusCa, SurveyedFlux, slow_kmeans

import cache4diffusion as c4d
from cache4diffusion.engine import tokens as engine_tokens
from cache4diffusion.errors import AnatomyError, SettingError
from cache4diffusion.gates import FixedInterval, Step
from cache4diffusion.predictors import Reuse, Taylor
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import ClusterTokens, Segment, TokenPlace
from cache4diffusion.tokens.clusters import kmeans, representatives
from small_denoisers import (
    LinearCounter,
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
CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# -- clusters --------------------------------------------------------------------------------------------------------


def test_labels_and_centroids_are_the_slow_ones():
    x = torch.randn(2, 14, 3, generator=rng())
    labels, centroids = kmeans(x, x[:, :4].clone(), 6)
    for row in range(2):
        slow = [x[row, i] for i in range(4)]
        assert labels[row].tolist() == slow_kmeans(x[row], slow, 6)
        torch.testing.assert_close(centroids[row], torch.stack(slow))


def test_permuting_tokens_permutes_the_labels():
    x, begin = torch.randn(1, 20, 4, generator=rng(1)), torch.randn(1, 5, 4, generator=rng(2))
    order = torch.randperm(20, generator=rng(3))
    labels, centroids = kmeans(x, begin, 10)
    permuted, same = kmeans(x[:, order], begin, 10)
    assert torch.equal(permuted, labels[:, order])
    torch.testing.assert_close(same, centroids)


def test_more_assignments_than_are_needed_change_nothing():
    x = torch.randn(2, 30, 3, generator=rng(4))
    for one, other in zip(kmeans(x, x[:, :3], 40), kmeans(x, x[:, :3], 60), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clusters_without_tokens_do_no_harm(dtype):
    """All tokens are equal: every cluster but one is empty."""
    rule, x = ClusterTokens(4, gamma=0.5, spreads_text=True), torch.ones(2, 9, 3, dtype=dtype)
    survey = rule.init()
    rule.survey(survey, {"image": x}, None)
    assert survey.centroids["image"].isfinite().all()
    assert set(survey.labels["image"].flatten().tolist()) == {0}
    place = TokenPlace("a.ff", "ffn", 0, 1, Step(4, 9), (Segment("image", 0, 9),), 2, survey=survey)
    index = rule.select(rule.init(), place, CPU)
    assert all(len(set(row)) == 4 and row == sorted(row) for row in index.tolist())
    fresh = torch.full((2, 4, 3), 3.0, dtype=dtype)
    (out,) = rule.spread(rule.init(), place, [x], lambda: [x], index, [fresh])
    is_computed = torch.zeros(2, 9).scatter_(1, index, 1.0)
    assert torch.equal(out, torch.where(is_computed[..., None] > 0, 3.0, 2.0).expand_as(out).to(dtype))


def test_a_representative_is_the_members_with_the_highest_noise():
    labels, noise = torch.randint(0, 4, (3, 25), generator=rng(5)), torch.rand(1, 25, generator=rng(6))
    labels[:, :4] = torch.arange(4)
    expected = [
        sorted(max((i for i in range(25) if row[i] == c), key=lambda i: float(noise[0, i])) for c in range(4))
        for row in labels.tolist()
    ]
    assert representatives(labels, noise, 4).tolist() == expected


def test_the_number_of_tokens_depends_on_nothing_but_their_number():
    rule, shapes = ClusterTokens(5), set()
    for seed in range(3):
        survey = rule.init()
        rule.survey(survey, {"image": torch.randn(1, 12, 4, generator=rng(seed)).sign()}, None)
        place = TokenPlace("a.ff", "ffn", 0, 1, Step(seed, 9), (Segment("image", 0, 12),), 1, survey=survey)
        shapes.add(rule.select(rule.init(), place, CPU).shape)
    assert shapes == {(1, 5)}


def test_draws_are_anew_at_every_step_and_part_and_the_same_for_equal_seeds():
    def drawn(seed=0, step=3, part="a.ff"):
        rule = ClusterTokens(3, seed=seed)
        survey = rule.init()
        rule.survey(survey, {"image": torch.randn(2, 40, 4, generator=rng())}, None)
        place = TokenPlace(part, "ffn", 0, 1, Step(step, 9), (Segment("image", 0, 40),), 2, survey=survey)
        return rule.select(rule.init(), place, CPU).tolist()

    assert drawn() == drawn()
    assert len({str(found) for found in (drawn(), drawn(1), drawn(step=4), drawn(part="b.ff"))}) == 4


# -- what they move --------------------------------------------------------------------------------------------------


def one_cluster(gamma, variant="ours"):
    rule = ClusterTokens(1, gamma, variant=variant)
    survey = rule.init()
    rule.survey(survey, {"image": torch.randn(2, 7, 4, generator=rng())}, None)
    place = TokenPlace("a.ff", "ffn", 0, 1, Step(3, 9), (Segment("image", 0, 7),), 2, survey=survey)
    state = rule.init()
    rule.observe(state, dataclasses.replace(place, step=Step(2, 9)), {})
    return rule, state, place, rule.select(state, place, CPU)


@pytest.mark.parametrize("variant", ["ours", "official"])
def test_one_cluster_adds_gamma_times_the_difference_to_every_token(variant):
    rule, state, place, index = one_cluster(0.25, variant)
    f0, y = torch.randn(2, 7, 5, generator=rng(1)), torch.randn(2, 1, 5, generator=rng(2))
    (out,) = rule.spread(state, place, [f0], lambda: [f0], index, [y])
    expected = (f0 + 0.25 * (y - f0)).scatter(1, index[..., None].expand(-1, -1, 5), y)
    torch.testing.assert_close(out, expected)


def test_propagation_smaller_than_the_spacing_of_bfloat16_adds_up():
    """In the released arithmetic a step of it is lost in a bfloat16 slot; here the sum is kept in float32."""
    rule, state, place, index = one_cluster(0.002, "official")
    f0 = torch.full((2, 7, 5), 1.0, dtype=torch.bfloat16)
    y = torch.full((2, 1, 5), 2.0, dtype=torch.bfloat16)
    for _ in range(10):
        (out,) = rule.spread(state, place, [f0], lambda: [f0], index, [y])
    others = [i for i in range(7) if i not in index[0].tolist()]
    torch.testing.assert_close(out[0, others].float(), torch.full((6, 5), 2 - 0.998**10), atol=4e-3, rtol=0)
    assert (out[0, others] > 1).all()


@pytest.mark.parametrize("variant", ["ours", "official"])
def test_a_cluster_of_which_nothing_was_computed_stays_as_predicted(variant):
    """Of two tokens with the same noise one is left out; and tied branches go by the first one's clusters."""
    rule, state, place, _ = one_cluster(0.5, variant)
    rule = dataclasses.replace(rule, clusters=2)
    place.survey.labels["image"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, -1)
    f0, y = torch.randn(2, 7, 5, generator=rng(1)), torch.randn(2, 2, 5, generator=rng(2))
    (out,) = rule.spread(state, place, [f0], lambda: [f0], torch.tensor([[0, 2], [0, 1]]), [y])
    assert torch.equal(out[:, 3:], f0[:, 3:])
    assert not torch.equal(out[:, :3], f0[:, :3])


@pytest.mark.parametrize("variant", ["ours", "official"])
def test_reuse_and_taylor_of_order_0_are_one(model, variant):
    """What tokens are moved by is the rule's to remember: it is not moved twice where the predictor keeps it, too."""
    gate, rule = FixedInterval(4, anchor="warmup", warmup=3), ClusterTokens(3, 0.3, variant=variant)
    runs = [
        accelerated(model, flux_inputs(2), STEPS, c4d.Composition(Parts(), gate, predictor, tokens=rule))[0]
        for predictor in (Reuse(), Taylor(0))
    ]
    assert max(differences(*runs)) <= 1e-6


@pytest.mark.parametrize("variant", ["ours", "official"])
@pytest.mark.parametrize(("order", "gamma"), [(0, 0.3), (1, 0.0), (2, 0.3)])
def test_runs_are_the_slow_references(model, variant, order, gamma):
    inputs = flux_inputs(2)
    slow = SlowClusCa(model, 4, order, 3, 3, gamma, "official" if order == 0 else variant)
    expected = sample(SurveyedFlux(model, slow), inputs, STEPS)
    settings = {"interval": 4, "order": order, "clusters": 3, "gamma": gamma, "variant": variant}
    reached, trace, _ = accelerated(model, inputs, STEPS, "clusca", **settings)
    assert trace.strip() == "FFFpppFpppFp"
    assert max(differences(reached, expected)) <= 2e-5


def test_without_clusters_it_is_taylorseer_bit_for_bit(model):
    inputs = flux_inputs(2)
    reached, _, _ = accelerated(model, inputs, STEPS, "clusca", interval=4, clusters=0)
    expected, _, _ = accelerated(model, inputs, STEPS, "taylorseer", interval=4)
    assert differences(reached, expected) == [0.0] * STEPS


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_with_a_cluster_per_token_every_mlp_is_computed(model, case):
    denoiser, inputs = (model, flux_inputs(2)) if case == "flux" else (dit(), dit_inputs(2))
    rule = ClusterTokens(99, gamma=1.0)
    gate = FixedInterval(4, anchor="warmup", warmup=3)
    composition = c4d.Composition(Parts(kinds=("ffn",)), gate, Taylor(1), tokens=rule)
    reached, trace, _ = accelerated(denoiser, inputs, STEPS, composition)
    assert "p" in trace.strip()
    assert max(differences(reached, sample(denoiser, inputs, STEPS))) <= 1e-5


@pytest.mark.parametrize("order", [0, 1])
def test_at_gamma_1_all_members_carry_their_representatives_output(model, order, monkeypatch):
    written = {}
    spread = ClusterTokens.spread

    def noted(rule, state, place, predicted, last, index, fresh):
        out = spread(rule, state, place, predicted, last, index, fresh)
        if place.segments[0].kind == "image":
            written[place.part, place.step.index] = (place.survey.labels["image"], index, fresh[0], out[0])
        return out

    monkeypatch.setattr(ClusterTokens, "spread", noted)
    accelerated(model, flux_inputs(1), 5, "clusca", interval=4, order=order, clusters=3, gamma=1.0)
    assert len(written) == 4
    for labels, index, fresh, out in written.values():
        found = {int(labels[0, i]): fresh[0, j] for j, i in enumerate(index[0])}
        for i, label in enumerate(labels[0].tolist()):
            torch.testing.assert_close(out[0, i], found[label])


def test_halves_of_batched_guidance_have_one_clustering(monkeypatch):
    drawn, take = [], engine_tokens.take
    monkeypatch.setattr(engine_tokens, "take", lambda x, index: (drawn.append(index), take(x, index))[1])
    inputs = dit_inputs(2)
    twins = {**inputs, "hidden_states": inputs["hidden_states"][:1].repeat(2, 1, 1, 1)}
    accelerated(dit(), twins, 6, "clusca", interval=3, clusters=4)
    assert drawn
    assert all(torch.equal(index[0], index[1]) for index in drawn)
    drawn.clear()
    accelerated(dit(), inputs, 6, "clusca", interval=3, clusters=4)
    assert any(not torch.equal(index[0], index[1]) for index in drawn), "two images have their own"


def test_fused_parts_are_predicted_alone_and_nothing_of_them_is_kept(model):
    linears = [linear for block in model.single_transformer_blocks for linear in (block.proj_mlp, block.proj_out)]
    counts, held = [], []
    for clusters in (4, 0):
        with c4d.accelerate(model, "clusca", clusters=clusters) as handle:
            handle.prepare(**flux_inputs(1), timestep=torch.ones(1))  # looking at the denoiser runs it, too
            with LinearCounter(linears) as counter, handle.run(num_steps=5):
                sample(model, flux_inputs(1), 5, before=lambda i: counts.append(counter.count))
                held.append(handle.memory["held"])
            assert counter.count == counts[-1] == counts[-2] == 3 * len(linears), "steps 3 and 4 are cached"
    assert held[0] - held[1] == 8 * 17 + 2 * 4 * 32 * 4, "labels and centroids"


def test_nothing_of_attention_is_looked_at():
    assert ClusterTokens().observes == frozenset()
    assert not ClusterTokens().needs_num_steps


@pytest.mark.parametrize("settings", [{"clusters": -1}, {"gamma": 1.5}, {"iterations": 0}, {"variant": "theirs"}])
def test_bad_settings_are_refused_in_words(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        ClusterTokens(**settings)


def test_a_u_net_is_refused():
    with pytest.raises(AnatomyError, match="has no stack"):
        accelerated(unet(), unet_inputs(1), 3, "clusca")
