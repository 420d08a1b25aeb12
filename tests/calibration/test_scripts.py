"""benchmarks/calibrations.py and calibrated.py: what ships, and what a calibrated method is held against."""

import json

import pytest
import torch
from calibrating import calibrated as made_on

import cache4diffusion as c4d
import toys
from cache4diffusion import data
from cache4diffusion.calibration import load_calibration
from scripts import script

calibrations, calibrated = script("calibrations"), script("calibrated")


def test_what_ships_is_slim_and_fits_the_room(tmp_path, monkeypatch):
    pipe = toys.flux_pipeline()
    whole = made_on(pipe, "smoothcache")
    whole.save(tmp_path / "out" / "smoothcache.safetensors")
    made_on(pipe, "magcache").save(tmp_path / "out" / "magcache.safetensors")
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data" / "__init__.py"))
    target = tmp_path / "data" / "calibrations" / "scenes-toy"
    assert calibrations.ship(tmp_path / "out", "scenes-toy", 1_000_000) == ["smoothcache", "magcache"]
    shipped = load_calibration(target / "smoothcache.safetensors")
    assert shipped.entry.sums == {}
    assert shipped.verdict() == whole.verdict()
    assert all(torch.allclose(v.double(), whole.entry.fit[k]) for k, v in shipped.entry.fit.items())
    assert set(data.shipped_calibrations("smoothcache")) == {"scenes-toy"}
    size = (target / "smoothcache.safetensors").stat().st_size
    assert calibrations.ship(tmp_path / "out", "scenes-toy", size) == ["smoothcache"], "no room for the next"
    assert [file.name for file in target.iterdir()] == ["smoothcache.safetensors"]


def test_every_wanted_calibration_is_one_that_a_method_takes():
    takes = {name for name, cls in c4d.METHODS.items() if cls.calibrator is not None}
    assert set(calibrated.PAIRS) <= set(calibrations.WANTED) == takes
    assert calibrations.OPTIONS.keys() | calibrations.SETTINGS.keys() <= takes
    for name, options in calibrations.OPTIONS.items():
        assert set(options) <= {entry["name"] for entry in c4d.METHODS[name].calibrator.describe()}


def test_counterparts_are_sorted_by_cost():
    for _, others in calibrated.PAIRS.values():
        costs = [calibrated._cost(other) for other in sorted(others, key=calibrated._cost)]
        assert costs == sorted(costs)
    dear, cheap = ("fora", {"interval": 2, "warmup": 46}), ("fora", {"interval": 6})
    assert calibrated._cost(dear) < calibrated._cost(cheap)


def pair(wins, sound):
    side = {
        "flops_speedup": 2.0, "latency_speedup": 1.9, "psnr": 40.0, "accuracy_difference": 0.0,
        "accuracy_difference_interval": [-0.01, 0.01], "strip": "FcFc",
    }  # fmt: skip
    return {
        "method": "l2c", "settings": {}, "r2": 0.8, "verdict": "as it is\nand more", "is_sound": sound,
        "calibrated": side,
        "counterpart": {"method": "fora", "settings": {"interval": 2}, **side}, "wins": wins,
        "wins_interval": [0.2, 0.9],
    }  # fmt: skip


@pytest.mark.parametrize(("wins", "sound", "wrong"), [(0.9, True, False), (0.4, False, False), (0.5, True, True)])
def test_a_verdict_is_wrong_where_what_it_called_sound_loses(wins, sound, wrong):
    assert calibrated.contradicts(pair(wins, sound)) is wrong
    text = calibrated.page({"caption": "made up", "pairs": [json.loads(json.dumps(pair(wins, sound)))]})
    assert ("**Called sound, and lost: `l2c`.**" in text) is wrong
    assert ("Lost to its counterpart: `l2c`" in text) is (wins <= 0.5)
    assert f"- `l2c`, {'sound' if sound else 'not called sound'}:\n  - as it is\n  - and more" in text
