"""benchmarks/adaptive.py on a tiny untrained model, and its judgement on made-up findings."""

import json

import pytest

import cache4diffusion as c4d
import tiny_scenes
from cache4diffusion.gates import Step
from cache4diffusion.method import Dial
from scripts import script
from small_denoisers import remember_anatomy

adaptive = script("adaptive")
Decision = adaptive.Decision
CAPTIONS = ["a red circle on a gray background", "a blue star left of a green square on a white background"]
STEPS = 8


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    remember_anatomy(monkeypatch)
    monkeypatch.setattr(adaptive, "VALUES", 5)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tiny_scenes.save(tmp_path_factory.mktemp("weights") / "tiny-scenes")
    return adaptive.Stage(adaptive.reference.load(folder), CAPTIONS, STEPS)


def test_a_sweep_and_a_batch_beside_single_runs(stage, tmp_path):
    result = adaptive.measure(stage, ["fbcache"], rows=2, batch=2)
    result = json.loads(json.dumps(result))
    assert set(result) == {"schema", "conditions", "methods"}
    (entry,) = result["methods"]
    assert set(entry) == {"method", "dial", "sweep", "allowed", "correlation", "rows", "checks"}
    assert [each["value"] for each in entry["sweep"]] == [None, *c4d.METHODS["fbcache"].info.dial.values(5)]
    for each in entry["sweep"]:
        assert set(each) == {"value", "settings", "share", "shares", "strips"}
        assert len(each["strips"]) == len(each["shares"]) == 2
        assert all(len(strip) == STEPS for strip in each["strips"])
    assert entry["sweep"][0]["strips"] == ["F" * STEPS] * 2
    assert entry["sweep"][-1]["strips"] == [entry["allowed"]] * 2 == ["F" + "c" * (STEPS - 1)] * 2
    rows = entry["rows"]
    assert rows["steps"] == rows["captions"] * STEPS * 2, "two branches decide in every step"
    assert rows["calls"] == STEPS * 2
    checks = entry["checks"]
    assert len(checks) == 8
    for what in (
        "nothing is cached at off",
        "all that is allowed is cached at the largest value",
        "strips in a batch are those alone",
        "latents in a batch are those alone",
        "only rows that were to be computed were",
    ):
        assert checks[what], (what, entry)
    text = adaptive.page(result)
    assert "## fbcache" in text
    assert all(each["strips"][0] in text for each in entry["sweep"])


def test_modules_that_run_for_every_row_are_noticed(stage, monkeypatch):
    monkeypatch.setattr(adaptive, "resting", lambda engine: ["x_embedder"])
    found = adaptive.compare_rows(stage, adaptive.Subject("fbcache"), Dial.OPEN, 2)
    assert found.miscounted[0].endswith("x_embedder was given 2 rows, not 0")
    assert not found.differing


QUICK = ("dbprune", "easycache", "speca", "teacache")  # blocks, the whole denoiser, parts, a span


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in adaptive.METHODS]
)
def test_the_largest_value_caches_what_is_allowed_and_rows_are_their_own(stage, name):
    subject, stage = adaptive.Subject(name), adaptive.Stage(stage.pipe, CAPTIONS, 14)
    with adaptive.running(stage, subject, Dial.OPEN, 1) as (seen, _):
        stage.sample([0])
    (alone,) = seen.of_rows()
    allowed = adaptive.allowed_strip(subject.composition(Dial.OPEN), 14)
    assert adaptive.strip_of(alone) == allowed
    assert "c" in allowed
    found = adaptive.compare_rows(stage, subject, subject.dial.values(5)[2], 2)
    assert not found.differing and not found.miscounted
    assert found.distance <= adaptive.AGREE
    assert found.calls == 28
    assert found.watched_modules > 0


def test_every_method_with_a_dial_can_be_swept():
    assert {name for name in c4d.METHODS if c4d.METHODS[name].info.family == "adaptive gates"} <= set(adaptive.METHODS)
    for name in adaptive.METHODS:
        subject = adaptive.Subject(name)
        assert subject.composition(None).is_off
        assert subject.composition(None).decide == "row", "rows are compared with single runs"
        values = subject.dial.values(10)
        assert len(values) == 10 and values == sorted(values) and values[-1] == Dial.OPEN
        assert len({str(subject.composition(value).gate) for value in values}) == 10
        allowed = adaptive.allowed_strip(subject.composition(Dial.OPEN), 20)
        assert adaptive.allowed_strip(subject.composition(None), 20) == "F" * 20
        assert allowed.count("c") >= 5


def test_a_score_is_near_if_a_threshold_a_little_off_decides_otherwise():
    subject = adaptive.Subject("fbcache")
    made = subject.composition(0.5)
    with adaptive.Decisions(made, subject.around(0.5), 1) as seen:
        for step, score in enumerate((None, 0.5 * (1 + 0.5e-4), 0.5 * (1 + 2e-4), 0.1)):
            made.gate.commit(None, Step(step, 4), False, score)
    assert [decision.is_near for decision in seen.log] == [False, True, False, False]
    made.gate.commit(None, Step(0, 4), False, 0.5)
    assert len(seen.log) == 4, "what was found is put back"


def decisions(letters, near=()):
    return [Decision(i, letter == "c", i in near) for i, letter in enumerate(letters)]


@pytest.mark.parametrize(
    ("ours", "theirs", "near", "is_equal", "differing", "behind"),
    [
        ("FcFc", "FcFc", (), True, [], 0),
        ("FcFc", "FFFc", (), False, ["row 3, step 1"], 2),
        ("FcFc", "FFFc", (1,), False, [], 2),
        ("FcFc", "FcFc", (1,), True, [], 0),
        ("FcF", "FcFc", (), False, ["row 3: 3 decisions in the batch, 4 alone"], 0),
    ],
)
def test_decisions_differ_near_the_threshold_or_not_at_all(ours, theirs, near, is_equal, differing, behind):
    found = adaptive.Rows(0.5, 1)
    assert adaptive.compare_decisions(3, decisions(ours, near), decisions(theirs), found) == is_equal
    assert (found.differing, found.behind) == (differing, behind)


def entry(**rows):
    found = adaptive.Rows(0.5, 2, steps=1000, near=10, distance=1e-4, watched_modules=9)
    sweep = [{"share": 0.0, "strips": ["FF"]}, {"share": 0.5, "strips": ["Fc"]}]
    return {
        "sweep": sweep,
        "allowed": "Fc",
        "correlation": 0.9,
        "rows": {**vars(found), "bfloat16": {"uncached": 1.0, "cached": 2.0}, **rows},
    }


@pytest.mark.parametrize(
    ("rows", "broken"),
    [
        ({}, None),
        ({"differing": ["row 0, step 1"]}, "strips in a batch are those alone"),
        ({"near": 11}, "few scores are near the threshold"),
        ({"distance": 2e-4}, "latents in a batch are those alone"),
        ({"bfloat16": {"uncached": 1.0, "cached": 2.1}}, "bfloat16 deviates no more than twice the uncached"),
        ({"miscounted": ["step 1"]}, "only rows that were to be computed were"),
        ({"watched_modules": 0}, "only rows that were to be computed were"),
    ],
)
def test_a_broken_promise_is_told(rows, broken):
    assert [what for what, holds in adaptive.checks_of(entry(**rows)).items() if not holds] == [broken] * bool(broken)


def test_a_broken_sweep_is_told():
    made = entry() | {"correlation": 0.89, "allowed": "cc"}
    made["sweep"][0]["share"] = 0.1
    assert [what for what, holds in adaptive.checks_of(made).items() if not holds] == [
        "nothing is cached at off",
        "all that is allowed is cached at the largest value",
        "the share rises with the value",
    ]


def test_ranks_are_compared_and_equal_numbers_share_theirs():
    assert adaptive.rank_correlation([1, 2, 3, 4], [1, 4, 9, 100]) == pytest.approx(1)
    assert adaptive.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert adaptive.rank_correlation([1, 2, 3], [5, 5, 7]) == pytest.approx(3**0.5 / 2)
    assert adaptive.rank_correlation([1, 2, 3], [5, 5, 5]) == 0


def test_a_strip_has_a_letter_per_step():
    mixed = [Decision(0, False, False), Decision(0, False, False), Decision(1, True, False), Decision(1, False, False)]
    assert adaptive.strip_of([*mixed, Decision(2, True, False), Decision(2, True, False)]) == "Fmc"
    assert adaptive.share_of(mixed) == 0.25


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--methods", "fora"], "fora: no dial"), (["--rows", "1"], "2 or more"), (["--captions", "4"], "at most")],
)
def test_wrong_options_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        adaptive.parsed(words)
    assert said in capsys.readouterr().err
