"""The pipeline folder: stock classes read it, and a broken one says what is wrong."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from cache4diffusion.errors import FileFormatError, UnknownNameError
from cache4diffusion.reference import folder as folders
from cache4diffusion.reference.build import build
from cache4diffusion.reference.evaluate import accuracy, format_table, generate, interval
from cache4diffusion.reference.folder import SAMPLING, load, save_folder
from cache4diffusion.reference.networks import TEXT_LENGTH, build_tokenizer, build_vae, vocabulary
from cache4diffusion.reference.scenes import held_out_captions
from cache4diffusion.reference.training.flow import FlowModel
from cache4diffusion.reference.training.parallel import Trainer, TrainSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vae = build_vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    model = FlowModel(0, num_layers=1, num_single_layers=1, num_attention_heads=1)
    with torch.no_grad():
        for parameter in model.transformer.proj_out.parameters():
            parameter.normal_(0, 0.1)
    return save_folder(tmp_path_factory.mktemp("weights") / "tiny", vae, model, card="# tiny")


@pytest.mark.parametrize("with_start", [True, False])
def test_every_caption_survives_its_tokens(with_start):
    tokenizer = build_tokenizer(with_start)
    for caption in held_out_captions(120):
        ids = tokenizer(caption, padding="max_length", max_length=TEXT_LENGTH).input_ids
        assert len(ids) == TEXT_LENGTH
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert tokenizer("a Zebra").input_ids[-2] == tokenizer.unk_token_id
    assert len(tokenizer) == len(vocabulary())


def test_diffusers_alone_reads_the_folder(folder):
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle on a gray background", **(SAMPLING | {"num_inference_steps": 2})).images[0]
    assert image.size == (128, 128)
    assert (folder / "README.md").read_text() == "# tiny"


def test_names_in_the_folder_are_those_of_older_transformers(folder):
    """transformers 4 knows no other tokenizer class, and takes CLIP weights of other names for missing: random."""
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == index["tokenizer_2"] == ["transformers", "PreTrainedTokenizerFast"]
    for part in ("tokenizer", "tokenizer_2"):
        assert json.loads((folder / part / "tokenizer_config.json").read_text())["tokenizer_class"] == index[part][1]
    clip = load_file(folder / "text_encoder" / "model.safetensors")
    assert {name.split(".")[:2][-1] for name in clip} == {"embeddings", "encoder", "final_layer_norm"}
    assert all(name.startswith("text_model.") for name in clip)
    assert "shared.weight" in load_file(folder / "text_encoder_2" / "model.safetensors")


def test_the_text_encoder_in_the_folder_is_the_one_that_was_saved(folder):
    pipe, model = load(folder), FlowModel(0, num_layers=1, num_single_layers=1, num_attention_heads=1)
    for name in ("text_encoder", "text_encoder_2"):
        saved, loaded = getattr(model, name), getattr(pipe, name)
        assert [p.bfloat16().float().tolist() for p in saved.parameters()] == [p.tolist() for p in loaded.parameters()]


def test_a_portable_folder_stays_as_it_is(folder):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    folders.make_portable(folder)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_loading_gives_the_asked_dtype(folder):
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load(folder, dtype)
        assert {
            p.dtype
            for m in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
            for p in m.parameters()
        } == {dtype}
    assert pipe.vae.config["shift_factor"] == 0.1
    assert pipe.scheduler.config["shift"] == 1.0


def test_a_rows_noise_does_not_depend_on_its_batch(folder):
    pipe = load(folder)
    captions = held_out_captions(3)
    together = list(generate(pipe, captions, seed=5, batch=3, num_inference_steps=2))
    alone = [next(iter(generate(pipe, [c], seed=5 + i, num_inference_steps=2))) for i, c in enumerate(captions)]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_accuracy_counts_per_family_and_demand(folder):
    result = accuracy(load(folder), n=6, batch=3, num_inference_steps=1, true_cfg_scale=1.0)
    json.dumps(result)
    assert list(result["families"]) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert result["accuracy"] == 0
    assert result["families"]["position"]["missed"]["position"] == 1
    assert len(result["failures"]) == 6
    assert "position" in format_table(result)


def test_the_interval_holds_the_share():
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == pytest.approx(1)
    low, high = interval(80, 100)
    assert 0.70 < low < 0.8 < high < 0.87


def test_building_writes_a_card_from_what_was_recorded(tmp_path, monkeypatch):
    vae, tiny = tmp_path / "vae", {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    flow = tmp_path / "flow"
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        build(vae, flow, tmp_path / "out")
    monkeypatch.setattr("cache4diffusion.reference.training.flow.FlowModel", lambda: FlowModel(0, **tiny))
    settings = {"minutes": 1, "updates": 1, "workers": 1, "microbatches": 1, "log_every": 1}
    facts = {"batch": 4, "workers": 1, "seed": 3, "lr": 0.002}
    Trainer(build_vae(), toy_loss, TrainSettings(vae, **settings), lambda *_: False, facts).run()
    Trainer(FlowModel(0, **tiny), toy_loss, TrainSettings(flow, **settings), lambda *_: False, facts).run()
    out = tmp_path / "out"
    built = build(vae, flow, out, captions=6, checker_scenes=2, batch=6)
    card = (out / "README.md").read_text()
    assert "| updates | 1 | 1 |" in card
    assert "| seed of data and noise | 3 | 3 |" in card
    assert "Weights: Apache-2.0. Scenes and captions: CC0." in card
    assert "| position | 1 | 0.0 % |" in card
    assert json.loads((out / "facts.json").read_text())["accuracy"]["accuracy"] == built["accuracy"]["accuracy"]
    assert load(out).vae.config["scaling_factor"] == built["latents"]["scaling_factor"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flow", "out", "vae"]


def toy_loss(model, generator, update, index):
    loss = sum(p.square().mean() for p in model.parameters())
    return loss, {"high": 1.0, "low": 1.0}


def test_unknown_models_are_errors(tmp_path):
    with pytest.raises(UnknownNameError, match="no reference model 'scene-flux' in "):
        load("scene-flux")
    with pytest.raises(UnknownNameError, match="There is no folder"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_part_is_an_error(folder, tmp_path):
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileFormatError, match="it lacks transformer, text_encoder"):
        load(tmp_path)


def test_a_damaged_file_is_an_error(folder, tmp_path):
    for source in folder.rglob("*"):
        target = tmp_path / source.relative_to(folder)
        if source.is_dir():
            target.mkdir()
        else:
            target.write_bytes(source.read_bytes())
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="cannot be loaded"):
        load(tmp_path)


def test_a_folder_that_is_too_large_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_FOLDER_BYTES", 1000)
    with pytest.raises(ValueError, match="a reference pipeline may have 1000"):
        save_folder(tmp_path / "large", build_vae(), FlowModel(0, num_layers=1, num_single_layers=1))


def test_the_package_offers_its_names():
    from cache4diffusion import reference

    assert sorted(name for names in reference._HOMES.values() for name in names) == sorted(reference.__all__)
    assert all(getattr(reference, name) is not None for name in reference.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        reference.laod  # noqa: B018
