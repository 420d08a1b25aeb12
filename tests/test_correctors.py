"""What a corrector is handed: the input that belongs to the feature, at every kind of site, and no other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.cost import summarise
from cache4diffusion.errors import AnatomyError, CalibrationError, CompositionError
from cache4diffusion.gates import AccumulatedChange, Drift, FixedInterval
from cache4diffusion.method import Composition
from cache4diffusion.predictors import Corrector, Increment, LinearMap, Reuse, Weights
from cache4diffusion.predictors.corrector import Blank, along_channels, constant, paired
from cache4diffusion.predictors.history import History
from cache4diffusion.sites import Blocks, Denoiser, Linears, Parts, Span, SwitchingSpan
from cache4diffusion.storage import PLAIN
from small_denoisers import accelerated, differences, flux, flux_inputs, remember_anatomy, rows_of, sample

STEPS = 6


@pytest.fixture(autouse=True)
def remembered_anatomy(monkeypatch):
    remember_anatomy(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return flux()


class Sighting(History):
    site = ""


@dataclass(frozen=True)
class Witness(Corrector):
    """Predicts the last feature and writes down what it saw, by site and step: at full steps, at cached ones."""

    sees: ClassVar = "input"

    full: dict = field(default_factory=dict)
    cached: dict = field(default_factory=dict)

    def serves(self, site: str) -> bool:
        return True

    def init(self, rows, num_steps=None, store=PLAIN):
        return self.init_at("", rows, num_steps, store)

    def init_at(self, site, rows, num_steps=None, store=PLAIN):
        state = Sighting(1, rows, store)
        state.site = site
        return state

    def is_ready(self, state) -> bool:
        return not state.is_empty

    def update_seeing(self, state, leaves, seen, time, rows=None) -> None:
        assert [leaf.shape[:-1] for leaf in leaves] == [x.shape[:-1] for x in seen]
        self.full[state.site, int(time)] = [x.clone() for x in seen]
        state.write(leaves, time, rows)

    def material(self, state, time, rows=None):
        return [buffer[0].clone() for buffer in state.buffers]

    def predict_seeing(self, state, seen, time, rows=None):
        self.cached[state.site, int(time)] = [x.clone() for x in seen]
        return self.material(state, time, rows)

    def correct(self, material: Sequence, seen: Sequence):
        return list(material)


def witnessed(denoiser, inputs, site, steps=4, **options):
    """What a witness saw, and the inputs of all modules in the same run without it."""
    witness = Witness()
    composition = Composition(site, FixedInterval(2), witness, **options)
    outputs, trace, _ = accelerated(denoiser, inputs, steps, composition)
    reused, _, _ = accelerated(denoiser, inputs, steps, Composition(site, FixedInterval(2), Reuse(), **options))
    assert differences(outputs, reused) == [0.0] * steps, (
        "it predicts what reuse predicts: norms that run change nothing"
    )
    assert trace.strip() == "FcFc"[:steps]
    return witness


def entering(denoiser, inputs, paths):
    """What enters modules in the first step of a plain run."""
    seen = {}

    def note(path):
        def hook(module, args, kwargs):
            values = [*args, *kwargs.values()]
            seen[path] = [x.clone() for x in values if isinstance(x, torch.Tensor) and x.ndim == 3]

        return hook

    hooks = [denoiser.get_submodule(p).register_forward_pre_hook(note(p), with_kwargs=True) for p in paths]
    sample(denoiser, inputs, 1)
    for hook in hooks:
        hook.remove()
    return seen


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# -- parts -----------------------------------------------------------------------------------------------------------


def test_a_part_shows_what_enters_it_and_a_fused_one_what_enters_the_modules_that_rest_with_it(model):
    inputs = flux_inputs(2)
    witness = witnessed(model, inputs, Parts())
    parts = ["attn", "ff", "ff_context"]
    paths = [f"transformer_blocks.1.{part}" for part in parts] + ["single_transformer_blocks.1.proj_mlp"]
    true = entering(model, inputs, paths)
    for path in paths[:3]:
        assert_same(witness.full[path, 0], true[path])
    assert_same(witness.full["single_transformer_blocks.1.proj_out", 0], true["single_transformer_blocks.1.proj_mlp"])
    assert witness.full.keys().isdisjoint(witness.cached)
    sites = {site for site, _ in witness.full}
    assert {site for site, _ in witness.cached} == sites
    assert len(sites) == 2 * 3 + 3


def test_on_cached_steps_it_is_todays_input_and_norms_run_for_it(model):
    """With the same input at every step, what is seen at cached steps is what was seen at full ones."""
    denoiser, inputs = toys.flux(), toys.flux_inputs(2)
    witness = Witness()
    counter = toys.Counter(denoiser)
    with c4d.accelerate(denoiser, Composition(Parts(), FixedInterval(2), witness)) as handle, handle.run(num_steps=4):
        toys.flux_loop(denoiser, inputs, 4, frozen=True)
    for (site, step), seen in witness.cached.items():
        assert_same(seen, witness.full[site, step - 1])
        assert all(x.isfinite().all() for x in seen)
    assert counter.counts["single_transformer_blocks.0.norm.norm"] == 4
    assert counter.counts["single_transformer_blocks.0.proj_mlp"] == 2, "what only feeds a part rests"
    assert counter.counts["single_transformer_blocks.0.attn"] == 2


def test_an_adapters_contribution_shares_the_input_of_the_attention(model):
    denoiser = toys.flux(ip_adapter=True)
    inputs = toys.flux_inputs(1) | toys.ip_adapter_inputs(1)
    witness = Witness()
    with c4d.accelerate(denoiser, Composition(Parts(), FixedInterval(2), witness)) as handle, handle.run(num_steps=2):
        toys.flux_loop(denoiser, inputs, 2)
    image, text, again = witness.full["transformer_blocks.0.attn", 0]
    assert torch.equal(image, again)
    assert image.shape[1] != text.shape[1]


def test_a_layer_shows_what_enters_it(model):
    inputs = flux_inputs(1)
    witness = witnessed(model, inputs, Linears())
    paths = ["transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.2.proj_out"]
    true = entering(model, inputs, paths)
    for path in paths:
        assert_same(witness.full[path, 0], true[path])
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".norm" not in name]
    assert len({site for site, _ in witness.full}) == len(layers) - len(
        [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." not in name]
    )


# -- spans and the whole denoiser --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "first"),
    [
        (Span(), {"span.0": "transformer_blocks.0"}),
        (Span(front=1, form="output"), {"span.0": "transformer_blocks.1"}),
        (Span(per_list=True), {"span.0": "transformer_blocks.0", "span.1": "single_transformer_blocks.0"}),
        (SwitchingSpan(0.6, switch=1), {"rear.0": "single_transformer_blocks.0"}),
        (Blocks(), {"block.1": "transformer_blocks.1", "block.3": "single_transformer_blocks.1"}),
    ],
    ids=str,
)
def test_a_span_shows_what_enters_its_first_block(model, site, first):
    inputs = flux_inputs(2)
    witness = witnessed(model, inputs, site)
    true = entering(model, inputs, list(first.values()))
    for name, path in first.items():
        image, text = true[path]
        assert_same(witness.full[name, 0], [image, text][: len(witness.full[name, 0])])
        assert (name, 1) in witness.cached


def test_what_a_host_adds_on_the_way_is_not_what_entered():
    """ControlNet residuals behind the first block: a span of both lists sees what entered it."""
    denoiser, inputs = toys.flux(), toys.flux_inputs(1) | toys.controlnet_inputs(1)
    witness = Witness()
    with c4d.accelerate(denoiser, Composition(Span(), FixedInterval(2), witness)) as handle, handle.run(num_steps=2):
        toys.flux_loop(denoiser, inputs, 2, frozen=True)
    assert_same(witness.cached["span.0", 1], witness.full["span.0", 0])


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_a_host_that_writes_into_its_streams_is_seen_before_it_does(no_grad):
    class Writes(toys.Blocks):
        def forward(self, x, timestep, context):
            hidden = self.embed(x) + context
            for block in self.blocks:
                hidden = block(hidden, 0.7)
                hidden += 0.3 * context
            return self.out(hidden)

    denoiser, x = toys.randomise(toys.seeded(Writes)()), torch.randn(2, 6, 4)
    witness = Witness()
    with no_grad(), c4d.accelerate(denoiser, Composition(Span(), FixedInterval(2), witness)) as handle:
        with handle.run(timesteps=[1.0, 0.9, 0.8, 0.7]):
            for t in (1.0, 0.9, 0.8, 0.7):
                denoiser(x, torch.full((2,), t), torch.ones(1, 1, 8))
        wanted = denoiser.embed(x) + 1
    seen = {**witness.full, **witness.cached}
    assert {step for _, step in witness.cached}, "something was predicted"
    for values in seen.values():
        torch.testing.assert_close(values[0], wanted)


@pytest.mark.parametrize("form", ["output", "residual"])
def test_the_denoiser_shows_the_latent(model, form):
    witness = witnessed(model, flux_inputs(2), Denoiser(form))
    assert_same(witness.full["output", 0], [flux_inputs(2)["hidden_states"]])


def test_an_output_of_other_places_than_the_latents_is_refused():
    class Pools(toys.Blocks):
        def forward(self, x, timestep, context):
            return super().forward(x, timestep, context)[:, :2]

    denoiser = toys.seeded(Pools)()
    composition = Composition(Denoiser(), FixedInterval(2), Witness())
    refused = pytest.raises(AnatomyError, match="has places that the latent has not")
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=2), torch.no_grad(), refused:
        denoiser(torch.randn(1, 6, 4), torch.ones(1), torch.ones(1, 1, 8))


# -- rows, dtypes, memory ----------------------------------------------------------------------------------------------


def factors_of(denoiser, rank):
    """Plain factors of all linear layers."""
    found = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear):
            u, s, v = torch.linalg.svd(module.weight.detach().float(), full_matrices=False)
            found[f"{name}/0/a"], found[f"{name}/0/b"] = u[:, :rank] * s[:rank], v[:rank]
    return Weights(found)


@pytest.mark.parametrize("site", [Linears(), Parts(), Span(), Denoiser()], ids=str)
def test_rows_that_decide_for_themselves_are_their_own_runs(model, site):
    inputs = flux_inputs(3)
    weights = factors_of(model, 3) if isinstance(site, Linears) else None
    composition = Composition(site, AccumulatedChange(0.12, of=Drift()), Increment(weights=weights), decide="row")
    together, trace, _ = accelerated(model, inputs, 8, composition)
    assert any(record.rows is not None and len(set(record.rows)) == 2 for record in trace.of()), "they differ"
    for row in range(3):
        alone, _, _ = accelerated(model, rows_of(inputs, row), 8, composition)
        assert max(differences([out[row : row + 1] for out in together], alone)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_take_the_dtype_of_the_feature(dtype):
    denoiser = toys.flux().to(dtype)
    composition = Composition(Linears(), FixedInterval(2), Increment(weights=factors_of(denoiser, 2)))
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=3):
        outputs = toys.flux_loop(denoiser, toys.flux_inputs(1, dtype=dtype), 3)
        held = handle._engines[0].tensors()
        assert {tensor.dtype for tensor in held} == {dtype}
    assert all(out.dtype == dtype and out.isfinite().all() for out in outputs)


def test_weights_are_copied_once_for_all_branches_and_gone_with_the_run():
    denoiser = toys.flux()
    weights = factors_of(denoiser, 2)
    with c4d.accelerate(denoiser, Composition(Linears(), FixedInterval(2), Increment(weights=weights))) as handle:
        sizes = []
        for count in (1, 2):
            with handle.run(num_steps=4):
                toys.branch_loop(denoiser, [toys.flux_inputs(seed=seed) for seed in range(count)], 4)
                sizes.append((handle.memory["held"], len(weights.placed)))
            assert weights.placed == []
            assert handle.memory["held"] == 0
    (one, placed), (two, again) = sizes
    assert placed == again == 2 * 39
    factors = sum(4 * 2 * sum(m.weight.shape) for n, m in linears_of(denoiser))
    assert two - factors == 2 * (one - factors)
    own = {id(tensor) for tensor in weights.tensors.values()}
    assert own.isdisjoint(map(id, weights.placed)), "what was given is not written into"


def linears_of(denoiser):
    return [
        (name, module)
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name and ".norm" not in name
    ]


def test_weights_of_other_shapes_say_what_is_needed():
    weights = Weights({"here/0/a": torch.zeros(3, 2)})
    y = torch.zeros(1, 4, 3)
    assert weights.get("here/0/a", (3, None), y).shape == (3, 2)
    for name, shape in (("here/0/a", (5, None)), ("here/0/b", (None, 3))):
        with pytest.raises(CalibrationError, match=f"under {name}, and .* is needed.*Calibrate anew"):
            weights.get(name, shape, y)
    assert Blank(7).get("any/0/a", (3, None), y, 3).shape == (3, 3)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_what_a_correction_costs_is_in_the_expected_flops():
    denoiser = toys.flux()
    expected = {}
    for rank in (1, 2):
        composition = Composition(Linears(), FixedInterval(2), Increment(weights=factors_of(denoiser, rank)))
        with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=2):
            toys.flux_loop(denoiser, toys.flux_inputs(1), 2)
        expected[rank] = summarise(handle).cached_flops
    image, text = 16, 5
    per_rank = 0
    for name, module in linears_of(denoiser):
        is_text = "add_" in name or "ff_context" in name or "to_add_out" in name
        tokens = image + text if name.startswith("single") else text if is_text else image
        per_rank += 2 * tokens * sum(module.weight.shape)
    assert expected[2] - expected[1] == per_rank


# -- small things ------------------------------------------------------------------------------------------------------


def test_leaves_are_paired_with_inputs_of_the_same_places_in_their_order():
    image, text, maps = torch.zeros(2, 6, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, 5, 5)
    assert paired([image, text], [image, text]) == (0, 1)
    assert paired([text, image], [image, text]) == (1, 0)
    assert paired([image, image], [image, image]) == (0, 1)
    assert paired([image, text, image], [image, text]) == (0, 1, 0)
    assert paired([torch.zeros(2, 8, 5, 5)], [image, maps]) == (1,)
    assert paired([image], [text]) is None
    assert paired([], []) == ()


def test_maps_are_mapped_along_axis_1():
    weight, bias, x = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4, 5, 6)
    wanted = torch.nn.functional.conv2d(x, weight[:, :, None, None], bias)
    torch.testing.assert_close(along_channels(x, weight, bias), wanted)
    torch.testing.assert_close(constant(x, bias), torch.zeros_like(wanted) + bias[:, None, None])
    tokens = torch.randn(2, 5, 4)
    torch.testing.assert_close(constant(tokens, bias), torch.zeros(2, 5, 3) + bias)


def test_a_linear_map_needs_a_site_that_adds():
    with pytest.raises(CompositionError, match=r"is not a sum.*form='residual'"):
        Composition(Denoiser(), FixedInterval(2), LinearMap())
    assert Composition(Denoiser("residual"), FixedInterval(2), LinearMap()).site == Denoiser("residual")
