"""Every reference model: trained a step, saved, loaded as the stock pipeline, judged by its own checker."""

import json
import random
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache4diffusion.calls import sampler
from cache4diffusion.errors import FileFormatError, UnknownNameError
from cache4diffusion.reference import build as building
from cache4diffusion.reference import evaluate, make
from cache4diffusion.reference.build import build
from cache4diffusion.reference.evaluate import accuracy, checker_rates, format_table, generate
from cache4diffusion.reference.folder import folder_of, load, save_folder
from cache4diffusion.reference.models import MODELS, model_named, model_of
from cache4diffusion.reference.networks import build_tokenizer
from cache4diffusion.reference.noise import FlowMatching, VPrediction
from cache4diffusion.reference.parts import NO_CLASS
from cache4diffusion.reference.tasks import CLASS_NAMES, Classes, Scenes
from cache4diffusion.reference.training import denoiser
from cache4diffusion.reference.training.attention import plain_attention
from cache4diffusion.reference.training.denoiser import load_parts, shared_vae, trainer_of
from cache4diffusion.reference.training.parallel import TrainSettings
from cache4diffusion.reference.training.restore import restore

TINY = {
    "scenes-dit": {"num_layers": 1, "num_attention_heads": 1},
    "scenes-pixart": {"num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32},
    "scenes-sd": {"block_out_channels": [16, 16, 16], "layers_per_block": 1},
    "scenes-video": {"num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32},
}
NAMES = tuple(TINY)


def tiny(name):
    """The model with a network of a few thousand parameters and a small pool."""
    model = MODELS[name]
    return replace(
        model,
        parts=lambda seed: model.parts(seed, **TINY[name]),
        training=replace(model.training, pool=16, reuse=2),
    )


@pytest.fixture(scope="module")
def vae():
    return shared_vae()


def train(model, vae, folder, updates, **settings):
    settings = {"lr": 5e-3, "warmup": 1, "cooldown": 0.0, "log_every": 1} | settings
    chosen = TrainSettings(folder, minutes=5, updates=updates, workers=1, microbatches=1, seed=2, **settings)
    trainer = trainer_of(model, chosen, vae, batch=4, facts={"batch": 4, "workers": 1, "seed": 2, "lr": 5e-3})
    with plain_attention():
        trainer.run()
    return trainer


@pytest.fixture(scope="module")
def trained(vae, tmp_path_factory):
    """For each model its training folder, after two updates, and the built one."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("runs") / name
        trainer = train(tiny(name), vae, folder, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(MODELS, name, tiny(name))
            out = folder.with_name(f"{name}-built")
            build(None, folder, out, captions=0, checker_scenes=0, model=MODELS[name])
        made[name] = trainer, folder, out
    return made


def fixed_loss(trainer, seed=0):
    """The loss on one microbatch, the same at every call."""
    trainer.loss.pool.filling = 10**9
    with torch.no_grad(), plain_attention():
        return trainer.loss(trainer.model, torch.Generator().manual_seed(seed), 1, 0)[0].item()


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_one_batch_lower_its_loss(name, vae, tmp_path):
    model = tiny(name)
    trainer = trainer_of(model, TrainSettings(tmp_path, minutes=5, workers=1, microbatches=1), vae, batch=2)
    loss, pool = trainer.loss, trainer.loss.pool
    pool.filling = 10**9
    before = fixed_loss(trainer)
    assert before == pytest.approx(1.0, abs=0.35), "it predicts 0, and targets have about the variance 1"
    optimizer = torch.optim.Adam(trainer.parameters, lr=5e-3)
    for _ in range(4):
        optimizer.zero_grad()
        with plain_attention():
            loss(trainer.model, torch.Generator().manual_seed(0), 1, 0)[0].backward()
        optimizer.step()
    assert fixed_loss(trainer) < 0.98 * before


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_exactly_where_it_was(name, trained, vae):
    first, folder, _ = trained[name]
    resumed = train(tiny(name), vae, folder, 0)
    assert resumed.history["updates"] == resumed.optimizer_updates == 2
    for kind in ("parameters", "ema", "first", "second"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(first, kind), getattr(resumed, kind), strict=True)), kind
    assert fixed_loss(first) == fixed_loss(resumed)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_learns_is_kept(name, trained):
    names = set(load_file(trained[name][1] / "ema.safetensors"))
    learns = {"scenes-sd": {"unet", "text_encoder"}}.get(name, {"transformer"})
    assert {key.split(".")[0] for key in names} == learns
    matrices = [n for n, m in zip(trained[name][0].names, trained[name][0].is_matrix, strict=True) if m]
    assert matrices
    assert not any(".to_q." in n or ".to_k." in n or n.startswith("text_encoder") for n in matrices)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_folder_is_the_stock_pipeline(name, trained, vae):
    model, out = MODELS[name], trained[name][2]
    pipe = getattr(diffusers, model.pipeline).from_pretrained(out)
    assert type(load(out)).__name__ == model.pipeline
    assert model_of(pipe) is model
    pipe.set_progress_bar_config(disable=True)
    prompts = [model.task.prompt(drawn) for drawn in model.task.held_out(2)]
    call = {key: value for key, value in model.sampling.items() if key != "num_inference_steps"}
    pictures = sampler(pipe, call)(prompts, [0, 1], 1)
    assert pictures.shape == (2, *(() if model.task.frames is None else (8,)), model.task.side, model.task.side, 3)
    config = getattr(pipe, model.denoiser).config
    assert config.sample_size == model.task.side // 8
    assert pipe.vae.config["shift_factor"] is None
    assert all(torch.equal(a, b) for a, b in zip(pipe.vae.parameters(), vae.parameters(), strict=True))
    assert sum(file.stat().st_size for file in out.rglob("*")) < 20_000_000


@pytest.mark.parametrize("name", NAMES)
def test_training_shows_the_denoiser_what_the_pipeline_does(name, trained):
    """Timestep, prompt and guidance's empty prompt: the same inputs, hence the same prediction, of both."""
    model, out = MODELS[name], trained[name][2]
    pipe, parts = load(out), load_parts(tiny(name), trained[name][1])
    network = getattr(pipe, model.denoiser)
    seen = []
    network.register_forward_hook(lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True)
    prompts = [model.task.prompt(drawn) for drawn in model.task.held_out(2)]
    call = {key: value for key, value in model.sampling.items() if key != "num_inference_steps"}
    sampler(pipe, call)(prompts, [0, 1], 1)
    args, kwargs, output = seen[0]
    inputs = {"sample": None, "hidden_states": None, "timestep": None} | kwargs
    noisy = next(value for value in (inputs["hidden_states"], inputs["sample"], *args) if value is not None)
    time = inputs["timestep"] if inputs["timestep"] is not None else args[1]
    time = torch.as_tensor(time).reshape(-1).expand(4)
    assert time.tolist() == [999] * 4, "the last timestep comes first"
    rows = [parts.tokens(prompt) for prompt in prompts]
    nothing = [parts.nothing()] * 2
    rows = rows + nothing if name == "scenes-dit" else nothing + rows  # DiT's conditional half comes first
    for network_parameter, own in zip(network.parameters(), getattr(parts, model.denoiser).parameters(), strict=True):
        own.copy_(network_parameter)  # rounded to bfloat16
    encoders = (getattr(each, "text_encoder", torch.nn.Identity()) for each in (pipe, parts))
    for encoder, own in zip(*(each.parameters() for each in encoders), strict=True):
        own.copy_(encoder)
    ours = parts(noisy, time, torch.tensor(rows))
    theirs = output[0] if isinstance(output, tuple) else output.sample
    assert torch.allclose(ours, theirs[:, : ours.shape[1]], atol=1e-5)
    assert ours.abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_judged_by_the_models_own_checker(name, trained, monkeypatch):
    model, pipe = MODELS[name], load(trained[name][2])
    task = model.task
    wanted = task.held_out(3)
    pictures = [task.render(drawn) for drawn in wanted]
    asked = []

    def drawn_well(pipe, prompts, *args, **sampling):
        asked.extend(prompts)
        return pictures

    monkeypatch.setattr(evaluate, "generate", drawn_well)
    result = accuracy(pipe, n=3)
    assert asked == [task.prompt(drawn) for drawn in wanted]
    assert result["accuracy"] == 1
    assert result["failures"] == []
    pictures[0] = pictures[0][..., ::-1].copy() if name == "scenes-dit" else 255 - pictures[0]
    result = accuracy(pipe, n=3)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["failures"] == [task.prompt(wanted[0])]
    assert result["conditions"]["guidance_scale"] == 2.0
    json.dumps(result)
    assert wanted[0].family in format_table(result)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_told_as_the_tokenizers_tell_them(name):
    model = tiny(name)
    parts = model.parts(0)
    rng = random.Random(0)
    for drawn in model.task.training(rng, 12):
        prompt = model.task.prompt(drawn)
        rows = parts.tokens(prompt)
        if name == "scenes-dit":
            assert rows == [[CLASS_NAMES.index(f"{drawn.colour} {drawn.family}")]]
            continue
        for row, with_start in zip(rows, parts.tokenizers.values(), strict=True):
            tokenizer = build_tokenizer(with_start, parts.more_words)
            assert row == tokenizer(prompt, padding="max_length", max_length=parts.length).input_ids
            assert tokenizer.unk_token_id not in row
    assert parts.nothing() == ([[NO_CLASS]] if name == "scenes-dit" else parts.tokens(""))


@pytest.mark.parametrize("name", ["scenes-dit", "scenes-video"])
def test_the_world_survives_the_autoencoder(name, vae):
    """Those of still scenes are in test_checker.py."""
    task = MODELS[name].task
    judge_all(replace(task, mix=dict(list(task.mix.items())[:2])), vae, 1)


@pytest.mark.slow
def test_many_clips_survive_the_autoencoder(vae):
    judge_all(MODELS["scenes-video"].task, vae, 25)


def judge_all(task, vae, n):
    rates = checker_rates(vae, n, task=task)
    assert tuple(rates) == task.families
    for family, row in rates.items():
        assert (row["true"], row["changed"], row["round_trip"]) == (1, 0, 1), family


@pytest.mark.parametrize("noise", [FlowMatching(), VPrediction()])
def test_a_perfect_prediction_is_one_that_the_scheduler_turns_into_the_latents(noise):
    """What training asks the denoiser for is what one step of the pipeline's scheduler needs to be done at once."""
    torch.manual_seed(0)
    latents, random_noise = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    noisy, time, target, level = noise.corrupt(latents, random_noise, torch.tensor([0.5] * 3))
    scheduler = noise.scheduler()
    if isinstance(noise, FlowMatching):
        assert torch.allclose(noisy - time[:, None, None, None] * target, latents, atol=1e-5)
        return
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == 999
    step = scheduler.step(target, int(time[0]), noisy)
    assert torch.allclose(step.pred_original_sample, latents, atol=1e-4)
    assert level.tolist() == [0.5] * 3


def test_classes_have_their_own_numbers_and_any_background():
    task = Classes()
    drawn = task.held_out(48)
    assert sorted(task.prompt(each) for each in drawn) == list(range(48))
    assert task.held_out(60)[:48] == drawn
    verdicts = [task.check(task.render(each), task.prompt(each)) for each in drawn[:6]]
    assert all(verdict.ok for verdict in verdicts)
    assert len({verdict.background for verdict in verdicts}) > 1
    assert set(verdicts[0].met) == set(task.demands)
    with pytest.raises(ValueError, match="there is no class 48"):
        task.check(task.render(drawn[0]), 48)


def test_a_task_of_some_families_draws_no_others():
    task = MODELS["scenes-sd"].task
    assert {scene.family for scene in task.held_out(9)} == {"single_object", "colors", "position"}
    assert {scene.family for scene in task.training(random.Random(0), 60)} == {"single_object", "colors", "position"}
    assert Scenes().held_out(7) == Scenes().held_out(12)[:7]


def test_a_built_folder_has_a_card_and_trains_on(trained, tmp_path, monkeypatch):
    name = "scenes-dit"
    monkeypatch.setitem(MODELS, name, tiny(name))
    _, folder, out = trained[name]
    card = (out / "README.md").read_text()
    assert "# scenes-dit" in card
    assert "pipe(class_labels=[" in card
    assert "Taken over from `scenes-flux`: autoencoder." in card
    assert "| updates | 2 |" in card
    restore(out, None, tmp_path / "again")
    kept, restored = (load_file(each / "ema.safetensors") for each in (folder, tmp_path / "again"))
    assert kept.keys() == restored.keys()
    assert all(torch.equal(kept[key].bfloat16().float(), restored[key]) for key in kept)
    with pytest.raises(FileFormatError, match="holds a checkpoint already"):
        restore(out, None, tmp_path / "again")


def test_a_model_that_is_not_built_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr("cache4diffusion.reference.folder.WEIGHTS", tmp_path)
    with pytest.raises(UnknownNameError, match="`make reference MODELS=scenes-sd`"):
        folder_of("scenes-sd")
    with pytest.raises(UnknownNameError, match="did you mean 'scenes-sd'"):
        model_named("scene-sd")


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_every_denoiser_can_be_compiled(name):
    """Also of classes for which diffusers names no repeated blocks."""
    found = getattr(tiny(name).parts(0), MODELS[name].denoiser)
    weights = list(found.state_dict())
    denoiser.compile_blocks(found)
    compiled = [module for module in found.modules() if module._compiled_call_impl is not None]
    assert compiled
    assert all("Block" in type(module).__name__ for module in compiled)
    assert list(found.state_dict()) == weights, "as checkpoints know them"


def test_making_trains_what_is_left_and_builds(monkeypatch, tmp_path):
    """Stopped in the middle nothing is built; the next call trains the rest, and only that."""
    calls, built, stops = [], [], [True, False]

    def training(words):
        assert words.pop() == "--compile"
        option = dict(zip(words[1::2], words[2::2], strict=True))
        assert (words[0], option["--minutes"]) == ("scenes-dit", "inf")
        folder, updates = make.Path(option["--folder"]), int(option["--updates"])
        calls.append(updates)
        done = make.updates_of(folder) + (updates // 2 if stops.pop(0) else updates)
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "history.json").write_text(json.dumps({"updates": done}))

    monkeypatch.setattr(denoiser, "main", training)
    monkeypatch.setattr(make.build, "main", built.append)
    model = MODELS["scenes-dit"]
    assert not make.make(model, tmp_path, tmp_path / "out", updates=10, compiled=True)
    assert built == []
    assert make.make(model, tmp_path, tmp_path / "out", updates=10, compiled=True)
    assert calls == [10, 5]
    assert make.make(model, tmp_path, tmp_path / "out", updates=10)
    assert calls == [10, 5]
    folders = ["--denoiser", str(tmp_path / "scenes-dit"), "--out", str(tmp_path / "out"), "--checker", "200"]
    assert built == [["--model", "scenes-dit", *folders]] * 2


def test_the_command_makes_what_is_missing(monkeypatch, tmp_path, capsys):
    made = []

    def making(model, runs, out, updates, options, compiled):
        made.append((model.name, runs, out, updates, [*options, *["compiled"] * compiled]))
        return model.name != "scenes-video"

    monkeypatch.setattr(make, "make", making)
    monkeypatch.setattr(make, "WEIGHTS", tmp_path)
    (tmp_path / "scenes-flux").mkdir()
    make.main(["scenes-flux", "scenes-dit", "--runs", "there"])
    assert made == [("scenes-dit", make.Path("there"), tmp_path / "scenes-dit", None, ["--workers", "2"])]
    assert "scenes-flux is there" in capsys.readouterr().out
    make.main(["scenes-flux", "--again", "--updates", "7", "--workers", "1", "--compile"])
    assert made[1] == ("scenes-flux", make.Path("runs"), tmp_path / "scenes-flux", 7, ["--workers", "1", "compiled"])
    with pytest.raises(SystemExit) as stopped:
        make.main(["scenes-video", "scenes-sd"])
    assert stopped.value.code == 1
    assert "scenes-video was stopped; the same command goes on" in capsys.readouterr().err
    assert len(made) == 3  # the next one waits
    with pytest.raises(SystemExit) as wrong:
        make.main(["scenes-dti"])
    assert wrong.value.code == 2
    assert "did you mean 'scenes-dit'" in capsys.readouterr().err


def test_the_command_trains_as_the_description_says(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "scenes-dit", tiny("scenes-dit"))
    words = ["scenes-dit", "--folder", str(tmp_path), "--workers", "1", "--batch", "2", "--device", "cpu"]
    denoiser.main([*words, "--updates", "1", "--mix", "star=1"])
    facts = json.loads((tmp_path / "history.json").read_text())["facts"]
    training = MODELS["scenes-dit"].training
    assert (facts["batch"], facts["lr"], facts["seed"]) == (2 * training.microbatches, training.lr, training.seed)
    assert facts["mix"] == {"star": 1.0}
    monkeypatch.setattr(denoiser, "train", lambda model, args: facts.update(vars(args)))
    denoiser.main(words)
    assert (facts["updates"], facts["minutes"]) == (training.updates, float("inf"))
    denoiser.main([*words, "--minutes", "3"])
    assert (facts["updates"], facts["minutes"]) == (-1, 3)


@pytest.mark.parametrize("words", [["--mix", "disc=1"], ["--sigma-mean", "0.5"]])
def test_options_of_other_models_are_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        denoiser.main(["scenes-dit", "--folder", str(tmp_path), *words])
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_generated_clips_do_not_depend_on_their_batch(trained):
    pipe = load(trained["scenes-video"][2])
    task = MODELS["scenes-video"].task
    prompts = [task.prompt(drawn) for drawn in task.held_out(2)]
    together = list(generate(pipe, prompts, batch=2, num_inference_steps=1))
    alone = list(generate(pipe, prompts, batch=1, num_inference_steps=1))
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_a_card_is_made_of_what_was_measured_too(trained, vae, tmp_path, monkeypatch):
    name = "scenes-video"
    monkeypatch.setitem(MODELS, name, replace(tiny(name), sampling=MODELS[name].sampling | {"num_inference_steps": 1}))
    rate = {"true": 1.0, "changed": 0.0, "round_trip": 1.0, "psnr": 40.0}
    monkeypatch.setattr(building, "checker_rates", lambda *_, task, **__: dict.fromkeys(task.families, rate))
    facts = build(None, trained[name][1], tmp_path / "out", captions=1, checker_scenes=1, model=MODELS[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert facts["accuracy"]["accuracy"] == 0
    assert "| left | 1 | 0.0 % |" in card
    assert "| down | 100.00 % | 0.00 % | 100.00 % |" in card
    assert "## Accuracy on held-out captions" in card
    saved = save_folder(tmp_path / "again", vae, load_parts(MODELS[name], trained[name][1]), model=MODELS[name])
    assert (saved / "model_index.json").read_text() == (tmp_path / "out" / "model_index.json").read_text()
