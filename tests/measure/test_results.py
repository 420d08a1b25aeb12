import io
import json
import math

import pytest
from rich.console import Console

from cache4diffusion.measure import MeasureError, Results, console_table, markdown_table
from cache4diffusion.measure.results import Conditions

REQUIRED = {
    "method", "settings", "full_steps", "total_steps", "flops_speedup", "latency_speedup", "psnr", "ssim", "flip",
    "accuracy", "cache_bytes", "peak_bytes", "strip", "fidelity",
}  # fmt: skip


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_the_promised_shape(made_up):
    data = strict(made_up[0].to_json())
    assert set(data) == {"conditions", "rows"}
    assert all(set(row) >= REQUIRED for row in data["rows"])
    assert data["rows"][0]["method"] == "uncached"
    assert data["rows"][1]["method"] == "fewer-steps-26"
    assert all(isinstance(row[key], int) for row in data["rows"] for key in ("cache_bytes", "peak_bytes"))


def test_results_survive_saving_and_loading(made_up, tmp_path):
    results = made_up[0]
    path = results.save(tmp_path / "new" / "results.json")
    assert Results.load(path) == results
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_infinite_psnr_is_null_in_json_and_infinite_again_after(made_up):
    data = strict(made_up[0].to_json())
    assert data["rows"][0]["psnr"] is None
    assert math.isinf(Results.from_dict(data).baseline.psnr)


def edited(made_up, change):
    data = made_up[0].to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["rows"].reverse(), "the first row, and only it, is 'uncached'"),
        (lambda d: d["rows"].insert(1, d["rows"].pop()), "in this order"),
        (lambda d: d["rows"].append(dict(d["rows"][-1])), "several rows are called teacache"),
        (lambda d: d["rows"][3].update(accuracy=87.2), r"rows\.3\.accuracy: .*less than or equal to 1"),
        (lambda d: d["rows"][3].update(cache_bytes=1.5), r"rows\.3\.cache_bytes"),
        (lambda d: d["rows"][3].update(psnr=math.nan), r"rows\.3\.psnr"),
        (lambda d: d["rows"][3].update(ssim="0.9"), r"rows\.3\.ssim: .*valid number"),
        (lambda d: d["rows"][3].update(speed=2), r"rows\.3\.speed: Extra inputs"),
        (lambda d: d["rows"][8].update(strip="FFc"), "3 letters for 50 steps"),
        (lambda d: d["rows"][8].update(full_steps=51), "full_steps 51 is more than total_steps 50"),
        (lambda d: d["rows"][8].update(fidelity="exact"), r"fidelity: Input should be 'code', 'paper'"),
        (lambda d: d["rows"][8].pop("flip"), r"rows\.8\.flip: Field required"),
        (lambda d: d["conditions"].pop("device"), r"conditions\.device: Field required"),
        (lambda d: d.pop("rows"), "is no results file"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(made_up, change, words):
    with pytest.raises(MeasureError, match=words):
        Results.from_dict(edited(made_up, change))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Cannot read results"),
        (b'{"conditions": ', r"is not JSON \(line 1"),
        (b"\xff\xfe\xff", "Cannot read"),
        (b"[]", "is no results file"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, content, words):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MeasureError, match=words) as error:
        Results.load(path)
    assert "broken.json" in str(error.value)


def test_a_row_is_found_by_name_and_a_wrong_name_lists_the_rows(made_up):
    assert made_up[0].row("taylorseer").full_steps == 12
    with pytest.raises(MeasureError, match=r"No row 'taylor'; there are: uncached, fewer-steps-26"):
        made_up[0].row("taylor")


def test_the_caption_states_the_conditions(made_up):
    caption = made_up[0].conditions.caption()
    for part in ("scenes-flux", "50 steps", "480 captions", "seeds 1000..1479", "float32", "cpu (1 thread)", "torch"):
        assert part in caption
    bare = Conditions(
        denoiser="toy", steps=1, resolution=[8, 8], batch=1, captions=1, seeds=[3], dtype="bfloat16", device="cpu"
    )
    assert "seed 3 · bfloat16" in bare.caption()


def test_markdown_has_a_line_per_row_and_the_conditions(made_up):
    results = made_up[0]
    lines = markdown_table(results).splitlines()
    assert len({line.count("|") for line in lines[: len(results.rows) + 2]}) == 1
    assert "| uncached | baseline |" in lines[2]
    assert "∞" in lines[2]
    assert lines[-1] == results.conditions.caption()


def test_what_could_not_be_run_is_named_once_per_reason(made_up):
    ran = made_up[0].methods[0].method
    why = {"tome (ratio=0.3)": "no parts", "tome (ratio=0.5)": "no parts", "todo": "no parts", f"{ran} (order=9)": "no"}
    results = made_up[0].model_copy(update={"conditions": made_up[0].conditions.model_copy(update={"left_out": why})})
    assert results.left_out == {"tome, todo": "no parts", f"{ran} (order=9)": "no"}
    assert "- left out: tome, todo: no parts\n" in markdown_table(results)


@pytest.mark.parametrize("width", [80, 110, 150, 320])
def test_the_console_table_fits_and_keeps_names_and_fidelity(made_up, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(console_table(made_up[0], width=width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "taylorseer-lite" in text
    assert "reconstructed" in text
    assert "…" not in text
    assert ("FFFccccF" in text) == (width == 320)
