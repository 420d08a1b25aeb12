"""What a handle reports about its newest run."""

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.cost import CountError, flops_by_module, outermost, step_cost, summarise
from cache4diffusion.engine.leaves import specs_of
from cache4diffusion.flops import FlopCounter
from cache4diffusion.trace import Record, Timer
from cache4diffusion.zoo import tiny
from toys import branch_loop, dit, dit_loop, flux, flux_inputs, flux_loop, flux_pipeline, generate


def counted(denoiser, run):
    with torch.no_grad(), FlopCounter(denoiser) as counter:
        run()
    return counter.module_total


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fora", {"interval": 3}),
        ("taylorseer", {"interval": 4}),
        ("taylorseer-lite", {"interval": 4}),
        ("fbcache", {"threshold": 0.5}),
        ("dbcache", {"threshold": 0.5, "front": 1, "back": 1, "warmup": 2}),
        ("teacache", {"threshold": 0.3}),
        ("speca", {"threshold": 5.0}),
    ],
)
def test_flops_from_the_strip_are_those_counted_while_running(name, settings):
    denoiser = flux()
    with c4d.accelerate(denoiser, name, **settings) as handle:
        with handle.run(num_steps=10):
            flux_loop(denoiser, flux_inputs(batch=2))  # attach
        with handle.run(num_steps=10):
            real = counted(denoiser, lambda: flux_loop(denoiser, flux_inputs(batch=2)))
        found = summarise(handle)
    few = 0.03 if name == "teacache" else 0.01  # the modulation its signal needs is not in the estimate
    assert found.run_flops == pytest.approx(real, rel=few)
    assert found.predicted == pytest.approx(10 * found.full_flops / real, rel=few)
    assert 0 < found.full_steps < 10


def test_a_batched_cfg_branch_that_is_skipped_costs_nothing():
    denoiser = dit()
    with c4d.accelerate(denoiser, "fastercache", attention_interval=1, interval=3, warmup=2) as handle:
        with handle.run(num_steps=10):
            dit_loop(denoiser)
        with handle.run(num_steps=10):
            real = counted(denoiser, lambda: dit_loop(denoiser))
        found = summarise(handle)
    assert found.run_flops == pytest.approx(real, rel=0.01)
    assert set(found.strip) == {"F", "h"}
    assert found.full_steps == found.strip.count("F") + 0.5 * found.strip.count("h")


def test_counting_computes_nothing_and_leaves_no_trace():
    denoiser = flux()
    before = {name: id(module.__dict__.get("forward")) for name, module in denoiser.named_modules()}
    specs = specs_of((), {**flux_inputs(), "timestep": torch.ones(1)})
    table = flops_by_module(denoiser, *specs)
    assert flops_by_module(denoiser, *specs) is table  # counted once per shape
    assert table[""] == counted(denoiser, lambda: denoiser(**flux_inputs(), timestep=torch.ones(1)))
    assert table["transformer_blocks.0"] == table["transformer_blocks.1"] > table["transformer_blocks.0.attn"] > 0
    assert {name: id(module.__dict__.get("forward")) for name, module in denoiser.named_modules()} == before
    assert (
        flops_by_module(denoiser, *specs_of((), {**flux_inputs(batch=2), "timestep": torch.ones(2)}))[""]
        == 2 * table[""]
    )


def test_a_denoiser_that_reads_values_says_why_flops_are_missing():
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

        def forward(self, x, timestep):
            return self.lin(x) * float(timestep)

    denoiser = Reads()
    with torch.no_grad(), c4d.accelerate(denoiser, "taylorseer-lite", interval=2, warmup=1) as handle:
        with handle.run(num_steps=4):
            for t in (4.0, 3.0, 2.0, 1.0):
                denoiser(torch.ones(1, 4), torch.tensor(t))
        with pytest.raises(CountError, match=r"DataDependent|data"):
            step_cost(handle._engines[0])
        text = handle.report()
    assert "FLOPs of denoiser could not be counted" in text
    assert "achieved in time" in text


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own
@pytest.mark.parametrize("name", ["MochiTransformer3DModel", "HunyuanImageTransformer2DModel"])
def test_a_denoiser_that_asks_where_masks_are_true_is_counted_as_if_they_were_so_everywhere(name):
    denoiser, _, inputs = tiny(name).make(2)
    masks = {key: torch.ones_like(value) for key, value in inputs.items() if "mask" in key}
    assert masks
    table = flops_by_module(denoiser, *specs_of((), inputs))
    with torch.no_grad():
        assert table[""] == counted(denoiser, lambda: denoiser(**inputs | masks))
    block = next(path for path in table if path.endswith("blocks.0"))
    assert 0 < table[block] < table[""]


def test_times_on_an_accelerator_are_read_when_they_are_there_and_never_waited_for():
    now = 0.0

    class Event:
        def __init__(self, at):
            self.at = at

        def query(self):
            return self.at <= now

        def synchronize(self):
            nonlocal now
            now = max(now, self.at)

        def elapsed_time(self, end):
            assert end.query()
            return end.at - self.at

    timer = Timer()
    records = [Record("denoiser", 0, step, "cond", "F", "") for step in range(4)]
    for step, record in enumerate(records):  # the device is two steps behind
        now = 10.0 * (step - 2)
        timer.add(record, Event(10.0 * step), Event(10.0 * step + 9))
    assert [record.wall_ms for record in records] == [9.0, None, None, None]
    timer.settle()
    assert [record.wall_ms for record in records] == [9.0] * 4
    assert not timer._pending


def test_the_report_has_every_fact():
    pipe = flux_pipeline()
    with c4d.accelerate(pipe, "taylorseer", interval=4) as handle:
        assert "no run yet" in handle.report()
        generate(pipe, 10)
        text = handle.report()
        for line in (
            "strip     FFFcccFccc",
            "steps     4 of 10 full (40%)",
            "time ",
            "FLOPs ",
            "cache ",
            "speed-up ",
            "syncs ",
        ):
            assert line in text
        assert "taylorseer(interval=4" in text
        assert "on FluxTransformer2DModel" in text
        assert "announced by the pipeline" in text
        assert "expected from FLOPs" in text
        assert "warning" not in text
        assert handle.stats["full_steps"] == 4


def test_a_run_in_a_bare_loop_is_said_to_be_inferred():
    denoiser = flux()
    with c4d.accelerate(denoiser, "fora", interval=2) as handle:
        flux_loop(denoiser, flux_inputs(), 4)
        assert "run inferred from timesteps" in handle.report()


def test_nothing_cached_is_a_warning_that_says_why():
    denoiser = flux()
    with c4d.accelerate(denoiser, "fbcache", threshold=0.0) as handle:
        flux_loop(denoiser, flux_inputs(), 4)
        text = handle.report()
    assert "0 of 4 steps were cached" in text
    assert "off settings" in text


def test_paths_inside_others_are_not_subtracted_twice():
    assert outermost(["a.b", "a", "a.b.c", "ab", "b.a"]) == ["a", "ab", "b.a"]
    assert outermost(["a", ""]) == [""]


def test_sequential_branches_share_one_strip():
    denoiser = flux()
    branches = [flux_inputs(seed=1), flux_inputs(seed=2)]
    branches[1]["hidden_states"] = branches[0]["hidden_states"]
    with c4d.accelerate(denoiser, "fastercache", attention_interval=1, interval=3, warmup=2) as handle:
        with handle.run(num_steps=10):
            branch_loop(denoiser, branches)
        stats = handle.stats
        assert set(stats["strip"]) == {"F", "h"}  # the first branch is never skipped
        assert sorted(map(set, stats["strips"].values()), key=len) == [{"F"}, {"F", "c"}]
        assert "warning" not in handle.report()
