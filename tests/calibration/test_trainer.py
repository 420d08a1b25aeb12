"""Trainings: the denoiser comes back as it was, whatever happens; numbers are those of the seed; what is stored."""

import json

import pytest
import torch
from calibrating import BRIEF, CALL, STEPS, TRAINED, calibrated, prompts
from typer.testing import CliRunner

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import load_calibration, merge_calibrations, run
from cache4diffusion.calibration.lazy_gates import LazyGates
from cache4diffusion.calibration.routers import PairedRouters, TrajectoryRouters
from cache4diffusion.calibration.trainer import Trainer
from cache4diffusion.calibration.training import mixed
from cache4diffusion.cli.app import app
from cache4diffusion.errors import (
    AlreadyAcceleratedError,
    AnatomyError,
    CalibrationError,
    CompositionError,
    RunError,
    SettingError,
)
from scripts import script

trained = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(scope="module")
def pipe():
    pipe = toys.flux_pipeline()
    toys.generate(pipe, STEPS)  # lets the scheduler fill in what it only has after a run
    return pipe


def is_of_the_run(key):
    """What a pipeline keeps of a run; of its progress bar's settings, an equal copy."""
    return "Scheduler" in key or key.split(".")[1] in (
        "_guidance_scale", "_joint_attention_kwargs", "_interrupt", "_num_timesteps", "_current_timestep",
        "_progress_bar_config",
    )  # fmt: skip


def assert_as_before(pipe, before, plain, requires):
    assert not [key for key in before.changed() if not is_of_the_run(key)]
    assert [p.requires_grad for p in pipe.transformer.parameters()] == requires
    assert all(p.grad is None for p in pipe.transformer.parameters())
    assert torch.equal(toys.generate(pipe, STEPS), plain)


def state_of(pipe):
    parameters = list(pipe.transformer.parameters())
    parameters[0].requires_grad_(False)  # as the host left it
    requires = [p.requires_grad for p in parameters]
    assert any(requires)
    return toys.Dicts(pipe.transformer, pipe.scheduler, pipe), toys.generate(pipe, STEPS), requires


@trained
def test_the_denoiser_is_given_back_as_it_was(pipe, name):
    before, plain, requires = state_of(pipe)
    calibrated(pipe, name, **BRIEF[name])
    assert_as_before(pipe, before, plain, requires)


@trained
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_also_after_an_error_in_the_middle_of_a_students_forward(pipe, name, error):
    before, plain, requires = state_of(pipe)
    last, calls = pipe.transformer.single_transformer_blocks[-1], []

    def stop(*_):
        calls.append(torch.is_grad_enabled())
        if calls[-1]:
            raise error("stopped")

    hook = last.register_forward_hook(stop)
    with pytest.raises((error, RunError), match="stopped"):
        calibrated(pipe, name, **BRIEF[name])
    hook.remove()
    assert calls[-1] and len(calls) > 1
    assert_as_before(pipe, before, plain, requires)


@trained
def test_the_numbers_are_those_of_the_seed(pipe, name):
    options = {**BRIEF[name], "runs": 2}
    one, same, other = (calibrated(pipe, name, first=first, **options).entry for first in (0, 0, 5))
    for key, value in one.fit.items():
        assert torch.equal(value, same.fit[key])
    assert any(not torch.equal(value, other.fit[key]) for key, value in one.fit.items())


@trained
def test_what_was_trained_works_on_the_pipeline_and_survives_a_file(pipe, name, tmp_path):
    made = calibrated(pipe, name, **BRIEF[name])
    read = load_calibration(made.save(tmp_path / "made.safetensors"))
    assert read.entry.quality == made.entry.quality
    assert made.options["runs"] == 1
    assert len(made.provenance.samples) == 2
    assert read.plots()["transformer"].rstrip().endswith("</svg>")
    assert made.verdict().startswith("transformer: after 1 runs of training, ")
    outputs = []
    for calibration in (made, str(tmp_path / "made.safetensors")):
        with c4d.accelerate(pipe, name, calibration=calibration, **active(name)) as handle:
            outputs.append(toys.generate(pipe, STEPS))
        assert set(handle.trace.strip()) & set("cmp")
    assert torch.equal(*outputs)


def active(name):
    """What makes even brief trainings cache something."""
    return {"l2c": {"threshold": 0.99}, "harmonica": {"threshold": 0.99}, "lazydit": {"threshold": 2.0}}.get(name, {})


@trained
def test_trainings_are_not_merged_and_the_reason_is_said(pipe, name):
    shards = [calibrated(pipe, name, 1, first, **BRIEF[name]) for first in (0, 1)]
    with pytest.raises(CalibrationError, match=rf"was trained, .*Train once, with all of them: c4d calibrate.*{name}"):
        merge_calibrations(shards)


@trained
def test_without_a_calibration_the_command_that_makes_one_is_named(pipe, name):
    with pytest.raises(CalibrationError, match=f"c4d calibrate MODEL --method {name}"):
        c4d.accelerate(pipe, name)


def test_prompts_come_in_turn_and_every_round_has_other_noise(pipe, monkeypatch):
    seen, sample = [], run._sample

    def spied(pipe, call, prompt, seed, steps):
        seen.append((float(prompt["prompt_embeds"][0, 0, 0]), seed))
        return sample(pipe, call, prompt, seed, steps)

    monkeypatch.setattr(run, "_sample", spied)
    calibrated(pipe, "l2c", 2, runs=5)
    first, second = (float(p["prompt_embeds"][0, 0, 0]) for p in prompts(2))
    assert [value for value, _ in seen] == [first, first, second, first, second, first], "one run only to look"
    seeds = [seed for _, seed in seen[1:]]
    assert seeds[:2] == [0, 1] and len(set(seeds)) == 5


def test_one_run_is_a_teacher_and_a_student_for_every_taught_step():
    pipe = toys.flux_pipeline()
    counter = toys.Counter(pipe.transformer)
    calibrated(pipe, "l2c", 1, runs=20)
    judged = 2 * 2 * (STEPS // 2)  # the last two runs: two forwards more at every taught step
    assert counter.counts[""] == STEPS + 20 * (STEPS + STEPS // 2) + judged


def test_the_teachers_trajectory_is_the_uncached_one_and_the_students_is_not(pipe):
    plain = toys.generate(pipe, STEPS)
    for training, is_plain in ((PairedRouters(runs=1), True), (TrajectoryRouters(runs=1), False)):
        with Trainer(pipe, training, 0, {}) as trainer:
            trainer.look(lambda: toys.generate(pipe, STEPS))
            latents = []
            trainer.teach(0, lambda latents=latents: latents.append(toys.generate(pipe, STEPS)) or latents[-1])
        assert torch.equal(latents[-1], plain) == is_plain


def test_sequential_guidance_fills_a_cache_for_every_branch():
    pipe = toys.flux_pipeline()
    counter = toys.Counter(pipe.transformer)
    made = c4d.calibrate(pipe, "l2c", [toys.prompt(1, negative=2)], steps=4, call=CALL, trial=0, runs=1)
    assert counter.counts[""] == 2 * (4 + 4 + 2 + 4), "look, teacher, student, verdict, in two branches"
    assert len(made.entry.sums["losses"]) == 1


def test_a_pipeline_that_returns_no_tensors_is_rehearsed_by_its_images():
    pipe = script("matrix").dit()  # knows no output_type="latent"
    pipe.set_progress_bar_config(disable=True)
    made = c4d.calibrate(pipe, "harmonica", [0], steps=4, call={"guidance_scale": 3.0}, trial=1, runs=1, refresh=1)
    assert len(made.entry.sums["losses"]) == 1
    assert made.trial is not None


def test_batched_guidance_learns_from_both_halves():
    denoiser = toys.dit()
    with Trainer(denoiser, LazyGates(runs=1), 0, {}) as trainer:

        def run():
            with trainer.run(num_steps=4):
                return toys.dit_loop(denoiser, 2, 4)

        trainer.look(run)
        assert trainer.teach(0, run) > 0
        entry = trainer.entries()["denoiser"]
    assert set(entry.fit) == {f"transformer_blocks.{i}.{part}" for i in range(3) for part in ("attn1", "ff")}


def test_a_call_inside_inference_mode_trains_as_well(pipe):
    plain = calibrated(pipe, "l2c", 1, runs=1).entry.fit
    with torch.inference_mode():
        inside = calibrated(pipe, "l2c", 1, runs=1).entry.fit
    assert all(torch.equal(value, inside[name]) for name, value in plain.items())


def test_a_loss_that_is_not_finite_ends_it_with_a_reason(pipe):
    with pytest.raises(CalibrationError, match=r"loss of step 1 is not finite\. Use a smaller rate than"):
        calibrated(pipe, "lazydit", 1, runs=3, price=1e38, rate=1e30)


def test_what_is_accelerated_or_compiled_is_not_trained():
    pipe = toys.flux_pipeline()
    with c4d.accelerate(pipe, "fora"), pytest.raises(AlreadyAcceleratedError, match="must see it uncached"):
        calibrated(pipe, "l2c", runs=1)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(CompositionError, match="Calibrate it before it is compiled"):
        calibrated(pipe, "l2c", runs=1)


def test_a_denoiser_in_training_is_not_accelerated(pipe):
    with (
        Trainer(pipe, PairedRouters(runs=1), 0, {}),
        pytest.raises(AlreadyAcceleratedError, match="a training of PairedRouters"),
    ):
        c4d.accelerate(pipe, "fora")


def test_a_denoiser_without_parts_is_refused():
    denoiser = toys.MLP()
    with (
        Trainer(denoiser, PairedRouters(runs=1), 0, {}) as trainer,
        torch.no_grad(),
        pytest.raises(AnatomyError, match="no parts of the kinds"),
        trainer.run(num_steps=4),
    ):
        denoiser(torch.randn(1, 4), torch.ones(1))


def test_the_number_of_steps_must_be_known():
    denoiser = toys.flux()
    with (
        Trainer(denoiser, PairedRouters(runs=1), 0, {}),
        pytest.raises(CalibrationError, match="must know the number of steps"),
    ):
        toys.flux_loop(denoiser, toys.flux_inputs(), 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runs": 0}, "runs must be 1 or more"),
        ({"rate": 0.0}, "rate must be more than 0"),
        ({"price": -1.0}, "price must be 0 or more"),
        ({"prize": 1.0}, "did you mean 'price'"),
    ],
)
def test_wrong_settings_are_answered_in_words(pipe, options, said):
    with pytest.raises(SettingError, match=said):
        calibrated(pipe, "l2c", **options)


def test_shares_are_numbers_or_one_per_row_or_per_token():
    fresh, cached = [torch.ones(2, 3, 4)], [torch.zeros(2, 3, 4)]
    assert torch.equal(mixed(torch.tensor(1.0), fresh, cached)[0], fresh[0])
    rows = torch.tensor([0.25, 0.5])
    assert torch.equal(mixed(rows, fresh, cached)[0], rows[:, None, None].expand(2, 3, 4))
    tokens = torch.rand(2, 3)
    assert torch.equal(mixed(tokens, fresh, cached)[0], tokens[..., None].expand(2, 3, 4))


def test_the_verdict_tells_what_to_do():
    training = PairedRouters(runs=40)
    falling = torch.linspace(1.0, 0.1, 40, dtype=torch.float64)
    flat = torch.ones(40, dtype=torch.float64)

    def verdict(losses, **means):
        sums = {name: torch.tensor([value], dtype=torch.float64) for name, value in means.items()}
        return training.judge({"losses": losses, "errors": losses, **sums})

    good = verdict(flat, plain=1.0, sampled=0.05, cached=0.4)
    assert "40% of the features are cached at the trained steps, with 5% of the error of all: a sound" in good.verdict
    assert good.r2 == pytest.approx(0.95)
    assert "still falling: more runs may help" in verdict(falling, plain=1.0, sampled=0.3, cached=0.4).verdict
    assert "compare before use" in verdict(flat, plain=1.0, sampled=0.3, cached=0.4).verdict
    assert "little better than caching everything" in verdict(flat, plain=1.0, sampled=0.8, cached=0.9).verdict
    assert (
        "hardly anything will be cached: use a higher price"
        in verdict(flat, plain=1.0, sampled=0.0, cached=0.0).verdict
    )
    assert verdict(flat, plain=0.0, sampled=0.0, cached=0.5).r2 is None


def test_the_command_line_trains_and_says_how_it_went(monkeypatch, tmp_path):
    from cache4diffusion.cli import models

    pipe, out = toys.flux_pipeline(), tmp_path / "l2c.safetensors"
    monkeypatch.setattr(models, "load_model", lambda *_: models.Model(pipe, "toy", CALL, 4))
    monkeypatch.setattr(models, "prompts_to_calibrate", lambda *_: prompts(2))
    words = ["calibrate", "toy", "--method", "l2c", "--set", "runs=3", "--set", "rate=0.1", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, words)
    facts = json.loads(done.stdout)
    assert facts["options"]["runs"] == 3 and facts["options"]["rate"] == 0.1
    assert "after 3 runs of training" in facts["quality"]["transformer"]["verdict"]
    assert "train, loss" in done.stderr
    assert load_calibration(out).method == "l2c"
