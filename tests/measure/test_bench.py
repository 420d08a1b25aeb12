import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cache4diffusion.measure import (
    MeasureError,
    MissingExtraError,
    bench,
    cost,
    generators,
    markdown_table,
    write_report,
)
from cache4diffusion.measure.variant import labels_of

CAPTIONS = [f"{'dark' if i % 2 else 'bright'} scene {i}" for i in range(10)]
STEPS = 12


class Pipeline:
    """Euler sampling of a small random denoiser: x += (f(x) - x) / steps; pictures of 16 x 16."""

    def __init__(self):
        torch.manual_seed(0)
        self.denoiser = nn.Sequential(nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 768))
        self.decoder = nn.Linear(768, 768)
        self.calls, self.keep, self.stored = [], None, None

    @torch.no_grad()
    def __call__(self, captions, seeds, steps, on_step=None):
        self.calls.append((tuple(captions), tuple(seeds), steps, on_step is not None, self.keep))
        x = torch.stack([torch.randn(768, generator=g) for g in generators(seeds)])
        for step in range(steps):
            if self.keep is None or step % self.keep == 0:
                self.stored = self.denoiser(x)
            x = x + (self.stored - x) / steps
            if on_step is not None:
                on_step(x)
        return (self.decoder(x).sigmoid() * 0.2 + x.sigmoid() * 0.8).reshape(-1, 16, 16, 3).numpy()


class Skip:
    fidelity = "ours"

    def __init__(self, pipeline, interval, name="skip", **more):
        self.pipeline, self.name, self.settings = pipeline, name, {"interval": interval}
        self.more = more

    @contextlib.contextmanager
    def attach(self):
        interval = self.settings["interval"]
        self.pipeline.keep = interval
        strip = "".join("F" if step % interval == 0 else "c" for step in range(STEPS))
        try:
            yield SimpleNamespace(
                full_steps=strip.count("F"), total_steps=STEPS, strip=strip, cache_bytes=4096,
                predicted_flops_speedup=float(interval), notes=["toy"], **self.more,
            )  # fmt: skip
        finally:
            self.pipeline.keep = None


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Collecting before each peak is measured takes longer than these toys."""
    monkeypatch.setattr(cost.gc, "collect", lambda: 0)


@pytest.fixture
def pipeline():
    return Pipeline()


def run(pipeline, variants, **more):
    settings = {"steps": STEPS, "batch": 4, "denoiser": pipeline.denoiser, "progress": False, **more}
    return bench(variants, pipeline, CAPTIONS, 100, **settings)


def test_rows_come_in_order_with_fewer_steps_of_equal_flops(pipeline):
    results = run(pipeline, [Skip(pipeline, 4, "slow"), Skip(pipeline, 2, "fast"), Skip(pipeline, 6, "six")]).results
    assert [row.method for row in results.rows] == [
        "uncached", "fewer-steps-6", "fewer-steps-3", "fewer-steps-2", "slow", "fast", "six",
    ]  # fmt: skip
    for row in results.methods:
        reference = results.row(row.reference_row)
        assert reference.flops == row.flops
        assert reference.total_steps == row.full_steps == 12 / row.settings["interval"]
        assert row.flops_speedup == pytest.approx(row.settings["interval"], rel=1e-6)
        assert row.predicted_flops_speedup == pytest.approx(row.settings["interval"])
        assert 1 < row.pipeline_flops_speedup < row.flops_speedup  # the decoder costs the same for all
        assert row.cache_bytes == 4096
        assert row.notes == ["toy"]
        assert row.strip.count("F") == row.full_steps


def test_the_baseline_is_the_reference_of_everything(pipeline):
    base = run(pipeline, [Skip(pipeline, 3)]).results.baseline
    assert base.psnr == float("inf")
    assert (base.ssim, base.flip) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert (base.flops_speedup, base.latency_speedup) == (1, 1)
    assert base.flops == 2 * 768 * 64 * 2 * STEPS  # of the denoiser: without the decoder
    assert base.strip == "F" * STEPS
    assert base.reference_row is None


def test_a_variant_that_never_caches_is_identical(pipeline):
    row = run(pipeline, [Skip(pipeline, 1, "off")]).results.row("off")
    assert row.psnr == float("inf")
    assert row.flops_speedup == 1
    assert row.error_per_step == [0.0] * STEPS
    assert row.reference_row is None


def test_the_same_captions_and_seeds_go_to_everyone_in_turn(pipeline):
    run(pipeline, [Skip(pipeline, 3)])
    timed = [call for call in pipeline.calls if not call[3]][1:]  # the first one measures the cost of a step
    assert [len(call[0]) for call in timed] == [4, 4, 4, 4, 4, 4, 2, 2, 2]
    for first in range(0, 9, 3):
        assert len({call[:2] for call in timed[first : first + 3]}) == 1
        assert [(call[2], call[4]) for call in timed[first : first + 3]] == [(12, None), (4, None), (12, 3)]
    assert [seed for call in timed[::3] for seed in call[1]] == list(range(100, 110))


def test_quality_falls_and_error_grows_with_the_interval(pipeline):
    results = run(pipeline, [Skip(pipeline, 2, "two"), Skip(pipeline, 6, "six")]).results
    two, six = results.row("two"), results.row("six")
    assert two.psnr > six.psnr > 10
    assert len(two.error_per_step) == STEPS
    assert two.error_per_step[0] == 0
    assert six.error_per_step[-1] > two.error_per_step[-1] > 0
    assert results.row("fewer-steps-6").error_per_step is None
    assert two.psnr == pytest.approx(np.mean(two.psnr_per_caption))


def test_accuracy_is_judged_per_family_and_compared_in_pairs(pipeline):
    wrong = {"dark scene 3"}

    def judge(caption, image):
        assert image.size == (16, 16)
        return not (pipeline.keep is None and caption in wrong and judge.baseline_seen) and "scene 5" not in caption

    judge.baseline_seen = False
    made = run(pipeline, [Skip(pipeline, 3)], judge=judge, family=lambda caption: caption.split()[0])
    base, row = made.results.baseline, made.results.row("skip")
    assert base.accuracy == row.accuracy == 0.9
    assert base.accuracy_by_family == {"bright": 1.0, "dark": 0.8}
    assert row.accuracy_difference == 0
    low, high = row.accuracy_difference_interval
    assert -0.35 < low < 0 < high < 0.35
    assert row.correct_per_caption == ["scene 5" not in caption for caption in CAPTIONS]
    assert row.accuracy_vs_reference_interval is not None
    assert base.accuracy_difference is None


def test_images_kept_for_the_report_are_spread_over_families(pipeline, tmp_path):
    made = run(pipeline, [Skip(pipeline, 3)], family=lambda caption: caption.split()[0], show=5)
    assert made.captions == [CAPTIONS[i] for i in (0, 1, 2, 3, 4)]
    assert set(made.images) == {"uncached", "fewer-steps-4", "skip"}
    assert all(len(several) == 5 for several in made.images.values())
    write_report(*made, tmp_path / "report.html")


def test_flops_of_an_adaptive_variant_follow_its_timed_runs(pipeline):
    class Adaptive(Skip):
        runs = 0

        @contextlib.contextmanager
        def attach(self):
            self.settings = {"interval": 2 if self.runs == 0 else 4}  # counted with 6 full steps, timed with 3
            self.runs += 1
            with super().attach() as attached:
                yield attached

    results = run(pipeline, [Adaptive(pipeline, 2, "adaptive"), Skip(pipeline, 4, "fixed")]).results
    assert results.row("adaptive").full_steps == 3
    assert results.row("adaptive").flops == results.row("fixed").flops
    assert results.row("adaptive").flops_speedup == pytest.approx(4)


def test_the_reference_row_never_has_the_smaller_budget(pipeline):
    """4 full steps of 12 and half a step's worth of other work: 5 steps are the reference, not 4."""

    def other_work(*_):
        torch.zeros(1, 768) @ torch.zeros(768, 64)

    class Costly(Skip):
        @contextlib.contextmanager
        def attach(self):
            work = pipeline.denoiser.register_forward_pre_hook(other_work)
            try:
                with super().attach() as attached:
                    yield attached
            finally:
                work.remove()

    results = run(pipeline, [Costly(pipeline, 3, "costly"), Skip(pipeline, 3, "plain")]).results
    assert results.row("costly").full_steps == results.row("plain").full_steps == 4
    assert (results.row("costly").reference_row, results.row("plain").reference_row) == (
        "fewer-steps-5",
        "fewer-steps-4",
    )
    for row in results.methods:
        assert results.row(row.reference_row).flops >= row.flops


def test_what_is_done_once_per_run_does_not_lower_the_reference(pipeline):
    """Work of eight steps, once per call of the pipeline: 4 full steps still stand beside 4 steps."""

    def generate(captions, seeds, steps, on_step=None):
        torch.zeros(1, 768) @ torch.zeros(768, 8 * 2 * 64)
        return pipeline(captions, seeds, steps, on_step)

    made = bench(
        [Skip(pipeline, 3)], generate, CAPTIONS, steps=STEPS, batch=4, denoiser=pipeline.denoiser, progress=False
    )
    assert made.results.row("skip").reference_row == "fewer-steps-4"


def test_a_reference_row_that_the_timed_runs_ask_for_is_run_afterwards(pipeline):
    class Cautious(Skip):
        runs = 0

        @contextlib.contextmanager
        def attach(self):
            self.settings = {"interval": 6 if self.runs == 0 else 2}  # counted with 2 full steps, timed with 6
            self.runs += 1
            with super().attach() as attached:
                attached.predicted_flops_speedup = 12 / attached.full_steps
                yield attached

    results = run(pipeline, [Cautious(pipeline, 6, "cautious")]).results
    assert [row.method for row in results.rows] == ["uncached", "fewer-steps-6", "fewer-steps-2", "cautious"]
    row, late = results.row("cautious"), results.row("fewer-steps-6")
    assert row.reference_row == "fewer-steps-6"
    assert late.flops == row.flops
    assert row.flops_speedup == pytest.approx(row.predicted_flops_speedup) == pytest.approx(2)
    assert len(late.psnr_per_caption) == len(CAPTIONS)
    assert late.latency_speedup > 0
    timed = [call for call in pipeline.calls if not call[3]][1:]
    assert [call[2] for call in timed[-6:]] == [12, 6] * 3, "beside the baseline once more"
    assert [call[:2] for call in timed[-6::2]] == [call[:2] for call in timed[-5::2]]


def test_the_expected_speedup_has_the_share_of_the_steps_in_it(pipeline, monkeypatch):
    """With a clock that says a step takes 1 s and everything else 4 s: 12 steps of 16 s, expected 16 / (4 + 12 / 3)."""
    now = 0.0

    def tick(*_):
        nonlocal now
        now += 1.0

    def generate(captions, seeds, steps, on_step=None):
        nonlocal now
        now += 4.0
        return pipeline(captions, seeds, steps, on_step)

    pipeline.denoiser.register_forward_pre_hook(tick)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now)
    made = bench([Skip(pipeline, 3)], generate, CAPTIONS, steps=STEPS, denoiser=pipeline.denoiser, progress=False)
    row = made.results.row("skip")
    assert row.predicted_latency_speedup == pytest.approx(16 / 8)
    assert row.latency_speedup == pytest.approx(16 / 8), "what the toy adds to that is nothing"
    assert made.results.baseline.predicted_latency_speedup is None


def test_libraries_are_missed_before_anything_runs(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MissingExtraError, match="This needs 'skimage'"):
        run(pipeline, [])
    assert pipeline.calls == []


def test_counting_on_fewer_captions_gives_the_same_flops_per_image(pipeline):
    few, all_of_them = (run(pipeline, [Skip(pipeline, 3)], flops_captions=n).results for n in (1, None))
    assert [row.flops for row in few.rows] == [row.flops for row in all_of_them.rows]
    assert (few.conditions.counted, all_of_them.conditions.counted) == (1, 4)


def test_two_settings_of_one_method_get_labels(pipeline):
    results = run(pipeline, [Skip(pipeline, 2), Skip(pipeline, 3)]).results
    assert [row.label for row in results.methods] == ["skip (interval=2)", "skip (interval=3)"]
    assert [row.method for row in results.methods] == ["skip", "skip"]


def test_broken_images_get_bad_figures_and_a_note(pipeline):
    def generate(captions, seeds, steps):
        images = pipeline(captions, seeds, steps)
        if pipeline.keep:
            images[0] = np.nan
        return images

    row = bench([Skip(pipeline, 3)], generate, CAPTIONS, steps=STEPS, batch=5, progress=False).results.row("skip")
    assert "2 of 10 images contained NaN or Inf, drawn black" in row.notes
    assert min(row.psnr_per_caption) < 15 < row.psnr


def test_conditions_are_complete(pipeline):
    facts = {"denoiser": "toy", "scheduler": "Euler", "versions": {"mine": "1"}, "extra": {"weights": "random"}}
    conditions = run(pipeline, [], conditions=facts).results.conditions
    assert (conditions.denoiser, conditions.dtype, conditions.device) == ("toy", "float32", "cpu")
    assert (conditions.resolution, conditions.batch, conditions.captions) == ([16, 16], 4, 10)
    assert conditions.seeds == list(range(100, 110))
    assert {"torch", "python", "mine"} <= set(conditions.versions)
    assert conditions.peak_source


def test_a_failure_names_the_variant_and_leaves_nothing_attached(pipeline):
    class Fails(Skip):
        @contextlib.contextmanager
        def attach(self):
            with super().attach():
                yield SimpleNamespace()  # has none of the attributes

    with pytest.raises(
        MeasureError, match=r"broken failed at 12 steps on 4 captions from 'bright scene 0' \(seed 100\)"
    ):
        run(pipeline, [Fails(pipeline, 3, "broken")])
    assert pipeline.keep is None


def test_ctrl_c_is_not_swallowed(pipeline):
    def generate(captions, seeds, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench([], generate, CAPTIONS, steps=STEPS, progress=False)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: bench([], p, [], steps=5), "at least one caption"),
        (lambda p: bench([], p, CAPTIONS, [1, 2], steps=5), "one seed per caption"),
        (lambda p: bench([], p, CAPTIONS, steps=0), "1 or more"),
        (lambda p: run(p, [], flops_captions=0), "flops_captions=0"),
        (lambda p: run(p, [], level=95), "between 0 and 1"),
        (lambda p: run(p, [Skip(p, 2), Skip(p, 2)]), "same settings; give each a label"),
        (lambda p: run(p, [Skip(p, 2, "fewer-steps-6")]), "made by the bench itself"),
        (lambda p: bench([], lambda c, s, n: p(c, s, n)[:1], CAPTIONS, steps=5, progress=False), "1 images for 10"),
    ],
)
def test_unusable_arguments_are_refused(pipeline, call, words):
    with pytest.raises(MeasureError, match=words):
        call(pipeline)


def test_progress_goes_to_stderr_and_nothing_to_stdout(pipeline, capsys):
    run(pipeline, [], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "measured" in err


def test_one_step_has_no_fewer_steps(pipeline):
    results = bench([], pipeline, CAPTIONS[:2], steps=1, progress=False).results
    assert [row.method for row in results.rows] == ["uncached"]


class Broken(Skip):
    @contextlib.contextmanager
    def attach(self):
        raise ValueError("no blocks\n  here")
        yield


def test_what_fails_is_left_out_with_the_reason_if_asked_for():
    pipeline = Pipeline()
    variants = [Broken(pipeline, 2, name="broken"), Skip(pipeline, 3)]
    with pytest.raises(MeasureError, match="broken failed"):
        bench(variants, pipeline, CAPTIONS, steps=STEPS, progress=False)
    made = bench(variants, pipeline, CAPTIONS, steps=STEPS, progress=False, keep_going=True)
    alone = bench(variants[1:], pipeline, CAPTIONS, steps=STEPS, progress=False)
    assert made.results.conditions.left_out == {"broken": "no blocks here"}
    assert alone.results.conditions.left_out == {}
    assert [row.name for row in made.results.rows] == [row.name for row in alone.results.rows]
    assert made.results.row("skip").psnr_per_caption == alone.results.row("skip").psnr_per_caption
    text = markdown_table(made.results)
    assert "- left out: broken: no blocks here\n" in text
    nothing = bench(variants[:1], pipeline, CAPTIONS, steps=STEPS, progress=False, keep_going=True).results
    assert [row.name for row in nothing.rows] == ["uncached"]


def test_labels_tell_long_lists_by_their_runs():
    pipeline = Pipeline()
    one, two = Skip(pipeline, (*range(17), 24, 25, 32, 40)), Skip(pipeline, (0, 1, 3))
    assert labels_of([one, two]) == ["skip (interval=[0..16, 24, 25, 32, 40])", "skip (interval=(0, 1, 3))"]
    near = Skip(pipeline, (*range(17), 24, 25, 32, 41))
    assert len(set(labels_of([one, near]))) == 2
