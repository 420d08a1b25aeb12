"""Predictions and copies of many sites at a time: the same numbers as one by one, in as few operations as for one."""

from collections import Counter as Tally
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cache4diffusion as c4d
import small_denoisers
from cache4diffusion.engine import predictions
from cache4diffusion.engine.predictions import Predictions
from cache4diffusion.predictors import History, Newton, Reuse, Taylor, weighted_sum
from cache4diffusion.predictors.history import weighted_sums
from cache4diffusion.storage import PLAIN, Storage, Store, Writes
from toys import ACTIVE, Blocks, flux, flux_inputs, flux_loop, timesteps

STEPS = 14


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = Tally()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.counts.total()


def limit(monkeypatch, count):
    """What may wait at a time, in bytes."""
    monkeypatch.setattr(predictions, "GROUP_BYTES", count)
    monkeypatch.setattr("cache4diffusion.storage.GROUP_BYTES", count)


def one_by_one(monkeypatch):
    """Every prediction alone, every copy at once."""
    limit(monkeypatch, 0)
    monkeypatch.setattr(Writes, "take", lambda *args: False)


@cache
def network(dtype):
    return flux().to(dtype)


def run(name, dtype=torch.float32, batch=2, **settings):
    denoiser, inputs = network(dtype), flux_inputs(batch=batch, dtype=dtype)
    with c4d.accelerate(denoiser, name, **settings) as handle, handle.run(num_steps=STEPS):
        outputs = flux_loop(denoiser, inputs, STEPS)
        memory = handle.memory["peak"]
    return outputs, handle.trace.strip(), memory


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[1.0], [0.0], [0.5], [1.625, -0.75, 0.125], [1.0, 0.0, 0.0], [1.5, 0.0, -0.5]])
def test_sums_of_many_features_are_those_of_each_bit_for_bit(weights, dtype, result):
    shapes = [(2, 5, 8), (2, 5, 8), (2, 3, 8), (), (2, 0, 8), (2, 8, 3, 4)]
    columns = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in weights]
    for column in columns:
        column[-1] = column[-1].to(memory_format=torch.channels_last)
    together = weighted_sums(columns, weights, [result] * len(shapes))
    for i, reached in enumerate(together):
        snapshots = [column[i] for column in columns]
        wide = torch.promote_types(dtype, torch.float32)
        expected = sum((x.to(wide) * weight for x, weight in zip(snapshots, weights, strict=True)), torch.zeros(()))
        torch.testing.assert_close(reached, expected.to(result), rtol=2e-2 if result.itemsize == 2 else 1e-6, atol=1e-6)
        assert torch.equal(reached, weighted_sum(snapshots, weights, result))
        assert reached.dtype == result
        assert reached.stride() == snapshots[0].stride(), "it lies in memory like the feature"


def test_features_of_several_dtypes_are_each_added_up_in_their_own():
    columns = [
        [torch.randn(3).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.bfloat16)] for _ in range(2)
    ]
    together = weighted_sums(columns, [1.5, -0.5], [x.dtype for x in columns[0]])
    for i, reached in enumerate(together):
        assert torch.equal(reached, weighted_sum([column[i] for column in columns], [1.5, -0.5]))


# -- predictions -------------------------------------------------------------------------------------------------------


def histories(count, times=(0.0, 1.0), store=PLAIN, dtype=torch.float32):
    found = {}
    for i in range(count):
        found[f"site {i}"] = state = History(2, None, store)
        for time in times:
            state.write([torch.randn(2, 4).to(dtype)], time)
    return found


def test_a_group_is_made_when_the_first_of_it_is_asked_for(monkeypatch):
    limit(monkeypatch, 3 * 8 * 4)
    states = histories(5)
    with Operations() as made:
        coming = Predictions(Newton(1), states, 2.0)
    assert not made.total, "nothing is made ahead of being asked for"
    for name, ops in [("site 1", 2), ("site 0", 0), ("site 4", 2), ("site 2", 0), ("site 3", 0)]:
        with Operations() as made:
            (reached,) = coming.take(name)
        assert made.total == ops
        assert torch.equal(reached, Newton(1).predict(states[name], 2.0)[0])
    assert coming.take("site 1") is None, "handed out once"
    assert coming.take("unknown") is None


def test_only_sums_with_equal_weights_are_made_together():
    early, late = histories(2), histories(2, times=(0.0, 3.0))
    states = {f"{name}, {kind}": s for kind, some in (("early", early), ("late", late)) for name, s in some.items()}
    coming = Predictions(Newton(1), states, 4.0)
    for name, state in states.items():
        with Operations() as made:
            (reached,) = coming.take(name)
        assert made.total == 2 * name.startswith("site 0")
        assert torch.equal(reached, Newton(1).predict(state, 4.0)[0])


def test_a_snapshot_as_it_lies_is_handed_out_itself():
    states = histories(3)
    with Operations() as made:
        coming = Predictions(Reuse(), states, 4.0)
        leaves = {name: coming.take(name)[0] for name in states}
    assert not made.total
    assert all(states[name].rings[0].holds(leaf) for name, leaf in leaves.items())


def test_what_is_unpacked_first_is_made_alone():
    states = histories(3, store=Store(Storage.of("fp8")))
    coming = Predictions(Newton(1), states, 2.0)
    for name, state in states.items():
        with Operations() as made:
            (reached,) = coming.take(name)
        assert made.total >= 4
        assert torch.equal(reached, Newton(1).predict(state, 2.0)[0])


def test_a_predictor_that_does_more_than_add_up_is_asked_site_by_site():
    class Doubled(Newton):
        def predict(self, state, time, rows=None):
            return [2 * leaf for leaf in super().predict(state, time, rows)]

    states = histories(2)
    assert Predictions(Doubled(1), states, 2.0).take("site 0") is None
    denoiser, inputs = network(torch.float32), flux_inputs()
    outputs = []
    for predictor in (Newton(1), Doubled(1)):
        composition = c4d.Composition(c4d.sites.Parts(), c4d.gates.FixedInterval(3), predictor)
        with c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=3):
            outputs.append(flux_loop(denoiser, inputs, 3))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[0][1], outputs[1][1])


# -- copies ------------------------------------------------------------------------------------------------------------


class Changes:
    """Who was told that a feature was written into before it was copied."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1


@pytest.fixture
def store():
    return Store()


def written(store, leaves, time=0.0, states=None, on_change=None):
    states = [History(2, None, store) for _ in leaves] if states is None else states
    with store.writes.waiting(on_change or Changes()):
        for state, leaf in zip(states, leaves, strict=True):
            state.write([leaf], time)
    return states


def test_copies_that_wait_are_made_in_one_operation(store):
    leaves = [torch.randn(2, 4) for _ in range(5)]
    states = written(store, leaves)
    with Operations() as made:
        store.writes.make()
        store.writes.make()
    assert made.total == 1
    assert all(torch.equal(state.rings[0].read(0), leaf) for state, leaf in zip(states, leaves, strict=True))


@pytest.mark.parametrize("look", [lambda ring: ring.read(0), lambda ring: ring.data[0], lambda ring: ring.value(0)])
def test_who_reads_a_slot_finds_what_was_written(store, look):
    leaf = torch.randn(2, 4)
    (state,) = written(store, [leaf])
    assert torch.equal(look(state.rings[0]), leaf)


def test_a_slot_written_anew_holds_what_was_written_last(store):
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    states = written(store, [first])
    written(store, [second], 0.0, states)
    store.writes.make()
    assert torch.equal(states[0].rings[0].read(0), second)
    states = written(store, [first])
    states[0].write([second], 0.0)  # at once
    assert torch.equal(states[0].rings[0].read(0), second)


def test_a_row_is_written_over_what_waited(store):
    whole, row = torch.randn(2, 4), torch.randn(1, 4)
    state = History(2, 2, store)
    written(store, [whole], states=[state])
    state.write([row], 0.0, rows=[1])
    assert torch.equal(state.rings[0].read(0), torch.cat([whole[:1], row]))


def test_a_ring_grows_with_what_waits_for_it(store):
    state, leaves = History(12, None, store), [torch.full((1, 2), float(i)) for i in range(12)]
    for i, leaf in enumerate(leaves):
        written(store, [leaf], float(i), [state])
    assert [state.rings[0].read(slot)[0, 0].item() for slot in state.shared.slots] == list(range(11, -1, -1))


def test_no_more_is_kept_alive_than_is_written_together(store, monkeypatch):
    limit(monkeypatch, 3 * 32)
    leaves = [torch.randn(2, 4) for _ in range(7)]
    with Operations() as made:
        written(store, leaves)
    assert made.counts[torch.ops.aten._foreach_copy_] == 2
    assert store.writes._bytes == 32
    part_of_much = torch.randn(100, 2, 4)[0]
    written(store, [part_of_much, torch.randn(2, 4)])
    assert store.writes._bytes == 32, "a view keeps all alive that it is a view of"


@pytest.mark.parametrize("makes", [lambda leaf: leaf.mul_(2), lambda leaf: leaf[0].zero_()])
def test_whoever_vouched_is_told_that_a_feature_was_written_into(store, makes):
    leaves, changes, others = [torch.randn(2, 4) for _ in range(2)], Changes(), Changes()
    written(store, leaves[:1], on_change=changes)
    written(store, leaves[1:], on_change=others)
    makes(leaves[0])
    store.writes.make()
    assert (changes.count, others.count) == (1, 0)


def test_where_nobody_would_notice_a_copy_is_made_at_once(store):
    with torch.inference_mode():
        leaf = torch.randn(2, 4)
        (state,) = written(store, [leaf])
        expected = leaf.clone()
        leaf.zero_()
        assert torch.equal(state.rings[0].read(0), expected)
    (state,) = written(store, [torch.randn(2, 4)])
    snapshot = state.rings[0].read(0)
    with store.writes.waiting(Changes()):
        state.write([snapshot], 1.0)
    assert torch.equal(state.rings[0]._data[1], snapshot), "what lies in the cache may be written anew at any time"
    leaf = torch.randn(2, 4)
    state.write([leaf], 2.0)
    assert torch.equal(state.rings[0]._data[0], leaf), "nobody vouched for it"


# -- runs --------------------------------------------------------------------------------------------------------------


ORDERS = [("taylorseer", {"interval": 4, "order": order}) for order in (0, 1, 2)]
OTHERS = [
    ("newton", {"interval": 4, "order": 2}),
    *[(name, ACTIVE[name]) for name in ("foca", "goc", "dmd", "speca", "bacache", "smoothcache", "lazydit", "icc")],
    ("toca", {**ACTIVE["toca"], "predictor": "taylor(order=1)"}),
    ("taylorseer", {**ACTIVE["taylorseer"], "cache_dtype": "bf16"}),
    ("taylorseer", {**ACTIVE["taylorseer"], "cache_dtype": "fp8"}),
]
BOTH = [torch.float32, torch.bfloat16]
RUNS = [(*one, dtype) for one in ORDERS for dtype in BOTH] + [(*one, torch.float32) for one in OTHERS]


@pytest.mark.parametrize(("name", "settings", "dtype"), RUNS)
def test_a_run_is_that_of_sites_one_by_one_bit_for_bit(name, settings, dtype, monkeypatch):
    limit(monkeypatch, 3 * 2 * 21 * 32 * 6)  # groups of a few
    outputs, strip, memory = run(name, dtype, **settings)
    assert set(strip) - {"F"}, "something was cached"
    one_by_one(monkeypatch)
    alone, *rest = run(name, dtype, **settings)
    assert rest == [strip, memory]
    assert all(torch.equal(x, y) for x, y in zip(outputs, alone, strict=True))


def operations(denoiser, inputs, name=None, **settings):
    """What every step of a run dispatches, and its strip."""

    def steps():
        found = []
        for t in timesteps(6):
            with Operations() as made:
                denoiser(**{**inputs, "timestep": torch.full((1,), t, dtype=inputs["hidden_states"].dtype)})
            found.append(made.total)
        return found

    with torch.no_grad():
        if name is None:
            return steps(), ""
        with c4d.accelerate(denoiser, name, **settings) as handle, handle.run(num_steps=6):
            return steps(), handle.trace.strip()


@pytest.mark.parametrize(("dtype", "ops"), [(torch.float32, 2), (torch.bfloat16, 22)])
@pytest.mark.parametrize("blocks", [(2, 3), (5, 9)])
def test_parts_are_predicted_and_kept_in_as_many_operations_however_many_there_are(blocks, dtype, ops):
    """In bfloat16: four operations, and room for each of the three shapes to add up in and for the results."""
    denoiser, inputs = small_denoisers.flux(*blocks).to(dtype), small_denoisers.flux_inputs()
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if k != "timestep"}
    plain, _ = operations(denoiser, inputs)
    reused, _ = operations(denoiser, inputs, "taylorseer", interval=3, order=0, warmup=2)
    forecast, strip = operations(denoiser, inputs, "taylorseer", interval=3, order=1, warmup=2)
    assert strip == "FFccFc"
    assert [forecast[i] - reused[i] for i in (2, 3, 5)] == [ops] * 3
    assert all(forecast[i] - plain[i] <= 10 for i in (1, 4)), "one copy, and the engine's own"


def test_what_is_made_ahead_is_gone_after_the_call_and_never_more_than_the_limit(monkeypatch):
    most, kept, count = [], [], 3 * 2 * 21 * 32 * 4
    limit(monkeypatch, count)
    take = Predictions.take

    def look(self, name):
        leaves = take(self, name)
        most.append(sum(leaf.nbytes for made in self._made.values() for leaf in made))
        kept.append(self)
        return leaves

    monkeypatch.setattr(Predictions, "take", look)
    run("taylorseer", interval=3, order=1)
    assert 0 < max(most) <= count
    assert not any(coming._made for coming in kept), "all of it was asked for"


@pytest.mark.parametrize("fail_at", [1, 4])
def test_nothing_waits_after_a_call_that_failed(fail_at):
    denoiser, inputs = network(torch.float32), flux_inputs()
    plain, _, _ = run("taylorseer", batch=1, interval=3, order=1)
    handle = c4d.accelerate(denoiser, "taylorseer", interval=3, order=1)
    writes, last = handle._engines[0].host.store.writes, denoiser.single_transformer_blocks[-1]

    def fail(module, args):
        raise RuntimeError("broken")

    with handle:
        with pytest.raises(RuntimeError, match="broken"), handle.run(num_steps=STEPS):
            flux_loop(denoiser, inputs, fail_at)
            hook = last.register_forward_pre_hook(fail)
            flux_loop(denoiser, inputs, 1)
        assert not writes._waiting
        hook.remove()
        with handle.run(num_steps=STEPS):
            again = flux_loop(denoiser, inputs, STEPS)
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


class Rude(Blocks):
    """Its blocks write into what their parts returned; from some step on, if not from the first."""

    class Block(Blocks.Block):
        is_rude = True

        def forward(self, x, gate):
            change = self.ff(self.norm(x))
            return x + (change.mul_(gate) if self.is_rude else gate * change)


@pytest.mark.parametrize("since", [0, 3])
def test_a_host_that_writes_into_features_is_served_as_if_it_did_not(since):
    """If it is first seen to do so in mid-run, what was to be kept of that step is lost, and the next one is full."""
    torch.manual_seed(0)
    tokens = 5 + since  # so that what was observed of the other one is not taken for this one's
    denoiser, x, context = Rude(), torch.randn(2, tokens, 4), torch.zeros(2, 1, 8)
    outputs = []
    composition = c4d.Composition(c4d.sites.Parts(), c4d.gates.FixedInterval(3), Taylor(1))
    with torch.no_grad(), c4d.accelerate(denoiser, composition) as handle, handle.run(num_steps=9):
        for step in range(9):
            Rude.Block.is_rude = step >= since
            outputs.append(denoiser(x, torch.full((2,), 0.25 + step / 1000), context))
    strip = handle.trace.strip()
    assert strip == ("FccFccFcc" if since == 0 else "FccFFcFcc")
    assert any("written into" in note for note in handle.trace.notes) == (since > 0)
    for step, output in enumerate(outputs):
        with torch.no_grad():
            plain = denoiser(x, torch.full((2,), 0.25 + step / 1000), context)
        # All that changes is the gate, which is not cached, and the input of all blocks but the first, by little.
        torch.testing.assert_close(output, plain, rtol=1e-3, atol=1e-3)
