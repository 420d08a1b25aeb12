"""Samples that several processes share, and processes that share nothing."""

import contextlib
import functools
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import cache4diffusion as c4d
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.store import statistic_of
from cache4diffusion.engine import decide
from cache4diffusion.errors import MemoryBudgetError
from cache4diffusion.predictors import Reuse
from cache4diffusion.trace import MIXED
from ranks import Spy, on_ranks
from toys import branch_loop, flux, flux_inputs, flux_loop, flux_pipeline, generate, prompt

STEPS = 10
CASES = {
    "fora": {"interval": 3},
    "taylorseer": {"interval": 4},
    "taylorseer-lite": {"interval": 4},
    "fbcache": {"threshold": 0.5},
    "teacache": {"threshold": 0.3},
    "speca": {"threshold": 0.5},
    "easycache": {"threshold": 0.5, "warmup": 1},
    "bwcache": {"threshold": 9.0, "tail": 0.0},
    "dbprune": {"threshold": 0.5, "front": 1, "warmup": 2},
    "dbcache": {"threshold": 0.5, "front": 1, "back": 1, "warmup": 2},
}
FIRST = {"taylorseer", "fbcache"}  # the others are among the slow checks


def parallel(denoiser, **settings):
    """Split over the processes of this group by Ulysses, on devices that are all the CPU."""
    torch.accelerator.device_count = lambda: 1  # by which diffusers divides
    denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size(), **settings))
    return denoiser


def inputs(batch=1, seed=0, text=6):
    return flux_inputs(batch, seed, text=text, return_dict=False)


def sampled(denoiser, method, settings, given, num_steps=STEPS, **options):
    """Outputs of all steps, the strip and the scores."""
    with c4d.accelerate(denoiser, method, **settings, **options) as handle:
        with handle.run(num_steps=num_steps):
            outputs = flux_loop(denoiser, given, num_steps)
        return outputs, handle.trace.strip(), [record.scores for record in handle.trace.records]


def assert_near(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- context parallelism -----------------------------------------------------------------------------------------------


def job_ulysses(method, settings, given, **parallelism):
    return sampled(parallel(flux(), **parallelism), method, settings, given)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in CASES]
)
def test_ulysses_gives_what_a_single_process_gives(method, tmp_path):
    outputs, strip, scores = sampled(flux(), method, CASES[method], inputs())
    assert set(strip) == {"F", "c"}
    ranks = on_ranks(job_ulysses, method, CASES[method], inputs(), tmp_path=tmp_path)
    for found, found_strip, found_scores in ranks:
        assert_near(found, outputs)
        assert found_strip == strip
        assert found_scores == ranks[0][2]  # to the last bit
        for now, wanted in zip(found_scores, scores, strict=True):
            assert [x is None for x in now] == [x is None for x in wanted]
            assert [x for x in now if x is not None] == pytest.approx([x for x in wanted if x is not None], rel=1e-3)


def test_rows_decide_for_themselves_over_all_processes(tmp_path):
    given = inputs(batch=3)
    given["hidden_states"][1] *= 3
    given["encoder_hidden_states"][2] *= 3
    settings = {"threshold": 0.4, "decide": "row"}
    outputs, strip, _ = sampled(flux(), "fbcache", settings, given)
    assert MIXED in strip
    for found, found_strip, _ in on_ranks(job_ulysses, "fbcache", settings, given, tmp_path=tmp_path):
        assert_near(found, outputs)
        assert found_strip == strip


def job_uneven(given):
    denoiser = parallel(flux(), ulysses_anything=True)
    return [sampled(denoiser, method, CASES[method], given)[:2] for method in ("fbcache", "speca", "easycache")]


@pytest.mark.slow
def test_shares_of_different_sizes_weigh_by_what_they_hold(tmp_path):
    given = inputs(text=5)
    single = [sampled(flux(), method, CASES[method], given)[:2] for method in ("fbcache", "speca", "easycache")]
    for found in on_ranks(job_uneven, given, tmp_path=tmp_path):
        for (outputs, strip), (wanted, wanted_strip) in zip(found, single, strict=True):
            assert strip == wanted_strip
            assert_near(outputs, wanted)


def job_pipeline(method, settings):
    pipe = flux_pipeline()
    plain = generate(pipe, **prompt_of_even_length())
    with c4d.accelerate(pipe, method, **settings) as handle:
        single = generate(pipe, **prompt_of_even_length())
        parallel(pipe.transformer)  # from the next run on
        shared = [generate(pipe, **prompt_of_even_length()) for _ in range(2)]
        strips = [handle.trace.strip(run) for run in handle.trace.runs()]
    return plain, single, shared, strips


def prompt_of_even_length():
    found = prompt()
    return found | {"prompt_embeds": torch.cat([found["prompt_embeds"], found["prompt_embeds"][:, :1]], 1)}


def test_a_pipeline_can_be_made_parallel_while_it_is_accelerated(tmp_path):
    for plain, single, shared, strips in on_ranks(job_pipeline, "fbcache", {"threshold": 0.5}, tmp_path=tmp_path):
        assert not torch.allclose(plain, single, rtol=1e-3, atol=1e-3)
        assert_near(shared, [single, single])
        assert len(set(strips)) == 1
        assert "c" in strips[0]


def job_budget():
    denoiser, found = parallel(flux()), []
    for budget in ("1GiB", "1KiB"):
        with c4d.accelerate(denoiser, "taylorseer", memory_budget=budget) as handle:
            with contextlib.suppress(MemoryBudgetError), handle.run(num_steps=STEPS):
                flux_loop(denoiser, inputs(), STEPS)
            found.append((handle.memory["peak"], handle._budget._kept))
    return found


@pytest.mark.slow
def test_a_memory_budget_weighs_what_one_process_holds(tmp_path):
    with c4d.accelerate(flux(), "taylorseer") as handle, handle.run(num_steps=STEPS):
        flux_loop(handle._engines[0].denoiser, inputs(), STEPS)
        whole = handle.memory["peak"]
    for (peak, kept), (refused, _) in on_ranks(job_budget, tmp_path=tmp_path):
        assert peak == whole / 2
        assert kept["denoiser"].here == peak
        assert refused == 0


# -- one decision ------------------------------------------------------------------------------------------------------


def job_perturbed(threshold):
    """Process 1 sees its own share move by half as much again as it is large."""
    plain, local = decide.change_and_size, []

    def changed(now, before, *rest):
        change, size = plain(now, before, *rest)
        change = change + 0.5 * dist.get_rank() * size
        local.append(float(change / size))
        return change, size

    decide.change_and_size = changed
    return *sampled(parallel(flux()), "fbcache", {"threshold": threshold}, inputs())[1:], local


def test_decisions_agree_where_shares_of_a_sample_would_decide_differently(tmp_path):
    threshold = 0.5
    (strip, scores, first), (other_strip, other_scores, second) = on_ranks(job_perturbed, threshold, tmp_path=tmp_path)
    assert any(a < threshold <= b for a, b in zip(first, second, strict=True))
    assert strip == other_strip
    assert set(strip) == {"F", "c"}
    assert scores == other_scores  # to the last bit, however close to the threshold


def job_not_finite():
    """Process 1 alone predicts NaN, once."""
    plain, calls = Reuse.predict, []

    def predict(self, *args):
        calls.append(None)
        found = plain(self, *args)
        return [leaf * float("nan") for leaf in found] if len(calls) == 2 and dist.get_rank() == 1 else found

    Reuse.predict = predict
    denoiser = parallel(flux())
    with c4d.accelerate(denoiser, "fora", interval=3, site="denoiser", nan_guard="now") as handle:
        with handle.run(num_steps=STEPS):
            outputs = flux_loop(denoiser, inputs(), STEPS)
        return outputs, [record.reason for record in handle.trace.records]


def test_what_is_not_finite_in_one_process_is_computed_by_all(tmp_path):
    (outputs, reasons), (others, other_reasons) = on_ranks(job_not_finite, tmp_path=tmp_path)
    assert reasons == other_reasons
    assert reasons.count("not finite, recomputed") == 1
    assert_near(outputs, others)


def job_replicated():
    """What tensor parallelism looks like: every process sees all tokens, up to rounding."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plain = decide.change_and_size

    def rounded(*args):
        change, size = plain(*args)
        return change * (1 + 1e-6 * dist.get_rank()), size

    decide.change_and_size = rounded
    denoiser = flux()
    tensor = SimpleNamespace(_mesh=mesh)
    denoiser._parallel_config = SimpleNamespace(context_parallel_config=None, tensor_parallel_config=tensor)
    with Spy() as spy:
        found = sampled(denoiser, "fbcache", {"threshold": 0.5}, inputs())
    return *found, len(spy.calls)


@pytest.mark.slow
def test_processes_that_share_the_weights_go_by_the_first_of_them(tmp_path):
    outputs, strip, scores = sampled(flux(), "fbcache", {"threshold": 0.5}, inputs())
    for found, found_strip, found_scores, exchanges in on_ranks(job_replicated, tmp_path=tmp_path):
        assert_near(found, outputs)
        assert (found_strip, found_scores) == (strip, scores)
        assert exchanges > 0


# -- other groups ------------------------------------------------------------------------------------------------------


def job_replicas():
    rank, found = dist.get_rank(), []
    for method in ("fora", "fbcache"):
        with Spy() as spy:
            found.append(sampled(flux(), method, CASES[method], inputs(seed=rank)))
        assert spy.calls == []
    return found


def test_replicas_with_different_prompts_exchange_nothing(tmp_path):
    ranks = on_ranks(job_replicas, tmp_path=tmp_path)
    for rank, found in enumerate(ranks):
        for method, (outputs, strip, _) in zip(("fora", "fbcache"), found, strict=True):
            wanted, wanted_strip, _ = sampled(flux(), method, CASES[method], inputs(seed=rank))
            assert strip == wanted_strip
            assert_near(outputs, wanted)


def branches():
    return [inputs(seed=seed) | {"hidden_states": inputs()["hidden_states"]} for seed in (0, 5)]


@torch.no_grad()
def job_guidance():
    """Each process computes one branch of classifier-free guidance; the loop exchanges what they give."""
    denoiser, own = flux(), branches()[dist.get_rank()]
    with c4d.accelerate(denoiser, "fbcache", threshold=0.3) as handle, handle.run(num_steps=STEPS), Spy() as spy:
        x, outputs = own["hidden_states"], []
        for i in range(STEPS):
            output = denoiser(**own | {"hidden_states": x, "timestep": torch.tensor([1 - i / STEPS])})[0]
            both = [torch.empty_like(output) for _ in range(2)]
            dist.all_gather(both, output)
            mean = (both[0] + both[1]) / 2
            outputs.append(mean + 3.0 * (both[0] - mean))
            x = x - outputs[-1] / STEPS
        return outputs, handle.trace.strip(), len(spy.calls)


def test_branches_in_processes_of_their_own_decide_as_they_do_in_one(tmp_path):
    denoiser = flux()
    with c4d.accelerate(denoiser, "fbcache", threshold=0.3) as handle, handle.run(num_steps=STEPS):
        wanted = branch_loop(denoiser, branches(), STEPS)
        names = list(dict.fromkeys(record.branch for record in handle.trace.records))
        strips = [handle.trace.strip(branch=name) for name in names]
    assert strips[0] != strips[1]
    for (outputs, strip, exchanges), wanted_strip in zip(
        on_ranks(job_guidance, tmp_path=tmp_path), strips, strict=True
    ):
        assert_near(outputs, wanted)
        assert strip == wanted_strip
        assert exchanges == STEPS  # the loop's own


# -- failures ----------------------------------------------------------------------------------------------------------


def failing_at(denoiser, step):
    """In process 1, the last block fails in the middle of a step."""
    block, calls = denoiser.single_transformer_blocks[-1], []
    plain = block.forward

    @functools.wraps(plain)  # so that it is seen through when the blocks are first looked at
    def forward(*args, **kwargs):
        calls.append(None)
        if len(calls) == step + 1:
            raise ValueError("out of luck")
        return plain(*args, **kwargs)

    if dist.get_rank() == 1:
        block.forward = forward
    return denoiser


def what_came(act):
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def job_fails_in_a_block():
    denoiser = failing_at(flux(), 3)
    return what_came(lambda: sampled(denoiser, "fbcache", {"threshold": 0.0}, inputs(), group=dist.group.WORLD))


def test_who_waits_for_a_decision_hears_that_another_process_failed(tmp_path):
    first, second = on_ranks(job_fails_in_a_block, tmp_path=tmp_path)
    assert second[:2] == ("ValueError", "out of luck")
    assert first[0] == "RunError"
    assert "Process 1 failed in step 3: ValueError: out of luck" in first[1]


def job_leaves_the_loop():
    denoiser = flux()

    def loop():
        fail_at = 3 if dist.get_rank() == 1 else None
        settings = {"threshold": 0.0, "group": dist.group.WORLD}
        with c4d.accelerate(denoiser, "fbcache", **settings) as handle, handle.run(num_steps=STEPS):
            flux_loop(denoiser, inputs(), STEPS, fail_at=fail_at, error=KeyError)

    return what_came(loop)


def test_who_waits_for_a_decision_hears_that_another_process_left_its_loop(tmp_path):
    first, second = on_ranks(job_leaves_the_loop, tmp_path=tmp_path)
    assert second[0] == "KeyError"
    assert first[0] == "RunError"
    assert "Process 1 failed in step 2: its loop was left" in first[1]


def job_fails_under_ulysses():
    denoiser = failing_at(parallel(flux()), 3)
    return what_came(lambda: sampled(denoiser, "fora", {"interval": 2}, inputs()))


@pytest.mark.slow  # waits for the group to give up
def test_who_waits_in_an_exchange_of_the_host_is_told_who_failed_once_that_gives_up(tmp_path):
    first, second = on_ranks(job_fails_under_ulysses, tmp_path=tmp_path, timeout=15)
    assert second[:2] == ("ValueError", "out of luck")
    assert first[0] == "RunError"
    assert "ValueError: out of luck" in first[1]


def job_dies():
    denoiser = flux()
    fail_at = 3 if dist.get_rank() == 1 else None

    def loop():
        settings = {"threshold": 0.0, "group": dist.group.WORLD}
        with c4d.accelerate(denoiser, "fbcache", **settings) as handle, handle.run(num_steps=STEPS):
            flux_loop(denoiser, inputs(), STEPS, fail_at=fail_at, error=lambda _: os._exit(1))

    return what_came(loop)


def test_a_process_that_dies_is_noticed(tmp_path):
    first, _ = on_ranks(job_dies, tmp_path=tmp_path, mortal=(1,))
    assert first[0] == "RuntimeError"


def job_all_fail():
    denoiser = flux()
    plain, block = denoiser.transformer_blocks[1].forward, denoiser.transformer_blocks[1]
    with c4d.accelerate(denoiser, "fbcache", threshold=0.5, group=dist.group.WORLD) as handle:
        block.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("the same everywhere"))
        found = what_came(lambda: flux_loop(denoiser, inputs(), STEPS))
        block.forward = plain
        with handle.run(num_steps=STEPS):
            flux_loop(denoiser, inputs(), STEPS)
        return *found, handle.trace.strip(handle.trace.runs()[-1])


def test_what_fails_everywhere_fails_in_its_own_words_and_the_next_run_is_whole(tmp_path):
    first, second = on_ranks(job_all_fail, tmp_path=tmp_path)
    assert first == second
    assert first[:2] == ("RuntimeError", "the same everywhere")
    assert "c" in first[2]


def job_other_settings():
    settings = {"threshold": 0.5, "warmup": 2 + 2 * dist.get_rank()}
    return what_came(lambda: sampled(flux(), "fbcache", settings, inputs(), group=dist.group.WORLD))


def test_processes_at_different_places_are_told_so(tmp_path):
    for name, text in on_ranks(job_other_settings, tmp_path=tmp_path):
        assert name == "RunError"
        assert "process 0: run 1, step 2, call 0; process 1: run 1, step 4, call 0" in text


# -- what is refused ---------------------------------------------------------------------------------------------------


def job_refusals():
    plain, shared, found = flux(), parallel(flux()), {}
    for method, settings in {
        "seacache": {},
        "toca": {},
        "dicache": {},
        "freqca": {"site": "parts"},
        "dmd": {"site": "parts"},
    }.items():
        c4d.accelerate(plain, method, **settings).remove()
        found[method] = what_came(lambda method=method, settings=settings: c4d.accelerate(shared, method, **settings))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    found["group"] = what_came(lambda: c4d.accelerate(shared, "fora", group=alone))
    found["no group"] = what_came(lambda: c4d.accelerate(plain, "fora", group=3))
    found["calibration"] = what_came(lambda: Observer(shared, statistic_of("magcache", {})))
    with contextlib.suppress(c4d.Cache4DiffusionError), c4d.accelerate(plain, "seacache") as handle:
        parallel(plain)
        found["late"] = what_came(lambda: flux_loop(plain, inputs(), STEPS))
        assert handle is not None
    return found


def test_what_must_see_whole_samples_is_refused_where_they_are_shared(tmp_path):
    for found in on_ranks(job_refusals, tmp_path=tmp_path):
        names = {"seacache": "AccumulatedChange", "toca": "TopTokens", "dicache": "ProbeAligned"}
        for method in ("seacache", "toca", "dicache", "freqca", "dmd", "late"):
            kind, text = found[method]
            assert kind == "CompositionError", method
            assert "must see all tokens of a sample" in text
            assert names.get(method, "") in text or method == "toca"
        assert found["group"][0] == "SettingError"
        assert "leaves out process" in found["group"][1]
        assert found["no group"][0] == "SettingError"
        assert "torch.distributed.new_group" in found["no group"][1]
        assert found["calibration"][0] == "CompositionError"
        assert "Make it in one process" in found["calibration"][1]
