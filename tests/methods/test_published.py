"""Published settings as data, and what papers' codes and other libraries call them."""

import pytest

import cache4diffusion as c4d
from cache4diffusion import methods
from cache4diffusion.data import table, teacache_coefficients
from cache4diffusion.errors import SettingError
from cache4diffusion.settings import PEER_NAMES
from small_denoisers import flux

PUBLISHED = [(name, what) for name, cls in sorted(c4d.METHODS.items()) for what in cls.info.published]


@pytest.mark.parametrize(("name", "what"), PUBLISHED)
def test_every_published_set_is_accepted_as_it_stands(name, what):
    given = c4d.METHODS[name].info.published[what]
    made = c4d.method(name, **given)
    assert {setting: made.settings[setting] for setting in given} == given
    assert not made.is_off()


def test_what_is_said_to_be_remeasured_is_published():
    for cls in c4d.METHODS.values():
        assert set(cls.info.remeasured) <= set(cls.info.published)


CARD = {  # FORA, TaylorSeer ... as on their cards; a set may say more
    ("fora", "DiT-XL/2, 250 steps"): {"interval": 3, "anchor": "last"},
    ("taylorseer", "FLUX.1-dev"): {"interval": 6, "order": 1, "warmup": 3},
    ("taylorseer", "HunyuanVideo"): {"interval": 5, "order": 1, "warmup": 1},
    ("taylorseer", "DiT-XL/2"): {"interval": 4, "order": 4, "warmup": 2},
    ("taylorseer-lite", "HunyuanImage-2.1, fast"): {"interval": 5, "order": 2, "warmup": 3},
    ("speca", "FLUX.1-dev"): {"threshold": 7, "decay": 0.3, "min_run": 2, "max_run": 8, "order": 2, "floor": 0.1},
    ("speca", "HunyuanVideo"): {"threshold": 1, "decay": 0.1, "min_run": 4, "max_run": 12, "order": 1, "warmup": 1},
    ("dbcache", "default, F8B0_W8_R0.08"): {"front": 8, "back": 0, "threshold": 0.08, "warmup": 8},
    ("fbcache", "FLUX.1-dev"): {"threshold": 0.08},
    ("teacache", "flux, 1.8x"): {"threshold": 0.4, "coefficients": "flux"},
    ("deepcache", "Stable Diffusion, demo"): {"interval": 5, "schedule": "quadratic", "center": 15, "power": 1.4},
    ("pab", "Open-Sora-Plan 1.1"): {
        "mlp_timesteps": (738, 714, 690, 666, 642, 618, 594, 570, 546, 522, 498, 474, 450, 426),
        "mlp_blocks": (0, 1, 2, 3, 4, 5, 6),
        "mlp_skip": 2,
    },
    ("toca", "DiT-XL/2, 50 DDIM steps"): {"interval": 3, "recompute_ratio": 0.07, "bonus": 0.6, "window": 2},
    ("toca", "DiT-XL/2, 250 DDPM steps"): {"interval": 4, "recompute_ratio": 0.07, "schedule": "dit-ddpm"},
    ("toca", "PixArt-alpha, 20 steps"): {"interval": 3, "recompute_ratio": 0.3, "bonus": 0.4, "window": 4},
    ("toca", "Open-Sora 1.2"): {"interval": 3, "recompute_ratio": 0.1, "cross_weight": 1.0, "warmup": 3},
    # DuCa's README runs DiT and PixArt with --cache-type attention, Open-Sora's script has kv-norm.
    ("duca", "DiT-XL/2, 50 DDIM steps"): {"recompute_ratio": 0.05, "score": "attention", "bonus": 0.8, "window": 2},
    ("duca", "PixArt-alpha"): {
        "recompute_ratio": 0.75, "score": "attention", "cross_weight": 1.0, "bonus": 0.4, "window": 4,
    },
    ("clusca", "FLUX.1-dev"): {"interval": 5, "order": 1, "warmup": 3, "clusters": 16, "gamma": 0.005},
    ("clusca", "DiT-XL/2"): {"interval": 4, "order": 4, "warmup": 2, "clusters": 16, "gamma": 0.0},
    ("clusca", "HunyuanVideo"): {"interval": 5, "warmup": 1, "clusters": 32, "gamma": 0.01, "spreads_text": True},
    ("duca", "Open-Sora 1.2"): {"recompute_ratio": 0.1, "score": "value_norm", "warmup": 3},
}  # fmt: skip


@pytest.mark.parametrize(("name", "what"), CARD)
def test_published_sets_are_the_cards(name, what):
    given = c4d.METHODS[name].info.published[what]
    assert {setting: given[setting] for setting in CARD[name, what]} == CARD[name, what]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("taylorseer", "FLUX.1-dev"),
        ("taylorseer-lite", "HunyuanImage-2.1, fast"),
        ("dbcache", "default, F8B0_W8_R0.08"),
        ("fbcache", "FLUX.1-dev"),
        ("fastercache", "CogVideoX, 50 steps"),
        ("toca", "FLUX.1-dev (intervals 4 to 6)"),
    ],
)
def test_these_defaults_are_a_published_set(name, what):
    """The others say in their docstring how their defaults differ."""
    given = c4d.METHODS[name].info.published[what]
    defaults = c4d.METHODS[name]().settings
    assert {setting: defaults[setting] for setting in given} == given


@pytest.mark.parametrize("name", ["fora", "speca", "deepcache", "teacache"])
def test_defaults_that_are_no_published_set_are_declared(name):
    cls = c4d.METHODS[name]
    assert not any(given.items() <= cls().settings.items() for given in cls.info.published.values() if len(given) > 2)
    differences = " ".join((cls.__doc__ or "").split()).split("Differences from the code:")[1]
    assert "default" in differences


def test_teacaches_coefficients_are_the_cards():
    card = {
        "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
        "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
        "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
        "cosmos": (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
        "lumina-next": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
        "lumina2-v2": (
            225.7042019806413,
            -608.8453716535591,
            304.1869942338369,
            124.21267720116742,
            -1.4089066892956552,
        ),
        "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
        "open-sora": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
        "open-sora-plan": (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469),
    }
    thresholds = {
        "flux": {0.25: "1.5x", 0.4: "1.8x", 0.6: "2.0x", 0.8: "2.25x"},
        "hunyuan-video": {0.1: "1.6x", 0.15: "2.1x"},
        "mochi": {0.06: "1.5x", 0.09: "2.1x"},
        "ltx-video": {0.03: "1.6x", 0.05: "2.1x"},
        "cosmos": {0.3: "1.4x", 0.4: "2.0x"},
        "lumina-next": {0.2: "1.5x", 0.3: "1.9x", 0.4: "2.4x", 0.5: "2.8x"},
        "lumina2-v2": {0.3: ""},
        "latte": {0.1: "slow", 0.2: "fast"},
        "open-sora": {0.1: "", 0.2: ""},
        "open-sora-plan": {0.1: "", 0.2: ""},
    }
    sets = table("teacache")["sets"]
    assert sets.keys() == card.keys()
    for name, entry in sets.items():
        assert teacache_coefficients(name) == card[name]
        assert {float(value): note for value, note in entry["thresholds"].items()} == thresholds[name]
        assert entry["signal"] == "first block's modulated input", "the only signal that is computed"


# -- names of others -------------------------------------------------------------------------------------------------

PEERS = [
    ("teacache", "rel_l1_thresh", "'threshold'"),
    ("fbcache", "residual_diff_threshold", "'threshold'"),
    ("dbcache", "residual_diff_threshold", "'threshold'"),
    ("dbcache", "Fn_compute_blocks", "'front'"),
    ("dbcache", "Bn_compute_blocks", "'back'"),
    ("dbcache", "max_warmup_steps", "'warmup'"),
    ("dbcache", "max_continuous_cached_steps", "'max_run'"),
    ("dbcache", "max_accumulated_residual_diff_threshold", "'max_accumulated'"),
    ("dbcache", "steps_computation_mask", "'mask'"),
    ("fora", "fresh_threshold", "'interval'"),
    ("taylorseer", "fresh_threshold", "'interval'"),
    ("taylorseer", "max_order", "'order'"),
    ("taylorseer", "first_enhance", "'warmup'"),
    ("taylorseer", "cache_interval", "'interval'"),
    ("taylorseer-lite", "max_order", "'order'"),
    ("speca", "base_threshold", "'threshold'"),
    ("speca", "max_taylor_steps", "'max_run'"),
    ("toca", "fresh_threshold", "'interval'"),
    ("toca", "fresh_ratio", "'recompute_ratio'"),
    ("toca", "soft_fresh_weight", "'age_weight'"),
    ("deepcache", "cache_interval", "'interval'"),
    ("deepcache", "cache_branch_id", "'block' and 'layer'"),
    ("fastercache", "unconditional_batch_skip_range", "'interval'"),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), PEERS)
def test_a_peers_name_is_answered_with_ours(name, theirs, ours):
    wanted = f"has no setting {theirs!r}; here it is called {ours}."
    for make in (
        lambda: c4d.method(name, **{theirs: 1}),
        lambda: c4d.METHODS[name](**{theirs: 1}),
        lambda: c4d.accelerate(flux(1, 1), name, **{theirs: 1}),
    ):
        with pytest.raises(SettingError) as caught:
            make()
        assert wanted in str(caught.value)


def test_every_name_we_answer_with_is_a_setting_of_some_method():
    known = {entry["name"] for cls in c4d.METHODS.values() for entry in cls.describe()}
    for theirs, ours in PEER_NAMES.items():
        assert set(ours.split(" and ")) <= known, theirs
        assert theirs == theirs.lower(), "names are compared in lower case"


def test_a_peers_name_is_answered_inside_a_component_as_well():
    with pytest.raises(SettingError, match="'fresh_threshold'; here it is called 'interval'"):
        c4d.accelerate(flux(1, 1), "fora", gate="interval(fresh_threshold=3)")


def test_a_name_that_no_peer_has_is_answered_with_the_nearest():
    with pytest.raises(SettingError, match="did you mean 'interval'"):
        methods.TaylorSeer(intervall=3)
    with pytest.raises(SettingError, match="'max_order'"):
        methods.Fora(max_order=2)  # a peer's name, but FORA has no such setting
