"""Training: the update rules, processes that share the work, checkpoints, and a smoke test of both scripts."""

import json
import multiprocessing
import os
import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cache4diffusion.reference.models import MODELS
from cache4diffusion.reference.networks import build_text_encoder_2, build_tokenizer, build_vae, vocabulary
from cache4diffusion.reference.parts import FluxParts
from cache4diffusion.reference.scenes import RELATIONS, SHAPES, draw_scene
from cache4diffusion.reference.training import flow
from cache4diffusion.reference.training.attention import plain_attention
from cache4diffusion.reference.training.latents import DenoiserLoss, LatentPool
from cache4diffusion.reference.training.optim import adam_step, muon_step, orthogonalise
from cache4diffusion.reference.training.parallel import Trainer, TrainSettings
from cache4diffusion.reference.training.vae import VaeLoss


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_orthogonalised_matrices_have_singular_values_near_1(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_adam_is_torchs_adam():
    torch.manual_seed(0)
    start, grads = torch.randn(7), torch.randn(5, 7)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.98))
    ours, mean, square = start.clone(), torch.zeros(7), torch.zeros(7)
    for i, grad in enumerate(grads):
        theirs.grad = grad.clone()
        optimizer.step()
        adam_step(ours, grad, mean, square, lr=0.01, count=i + 1)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_muon_moves_a_matrix_by_a_step_of_adams_size():
    torch.manual_seed(0)
    matrix = torch.zeros(32, 64)
    muon_step(matrix, torch.randn(32, 64), torch.zeros(32, 64), lr=0.01)
    assert 0.001 < matrix.square().mean().sqrt() < 0.004  # 0.2 * lr, as Adam's typical step


def toy_loss(model, generator, update, index):
    x = torch.randn(8, 6, generator=generator)
    loss = (model(x) - x.flip(1)).square().mean()
    return loss, {"double": 2 * loss.item()}


def train_toy(folder, **settings) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    defaults = {"minutes": 1.0, "updates": 40, "workers": 1, "microbatches": 4, "log_every": 10, "warmup": 5}
    trainer = Trainer(model, toy_loss, TrainSettings(folder, **(defaults | settings)), lambda name, p: True)
    trainer.run()
    return trainer


def test_training_lowers_the_loss_and_keeps_its_curve(tmp_path):
    trainer = train_toy(tmp_path, updates=200, lr=0.02)
    curve = json.loads((tmp_path / "history.json").read_text())["curve"]
    assert [entry["update"] for entry in curve] == list(range(10, 201, 10))
    assert curve[-1]["loss"] < 0.3 * curve[0]["loss"]
    assert curve[-1]["double"] == pytest.approx(2 * curve[-1]["loss"], rel=1e-3)
    assert trainer.history["updates"] == 200


def test_two_processes_do_what_one_does(tmp_path):
    one = train_toy(tmp_path / "one", workers=1)
    two = train_toy(tmp_path / "two", workers=2)
    for a, b in zip(one.parameters, two.parameters, strict=True):
        assert torch.allclose(a, b, atol=0.02)  # Muon works in bfloat16, and sums differ in their order
    assert one.history["curve"][-1]["loss"] == pytest.approx(two.history["curve"][-1]["loss"], rel=0.02)


def test_resuming_continues_from_weights_and_optimizer(tmp_path):
    first = train_toy(tmp_path)
    resumed = train_toy(tmp_path, updates=0)
    for name in ("parameters", "first", "second", "ema"):
        for a, b in zip(getattr(first, name), getattr(resumed, name), strict=True):
            assert torch.equal(a, b)
    assert resumed.history["updates"] == resumed.optimizer_updates == 40


def test_averaged_weights_alone_are_enough_to_resume(tmp_path):
    first = train_toy(tmp_path)
    (tmp_path / "state.safetensors").unlink()
    resumed = train_toy(tmp_path, updates=1, lr=0.0)
    assert resumed.history["updates"] == 41
    assert resumed.optimizer_updates == 1
    for a, b in zip(first.ema, resumed.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_diverged_loss_stops_the_training(tmp_path):
    model = nn.Linear(2, 2)
    settings = TrainSettings(tmp_path, minutes=1, updates=3, workers=1, microbatches=1)
    trainer = Trainer(model, lambda m, g, u, i: (m(torch.full((1, 2), torch.inf)).sum(), {}), settings, lambda *_: True)
    with pytest.raises(FloatingPointError, match="resume from the last checkpoint"):
        trainer.run()
    assert not (tmp_path / "ema.safetensors").exists()


def dying_loss(model, generator, update, index):
    if update == 3 and multiprocessing.parent_process() is not None:
        os._exit(1)
    time.sleep(0.02)  # so that the other process gets its share
    return toy_loss(model, generator, update, index)


def test_the_death_of_a_process_is_reported_and_not_waited_for(tmp_path):
    trainer = Trainer(nn.Linear(6, 6), dying_loss, TrainSettings(tmp_path, minutes=5, workers=2), lambda *_: True)
    with pytest.raises(RuntimeError, match="a training process died; resume from the last checkpoint"):
        trainer.run()


def test_settings_out_of_range_are_errors(tmp_path):
    with pytest.raises(ValueError, match="workers=0, microbatches=8: both must be 1 or more"):
        train_toy(tmp_path, workers=0, microbatches=8)
    with pytest.raises(ValueError, match="resume='none': choose 'auto' or 'ema'"):
        train_toy(tmp_path, resume="none")


@pytest.mark.parametrize("keys", [5, 7])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": True}])
def test_plain_attention_is_attention(options, keys):
    torch.manual_seed(0)
    if "attn_mask" in options:
        options = {"attn_mask": torch.randn(5, keys)}
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, keys, keys))
    options = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    fused = F.scaled_dot_product_attention
    with plain_attention():
        found = F.scaled_dot_product_attention(q, k, v, **options)
        grads = torch.autograd.grad(found.square().sum(), (q, k, v))
    assert F.scaled_dot_product_attention is fused
    assert torch.allclose(found, expected)
    assert all(torch.allclose(a, b) for a, b in zip(grads, expected_grads, strict=True))


def flux_pool(first_update=0, batch=4, microbatches=1, mix=None, parts=None, **sizes):
    model = MODELS["scenes-flux"]
    return LatentPool(
        build_vae_with_scale(), parts or FluxParts(0, **TINY), model.task, first_update, batch, microbatches,
        mix=mix, **sizes,
    )  # fmt: skip


def build_vae_with_scale():
    vae = build_vae()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    return vae


TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}


def test_the_pool_repeats_scenes_after_it_filled_up():
    pool = flux_pool(10, batch=4, microbatches=2, size=16, reuse=4)
    pool.filling = 1
    seen = [pool.draw(torch.Generator().manual_seed(i), 11 + i // 2, i % 2) for i in range(6)]
    made = {tuple(row.flatten().tolist()) for latents, _ in seen[:2] for row in latents}
    assert len(made) == 8
    later = [tuple(row.flatten().tolist()) for latents, _ in seen[2:] for row in latents[1:]]
    assert any(row in made for row in later)
    assert pool.draw(torch.Generator().manual_seed(9), 30, 1)[0].shape == (4, 64, 32)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_flow_training_runs_and_resumes_on_a_tiny_network(tmp_path):
    def train(updates):
        parts = FluxParts(0, **TINY)
        settings = TrainSettings(tmp_path, minutes=1, updates=updates, workers=1, microbatches=2, log_every=1)
        trainer = Trainer(parts, lambda *_: None, settings, parts.is_matrix)
        pool = flux_pool(trainer.history["updates"], 2, 2, parts=parts, size=64)
        trainer.loss = DenoiserLoss(pool, MODELS["scenes-flux"].noise)
        with plain_attention():
            return trainer.run()

    assert train(2)["updates"] == 2
    history = train(1)
    assert history["updates"] == 3
    assert len(history["curve"]) == 3


def test_the_mix_of_families_is_that_asked_for():
    pool = flux_pool(size=64, mix={"position": 1.0})
    _, ids = pool.draw(torch.Generator().manual_seed(0), 1, 0)
    words = vocabulary()
    captions = [" ".join(words[i] for i in row[1]) for row in ids.tolist()]
    assert all(any(f" {name} " in caption for name in RELATIONS) for caption in captions)


@pytest.mark.parametrize("text", ["position", "position=x", "nothing=1", "position=-1", "position=0"])
def test_a_wrong_mix_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        flow.main(["--vae", "a", "--folder", "b", "--mix", text])
    assert text in capsys.readouterr().err


def test_text_tokens_know_their_neighbours_from_the_start():
    tokenizer, encoder = build_tokenizer(with_start=False), build_text_encoder_2()

    def encode(caption):
        ids = tokenizer([caption], padding="max_length", max_length=16, return_tensors="pt").input_ids
        return encoder(ids)[0][0].detach()

    one, other = encode("a red circle and a blue star"), encode("a blue circle and a red star")
    change = (one - other).norm(dim=-1) / one.norm(dim=-1)
    assert change[2] > 0.1  # circle
    assert change[6] > 0.1  # star


def test_the_text_tokens_tell_left_from_right_before_any_training():
    """What training must keep: which place a shape has can be read off its token by a linear map."""
    rng, tokenizer, encoder = random.Random(3), build_tokenizer(with_start=False), build_text_encoder_2(5).eval()
    captions = [draw_scene(rng, "position").caption for _ in range(1200)]
    ids = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = encoder(ids)[0]
    tokens, places = [], []
    for tensor, caption in zip(hidden, captions, strict=True):
        words = caption.split()
        relation = next(number for number, name in enumerate(RELATIONS) if f" {name} " in caption)
        for order, position in enumerate(i for i, word in enumerate(words) if word in SHAPES):
            tokens.append(tensor[position])
            places.append(2 * relation + order)
    x, y = torch.stack(tokens), F.one_hot(torch.tensor(places)).float()
    half = len(x) // 2
    fitted = torch.linalg.lstsq(x[:half], y[:half]).solution
    assert ((x[half:] @ fitted).argmax(1) == y[half:].argmax(1)).float().mean() > 0.97


def test_only_the_transformers_matrices_follow_muon():
    model = FluxParts(0, **TINY)
    names = [name for name, p in model.named_parameters() if p.ndim >= 2 and model.is_matrix(name, p)]
    assert len(names) == 12 + 5  # of the double-stream and of the single-stream block
    assert all(name.startswith("transformer.") for name in names)
    assert {model.lr_scale(name) for name, _ in model.named_parameters()} == {0.02, 0.1, 0.3, 1.0}


def test_vae_training_lowers_its_loss(tmp_path):
    settings = TrainSettings(tmp_path, minutes=1, updates=8, workers=1, microbatches=1, log_every=1, warmup=1)
    vae = build_vae(block_out_channels=[8, 8, 8, 8])
    history = Trainer(vae, VaeLoss(1), settings, lambda name, p: ".conv" in name).run()
    assert history["curve"][-1]["edges"] < 0.8 * history["curve"][0]["edges"]  # the total depends more on the scene
