"""benchmarks/architectures.py: its rules are the methods', and each pipeline keeps to them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cache4diffusion.trace import Record
from scripts import script

architectures = script("architectures")
COMMITTED = Path(__file__).parents[1] / "docs/benchmarks/architectures.json"
EVERY = (*architectures.TRANSFORMERS, *architectures.UNETS)
TAYLORSEER, LITE, DBCACHE, TEACACHE = architectures.METHODS


def records(strip, branch="cond", denoiser="transformer", scores=None, first=0):
    return [
        Record(denoiser, 0, first + step, branch, symbol, "", scores=() if scores is None else (scores[step],))
        for step, symbol in enumerate(strip)
    ]


def test_a_schedule_is_held_against_its_rule():
    assert architectures.faults(TAYLORSEER, records("FFFcccFcccFc"), None) == []
    (wrong,) = architectures.faults(TAYLORSEER, records("FFFcccFcccFF"), None)
    assert wrong.startswith("step 11 of transformer, cond is full and should not be")
    (deepcache,) = architectures.OF_UNETS
    assert architectures.faults(deepcache, records("FcccFcccFccc"), None) == []
    assert architectures.faults(deepcache, records("FFFcccFcccFc"), None)


def test_the_second_expert_begins_with_a_full_step_and_goes_on_with_the_run_s_schedule():
    second = records("FFcccFcc", denoiser="transformer_2", first=5)
    assert architectures.faults(TAYLORSEER, [*records("FFFcc"), *second], None) == []
    late = records("FcccFccc", denoiser="transformer_2", first=5)
    assert architectures.faults(TAYLORSEER, [*records("FFFcc"), *late], None)


def test_decisions_are_held_against_their_scores():
    scores = [None, None, None, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    assert architectures.faults(DBCACHE, records("FFFccFccFccF", scores=scores), 0.25) == []
    (wrong,) = architectures.faults(DBCACHE, records("FFFcFFccFccF", scores=scores), 0.25)
    assert "step 4" in wrong
    changes = [None, *[0.1] * 11]
    assert architectures.faults(TEACACHE, records("FccFccFccFcF", scores=changes), 0.25) == []
    assert architectures.faults(TEACACHE, records("FcccccccccFF", scores=changes), 0.25)


def test_a_tensor_that_two_branches_share_is_noticed():
    kept = {"cond": [torch.zeros(3)], "uncond": [torch.ones(4)]}
    engine = SimpleNamespace(
        name="unet",
        _states={(0, branch): branch for branch in kept},
        tensors_of=lambda branch: kept[branch],
    )
    states = architectures.States(SimpleNamespace(_engines=[engine]))
    states.look()
    assert states.bytes == {"unet/cond": 12, "unet/uncond": 16}
    assert not states.shared
    kept["uncond"].append(kept["cond"][0][:1])
    states.look()
    assert states.shared == {"unet/cond and unet/uncond"}


def small(monkeypatch, wide, methods=None):
    if methods is not None:
        monkeypatch.setattr(architectures, "METHODS", tuple(methods))
    rows = architectures.rows_of(wide, is_small=True, turns=0)
    for row in rows:
        assert row["wrong"] == [], row
        assert row["ideal"] > 1
    return rows


def test_two_experts_with_two_branches_each_keep_to_the_rules(monkeypatch):
    (wan,) = (wide for wide in EVERY if wide.case == "wan2.2")
    for row in small(monkeypatch, wan, [LITE, DBCACHE]):
        assert set(row["states"]) == {f"{name}/{b}" for name in row["denoisers"] for b in ("cond", "uncond")}


def test_deepcache_has_a_state_per_branch(monkeypatch):
    (row,) = small(monkeypatch, architectures.UNETS[0])
    assert set(row["strips"].values()) == {"FcccFcccFccc"}
    assert list(row["steps"].values()) == [[0, 4, 8]]
    assert len(row["states"]) == 1 and len(row["two_calls"]["states"]) == 2
    (batched,) = row["states"].values()
    assert sum(row["two_calls"]["states"].values()) == batched


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("wide", [pytest.param(wide, id=wide.case) for wide in EVERY])
def test_all_keep_to_the_rules(monkeypatch, wide):
    small(monkeypatch, wide)


def test_the_table_has_every_method_on_every_architecture_as_expected():
    result = json.loads(COMMITTED.read_text())
    found = {(row["case"], row["method"]) for row in result["rows"]}
    expected = {(wide.case, tried.name) for wide in architectures.TRANSFORMERS for tried in architectures.METHODS}
    expected |= {(wide.case, tried.name) for wide in architectures.UNETS for tried in architectures.OF_UNETS}
    assert found == expected, "run `make architectures`"
    assert not [row for row in result["rows"] if row["wrong"] or row["uncounted"]]
    text = architectures.page(result)
    assert text == COMMITTED.with_suffix(".md").read_text()
    assert "16 architectures" in text and "## What was not as expected\n\nNothing." in text
