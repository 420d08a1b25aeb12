"""AT-EDM: ranks by attention, what is left out, and runs beside a slow reference."""

import copy

import diffusers
import pytest
import torch
from reduction_cases import case, place, rng, tokens, twins_of, unet_of_two_levels
from slow_reductions import cosine

import cache4diffusion as c4d
from cache4diffusion.cost import step_cost
from cache4diffusion.engine.attention import AttentionCapture
from cache4diffusion.errors import SettingError
from cache4diffusion.measure.cost import count_flops
from cache4diffusion.tokens import RankedTokens
from cache4diffusion.tokens.ranked import page_rank
from small_denoisers import accelerated, differences, unet_inputs


def maps_of(count=24, batch=2, seed=1, sharpness=2.0):
    return (sharpness * torch.randn(batch, count, count, generator=rng(seed))).softmax(-1)


def planned(maps, x, twins=None, step=0, layer=0, **settings):
    rule, where = RankedTokens(**settings), place(step=step, twins=twins, layer=layer)
    state = rule.init()
    rule.rank(state, where, x, maps)
    return rule.plan(state, where, x)


def test_the_rank_is_a_fixed_point_that_adds_up_to_one():
    maps = maps_of()
    score = page_rank(maps, 50)
    torch.testing.assert_close((maps.mT @ score[..., None])[..., 0], score)
    torch.testing.assert_close(score.sum(1), torch.ones(2))
    for row in range(2):
        values, vectors = torch.linalg.eig(maps[row].mT)
        vector = vectors[:, (values - 1).abs().argmin()].real
        torch.testing.assert_close(score[row], vector / vector.sum(), atol=1e-5, rtol=1e-4)


def test_a_doubly_stochastic_map_ranks_all_tokens_alike():
    maps = maps_of()
    for _ in range(200):  # Sinkhorn's iteration
        maps = maps / maps.sum(1, keepdim=True)
        maps = maps / maps.sum(2, keepdim=True)
    torch.testing.assert_close(page_rank(maps, 20), torch.full((2, 24), 1 / 24), atol=1e-6, rtol=1e-4)


def test_permuting_tokens_permutes_the_ranks():
    maps, order = maps_of(), torch.randperm(24, generator=rng(3))
    torch.testing.assert_close(page_rank(maps[:, order][:, :, order], 9), page_rank(maps, 9)[:, order])


def test_the_lowest_ranks_are_left_out_and_copy_the_most_alike():
    x, maps = tokens(), maps_of()
    plan, score = planned(maps, x, ratio=0.4), page_rank(maps, 20)
    for row in range(2):
        kept = plan.kept[row].tolist()
        assert kept == sorted(score[row].topk(24 - int(0.4 * 24)).indices.tolist())
        for i, slot in enumerate(plan.owner[row].tolist()):
            nearest = max(kept, key=lambda j: cosine(x[row, i], x[row, j]))
            assert kept[slot] == (i if i in kept else nearest)


def test_what_is_kept_goes_in_and_comes_back_bit_for_bit():
    x = tokens()
    plan = planned(maps_of(), x)
    assert torch.equal(plan.take(x), x.gather(1, plan.kept[..., None].expand(-1, -1, 5)))
    back = plan.give(plan.take(x))
    assert torch.equal(back.gather(1, plan.kept[..., None].expand(-1, -1, 5)), plan.take(x))


def test_twins_go_by_the_mean_of_their_maps():
    x, maps = tokens(), maps_of()
    plan = planned(maps, x, twins=torch.ones(2, dtype=torch.bool))
    kept = page_rank(maps.mean(0, keepdim=True), 20).topk(15).indices[0].sort().values
    assert torch.equal(plan.kept, kept.expand(2, -1))
    assert torch.equal(plan.owner[0], plan.owner[1])


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 24), (0.5, 12), (1.0, 1)])
def test_one_token_is_always_left(ratio, left):
    plan = planned(maps_of(), tokens(), ratio=ratio)
    assert (24 if plan is None else plan.length) == left


def test_early_on_the_blocks_at_both_ends_are_whole():
    whole = {
        (step, layer): planned(maps_of(), tokens(), step=step, layer=layer, early=0.3) is None
        for step in (0, 14, 15, 49)
        for layer in range(4)
    }
    assert {key for key, is_whole in whole.items() if is_whole} == {(s, layer) for s in (0, 14) for layer in (0, 3)}
    assert RankedTokens(early=0.3).needs_num_steps and not RankedTokens().needs_num_steps
    assert planned(maps_of(), tokens(), early=1.0, step=49) is None


def test_the_map_that_is_shown_is_that_of_the_host():
    """Also in chunks, with a mask, and with keys that several heads share."""
    query, key = torch.randn(2, 4, 9, 6, generator=rng()), torch.randn(2, 2, 9, 6, generator=rng(1))
    mask = torch.rand(2, 1, 9, 9, generator=rng(2)) > 0.3
    mask |= torch.eye(9, dtype=torch.bool)
    for chunk in (4, 512):
        with AttentionCapture("map", chunk) as capture:
            torch.nn.functional.scaled_dot_product_attention(query, key, key, mask, enable_gqa=True)
        logits = query @ key.repeat_interleave(2, 1).mT / 6**0.5
        expected = logits.masked_fill(~mask, float("-inf")).softmax(-1).mean(1)
        torch.testing.assert_close(capture.seen["map"], expected)


class Slowly:
    """DiT, whose full steps are looked at, and whose other steps run every part token by token for those kept."""

    def __init__(self, denoiser, interval, ratio):
        self.denoiser, self.step, self.plans = copy.deepcopy(denoiser), -1, {}
        self.interval, self.ratio = interval, ratio
        for layer, block in enumerate(self.denoiser.transformer_blocks):
            block.attn1.forward = self.looking(layer, block, block.attn1.forward)
            block.ff.forward = self.short(layer, block.ff.forward)
            block.forward = self.seeing(layer, block.forward)
        self.entering = {}

    def seeing(self, layer, found):
        def forward(hidden_states, *args, **kwargs):
            self.entering[layer] = hidden_states
            return found(hidden_states, *args, **kwargs)

        return forward

    def looking(self, layer, block, found):
        attn, short = block.attn1, self.short(layer, found)

        def forward(x, *args, **kwargs):
            if self.step % self.interval:
                return short(x, *args, **kwargs)
            query, key = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k))
            maps = (query @ key.mT * attn.scale).softmax(-1).mean(1)
            self.plans[layer] = [self.plan(a, e) for a, e in zip(maps, self.entering[layer], strict=True)]
            return found(x, *args, **kwargs)

        return forward

    def plan(self, attention, entering):
        score = torch.full((len(attention),), 1 / len(attention))
        for _ in range(20):
            score = torch.stack([(attention[:, j] * score).sum() for j in range(len(attention))])
        kept = sorted(score.topk(len(score) - int(self.ratio * len(score))).indices.tolist())
        return kept, [
            i if i in kept else max(kept, key=lambda j, i=i: cosine(entering[i], entering[j]))
            for i in range(len(score))
        ]

    def short(self, layer, found):
        def forward(x, *args, **kwargs):
            if self.step % self.interval == 0:
                return found(x, *args, **kwargs)
            rows = []
            for row, (kept, owner) in zip(x, self.plans[layer], strict=True):
                out = found(row[kept][None], *args, **kwargs)[0]
                rows.append(torch.stack([out[kept.index(j)] for j in owner]))
            return torch.stack(rows)

        return forward

    def __call__(self, **kwargs):
        self.step += 1
        return self.denoiser(**kwargs)


def test_runs_are_the_slow_reference():
    denoiser, inputs = case("dit")
    slow = Slowly(denoiser, 3, 0.4)

    def run(call):
        outputs, x = [], inputs["hidden_states"]
        with torch.no_grad():
            for i in range(6):
                (out,) = call(**{**inputs, "hidden_states": x, "timestep": torch.full((2,), 900 - 100 * i)})
                outputs.append(out.clone())
                x = x - out / 5
        return outputs

    expected = run(slow)
    with c4d.accelerate(denoiser, "at-edm", interval=3, early=0.0) as handle, handle.run(num_steps=6):
        reached = run(denoiser)
    assert handle.trace.strip() == "FrrFrr"
    assert max(differences(reached, expected)) <= 1e-5
    assert reached[1].sub(reached[0]).abs().max() > 1e-3


def test_full_steps_are_the_hosts_own_and_maps_are_made_on_them_alone(monkeypatch):
    """What is looked at runs as always; the other steps make no map."""
    denoiser, inputs = twins_of("unet")
    made, plain = [], copy.deepcopy(denoiser)
    look = AttentionCapture._look
    monkeypatch.setattr(AttentionCapture, "_look", lambda self, *args: made.append(handle.trace) or look(self, *args))
    call = {**inputs, "timestep": torch.tensor([500, 500])}
    with c4d.accelerate(denoiser, "at-edm", interval=2) as handle, torch.no_grad(), handle.run(num_steps=4):
        counts = []
        for step in range(4):
            (out,) = denoiser(**call)
            counts.append(len(made))
            if step % 2 == 0:
                assert torch.equal(out, plain(**call)[0])
    assert counts[0] == counts[1] > 0
    assert counts[2] == counts[3] == 2 * counts[0]


def test_attention_that_cannot_be_seen_is_noted_and_left_whole():
    denoiser, inputs = case("dit")
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(diffusers.models.attention_processor.AttnProcessor())  # by plain products
    with pytest.warns(UserWarning, match="0 of 2 steps were cached"):
        _, trace, stats = accelerated(denoiser, inputs, 2, "at-edm")
    assert trace.strip() == "FF"
    assert any("no attention was seen in transformer_blocks.0" in note for note in stats["notes"])


class InTurns:
    """A processor that attends to the last row apart from the others, as those of perturbed guidance do."""

    def __call__(self, attn, x, *args, **kwargs):
        plain = diffusers.models.attention_processor.AttnProcessor2_0()
        return torch.cat([plain(attn, rows, *args, **kwargs) for rows in (x[:-1], x[-1:]) if len(rows)])


def test_rows_that_are_attended_to_apart_are_not_ranked_by_the_first_ones():
    denoiser, inputs = twins_of("dit")
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(InTurns())
    with pytest.warns(UserWarning, match="0 of 2 steps were cached"):
        _, trace, stats = accelerated(denoiser, inputs, 2, "at-edm", interval=2)
    assert trace.strip() == "FF"
    assert any("no attention was seen in transformer_blocks.0 for all rows" in note for note in stats["notes"])


def test_levels_that_are_not_served_are_not_looked_at(monkeypatch):
    """Their maps would be made for nothing, and their FLOPs be missing."""
    seen, look = [], AttentionCapture._look
    monkeypatch.setattr(
        AttentionCapture, "_look", lambda self, q, *rest: seen.append(q.shape[2]) or look(self, q, *rest)
    )
    denoiser, call = unet_of_two_levels(), {**unet_inputs(2), "timestep": torch.tensor(500)}
    with c4d.accelerate(denoiser, "at-edm", max_downsample=1.0, early=0.0) as handle, torch.no_grad():
        with handle.run(num_steps=1):
            denoiser(**call)
        seen.clear()
        with handle.run(num_steps=2):
            counted = [count_flops(lambda: denoiser(**call)) for _ in range(2)]
        expected = [step_cost(handle._engines[0]).of(record) for record in handle.trace.of()]
    assert set(seen) == {64}
    assert expected == counted


@pytest.mark.parametrize("settings", [{"ratio": 1.5}, {"iterations": 0}, {"early": -0.1}, {"early_whole": 2.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        RankedTokens(**settings)
