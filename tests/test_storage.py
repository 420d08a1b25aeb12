"""Snapshots in another dtype and on another device: what they are worth, and what they take."""

import pytest
import torch

import cache4diffusion as c4d
import toys
from cache4diffusion.accelerate import choose
from cache4diffusion.copies import CopyEngine, StreamCopyEngine
from cache4diffusion.errors import SettingError
from cache4diffusion.memory import footprint
from cache4diffusion.predictors import PREDICTORS, History, LinearPredictor, Newton, Reuse, weighted_sum
from cache4diffusion.storage import FP8, Ring, Storage, Store
from cache4diffusion.units import size_of, size_text
from copying import Deferred, Pretended, accelerate
from toys import ACTIVE, distinct_methods, flux, flux_inputs, flux_loop

STEPS = 14
needs_fp8 = pytest.mark.skipif(FP8 is None, reason="this torch has no float8")
NARROW = ["bf16", "fp16", "int8", pytest.param("fp8", marks=needs_fp8)]
# One for each kind of site and of predictor.
some_methods = pytest.mark.parametrize(
    "name", ["taylorseer", "toca", "fbcache", "dicache", "freqca", "dmd", "taylorseer-lite", "delta-dit"]
)
LINEAR = [name for name, cls in PREDICTORS.items() if issubclass(cls, LinearPredictor)]


def history(store, leaves_at, capacity=3, rows=None):
    kept = History(capacity, rows, store)
    for time, leaf in leaves_at:
        kept.write([leaf], time)
    return kept


def rounded(leaf, dtype):
    """A slow reference of what is kept: every row of a snapshot by itself, in int8 every channel of it."""
    if dtype in ("bf16", "fp16"):
        return leaf.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).float()
    if dtype == "int8":
        back = leaf.float()
        for row in range(leaf.shape[0]):
            for channel in range(leaf.shape[-1]):
                numbers = back[row, :, channel]
                scale = numbers.abs().max() / 127
                back[row, :, channel] = (numbers / scale).round() * scale
        return back
    rows = []
    for row in leaf.float():
        scale = row.abs().max() / 448 if row.any() else torch.tensor(1.0)
        rows.append((row / scale).to(FP8).float() * scale)
    return torch.stack(rows)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("feature", [torch.float32, torch.bfloat16])
def test_a_prediction_is_the_sum_of_what_was_kept_accumulated_in_float32(dtype, feature):
    leaves = [torch.randn(2, 5, 4).to(feature) * (i + 1) for i in range(3)]
    predictor, state = Newton(order=2), history(Store(Storage.of(dtype)), [(float(i), x) for i, x in enumerate(leaves)])
    (predicted,) = predictor.predict(state, 4.0)
    weights = predictor.weights([2.0, 1.0, 0.0], 4.0)
    expected = weighted_sum([rounded(leaf, dtype) for leaf in leaves[::-1]], weights).to(feature)
    assert predicted.dtype == feature
    torch.testing.assert_close(predicted, expected, rtol=1e-6, atol=1e-6)


@needs_fp8
def test_a_number_in_float8_is_off_by_a_sixteenth_at_most_and_rows_do_not_touch_each_other():
    leaf = torch.randn(2, 64).sign() * torch.logspace(0, -1.5, 64)
    leaf[1] *= 1e4
    kept, alone = (history(Store(Storage.of("fp8")), [(0.0, x)], 1) for x in (leaf, leaf[:1]))
    back = kept.rings[0].value(0)
    assert ((back - leaf).abs() <= leaf.abs() / 16 + 1e-6).all()
    assert torch.equal(back[:1], alone.rings[0].value(0))


@needs_fp8
def test_float8_keeps_zeros_and_shows_what_is_not_finite():
    leaf = torch.zeros(3, 4)
    leaf[1, 2] = float("nan")
    back = history(Store(Storage.of("fp8")), [(0.0, leaf)], 1).rings[0].value(0)
    assert torch.equal(back[0], leaf[0]) and torch.equal(back[2], leaf[2])
    assert not torch.isfinite(back[1]).all()


@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 5, 4, 4), (2, 5, 3, 4, 4), (4, 7), (3,)])
@pytest.mark.parametrize("feature", [torch.float32, torch.float64, torch.bfloat16])
def test_a_number_in_int8_is_off_by_half_a_scale_at_most_and_scales_are_those_of_rows_and_channels(shape, feature):
    g = torch.Generator().manual_seed(0)
    leaf = (torch.randn(shape, generator=g) * 10.0 ** torch.randint(-3, 4, shape, generator=g)).to(feature)
    ring = history(Store(Storage.of("int8")), [(0.0, leaf)], 1).rings[0]
    channel = {2: None, 1: None, 3: 2}.get(leaf.ndim, 1)
    dims = tuple(axis for axis in range(1, leaf.ndim) if axis != channel)
    largest = leaf.float().abs().amax(dims, keepdim=True) if dims else leaf.float().abs()
    assert torch.equal(ring.scales[0].flatten(), (largest / 127).flatten())
    assert ((ring.read(0) - leaf.float()).abs() <= largest / 254 * (1 + 1e-5)).all()
    assert (ring.data.dtype, ring.value(0).dtype) == (torch.int8, feature)
    assert [tensor.nbytes for tensor in ring.tensors()] == [leaf.numel(), 4 * largest.numel()]


def test_int8_keeps_zeros_and_what_is_almost_nothing_as_zeros_and_shows_what_is_not_finite():
    leaf = torch.ones(5, 3, 2)
    leaf[0, :, 0], leaf[1, :, 0] = 0.0, 1e-44  # smaller than any scale
    leaf[2, 1, 0], leaf[3, 1, 0] = float("nan"), float("-inf")
    back = history(Store(Storage.of("int8")), [(0.0, leaf)], 1).rings[0].value(0)
    assert torch.equal(back[:2, :, 0], torch.zeros(2, 3))
    assert back[2:4, :, 0].isnan().all(), "all that has one scale with it"
    torch.testing.assert_close(back[..., 1], torch.ones(5, 3))
    torch.testing.assert_close(back[4], torch.ones(3, 2))


def test_a_nan_that_was_kept_in_int8_is_noticed_and_the_step_computed_anew():
    denoiser = flux()
    handle = c4d.accelerate(denoiser, "fora", interval=3, cache_dtype="int8", nan_guard="now")
    with handle, handle.run(num_steps=4), torch.no_grad():
        call = {**flux_inputs(), "timestep": torch.full((1,), 0.5)}
        (plain,) = denoiser(**call, return_dict=False)
        (state,) = handle._engines[0]._states.values()
        next(iter(state.sites.values())).rings[0].scales.fill_(float("nan"))
        assert torch.equal(denoiser(**call, return_dict=False)[0], plain)
        assert denoiser(**call, return_dict=False)[0].isfinite().all()
        assert handle.trace.strip() == "FFc"
        assert any("not finite" in note for note in handle.trace.notes)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", LINEAR)
def test_rows_written_one_by_one_are_kept_as_if_they_were_alone(name, dtype):
    predictor, store = PREDICTORS[name](), Store(Storage.of(dtype))
    together, alone = predictor.init(2, STEPS, store), predictor.init(1, STEPS, store)
    for i in range(6):
        leaf = (
            torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) * torch.tensor([1.0, 300.0])[:, None, None]
        )
        predictor.update(alone, [leaf[:1]], float(i))
        for rows in ([0], [1]) if i != 3 else ([0],):
            predictor.update(together, [leaf[rows]], float(i), rows)
    (whole,), (single,) = predictor.predict(together, 7.0), predictor.predict(alone, 7.0)
    torch.testing.assert_close(whole[:1], single, rtol=1e-5, atol=1e-5)


def test_whole_numbers_and_flags_are_kept_as_they_are():
    for leaf in (torch.arange(6).view(2, 3), torch.tensor([True, False])):
        kept = history(Store(Storage.of("bf16")), [(0.0, leaf)], 1)
        assert kept.buffers[0].dtype == leaf.dtype
        assert torch.equal(Reuse().predict(kept, 1.0)[0], leaf)


def test_slots_lie_in_memory_like_the_feature():
    leaf = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for store in (Store(), Store(Storage.of("bf16")), Pretended(), Pretended("bf16")):
        kept = history(store, [(0.0, leaf)], 2)
        assert kept.rings[0].value(0).is_contiguous(memory_format=torch.channels_last)


# -- another device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *NARROW])
@pytest.mark.parametrize("name", LINEAR)
def test_what_was_offloaded_comes_back_unchanged(name, dtype):
    predictor = PREDICTORS[name]()
    here, away = (predictor.init(2, STEPS, s) for s in (Store(Storage.of(dtype)), Pretended(dtype)))
    for i in range(12):
        leaf = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i))
        given = leaf.clone()
        for state in (here, away):
            if i % 3 == 0:
                predictor.update(state, [given], float(i))
        given.fill_(float("nan"))  # hosts write into what they were given, before a copy of it was made
        if i % 3:
            predictor.prefetch(away, float(i))
            a, b = (predictor.predict(state, float(i)) for state in (here, away))
            assert torch.equal(a[0], b[0])
            for state, value in ((here, a), (away, b)):
                predictor.commit(state, value, float(i))


def test_a_slot_written_anew_is_brought_anew():
    state = history(Pretended(), [(0.0, torch.zeros(1, 2))], 1)
    state.prefetch([0])
    state.write([torch.ones(1, 2)], 1.0)
    assert torch.equal(Reuse().predict(state, 2.0)[0], torch.ones(1, 2))


def test_a_ring_that_grows_waits_for_what_is_on_its_way_into_it():
    leaves = [torch.full((1, 2), float(i)) for i in range(12)]
    state = history(Pretended(), [(float(i), x) for i, x in enumerate(leaves)], 12)
    assert [state.rings[0].value(slot)[0, 0].item() for slot in state.shared.slots] == list(range(11, -1, -1))


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append("event")
        return "event"

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")

    def __enter__(self):
        self.log.append(f"in {self.name}")

    def __exit__(self, *error):
        self.log.append(f"out of {self.name}")


class FakeStreams:
    """As much of ``torch.cuda`` or ``torch.xpu`` as the copies use; events take 2 ms."""

    def __init__(self):
        self.log = []
        self.main, self.side = FakeStream(self.log, "main"), FakeStream(self.log, "side")

    def Stream(self, device):
        return self.side

    def current_stream(self, device):
        return self.main

    def stream(self, stream):
        return stream

    class Event:
        is_over = False

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream.name == "side"

        def query(self):
            return self.is_over

        def synchronize(self):
            self.is_over = True

        def elapsed_time(self, end):
            assert end.is_over
            return 2.0


class Streams(StreamCopyEngine):
    def hold(self, tensor, stream):
        self._streams.log.append(f"{stream.name} holds {tensor.tolist()}")

    def room(self, shape, dtype, device):
        return torch.empty(shape, dtype=dtype, device=device)


def test_streams_wait_for_what_they_need_and_for_nothing_else():
    streams = FakeStreams()
    copies, host = Streams(torch.device("cpu"), streams), torch.zeros(2)
    copies.offload(torch.ones(2), host)
    coming = copies.prefetch(host)
    assert streams.log == [
        "side waits for main",  # which makes the source
        "in side",
        "out of side",
        "side holds [1.0, 1.0]",  # the source must live until the copy was made
        "in side",  # behind the first copy, and no wait for the computation
        "out of side",
        "event",
    ]
    streams.log.clear()
    assert copies.fetch(coming).tolist() == [1.0, 1.0]
    assert streams.log == ["main waits for event", "main holds [1.0, 1.0]"]
    copies.finish()
    assert streams.log[-1] == "host waits for side"
    assert (copies.bytes, copies.ms) == (16, 4.0)
    copies.start_over()
    assert (copies.bytes, copies.ms) == (0, 0.0)


# -- methods -----------------------------------------------------------------------------------------------------------


def run(handle, denoiser, inputs):
    with handle, handle.run(num_steps=STEPS):
        outputs = flux_loop(denoiser, inputs, STEPS)
    return outputs, handle.trace.strip()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@distinct_methods
@pytest.mark.filterwarnings("ignore:0 of 14 steps were cached by fastercache")  # it needs two branches
def test_offloaded_runs_are_equal_to_runs_on_one_device(name):
    inputs, store = flux_inputs(batch=2), Pretended()
    denoiser = flux()
    handle = c4d.accelerate(denoiser, name, **ACTIVE[name])
    plain, strip = run(handle, denoiser, inputs)
    denoiser = flux()
    away = accelerate(denoiser, name, store, **ACTIVE[name])
    assert equal(run(away, denoiser, inputs)[0], plain)
    assert away.trace.strip() == strip
    if name not in ("fastcache", "fastercache"):  # one keeps no snapshot, the other needs two branches
        copies = store.engines[0]
        assert any(kind == "fetch" for kind, _ in copies.log), "the cache was used"


@pytest.mark.parametrize("name", ["taylorseer", "taylorseer-lite", "fbcache", "toca"])
def test_snapshots_are_on_their_way_before_they_are_needed(name, monkeypatch):
    read, was_coming = Ring.read, []

    def look(ring, slot):
        was_coming.append(slot in ring._coming)
        return read(ring, slot)

    monkeypatch.setattr(Ring, "read", look)
    denoiser = flux()
    run(accelerate(denoiser, name, Pretended(), **ACTIVE[name]), denoiser, flux_inputs())
    assert was_coming and all(was_coming)


def test_only_what_one_site_needs_is_on_its_way_at_a_time():
    denoiser, store = flux(), Pretended()
    with accelerate(denoiser, "taylorseer", store, interval=4, order=1) as handle, handle.run(num_steps=STEPS):
        flux_loop(denoiser, flux_inputs(), STEPS)
        sites = handle._engines[0]._states
        (state,) = sites.values()
        largest = max(sum(ring.data[0].nbytes * 2 for ring in site.rings) for site in state.sites.values())
        assert 0 < handle._engines[0].ledger.most_on["accelerator"] <= largest
        assert handle._engines[0].ledger.most_on["cpu"] == sum(
            buffer.nbytes for site in state.sites.values() for buffer in site.buffers
        )


@some_methods
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_in_half_the_bytes_outputs_keep_their_dtype_and_full_steps_their_values(name, dtype):
    inputs = flux_inputs(batch=2)
    denoiser = flux()
    plain = c4d.accelerate(denoiser, name, **ACTIVE[name])
    expected, _ = run(plain, denoiser, inputs)
    denoiser = flux()
    handle = c4d.accelerate(denoiser, name, **ACTIVE[name], cache_dtype=dtype)
    outputs, letters = run(handle, denoiser, inputs)
    first = next((i for i, letter in enumerate(letters) if letter != "F"), STEPS)
    assert equal(outputs[:first], expected[:first])
    assert all(x.dtype == y.dtype for x, y in zip(outputs, expected, strict=True))
    assert torch.isfinite(outputs[-1]).all()
    assert (outputs[first % STEPS] - expected[first % STEPS]).norm() <= 0.1 * expected[first % STEPS].norm()
    assert handle.memory["peak"] < plain.memory["peak"]


@distinct_methods
def test_off_is_off_whatever_the_cache_is_kept_in(name):
    plain = flux_loop(flux(), flux_inputs(), STEPS)
    denoiser = flux()
    handle = c4d.accelerate(denoiser, name, **toys.off(name), cache_dtype="bf16")
    assert equal(run(handle, denoiser, flux_inputs())[0], plain)


def test_the_feature_s_own_dtype_and_device_change_nothing():
    denoiser = flux()
    plain, _ = run(c4d.accelerate(denoiser, "taylorseer", interval=3), denoiser, flux_inputs())
    denoiser = flux()
    handle = c4d.accelerate(denoiser, "taylorseer", interval=3, cache_dtype=torch.float32, cache_device="cpu")
    assert equal(run(handle, denoiser, flux_inputs())[0], plain)
    assert handle._engines[0].host.store.engines == [], "nothing is copied to where it is already"


def test_token_rules_write_into_what_is_kept_elsewhere():
    settings = {**ACTIVE["toca"], "recompute_ratio": 0.5}
    denoiser = flux()
    plain, _ = run(c4d.accelerate(denoiser, "toca", **settings), denoiser, flux_inputs(batch=2))
    denoiser = flux()
    away, _ = run(accelerate(denoiser, "toca", Pretended(), **settings), denoiser, flux_inputs(batch=2))
    assert equal(away, plain)
    denoiser = flux()
    wide = c4d.accelerate(denoiser, "toca", **settings, cache_dtype="fp16")
    narrow, _ = run(wide, denoiser, flux_inputs(batch=2))
    assert (narrow[-1] - plain[-1]).norm() <= 0.01 * plain[-1].norm(), "tokens computed at one step serve the next"


# -- the ledger, and what was said before ------------------------------------------------------------------------------


@some_methods
@pytest.mark.parametrize("dtype", NARROW[1:])
def test_the_ledger_holds_what_was_predicted(name, dtype):
    call = {**flux_inputs(batch=2), "timestep": torch.full((2,), 0.5)}
    predicted = c4d.cache_bytes(flux(), name, inputs=call, steps=STEPS, cache_dtype=dtype, **ACTIVE[name])
    denoiser = flux()
    handle = c4d.accelerate(denoiser, name, cache_dtype=dtype, **ACTIVE[name])
    run(handle, denoiser, flux_inputs(batch=2))
    assert predicted == handle.memory["peak"] == sum(handle.memory_by_place.values())


@pytest.mark.parametrize("name", ["taylorseer", "toca", "fbcache", "dbcache", "taylorseer-lite"])
def test_offloaded_bytes_are_predicted_by_device(name):
    call = {**flux_inputs(batch=2), "timestep": torch.full((2,), 0.5)}
    denoiser = flux()
    choice = choose(denoiser, {"denoiser": denoiser}, name, {**ACTIVE[name], "cache_device": "cpu"})
    found = footprint(denoiser, choice, inputs=call, steps=STEPS, pretends=True)
    handle = accelerate(denoiser, name, Pretended(copies=CopyEngine), **ACTIVE[name])
    run(handle, denoiser, flux_inputs(batch=2))
    assert {" ".join(place): count for place, count in found.places.items()} == handle.memory_by_place
    assert found.away == "cpu" and 0 < found.here < found.total


def test_the_report_says_what_is_kept_where_and_what_copies_cost():
    denoiser = flux()
    handle = accelerate(denoiser, "taylorseer", Pretended("bf16", CopyEngine), interval=3)
    run(handle, denoiser, flux_inputs())
    report = handle.report()
    assert "cache_dtype='bfloat16', cache_device='cpu'" in handle.label
    assert "cpu as bfloat16" in report and "to and from cpu in this run" in report


def test_copies_that_take_longer_than_computing_are_warned_of():
    denoiser, store = flux(), Pretended(copies=CopyEngine)
    handle = accelerate(denoiser, "taylorseer", store, interval=3)
    run(handle, denoiser, flux_inputs())
    store.engines[0]._ms = 0.0
    assert "the same method is faster" not in handle.report()
    store.engines[0]._ms = 1e9
    assert handle.report().count("without cache_device") == 1


# -- options -----------------------------------------------------------------------------------------------------------


def test_wrong_options_are_refused_in_words():
    for options, words in (
        ({"cache_dtype": "bf61"}, "did you mean 'bf16'"),
        ({"cache_dtype": torch.int16}, "use one of fp32"),
        ({"cache_device": "gpu7"}, "cannot be used"),
        ({"cache_device": "meta"}, "holds no data"),
        ({"memory_budget": "plenty"}, "give bytes"),
        ({"memory_budget": 0}, "above 0"),
        ({"allow_downgrade": True}, "needs a memory_budget"),
        ({"strict": "yes"}, "True or False"),
    ):
        with pytest.raises(SettingError, match=words):
            c4d.accelerate(flux(), "fora", **options)


def test_a_profile_has_the_options_too(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("method: taylorseer\nsettings: {order: 1}\ncache_dtype: bf16\nmemory_budget: 1GiB\n")
    with c4d.accelerate(flux(), str(path)) as handle:
        assert handle.options.storage.dtype == torch.bfloat16
        assert handle.options.memory_budget == 1 << 30
    with c4d.accelerate(flux(), str(path), cache_dtype="fp16") as handle:
        assert handle.options.storage.dtype == torch.float16


def test_sizes_are_read_and_written_in_one_way():
    for count, text in ((0, "0 B"), (17, "17 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")):
        assert size_text(count) == text
        if count:
            assert size_of(text, "x") == count
    assert size_of("2 GB", "x") == 2 * 10**9
    assert size_of(123, "x") == 123
    with pytest.raises(SettingError, match="x=True"):
        size_of(True, "x")


def test_the_spy_would_notice_a_snapshot_that_is_read_too_early():
    copies = Deferred(torch.device("cpu"))
    coming = copies.prefetch(torch.ones(2))
    assert coming.tensor.isnan().all()
    assert torch.equal(copies.fetch(coming), torch.ones(2))
