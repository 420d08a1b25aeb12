"""ToCa's four scores and its schedules: each term by itself, then whole runs against a slow reference from the card.

The released code is Shenyi-Z/ToCa; FLUX has a reference of its own in test_toca.py.
"""

import copy
import dataclasses
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import cache4diffusion as c4d
import toys
from anatomy_zoo import pixart
from cache4diffusion import zoo
from cache4diffusion.engine import tokens as engine_tokens
from cache4diffusion.engine.attention import AttentionCapture
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.maps import patch_grid
from cache4diffusion.engine.tokens import is_text_first
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import FixedInterval, ModulatedInterval, Step
from cache4diffusion.gates.modulated import modulated_steps
from cache4diffusion.methods import Fora, ToCa
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import RoutedTokens, Segment, TokenPlace, TopScore
from cache4diffusion.tokens.topk import with_bonus
from small_denoisers import accelerated, differences, dit, dit_inputs, flux, flux_inputs, sample

CPU = torch.device("cpu")
GRID = (1, 4, 5)


def place(batch=2, grid=None, twins=None, kind="ffn", layer=0, step=4, num_steps=50):
    segments = (Segment("image", 0, 20, grid),)
    return TokenPlace("a.ff", kind, layer, 28, Step(step, num_steps), segments, batch, twins)


def seen(batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    names = ("attention", "value_norm", "cross_attention", "cross_attention_of_twins")
    return {name: torch.rand(batch, 20, generator=rng) + (name != "attention") for name in names}


def chosen(rule, observed, where, times=1):
    """The last of some selections in a row."""
    state = rule.init()
    rule.observe(state, where, observed)
    return [rule.select(state, where, CPU) for _ in range(times)][-1]


def unit(values):
    return values / values.norm(dim=1, keepdim=True)


def top(score, k):
    return score.topk(k, dim=1).indices.sort(dim=1).values


# -- each score ------------------------------------------------------------------------------------------------------


def test_s2_is_one_plus_the_entropy_normalised():
    observed = seen()
    expected = top(unit(1 + observed["cross_attention"]), 5)
    assert torch.equal(chosen(TopScore(0.25, cross_weight=1.0), observed, place()), expected)


def test_s1_and_s2_are_balanced_by_their_weight():
    observed = seen()
    s1, s2 = unit(observed["attention"]), unit(1 + observed["cross_attention"])
    for weight in (0.0, 0.3, 1.0):
        rule = TopScore(0.25, cross_weight=weight)
        assert torch.equal(chosen(rule, observed, place()), top((1 - weight) * s1 + weight * s2, 5))


def test_a_rule_asks_only_for_what_its_weights_need():
    assert TopScore().observes == {"attention"}
    assert TopScore(cross_weight=1.0).observes == {"cross_attention"}
    assert TopScore(cross_weight=0.5, bonus=0.4).observes == {"attention", "cross_attention", "grid"}
    assert TopScore(score="value_norm").observes == {"value_norm"}
    assert TopScore(score="random").observes == frozenset()
    assert TopScore(0.0, cross_weight=0.5, bonus=0.4).observes == frozenset()


def test_age_is_added_to_every_kind_of_s1():
    observed = seen(1)
    for score in ("attention", "value_norm"):
        rule = TopScore(0.25, age_weight=0.4, interval=4, score=score)
        first = top(unit(observed[score]), 5)
        age = torch.ones(1, 20).scatter_(1, first, 0.0)
        assert torch.equal(chosen(rule, observed, place(1), times=2), top(unit(observed[score]) + 0.4 * age / 4, 5))
    rule = TopScore(0.25, age_weight=100.0, score="random")
    state, taken = rule.init(), set()
    rule.observe(state, place(1), {})
    for _ in range(4):
        taken |= set(rule.select(state, place(1), CPU)[0].tolist())
    assert taken == set(range(20)), "with a heavy weight the oldest are drawn first, so each gets its turn"


def windows(grid, size):
    """Token indices of every window, by plain loops."""
    frames, height, width = grid
    for frame, top_row, left in itertools.product(range(frames), range(0, height, size), range(0, width, size)):
        yield [
            (frame * height + row) * width + column
            for row in range(top_row, min(top_row + size, height))
            for column in range(left, min(left + size, width))
        ]


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 4, 5), (2, 3, 7), (1, 2, 9)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_s4_raises_the_highest_token_of_each_window_and_no_other(grid, size):
    score = torch.rand(3, grid[0] * grid[1] * grid[2])
    raised = with_bonus(score, grid, size, 0.6)
    for row in range(3):
        for window in windows(grid, size):
            best = max(window, key=lambda token: score[row, token])
            for token in window:
                expected = score[row, token] * (1.6 if token == best else 1.0)
                assert raised[row, token] == pytest.approx(float(expected))


def test_s4_raises_the_highest_token_where_scores_are_below_0():
    """As the value norms' are, wherever values are longer than 1."""
    score = -torch.rand(2, 16) - 0.5
    raised = with_bonus(score, (1, 4, 4), 2, 0.6)
    is_raised = raised > score
    assert torch.equal(raised == score, ~is_raised)
    for window in windows((1, 4, 4), 2):
        assert torch.equal(is_raised[:, window].nonzero()[:, 1], score[:, window].argmax(1))


def test_s4_spreads_the_selection_over_the_image():
    """With one token per window to choose and a bonus that outweighs all else, every window gets one."""
    grid, rule = (1, 4, 4), TopScore(0.25, bonus=100.0, window=2)
    where = dataclasses.replace(place(), segments=(Segment("image", 0, 16, grid),))
    observed = {"attention": torch.rand(2, 16) + torch.arange(16.0)}  # the lower half is looked at far more
    plain = chosen(dataclasses.replace(rule, bonus=0.0), observed, where)
    assert (plain >= 8).all()
    for row in chosen(rule, observed, where).tolist():
        assert sorted(sum(token in row for token in window) for window in windows(grid, 2)) == [1, 1, 1, 1]


def test_s4_comes_after_the_age_and_leaves_text_alone():
    rule, observed = TopScore(0.25, age_weight=0.4, bonus=0.6, window=2), seen(1)
    where = place(1, GRID)
    first = top(with_bonus(unit(observed["attention"]), GRID, 2, 0.6), 5)
    age = torch.ones(1, 20).scatter_(1, first, 0.0)
    expected = top(with_bonus(unit(observed["attention"]) + 0.4 * age / 4, GRID, 2, 0.6), 5)
    assert torch.equal(chosen(rule, observed, where, times=2), expected)
    text = dataclasses.replace(where, segments=(Segment("text", 0, 20),))
    assert torch.equal(chosen(rule, observed, text), top(observed["attention"], 5))


# -- halves of guidance ----------------------------------------------------------------------------------------------

EVERY = [
    TopScore(0.25),
    TopScore(0.25, cross_weight=1.0),
    TopScore(0.25, cross_weight=0.4, bonus=0.4, window=2),
    TopScore(0.25, score="value_norm"),
    TopScore(0.25, score="random", bonus=0.4),
]


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_halves_of_guidance_select_the_same_tokens_and_others_by_themselves(rule):
    """Rows 0 and 2 are twins, rows 1 and 3 are not."""
    observed, twins = seen(4), torch.tensor([True, False, True, False])
    where = place(4, GRID, twins)
    state, alone = rule.init(), rule.init()
    rule.observe(state, where, observed)
    rule.observe(alone, dataclasses.replace(where, twins=None), observed)
    for _ in range(3):
        index = rule.select(state, where, CPU)
        own = rule.select(alone, dataclasses.replace(where, twins=None), CPU)
        assert torch.equal(index[0], index[2])
        assert torch.equal(index[[1, 3]], own[[1, 3]])
        assert index.shape == own.shape == (4, 5), "shapes do not depend on what the rows hold"


def test_twins_are_ranked_by_the_mean_of_their_maps():
    observed, twins = seen(2), torch.tensor([True, True])
    mean = unit(observed["attention"].mean(0, keepdim=True))
    expected = top(mean, 5).expand(2, -1)
    assert torch.equal(chosen(TopScore(0.25), observed, place(twins=twins)), expected)
    s2 = top(unit(1 + observed["cross_attention_of_twins"]), 5)[:1].expand(2, -1)
    assert torch.equal(chosen(TopScore(0.25, cross_weight=1.0), observed, place(twins=twins)), s2)


def test_tied_scores_do_not_part_twins():
    where = place(twins=torch.tensor([True, True]))
    index = chosen(TopScore(0.25), {"attention": torch.ones(2, 20)}, where, times=4)
    assert torch.equal(index[0], index[1])


# -- what is captured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3])
def test_captured_entropy_is_that_of_the_map_averaged_over_heads_and_halves(batch):
    query, key, value = torch.randn(batch, 3, 7, 4), torch.randn(batch, 3, 5, 4), torch.randn(batch, 3, 5, 4)
    mask = torch.zeros(batch, 1, 1, 5)
    mask[..., 4] = -1e4  # padding of the text
    with AttentionCapture("cross_attention", chunk=3) as capture:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    maps = (query @ key.transpose(-1, -2) / 2 + mask).softmax(-1).mean(1)

    def entropy(a):
        return torch.stack([-sum(a[..., j] * torch.log(a[..., j] + 1e-7) for j in range(5))])[0]

    torch.testing.assert_close(capture.seen["cross_attention"], entropy(maps))
    if batch % 2:
        assert capture.seen.keys() == {"cross_attention"}
    else:
        cond, uncond = maps.chunk(2)
        of_twins = entropy(0.5 * cond + 0.5 * uncond).repeat(2, 1)
        torch.testing.assert_close(capture.seen["cross_attention_of_twins"], of_twins)


def test_value_norms_are_captured_without_an_attention_map(monkeypatch):
    query, key, value = (torch.randn(2, 3, 7, 4) for _ in range(3))
    monkeypatch.setattr(AttentionCapture, "_maps", None)
    with AttentionCapture("value_norm") as capture:
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(capture.seen["value_norm"], (1 - value.norm(dim=-1)).sum(1))
    assert torch.equal(
        chosen(TopScore(0.25, score="value_norm"), {"value_norm": torch.arange(20.0).repeat(2, 1)}, place()),
        torch.arange(15, 20).repeat(2, 1),
    )


@pytest.mark.parametrize(("settings", "count"), [({}, 2), ({"cross_weight": 0.5}, 4), ({"cross_weight": 1.0}, 2)])
def test_attention_is_looked_at_on_full_steps_only(settings, count, monkeypatch):
    looked, found = [], AttentionCapture._look
    monkeypatch.setattr(AttentionCapture, "_look", lambda self, *given: looked.append(self.what) or found(self, *given))
    denoiser, inputs = pixart_case()
    before = []
    with (
        c4d.accelerate(denoiser, "toca", interval=3, warmup=1, recompute_ratio=0.5, **settings) as handle,
        handle.run(num_steps=6),
    ):
        sample(denoiser, inputs, 6, before=lambda _: before.append(len(looked)))
    assert handle.trace.strip() == "FppFpp"
    assert [b - a for a, b in itertools.pairwise([*before, len(looked)])] == [count, 0, 0, count, 0, 0]


def test_value_norm_and_random_never_make_a_map(monkeypatch):
    monkeypatch.setattr(AttentionCapture, "_maps", None)
    denoiser, inputs = pixart_case()
    for score in ("value_norm", "random"):
        composition = c4d.Composition(Parts(), FixedInterval(3), Reuse(), tokens=TopScore(0.4, score=score))
        _, trace, _ = accelerated(denoiser, inputs, 6, composition)
        assert trace.strip() == "FppFpp"
        assert all("little to cache" in note for note in trace.notes)  # in 6 steps


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "kind", "layer", "step", "factor"),
    [
        # DiT counts steps down: step 30 of 50 is s = 19
        ("dit-ddpm", "ffn", 0, 30, 2.5 * (1.4 - 0.8 * 19 / 50) * 1.8),
        ("dit-ddpm", "ffn", 27, 0, 2.5 * (1.4 - 0.8 * 49 / 50) * 0.2),
        ("pixart", "ffn", 0, 30, (1.9 - 1.8 * 30 / 50) * 1.6 * 1.6),
        ("pixart", "ffn", 27, 49, (1.9 - 1.8 * 49 / 50) * 0.4 * 1.6),
        ("pixart", "cross_attn", 9, 10, (1.9 - 1.8 * 10 / 50) * (1.6 - 1.2 * 9 / 27) * 0.6),
        ("open-sora", "ffn", 20, 40, 1.495),
        ("open-sora", "cross_attn", 20, 40, 0.0),
    ],
)
def test_the_other_ratio_schedules_are_the_released_ones(schedule, kind, layer, step, factor):
    rule = TopScore(0.07, schedule=schedule)
    where = place(kind=kind, layer=layer, step=step)
    assert rule.ratio(where) == pytest.approx(0.07 * factor)
    assert rule.needs_num_steps == (schedule != "open-sora")


def test_a_ratio_is_never_more_than_all_tokens():
    assert TopScore(0.5, schedule="pixart").ratio(place(step=0)) == 1.0


def test_modulated_intervals_are_the_cards_lists():
    assert modulated_steps(50, 3, "dit") == (0, 5, 9, 13, 19, 22, 25, 28, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49)
    assert modulated_steps(20, 3, "pixart") == (0, 6, 9, 12, 15, 18)


@pytest.mark.parametrize(("steps", "interval"), [(24, 3), (32, 3), (44, 4)])
def test_the_sensitive_fifth_begins_and_ends_at_whole_steps(steps, interval):
    """The code's are ``int(0.2 T) .. int(0.4 T) - 1``, counted down; in there every second step is full."""
    low, high = int(steps * 0.2), int(steps * 0.4)
    distance, full = interval, []
    for s in range(steps - 1, -1, -1):
        if s % distance == 0 or s == steps - 1:
            distance = 2 if s in range(low, high) else round(interval / (1 + 0.4 - 2 * 0.4 * s / steps))
            if s % distance == 0 or s == steps - 1:
                full.append(steps - 1 - s)
    assert modulated_steps(steps, interval, "dit") == tuple(full)


def strip(gate, steps, guards=()):
    state = gate.begin(steps)
    full = [not gate.propose(state, Step(i, steps), None) for i in range(steps)]
    return "".join(
        "F" if f or any(g.overrule(None, Step(i, steps)) is False for g in guards) else "c" for i, f in enumerate(full)
    )


def test_strips_of_the_docstring_are_the_real_ones():
    for rule in ("dit", "pixart"):
        assert f"``{strip(ModulatedInterval(3, rule), 20)}``" in (ModulatedInterval.__doc__ or "")


@pytest.mark.parametrize("rule", ["dit", "pixart"])
def test_an_interval_of_1_is_never_modulated(rule):
    gate = ModulatedInterval(1, rule)
    assert strip(gate, 50) == "F" * 50
    assert not gate.needs_num_steps
    ToCa(interval=1, full_steps=rule, warmup=3).compose().check_run(2)  # the warm-up is no contradiction then


@pytest.mark.parametrize(
    ("full_steps", "warmup", "expected"),
    [
        ("flux", 3, "FFFcccFcccFc"),
        ("open-sora", 3, "FFFcFcccFccc"),
        ("dit", 1, None),
        ("pixart", 1, None),
        ("pixart", 2, None),
    ],
)
def test_full_steps_are_those_of_the_denoiser_they_are_named_after(full_steps, warmup, expected):
    composition = ToCa(interval=4, warmup=warmup, full_steps=full_steps).compose()
    if expected is None:
        listed = modulated_steps(12, 4, full_steps)
        expected = "".join("F" if i in listed or i < warmup else "c" for i in range(12))
    assert strip(composition.gate, 12, composition.guards) == expected


@pytest.mark.parametrize(("full_steps", "anchor"), [("dit", "last"), ("pixart", "first")])
def test_without_tokens_modulation_is_off_and_the_schedule_is_foras(full_steps, anchor):
    toca = ToCa(interval=3, recompute_ratio=0.0, full_steps=full_steps, warmup=1).compose()
    assert strip(toca.gate, 25, toca.guards) == strip(Fora(3, anchor=anchor).compose().gate, 25)


@pytest.mark.parametrize("what", ToCa.info.published)
def test_a_published_set_at_interval_1_is_off(what):
    denoiser, inputs = pixart_case() if "PixArt" in what else (tiny("dit"), dit_inputs(2))
    settings = {**ToCa.info.published[what], "interval": 1}
    if "PixArt" not in what:
        settings["cross_weight"] = 0.0  # DiT knows no text
    reached, trace, _ = accelerated(denoiser, inputs, 5, "toca", **settings)
    assert trace.strip() == "FFFFF"
    assert differences(reached, sample(denoiser, inputs, 5)) == [0.0] * 5


# -- whole runs ------------------------------------------------------------------------------------------------------


@functools.cache
def tiny(case):
    """One of each, so that it is looked at once."""
    return {"pixart": lambda: pixart()[0], "dit": lambda: dit(2), "flux": lambda: flux(1, 1)}[case]()


def pixart_case(samples=1):
    """A PixArt and both halves of guidance on one latent per sample; rows are [uncond ..., cond ...]."""
    kwargs = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    rng = torch.Generator().manual_seed(5)
    latent = torch.randn(samples, 4, 8, 8, generator=rng).repeat(2, 1, 1, 1)
    text = torch.randn(2 * samples, 5, 12, generator=rng)
    mask = torch.ones(2 * samples, 5)
    mask[0, 3:] = 0
    inputs = {**kwargs, "hidden_states": latent, "encoder_hidden_states": text, "encoder_attention_mask": mask}
    return tiny("pixart"), {**inputs, "return_dict": False}


class Seen(TorchFunctionMode):
    """Attention maps ``[B, N, M]``, heads averaged, of every attention inside."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            logits = given["query"] @ given["key"].transpose(-1, -2) / given["query"].shape[-1] ** 0.5
            if given.get("attn_mask") is not None:
                logits = logits + given["attn_mask"]
            self.maps.append(logits.softmax(-1).mean(1))
        return func(*args, **kwargs)


class SlowToCa:
    """The card's ToCa on PixArt or DiT, whose batch is both halves of guidance; loops over rows and tokens.

    It takes the place of the parts of a copy, so the host's own block adds gates and residuals.
    """

    def __init__(self, denoiser, full, interval, ratio, schedule, num_steps, grid, cross_weight, bonus, window):
        self.denoiser = copy.deepcopy(denoiser)
        self.full, self.interval, self.ratio, self.schedule = full, interval, ratio, schedule
        self.num_steps, self.grid = num_steps, grid
        self.cross_weight, self.bonus, self.window = cross_weight, bonus, window
        self.step, self.cache, self.age, self.s1, self.s2, self.computed = -1, {}, {}, {}, {}, []
        for layer, block in enumerate(self.denoiser.transformer_blocks):
            for name, kind in (("attn1", "attn"), ("attn2", "cross_attn"), ("ff", "ffn")):
                module = getattr(block, name, None)
                if module is not None:
                    module.forward = self.part(layer, kind, module.forward)

    def __call__(self, **kwargs):
        self.step += 1
        return self.denoiser(**kwargs)

    def factor(self, layer, kind):
        up, down = self.step / self.num_steps, (self.num_steps - 1 - self.step) / self.num_steps
        if self.schedule == "pixart":
            return (1.9 - 1.8 * up) * (1.6 - 1.2 * layer / 27) * (0.6 if kind == "cross_attn" else 1.6)
        return 2.5 * (1 + 2.0 - 4.0 * down) * (1 - 0.2 + 0.4 * layer / 27)

    def part(self, layer, kind, compute):
        key = (layer, kind)

        def forward(x, *args, **kwargs):
            if self.step in self.full:
                with Seen() as seen:
                    self.cache[key] = compute(x, *args, **kwargs).clone()
                self.age[key] = torch.zeros(x.shape[:2])
                if kind == "attn":  # both halves are ranked by the mean of their maps
                    first, second = seen.maps[0].chunk(2)
                    s1 = unit((0.5 * first + 0.5 * second).sum(1))
                    self.s1[layer] = s1.repeat(2, 1)
                elif kind == "cross_attn":
                    first, second = seen.maps[0].chunk(2)
                    mean = 0.5 * first + 0.5 * second
                    self.s2[layer] = unit(1 - (mean * torch.log(mean + 1e-7)).sum(-1)).repeat(2, 1)
                return self.cache[key].clone()
            if kind != "attn":
                self.partial(key, x, compute, args, kwargs)
            return self.cache[key].clone()

        return forward

    def partial(self, key, x, compute, args, kwargs):
        layer, kind = key
        count = x.shape[1]
        k = int(min(max(self.ratio * self.factor(layer, kind), 0), 1) * count + 1e-9)
        score = 0.25 * self.age[key] / self.interval
        if self.cross_weight < 1:
            score = score + (1 - self.cross_weight) * self.s1[layer]
        if self.cross_weight > 0:
            score = score + self.cross_weight * self.s2[layer]
        self.age[key] += 1
        for row in range(x.shape[0]):
            best = {max(window, key=lambda t, r=row: float(score[r, t])) for window in windows(self.grid, self.window)}
            raised = [float(s) * (1 + self.bonus * (t in best)) for t, s in enumerate(score[row])]
            index = sorted(range(count), key=lambda t: -raised[t])[:k]
            self.computed.append((self.step, row, key, sorted(index)))
            if not index:
                continue
            self.age[key][row, index] = 0
            own = {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
                for name, value in kwargs.items()
            }
            self.cache[key][row, index] = compute(x[row : row + 1, index], *args, **own)[0]


@pytest.fixture
def selections(monkeypatch):
    """The tokens that are written back on partial steps, in the order in which parts run."""
    written, found = [], engine_tokens.put

    def put(x, index, values):
        written.append(index.clone())
        return found(x, index, values)

    monkeypatch.setattr(engine_tokens, "put", put)
    return written


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("pixart", {"cross_weight": 1.0, "bonus": 0.4, "window": 4, "schedule": "pixart", "full_steps": "pixart"}),
        ("pixart", {"cross_weight": 0.4, "bonus": 0.6, "window": 2, "schedule": "pixart", "full_steps": "pixart"}),
        ("dit", {"cross_weight": 0.0, "bonus": 0.6, "window": 2, "schedule": "dit", "full_steps": "dit"}),
    ],
)
def test_runs_are_the_slow_references(case, settings, selections):
    steps, samples = 14, 2
    if case == "pixart":
        denoiser, inputs = pixart_case(samples)
    else:
        denoiser, inputs = tiny("dit"), dit_inputs(2 * samples)
        inputs["hidden_states"] = inputs["hidden_states"][:samples].repeat(2, 1, 1, 1)
    full = modulated_steps(steps, 3, case)
    reference = SlowToCa(
        denoiser, full, 3, 0.3, settings["schedule"], steps, (1, 4, 4),
        settings["cross_weight"], settings["bonus"], settings["window"],
    )  # fmt: skip

    def guided(call):
        """Guidance: both halves go on from one latent."""
        outputs, x = [], inputs["hidden_states"]
        with torch.no_grad():
            for i in range(steps):
                t = torch.full((x.shape[0],), round(999 * (1 - i / steps)))
                (out,) = call(**{**inputs, "hidden_states": x, "timestep": t})
                outputs.append(out.clone())
                uncond, cond = out[:, :4].chunk(2)
                x = x - (uncond + 2 * (cond - uncond)).repeat(2, 1, 1, 1) / steps
        return outputs

    expected = guided(reference)
    with (
        c4d.accelerate(denoiser, "toca", interval=3, recompute_ratio=0.3, warmup=1, **settings) as handle,
        handle.run(num_steps=steps),
    ):
        reached = guided(denoiser)
    assert handle.trace.strip() == "".join("F" if i in full else "p" for i in range(steps))
    assert not handle.trace.notes
    assert max(differences(reached, expected)) <= 1e-5
    ours = [row for index in selections for row in index.tolist()]
    theirs = [index for _, _, _, index in reference.computed if index]
    assert ours == theirs
    for index in selections:
        assert torch.equal(index[:samples], index[samples:]), "halves compute the same tokens"
    assert any(not torch.equal(index[0], index[1]) for index in selections), "samples do not"


def test_rows_that_are_no_halves_do_not_meet(selections):
    """Two different images in a batch: each selects as it does alone."""
    denoiser, inputs = tiny("dit"), dit_inputs(2)
    accelerated(denoiser, inputs, 6, "toca", recompute_ratio=0.3, schedule="constant", bonus=0.6)
    together = [index.clone() for index in selections]
    for row in range(2):
        selections.clear()
        one = {name: v[row : row + 1] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        accelerated(denoiser, one, 6, "toca", recompute_ratio=0.3, schedule="constant", bonus=0.6)
        assert [index[0].tolist() for index in selections] == [index[row].tolist() for index in together]


@pytest.mark.parametrize("branches", ["independent", "tied"])
def test_branches_called_one_after_the_other_share_a_selection_where_they_are_tied(branches, selections):
    model, inputs, shares = tiny("flux"), flux_inputs(1), []
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1) * 0.3}
    settings = {"interval": 4, "recompute_ratio": 0.4, "schedule": "constant", "branches": branches}
    with c4d.accelerate(model, "toca", **settings) as handle, handle.run(num_steps=7), torch.no_grad():
        for i in range(7):
            drawn = []
            for name, given in (("cond", inputs), ("uncond", other)):
                selections.clear()
                with handle._tracker.branch(name):
                    model(**given, timestep=torch.tensor([1 - i / 7]))
                drawn.append([index.tolist() for index in selections])
            if drawn[0]:
                shares.append(drawn[0] == drawn[1])
    assert set(handle.stats["strips"].values()) == {"FFFpppF"}
    assert len(shares) == 3
    assert all(shares) if branches == "tied" else not all(shares)


def test_of_a_selection_that_others_follow_nothing_is_held_but_what_the_ledger_counts():
    """Not what entered the parts."""
    gate, rule = FixedInterval(3), RoutedTokens(0.4)
    composition = c4d.Composition(Parts(), gate, Reuse(), tokens=rule, branches="tied")
    with c4d.accelerate(tiny("flux"), composition) as handle, handle.run(num_steps=5):
        sample(tiny("flux"), flux_inputs(2), 5)
        (state,) = handle._engines[0]._states.values()
        places = state.extra["selected_at"].values()
        assert places
        assert all(place.entering is place.survey is place.twins is None for place in places)


def test_shapes_are_the_same_for_other_data(selections):
    settings = ToCa.info.published["PixArt-alpha, 20 steps"]
    denoiser, inputs = pixart_case()
    shapes = []
    for scale in (1.0, 3.0):
        selections.clear()
        accelerated(denoiser, {**inputs, "hidden_states": inputs["hidden_states"] * scale}, 12, "toca", **settings)
        shapes.append([tuple(index.shape) for index in selections])
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) > 2, "the ratio varies over steps and layers"


# -- joint attention ---------------------------------------------------------------------------------------------------

JOINT = [
    "CogVideoXTransformer3DModel", "EasyAnimateTransformer3DModel", "HiDreamImageTransformer2DModel",
    "HunyuanImageTransformer2DModel", "HunyuanVideoTransformer3DModel", "JoyImageEditTransformer3DModel",
    "MochiTransformer3DModel", "MotifVideoTransformer3DModel", "NucleusMoEImageTransformer2DModel",
    "PRXTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel",
]  # fmt: skip


class Keys(TorchFunctionMode):
    """Keys ``[B, heads, M, d]`` of every attention inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((kwargs or {}).get("key", args[1] if len(args) > 1 else None).clone())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's
@pytest.mark.parametrize("name", JOINT)
def test_text_and_image_are_told_apart_in_a_joint_attention(name):
    """Keys of the text are those that do not change where the latent does: in front of the image's, or behind them."""
    denoiser, args, kwargs = zoo.tiny(name).make()
    toys.randomise(denoiser)
    latent, found = inputs_of(denoiser).latent, []
    for shift in (0, 1):
        with Keys() as keys:
            denoiser(*args, **{**kwargs, latent: kwargs[latent] + shift})
        found.append(keys.seen)
    changed = [(a != b).any(-1).flatten(0, 1).any(0).tolist() for a, b in zip(*found, strict=True)]
    first = next(flags for flags in changed if len(set(flags)) == 2)
    assert first == sorted(first, reverse=first[0]), "one behind the other"
    assert is_text_first(SimpleNamespace(denoiser=type(denoiser).__name__)) == (not first[0])


def test_an_attention_that_runs_row_by_row_is_seen_whole():
    query, key, value = (torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []
    for pieces in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        with AttentionCapture("attention", rows=3) as capture:
            for rows in pieces:
                attend(query[rows], key[rows], value[rows])
            attend(query.flip(0), key, value)  # another one behind it
        seen.append(capture.seen["attention"])
    torch.testing.assert_close(seen[1], seen[0])
    with AttentionCapture("attention", rows=3) as capture:
        for row, count in enumerate((7, 5, 6)):
            attend(*(x[row : row + 1, :, :count] for x in (query, key, value)))
    found = capture.seen["attention"]
    assert found.shape == (3, 7)
    assert not found[1, 5:].any() and not found[2, 6:].any()
    torch.testing.assert_close(found.sum(1), torch.ones(3))


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_rows_choose_for_themselves_where_attention_runs_row_by_row(selections):
    """Mochi's; with texts of other lengths, whose keys are behind the image's."""
    denoiser, args, kwargs = zoo.tiny("MochiTransformer3DModel").make()
    toys.randomise(denoiser)
    kwargs["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    together, apart = [], []
    for rows, found in ((slice(0, 2), together), (slice(0, 1), apart), (slice(1, 2), apart)):
        given = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        selections.clear()
        with c4d.accelerate(denoiser, "toca", recompute_ratio=0.4, schedule="constant", age_weight=0) as handle:
            with handle.run(num_steps=5), torch.no_grad():
                for i in range(5):
                    denoiser(*args, **{**given, "timestep": torch.full((len(given["hidden_states"]),), 900 - 100 * i)})
            assert not [note for note in handle.stats["notes"] if "was seen around" in note]
        found.append([index.clone() for index in selections])
    assert {index.shape[1] for index in together[0]} == {int(0.4 * 32), int(0.4 * 5)}
    for i, index in enumerate(together[0]):
        assert index.tolist() == [apart[0][i][0].tolist(), apart[1][i][0].tolist()]


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["flux", "dit"])
def test_ranking_by_text_needs_a_cross_attention_to_it(case):
    denoiser, inputs = (tiny("flux"), flux_inputs(1)) if case == "flux" else (tiny("dit"), dit_inputs(1))
    before = {name: set(module.__dict__) for name, module in denoiser.named_modules()}
    with pytest.raises(AnatomyError, match=r"has none.*Use cross_weight=0"):
        accelerated(denoiser, inputs, 3, "toca", cross_weight=1.0)
    assert {name: set(module.__dict__) for name, module in denoiser.named_modules()} == before


def test_a_bonus_by_neighbourhood_needs_to_know_the_neighbours():
    inputs = flux_inputs(1)
    reached, trace, _ = accelerated(tiny("flux"), inputs, 6, "toca", bonus=0.6, recompute_ratio=0.4)
    assert "p" in trace.strip()
    assert len(reached) == 6
    with pytest.raises(AnatomyError, match="use bonus=0"):
        accelerated(tiny("flux"), {**inputs, "img_ids": torch.zeros(12, 3)}, 6, "toca", bonus=0.6)


@pytest.mark.parametrize(
    ("shape", "count", "patch", "grid"),
    [
        ((1, 4, 8, 12), 24, 2, (1, 4, 6)),
        ((1, 4, 8, 12), 24, None, (1, 4, 6)),
        ((1, 4, 3, 8, 8), 48, 2, (3, 4, 4)),  # Wan: patches of (1, 2, 2)
        ((1, 4, 4, 8, 8), 32, 2, (2, 4, 4)),  # two frames to a token
    ],
)
def test_the_grid_of_tokens_follows_from_the_latent(shape, count, patch, grid):
    assert patch_grid("Denoiser", torch.empty(shape), count, patch, "") == grid


@pytest.mark.parametrize(
    ("shape", "count", "patch"), [((1, 4, 8, 8), 17, None), ((1, 4, 8, 8), 64, 2), ((1, 4, 3, 8, 8), 48, None)]
)
def test_a_grid_that_does_not_follow_is_refused(shape, count, patch):
    with pytest.raises(AnatomyError, match=f"into {count} tokens.*so nothing"):
        patch_grid("Denoiser", torch.empty(shape), count, patch, "nothing")
