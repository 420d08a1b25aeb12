"""NaN never survives, gradients pass through, types are kept, nothing is shared, and the ledger tells the truth."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

import cache4diffusion as c4d
import toys
from cache4diffusion.gates import Mask, MaxRun, MaxTotal
from cache4diffusion.predictors import Weights

methods = toys.distinct_methods
# FastCache predicts from what enters, so there is nothing in its cache that could be spoilt.
remembering = pytest.mark.parametrize("name", [case for case in methods.args[1] if case.values[0] != "fastcache"])
BRANCHES = [toys.flux_inputs(seed=0), toys.flux_inputs(seed=1)]


def poison(engine):
    """Write NaN into everything that predictions are made from."""
    for state in engine._states.values():
        for history in state.sites.values():
            for buffer in history.buffers:
                if buffer.is_floating_point():  # numbers in int8 have no NaN, and are not all there is
                    buffer.fill_(float("nan"))
    if engine.branches is not None:
        for tensor in engine.branches.tensors():
            tensor.fill_(float("nan"))


@torch.no_grad()
def loop_with_poison(denoiser, handle, at, num_steps=12):
    """Two branches; NaN is put into the caches before step ``at``. Also returns the plain outputs for every input."""
    x = BRANCHES[0]["hidden_states"]
    found, plain = [], []
    reference = copy.deepcopy(denoiser)
    for i, t in enumerate(toys.timesteps(num_steps)):
        if i == at:
            poison(handle._engines[0])
        calls = [{**inputs, "hidden_states": x, "timestep": torch.tensor([t])} for inputs in BRANCHES]
        found.append([denoiser(**call).sample for call in calls])
        plain.append([reference(**call).sample for call in calls])
        x = x * 0.97
    return found, plain


def first_cached(name, **options):
    denoiser = toys.flux()
    with toys.accelerated(denoiser, name, num_steps=12, **options) as handle:
        loop_with_poison(denoiser, handle, at=None)
        records = handle.trace.records
    step = next(r.step for r in records if r.symbol in "cp")
    return step, {r.branch for r in records if r.step == step and r.symbol in "cp"}


@remembering
def test_nan_is_recomputed_at_once(name):
    denoiser = toys.flux()
    step, branches = first_cached(name)
    with toys.accelerated(denoiser, name, num_steps=12) as handle:
        found, plain = loop_with_poison(denoiser, handle, at=step)
        notes = handle.trace.notes
    assert any("not finite" in note for note in notes)
    assert all(output.isfinite().all() for outputs in found for output in outputs)
    cached = [int(branch.rsplit("-")[-1]) for branch in branches]
    for index in cached:
        assert torch.equal(found[step][index], plain[step][index])


@remembering
def test_nan_read_at_the_next_step_makes_that_one_full(name):
    denoiser = toys.flux()
    step, branches = first_cached(name, nan_guard="next")
    with toys.accelerated(denoiser, name, num_steps=12, nan_guard="next") as handle:
        found, plain = loop_with_poison(denoiser, handle, at=step)
        assert any("not finite" in note for note in handle.trace.notes)
    for index in (int(branch.rsplit("-")[-1]) for branch in branches):
        assert not found[step][index].isfinite().all()
        assert torch.equal(found[step + 1][index], plain[step + 1][index])
    assert all(output.isfinite().all() for outputs in found[step + 1 :] for output in outputs)


RECOMPUTED = {
    "teacache": {"threshold": 0.3},
    "fbcache": {"threshold": 0.5},
    "dbcache": {"threshold": 0.5, "front": 1, "back": 1, "warmup": 2},
    "speca": {"threshold": 1e9, "decay": 1.0, "max_run": 4},
    "fora": {"interval": 4},
    "taylorseer-lite": {"interval": 4},
}


@pytest.mark.parametrize(
    ("name", "decide"),
    [*((name, {}) for name in RECOMPUTED), *((n, {"decide": "row"}) for n in ("teacache", "fbcache", "speca"))],
)
def test_a_recomputed_step_counts_as_the_full_step_it_was(name, decide):
    """Gates, guards, what they compare with, and the trace: as if a guard had made the step full."""
    inputs, limits = toys.flux_inputs(3), (MaxRun(3), MaxTotal(6))

    @torch.no_grad()
    def run(forced=None, poisoned=None):
        denoiser = toys.flux()
        composition = c4d.METHODS[name](**RECOMPUTED[name], **decide).compose()
        mask = Mask(() if forced is None else tuple(i in (0, forced) for i in range(forced + 1)))
        composition = dataclasses.replace(composition, guards=(mask, *composition.guards, *limits))
        with toys.accelerated(denoiser, composition, {}, num_steps=12) as handle:
            engine = handle._engines[0]
            for i, t in enumerate(toys.timesteps(12)):
                if i == poisoned:
                    poison(engine)
                x = inputs["hidden_states"] * 0.97**i
                output = denoiser(**{**inputs, "hidden_states": x}, timestep=torch.full((3,), t)).sample
                assert output.isfinite().all()
            (state,) = engine._states.values()
            return handle.trace.of(), [(unit.gate, unit.guards) for unit in state.units[0]]

    records, _ = run()
    step = next(r.step for r in records if r.symbol in "cm" and r.step > 3)
    found, units = run(poisoned=step)
    expected, wanted = run(forced=step)
    assert found[step].reason == "not finite, recomputed"
    assert [r.symbol for r in found] == [r.symbol for r in expected]
    assert [r.rows for r in found] == [r.rows for r in expected]
    assert [r.symbol for r in found] != [r.symbol for r in records] or records[step].symbol == "m"
    assert units == wanted


def test_branches_that_follow_a_recomputed_one_are_full_as_well():
    denoiser = toys.flux()
    settings = {**toys.ACTIVE["dbcache"], "threshold": 9.0, "branches": "tied"}
    with toys.accelerated(denoiser, "dbcache", settings, num_steps=6) as handle, torch.no_grad():
        for i, t in enumerate(toys.timesteps(6)):
            if i == 4:
                for history in next(iter(handle._engines[0]._states.values())).sites.values():
                    history.buffers[0].fill_(float("nan"))
            for inputs in BRANCHES:
                denoiser(**inputs, timestep=torch.tensor([t]))
        assert set(handle.stats["strips"].values()) == {"FFccFc"}


def test_a_batched_branch_that_was_recomputed_is_a_full_step():
    denoiser = toys.dit()
    settings = {"interval": 4, "warmup": 1, "attention_interval": 1}

    def run(at):
        x, labels = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 10])
        with toys.accelerated(denoiser, "fastercache", settings, num_steps=8) as handle, torch.no_grad():
            for i in range(8):
                if i == at:
                    poison(handle._engines[0])
                time = torch.full((2,), 999 - 90 * i)
                output = denoiser(torch.cat([x, x]) * 0.9**i, timestep=time, class_labels=labels).sample
                assert output.isfinite().all()
            return [record.symbol for record in handle.trace.of()]

    assert "".join(run(at=None)) == "FhhFhhhF"
    assert "".join(run(at=5)) == "FhhFhFhF"


def test_nan_of_the_denoiser_itself_is_not_hidden():
    denoiser = toys.flux()
    with toys.accelerated(denoiser, "fora", num_steps=6), torch.no_grad():
        for i in range(6):
            x = BRANCHES[0]["hidden_states"] * (float("nan") if i >= 4 else 1)
            call = {**BRANCHES[0], "hidden_states": x, "timestep": torch.tensor([1 - i / 6])}
            assert denoiser(**call).sample.isfinite().all() == (i < 4)


@pytest.mark.parametrize("name", ["speca", "fbcache", "teacache"])
def test_nan_in_one_row_leaves_the_batch_finite(name):
    denoiser, inputs = toys.flux(), toys.flux_inputs(4)
    settings = {**toys.ACTIVE[name], "decide": "row"}
    with toys.accelerated(denoiser, name, settings, num_steps=10) as handle, torch.no_grad():
        for i, t in enumerate(toys.timesteps(10)):
            if i == 5:
                for state in handle._engines[0]._states.values():
                    for history in state.sites.values():
                        for buffer in history.buffers:
                            buffer[:, 2].fill_(float("nan"))
            assert denoiser(**inputs, timestep=torch.full((4,), t)).sample.isfinite().all()


# ---------------------------------------------------------------------- gradients, types


@methods
def test_with_gradients_the_call_passes_through_and_warns(name):
    denoiser, inputs = toys.flux(), toys.flux_inputs()
    with toys.accelerated(denoiser, name) as handle:
        with pytest.warns(UserWarning, match="Gradients are enabled"):
            output = denoiser(**inputs, timestep=torch.tensor([0.5])).sample
        output.sum().backward()
        assert denoiser.proj_out.weight.grad is not None
        assert not handle.trace.records


KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@methods
@pytest.mark.parametrize(("dtype", "return_dict"), [("fp32", False), ("bf16", True), ("fp16", False)])
def test_type_shape_and_container_are_kept_on_cached_steps(name, dtype, return_dict):
    dtype = KINDS[dtype]
    denoiser = toys.flux().to(dtype)
    inputs = [toys.flux_inputs(2, seed=s, dtype=dtype) for s in (0, 1)]
    with torch.no_grad(), toys.accelerated(denoiser, name, num_steps=6) as handle:
        kinds = set()
        for t in toys.timesteps(6):
            for call in inputs:
                moved = {**call, "hidden_states": call["hidden_states"] * t}  # some methods go by how far latents move
                output = denoiser(**moved, timestep=torch.full((2,), t, dtype=dtype), return_dict=return_dict)
                tensor = toys.sample_of(output)
                kinds.add((type(output).__name__, tensor.dtype, tensor.device.type, tuple(tensor.shape)))
                assert not tensor.requires_grad and tensor.is_contiguous()
        assert set("".join(handle.stats["strips"].values())) & set("cph")
    assert len(kinds) == 1, kinds


@methods
def test_outputs_of_cached_steps_may_be_written_into(name):
    """Hosts scale and shift what they are given; the cache must not notice."""
    denoiser = toys.flux()

    @torch.no_grad()
    def loop(d, spoil):
        found = []
        for t in toys.timesteps(8):
            for call in BRANCHES:
                moved = {**call, "hidden_states": call["hidden_states"] * t}
                output = d(**moved, timestep=torch.tensor([t])).sample
                found.append(output.clone())
                if spoil:
                    output.fill_(1e6)
        return found

    clean, spoilt = (toys.on_a_fresh_copy(denoiser, name, lambda d, s=s: loop(d, s), 8) for s in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))


@methods
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the denoiser's own norms
@pytest.mark.parametrize("mode", ["autocast", "inference_mode"])
def test_autocast_and_inference_mode(name, mode):
    denoiser = toys.flux()

    def loop(d):
        outer = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode()
        with outer:
            return [output.clone() for output in toys.branch_loop(d, BRANCHES, 8)]

    plain, first = loop(denoiser), None
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=8):
        assert all(torch.equal(a, b) for a, b in zip(loop(denoiser), plain, strict=True))
    with c4d.accelerate(denoiser, name, **toys.ACTIVE[name]) as handle:
        for _ in range(2):
            with handle.run(num_steps=8):
                found = loop(denoiser)
            assert set("".join(handle.stats["strips"].values())) & set("cph")
            assert all(a.dtype == b.dtype for a, b in zip(found, plain, strict=True))
            assert all(a.isfinite().all() for a in found)
            assert first is None or all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
            first = found


# ---------------------------------------------------------------------- memory


def reachable_tensors(root, seen=None):
    """Every tensor reachable from an object through containers and instances: what is really held."""
    seen = {} if seen is None else seen
    if id(root) in seen or root is None or isinstance(root, (str, int, float, bool, type, torch.nn.Module)):
        return []
    seen[id(root)] = root
    if isinstance(root, Tensor):
        return [root]
    if isinstance(root, dict):
        children = list(root.values())
    elif isinstance(root, (list, tuple, set)):
        children = list(root)
    else:
        children = list(vars(root).values()) if hasattr(root, "__dict__") else []
    return [tensor for child in children for tensor in reachable_tensors(child, seen)]


def held(engine):
    states = [*engine._states.values(), *(engine.branches._states.values() if engine.branches is not None else [])]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable_tensors(states)}
    return sum(storages.values())


@methods
@pytest.mark.parametrize("decide", [None, "row"])
def test_the_ledger_equals_what_is_held(name, decide):
    if decide == "row" and "decide" not in c4d.METHODS[name]().settings:
        pytest.skip("decides for the batch")
    denoiser = toys.flux()
    settings = dict(toys.ACTIVE[name], **({"decide": decide} if decide else {}))
    inputs = [toys.flux_inputs(3, seed=s) for s in (0, 1)]
    with toys.accelerated(denoiser, name, settings, num_steps=9) as handle, torch.no_grad():
        engine = handle._engines[0]
        largest = 0
        for t in toys.timesteps(9):
            for call in inputs:
                denoiser(**{**call, "hidden_states": call["hidden_states"] * t}, timestep=torch.full((3,), t))
                assert handle.memory["held"] == held(engine)
                largest = max(largest, held(engine))
        assert handle.memory["peak"] == largest > 0


@methods
def test_branches_share_nothing_unless_the_method_says_so(name):
    denoiser = toys.flux()
    with toys.accelerated(denoiser, name, num_steps=9) as handle:
        toys.branch_loop(denoiser, BRANCHES, 9)
        states = list(handle._engines[0]._states.values())
        storages = [{t.untyped_storage().data_ptr() for t in reachable_tensors(state)} for state in states]
        assert c4d.METHODS[name].info.shares_branches == (name == "fastercache")
        if name != "fastercache":
            assert len(states) == 2 and all(storages)
            weights = getattr(handle._engines[0].predictor, "weights", None)
            fitted = {t.untyped_storage().data_ptr() for t in weights.placed} if isinstance(weights, Weights) else set()
            assert storages[0] & storages[1] == fitted, "nothing of what was cached; what was fitted is there once"


@methods
def test_caches_share_no_memory_with_what_the_host_holds(name):
    """Or a host that writes into its own tensors would change the cache."""
    denoiser = toys.flux()
    seen = []
    if name != "teacache":  # which runs the first block's norms for itself alone
        for module in denoiser.modules():
            module.register_forward_hook(lambda m, args, output: seen.append((args, output)))
    # On cached steps parts that nobody writes into are handed out as they are kept; here all steps are full.
    with toys.accelerated(denoiser, name, toys.off(name), num_steps=5) as handle:
        outputs = toys.branch_loop(denoiser, BRANCHES, 5)
        host = {t.untyped_storage().data_ptr() for t in reachable_tensors([seen, outputs, BRANCHES])}
        cached = {t.untyped_storage().data_ptr() for t in reachable_tensors(list(handle._engines[0]._states.values()))}
        assert not host & cached


@methods
def test_two_runs_are_equal(name):
    denoiser = toys.flux()
    found = []
    with c4d.accelerate(denoiser, name, **toys.ACTIVE[name]) as handle:
        for _ in range(2):
            with handle.run(num_steps=9):
                found.append(toys.branch_loop(denoiser, BRANCHES, 9))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------- hosts with habits


class Writes(toys.Blocks):
    """A host that writes into the stream between its blocks (older ControlNet code does), or blocks that do."""

    inside = False

    def forward(self, x, timestep, context):
        hidden, gate = self.embed(x) + context, torch.cos(timestep)[:, None, None]
        for index, block in enumerate(self.blocks):
            if self.inside:
                hidden = hidden.clone() if index == 0 else hidden
                hidden = block(hidden, gate)
            else:
                hidden = block(hidden, gate)
                hidden += 0.3 * (index + 1) * context
        return self.out(hidden)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_a_host_that_writes_between_blocks(no_grad):
    denoiser = toys.randomise(toys.seeded(Writes)(count=4))
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 6, 4, generator=g), torch.randn(1, 1, 8, generator=g)
    with no_grad():
        plain = denoiser(x, torch.full((2,), 0.5), context)
        moved = denoiser(x, torch.full((2,), 0.5), 2 * context)
        for name, settings in (("fbcache", {"threshold": 9.0}), ("teacache", {"threshold": 9.0, "cooldown": 0})):
            with toys.accelerated(denoiser, name, settings, num_steps=8) as handle:
                for _ in range(8):
                    found = denoiser(x, torch.full((2,), 0.5), context)
                    assert torch.allclose(found, plain, atol=1e-5)
                assert handle.stats["strip"] == "Fccccccc", "no full step is needed to find out that it writes"
    assert not torch.allclose(plain, moved)


class Adds(toys.Blocks):
    """Blocks that write into what they are given, and a host that does so between them."""

    class Block(toys.Blocks.Block):
        def forward(self, x, gate):
            return x.add_(gate * self.ff(self.norm(x)))

    def forward(self, x, timestep, context):
        hidden, gate = self.embed(x) + context, torch.cos(timestep)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, gate)
            hidden += 0.1 * context
        return self.out(hidden)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("front", [1, 2])
def test_scores_of_blocks_that_write_into_their_input(no_grad, front):
    """They are what they would be of blocks and a host that do not."""

    class Plain(Adds):
        Block = toys.Blocks.Block

        def forward(self, x, timestep, context):
            hidden, gate = self.embed(x) + context, torch.cos(timestep)[:, None, None]
            for block in self.blocks:
                hidden = block(hidden, gate) + 0.1 * context
            return self.out(hidden)

    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 6, 4, generator=g), torch.randn(1, 1, 8, generator=g)
    scores, weights = [], toys.randomise(Adds(count=4)).state_dict()
    for kind in (Adds, Plain):
        denoiser = kind(count=4).eval()
        denoiser.load_state_dict(weights)
        settings = {"threshold": 1e-9, "front": front, "warmup": 1}
        nothing = pytest.warns(UserWarning, match="0 of 5 steps")
        with nothing, toys.accelerated(denoiser, "dbcache", settings, num_steps=5) as handle, no_grad():
            for i in range(5):
                denoiser(x * 0.9**i, torch.full((2,), 0.5 + 0.1 * i), context)
            scores.append([record.scores[0] for record in handle.trace.of()])
    inplace, plain = scores
    assert None not in plain[1:]
    assert inplace[2:] == pytest.approx(plain[2:], rel=1e-4)  # the first step shows that copies are needed


class Mood(torch.nn.Module):
    """Parts whose output changes its structure from call to call."""

    class Block(torch.nn.Module):
        class Part(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

            def forward(self, x, extra):
                return (self.a(x), self.b(x)) if extra else (self.a(x),)

        def __init__(self):
            super().__init__()
            self.norm, self.part = torch.nn.LayerNorm(8), self.Part()

        def forward(self, x, extra):
            for output in self.part(self.norm(x), extra):
                x = x + output
            return x

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x, timestep, context, extra=True):
        for block in self.blocks:
            x = block(x + context, extra)
        return x * timestep[0]


@pytest.mark.parametrize("name", ["fora", "taylorseer", "speca"])
def test_branches_whose_parts_return_different_things(name):
    denoiser = toys.seeded(Mood)().eval()
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    contexts = [torch.zeros(1, 1, 8), torch.ones(1, 1, 8)]

    @torch.no_grad()
    def loop(d, branches):
        return [
            [d(x * (1 + 0.1 * i), torch.tensor([t]), contexts[b], extra=b == 0) for b in branches]
            for i, t in enumerate(toys.timesteps(10))
        ]

    def run(branches):
        return toys.on_a_fresh_copy(denoiser, name, lambda d: loop(d, branches), 10)

    together, singles = run([0, 1]), [run([0]), run([1])]
    for step, outputs in enumerate(together):
        for branch in (0, 1):
            assert torch.equal(outputs[branch], singles[branch][step][0])
