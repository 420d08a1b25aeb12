"""Ca2-VDM: keys and values of clean frames run once, and every output is what it was."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import cache4diffusion as c4d
import causal_video as cv
from cache4diffusion.cost import summarise
from cache4diffusion.errors import AnatomyError, CompositionError, SettingError
from cache4diffusion.zoo import tiny

pytestmark = pytest.mark.filterwarnings("ignore::cache4diffusion.few_steps.FewStepsWarning")

TEXT = cv.prompt()


@pytest.fixture(autouse=True)
def declared():
    with c4d.declare(cv.CausalVideo, **cv.DECLARED):
        yield


def accelerated(denoiser, make, **settings):
    """What ``make`` samples with the method on, the strip and the handle."""
    with c4d.accelerate(denoiser, "ca2-vdm", **settings) as handle, handle.run(), torch.no_grad():
        return make(denoiser), handle


def assert_close(found, truth, tolerance=1e-5):
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# -- the card's oracles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [False, True])
def test_cached_equals_recomputed_before_the_queue_wraps(rotary):
    denoiser = cv.made(rotary=rotary)
    truth, plain = cv.video(denoiser, TEXT, chunks=3, window=5)
    (found, outputs), handle = accelerated(denoiser, lambda d: cv.video(d, TEXT, chunks=3, window=5))
    assert truth.shape[2] == 7
    assert_close([found, *outputs], [truth, *plain])
    assert handle.stats["strip"] == "F" + "p" * 8


@pytest.mark.parametrize("rotary", [False, True])
def test_cached_equals_recomputed_after_the_queue_wraps(rotary):
    """As the whole video recomputed where each frame sees what was in sight when it ran; places wrap as well."""
    denoiser, chunks = cv.made(rotary=rotary), 7
    truth, slow = cv.slow_video(denoiser, TEXT, chunks)
    (found, outputs), _ = accelerated(denoiser, lambda d: cv.video(d, TEXT, chunks))
    assert truth.shape[2] == 15 > cv.PERIOD
    assert_close([found, *outputs], [truth, *slow])
    window, _ = cv.video(denoiser, TEXT, chunks)
    assert float((window - truth).abs().max()) > 1e-3, "a window recomputed does not know of frames that have left"


def test_the_queue_holds_the_last_frames_in_order():
    denoiser, held = cv.made(), []
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, handle.run():

        def look(call):
            states = handle._engines[0]._states.values()
            held.extend((s.extra["held"].first, s.extra["argument hidden_states"].clone()) for s in states)

        frames, _ = cv.video(denoiser, TEXT, chunks=5, on_call=look)
    firsts = [first for first, _ in held]
    assert firsts == sorted(firsts)
    assert firsts[-1] == 9 - cv.WINDOW
    for first, kept in held:
        assert torch.equal(kept, frames[:, :, first : first + kept.shape[2]])


def test_clean_frames_run_once():
    """Keys of 1 + 2 + ... frames; the chunk at every step; all outputs of clean frames are those of their one run."""
    denoiser, ran, chunks = cv.made(), Counter(), 3
    denoiser.blocks[0].attn_temp.to_k.register_forward_hook(lambda module, args, out: ran.update([out.shape[1]]))
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, handle.run():
        handle.prepare(**cv.inputs(cv.noise(-1, frames=1), cv.noise(1), TEXT, 900.0, 0))
        ran.clear()
        _, outputs = cv.video(denoiser, TEXT, chunks=chunks)
    steps = len(cv.TIMES)
    assert ran == {1 + cv.CHUNK: 1, cv.CHUNK: chunks * steps - 1 + (chunks - 1)}
    for chunk in range(chunks):
        for output in outputs[chunk * steps : (chunk + 1) * steps]:
            assert torch.equal(output[:, :, : 1 + 2 * chunk], outputs[-1][:, :, : 1 + 2 * chunk])


def test_what_clean_frames_leave_behind_does_not_depend_on_the_step():
    denoiser, kept = cv.made(), []
    with c4d.accelerate(denoiser, "ca2-vdm") as handle:
        for time in (900.0, 100.0):
            with handle.run(), torch.no_grad():
                denoiser(**cv.inputs(cv.noise(-1, frames=3), cv.noise(int(time)), TEXT, time, 0))
                (state,) = handle._engines[0]._states.values()
                kept.append({name: value.read() for name, value in state.extra.items() if name.startswith("key ")})
    assert len(kept[0]) == 2
    assert_close(kept[0].values(), kept[1].values(), 1e-6)


def test_memory_is_that_of_keys_and_values():
    """2 B L T S C, and the frames themselves with their outputs."""
    denoiser, clean, batch = cv.made(), 4, 2
    given = cv.inputs(cv.noise(-1, batch, clean), cv.noise(1, batch), cv.prompt(batch=batch), 900.0, 0)
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, handle.run(), torch.no_grad():
        for _ in range(2):
            denoiser(**given)
            tokens = cv.SIDE**2
            expected = 2 * batch * 2 * clean * tokens * cv.WIDTH + 2 * batch * clean * tokens * cv.CHANNELS
            assert handle.memory["held"] == 4 * expected
    assert handle.memory == {"held": 0, "peak": 4 * expected}
    assert c4d.cache_bytes(denoiser, "ca2-vdm", inputs=given, steps=3) == handle.memory["peak"]


@pytest.mark.parametrize("is_tensor", [False, True])
def test_transfers_to_the_host_are_counted(is_tensor):
    """One of what is clean and held; where the first frame is may lie on the device, too."""
    given = cv.inputs(cv.noise(-1, frames=2), cv.noise(1), TEXT, 900.0, 0)
    if is_tensor:
        given["first_frame"] = torch.zeros(1, dtype=torch.long)
    denoiser = cv.made()
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, handle.run(), torch.no_grad():
        for call in range(1, 4):
            before = handle.trace.syncs
            denoiser(**given)
            assert handle.trace.syncs - before == 1 + is_tensor, call


def test_off_is_off():
    denoiser = cv.made()
    truth = cv.video(denoiser, TEXT)
    found, handle = accelerated(denoiser, lambda d: cv.video(d, TEXT), capacity=0)
    assert all(torch.equal(a, b) for a, b in zip([found[0], *found[1]], [truth[0], *truth[1]], strict=True))
    assert handle.stats["strip"] == "F" * 6


# -- who is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"causal": False}, r"changes with later frames or their timesteps, by .*not causal in time"),
        ({"mixes": True}, "not causal in time"),
        ({"kind": cv.CountingVideo}, "come out differently, by .*place frames by counting them"),
    ],
)
def test_denoisers_that_cannot_be_served_are_refused_on_their_values(options, words):
    denoiser = cv.made(**options)
    before = {name: set(module.__dict__) for name, module in denoiser.named_modules()}
    given = cv.inputs(cv.noise(-1, frames=1), cv.noise(1), TEXT, 900.0, 0)
    frames = cv.FRAMES if "kind" in options else None
    if frames:
        del given["first_frame"]
    with c4d.declare(denoiser, frames=frames or cv.FRAMES, **({} if frames else {"first_frame": "first_frame"})):
        handle = c4d.accelerate(denoiser, "ca2-vdm")
        with pytest.raises(AnatomyError, match=words), torch.no_grad():
            denoiser(**given)
    assert {name: set(module.__dict__) for name, module in denoiser.named_modules()} == before
    assert "removed" in repr(handle)


@pytest.mark.parametrize("name", ["LatteTransformer3DModel", "WanTransformer3DModel", "SkyReelsV2Transformer3DModel"])
def test_denoisers_of_diffusers_are_refused(name):
    denoiser, args, kwargs = tiny(name).make(1)
    with c4d.accelerate(denoiser, "ca2-vdm") as handle:
        with pytest.raises(AnatomyError, match=r"causal in time and a timestep for each frame.*c4d.declare\("):
            handle.prepare(*args, **kwargs)
        assert not handle._engines[0].attachment.is_installed


def test_one_timestep_for_all_frames_is_refused():
    denoiser = cv.made()
    given = cv.inputs(cv.noise(-1, frames=1), cv.noise(1), TEXT, 900.0, 0) | {"timestep": torch.tensor([900.0])}
    refused = pytest.raises(AnatomyError, match=r"needs a timestep for every frame, timestep=\[batch, frames\]")
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, refused:
        handle.prepare(**given)


def test_more_clean_frames_than_there_is_room_for_are_refused():
    denoiser = cv.made()
    with pytest.raises(SettingError, match=r"capacity=3.*5 clean frames.*capacity=5 or more"):
        accelerated(denoiser, lambda d: cv.video(d, TEXT, chunks=3), capacity=3)
    with pytest.raises(SettingError, match="capacity must be"):
        c4d.method("ca2-vdm", capacity=-1)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ({"latents": 2}, "frames='latents'.*no such argument"),
        ({"hidden_states": -3}, "counted from 0"),
        ({"hidden_states": "2"}, "counted from 0"),
    ],
)
def test_a_declaration_that_cannot_hold_is_refused(frames, words):
    with pytest.raises(SettingError, match=words):
        c4d.declare(cv.made(), frames=frames)


# -- state -------------------------------------------------------------------------------------------------------------


def test_each_video_of_a_run_is_as_alone():
    """Another start, another prompt, other sizes; then the first again."""
    denoiser = cv.made()
    kinds = [{}, {"start": 40}, {"text": cv.prompt(7)}, {"side": 6}, {"batch": 2, "text": cv.prompt(3, 2)}, {}]
    alone = [cv.video(denoiser, **{"text": TEXT, **kind})[0] for kind in kinds]
    found, handle = accelerated(denoiser, lambda d: [cv.video(d, **{"text": TEXT, **kind})[0] for kind in kinds])
    assert_close(found, alone)
    strip = "F" + "p" * 5
    assert handle.stats["strip"] == strip * len(kinds)
    assert handle.memory["held"] == 0


def calls_of(seeds, texts=(TEXT,), times=cv.TIMES):
    """A call per timestep and seed of clean frames."""
    clean = [cv.noise(-seed, frames=3) for seed in seeds]
    return [
        cv.inputs(front, cv.noise(i), text, time, 0)
        for time in times
        for i, (front, text) in enumerate(zip(clean, texts, strict=True))
    ]


def test_two_prompts_in_turns_are_as_alone():
    denoiser, calls = cv.made(), calls_of((1, 2), (TEXT, cv.prompt(9)))
    plain = [denoiser(**call)["sample"] for call in calls]
    found, handle = accelerated(denoiser, lambda d: [d(**call)["sample"] for call in calls])
    assert_close(found, plain)
    assert set(handle.stats["strips"].values()) == {"Fpp"}


def test_two_videos_of_one_prompt_in_turns_are_told_apart_by_their_frames():
    denoiser, calls = cv.made(), calls_of((1, 2), (TEXT, TEXT))
    plain = [denoiser(**call)["sample"] for call in calls]
    with pytest.warns(UserWarning, match=r"0 of 6 .*: other clean frames than those that are held \(5\)"):
        found, _ = accelerated(denoiser, lambda d: [d(**call)["sample"] for call in calls])
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_without_a_run_around_it_each_chunk_runs_its_clean_frames_once():
    """A loop that sets timesteps per chunk: every chunk is a run, and nothing is held between them."""
    denoiser = cv.made()
    truth, _ = cv.video(denoiser, TEXT, chunks=3)
    with c4d.accelerate(denoiser, "ca2-vdm") as handle:
        found, _ = cv.video(denoiser, TEXT, chunks=3)
        strips = ["".join(r.symbol for r in handle.trace.of(run)) for run in handle.trace.runs()]
    assert_close([found], [truth])
    assert strips == ["Fpp"] * 3


def test_a_run_that_is_aborted_leaves_nothing():
    denoiser = cv.made()
    truth, _ = cv.video(denoiser, TEXT)

    def stop(call):
        if call == 4:
            raise KeyboardInterrupt

    with c4d.accelerate(denoiser, "ca2-vdm") as handle:
        with pytest.raises(KeyboardInterrupt), handle.run():
            cv.video(denoiser, TEXT, on_call=stop)
        assert handle.memory["held"] == 0
        with handle.run():
            found, _ = cv.video(denoiser, TEXT)
    assert_close([found], [truth])


def test_an_error_within_an_attention_leaves_nothing():
    denoiser = cv.made()
    truth, _ = cv.video(denoiser, TEXT)
    attention = denoiser.blocks[1].attn_temp

    def fail(call):
        if call == 4:
            attention.to_v.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))

    with c4d.accelerate(denoiser, "ca2-vdm") as handle:
        with pytest.raises(RuntimeError, match="stopped"), handle.run():
            cv.video(denoiser, TEXT, on_call=fail)
        assert handle.memory["held"] == 0
        attention.to_v._forward_pre_hooks.clear()
        with handle.run():
            found, _ = cv.video(denoiser, TEXT)
    assert_close([found], [truth])


@pytest.mark.parametrize(("option", "tolerance"), [({"cache_dtype": "bf16"}, 3e-2), ({"cache_device": "cpu"}, 1e-5)])
def test_keys_and_values_may_be_kept_smaller_or_elsewhere(option, tolerance):
    denoiser = cv.made()
    truth, plain = cv.video(denoiser, TEXT)
    (found, outputs), handle = accelerated(denoiser, lambda d: cv.video(d, TEXT), **option)
    assert_close([found, *outputs], [truth, *plain], tolerance)
    assert handle.stats["strip"] == "F" + "p" * 5


def test_clean_frames_that_change_are_computed_anew():
    denoiser = cv.made()
    calls = [*calls_of((1,)), *calls_of((5,))]
    plain = [denoiser(**call)["sample"] for call in calls]
    found, handle = accelerated(denoiser, lambda d: [d(**call)["sample"] for call in calls])
    assert handle.trace.strip() == "FppFpp"
    assert_close(found, plain)


def test_a_video_that_begins_without_clean_frames():
    denoiser, none = cv.made(), cv.noise(-1, frames=0)
    calls = [*(cv.inputs(none, cv.noise(1), TEXT, time, 0) for time in cv.TIMES), *calls_of((1,))]
    plain = [denoiser(**call)["sample"] for call in calls]
    found, handle = accelerated(denoiser, lambda d: [d(**call)["sample"] for call in calls])
    assert handle.trace.strip() == "FFFFpp"
    assert_close(found, plain)


def test_the_last_step_may_have_the_timestep_of_a_clean_frame():
    denoiser, times = cv.made(), (900.0, 450.0, 0.0)
    truth, plain = cv.video(denoiser, TEXT, times=times)
    (found, outputs), handle = accelerated(denoiser, lambda d: cv.video(d, TEXT, times=times))
    assert_close([found, *outputs], [truth, *plain])
    assert handle.stats["strip"] == "F" + "p" * 5


def test_both_branches_of_guidance():
    """In one call, and in a call each."""
    denoiser, texts = cv.made(), (cv.prompt(1), cv.prompt(2))
    clean = cv.noise(-1, frames=3)

    def batched(d, time):
        both = cv.inputs(clean.repeat(2, 1, 1, 1, 1), cv.noise(1).repeat(2, 1, 1, 1, 1), torch.cat(texts), time, 0)
        return [d(**both)["sample"]]

    def sequential(d, time):
        return [d(**cv.inputs(clean, cv.noise(1), text, time, 0))["sample"] for text in texts]

    for each, calls in ((batched, 1), (sequential, 2)):
        with torch.no_grad():
            plain = [out for time in cv.TIMES for out in each(denoiser, time)]
            found, handle = accelerated(denoiser, lambda d, each=each: [o for t in cv.TIMES for o in each(d, t)])
        assert_close(found, plain)
        assert set(handle.stats["strips"].values()) == {"Fpp"}
        assert len(handle.stats["strips"]) == calls


def test_what_is_not_finite_is_computed():
    denoiser = cv.made()
    calls = [cv.inputs(cv.noise(-1, frames=3), cv.noise(1), TEXT, time, 0) for time in cv.TIMES]
    plain = [denoiser(**call)["sample"] for call in calls]
    with c4d.accelerate(denoiser, "ca2-vdm", nan_guard="now") as handle, handle.run(), torch.no_grad():
        found = [denoiser(**calls[0])["sample"]]
        (state,) = handle._engines[0]._states.values()
        next(tensor for tensor in state.extra["value blocks.0.attn_temp"].tensors()).fill_(torch.nan)
        found += [denoiser(**call)["sample"] for call in calls[1:]]
        assert handle.trace.strip() == "FFp"
    assert_close(found, plain)


# -- the contract ------------------------------------------------------------------------------------------------------


def test_type_dtype_and_gradients():
    denoiser = cv.made().to(torch.bfloat16)
    calls = [cv.inputs(cv.noise(-1, frames=3), cv.noise(1), TEXT, time, torch.tensor([2])) for time in cv.TIMES]
    for call in calls:
        call |= {name: call[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    plain = [denoiser(**call)["sample"] for call in calls]
    found, handle = accelerated(denoiser, lambda d: [d(**call)["sample"] for call in calls])
    assert {out.dtype for out in found} == {torch.bfloat16}
    assert_close(found, plain, 3e-2)
    assert handle.trace.strip() == "Fpp"
    with c4d.accelerate(denoiser, "ca2-vdm"), torch.enable_grad(), pytest.warns(UserWarning, match="Gradients"):
        assert torch.equal(denoiser(**calls[0])["sample"], plain[0])


def test_the_report_counts_the_frames_that_ran():
    denoiser = cv.made()
    _, handle = accelerated(denoiser, lambda d: cv.video(d, TEXT, chunks=1))
    summary = summarise(handle)
    assert summary.cached_flops / summary.full_flops == pytest.approx(2 / 3, abs=0.02)
    assert "Fpp" in handle.report()


def test_removed_and_copied_it_is_plain():
    denoiser = cv.made()
    before = {name: set(module.__dict__) for name, module in denoiser.named_modules()}
    truth = cv.video(denoiser, TEXT)[0]
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, handle.run():
        cv.video(denoiser, TEXT)
        assert torch.equal(cv.video(copy.deepcopy(denoiser), TEXT)[0], truth)
    assert {name: set(module.__dict__) for name, module in denoiser.named_modules()} == before
    assert torch.equal(cv.video(denoiser, TEXT)[0], truth)


@pytest.mark.parametrize("before", [True, False])
def test_compiled_blocks_are_refused(before):
    """Compiled before it is attached, and after."""
    denoiser = cv.made()
    refused = pytest.raises(CompositionError, match="put in while the blocks run, so the blocks must not be compiled")
    if before:
        denoiser.blocks[0].compile(backend="eager")
    with c4d.accelerate(denoiser, "ca2-vdm") as handle:
        given = cv.inputs(cv.noise(-1, frames=1), cv.noise(1), TEXT, 900.0, 0)
        if not before:
            handle.prepare(**given)
        with refused:
            handle.prepare(**given) if before else denoiser.blocks[0].compile(backend="eager")


def test_another_attention_than_torchs_is_refused():
    class Own(cv.Attention):
        def forward(self, x, context=None, places=None):
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return self.to_out((q @ k.transpose(1, 2)).masked_fill(~mask, -torch.inf).softmax(-1) @ v)

    denoiser = cv.made()
    for block in denoiser.blocks:
        block.attn_temp.__class__ = Own
    refused = pytest.raises(AnatomyError, match="attn_temp does not attend by torch's scaled_dot_product_attention")
    with c4d.accelerate(denoiser, "ca2-vdm") as handle, refused:
        handle.prepare(**cv.inputs(cv.noise(-1, frames=1), cv.noise(1), TEXT, 900.0, 0))


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "foreign-denoisers.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    denoiser, frames = cv.made(), cv.noise(-1, frames=1)
    scope = {
        "c4d": c4d,
        "torch": torch,
        "denoiser": denoiser,
        "frames": frames,
        "chunks": [cv.noise(1), cv.noise(3)],
        "timesteps": cv.TIMES,
        "prompt": TEXT,
        "times": lambda clean, t: torch.tensor([[0.0] * clean.shape[2] + [t] * cv.CHUNK]),
        "step": lambda output, t, chunk: chunk - output / len(cv.TIMES),
    }
    with torch.no_grad():
        exec(example, scope)
    scope["declared"].remove()
    assert_close([scope["frames"]], [cv.video(denoiser, TEXT)[0]])
    assert scope["handle"].stats["strip"] == "F" + "p" * 5
