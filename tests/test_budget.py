"""A budget for the cache: refused before anything is stored, with what fits, or gone on with in something smaller."""

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion import budget
from cache4diffusion.accelerate import choose
from cache4diffusion.budget import alternatives, differs, lighter
from cache4diffusion.compare import variants_of
from cache4diffusion.engine.admission import Admission
from cache4diffusion.errors import MemoryBudgetError, SettingError
from cache4diffusion.measure.bench import _rename
from cache4diffusion.measure.entry import Entry
from cache4diffusion.run import Call
from cache4diffusion.run.path import Run
from cache4diffusion.storage import FP8
from cache4diffusion.units import size_text
from toys import Dicts, Experts, branch_loop, flux, flux_inputs, flux_loop, flux_pipeline, generate, prompt

STEPS = 12
TAYLOR = {"interval": 3, "order": 2}


@pytest.fixture(autouse=True)
def no_others(monkeypatch):
    """Every other method that is weighed takes its time; the tests that are about them name some."""
    monkeypatch.setattr(budget, "_OTHERS", ())


def one_call(batch=1):
    return {**flux_inputs(batch), "timestep": torch.full((batch,), 0.5)}


def held(order=2, batch=1, **options):
    settings = {**TAYLOR, "order": order}
    return c4d.cache_bytes(flux(), "taylorseer-lite", inputs=one_call(batch), steps=STEPS, **settings, **options)


# -- where the shapes are known ----------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_a_table_of_what_does(monkeypatch):
    monkeypatch.setattr(budget, "_OTHERS", ("fora", "deepcache"))
    denoiser = flux()
    before, call = Dicts(denoiser), one_call()
    limit = c4d.cache_bytes(flux(), "taylorseer", inputs=call, steps=STEPS, interval=3, order=1)
    with pytest.raises(MemoryBudgetError) as error:
        c4d.accelerate(denoiser, "taylorseer", **TAYLOR, memory_budget=limit, inputs=call)
    first, *rows, last = str(error.value).splitlines()
    assert "taylorseer(interval=3, order=2" in first and first.endswith("These fit:")
    names = [row.split()[0] for row in rows]
    assert names[:3] == ["taylorseer(order=1)", "taylorseer(order=0)", "taylorseer(cache_dtype='bfloat16')"]
    assert names[-1] == "fora", "deepcache is for U-Nets"
    assert size_text(limit) in rows[0] and size_text(limit // 2) in rows[1]
    assert "allow_downgrade=True" in last
    assert not before.changed(), "nothing is left attached"


def test_a_downgrade_takes_the_first_that_fits_and_says_so():
    denoiser = flux()
    limit = held(order=1)
    with c4d.accelerate(
        denoiser, "taylorseer-lite", **TAYLOR, memory_budget=limit, allow_downgrade=True, inputs=one_call()
    ) as handle:
        with handle.run(num_steps=STEPS):
            flux_loop(denoiser, flux_inputs(), STEPS)
        assert handle.method.order == 1
        assert "order=1" in handle.label and "order=1" in handle.report().splitlines()[0]
        assert any("order=2" in note and "order=1" in note for note in handle.trace.notes)
        assert handle.memory["peak"] == limit


def test_where_no_lower_order_fits_a_smaller_dtype_or_another_method_does(monkeypatch):
    monkeypatch.setattr(budget, "_OTHERS", ("skip-dit", "easycache"))
    smallest = held(order=0)
    half = c4d.cache_bytes(flux(), "fora", inputs=one_call(), steps=STEPS, cache_dtype="bf16")
    for name, limit, wanted in (("taylorseer-lite", smallest - 1, "cache_dtype="), ("fora", half // 2, "skip-dit")):
        with c4d.accelerate(flux(), name, memory_budget=limit, allow_downgrade=True, inputs=one_call()) as handle:
            assert wanted in handle.label


def test_where_nothing_fits_the_least_is_named():
    with pytest.raises(MemoryBudgetError, match=r"Nothing known fits; the least is \d"):
        c4d.accelerate(flux(), "taylorseer-lite", **TAYLOR, memory_budget=16, inputs=one_call())
    with pytest.raises(MemoryBudgetError, match="Nothing known fits"):
        c4d.accelerate(flux(), "taylorseer-lite", **TAYLOR, memory_budget=16, allow_downgrade=True, inputs=one_call())


def test_a_pipeline_s_call_tells_the_shapes():
    pipe = flux_pipeline()
    call = {**prompt(), "height": 16, "width": 16, "num_inference_steps": STEPS}
    with pytest.raises(MemoryBudgetError, match="Nothing known fits"):
        c4d.accelerate(pipe, "taylorseer-lite", **TAYLOR, memory_budget=100, call=call)
    with c4d.accelerate(pipe, "taylorseer-lite", **TAYLOR, memory_budget="1GiB", call=call) as handle:
        assert "order=2" in handle.label


def test_shapes_without_a_budget_are_refused():
    with pytest.raises(SettingError, match="give one, or neither"):
        c4d.accelerate(flux(), "fora", inputs=one_call())


# -- where they show in the first step ---------------------------------------------------------------------------------


def test_nothing_is_stored_in_the_step_that_is_weighed_and_nothing_is_left_attached():
    denoiser = flux()
    before, plain = Dicts(denoiser), flux_loop(flux(), flux_inputs(), 2)
    handle = c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=held(order=2) - 1)
    outputs = []
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
    with pytest.raises(MemoryBudgetError, match="order=1"), handle.run(num_steps=STEPS):
        flux_loop(denoiser, flux_inputs(), STEPS)
    assert torch.equal(outputs[0], plain[0]), "the step was computed plainly"
    assert handle.memory == {"held": 0, "peak": 0}
    denoiser._forward_hooks.clear()
    assert not before.changed()
    assert torch.equal(flux_loop(denoiser, flux_inputs(), 2)[1], plain[1])


def test_what_fits_goes_on_after_the_step_that_was_weighed():
    denoiser, limit = flux(), held(order=2)
    with c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=limit) as handle:
        for number in range(2):
            with handle.run(num_steps=STEPS):
                flux_loop(denoiser, flux_inputs(), STEPS)
            reasons = [record.reason for record in handle.trace.of()]
            assert ("weighed" in reasons[0]) == (number == 0), "shapes that are known are not weighed again"
            assert "c" in handle.trace.strip()
        assert handle.memory["peak"] == limit
        with pytest.raises(MemoryBudgetError), handle.run(num_steps=STEPS):
            flux_loop(denoiser, flux_inputs(batch=2), STEPS)


def test_a_downgrade_in_the_first_run_goes_on_in_it():
    denoiser, limit = flux(), held(order=1)
    with c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=limit, allow_downgrade=True) as handle:
        with handle.run(num_steps=STEPS):
            flux_loop(denoiser, flux_inputs(), STEPS)
        assert handle.method.order == 1 and "c" in handle.trace.strip()
        assert handle.memory["peak"] == limit
        assert any("order=2" in note for note in handle.trace.notes)


@pytest.mark.slow
def test_branches_called_one_by_one_are_weighed_together():
    branches = [flux_inputs(), {**flux_inputs(), "encoder_hidden_states": torch.randn(1, 5, 24)}]
    both = 2 * held()
    denoiser = flux()
    with c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=both) as handle:
        with handle.run(num_steps=STEPS):
            branch_loop(denoiser, branches, STEPS)
        assert handle.memory["peak"] == both
    with (
        c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=both - 1) as handle,
        pytest.raises(MemoryBudgetError),
        handle.run(num_steps=STEPS),
    ):
        branch_loop(denoiser, branches, STEPS)


@pytest.mark.filterwarnings("ignore:0 of 12 steps were cached by easycache")  # its warm-up is as long
def test_another_method_takes_over_from_one_that_acts_on_the_trajectory(monkeypatch):
    monkeypatch.setattr(budget, "_OTHERS", ("easycache",))
    monkeypatch.setattr(budget, "_DTYPES", (torch.bfloat16,))
    pipe = flux_pipeline()
    plain = generate(flux_pipeline(), STEPS)
    limit = c4d.cache_bytes(pipe, "easycache", call={**prompt(), "height": 16, "width": 16}, steps=STEPS)
    with c4d.accelerate(pipe, "meancache", memory_budget=limit, allow_downgrade=True) as handle:
        image = generate(pipe, STEPS)
        assert handle.method.info.name == "easycache"
        assert 0 < handle.memory["peak"] <= limit
    assert image.shape == plain.shape
    assert torch.equal(generate(pipe, STEPS), plain)


def test_an_expert_that_comes_later_is_reckoned_with_from_the_beginning():
    pipe = Experts()
    call = one_call(2)
    one = c4d.cache_bytes(pipe.transformer, "taylorseer-lite", inputs=call, steps=STEPS, **TAYLOR)
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    with c4d.accelerate(pipe, "taylorseer-lite", **TAYLOR, memory_budget=2 * one - 1), pytest.raises(MemoryBudgetError):
        pipe(["a", "b"], STEPS, generators)
    with c4d.accelerate(pipe, "taylorseer-lite", **TAYLOR, memory_budget=2 * one) as handle:
        pipe(["a", "b"], STEPS, generators)
        assert handle.memory["peak"] <= 2 * one


def test_prepare_weighs_too():
    denoiser = flux()
    with c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=held()) as handle:
        handle.prepare(**one_call())
        with handle.run(num_steps=STEPS):
            flux_loop(denoiser, flux_inputs(), STEPS)
        assert not any("weighed" in record.reason for record in handle.trace.of())
    with (
        c4d.accelerate(denoiser, "taylorseer-lite", **TAYLOR, memory_budget=held() - 1) as handle,
        pytest.raises(MemoryBudgetError),
    ):
        handle.prepare(**one_call())


def test_a_row_of_the_bench_goes_by_what_ran():
    pipe = flux_pipeline()
    call = {**prompt(), "height": 16, "width": 16}
    limit = c4d.cache_bytes(pipe, "taylorseer-lite", call=call, steps=STEPS, interval=3, order=1)
    asked = f"taylorseer-lite(interval=3, order=2, memory_budget={limit}, allow_downgrade=True)"
    (variant,) = variants_of(pipe, [asked])
    entry = Entry(variant.name, "", dict(variant.settings), variant.fidelity, variant.attach, STEPS)
    for number in range(2):
        with variant.attach() as seen:
            generate(pipe, STEPS)
        assert any("order=2" in note for note in seen.notes)
        assert seen.cache_bytes == limit
        reasons = [record.reason for record in seen._handle.trace.of()]
        assert any("weighed" in reason for reason in reasons) == (number == 0), "later runs are timed"
    _rename([entry], [variant])
    assert entry.settings["order"] == 1 and "for taylorseer-lite" in entry.title


# -- pieces ------------------------------------------------------------------------------------------------------------


def weighing(limit):
    weighed = []

    def weigh(calls, num_steps, is_more):
        weighed.append((calls, num_steps, is_more))
        if sum(len(calls) for calls, _, _ in weighed) > limit:
            raise MemoryBudgetError("too much")

    return Admission(weigh), weighed


def call_of(run, step, branch):
    return Call(run, step, branch, 0, True, "new")


def test_admission_waits_for_a_whole_step_and_knows_it_again():
    admission, weighed = weighing(3)
    first = Run(0, 4)
    assert admission.holds(call_of(first, 0, "a"), "small", "x")
    assert admission.holds(call_of(first, 0, "b"), "small", "y")
    assert not weighed
    assert not admission.holds(call_of(first, 1, "a"), "small", "x")
    assert weighed == [(["x", "y"], 4, False)]
    assert not admission.holds(call_of(first, 1, "b"), "small", "y")
    assert admission.holds(call_of(first, 2, "c"), "small", "z"), "a branch on top of what was weighed"
    assert not admission.holds(call_of(first, 3, "a"), "small", "x")
    assert weighed[1] == (["z"], 4, True)
    admission.forget(0)
    second = Run(1, 4)
    for branch in "abc":
        assert not admission.holds(call_of(second, 0, branch), "small", "x")
    assert admission.holds(call_of(Run(2, 4), 0, "a"), "large", "x")
    assert admission.holds(call_of(Run(3, 400), 0, "a"), "small", "x"), "more may be kept in a longer run"


def test_alternatives_come_in_the_order_of_the_documentation(monkeypatch):
    monkeypatch.setattr(budget, "_OTHERS", ("fora", "easycache"))
    choice = choose(None, {}, "taylorseer", TAYLOR)
    words = [differs(other, choice) for other in alternatives(choice, torch.device("cuda:0"))]
    assert words[:2] == ["taylorseer(order=1)", "taylorseer(order=0)"]
    dtypes = ["bfloat16", "int8", "float8_e4m3fn"] if FP8 is not None else ["bfloat16", "int8"]
    assert words[2 : 2 + len(dtypes)] == [f"taylorseer(cache_dtype={dtype!r})" for dtype in dtypes]
    assert "taylorseer(cache_device='cpu')" in words
    assert words[-1] == "easycache"
    on_cpu = [differs(other, choice) for other in alternatives(choice, torch.device("cpu"))]
    assert not any("cache_device" in text for text in on_cpu)


def test_a_predictor_that_was_put_in_is_the_one_that_keeps_less():
    choice = choose(None, {}, "fora", {"predictor": "newton(order=2)"})
    assert [other.axes["predictor"].order for other in lighter(choice)] == [1, 0]
    long = choose(None, {}, "spectrum", {"window": 100})
    assert [other.method.window for other in lighter(long)][:5] == [50, 25, 12, 6, 3]
