"""Putting what was measured of all methods together, and which rows are the front."""

import json
from pathlib import Path

import pytest

import cache4diffusion as c4d
from cache4diffusion.errors import AnatomyError
from cache4diffusion.info import FAMILIES
from cache4diffusion.measure import MeasureError, Results
from scripts import script

PUBLISHED = Path(__file__).parents[2] / "docs" / "benchmarks" / "all-methods.json"


@pytest.fixture(scope="module")
def whole():
    return Results.load(PUBLISHED)


@pytest.fixture(scope="module")
def everything():
    return script("everything")


def part_of(results, family):
    mine = [row for row in results.methods if c4d.METHODS[row.method].info.family == family]
    return results.model_copy(update={"rows": [results.baseline, *results.fewer_steps, *mine]})


def test_a_row_is_on_the_front_unless_another_one_beats_it(everything, whole):
    rows = [*whole.fewer_steps, *whole.methods]
    front = everything.front_of(rows)

    def beats(a, b):
        better = (a.flops_speedup >= b.flops_speedup, a.psnr >= b.psnr)
        return all(better) and (a.flops_speedup, a.psnr) != (b.flops_speedup, b.psnr)

    names = {row.name for row in front}
    for row in rows:
        is_beaten = any(beats(other, row) for other in rows)
        assert (row.name in names) != is_beaten, row.name
    assert [row.flops_speedup for row in front] == sorted(row.flops_speedup for row in front)


def test_families_measured_apart_are_the_whole(everything, whole):
    parts = [part_of(whole, family) for family in FAMILIES]
    found = everything.merged(parts, {"l2c": "it has nothing to route"})
    assert {row.name for row in found.rows} == {row.name for row in whole.rows}
    assert found.conditions.left_out == {**whole.conditions.left_out, "l2c": "it has nothing to route"}


def test_other_conditions_or_images_do_not_go_together(everything, whole):
    part = part_of(whole, FAMILIES[0])
    other = part.model_copy(update={"conditions": part.conditions.model_copy(update={"captions": 3})})
    with pytest.raises(MeasureError, match="conditions differ"):
        everything.merged([part, other])
    baseline = part.baseline.model_copy(
        update={"correct_per_caption": [not answer for answer in part.baseline.correct_per_caption]}
    )
    other = part.model_copy(update={"rows": [baseline, *part.rows[1:]]})
    with pytest.raises(MeasureError, match="uncached images differ"):
        everything.merged([part, other])


def test_what_cannot_be_calibrated_is_left_out_with_the_reason(everything, tmp_path, monkeypatch, capsys):
    calibrations = script("calibrations")

    def refuse(model, name):
        raise AnatomyError("it has no parts")

    monkeypatch.setattr(calibrations, "load_model", lambda name: None)
    monkeypatch.setattr(calibrations, "made_for", refuse)
    assert calibrations.main(["--methods", "l2c,lazydit", "--out", str(tmp_path)]) == 0
    assert everything.refusals(tmp_path) == {"l2c": "it has no parts", "lazydit": "it has no parts"}
    assert "l2c: refused: it has no parts" in capsys.readouterr().err
    assert everything.refusals(tmp_path / "none") == {}


def test_the_pages_of_another_model_lie_beside_the_default_ones(everything, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    for family in FAMILIES:
        folder = tmp_path / "out" / "everything-scenes-dit"
        folder.mkdir(parents=True, exist_ok=True)
        part_of(whole, family).save(everything.part_file(folder, family))
    assert everything.main(["--model", "scenes-dit", "--page"]) == 0
    made = tmp_path / "docs" / "benchmarks"
    names = ["all-methods-scenes-dit.json", "all-methods-scenes-dit.md", "all-methods-scenes-dit.svg"]
    assert sorted(path.name for path in made.iterdir()) == names
    assert len(json.loads((made / names[0]).read_text())["rows"]) == len(whole.rows)
    assert "](all-methods-scenes-dit.svg)" in (made / names[1]).read_text()
