"""Calibrations as files: what is written is read, and whatever is wrong is refused by the name of the field."""

import copy
import json
import warnings

import pytest
import torch
from calibrating import STEPS, calibrated, prompts
from safetensors import safe_open
from safetensors.torch import save_file

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Calibration, load_calibration, merge_calibrations
from cache4diffusion.calibration.fingerprint import fingerprint_of
from cache4diffusion.calibration.store import _KEY
from cache4diffusion.errors import CalibrationError, FileFormatError, SettingError


@pytest.fixture(scope="module")
def pipe():
    return toys.flux_pipeline()


@pytest.fixture(scope="module")
def file(pipe, tmp_path_factory):
    return calibrated(pipe, "smoothcache").save(tmp_path_factory.mktemp("cal") / "made.safetensors")


def taken_apart(file):
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, json.loads(opened.metadata()[_KEY])


def test_what_is_written_is_read(pipe, file):
    made, read = calibrated(pipe, "smoothcache"), load_calibration(file)
    assert (read.method, read.options, read.provenance) == (made.method, made.options, made.provenance)
    assert read.entry.fingerprint == made.entry.fingerprint == fingerprint_of(pipe.transformer)
    assert (read.entry.levels, read.entry.quality) == (made.entry.levels, made.entry.quality)
    for kind in ("fit", "sums"):
        mine, theirs = getattr(made.entry, kind), getattr(read.entry, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert made.provenance.steps == STEPS
    assert made.provenance.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert made.provenance.call["guidance_scale"] == 1.0
    assert (made.provenance.dtype, made.provenance.package) == ("float32", c4d.__version__)
    assert len(made.provenance.samples) == 2


def wrong_version(tensors, header):
    header["format"] = 2


def no_method(tensors, header):
    header["method"] = "smothcache"


def no_such_option(tensors, header):
    header["options"] = {"lookahed": 3}


def nan(tensors, header):
    tensors["transformer/fit/attn"][1, 2] = float("nan")


def infinite_sum(tensors, header):
    tensors["transformer/sums/ffn"][0, 1, 0] = float("inf")


def missing_tensor(tensors, header):
    del tensors["transformer/fit/ffn"]


def unknown_tensor(tensors, header):
    tensors["transformer/fit/extra"] = torch.zeros(2)


def other_shape(tensors, header):
    tensors["transformer/fit/attn"] = torch.zeros(3, STEPS + 1)


def shape_of_other_steps(tensors, header):
    tensors["transformer/fit/attn"] = torch.zeros(3, STEPS + 1)
    header["denoisers"]["transformer"]["fit"]["attn"] = [3, STEPS + 1]


def rising_levels(tensors, header):
    header["denoisers"]["transformer"]["levels"].reverse()


def too_few_levels(tensors, header):
    header["denoisers"]["transformer"]["levels"].pop()


def no_steps(tensors, header):
    del header["provenance"]["steps"]


def text_for_steps(tensors, header):
    header["provenance"]["steps"] = "six"


def unknown_field(tensors, header):
    header["denoisers"]["transformer"]["qualtiy"] = {}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong_version, "format is 2, and this version reads 1"),
        (no_method, "method or options: There is no method 'smothcache'"),
        (no_such_option, "method or options: .*'lookahed'"),
        (nan, "transformer/fit/attn holds NaN or Inf"),
        (infinite_sum, "transformer/sums/ffn holds NaN or Inf"),
        (missing_tensor, "the tensor transformer/fit/ffn is missing"),
        (unknown_tensor, "does not name: transformer/fit/extra"),
        (other_shape, r"transformer/fit/attn has the shape \[3, 7\], its metadata says \[3, 6\]"),
        (shape_of_other_steps, r"transformer/fit/attn has the shape \[3, 7\], and 6 steps need \[3, 6\]"),
        (rising_levels, "transformer.levels must be 6 numbers that never rise"),
        (too_few_levels, "transformer.levels must be 6 numbers"),
        (no_steps, "provenance.steps: Field required"),
        (text_for_steps, "provenance.steps: Input should be a valid integer"),
        (unknown_field, "denoisers.transformer.qualtiy: Extra inputs"),
    ],
)
def test_a_damaged_field_is_named(file, tmp_path, damage, said):
    tensors, header = taken_apart(file)
    damage(tensors, header)
    save_file(tensors, tmp_path / "damaged.safetensors", metadata={_KEY: json.dumps(header)})
    with pytest.raises(FileFormatError, match=said):
        load_calibration(tmp_path / "damaged.safetensors")
    with pytest.raises(FileFormatError, match=said):
        c4d.method("smoothcache", calibration=str(tmp_path / "damaged.safetensors"))


def test_a_truncated_file_is_refused(file, tmp_path):
    content = file.read_bytes()
    for length in (0, 5, 200, len(content) - 8):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(FileFormatError, match="truncated or no safetensors file"):
            load_calibration(tmp_path / "cut.safetensors")


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(FileFormatError, match="is no calibration"):
        load_calibration(tmp_path / "weights.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "text.safetensors", metadata={_KEY: "{"})
    with pytest.raises(FileFormatError, match="is no JSON"):
        load_calibration(tmp_path / "text.safetensors")
    with pytest.raises(FileFormatError, match="There is no calibration"):
        c4d.method("smoothcache", calibration=str(tmp_path / "missing.safetensors"))


def test_a_file_that_was_replaced_is_read_again(pipe, file, tmp_path):
    path = tmp_path / "made.safetensors"
    path.write_bytes(file.read_bytes())
    assert c4d.method("smoothcache", calibration=str(path)).loaded.provenance.steps == STEPS
    calibrated(pipe, "smoothcache", steps=5).save(path)
    assert c4d.method("smoothcache", calibration=str(path)).loaded.provenance.steps == 5


# -- which denoiser ----------------------------------------------------------------------------------------------------


def test_another_denoiser_is_refused_by_the_field_that_differs(file):
    with pytest.raises(CalibrationError, match=r"another denoiser.*config\.in_channels is 12.*c4d calibrate MODEL"):
        c4d.accelerate(toys.flux(channels=12), "smoothcache", calibration=file)
    with pytest.raises(CalibrationError, match="denoiser is DiTTransformer2DModel, the calibration's Flux"):
        c4d.accelerate(toys.dit(), "smoothcache", calibration=file)


def test_other_weights_are_warned_of(file):
    with pytest.warns(UserWarning, match="weights of denoiser are not those"):
        c4d.accelerate(toys.flux(seed=1), "smoothcache", calibration=file).remove()


def test_precision_and_wrappers_do_not_change_a_fingerprint(pipe, file):
    same = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    for block in same.transformer_blocks:
        block.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c4d.accelerate(same, "smoothcache", calibration=file).remove()


def test_an_adapter_does_not_change_a_fingerprint(pipe):
    from peft import LoraConfig

    denoiser = copy.deepcopy(pipe.transformer)
    before = fingerprint_of(denoiser)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    assert fingerprint_of(denoiser) == before


def test_a_calibration_of_another_method_is_refused(file):
    with pytest.raises(CalibrationError, match="was made for smoothcache, not for teacache"):
        c4d.method("teacache", calibration=file)


def test_numbers_and_a_calibration_together_are_refused(pipe):
    made = calibrated(pipe, "teacache")
    with pytest.raises(SettingError, match="one of the two"):
        c4d.method("teacache", calibration=made, coefficients="flux")


# -- missing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, cls in c4d.METHODS.items() if cls.info.needs_calibration])
def test_a_missing_calibration_is_answered_with_the_command(pipe, name):
    command = f"c4d calibrate MODEL --method {name} --prompts FILE --out {name}.safetensors"
    with pytest.raises(CalibrationError, match=command):
        c4d.accelerate(pipe, name)
    assert c4d.method(name).row()["needs_calibration"]
    assert not toys.Dicts(pipe.transformer).changed()


# -- merging -----------------------------------------------------------------------------------------------------------


def test_shards_that_were_made_otherwise_are_refused(pipe):
    first = calibrated(pipe, "smoothcache")
    others = {
        "method": calibrated(pipe, "magcache", first=2),
        "options": calibrated(pipe, "smoothcache", first=2, lookahead=2),
        "steps": calibrated(pipe, "smoothcache", first=2, steps=5),
        "call": c4d.calibrate(
            pipe, "smoothcache", prompts(1), seeds=9, steps=STEPS, trial=0, call={"height": 16, "width": 32}
        ),
        "fingerprint": calibrated(toys.flux_pipeline(toys.flux(seed=1)), "smoothcache", first=2),
    }
    for field, other in others.items():
        with pytest.raises(CalibrationError, match=f"do not go together: .*{field} is"):
            merge_calibrations([first, other])


def test_a_sample_counts_once(pipe):
    made = calibrated(pipe, "smoothcache")
    with pytest.raises(CalibrationError, match=r"2 samples .* are in several"):
        merge_calibrations([made, made])
    same_prompts = c4d.calibrate(
        pipe,
        "smoothcache",
        prompts(2),
        seeds=7,
        steps=STEPS,
        trial=0,
        call={"height": 16, "width": 16, "guidance_scale": 1.0},
    )
    assert len(merge_calibrations([made, same_prompts]).provenance.samples) == 4, "another seed is another sample"


def test_numbers_by_hand_cannot_be_merged():
    made = Calibration.by_hand("teacache", 4, {"coefficients": [0.0, 0, 0, 1, 0], "range": [0, 1]})
    with pytest.raises(CalibrationError, match="holds no sums"):
        merge_calibrations([made, made])


def test_numbers_by_hand_have_a_shape():
    with pytest.raises(CalibrationError, match="range is missing"):
        Calibration.by_hand("teacache", 4, {"coefficients": [0.0, 0, 0, 1, 0]})
    with pytest.raises(CalibrationError, match=r"coefficients has the shape \[2\]"):
        Calibration.by_hand("teacache", 4, {"coefficients": [1.0, 0], "range": [0, 1]})


# -- several denoisers -------------------------------------------------------------------------------------------------


def test_each_expert_takes_its_own_entry():
    def made(name, factor):
        fit = {"coefficients": [0.0, 0, 0, factor, 0], "range": [0, 1]}
        return {name: Calibration.by_hand("teacache", 8, fit).entry}

    both = Calibration.by_hand("teacache", 8, {"coefficients": [0.0, 0, 0, 1, 0], "range": [0, 1]})
    both = Calibration("teacache", {}, both.provenance, made("transformer", 1.0) | made("transformer_2", 5.0))
    pipe = type("Experts", (), {"transformer": toys.flux(), "transformer_2": toys.flux(seed=1)})()
    with c4d.accelerate(pipe, "teacache", calibration=both) as handle:
        gates = {engine.name: engine.gate for engine in handle._engines}
    assert gates["transformer"].coefficients[3] == 1.0
    assert gates["transformer_2"].coefficients[3] == 5.0
    with pytest.raises(CalibrationError, match="no entry for the denoiser 'denoiser'; it has transformer"):
        c4d.accelerate(toys.flux(), "teacache", calibration=both)
