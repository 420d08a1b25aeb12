"""`declare`: what is said of a denoiser is used, held against what is seen, and belongs to nobody else."""

import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

import cache4diffusion as c4d
import foreign_denoisers as foreign
import toys
from cache4diffusion import anatomy
from cache4diffusion.anatomy.hints import hint_of
from cache4diffusion.errors import AlreadyAcceleratedError, AnatomyError, SettingError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.inspection import inspect_denoiser
from cache4diffusion.sites import Denoiser, Parts, Span
from foreign_denoisers import Products

pytestmark = pytest.mark.filterwarnings("ignore::cache4diffusion.few_steps.FewStepsWarning")

ODD = {
    "latent": "z",
    "timestep": "noise",
    "blocks": ["first", "layers", "last"],
    "parts": {"mix": "attn", "map": "ffn"},
}
SITES = {"whole": Denoiser(), "span": Span(), "parts": Parts()}
STEPS, STRIP = 8, "FcccFccc"


@pytest.fixture
def odd():
    denoiser, _, kwargs = foreign.odd()
    return denoiser, kwargs


def loop(denoiser, kwargs, frozen=True):
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            noise = kwargs["noise"] if frozen else kwargs["noise"] * (1 - step / STEPS)
            found.append(denoiser(**{**kwargs, "noise": noise}))
    return found


def accelerated(denoiser, site, interval=4):
    return c4d.accelerate(denoiser, c4d.Composition(SITES[site], FixedInterval(interval)))


def test_without_a_declaration_it_is_refused_in_words_that_say_what_to_declare(odd):
    denoiser, kwargs = odd
    with pytest.raises(
        AnatomyError, match=r"no argument that is called like a timestep.*c4d\.declare\(denoiser, timestep="
    ):
        accelerated(denoiser, "whole")
    refused = pytest.raises(AnatomyError, match=r"'words' should be the latent.*c4d\.declare\(denoiser, latent='x'\)")
    with c4d.declare(denoiser, timestep="noise"), accelerated(denoiser, "whole"), refused, torch.no_grad():
        denoiser(**{**kwargs, "words": "a cat"})


@pytest.mark.parametrize("site", SITES)
def test_what_is_declared_is_served(odd, site):
    denoiser, kwargs = odd
    with c4d.declare(denoiser, **ODD):
        blocks = [denoiser.first, *denoiser.layers, denoiser.last]
        modules = {"whole": [denoiser], "span": blocks, "parts": [m for b in blocks for m in (b.mix, b.map)]}[site]
        with Products(modules) as in_all:
            plain = loop(denoiser, kwargs)
        moving = loop(denoiser, kwargs, frozen=False)
        with accelerated(denoiser, site, interval=1) as handle, handle.run(num_steps=STEPS):
            found = loop(denoiser, kwargs, frozen=False)
        assert all(torch.equal(a, b) for a, b in zip(found, moving, strict=True))
        with accelerated(denoiser, site) as handle, handle.run(num_steps=STEPS), Products(modules) as in_full:
            found = loop(denoiser, kwargs)
            assert handle.stats["strip"] == STRIP
        assert STEPS * in_full.count == 2 * in_all.count > 0
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_blocks_outside_of_lists_make_one_road_with_those_inside(odd):
    denoiser, kwargs = odd
    with c4d.declare(denoiser, **ODD):
        found = anatomy.observe(denoiser, (), kwargs)
    assert [[block.path for block in stack.blocks] for stack in found.main] == [
        ["first"],
        ["layers.0", "layers.1"],
        ["last"],
    ]
    assert found.seams == (True, True)
    assert (found.latent, found.timestep) == (("z",), ("noise",))
    seen = anatomy.observe(denoiser, (), kwargs)
    assert [stack.path for stack in seen.main] == ["layers"]


def test_the_middle_block_of_a_u_vit_may_be_declared():
    denoiser, args, kwargs = foreign.uvit()
    with c4d.declare(denoiser, blocks=["*_block", "*_blocks"]):
        plain = foreign.loop(denoiser, args, kwargs, STEPS, frozen=True)
        accelerating, products = accelerated(denoiser, "span"), Products([denoiser.mid_block])
        with accelerating as handle, handle.run(num_steps=STEPS), products:
            found = foreign.loop(denoiser, args, kwargs, STEPS, frozen=True)
    assert products.count == 2 * 4
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parts_that_are_declared_are_all_there_is(odd):
    denoiser, kwargs = odd
    with c4d.declare(denoiser, **{**ODD, "parts": {"map": "ffn"}}):
        found = anatomy.observe(denoiser, (), kwargs)
    assert [part.path for stack in found.main for block in stack.blocks for part in block.parts] == [
        "first.map", "layers.0.map", "layers.1.map", "last.map",
    ]  # fmt: skip


# What does not hold ----

FALSE = {
    "latent": ({"latent": "words"}, "latent='words': nothing that the denoiser returns is like it, but like 'z'"),
    "timestep": ({"timestep": "words"}, r"timestep='words': \(2, 16\) are not one number, nor one per row or token"),
    "blocks that are none": ({"blocks": "clock"}, "nothing that clock returns is one of its arguments plus"),
    "blocks that do not run": ({"blocks": ["layers", "spare"]}, "spare was not called in this forward"),
    "blocks twice": ({"blocks": ["layers", "layers.?"]}, "layers.0 was declared before"),
    "image": ({"image": "q"}, "image='q': through no block runs a stream of that name"),
    "parts": ({"parts": {"one": "attn"}}, "is there a module of that path whose output, scaled, is added to a stream"),
    "no attention": ({"parts": {"map": "attn"}}, "map is no attention: it treats every token by itself"),
    "an attention": ({"parts": {"mix": "ffn"}}, r"mix is an attention \('attn'\)"),
}


@pytest.mark.parametrize("site", ["whole", "span"])
@pytest.mark.parametrize("case", FALSE)
def test_a_wrong_declaration_is_refused_and_names_what_does_not_hold(odd, case, site):
    denoiser, kwargs = odd
    denoiser.spare = foreign.Mixed()
    said, words = FALSE[case]
    before = toys.Dicts(denoiser)
    with c4d.declare(denoiser, **{"latent": "z", "timestep": "noise", **said}), torch.no_grad():
        expected = denoiser(**kwargs)
        handle = accelerated(denoiser, site)
        with pytest.raises(AnatomyError, match=f"What was declared of Odd does not hold.*{words}.*c4d.declare"):
            denoiser(**kwargs)
        assert not before.changed(), "something is left attached"
        assert torch.equal(denoiser(**kwargs), expected)
        handle.remove()


class Deaf(foreign.Odd):
    """Listens neither to its clock nor to what it is told."""

    def forward(self, words, z, noise):
        return super().forward(torch.zeros_like(words), z, torch.zeros_like(noise))


@pytest.mark.parametrize("said", [{"timestep": "noise"}, {"has_clock": False, "conditioning": ["words"]}])
def test_what_nothing_depends_on_is_neither_clock_nor_prompt(said):
    denoiser, _, kwargs = foreign.odd(kind=Deaf)
    refused = pytest.raises(AnatomyError, match=r"'(noise|words)': the denoiser's output does not depend on that")
    with c4d.declare(denoiser, latent="z", **said), accelerated(denoiser, "span"), refused, torch.no_grad():
        denoiser(**kwargs)


WRONG = {
    "nothing": ({}, "nothing is declared"),
    "argument": ({"timestep": "noize"}, r"Odd\.forward\(words, z, noise\) has no such argument; did you mean 'noise'"),
    "conditioning": ({"conditioning": ["word"]}, "no such argument; did you mean 'words'"),
    "two roles": ({"latent": "z", "timestep": "z"}, "argument 'z' has two roles"),
    "a clock and none": ({"timestep": "noise", "has_clock": False}, "contradicts has_clock=False"),
    "module": ({"blocks": "layer"}, "Odd has no such module; did you mean 'layers'"),
    "kind": ({"parts": {"mix": "attention"}}, "use 'attn', 'cross_attn', 'ffn', 'fused', 'other'"),
    "no names": ({"blocks": [3]}, "give names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_be_told_at_once_is_told_at_once(odd, case):
    said, words = WRONG[case]
    with pytest.raises(SettingError, match=words):
        c4d.declare(odd[0], **said)
    assert not hint_of(odd[0]).facts


def test_only_denoisers_and_their_classes_are_declared():
    with pytest.raises(SettingError, match=r"an nn\.Module, or its class"):
        c4d.declare("denoiser", latent="z")


# Whose it is ----


def test_it_belongs_to_one_denoiser_and_ends_with_it(odd):
    denoiser, _ = odd
    other, _, _ = foreign.odd()
    with c4d.declare(denoiser, timestep="noise") as declaration:
        assert hint_of(denoiser).timestep == "noise"
        assert hint_of(torch.compile(denoiser, backend="eager")).timestep == "noise"
        assert not hint_of(other).facts
        assert not hint_of(copy.deepcopy(denoiser)).facts
        with pytest.raises(SettingError, match=r"declared already \(timestep='noise'\)"):
            c4d.declare(denoiser, latent="z")
    assert not hint_of(denoiser).facts
    declaration.remove()  # twice is once
    c4d.declare(other, latent="z")
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_of_a_class_it_holds_of_all_and_what_is_said_of_one_goes_before_it(odd):
    denoiser, _ = odd
    with c4d.declare(foreign.Odd, timestep="noise", latent="words", why="of all"):
        with c4d.declare(denoiser, latent="z"):
            assert hint_of(denoiser).facts == {"timestep": "noise", "latent": "z"}
        other, _, _ = foreign.odd(kind=Deaf)
        assert hint_of(other).facts == {"timestep": "noise", "latent": "words"}
    assert not hint_of(denoiser).facts


def test_it_comes_before_accelerate_and_may_go_while_that_lasts(odd):
    denoiser, kwargs = odd
    declaration = c4d.declare(denoiser, **ODD)
    with accelerated(denoiser, "span") as handle, handle.run(num_steps=STEPS):
        with pytest.raises(AlreadyAcceleratedError, match=r"already accelerated by .*Call remove\(\)"):
            c4d.declare(denoiser, conditioning=["words"])
        loop(denoiser, kwargs)
        declaration.remove()
        assert handle.stats["strip"] == STRIP


def test_a_pipelines_denoiser_of_any_name_is_found(odd):
    denoiser, _ = odd

    class Pipeline:
        """Keeps it under a name of its own."""

    pipe = Pipeline()
    pipe.network = denoiser
    with pytest.raises(AnatomyError, match="has no denoiser"):
        c4d.accelerate(pipe, "taylorseer-lite")
    with c4d.declare(denoiser, **ODD), c4d.accelerate(pipe, "taylorseer-lite") as handle:
        assert handle._engines[0].denoiser is denoiser


def test_inspect_shows_what_was_declared_and_what_was_seen(odd):
    denoiser, kwargs = odd
    with c4d.declare(denoiser, **ODD, why="its clock is called noise"):
        found = inspect_denoiser(denoiser, (), kwargs)
    assert found.facts()["declared"] == {**ODD, "blocks": ("first", "layers", "last")}
    assert found.facts()["hints"] == ["its clock is called noise"]
    text = str(found)
    assert "declared: latent='z', timestep='noise', blocks=('first', 'layers', 'last')" in text
    assert "(its clock is called noise)" in text
    assert found.sites["span"] is None and found.sites["parts"] is None


def test_what_a_cache_will_take_is_counted_with_what_was_declared(odd):
    denoiser, kwargs = odd
    with c4d.declare(denoiser, **ODD):
        held = c4d.cache_bytes(denoiser, "fora", inputs=kwargs, steps=12)
    assert held == 8 * kwargs["z"].shape[0] * foreign.TOKENS * foreign.WIDTH * 4  # eight parts, each once


def test_the_page_on_foreign_denoisers_says_what_is_true(odd):
    """Its example runs, on a denoiser like the one it speaks of."""
    page = (Path(__file__).parents[1] / "docs" / "foreign-denoisers.md").read_text()
    example, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the other: tests/methods/test_ca2_vdm.py
    assert len(example.strip().splitlines()) <= 8
    denoiser, kwargs = odd
    scope = {"denoiser": denoiser, "sample": lambda d: loop(d, kwargs, frozen=False)}
    exec(example, scope)
    assert scope["handle"].stats["strip"].count("c") > 0
    scope["handle"].remove()
    scope["declared"].remove()
