"""benchmarks/matrix.py: its pipelines are what it says, and its file tells what was found."""

import json

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.selfcheck import INVARIANTS
from scripts import script
from small_denoisers import remember_anatomy

matrix = script("matrix")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    remember_anatomy(monkeypatch)


def run(tmp_path, *words, code=0):
    assert matrix.main(["--write", str(tmp_path / "matrix"), *words]) == code
    return json.loads((tmp_path / "matrix.json").read_text()), (tmp_path / "matrix.md").read_text()


def test_a_cell_of_pixart_with_a_calibrated_and_a_trajectory_method(tmp_path):
    words = ["--denoisers", "pixart", "--dtypes", "float32", "--batches", "1", "--methods", "fora,smoothcache,taocache"]
    result, text = run(tmp_path, *words)
    assert result["schema"] == matrix.SCHEMA
    assert list(result["invariants"]) == list(INVARIANTS)
    assert set(result["conditions"]) == {"steps", "device", "weights", "versions"}
    rows = result["rows"]
    assert [(row["method"], row["is_guided"]) for row in rows] == [
        (name, is_guided) for is_guided in (True, False) for name in ("fora", "smoothcache", "taocache")
    ]
    for row in rows:
        linear, trajectory = "pp-pppppp", "p--pp--p-"
        assert row["found"] == (trajectory if row["method"] == "taocache" else linear), row
        assert set(row["details"]) == {
            name for name, letter in zip(INVARIANTS, row["found"], strict=True) if letter != "p"
        }
    assert "**40 checks passed, 0 failed**" in text
    assert "| `fora` | `pp-pppppp` x 2 |" in text
    again, _ = run(tmp_path, *words, "--resume")
    assert again == result, "known cells are kept"


def test_what_fails_is_named_and_the_exit_code_is_1(tmp_path, monkeypatch):
    monkeypatch.setattr("cache4diffusion.wrap.ForwardWrapper.remove", lambda self: None)
    words = ["--denoisers", "dit", "--dtypes", "float32", "--batches", "1", "--methods", "fora"]
    result, text = run(tmp_path, *words, code=1)
    assert "x" in result["rows"][0]["found"]
    assert "- `fora` on dit, float32, batch 1, guided: remove_restores: " in text


@pytest.mark.parametrize("name", sorted(matrix.SUBJECTS))
def test_every_pipeline_samples_guided_and_not(name):
    subject = matrix.SUBJECTS[name]
    pipe = subject.make()
    pipe.set_progress_bar_config(disable=True)
    denoiser, seen = getattr(pipe, "transformer", None) or pipe.unet, []
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[0]),
        with_kwargs=True,
    )
    for is_guided in (True, False):
        prompts, rest = subject.call(2, is_guided)
        pipe(**prompts, **rest, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
        calls, rows = (2, 2) if subject.guidance == "two calls" else (1, 4)
        assert seen == ([rows] * 2 * calls if is_guided else [2] * 2)
        seen.clear()


def test_the_cells_are_every_dtype_and_batch_and_one_without_guidance():
    cells = matrix.cells_of(["flux", "dit"], ["float32", "bfloat16"], [1, 3])
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 + 1)
    assert sum(not cell.is_guided for cell in cells) == 2
    assert set(matrix.SETTINGS) <= set(c4d.METHODS)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--denoisers", "sdxl"], "use some of flux"), (["--dtypes", "int8"], "use some of float32"),
     (["--batches", "0"], "must be 1 or more")],
)  # fmt: skip
def test_wrong_options_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        matrix.parsed(words)
    assert said in capsys.readouterr().err
