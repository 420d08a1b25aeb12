"""benchmarks/gpu.py on a tiny denoiser: what its file holds, and that its ideal speed-up is the trace's."""

import argparse
import json

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.compare import parse_method
from cache4diffusion.cost import step_cost
from scripts import script
from small_denoisers import remember_anatomy

gpu = script("gpu")

NUMBER = (int, float)
ROW = {
    "method": str, "settings": dict, "fidelity": str, "mode": str, "steps": int, "strip": str, "full_steps": NUMBER,
    "full_ms": NUMBER, "cached_ms": (*NUMBER, type(None)), "run_ms": NUMBER, "runs_ms": list, "achieved": NUMBER,
    "ideal": NUMBER, "achieved_over_ideal": NUMBER, "full_flops": int, "run_flops": NUMBER, "cache_bytes": int,
    "peak_bytes": int, "peak_source": str, "syncs": int, "notes": list, "error": type(None),
}  # fmt: skip
CONDITIONS = {
    "model", "class", "is_tiny", "parameters", "weights", "resolution", "frames", "batch", "branches", "dtype",
    "device", "compiled", "repeats", "statistic", "versions",
}  # fmt: skip
STEPS = 6


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch):
    remember_anatomy(monkeypatch)
    yield
    torch._dynamo.reset()


def measure(tmp_path, *words):
    gpu.main(["--tiny", "--repeats", "1", "--steps", str(STEPS), "--write", str(tmp_path / "tiny"), *words])
    return json.loads((tmp_path / "tiny.json").read_text())


def check(result, rows):
    assert result["schema"] == gpu.SCHEMA
    assert set(result["conditions"]) == CONDITIONS
    assert {"cache4diffusion", "torch", "diffusers", "python"} <= set(result["conditions"]["versions"])
    assert len(result["rows"]) == rows
    for row in result["rows"]:
        assert set(row) == set(ROW), "a field of the file is new: put it into ROW"
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), f"{row['method']}: {name}={row[name]!r}"
        assert len(row["strip"]) == row["steps"]
        assert row["achieved_over_ideal"] == pytest.approx(row["achieved"] / row["ideal"])
        assert (row["cached_ms"] is None) == (row["method"] == "uncached")
        assert row["peak_bytes"] > row["cache_bytes"]
        assert all("little to cache" in note for note in row["notes"])  # of a run of 6 steps


def ideal_of_the_trace(sampler, row):
    """Sampled anew: FLOPs of all calls full over those of the calls that the trace holds."""
    with c4d.accelerate(sampler.denoiser, row["method"], **c4d_settings(row)) as handle:
        sampler.run(row["steps"], handle)
        cost, records = step_cost(handle._engines[0]), handle.trace.of()
        assert "".join(record.symbol for record in records) == row["strip"]
        return len(records) * cost.full / sum(cost.of(record) for record in records)


def c4d_settings(row):
    (text,) = [text for text in gpu.METHODS if parse_method(text)[0] == row["method"]]
    return parse_method(text)[1]


def test_the_file_of_a_tiny_run_and_its_ideals(tmp_path):
    result = measure(tmp_path, "--modes", "eager")
    check(result, len(gpu.METHODS) + 1)
    assert result["conditions"]["is_tiny"]
    rows = {row["method"]: row for row in result["rows"]}
    sampler = gpu.build(gpu.shape("flux.1-dev"), True, torch.float32, torch.device("cpu"))
    assert rows["uncached"]["ideal"] == 1
    for name, row in rows.items():
        if name != "uncached":
            assert set(row["strip"]) & set("cp"), f"{name} cached nothing: {row['strip']}"
            assert row["ideal"] == pytest.approx(ideal_of_the_trace(sampler, row))
    lite = rows["taylorseer-lite"]
    assert lite["ideal"] == pytest.approx(STEPS / lite["strip"].count("F")), "its cached steps run nothing"
    text = (tmp_path / "tiny.md").read_text()
    assert all(name in text and row["strip"] in text for name, row in rows.items())
    assert "figures mean nothing" in text


@pytest.mark.slow
def test_compiled_rows_are_added_to_the_file_and_known_ones_kept(tmp_path):
    words = ["--methods", "taylorseer-lite(interval=3),fora(interval=3)", "--backend", "eager"]
    eager = measure(tmp_path, "--modes", "eager", *words)
    both = measure(tmp_path, "--resume", *words)
    check(both, 6)
    assert both["rows"][:3] == eager["rows"]
    assert [row["mode"] for row in both["rows"][3:]] == ["compiled"] * 3
    for row, twin in zip(both["rows"][:3], both["rows"][3:], strict=True):
        assert (row["strip"], row["ideal"]) == (twin["strip"], twin["ideal"])
    with pytest.raises(SystemExit, match="measured under other conditions"):
        measure(tmp_path, "--resume", "--dtype", "bfloat16", *words)


def test_a_method_that_a_denoiser_cannot_be_given_is_a_row_that_says_so(tmp_path):
    result = measure(tmp_path, "--modes", "eager", "--methods", "deepcache,taylorseer-lite(interval=3)")
    assert "has no U-Net levels" in result["rows"][1]["error"]
    assert result["rows"][2]["strip"] == "FFFccF"
    assert "has no U-Net levels" in (tmp_path / "tiny.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(set(gpu.SHAPES) - {"flux.1-dev"}))
def test_every_model_has_a_tiny_one_of_its_class(model, tmp_path):
    result = measure(tmp_path, "--modes", "eager", "--model", model, "--methods", "taylorseer-lite(interval=3),fora")
    check(result, 3)
    assert result["conditions"]["class"] == gpu.SHAPES[model].kind


def test_ten_methods_are_measured_and_every_shape_can_be_tiny():
    assert len(gpu.METHODS) == 10
    assert set(gpu.TINY) == set(gpu.SHAPES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "flux"], "use one of flux.1-dev"),
        (["--tiny", "--modes", "fast"], "use eager or compiled"),
        (["--tiny", "--resume"], "--resume needs --write"),
        (["--tiny", "--repeats", "0"], "--repeats must be 1 or more"),
    ],
)
def test_wrong_options_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        gpu.parsed(words)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_real_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parsed([])
    assert "there is no CUDA device here: use --tiny" in capsys.readouterr().err


def test_the_defaults_are_the_real_thing():
    options = gpu.parsed(["--device", "cpu"])
    assert isinstance(options, argparse.Namespace)
    assert (options.model, options.steps, options.modes) == ("flux.1-dev", [28, 50], ["eager", "compiled"])
    assert options.write == "docs/benchmarks/gpu-flux.1-dev"
