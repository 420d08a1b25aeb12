"""No two methods are the same by accident: on equal full steps and at an equal site their outputs differ, unless one is
listed as a special case of the other, and then they are equal."""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass, field

import pytest

import cache4diffusion as c4d
import toys
from cache4diffusion import reference
from cache4diffusion.errors import CompositionError
from cache4diffusion.gates import LookAhead, Mask, Schedule
from cache4diffusion.sites import Denoiser, GatedParts, Parts, Span, Trajectory
from small_denoisers import remember_anatomy

# Enough full steps for every history, at equal distances at the end, and cached steps at distances 1 and 2.
FULL = "FFFFFccFccFccFccFccF"
STEPS = len(FULL)
FITTING = {
    "delta-dit": {"switch": 0.5},  # its first late step is always full, as step 10 is
    "lazydit": {"threshold": 2.0},  # parts without weights score 0.5
}
GIVEN = tuple(letter == "F" for letter in FULL)
DIFFERENT = 1e-4
ROUNDING = 1e-5

# Places that a method may be moved to, if its parts allow it. A method whose own site is more than a place (a mix, a
# span that switches sides, blocks with decisions of their own) stays there.
PLACES = {"denoiser": Denoiser(), "span": Span(front=1), "parts": Parts(), "trajectory": Trajectory()}
FITTED = ("icc", "fastcache")  # their weights are those of one denoiser; tests of their own say what they are not
METHODS = sorted(  # these are for FLUX
    name for name in set(c4d.METHODS) - toys.ELSEWHERE if name not in FITTED
)


@dataclass(frozen=True)
class Same:
    """A method that is another one in a special case.

    Args:
        child, parent: names.
        why: in words.
        settings: of the child, at which it holds; none: always.
        parents: settings of the parent.
        as_is: proven on whole runs with gates of their own, decisions included; else on given full steps, at every
            place that both allow.
        tolerance: relative; 0 is bit for bit.
    """

    child: str
    parent: str
    why: str
    settings: dict = field(default_factory=dict)
    parents: dict = field(default_factory=dict)
    as_is: bool = False
    tolerance: float = 0.0

    def __str__(self) -> str:
        def words(name, settings):
            return name + (f"({', '.join(f'{k}={v!r}' for k, v in settings.items())})" if settings else "")

        return f"{words(self.child, self.settings)} is {words(self.parent, self.parents)}"


PLAIN = "reuse: it differs from FORA in where and when"
SPECIALISATIONS = (
    *(
        Same(name, "fora", PLAIN)
        for name in (
            "adacache", "bacache", "bwcache", "cachequant", "dbcache", "easycache", "fbcache", "feb-cache",
            "harmonica", "l2c", "lemica", "magcache", "scm", "seacache", "skip-dit", "smoothcache", "teacache",
        )
    ),
    Same("dbprune", "fbcache", "reuse, block by block: the sum is the span's", tolerance=ROUNDING),
    Same("quantcache", "dbprune", "in 16 bits it is reuse, block by block", {"bits": 16.0}, {"front": 0}),
    Same("block-caching", "magcache", "reuse, block by block: the sum is the span's", tolerance=ROUNDING),
    Same("fbcache", "dbcache", "one front block, no limits", {"threshold": 0.2},
         {"threshold": 0.2, "front": 1, "warmup": 0}, as_is=True),
    Same("taylorseer-lite", "taylorseer", "the whole denoiser as its site", {"order": 1}),
    Same("taylorseer", "fora", "order 0 is reuse", {"interval": 3, "order": 0, "warmup": 1}, {"interval": 3}, True),
    Same("newton", "fora", "order 0 is reuse", {"interval": 3, "order": 0, "warmup": 1}, {"interval": 3}, True),
    Same("newton", "taylorseer", "a line has one slope", {"order": 1}, {"order": 1}, True, ROUNDING),
    Same("hicache", "taylorseer", "2 sigma^2 = 1", {"order": 1, "sigma": math.sqrt(0.5)}, {"order": 1},
         tolerance=ROUNDING),
    Same("hicache", "fora", "order 0 is reuse", {"order": 0}),
    Same("femo", "taylorseer", "no momentum", {"beta": 0.0}, {"order": 1}, True, ROUNDING),
    Same("goc", "fora", "nothing of the change", {"eta": 0.0}),
    Same("speca", "taylorseer-lite", "the draft without its check"),
    Same("speca", "taylorseer", "the draft without its check", {"order": 1}, {"order": 1}),
    Same("ab-cache", "fora", "one output alone", {"order": 1}),
    Same("toca", "fora", "no token", {"recompute_ratio": 0.0}),
    Same("taocache", "ab-cache", "without a calibration the last change is added whole: order 2 over all steps"),
    Same("dpcache", "taylorseer", "the line through the last two full steps, at searched ones"),
)  # fmt: skip


def group_of(name):
    """The method and all that are it without any setting, or that it is."""
    known = {name}
    while True:
        pairs = [row for row in SPECIALISATIONS if not row.settings and not row.parents]
        more = {other for row in pairs for other in (row.child, row.parent) if {row.child, row.parent} & known}
        if more <= known:
            return known
        known |= more


@dataclass(frozen=True)
class Stage:
    """A pipeline and one image of it."""

    name: str

    @functools.cached_property
    def pipe(self):
        if self.name == "toy":
            return toys.flux_pipeline()
        pipe = reference.load("scenes-flux")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, method, settings=None):
        """The latent that a method leads to, and its strip."""
        with c4d.accelerate(self.pipe, method, **(settings or {})) as handle:
            if self.name == "toy":
                latent = toys.generate(self.pipe, STEPS)
            else:
                call = {**reference.SAMPLING, "num_inference_steps": STEPS, "output_type": "latent"}
                caption = reference.held_out_captions(1, 0)[0]
                latent = self.pipe(caption, generator=toys.generator(0), **call).images
            return latent, handle.stats["strip"]


STAGES = {name: Stage(name) for name in ("toy", "scenes-flux")}


def moved(made, place):
    """A composition with the given full steps, at a place; None where its parts do not allow it.

    The list takes the gate's place, or overrules it where the predictor reads what the gate watches.
    """
    site, changes = made.site, {"gate": Schedule(tuple(itertools.compress(range(STEPS), GIVEN))), "guards": ()}
    if getattr(made.predictor, "sees", None) == "front":
        changes = {"guards": (Mask(GIVEN, policy="static"),)}
    if place != "own":
        kind = type(PLACES[place])
        if isinstance(site, kind) and (type(site) is not kind or kind is Trajectory):
            pass  # its own form of that place
        elif type(site) not in map(type, PLACES.values()):
            return None
        else:
            changes["site"] = PLACES[place]
    if place == "trajectory":
        changes |= {"branches": "tied", "decide": "batch"}
    try:
        return dataclasses.replace(made, **changes)
    except CompositionError:
        return None


@functools.cache
def outputs(stage, name, settings=()):
    """Latents by place. A method that takes no list of full steps has its own only."""
    made = toys.made(name, **{**FITTING.get(name, {}), **dict(settings)})
    if made.site is None or isinstance(made.gate, LookAhead) or isinstance(made.site, GatedParts):
        return {"own": STAGES[stage].sample(made)[0]}
    found = {}
    for place in ("own", *PLACES):
        there = moved(made, place)
        if there is not None:
            found[place], strip = STAGES[stage].sample(there)
            assert strip.replace("p", "c") == FULL, f"{name} at {place} followed {strip}"
    return found


def differences(stage, one, other):
    """Relative difference of two methods (name and settings) at every place that both allow; else where they are."""
    a, b = (outputs(stage, name, tuple(sorted(settings.items()))) for name, settings in (one, other))
    shared = [place for place in PLACES if place in a and place in b] or ["own"]
    return {place: distance(a[place], b[place]) for place in shared}


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    remember_anatomy(monkeypatch)


stages = pytest.mark.parametrize("stage", ["toy", pytest.param("scenes-flux", marks=pytest.mark.slow)])


@stages
@pytest.mark.parametrize("row", SPECIALISATIONS, ids=str)
def test_a_special_case_equals_its_parent(row, stage):
    if row.as_is:
        fitting = [toys.FITTING.get(name, {}) for name in (row.child, row.parent)]
        (a, ours), (b, theirs) = (
            STAGES[stage].sample(name, {**known, **settings})
            for name, known, settings in zip((row.child, row.parent), fitting, (row.settings, row.parents), strict=True)
        )
        assert ours == theirs
        assert "c" in ours
        found = {"as it is": distance(a, b)}
    else:
        found = differences(stage, (row.child, row.settings), (row.parent, row.parents))
    assert max(found.values()) <= row.tolerance, f"{row}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_any_two_methods_differ_on_scenes_flux(name):
    """Each pair once: with the methods that come later in the alphabet."""
    group = group_of(name)
    others = [other for other in METHODS if other > name and other not in group]
    same = {
        f"{name} and {other} at {place}": value
        for other in others
        for place, value in differences("scenes-flux", (name, {}), (other, {})).items()
        if not value > DIFFERENT
    }
    assert not same, f"{same}: two methods are one; correct the wrong one, or list it in SPECIALISATIONS with its proof"


def test_every_special_case_names_methods_and_says_why():
    for row in SPECIALISATIONS:
        assert {row.child, row.parent} <= set(METHODS)
        assert row.why
    assert len({str(row) for row in SPECIALISATIONS}) == len(SPECIALISATIONS)


def test_the_places_are_told_apart():
    """Else two could agree because nothing was moved. A line is the same on the trajectory and at the denoiser."""
    found = outputs("toy", "taylorseer")
    assert set(found) == {"own", *PLACES}
    apart = itertools.combinations(("denoiser", "span", "parts"), 2)
    assert min(distance(found[a], found[b]) for a, b in apart) > DIFFERENT
    assert distance(found["denoiser"], found["trajectory"]) < ROUNDING
