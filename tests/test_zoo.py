"""Every denoiser class of diffusers: found, small, and served at every kind of site, or there is a reason."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import cache4diffusion as c4d
import renaming
from cache4diffusion import anatomy, zoo
from cache4diffusion.accelerate import attach
from cache4diffusion.anatomy.hints import HINTS
from cache4diffusion.anatomy.tree import leaves, map_leaves
from cache4diffusion.composition import Composition
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.passage import Passage
from cache4diffusion.errors import AnatomyError, UnknownNameError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.inspection import SITES, why_not
from cache4diffusion.sites import Blocks, Denoiser, Linears, Parts, Span
from cache4diffusion.tokens import TopScore
from cache4diffusion.zoo.optional import EVERY, LEFT_OUT, NO_TENSORS, RICH
from scripts import script
from small_denoisers import LinearCounter

pytestmark = [  # what some denoisers say when they run on a CPU
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

pages = script("zoo")
COMMITTED = Path(__file__).parents[1] / "docs/benchmarks/zoo.json"
CLASSES = [name for name in zoo.denoiser_classes() if name in zoo.TINY]
SLOW = {  # to look at
    "AudioLDM2UNet2DConditionModel", "DreamLiteUNetModel", "I2VGenXLUNet", "Kandinsky3UNet", "UNet3DConditionModel",
    "UNetMotionModel", "UNetSpatioTemporalConditionModel", "WanAnimateTransformer3DModel",
}  # fmt: skip
every_class = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CLASSES]
)

# What cannot be, and why. A span of blocks is what transformers have; of U-Nets it is their levels.
NO_LEVELS = r"has no stack of blocks that carries the latent"
NO_PARTS = r"has no parts of the kinds .* that can be told apart"
EXCEPTIONS = {
    ("StableCascadeUNet", "span"): NO_LEVELS,  # its levels are lists of convolutions, skips are resized on the way
    ("StableCascadeUNet", "parts"): NO_PARTS,  # attention on maps
    ("Kandinsky3UNet", "parts"): NO_PARTS,  # attention on maps
    ("UNet2DModel", "parts"): NO_PARTS,  # attention on maps
}
# Linear layers of blocks that the denoiser runs by itself: DiT's head asks the first block's embedder again.
ASKED_OUTSIDE = {"DiTTransformer2DModel": 2}


def tensors(tree):
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def call(denoiser, kwargs):
    """Its output's tensors; containers among the arguments may be used up by the call."""
    return tensors(denoiser(**map_leaves(lambda _, leaf: leaf, kwargs)))


@functools.cache
def specimen(name):
    """The denoiser, its arguments, and how it is built: looked at once."""
    denoiser, args, kwargs = zoo.tiny(name).make()
    return denoiser, kwargs, anatomy.observe(denoiser, args, kwargs)


def of_blocks(name):
    """The site that holds a span of blocks."""
    return "levels" if specimen(name)[2].unet is not None else "span"


# --- the classes ------------------------------------------------------------------------------------------------------


def test_every_denoiser_that_diffusers_exports_has_a_configuration():
    missing = zoo.denoiser_classes().keys() - zoo.TINY.keys()
    assert not missing, f"add a row for {', '.join(sorted(missing))} in cache4diffusion/zoo"
    assert len(CLASSES) >= 60


def test_what_makes_no_noise_less_is_no_denoiser():
    found = zoo.denoiser_classes()
    for name in ("FluxControlNetModel", "UNetControlNetXSModel", "AutoencoderKL", "MotionAdapter", "T2IAdapter"):
        assert name not in found
    assert {"UNet1DModel", "PriorTransformer", "UVit2DModel", "ZImageTransformer2DModel"} <= found.keys()


def test_a_class_of_a_later_release_is_found_by_itself(monkeypatch):
    class Flux9Transformer2DModel(nn.Module):
        def forward(self, hidden_states, noise_timestep):
            return hidden_states

    monkeypatch.setattr(diffusers, "Flux9Transformer2DModel", Flux9Transformer2DModel, raising=False)
    monkeypatch.setattr(diffusers, "__dir__", lambda: [*vars(diffusers)], raising=False)
    assert zoo.denoiser_classes()["Flux9Transformer2DModel"] is Flux9Transformer2DModel
    with pytest.raises(UnknownNameError, match="No tiny configuration is known of 'Flux9Transformer2DModel'"):
        zoo.tiny("Flux9Transformer2DModel")


@every_class
def test_a_call_gives_numbers_and_the_same_ones_every_time(name):
    state = torch.get_rng_state()
    denoiser, args, kwargs = zoo.tiny(name).make()
    assert torch.equal(torch.get_rng_state(), state)
    assert args == ()
    given = [tensor.clone() for tensor in tensors(kwargs)]
    first = call(denoiser, kwargs)
    assert first
    assert all(tensor.isfinite().all() for tensor in first)
    again, _, kwargs = zoo.tiny(name).make()
    assert all(torch.equal(a, b) for a, b in zip(tensors(kwargs), given, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(call(again, kwargs), first, strict=True))


@pytest.mark.parametrize("name", [name for name in CLASSES if zoo.TINY[name].batches])
def test_a_batch_of_one_works_too(name):
    denoiser, _, kwargs = zoo.tiny(name).make(1)
    assert call(denoiser, kwargs)


# --- sites ------------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("kind", [pytest.param("whole", marks=pytest.mark.slow), "span", "parts"])
def test_off_is_off_and_cached_steps_equal_full_ones(name, kind):
    denoiser, kwargs, found = specimen(name)
    site = SITES[of_blocks(name) if kind == "span" else kind]
    if (name, kind) in EXCEPTIONS:
        reason = why_not(Composition(site, FixedInterval(2)), denoiser, (), kwargs, found)
        assert re.search(EXCEPTIONS[name, kind], reason or "")
        return
    plain = call(denoiser, kwargs)
    for interval, expected in ((1, "FFFF"), (2, "FcFc")):
        composition = Composition(site, FixedInterval(interval))
        with attach(denoiser, {"denoiser": denoiser}, {"denoiser": composition}, nan_guard="now") as handle:
            handle._engines[0].prepare((), kwargs, anatomy=found)
            resting = resting_linears(denoiser, handle._engines[0].attachment.bypassed)
            with handle.run(num_steps=4):
                for symbol in expected:
                    with LinearCounter(resting) as counter:
                        output = call(denoiser, kwargs)
                    assert handle.trace.records[-1].symbol == symbol
                    if symbol == "c":
                        assert counter.count == (0 if kind != "span" else ASKED_OUTSIDE.get(name, 0))
                        assert all(relative(a, b) < 1e-5 for a, b in zip(output, plain, strict=True))
                    else:
                        assert counter.count or not resting
                        assert all(torch.equal(a, b) for a, b in zip(output, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(call(denoiser, kwargs), plain, strict=True))


def resting_linears(denoiser, paths):
    """Linear layers in the modules of these paths (of the whole denoiser for ``""``)."""
    inside = [module for path in paths for module in denoiser.get_submodule(path).modules()]
    return [module for module in inside if isinstance(module, nn.Linear)]


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))


def run(name, composition, steps=6):
    """Outputs of a run in which nothing changes, one letter per step, and how far each is from the plain output."""
    denoiser, kwargs, found = specimen(name)
    plain = call(denoiser, kwargs)
    with attach(denoiser, {"denoiser": denoiser}, {"denoiser": composition}, nan_guard="now") as handle:
        handle._engines[0].prepare((), kwargs, anatomy=found)
        with handle.run(num_steps=steps):
            outputs = [call(denoiser, kwargs) for _ in range(steps)]
        letters = "".join(record.symbol for record in handle.trace.records)
    return letters, [max(relative(a, b) for a, b in zip(output, plain, strict=True)) for output in outputs]


@pytest.mark.parametrize("name", ["HunyuanDiT2DModel", "UniDiffuserModel", "UVit2DModel"])
@pytest.mark.parametrize(("front", "back"), [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)])
def test_spans_are_right_where_long_skips_leave_them(name, front, back):
    letters, errors = run(name, Composition(Span(front, back), FixedInterval(3)))
    assert letters == "FccFcc"
    assert max(errors) < 1e-5


@pytest.mark.parametrize("site", [Denoiser("residual"), Span(form="output"), Blocks(), Linears()])
@pytest.mark.parametrize("name", ["ZImageTransformer2DModel", "LatteTransformer3DModel", "ConsisIDTransformer3DModel"])
def test_other_sites_are_right_where_latents_are_listed_and_blocks_interrupted(name, site):
    letters, errors = run(name, Composition(site, FixedInterval(3)))
    assert letters == "FccFcc"
    assert max(errors) < 1e-5


@pytest.mark.parametrize("kind", ["HunyuanVideo", "OvisImage", "QwenImage21", "PRX", "AuraFlow"])
def test_tokens_can_be_computed_apart(kind):
    """Attention in several pieces, half of what is joined at full length, or another projection in front of a part."""
    rule = TopScore(recompute_ratio=0.3, cross_weight=0.0, bonus=0.0)
    (name,) = (name for name in CLASSES if name in (f"{kind}Transformer2DModel", f"{kind}Transformer3DModel"))
    letters, errors = run(name, Composition(Parts(), FixedInterval(3), tokens=rule))
    assert letters == "FppFpp"
    assert max(errors) < 1e-5


def test_a_filter_of_pictures_is_refused_where_text_is_among_the_tokens():
    reason = why_not(c4d.method("seacache").compose(), *specimen_call("Lumina2Transformer2DModel"))
    assert "image and text are in one row" in reason
    assert why_not(c4d.method("seacache").compose(), *specimen_call("FluxTransformer2DModel")) is None


def specimen_call(name):
    denoiser, kwargs, found = specimen(name)
    return denoiser, (), kwargs, found


def test_nine_of_ten_classes_have_each_kind_of_site():
    assert not [name for name, kind in EXCEPTIONS if kind == "whole"]
    for kind in ("span", "parts"):
        assert sum(other == kind for _, other in EXCEPTIONS) <= 0.1 * len(CLASSES)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_names_of_modules_do_not_matter(name):
    _, _, expected = specimen(name)
    denoiser, args, kwargs = zoo.tiny(name).make()
    names = renaming.rename(denoiser)
    found = renaming.with_names(anatomy.observe(denoiser, args, kwargs), names)
    without_words = [dataclasses.replace(facts, notes=()) for facts in (found, expected)]
    assert without_words[0] == without_words[1]
    assert len(found.notes) == len(expected.notes)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DModel", "WanTransformer3DModel", "UniDiffuserModel"])
def test_names_of_modules_do_not_matter_to_some(name):
    test_names_of_modules_do_not_matter(name)


def test_hints_are_few_and_needed():
    assert HINTS.keys() <= zoo.TINY.keys()
    assert len(HINTS) <= 8
    assert all(hint.why for hint in HINTS.values())


@pytest.mark.parametrize("name", [name for name in HINTS if name in CLASSES])
def test_without_its_hint_a_class_is_not_understood(name, monkeypatch):
    denoiser, _, expected = specimen(name)
    roles = inputs_of(denoiser)
    assert expected.latent[0] == roles.latent
    monkeypatch.delitem(HINTS, name)
    if roles.timestep is None:
        with pytest.raises(AnatomyError, match="no argument that is called like a timestep"):
            inputs_of(denoiser)
    else:
        assert inputs_of(denoiser).latent != roles.latent


# --- optional inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rich", [pytest.param(rich, id=f"{rich.kind}, {rich.name}") for rich in RICH])
def test_a_rich_call_gives_what_the_plain_one_leaves_out(rich):
    plain = zoo.tiny(rich.kind)
    arguments = rich.of(plain).arguments(2)
    assert set(arguments) <= set(inspect.signature(plain.cls.forward).parameters)
    assert set(pages.inputs_of(arguments)) - set(pages.inputs_of(plain.arguments(2)))


def test_every_optional_input_is_given_by_some_call_or_there_is_a_reason():
    for name in CLASSES:
        left_out = pages.left_out(name)
        assert all(left_out.values()), f"{name}: say what {left_out} are given, or why not, in zoo/optional.py"
        assert LEFT_OUT.get(name, {}).keys() <= left_out.keys(), "what is given needs no excuse"
    assert LEFT_OUT.keys() <= zoo.TINY.keys()
    assert NO_TENSORS["return_dict"]


def test_rows_of_a_rich_call_have_texts_of_different_lengths():
    mask = next(rich for rich in RICH if rich.kind == "QwenImageTransformer2DModel").make(
        zoo.tiny("QwenImageTransformer2DModel")
    )[2]["encoder_hidden_states_mask"]
    assert mask.sum(1).tolist() == [5, 4]


# --- the table of all classes -----------------------------------------------------------------------------------------


@functools.cache
def committed():
    return {(row["class"], row["call"]): row for row in json.loads(COMMITTED.read_text())["rows"]}


def test_every_class_has_its_rows_in_the_table():
    missing = set(pages.wanted(list(zoo.denoiser_classes()))) - committed().keys()
    assert not missing, f"run `make matrix`: {sorted(missing)} have no row"
    rows = committed().values()
    assert all(found["outcome"] != pages.FAILED for row in rows for found in row["sites"].values())
    assert {(r["class"], k) for r in rows if r["call"] == pages.PLAIN for k in pages.KINDS
            if r["sites"][k]["outcome"] == pages.ABSENT} == EXCEPTIONS.keys()  # fmt: skip
    assert all(row["renamed"] for row in rows if row["call"] == pages.PLAIN)
    assert {row["class"] for row in rows if row["hint"]} == HINTS.keys()


def is_as_committed(name, called, kind):
    denoiser, kwargs = pages.specimen(name, called)
    found = pages.cell(denoiser, kwargs, anatomy.observe(denoiser, (), kwargs), kind)
    told = committed()[name, called]["sites"][kind]
    return all(found.get(key) == told.get(key) for key in ("site", "outcome", "resting")), found


@pytest.mark.parametrize(
    ("name", "called", "kind"),
    [
        ("FluxTransformer2DModel", "ControlNet", "span"),
        ("FluxTransformer2DModel", EVERY, "parts"),
        ("ChromaTransformer2DModel", EVERY, "span"),  # a loop that writes into what blocks left
        ("SanaWMTransformer3DModel", EVERY, "span"),  # a stream with its padding masked
        ("QwenImageTransformer2DModel", EVERY, "whole"),
        ("UNet2DModel", EVERY, "span"),
        ("UNet2DModel", EVERY, "parts"),  # there are none
    ],
)
def test_some_cells_are_as_in_the_table(name, called, kind):
    is_same, found = is_as_committed(name, called, kind)
    assert is_same, found


@pytest.mark.slow
@pytest.mark.parametrize("rich", [pytest.param(rich, id=f"{rich.kind}, {rich.name}") for rich in RICH])
@pytest.mark.parametrize("kind", pages.KINDS)
def test_all_cells_with_optional_inputs_are_as_in_the_table(rich, kind):
    is_same, found = is_as_committed(rich.kind, rich.name, kind)
    assert is_same, found


def test_what_is_added_between_blocks_must_be_added_once(monkeypatch):
    """The check of a ControlNet fails where its residuals are taken for the blocks' own work; without one it cannot."""
    monkeypatch.setattr(Passage, "residual", lambda self, i: self.left[i] - self.entered[i])
    for called, outcome in ((pages.PLAIN, pages.PASSED), ("ControlNet", pages.FAILED)):
        denoiser, kwargs = pages.specimen("FluxTransformer2DModel", called)
        found = pages.cell(denoiser, kwargs, anatomy.observe(denoiser, (), kwargs), "span")
        assert found["outcome"] == outcome, found
    assert "a cached step is off by" in found["words"]


def test_a_module_that_runs_on_a_cached_step_is_named(monkeypatch):
    denoiser, kwargs, found = specimen("DiTTransformer2DModel")
    monkeypatch.setattr(pages.Spy, "clear", lambda self: None)  # as if all of the full step ran again
    told = pages.cell(denoiser, kwargs, found, "parts")
    assert told["outcome"] == pages.FAILED
    assert "transformer_blocks.0.attn1" in told["words"]


def test_the_page_has_a_row_for_a_class_that_nobody_knows_yet(tmp_path, monkeypatch):
    classes = {"DiTTransformer2DModel": None, "Flux9Transformer2DModel": None}
    monkeypatch.setattr(pages.zoo, "denoiser_classes", lambda: classes)
    words = ["--write", str(tmp_path / "zoo")]
    assert pages.main(words) == 0
    text = (tmp_path / "zoo.md").read_text()
    assert "**3 checks passed, 0 failed**" in text and "parts 1 of 1 (100 %)" in text
    assert "| `DiTTransformer2DModel` | plain | 2 | image | 2 attn, 2 ffn | same | 56 | 50 | 26 |" in text
    assert "| `Flux9Transformer2DModel` | no configuration is known of this class yet |" in text
    monkeypatch.setattr(pages, "row_of", lambda name, called: pytest.fail("known rows are kept"))
    assert pages.main([*words, "--resume"]) == 0
    assert (tmp_path / "zoo.md").read_text() == text
