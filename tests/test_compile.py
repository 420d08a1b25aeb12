"""Compiled blocks: two graphs per block class and state at any depth, no fallback to eager, equal results."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import FluxTransformer2DModel

import cache4diffusion as c4d
from cache4diffusion.engine.compiling import _codes
from cache4diffusion.engine.denoiser import shifted
from cache4diffusion.errors import CompositionError, RunError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.predictors import Increment, Weights
from cache4diffusion.sites import SITES

STEPS = 10
METHODS = {
    "taylorseer": {"interval": 3},
    "fora": {"interval": 3},
    "speca": {"threshold": 5.0},
    "dbcache": {"threshold": 0.5, "front": 2, "warmup": 2},
    "fbcache": {"threshold": 0.5, "warmup": 2},
    "teacache": {"threshold": 0.5},
    "taylorseer-lite": {"interval": 3},
}
QUICK = [("taylorseer", "before"), ("taylorseer", "after"), ("dbcache", "before"), ("speca", "after")]
ALL = [
    pytest.param(name, order, marks=() if (name, order) in QUICK else pytest.mark.slow)
    for name in METHODS
    for order in ("before", "after")
]
ON_PARTS = ("taylorseer", "fora", "speca")
# Thresholds at which the rows of a batch disagree.
ROWS = {
    "speca": {"threshold": 0.5, "decay": 1.0, "max_run": 6},
    "dbcache": {"threshold": 0.22, "front": 2, "warmup": 2},
    "teacache": {"threshold": 0.2},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)  # pytest would format all of Dynamo's own trace
    yield
    torch._dynamo.reset()


def flux(blocks: int) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=blocks // 2,
        num_single_layers=blocks - blocks // 2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(4, 2, 2),
    )
    return denoiser.eval().requires_grad_(False)


@torch.no_grad()
def sample(denoiser, side: int = 4, batch: int = 1) -> list[torch.Tensor]:
    """Every output of a short run. The rows of a batch change at different speeds."""
    generator, dtype = torch.Generator().manual_seed(side), next(denoiser.parameters()).dtype
    latent = torch.randn(batch, side * side, 4, generator=generator).to(dtype)
    speed = torch.linspace(1, 8, batch).view(-1, 1, 1).to(dtype) / STEPS
    places = torch.arange(side * side)
    given = {
        "encoder_hidden_states": torch.randn(batch, 4, 8, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 8, generator=generator).to(dtype),
        "img_ids": torch.stack([places * 0, places // side, places % side], 1).float(),
        "txt_ids": torch.zeros(4, 3),
    }
    outputs = []
    for step in range(STEPS):
        time = torch.full((batch,), 1 - step / STEPS, dtype=dtype)
        outputs.append(denoiser(hidden_states=latent, timestep=time, return_dict=False, **given)[0])
        latent = latent - speed * outputs[-1]
    return outputs


class Counting:
    """A backend that runs graphs as they are; remembers each graph's block class, and how many graphs were run."""

    def __init__(self) -> None:
        self.graphs: list[str] = []
        self.runs = 0

    def __call__(self, graph, inputs):
        is_double = any("context" in node.name for node in graph.graph.nodes)
        self.graphs.append("double" if is_double else "single")

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def accelerated(denoiser, name: str, order: str, counting: Counting):
    if order == "before":
        denoiser.compile_repeated_blocks(backend=counting, fullgraph=True)
    handle = c4d.accelerate(denoiser, name, **METHODS[name])
    if order == "after":
        denoiser.compile_repeated_blocks(backend=counting, fullgraph=True)
    return handle


def eager_run(name: str, blocks: int, side: int = 4) -> tuple[list[torch.Tensor], str]:
    denoiser = flux(blocks)
    with c4d.accelerate(denoiser, name, **METHODS[name]) as handle, handle.run(num_steps=STEPS):
        return sample(denoiser, side), handle.stats["strip"]


def assert_equal(outputs, expected) -> None:
    for step, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, s=step: f"step {s}: {text}")


@pytest.mark.parametrize(("name", "order"), ALL)
def test_compiled_blocks_equal_eager_ones_with_two_graphs_per_class_and_state(name, order):
    counts = []
    for blocks in (4, 16):
        torch._dynamo.reset()
        expected, strip = eager_run(name, blocks)
        denoiser, counting = flux(blocks), Counting()
        with accelerated(denoiser, name, order, counting) as handle:
            for _ in range(2):
                with handle.run(num_steps=STEPS):
                    assert_equal(sample(denoiser), expected)
                assert handle.stats["strip"] == strip
                assert "c" in strip
                counts.append(tuple(counting.graphs))
            states = 2 if name in ON_PARTS else 1
            assert counting.graphs.count("double") <= 2 * states
            assert counting.graphs.count("single") <= 2 * states
        assert not torch._dynamo.utils.counters["graph_break"]
    assert len(set(counts)) == 1, "the same graphs at 4 and at 16 blocks, and none more in a second run"


@pytest.mark.parametrize("name", ["taylorseer", "fbcache"])
def test_every_block_that_runs_runs_compiled(name):
    denoiser, counting = flux(4), Counting()
    with accelerated(denoiser, name, "after", counting) as handle:
        with handle.run(num_steps=STEPS):
            sample(denoiser)
        counting.runs = 0
        strip = handle.stats["strip"]
        with handle.run(num_steps=STEPS):
            sample(denoiser)
        cached = 4 if name in ON_PARTS else 1  # parts are bypassed inside their blocks; fbcache runs the first block
        assert counting.runs == strip.count("F") * 4 + strip.count("c") * cached


@pytest.mark.slow
def test_predictions_that_share_a_piece_of_memory_are_as_good_as_others_to_a_graph():
    """As those do that were added up together and rounded."""
    counts = set()
    for blocks in (4, 10):
        torch._dynamo.reset()
        denoiser, counting = flux(blocks).bfloat16(), Counting()
        with c4d.accelerate(denoiser, "taylorseer", interval=3) as handle, handle.run(num_steps=STEPS):
            expected = sample(denoiser)
        denoiser.compile_repeated_blocks(backend=counting, fullgraph=True)
        with c4d.accelerate(denoiser, "taylorseer", interval=3) as handle, handle.run(num_steps=STEPS):
            assert all(torch.equal(x, y) for x, y in zip(sample(denoiser), expected, strict=True))
        counts.add(tuple(sorted(counting.graphs)))
    assert len(counts) == 1
    assert all(graphs.count(kind) <= 4 for graphs in counts for kind in ("double", "single"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speca", "dbcache"])
def test_another_resolution_adds_as_many_graphs_as_the_host_alone_needs(name):
    plain, alone = flux(4), Counting()
    plain.compile_repeated_blocks(backend=alone, fullgraph=True)
    for side in (4, 6):
        sample(plain, side)
    torch._dynamo.reset()
    denoiser, counting = flux(4), Counting()
    with accelerated(denoiser, name, "before", counting) as handle:
        for side in (4, 6):
            expected, strip = eager_run(name, 4, side)
            with handle.run(num_steps=STEPS):
                assert_equal(sample(denoiser, side), expected)
            assert handle.stats["strip"] == strip
    states = 2 if name in ON_PARTS else 1
    for kind in ("double", "single"):
        assert counting.graphs.count(kind) <= states * alone.graphs.count(kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, dynamic) for name in ON_PARTS for dynamic in (None, True)],
)
def test_one_graph_serves_every_further_resolution(name, dynamic):
    """Where it would not, the recompile limit of 8 would soon be reached, and ``fullgraph`` raise."""
    denoiser, counting, counts = flux(4), Counting(), []
    denoiser.compile_repeated_blocks(backend=counting, fullgraph=True, dynamic=dynamic)
    with c4d.accelerate(denoiser, name, **METHODS[name]) as handle:
        for side in (4, 6, 5, 7, 8):
            expected, strip = eager_run(name, 4, side)
            with handle.run(num_steps=STEPS):
                assert_equal(sample(denoiser, side), expected)
            assert handle.stats["strip"] == strip
            counts.append(len(counting.graphs))
    assert counts[1:] == [counts[1]] * 4
    for side in (4, 6):  # graphs of the cache leave the host room for its own
        assert_equal(sample(denoiser, side), sample(flux(4), side))
    assert torch._dynamo.config.force_nn_module_property_static_shapes, "set only while the denoiser runs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speca", "dbcache", "teacache"])
def test_rows_of_a_compiled_batch_decide_for_themselves(name):
    """What a group of rows gives does not depend on how many they are, so compiled and eager decide alike."""
    settings, batch = ROWS[name], 4
    found = []
    for is_compiled in (False, True):
        denoiser, counting = flux(4), Counting()
        if is_compiled:
            denoiser.compile_repeated_blocks(backend=counting, fullgraph=True)
        with c4d.accelerate(denoiser, name, **settings, decide="row") as handle:
            for _ in range(2):
                with handle.run(num_steps=STEPS):
                    outputs = sample(denoiser, batch=batch)
                found.append((outputs, [record.rows for record in handle.trace.of()]))
        assert bool(counting.runs) == is_compiled
    (expected, rows), *others = found
    assert any(0 < sum(cached) < batch for cached in rows), f"the rows never disagree: {rows}"
    for outputs, decided in others:
        assert decided == rows
        assert_equal(outputs, expected)


def test_removing_leaves_the_blocks_compiled():
    denoiser, counting = flux(4), Counting()
    with torch.no_grad():
        plain = sample(flux(4))
    with accelerated(denoiser, "fbcache", "after", counting) as handle, handle.run(num_steps=STEPS):
        sample(denoiser)
    counting.runs = 0
    assert_equal(sample(denoiser), plain)
    assert counting.runs == 4 * STEPS


@pytest.mark.parametrize("how", ["method before", "wrapper before", "method after", "wrapper after"])
def test_a_whole_denoiser_site_works_with_the_denoiser_compiled_as_a_whole(how):
    expected, strip = eager_run("taylorseer-lite", 4)
    denoiser, counting = flux(4), Counting()
    called = denoiser
    if how == "method before":
        denoiser.compile(backend=counting, fullgraph=True)
    if how == "wrapper before":
        called = torch.compile(denoiser, backend=counting, fullgraph=True)
    with c4d.accelerate(called, "taylorseer-lite", **METHODS["taylorseer-lite"]) as handle:
        if how == "method after":
            denoiser.compile(backend=counting, fullgraph=True)
        if how == "wrapper after":  # no fullgraph: torch wants a graph in every call, and a cached step has none
            called = torch.compile(denoiser, backend=counting)
        with handle.run(num_steps=STEPS):
            assert_equal(sample(called), expected)
        assert handle.stats["strip"] == strip
        assert len(counting.graphs) == 1
        assert counting.runs == strip.count("F")


@pytest.mark.parametrize("name", ["taylorseer", "fbcache"])
def test_a_denoiser_compiled_as_a_whole_that_hides_the_sites_is_refused(name):
    denoiser = flux(4)
    with pytest.raises(CompositionError, match="compile_repeated_blocks"):
        c4d.accelerate(torch.compile(denoiser, backend=Counting()), name)
    with c4d.accelerate(denoiser, name):
        with pytest.raises(CompositionError, match=r"would be compiled as a whole.*compile_repeated_blocks"):
            denoiser.compile(backend=Counting())
        with pytest.raises(RunError, match="compile_repeated_blocks"):
            sample(torch.compile(denoiser, backend=Counting()))
    denoiser.compile(backend=Counting())  # the handle is gone, and so is its objection
    with pytest.raises(CompositionError, match="compile_repeated_blocks"):
        c4d.accelerate(denoiser, name)


def test_sites_that_are_never_reached_are_noticed_at_the_first_full_step():
    denoiser = flux(4)
    with c4d.accelerate(denoiser, "fbcache", **METHODS["fbcache"]) as handle:
        with handle.run(num_steps=STEPS):
            sample(denoiser)
        for wrapper in handle._engines[0].attachment.blocks:  # as if something ran around them
            wrapper.is_alive = False
        with pytest.raises(RunError, match="no site was called"), handle.run(num_steps=STEPS):
            sample(denoiser)


@pytest.mark.parametrize("order", ["before", "after", "after a run"])
def test_token_rules_refuse_compiled_blocks(order):
    denoiser = flux(4)
    if order == "before":
        denoiser.compile_repeated_blocks(backend=Counting())
        with pytest.raises(CompositionError, match="must not be compiled"):
            c4d.accelerate(denoiser, "toca")
        return
    with c4d.accelerate(denoiser, "toca") as handle:
        if order == "after a run":
            with handle.run(num_steps=STEPS):
                sample(denoiser)
            with pytest.raises(CompositionError, match="must not be compiled"):
                denoiser.compile_repeated_blocks(backend=Counting())
        else:  # the blocks are not known yet: noticed at the first call
            denoiser.compile_repeated_blocks(backend=Counting())
            with pytest.raises(CompositionError, match="must not be compiled"):
                sample(denoiser)


@pytest.mark.slow
def test_compiled_by_inductor():
    expected, _ = eager_run("taylorseer", 4)
    denoiser = flux(4)
    denoiser.compile_repeated_blocks(fullgraph=True)
    with c4d.accelerate(denoiser, "taylorseer", **METHODS["taylorseer"]) as handle, handle.run(num_steps=STEPS):
        for output, wanted in zip(sample(denoiser), expected, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-4)


def test_classes_that_hold_themselves_are_looked_into_once():
    class Circle:
        def method(self):
            return None

    Circle.again = Circle
    assert len(list(_codes(Circle, set()))) == 1


def fitted(denoiser, site: str) -> Weights:
    """Random factors of rank 2 for every layer, or for every part."""
    generator, found, width = torch.Generator().manual_seed(0), {}, 16
    for name, module in denoiser.named_modules():
        if site == "linears" and isinstance(module, torch.nn.Linear):
            shapes = [module.weight.shape]
        elif site == "parts" and name.endswith(("attn", "ff", "ff_context", "proj_out")):
            shapes = [(width, width)] * 2
        else:
            continue
        for leaf, (out, entering) in enumerate(shapes):
            found[f"{name}/{leaf}/a"] = 0.3 * torch.randn(out, 2, generator=generator)
            found[f"{name}/{leaf}/b"] = 0.3 * torch.randn(2, entering, generator=generator)
    return Weights(found)


@pytest.mark.parametrize(
    ("site", "order"),
    [("parts", "after"), *(pytest.param("linears", order, marks=pytest.mark.slow) for order in ("before", "after"))],
)
def test_a_corrector_corrects_inside_compiled_blocks(site, order):
    """What enters a site is an intermediate of the block's graph, and so is the correction: two graphs per class."""

    def composed(denoiser):
        return c4d.Composition(SITES[site](), FixedInterval(3), Increment(weights=fitted(denoiser, site)))

    counts = []
    for blocks in (4, 8):
        torch._dynamo.reset()
        eager = flux(blocks)
        with c4d.accelerate(eager, composed(eager)) as handle, handle.run(num_steps=STEPS):
            expected = sample(eager)
        with c4d.accelerate(eager, "fora", gate="interval(interval=3)") as handle, handle.run(num_steps=STEPS):
            reused = sample(eager)
        denoiser, counting = flux(blocks), Counting()
        if order == "before":
            denoiser.compile_repeated_blocks(backend=counting, fullgraph=True)
        with c4d.accelerate(denoiser, composed(denoiser)) as handle:
            if order == "after":
                denoiser.compile_repeated_blocks(backend=counting, fullgraph=True)
            for _ in range(2):
                with handle.run(num_steps=STEPS):
                    assert_equal(sample(denoiser), expected)
                assert handle.stats["strip"] == "FccFccFccF"
                counts.append(tuple(counting.graphs))
        for kind in ("double", "single"):
            assert counting.graphs.count(kind) <= 2 * 2
        assert not torch._dynamo.utils.counters["graph_break"]
    assert len(set(counts)) == 1, "the same graphs at 4 and at 8 blocks, and none more in a second run"
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(expected, reused, strict=True)) > 1e-4, "it corrects"


def test_frames_of_ours_stay_alone_without_being_told_again(monkeypatch):
    """Telling Dynamo of every function took longer than attaching."""
    denoiser = flux(1)
    c4d.accelerate(denoiser, "fora").remove()
    told = []
    monkeypatch.setattr("torch._dynamo.decorators.skip_code", told.append)
    torch._dynamo.reset()
    c4d.accelerate(denoiser, "fora").remove()
    assert not told
    seen = []

    def backend(graph, examples):
        seen.append(graph)
        return graph.forward

    assert torch.compile(shifted, backend=backend)(torch.ones(1, 2), torch.ones(1, 2), 1).tolist() == [[2, 2]]
    assert not seen, "a function of this package was compiled"
