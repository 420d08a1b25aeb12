"""benchmarks/everything.py: parts put together, and what its page says of them."""

import itertools
import math
import os

import pytest

from cache4diffusion.errors import AnatomyError
from cache4diffusion.info import FAMILIES
from cache4diffusion.measure import MeasureError, Results
from scripts import script

everything = script("everything")


def with_rows(results, rows):
    return results.model_copy(update={"rows": [results.baseline, *results.fewer_steps, *rows]})


def test_no_row_of_the_front_is_beaten_and_every_other_is(made_up):
    rows = [*made_up[0].fewer_steps, *made_up[0].methods]
    front = everything.front_of(rows)

    def beats(a, b):
        return (a.flops_speedup >= b.flops_speedup and a.psnr >= b.psnr) and (
            a.flops_speedup > b.flops_speedup or a.psnr > b.psnr
        )

    assert not any(beats(a, b) for a, b in itertools.permutations(front, 2))
    assert all(any(beats(a, b) for a in front) for b in rows if b not in front)
    assert [row.flops_speedup for row in front] == sorted(row.flops_speedup for row in front)
    assert everything.front_of(reversed(rows)) == front


def test_parts_make_the_whole(made_up):
    whole = made_up[0]
    first, second = with_rows(whole, whole.methods[:3]), with_rows(whole, whole.methods[3:])
    assert everything.merged([first, second]) == whole
    left_out = second.conditions.model_copy(update={"left_out": {"deepcache": "no levels"}})
    joined = everything.merged([first, second.model_copy(update={"conditions": left_out})])
    assert joined.conditions.left_out == {"deepcache": "no levels"}
    joined = everything.merged([first, second], {"l2c": "nothing to route"})
    assert joined.conditions.left_out == {**whole.conditions.left_out, "l2c": "nothing to route"}


@pytest.mark.parametrize("changed", ["steps", "seeds"])
def test_parts_of_other_conditions_are_refused(made_up, changed):
    other = {"steps": 12, "seeds": [7] * made_up[0].conditions.captions}[changed]
    conditions = made_up[0].conditions.model_copy(update={changed: other})
    with pytest.raises(MeasureError, match="conditions differ"):
        everything.merged([made_up[0], made_up[0].model_copy(update={"conditions": conditions})])


def test_parts_of_other_uncached_images_are_refused(made_up):
    baseline = made_up[0].baseline
    changed = baseline.model_copy(update={"correct_per_caption": [True]})
    with pytest.raises(MeasureError, match="uncached images differ"):
        everything.merged([made_up[0], made_up[0].model_copy(update={"rows": [changed, *made_up[0].rows[1:]]})])


def test_the_page_has_every_method_and_says_what_breaks(made_up):
    text = everything.page(made_up[0], "all.svg")
    assert "![PSNR against FLOPs speed-up](all.svg)" in text
    for row in made_up[0].methods:
        assert f"| `{row.method}` | {row.fidelity} | " in text
    worst = min(made_up[0].methods, key=lambda row: row.psnr_wins)
    assert everything.is_broken(worst) == (worst.psnr_wins <= 0.5 or worst.accuracy_difference_interval[1] < 0)


def test_a_page_is_written_anew_from_its_file(made_up, tmp_path):
    made_up[0].save(tmp_path / "all.json")
    assert everything.main(["--page", "--write", str(tmp_path / "all"), "--parts", str(tmp_path / "none")]) == 0
    assert Results.load(tmp_path / "all.json") == made_up[0]
    assert (tmp_path / "all.md").read_text() == everything.page(made_up[0], "all.svg")
    dots = (tmp_path / "all.svg").read_text().count("<circle")
    assert dots == sum(math.isfinite(row.psnr) for row in made_up[0].methods)


def test_the_front_is_the_newest_division_that_is_whole(made_up, tmp_path):
    whole = made_up[0]
    halves = [with_rows(whole, whole.methods[:3]), with_rows(whole, whole.methods[3:])]
    assert everything.front_parts(tmp_path) == []
    halves[0].save(tmp_path / "front-1-of-2.json")
    assert everything.front_parts(tmp_path) == [], "one half is missing"
    halves[1].save(tmp_path / "front-2-of-2.json")
    assert everything.merged(everything.front_parts(tmp_path)) == whole
    halves[0].save(tmp_path / "front-1-of-1.json")
    os.utime(tmp_path / "front-1-of-1.json", (2e9, 2e9))
    assert everything.front_parts(tmp_path) == [halves[0]], "measured later"


@pytest.mark.parametrize("share", ["0/2", "3/2", "2"])
def test_a_share_is_one_of_so_many(share, capsys):
    with pytest.raises(SystemExit):
        everything.main(["--front", "--share", share])
    assert "--share" in capsys.readouterr().err


def test_what_cannot_be_calibrated_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    calibrations = script("calibrations")

    def refuse(model, name):
        raise AnatomyError("it has no parts")

    monkeypatch.setattr(calibrations, "load_model", lambda name: None)
    monkeypatch.setattr(calibrations, "made_for", refuse)
    assert calibrations.main(["--methods", "l2c,lazydit", "--out", str(tmp_path)]) == 0
    assert everything.refusals(tmp_path) == {"l2c": "it has no parts", "lazydit": "it has no parts"}
    assert "l2c: refused: it has no parts" in capsys.readouterr().err
    assert everything.refusals(tmp_path / "none") == {}


def test_the_pages_of_another_model_lie_beside_the_default_ones(made_up, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, folder = tmp_path / "docs" / "benchmarks", tmp_path / "out" / "everything-scenes-dit"
    for path in (made, folder):
        path.mkdir(parents=True)
    made_up[0].save(everything.part_file(folder, FAMILIES[0]))
    assert everything.main(["--model", "scenes-dit", "--page"]) == 0
    names = ["all-methods-scenes-dit.json", "all-methods-scenes-dit.md", "all-methods-scenes-dit.svg"]
    assert sorted(path.name for path in made.iterdir()) == names
    assert Results.load(made / names[0]) == made_up[0]
    assert "](all-methods-scenes-dit.svg)" in (made / names[1]).read_text()
