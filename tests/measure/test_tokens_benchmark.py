"""benchmarks/tokens.py and equal_flops.py: counterparts of equal cost, and what the page says of them."""

import itertools
import json

import pytest

import cache4diffusion as c4d
import tiny_scenes
from cache4diffusion.strip import planned_strip
from scripts import script

equal_flops = script("equal_flops")
tokens = script("tokens")


def full_steps(method):
    return planned_strip(method.compose(), 50).count("F")


@pytest.mark.parametrize("name", tokens.OTHERS)
def test_counterparts_lie_close_in_cost_and_fall(name):
    full = [full_steps(c4d.method(each, **settings)) for each, settings in equal_flops.intervals(name, 50)]
    assert full == sorted(full, reverse=True)
    assert full[0] >= 48
    assert full[-1] <= 8
    assert max(a - b for a, b in itertools.pairwise(full)) <= 3


@pytest.mark.parametrize("wanted", [1.0, 1.31, 2.0, 3.7, 50.0])
def test_the_closest_in_flops_is_found_without_running_all(monkeypatch, wanted):
    others, asked = equal_flops.intervals("fora", 50), []

    def reached(_, method):
        asked.append(method)
        return wanted if method == "the target" else 50 / full_steps(method)

    monkeypatch.setattr(equal_flops, "reached", reached)
    name, settings = equal_flops.closest(None, "the target", others)
    distances = [abs(reached(None, c4d.method(each, **given)) - wanted) for each, given in others]
    assert abs(reached(None, c4d.method(name, **settings)) - wanted) == min(distances)
    assert len(asked) - len(others) - 1 <= 12


@pytest.mark.parametrize(
    ("interval", "word"), [((0.51, 0.9), "better"), ((0.4, 0.6), "as good"), ((0.1, 0.49), "worse")]
)
def test_the_verdict_is_that_of_the_interval(interval, word):
    assert tokens.verdict({"wins_interval": interval}) == word


@pytest.mark.slow
def test_a_model_is_measured_at_another_size_and_the_page_has_every_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "INTERVALS", (4,))
    monkeypatch.setattr(tokens, "SCORES", {"toca": ("attention", "random"), "clusca": ()})
    monkeypatch.setattr(tokens, "intervals", lambda name, steps: [(name, {"interval": n}) for n in (2, 4)])
    folder = tiny_scenes.save(tmp_path / "tiny")
    call = ["--model", str(folder), "--size", "64", "--captions", "2", "--out", str(tmp_path)]
    assert tokens.main(call) == 0
    result = json.loads((tmp_path / "tokens-tiny-64.json").read_text())
    assert result["conditions"]["resolution"] == [64, 64]
    assert [(row["method"], row["settings"].get("score")) for row in result["rows"]] == [
        ("toca", "attention"),
        ("toca", "random"),
        ("clusca", None),
    ]
    for row in result["rows"]:
        assert [pair["method"] for pair in row["beside"]] == ["fora", "taylorseer"]
        assert all(abs(pair["flops_speedup"] / row["flops_speedup"] - 1) < 0.5 for pair in row["beside"])
    by_attention, drawn, clustered = result["rows"]
    assert by_attention["over_random"]["psnr"] == drawn["psnr"]
    assert drawn["over_random"] is None is clustered["over_random"]
    said = (tmp_path / "tokens.md").read_text()
    for line in ("## tiny-64", "`toca` by attention beside random tokens", "`clusca` beside `taylorseer`"):
        assert line in said
    assert said.count("| `toca(interval=4") == 2
