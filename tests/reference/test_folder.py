"""The pipeline folder: stock classes read it, and a broken one says what is wrong."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from cache4diffusion.calls import sampler
from cache4diffusion.errors import FileFormatError, UnknownNameError
from cache4diffusion.reference import build as building
from cache4diffusion.reference import evaluate
from cache4diffusion.reference import folder as folders
from cache4diffusion.reference.build import build
from cache4diffusion.reference.evaluate import accuracy, format_table, generate
from cache4diffusion.reference.folder import SAMPLING, load, save_folder
from cache4diffusion.reference.models import MODELS
from cache4diffusion.reference.networks import TEXT_LENGTH, build_tokenizer, build_vae, vocabulary
from cache4diffusion.reference.parts import FluxParts
from cache4diffusion.reference.scenes import held_out_captions
from cache4diffusion.reference.training.parallel import Trainer, TrainSettings
from cache4diffusion.reference.training.restore import _HISTORY as HISTORY
from cache4diffusion.reference.training.restore import main as restore_main
from cache4diffusion.reference.training.restore import restore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vae = build_vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    model = FluxParts(0, num_layers=1, num_single_layers=1, num_attention_heads=1)
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
    pipe, model = load(folder), FluxParts(0, num_layers=1, num_single_layers=1, num_attention_heads=1)
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


def test_the_noise_of_evaluation_is_the_benchmarks(folder):
    pipe, captions = load(folder), held_out_captions(2)
    call = {key: value for key, value in SAMPLING.items() if key != "num_inference_steps"}
    measured = sampler(pipe, call)(captions, [7, 8], 2)
    evaluated = generate(pipe, captions, seed=7, num_inference_steps=2)
    for a, b in zip(measured, evaluated, strict=True):
        assert np.array_equal(np.rint(255 * np.asarray(a)), b)


def test_accuracy_counts_per_family_and_demand(folder):
    result = accuracy(load(folder), n=6, batch=3, num_inference_steps=1, true_cfg_scale=1.0)
    json.dumps(result)
    assert list(result["families"]) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert result["accuracy"] == 0
    assert result["families"]["position"]["missed"]["position"] == 1
    assert len(result["failures"]) == 6
    assert "position" in format_table(result)


TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
ONE_UPDATE = {"minutes": 1, "updates": 1, "workers": 1, "microbatches": 1, "log_every": 1}
FACTS = {"batch": 4, "workers": 1, "seed": 3, "lr": 0.002, "mix": {"position": 0.5, "counting": 1}, "sigma_mean": 0.5}


@pytest.fixture
def tiny_flow(monkeypatch):
    tiny = replace(MODELS["scenes-flux"], parts=lambda seed: FluxParts(seed, **TINY))
    monkeypatch.setitem(MODELS, "scenes-flux", tiny)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Training folders after one update of a tiny network."""
    vae, flow = (tmp_path_factory.mktemp("runs") / name for name in ("vae", "flow"))
    Trainer(build_vae(), toy_loss, TrainSettings(vae, **ONE_UPDATE), lambda *_: False, FACTS).run()
    Trainer(FluxParts(0, **TINY), toy_loss, TrainSettings(flow, **ONE_UPDATE), lambda *_: False, FACTS).run()
    return vae, flow


def test_building_writes_a_card_from_what_was_recorded(trained, tiny_flow, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        build(tmp_path, tmp_path, tmp_path / "out")
    out = tmp_path / "out"
    built = build(*trained, out, captions=6, checker_scenes=2, batch=6)
    card = (out / "README.md").read_text()
    assert "| updates | 1 | 1 |" in card
    assert "| seed of data and noise | 3 | 3 |" in card
    assert "with the weights position 0.5, counting 1, and noise levels whose logit has the mean 0.5." in card
    assert "Weights: Apache-2.0. Scenes and captions: CC0." in card
    assert "| position | 1 | 0.0 % |" in card
    assert json.loads((out / "facts.json").read_text())["accuracy"]["accuracy"] == built["accuracy"]["accuracy"]
    assert load(out).vae.config["scaling_factor"] == built["latents"]["scaling_factor"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_training_goes_on_from_a_built_folder(trained, tiny_flow, tmp_path):
    """Weights survive from training folder to pipeline folder, back, one more update, and back again."""
    out, vae, flow = tmp_path / "out", tmp_path / "vae", tmp_path / "flow"
    build(*trained, out, captions=0, checker_scenes=0)
    restore(out, vae, flow)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("[vf]*/*")) == [
        "flow/ema.safetensors", "flow/history.json", "vae/ema.safetensors", "vae/history.json",
    ]  # fmt: skip
    for before, after in zip(trained, (vae, flow), strict=True):
        kept, restored = (load_file(folder / "ema.safetensors") for folder in (before, after))
        assert kept.keys() == restored.keys()
        assert {tensor.dtype for tensor in restored.values()} == {torch.float32}
        assert all(torch.equal(kept[name].bfloat16().float(), tensor) for name, tensor in restored.items())
        assert json.loads((after / "history.json").read_text()) == json.loads((before / "history.json").read_text())

    restored = load_file(flow / "ema.safetensors")
    settings = TrainSettings(flow, **ONE_UPDATE, lr=0.0, resume="ema")
    trainer = Trainer(FluxParts(5, **TINY), toy_loss, settings, lambda *_: False, FACTS)
    assert all(torch.equal(restored[name], p) for name, p in zip(trainer.names, trainer.parameters, strict=True))
    assert trainer.run()["updates"] == 2
    again = build(vae, flow, tmp_path / "again", captions=0, checker_scenes=0)
    assert again["flow"]["updates"] == 2
    for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_2/model"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (out, tmp_path / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_restored_is_refused_with_nothing_written(folder, trained, tiny_flow, tmp_path):
    targets = tmp_path / "vae", tmp_path / "flow"
    with pytest.raises(FileFormatError, match="holds a checkpoint already"):
        restore(folder, trained[0], tmp_path / "flow")
    with pytest.raises(FileFormatError, match="does not say how"):
        restore(folder, *targets)
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "facts.json").write_text(json.dumps(dict.fromkeys(("vae", "flow"), dict.fromkeys(HISTORY, 0))))
    vae = build_vae(block_out_channels=(8, 8, 8, 8))
    vae.save_pretrained(own / "vae")
    with pytest.raises(FileFormatError, match=r"other networks than vae trains: \d+ parameters differ, such as"):
        restore(own, *targets)
    assert not any(target.exists() for target in targets)


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (evaluate.main, ["scene-flux"], "evaluate: There is no reference model 'scene-flux'"),
        (restore_main, ["scene-flux"], "restore: There is no reference model 'scene-flux'"),
        (building.main, [], "build: runs/vae holds no checkpoint"),
    ],
)
def test_errors_of_the_commands_are_one_line_and_exit_code_2(main, words, said, capsys):
    folders = [] if main is evaluate.main else ["--vae", "runs/vae", "--flow", "runs/flow"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *folders])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


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
        save_folder(tmp_path / "large", build_vae(), FluxParts(0, num_layers=1, num_single_layers=1))


def test_the_package_offers_its_names():
    from cache4diffusion import reference

    assert sorted(name for names in reference._HOMES.values() for name in names) == sorted(reference.__all__)
    assert all(getattr(reference, name) is not None for name in reference.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        reference.laod  # noqa: B018
