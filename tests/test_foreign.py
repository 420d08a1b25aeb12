"""Denoisers that nobody registered: found by observation and served, or refused in words."""

import copy
import dataclasses
import tempfile
import warnings

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
import foreign_denoisers as foreign
import toys
from cache4diffusion import anatomy
from cache4diffusion.cost import step_cost
from cache4diffusion.engine.leaves import flatten, map_tensors, take_apart, unflatten, with_arguments
from cache4diffusion.errors import AnatomyError, CompositionError
from cache4diffusion.gates import FixedInterval
from cache4diffusion.predictors import Newton
from cache4diffusion.sites import Blocks, Denoiser, Parts, Span
from foreign_denoisers import FOREIGN, Products, loop

SITES = {"whole": Denoiser(), "span": Span(), "parts": Parts(), "blocks": Blocks()}
STEPS, STRIP = 8, "FcccFccc"

every_denoiser = pytest.mark.parametrize("name", FOREIGN)
every_site = pytest.mark.parametrize("site", SITES)
with_few_steps = pytest.mark.filterwarnings("ignore::cache4diffusion.few_steps.FewStepsWarning")
pytestmark = with_few_steps


def accelerated(denoiser, site, interval=4):
    return c4d.accelerate(denoiser, c4d.Composition(SITES[site], FixedInterval(interval)))


def resting(found, denoiser, site):
    """The modules that must not run on a cached step."""
    plain = anatomy.undisturbed.unwrapped(denoiser)
    blocks = [block for stack in found.main for block in stack.blocks]
    if site == "whole":
        return [plain]
    paths = [part.path for b in blocks for part in b.parts] if site == "parts" else [block.path for block in blocks]
    return [plain.get_submodule(path) for path in dict.fromkeys(paths)]


# Off is off, frozen input ----


@every_site
@every_denoiser
def test_never_cached_is_bit_equal(name, site):
    denoiser, args, kwargs = FOREIGN[name]()
    plain = loop(denoiser, args, kwargs, STEPS)
    with accelerated(denoiser, site, interval=1) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, args, kwargs, STEPS)
        assert handle.stats["strip"] == "F" * STEPS
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@every_site
@every_denoiser
def test_cached_steps_on_the_same_input_equal_the_full_one_and_nothing_bypassed_runs(name, site):
    denoiser, args, kwargs = FOREIGN[name]()
    modules = resting(anatomy.observe(denoiser, args, kwargs), denoiser, site)
    with Products(modules) as in_all:
        plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
    with accelerated(denoiser, site) as handle, handle.run(num_steps=STEPS), Products(modules) as in_full:
        found = loop(denoiser, args, kwargs, STEPS, frozen=True)
        assert handle.stats["strip"] == STRIP
    assert in_full.count and STEPS * in_full.count == 2 * in_all.count
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fbcache", "dbcache", "teacache", "speca", "taylorseer", "bwcache", "dbprune"])
@pytest.mark.parametrize("name", ["dataclass states", "blocks twice around", "blocks twice in a row", "uvit"])
def test_methods_that_watch_serve_them_too(name, method):
    denoiser, args, kwargs = FOREIGN[name]()
    plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
    settings = {**toys.ACTIVE[method]}
    if method in ("fbcache", "dbcache", "teacache", "speca", "dbprune"):
        settings["threshold"] = 9.0
    with c4d.accelerate(denoiser, method, **settings) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, args, kwargs, STEPS, frozen=True)
        assert set(handle.stats["strip"]) & set("cm"), handle.stats["strip"]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dataclass states", "dict states", "blocks twice around", "research"])
def test_rows_decide_for_themselves(name):
    """Rows are taken out of whatever a block is given."""
    denoiser, args, kwargs = FOREIGN[name](batch=3)

    def sample(rows):
        mine = tuple(value[rows] for value in args)  # the first row of a batch is that row alone
        with c4d.accelerate(denoiser, "fbcache", threshold=0.2, decide="row") as handle, handle.run(num_steps=12):
            return loop(denoiser, mine, kwargs, 12), handle.stats["strip"]

    together, strip = sample(slice(None))
    apart = [sample(slice(row, row + 1)) for row in range(3)]
    assert "m" in strip
    for step, whole in enumerate(together):
        torch.testing.assert_close(whole, torch.cat([found[step] for found, _ in apart]), rtol=1e-4, atol=1e-5)


# What is found ----


def test_a_u_vit_has_two_lists_and_long_skips():
    found = anatomy.observe(*FOREIGN["uvit"]())
    assert [(stack.path, len(stack.blocks)) for stack in found.main] == [("in_blocks", 2), ("out_blocks", 2)]
    assert found.main[0].blocks[0].read_by == ("out_blocks.1",)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("blocks twice around", "0 1 2 0#2 1#2 2#2"),
        ("blocks twice in a row", "0 0#2 1 1#2 2 2#2"),
        ("blocks listed twice", "0 1 2 0#2 1#2 2#2"),
        ("one block twice", "0 1 2 1#2"),
    ],
)
def test_every_call_of_a_shared_block_is_a_block(name, order):
    (stack,) = anatomy.observe(*FOREIGN[name]()).main
    assert [block.name.removeprefix("blocks.") for block in stack.blocks] == order.split()
    assert [part.name.rpartition("#")[2] for part in stack.blocks[-1].parts] == ["2", "2"]
    assert stack.breaks == ()


def test_what_a_block_hands_on_is_told_from_what_it_makes():
    block = anatomy.observe(*FOREIGN["dataclass states"]()).main[0].blocks[0]
    assert block.output_template == foreign.State(
        anatomy.StreamRef(0), anatomy.facts.Handed((0, "c")), anatomy.facts.Handed((0, "layer"))
    )
    assert block.can_rebuild


# Shared blocks ----


class Rounds(foreign.Tokens):
    """The list runs as often as it is told to."""

    rounds = 2

    def through(self, x, c):
        for _ in range(self.rounds):
            x = super().through(x, c)
        return x


@pytest.mark.parametrize("site", ["span", "parts"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_block_that_runs_more_or_less_often_than_before_spoils_nothing(site, rounds):
    denoiser, args, kwargs = foreign.of(Rounds)()
    expected = []
    for now in (2, rounds):
        denoiser.rounds = now
        expected.append(loop(denoiser, args, kwargs, 1, frozen=True)[0])
    with accelerated(denoiser, site) as handle, handle.run(num_steps=STEPS):
        for step in range(STEPS):
            denoiser.rounds = 2 if step < 2 else rounds
            with torch.no_grad():
                found = denoiser(*args)
            if site == "parts" and rounds == 1 and step > 1:
                continue  # parts of the first round are what they were: the output is made of them
            torch.testing.assert_close(found, expected[step > 1], rtol=1e-5, atol=1e-5)
        strip, notes = handle.stats["strip"], handle.stats["notes"]
    assert strip.startswith("Fc")
    if rounds == 3:
        assert strip == "FcFFFFFF"
        assert any("ran more often" in note for note in notes)


def test_a_part_that_runs_twice_in_a_block_is_two_parts():
    denoiser, args, kwargs = foreign.of(lambda: foreign.Tokens(foreign.SharedAttentionBlock))()
    block = anatomy.observe(denoiser, args, kwargs).main[0].blocks[0]
    assert [part.name for part in block.parts] == ["blocks.0.attn", "blocks.0.attn#2"]
    plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
    attentions = [block.attn for block in denoiser.blocks]
    with accelerated(denoiser, "parts") as handle, handle.run(num_steps=STEPS), Products(attentions) as products:
        found = loop(denoiser, args, kwargs, STEPS, frozen=True)
    assert products.count == 2 * 3 * 2 * 2  # full steps, blocks, calls, products in each
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_what_feeds_a_part_runs_where_one_of_its_calls_does():
    """The first call of the first block is watched, so that its parts run: its norms must, too."""
    denoiser, args, kwargs = FOREIGN["blocks twice around"]()
    plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
    attentions = [block.attn for block in denoiser.blocks]
    accelerating = c4d.accelerate(denoiser, "fbcache", site="parts", threshold=9.0, nan_guard="off")
    with accelerating as handle, handle.run(num_steps=STEPS), Products(attentions) as products:
        found = loop(denoiser, args, kwargs, STEPS, frozen=True)
        cached = handle.stats["strip"].count("c")
    assert cached and products.count == 2 * 6 * (STEPS - cached) + 2 * cached
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_costs_of_shared_blocks_are_counted_by_call():
    """With one call of six in front of the watch, five of them rest: a sixth of the first block runs."""
    denoiser, args, kwargs = FOREIGN["blocks twice around"]()
    with c4d.accelerate(denoiser, "fbcache", threshold=9.0) as handle, handle.run(num_steps=STEPS):
        loop(denoiser, args, kwargs, STEPS, frozen=True)
        cost = step_cost(handle._engines[0])
        records = list(handle.trace.records)
    cached = next(record for record in records if record.symbol == "c")
    assert dict(cached.rested) == {"blocks.0": 0.5, "blocks.1": 1.0, "blocks.2": 1.0}
    saved = cost.table["blocks.0"] / 2 + cost.table["blocks.1"] + cost.table["blocks.2"]
    assert cost.of(cached) == cost.full - saved


@pytest.mark.parametrize("method", ["toca", "lazydit"])
def test_methods_that_take_a_module_for_one_part_refuse_shared_ones(method):
    denoiser, args, kwargs = FOREIGN["blocks twice around"]()
    before = toys.Dicts(denoiser)
    handle = c4d.accelerate(denoiser, method, **toys.ACTIVE[method])
    refused = pytest.raises(AnatomyError, match=r"blocks\.0\.\w+ runs several times in a call of AroundTwice")
    with refused, handle, handle.run(num_steps=12):
        loop(denoiser, args, kwargs, 12)
    assert not before.changed()


def test_parts_of_compiled_shared_blocks_are_refused():
    denoiser, args, kwargs = FOREIGN["blocks twice around"]()
    with accelerated(denoiser, "parts"):
        loop(denoiser, args, kwargs, 1)
        with pytest.raises(CompositionError, match="told apart by counting"):
            denoiser.blocks[0].compile(backend="eager")
    denoiser.blocks[0].compile(backend="eager")
    with accelerated(denoiser, "parts"), pytest.raises(CompositionError, match="told apart by counting"):
        loop(denoiser, args, kwargs, 1)


# Containers ----


class Affine(nn.Module):
    """Its output is affine in the time, inside a dataclass."""

    def forward(self, x, t):
        return foreign.Result(x * t[:, None, None])


def test_an_output_in_a_dataclass_is_predicted_and_not_kept_as_it_was():
    denoiser, (x, t, _), _ = Affine(), *foreign.of(foreign.Tokens)()[1:]
    composition = c4d.Composition(Denoiser(), FixedInterval(4, warmup=2), Newton(order=1))
    with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=STEPS), torch.no_grad():
        for step in range(STEPS):
            found = denoiser(x, t * (1 - step / STEPS))
            torch.testing.assert_close(found.hidden, x * (1 - step / STEPS) * 0.5)
        assert "c" in handle.stats["strip"]


class Shut:
    """Nobody knows that it has a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


class Hides(nn.Module):
    def forward(self, x, t):
        return Shut(x)


def test_an_output_without_a_tensor_is_refused():
    denoiser = Hides()
    refused = pytest.raises(AnatomyError, match="returns a Shut in which no tensor is found")
    with refused, c4d.accelerate(denoiser, "taylorseer-lite"), torch.no_grad():
        denoiser(torch.ones(1, 2), torch.ones(1))


class Ordered(dict):
    """A dict of another class."""


def test_containers_come_apart_and_together_again():
    one, two = torch.ones(2), torch.zeros(3)
    tree = (foreign.Result(one, {"a": two, "b": foreign.State(one, two, 3)}), 5, [None, "x"], Ordered(c=one))
    found, spec = flatten(tree)
    again = unflatten(found, spec)
    assert [type(item) for item in again] == [type(item) for item in tree]
    assert again[0].weights["b"].layer == 3 and again[0].hidden is one and again[3]["c"] is one
    assert flatten(again)[1] == spec and flatten((tree[0], 5, [None, "x"], one))[1] != spec
    assert take_apart(tree)[1].fill([two] * 5)[0].weights["b"].x is two
    assert map_tensors(lambda tensor: len(tensor), tree)[0].weights == {"a": 3, "b": foreign.State(2, 3, 3)}
    args, _ = with_arguments(foreign.StateBlock(), (tree[0].weights["b"],), {}, {(0, "x"): two})
    assert args[0].x is two and tree[0].weights["b"].x is one


@pytest.mark.parametrize("site", ["span", "blocks"])
def test_a_block_that_puts_its_tokens_into_what_it_is_given_must_run(site):
    denoiser, args, kwargs = foreign.of(lambda: foreign.PutsTokens(foreign.PutsBlock))()
    before = toys.Dicts(denoiser)
    refused = pytest.raises(AnatomyError, match=r"blocks\.0 puts what it makes into a container .*\[0\]\['x'\].*'fora'")
    with refused, accelerated(denoiser, site):
        loop(denoiser, args, kwargs, 1)
    assert not before.changed()
    plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
    with accelerated(denoiser, "parts") as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, args, kwargs, STEPS, frozen=True)
        assert handle.stats["strip"] == STRIP
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


class CountsBlock(foreign.StateBlock):
    """What it makes of a number cannot be told without running it."""

    def forward(self, state):
        return dataclasses.replace(super().forward(state), layer=state.layer + 1)


def test_a_block_that_makes_something_else_beside_its_streams_must_run():
    denoiser, args, kwargs = foreign.of(lambda: foreign.StateTokens(CountsBlock))()
    with accelerated(denoiser, "span"), pytest.raises(AnatomyError, match=r"more than its streams.*\['layer'\]"):
        loop(denoiser, args, kwargs, 1)


# Wrapped ----


def by_hooks():
    accelerate = pytest.importorskip("accelerate")
    denoiser, args, kwargs = foreign.research()
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(denoiser, hook)
    accelerate.hooks.add_hook_to_module(denoiser.blocks[0], accelerate.hooks.ModelHook())
    return denoiser, args, kwargs


def offloaded():
    accelerate = pytest.importorskip("accelerate")
    denoiser, args, kwargs = foreign.research()
    accelerate.cpu_offload(denoiser, execution_device=torch.device("cpu"))
    return denoiser, args, kwargs


def dispatched():
    """Blocks on two devices, as far as a CPU has them: memory and disk."""
    accelerate = pytest.importorskip("accelerate")
    denoiser, args, kwargs = foreign.research()
    places = {name: "cpu" for name, _ in denoiser.named_children() if name != "blocks"}
    places |= {"pos_embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk"}
    folder = tempfile.mkdtemp()
    accelerate.dispatch_model(denoiser, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return denoiser, args, kwargs


def adapted():
    peft = pytest.importorskip("peft")
    denoiser, args, kwargs = foreign.research()
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["qkv", "proj"], init_lora_weights=False)
    return peft.get_peft_model(denoiser, config).eval(), args, kwargs


def injected():
    peft = pytest.importorskip("peft")
    denoiser, args, kwargs = foreign.research()
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=r"blocks\.\d+\.(attn\.qkv|mlp\.0)", init_lora_weights=False)
    return peft.inject_adapter_in_model(config, denoiser).eval(), args, kwargs


WRAPPED = {"hooks": by_hooks, "offload": offloaded, "dispatch": dispatched, "peft": adapted, "injected": injected}
PART_LINEARS = 3 * 4  # qkv, proj and two of the MLP in three blocks
LINEARS = {"whole": lambda all_of_them: 0, "span": lambda n: n - PART_LINEARS - 3, "parts": lambda n: n - PART_LINEARS}


@pytest.mark.parametrize("site", ["whole", "span", "parts"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_denoiser_is_served_as_the_plain_one(name, site):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of offloading to disk
        denoiser, args, kwargs = WRAPPED[name]()
    with Products() as products:
        (once,) = loop(denoiser, args, kwargs, 1, frozen=True)
    adapters = sum("lora_" in path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear))
    assert products.count == 19 + adapters
    plain = loop(denoiser, args, kwargs, STEPS)
    with accelerated(denoiser, site, interval=1) as handle, handle.run(num_steps=STEPS):
        found = loop(denoiser, args, kwargs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    with accelerated(denoiser, site) as handle, handle.run(num_steps=STEPS), Products() as products:
        found = loop(denoiser, args, kwargs, STEPS, frozen=True)
        assert handle.stats["strip"] == STRIP
    assert products.count == 2 * (19 + adapters) + 6 * LINEARS[site](19)
    for output in found:
        torch.testing.assert_close(output, once, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(loop(denoiser, args, kwargs, STEPS), plain, strict=True))


def test_an_adapters_wrapper_is_seen_through():
    plain, args, kwargs = foreign.research()
    denoiser, _, _ = adapted()
    found = anatomy.observe(denoiser, args, kwargs)
    assert found.denoiser == "DiT" and found.timestep == (1,)
    assert [part.path for b in found.main[0].blocks for part in b.parts] == [
        part.path for b in anatomy.observe(plain, args, kwargs).main[0].blocks for part in b.parts
    ]
    assert anatomy.describe(denoiser).timestep == "t"


class Opaque(nn.Module):
    """Hands a call on as it is, and says nothing about it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_compiled_as_a_whole_also_inside_a_wrapper():
    for wrap in (lambda d: torch.compile(d, backend="eager"), lambda d: Opaque(torch.compile(d, backend="eager"))):
        plain, args, kwargs = foreign.research()
        denoiser = wrap(plain)
        with pytest.raises(CompositionError, match="compiled as a whole"):
            accelerated(denoiser, "span")
        expected = loop(denoiser, args, kwargs, STEPS, frozen=True)
        with accelerated(denoiser, "whole") as handle, handle.run(num_steps=STEPS):
            found = loop(denoiser, args, kwargs, STEPS, frozen=True)
            assert handle.stats["strip"] == STRIP
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_blocks_are_not_run_on_cached_steps():
    denoiser, args, kwargs = foreign.research()
    runs = []

    def backend(graph, inputs):
        def run(*values):
            runs.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
            return graph(*values)

        return run

    for block in denoiser.blocks:
        block.compile(backend=backend)
    plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
    assert sum(runs) == STEPS * 3 * 5
    for site, left in (("span", 0), ("parts", 3)):  # the modulation runs
        runs.clear()
        with accelerated(denoiser, site) as handle, handle.run(num_steps=STEPS):
            found = loop(denoiser, args, kwargs, STEPS, frozen=True)
            assert handle.stats["strip"] == STRIP
        assert sum(runs) == 2 * 3 * 5 + 6 * left
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Bad input ----


def test_in_training_with_gradients_nothing_is_cached_and_gradients_flow():
    denoiser, args, kwargs = foreign.research()
    denoiser.train().requires_grad_(True)
    twin = copy.deepcopy(denoiser)
    with accelerated(denoiser, "parts") as handle:
        for _ in range(3):
            with pytest.warns(UserWarning, match="Gradients are enabled, so nothing is cached"):
                output = denoiser(*args, **kwargs)
            expected = twin(*args, **kwargs)
            assert torch.equal(output, expected)
            output.sum().backward()
            expected.sum().backward()
        assert handle.memory["held"] == 0 and handle.stats["total_steps"] == 0
    for ours, theirs in zip(denoiser.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["blocks that write", "blocks that write and return a view"])
def test_a_block_that_writes_into_its_input_spoils_nothing(name, mode):
    denoiser, args, kwargs = FOREIGN[name]()
    assert anatomy.observe(denoiser, args, kwargs).main[0].blocks[0].mutates == ((0,),)
    for site in SITES:
        with mode():
            plain = loop(denoiser, args, kwargs, STEPS, frozen=True)
            with accelerated(denoiser, site) as handle, handle.run(num_steps=STEPS):
                found = loop(denoiser, args, kwargs, STEPS, frozen=True)
                assert handle.stats["strip"] == STRIP
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Nothing(nn.Module):
    """A denoiser without a layer."""

    def forward(self, x, t):
        return x * t[:, None, None]


@pytest.mark.parametrize("method", ["fbcache", "fora", "deepcache"])
def test_a_denoiser_with_nothing_to_cache_is_refused_and_left_alone(method):
    denoiser, (x, t, _), _ = Nothing(), *foreign.of(foreign.Tokens)()[1:]
    before = toys.Dicts(denoiser)
    refused = pytest.raises(AnatomyError, match="Nothing has no")
    with torch.no_grad(), refused, c4d.accelerate(denoiser, method):
        denoiser(x, t)
    assert not before.changed()
