"""Every gate x predictor x site (x token rule x branch rule) of the methods runs, or is refused with a reason."""

import contextlib
import dataclasses
import itertools
import math
import re

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.accelerate import compose
from cache4diffusion.errors import AnatomyError, CompositionError, SettingError, UnknownNameError
from cache4diffusion.gates import GATES, FixedInterval, ProbeThreshold
from cache4diffusion.guidance import BRANCH_RULES, FrequencyResidual
from cache4diffusion.method import METHODS, Composition
from cache4diffusion.predictors import PREDICTORS, Newton, Reuse
from cache4diffusion.settings import component
from cache4diffusion.sites import SITES, Denoiser, Parts, Span, UNetLevel
from cache4diffusion.tokens import TOKEN_RULES, Reduction, TopScore
from small_denoisers import differences, flux, flux_inputs, remember_anatomy, unet, unet_inputs

STEPS = 6

# Settings that show full and cached steps in a run of 6 steps, where the defaults do not.
GATE = {name: name for name in GATES} | {
    "interval": "interval(interval=3)",
    "schedule": "schedule(full_steps=(0, 1, 4))",
    "quadratic": "quadratic(interval=2, center=2.0)",
    "widening": "widening(warmup=1, window=2.0)",
    "scaled": "scaled(full_steps=(0, 3), made_for=6)",
    "frozen-cross": "frozen-cross(gate_step=3)",
    "code-table": "code-table(codes=(0, 2, 2, 0, 2, 0))",
    "depths": "depths(depths=(2, 1, 0, 2, 1, 0))",
    "accumulated": "accumulated(threshold=0.2)",
    "adaptive": "adaptive(thresholds=(), rates=(3,))",
    "entrance": "entrance(threshold=0.5)",
    "learned": "learned(threshold=2.0)",
    "triggered": "triggered(threshold=9.0, reuse=0.34, tail=0.0)",
    "drift": "accumulated(threshold=9.0, of='drift')",
    "probe": "probe(threshold=0.5)",
    "magnitude": "magnitude(threshold=1.0, retention=0.0)",
    "mask": "mask(mask='110100')",
    "speculative": "speculative(threshold=1e9, max_run=3, warmup=0)",
    "significance": "significance(threshold=0.5)",
    "laddered": "laddered(threshold=2.0)",
}
SITE = {name: name for name in SITES} | {
    "span": "span(front=1)",
    "blocks": "blocks(front=1)",
    "mixed_score": "mixed_score(bias=0.0)",
}
PREDICTOR = {name: name for name in PREDICTORS} | {"newton": "newton(order=2)"}
TOKENS = {None: None} | {name: name for name in TOKEN_RULES} | {"top": "top(recompute_ratio=0.5)"}
CFG = (
    {None: None}
    | {name: name for name in BRANCH_RULES}
    | {
        "fastercache": "fastercache(interval=2, warmup=1)",
        "drop": "drop(gate_step=3)",
    }
)
DECIDE = ("batch", "any", "row")


def _kinds():
    """One predictor of each kind the engine can tell apart: by state, by whether it remembers, by weights per row."""
    kinds = {}
    for name, cls in PREDICTORS.items():
        state = type(cls().init(2, STEPS))
        kinds.setdefault((state, getattr(cls, "is_row_wise", False), cls.commit), name)
    return list(kinds.values())


KINDS = [name for name in _kinds() if name not in ("mean-velocity", "two-sided")]  # which need the trajectory
ANYWHERE = [name for name in PREDICTOR if name not in ("mean-velocity", "two-sided")]
ENTRANCES = ("entrance", "significance", "laddered")  # gates by which each block decides for itself
LOOKS_INSIDE = ("accumulated", "probe", "learned", *ENTRANCES)  # gates that decide while the blocks run
NEEDS_STACK = ("accumulated", "probe", "adaptive", "triggered", *ENTRANCES)
WATCHES = (*NEEDS_STACK, "drift", "learned")
PARTS = (
    "parts",
    "single_context",
    "prompt_modules",
    "attentions",
    "linears",
    "mixed_score",
    "scaled_parts",
    "gated_parts",
    "parts_and_stream",
)
CORRECTORS = ("increment", "linear-map")  # predictors that see what enters a site
REDUCED = ("reduced", "reduced_attention", "reduced_level")
REDUCTIONS = [name for name, rule in TOKEN_RULES.items() if isinstance(rule(), Reduction)]
SPLITS_ROWS = ("span", "switching_span", "blocks", "gated_parts")


def refusal(site, gate, tokens, decide, predictor="reuse", cfg=None):
    """Words of the reason why two axes cannot work together, None if they can. The table of what is not possible."""
    if (site in REDUCED) != (tokens in REDUCTIONS):
        return "site='reduced_attention' or site='reduced_level', and these sites such a rule"
    if site == "reduced_attention" and tokens == "ranked":
        return "ranks the tokens of a block for all of its parts"
    if site in REDUCED and (gate in (*WATCHES, "speculative") or decide != "batch" or predictor != "reuse"):
        return "the step alone says when tokens are left out"
    if site == "past_frames" and (
        gate in (*WATCHES, "speculative") or decide != "batch" or predictor != "reuse" or tokens
    ):
        return "what is kept is what would be computed"
    if gate == "speculative" and (site not in PARTS or site == "parts_and_stream"):
        return "that block has no input on a cached step"
    if gate in NEEDS_STACK and site in ("unet_level", "unet_encoder"):
        return "a U-Net has levels instead"
    if (site == "blocks") != (gate in ENTRANCES) and gate in WATCHES:
        return "each block decides by what enters it"
    if (site == "gated_parts") != (gate == "learned"):
        return "each part decides by what enters it"
    if gate == "probe" and site == "switching_span":
        return "caches them late in the run"
    if predictor == "aligned" and (site, gate) != ("span", "probe"):
        return "reads what the first blocks add"
    if predictor in CORRECTORS and site in ("trajectory", "unet_level", "unet_encoder"):
        return "no module has both"
    if predictor in CORRECTORS and site == "gated_parts":
        return "are shown that only to decide"
    if predictor == "linear-map" and site == "denoiser":  # by its name alone it is the output
        return "is not a sum"
    if predictor in CORRECTORS and tokens:
        return "hands it a selection"
    if site == "parts_and_stream" and decide == "row":
        return "A jump of the parts and the last block's stream is one for all rows"
    if site == "trajectory" and decide != "batch":
        return "one for all branches and rows of a step"
    if site == "trajectory" and (gate in WATCHES or cfg):
        return "runs no branch of the denoiser"
    if predictor == "mean-velocity":  # the site by its name alone does not see latents
        return "predicts from latents and noise levels"
    if (gate == "look-ahead") != (predictor == "two-sided") or (gate == "look-ahead" and site != "trajectory"):
        return "one needs the other"
    if decide == "row" and gate in LOOKS_INSIDE and site not in SPLITS_ROWS:
        return "can no longer be split by rows"
    if site == "attentions" and (gate in (*WATCHES, "speculative") or decide != "batch" or tokens):
        return "takes several decisions before the call"
    if tokens and site == "gated_parts":
        return "where each part decides for itself"
    if tokens and (decide == "row" or gate == "speculative"):
        return "rows cannot decide for themselves"
    if tokens and site in ("prompt_modules", "single_context"):
        return "return nothing that differs from token to token"
    if tokens and site not in REDUCED and (site not in PARTS or site == "linears"):
        return "has no parts"
    return None


@pytest.fixture(autouse=True)
def remembered_anatomy(monkeypatch):
    remember_anatomy(monkeypatch)


@pytest.fixture(scope="module")
def transformer():
    return flux(1, 2)


@pytest.fixture(scope="module")
def levels():
    return unet()


def axes(site, gate, predictor="reuse", tokens=None, cfg=None, decide="batch"):
    """The axes of a composition, by name."""
    named = {"site": SITE[site], "gate": GATE[gate], "predictor": PREDICTOR[predictor], "decide": decide}
    named |= {"branches": "tied"} if site == "trajectory" else {}
    return named | ({"tokens": TOKENS[tokens]} if tokens else {}) | ({"cfg": CFG[cfg]} if cfg else {})


def blank():
    """Any composition: every axis is replaced by name."""
    return Composition(Parts(), FixedInterval(2), Reuse())


@pytest.mark.parametrize(("site", "gate"), list(itertools.product(SITE, GATE)))
def test_a_pair_is_made_or_refused_as_the_table_says(site, gate):
    kinds = TOKENS if gate == "interval" else (None, "top", "merge")  # one of each
    for predictor, tokens, cfg, decide in itertools.product(PREDICTOR, kinds, CFG, DECIDE):
        wanted = axes(site, gate, predictor, tokens, cfg, decide)
        reason = refusal(site, gate, tokens, decide, predictor, cfg)
        if reason is None:
            assert isinstance(compose(blank(), wanted), Composition)
            continue
        with pytest.raises(CompositionError) as caught:
            compose(blank(), wanted)
        text = str(caught.value)
        assert reason in text
        assert "Use " in text, "says what to do"


def loop(denoiser, inputs, branch):
    """Two branches per step, the conditional one first; outputs of both at every step."""
    outputs, latent = [], "sample" if "sample" in inputs else "hidden_states"
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(0) * 0.5}
    with torch.no_grad():
        x = inputs[latent]
        for i in range(STEPS):
            t = torch.full((x.shape[0],), 1 - i / STEPS) if latent == "hidden_states" else torch.tensor(999 - 100 * i)
            with branch("cond"):
                (cond,) = denoiser(**{**inputs, latent: x, "timestep": t})
            with branch("uncond"):
                (uncond,) = denoiser(**{**other, latent: x, "timestep": t})
            outputs += [cond, uncond]
            x = x - (uncond + 2 * (cond - uncond)) / STEPS
    return outputs


def guided(denoiser, inputs, composition):
    """The outputs of the loop under a composition, and the trace."""
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=STEPS):
        return loop(denoiser, inputs, handle._tracker.branch), handle.trace


def is_possible(site, gate, tokens, decide="batch", predictor="reuse"):
    return refusal(site, gate, tokens, decide, predictor) is None


def predictors(site, gate, tokens=None):
    """All of them under the plain gate, one of each kind under the others."""
    wanted = ANYWHERE if gate == "interval" and site not in FAMILY else [*KINDS, "aligned", *CORRECTORS]
    return [name for name in dict.fromkeys(wanted) if is_possible(site, gate, tokens, "batch", name)]


def with_cfg(names):
    """Every predictor without a rule for CFG branches, and the first one with each: the rule lies outside the site."""
    return [*((name, None) for name in names), *((names[0], cfg) for cfg in CFG if cfg is not None)]


# Sites whose driver is another's with one thing changed: they need not meet every gate as well.
FAMILY = {
    "switching_span": "span",
    "blocks": "span",
    "linears": "parts",
    "attentions": "parts",
    "gated_parts": "parts",
    "mixed_score": "parts",
    "scaled_parts": "parts",
    "parts_and_stream": "parts",
}


def runs(site, gate):
    """Whether the pair is worth a run."""
    elsewhere = (
        "unet_level",
        "unet_encoder",
        "trajectory",
        "single_context",
        "prompt_modules",
        "past_frames",
        *REDUCED,
    )
    return site not in elsewhere and (site not in FAMILY or gate in ("interval", *ENTRANCES, "adaptive", "learned"))


def check(outputs, trace, plain, cfg):
    strips = {branch: trace.strip(branch=branch) for branch in dict.fromkeys(r.branch for r in trace.of())}
    assert len(strips) == 2
    for strip in strips.values():
        assert len(strip) == STEPS
        assert strip[0] == "F"
    lead, follow = strips.values()
    assert set(lead) & set("cpm"), f"nothing was cached: {strips}"
    if cfg:
        assert follow.count("c") >= 2
    for out, expected in zip(outputs, plain, strict=True):
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        assert out.isfinite().all()
    assert torch.equal(outputs[0], plain[0])
    assert differences(outputs, plain)[-2] < 1.0


def never(denoiser, inputs):
    """The same loop with nothing cached."""
    return loop(denoiser, inputs, lambda name: contextlib.nullcontext())


@pytest.mark.parametrize(
    ("site", "gate", "tokens"),
    [
        combination
        for combination in itertools.product(SITE, GATE, TOKENS)
        if runs(*combination[:2])
        and is_possible(*combination)
        and (combination[2] not in ("clusters", "weighted") or "interval" in combination)
    ],
)
def test_what_can_be_made_runs_on_a_transformer(transformer, site, gate, tokens):
    inputs = flux_inputs(1)
    plain = never(transformer, inputs)
    for predictor, cfg in with_cfg(predictors(site, gate, tokens)):
        outputs, trace = guided(transformer, inputs, compose(blank(), axes(site, gate, predictor, tokens, cfg)))
        check(outputs, trace, plain, cfg)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [cfg for cfg in CFG if cfg is not None])
@pytest.mark.parametrize(
    "site", [site for site in SITE if runs(site, "interval") and is_possible(site, "interval", None)]
)
def test_every_predictor_runs_beside_every_rule_for_branches(transformer, site, cfg):
    inputs = flux_inputs(1)
    plain = never(transformer, inputs)
    for predictor in predictors(site, "interval"):
        outputs, trace = guided(transformer, inputs, compose(blank(), axes(site, "interval", predictor, None, cfg)))
        check(outputs, trace, plain, cfg)


@pytest.mark.parametrize("gate", [gate for gate in GATE if is_possible("unet_level", gate, None)])
def test_what_can_be_made_runs_on_a_unet(levels, gate):
    inputs = unet_inputs(1)
    plain = never(levels, inputs)
    for predictor, cfg in itertools.product(predictors("unet_level", gate), CFG):
        outputs, trace = guided(levels, inputs, compose(blank(), axes("unet_level", gate, predictor, None, cfg)))
        check(outputs, trace, plain, cfg)


@pytest.mark.parametrize(
    ("site", "gate", "decide"),
    [
        (site, gate, decide)
        for site, gate, decide in itertools.product(SITE, GATE, ("any", "row"))
        if runs(site, gate) and is_possible(site, gate, None, decide)
    ],
)
def test_rows_decide_wherever_that_can_be_made(transformer, site, gate, decide):
    inputs = flux_inputs(2)
    plain = never(transformer, inputs)
    for cfg in CFG:
        outputs, trace = guided(transformer, inputs, compose(blank(), axes(site, gate, cfg=cfg, decide=decide)))
        check(outputs, trace, plain, cfg)


@pytest.mark.parametrize(
    ("site", "gate", "kind", "words"),
    [
        ("span", "interval", "unet", "that carries the latent"),
        ("denoiser", "probe", "unet", "that carries the latent"),
        ("denoiser", "accumulated", "unet", "that carries the latent"),
        ("unet_level", "interval", "flux", "has no U-Net levels"),
    ],
)
def test_what_a_denoiser_cannot_serve_is_refused_at_the_first_call(transformer, levels, site, gate, kind, words):
    denoiser, inputs = (levels, unet_inputs(1)) if kind == "unet" else (transformer, flux_inputs(1))
    before = {name: set(module.__dict__) for name, module in denoiser.named_modules()}
    with pytest.raises(AnatomyError, match=words) as caught:
        guided(denoiser, inputs, compose(blank(), axes(site, gate)))
    assert re.search("(may|these) work", str(caught.value)), "names what works instead"
    assert {name: set(module.__dict__) for name, module in denoiser.named_modules()} == before


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_of_these_combinations(name):
    composition = METHODS[name](**toys.CALIBRATED.get(name, {})).compose()
    if composition.site is not None:
        assert type(composition.site) in SITES.values()
        assert type(composition.gate) in GATES.values()
    assert type(composition.predictor) in PREDICTORS.values()
    assert composition.tokens is None or type(composition.tokens) in TOKEN_RULES.values()
    assert composition.cfg is None or type(composition.cfg) in BRANCH_RULES.values()


def test_a_composition_needs_a_site_with_a_gate_or_a_branch_rule():
    for parts in [(Parts(), None), (None, FixedInterval(2))]:
        with pytest.raises(CompositionError, match="needs a"):
            Composition(*parts)
    with pytest.raises(CompositionError, match="Nothing to do"):
        Composition(None, None)
    assert Composition(None, None, cfg=FrequencyResidual()).site is None


@pytest.mark.parametrize("front", [0, 1])
def test_a_probe_must_not_watch_what_is_cached(front):
    with pytest.raises(CompositionError, match=r"watches the first 2 block\(s\).*Use Span\(front=2\)"):
        Composition(Span(front=front), ProbeThreshold(0.1, blocks=2))


def test_a_signal_has_no_meaning_for_later_lists():
    with pytest.raises(CompositionError, match="per_list=False"):
        compose(blank(), {"site": Span(per_list=True), "gate": "accumulated"})


# -- by name, from a file, as objects --------------------------------------------------------------------------------

SETTINGS = {"threshold": 0.5, "front": 1, "warmup": 2}
AXES = {"predictor": "newton(order=1)", "cfg": "fastercache(interval=2, warmup=1)"}


def test_by_name_from_a_file_and_as_objects_is_the_same(transformer, tmp_path):
    inputs = flux_inputs(1)
    yaml = tmp_path / "fast.yaml"
    yaml.write_text(
        "method: dbcache\n"
        "settings: {threshold: 0.5, front: 1, warmup: 2}\n"
        'axes: {predictor: "newton(order=1)", cfg: "fastercache(interval=2, warmup=1)"}\n'
    )
    objects = {"predictor": Newton(1), "cfg": FrequencyResidual(interval=2, warmup=1)}
    ways = [
        lambda: c4d.accelerate(transformer, "dbcache", **SETTINGS, **AXES),
        lambda: c4d.accelerate(transformer, yaml),
        lambda: c4d.accelerate(transformer, str(yaml)),
        lambda: c4d.accelerate(transformer, c4d.methods.DBCache(**SETTINGS), **objects),
        lambda: c4d.accelerate(transformer, dataclasses.replace(c4d.methods.DBCache(**SETTINGS).compose(), **objects)),
    ]
    found = []
    for way in ways:
        with way() as handle:
            found.append(handle._engines[0].composition)
    assert all(composition == found[0] for composition in found)
    outputs, trace = guided(transformer, inputs, found[0])
    assert trace.strip(branch="cond").startswith("FF")
    assert "c" in trace.strip(branch="uncond")
    check(outputs, trace, never(transformer, inputs), "fastercache")


def test_defaults_of_a_named_axis_are_its_own(transformer):
    with c4d.accelerate(transformer, "dbcache", predictor="newton(order=1)", cfg="fastercache") as handle:
        composition = handle._engines[0].composition
    assert composition.predictor == Newton(1)
    assert composition.cfg == FrequencyResidual()
    assert composition.gate == ProbeThreshold(0.08, 8, is_open_at_one=True)


def test_sites_can_be_given_by_name_as_well():
    assert component("span(front=2, back=1)", SITES, "site") == Span(2, 1)
    assert component("unet_level", SITES, "site") == UNetLevel()
    assert component("parts(kinds=('attn', 'ffn'))", SITES, "site") == Parts(("attn", "ffn"))
    assert component("parts(kinds=['attn'])", SITES, "site") == Parts(("attn",)), "lists, as YAML has them"
    assert component("top(recompute_ratio=1)", TOKEN_RULES, "token rule") == TopScore(1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"predictor": "newtn(order=1)"}, UnknownNameError, "did you mean 'newton'"),
        ({"gate": "intervall"}, UnknownNameError, "did you mean 'interval'"),
        ({"site": "block"}, UnknownNameError, "Known: attentions, blocks, .*unet_level"),
        ({"tokens": "tops"}, UnknownNameError, "did you mean 'top'"),
        ({"cfg": "fastcache"}, UnknownNameError, "did you mean 'fastercache'"),
        ({"predictor": "newton(ordr=1)"}, SettingError, "did you mean 'order'"),
        ({"predictor": "newton(1)"}, SettingError, r"name\(setting=value\)"),
        ({"predictor": "newton(order=1"}, SettingError, r"name\(setting=value\)"),
        ({"predictor": "newton(order=n)"}, SettingError, "order must be a whole number"),
        ({"predictor": "newton(order='two')"}, SettingError, "order must be a whole number"),
        ({"gate": "interval(interval=2.5)"}, SettingError, "interval must be a whole number"),
        ({"gate": "probe(threshold=True)"}, SettingError, "threshold must be a number"),
        ({"gate": "interval(anchor='end')"}, SettingError, "'first', 'last'"),
        ({"gate": "probe(threshold=-1)"}, SettingError, "0 .off. or more"),
        ({"decide": "rows"}, SettingError, "'batch', 'any' or 'row'"),
        ({"branches": "both"}, SettingError, "'independent' or 'tied'"),
        ({"predictor": 3}, CompositionError, "predictor=3"),
        ({"gate": Newton(1)}, CompositionError, "gate=Newton"),
        ({"site": FixedInterval(2)}, CompositionError, "site=FixedInterval"),
        ({"tokens": Reuse()}, CompositionError, "tokens=Reuse"),
        ({"cfg": Reuse()}, CompositionError, "cfg=Reuse"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(given, error, words):
    with pytest.raises(error, match=words):
        compose(c4d.methods.TaylorSeer(), given)


def test_a_warm_up_as_long_as_the_run_is_refused_when_the_length_is_known(transformer):
    refused = pytest.raises(SettingError, match="warmup=8 leaves nothing to cache in a run of 8 steps")
    with c4d.accelerate(transformer, "dbcache", front=1) as handle, handle.run(num_steps=8), torch.no_grad(), refused:
        transformer(**flux_inputs(1), timestep=torch.tensor([1.0]))


def test_a_warm_up_that_forces_only_some_steps_is_no_contradiction():
    c4d.methods.DBCache(warmup=8, warmup_interval=2).compose().check_run(8)
    with pytest.raises(SettingError, match="warmup=8"):
        c4d.methods.DBCache(warmup=8).compose().check_run(8)


# -- the gate's contract in the engine -------------------------------------------------------------------------------


class Spy:
    """A gate that writes down what it is asked and told. Caches whenever it may."""

    watch, needs_num_steps = None, False

    def __init__(self):
        self.told, self.asked, self.begun = [], [], []

    def begin(self, num_steps):
        self.begun.append(num_steps)
        return len(self.begun) - 1

    def propose(self, state, step, score):
        self.asked.append((state, step.index))
        return True

    def commit(self, state, step, cached, score):
        self.told.append((state, step.index, cached))


@pytest.mark.parametrize("site", [Denoiser(), Span(), Parts()])
def test_commit_is_called_exactly_once_per_decision_also_when_overruled(transformer, site):
    spy = Spy()
    composition = Composition(
        site, spy, Reuse(), guards=tuple(c4d.methods.DBCache(warmup=3, max_run=1).compose().guards)
    )
    _, trace = guided(transformer, flux_inputs(1), composition)
    assert trace.strip() == "FFFcFc"
    assert spy.begun == [STEPS, STEPS], "one state per branch"
    for state in (0, 1):
        told = [(index, cached) for unit, index, cached in spy.told if unit == state]
        assert told == [(0, False), (1, False), (2, False), (3, True), (4, False), (5, True)]
        asked = [index for unit, index in spy.asked if unit == state]
        assert asked == [3, 5], "not where a guard has spoken"


def test_what_is_not_finite_is_computed_and_the_gate_knows_of_a_full_step_alone(transformer):
    """It was told of a cached one, which is taken back: the state it had before is told of a full one."""

    class Diary(Spy):
        def begin(self, num_steps):
            return [super().begin(num_steps)]

        def commit(self, state, step, cached, score):
            state.append((step.index, cached))
            diaries[state[0]] = state

    class Broken(Reuse):
        def predict(self, state, time, rows=None):
            return [leaf * math.nan for leaf in super().predict(state, time, rows)]

    diaries = {}
    with pytest.warns(UserWarning, match=r"0 of 6 steps were cached.*not finite, recomputed \(10\)"):
        outputs, trace = guided(transformer, flux_inputs(1), Composition(Parts(), Diary(), Broken()))
    assert all(out.isfinite().all() for out in outputs)
    assert [diaries[branch][1:] for branch in (0, 1)] == [[(index, False) for index in range(STEPS)]] * 2
    assert any("not finite" in note for note in trace.notes)
