"""Every method at settings from gentle to hard, and the bench that runs them all."""

import dataclasses

import pytest

import cache4diffusion as c4d
import toys
from cache4diffusion import data
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.store import opened
from cache4diffusion.cli.show import strip_of
from cache4diffusion.errors import FileFormatError, SettingError
from cache4diffusion.info import MethodInfo
from cache4diffusion.ladder import ladder


@pytest.mark.parametrize("name", sorted(c4d.METHODS))
def test_the_rungs_of_a_method_are_settings_that_cache(name):
    info = c4d.METHODS[name].info
    made = [c4d.method(name, **rung) for rung in info.ladder]
    assert len({repr(chosen.settings) for chosen in made}) == len(made), "each rung is another"
    assert not any(chosen.is_off() for chosen in made)


@pytest.mark.parametrize("name", sorted(c4d.METHODS))
def test_the_rungs_rise_and_compute_a_sixth_of_the_steps_or_more(name):
    info = c4d.METHODS[name].info
    strips = [strip_of(c4d.method(name, **rung), 50) for rung in info.ladder]
    full = [sum(letter in "Fr" for letter in strip) for strip in strips if strip is not None]
    assert full == sorted(full, reverse=True)
    lowest = 0 if info.is_exact else 50 / 6  # what changes nothing may do so as often as it likes
    assert all(lowest <= count for count in full)
    assert not any(set(strip) == {"F"} for strip in strips if strip is not None)


def test_a_ladder_has_one_to_three_rungs():
    info = c4d.METHODS["fora"].info
    for rungs in ((), ({},) * 4):
        with pytest.raises(SettingError, match=f"a ladder of {len(rungs)} settings: give one to three"):
            dataclasses.replace(info, ladder=rungs)
    assert isinstance(info, MethodInfo)


def test_without_calibrations_those_that_need_one_are_left_out():
    found = ladder()
    needing = {name for name, cls in c4d.METHODS.items() if cls.info.needs_calibration}
    assert found.left_out.keys() == needing
    assert "c4d calibrate MODEL --method l2c" in found.left_out["l2c"]
    assert {chosen.info.name for chosen in found.methods} == c4d.METHODS.keys() - needing
    assert all(getattr(chosen, "calibration", None) is None for chosen in found.methods)


def made_by_hand(folder):
    folder.mkdir(exist_ok=True)
    return Calibration.by_hand("magcache", 4, {"ratios": [1.0] * 4}).save(folder / "magcache.safetensors")


def test_calibrations_come_from_a_folder(tmp_path):
    file = made_by_hand(tmp_path)
    found = ladder(tmp_path)
    given = {chosen.info.name: chosen.calibration for chosen in found.methods if hasattr(chosen, "calibration")}
    assert given["magcache"] == str(file)
    assert given["teacache"] is None
    assert str(tmp_path) in found.left_out["l2c"]


def test_a_broken_calibration_is_refused(tmp_path):
    (tmp_path / "smoothcache.safetensors").write_text("none")
    with pytest.raises(FileFormatError, match="truncated or no safetensors"):
        ladder(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"There is no folder .*nowhere of calibrations"):
        ladder(tmp_path / "nowhere")


def test_a_reference_model_names_its_shipped_calibrations(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "__init__.py"))
    made_by_hand(tmp_path / "calibrations").parent.rename(tmp_path / "scenes-toy")
    (tmp_path / "calibrations").mkdir()
    (tmp_path / "scenes-toy").rename(tmp_path / "calibrations" / "scenes-toy")
    assert opened("scenes-toy", "magcache").method == "magcache"
    chosen = c4d.method("magcache", calibration="scenes-toy")
    assert chosen.measured.fit["ratios"].tolist() == [1.0] * 4
    (mine,) = {c.calibration for c in ladder("scenes-toy").methods if c.info.name == "magcache"}
    assert mine == "scenes-toy"
    with pytest.raises(FileFormatError, match=r"scenes-joy\. Shipped ones of magcache are for scenes-toy"):
        c4d.method("magcache", calibration="scenes-joy")


def test_all_of_a_registry_side_by_side(monkeypatch):
    """What cannot run on this pipeline, or lacks a calibration, is named with the reason; the rest is measured."""
    chosen = {name: c4d.METHODS[name] for name in ("fora", "deepcache", "smoothcache")}
    monkeypatch.setattr("cache4diffusion.ladder.METHODS", chosen)
    made = c4d.compare(toys.Experts(), ["a", "b"], "all", steps=24, batch=2, fewer_steps=False, progress=False)
    assert {row.method for row in made.results.methods} == {"fora"}
    assert len(made.results.methods) == len(chosen["fora"].info.ladder)
    left_out = made.results.conditions.left_out
    assert {name.split()[0] for name in left_out} == {"deepcache", "smoothcache"}
    assert "U-Net" in next(reason for name, reason in left_out.items() if name.startswith("deepcache"))
    assert "c4d calibrate" in left_out["smoothcache"]


def test_calibrations_without_all_are_refused():
    with pytest.raises(SettingError, match="is for methods='all'"):
        c4d.compare(None, ["one"], ["fora"], calibrations="folder")


@pytest.mark.parametrize("name", sorted(toys.CALIBRATED))
def test_the_rungs_of_a_calibrated_method_are_made_from_its_calibration(name):
    for rung in c4d.METHODS[name].info.ladder:
        c4d.method(name, **{**toys.CALIBRATED[name], **rung}).compose()
