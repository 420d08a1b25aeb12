import contextlib
import json
import math

import numpy as np
import pytest
from measure_fixtures import CAPTIONS
from PIL import Image

from cache4diffusion.cli.image import load_images, save_image, save_images
from cache4diffusion.errors import FileFormatError
from cache4diffusion.measure import (
    Conditions,
    MeasureError,
    Results,
    animate,
    as_clips,
    as_videos,
    bench,
    filmstrip,
    flip,
    frame_by_frame,
    markdown_table,
    psnr,
    ssim,
    temporal_error,
    write_report,
)
from cache4diffusion.measure.video import closeness, split, wall


@pytest.fixture
def videos():
    return np.random.default_rng(0).random((2, 5, 16, 24, 3), dtype=np.float32) * 0.5


def clip(frames=6, size=(24, 16)):
    """A square that moves right: every frame is another."""
    drawn = []
    for i in range(frames):
        frame = Image.new("RGB", size, "gray")
        frame.paste("red", (2 * i, 4, 2 * i + 5, 9))
        drawn.append(frame)
    return drawn


def pixels(frames):
    return [np.asarray(frame.convert("RGB")).tolist() for frame in frames]


@pytest.mark.parametrize("metric", [psnr, ssim, flip])
def test_every_frame_is_measured_as_an_image(videos, metric):
    other = (videos + np.random.default_rng(1).normal(0, 0.05, videos.shape)).clip(0, 1).astype(np.float32)
    found = frame_by_frame(metric, other, videos)
    assert found.shape == (2, 5)
    for i in range(2):
        assert found[i] == pytest.approx(metric(other[i], videos[i]))


def test_a_videos_psnr_is_of_all_its_pixels(videos):
    other = videos.copy()
    other[:, 2:] += 0.1
    found = closeness(other, videos)
    assert np.isinf(found.frames["psnr"][:, :2]).all()
    assert found.frames["psnr"][:, 2:] == pytest.approx(np.full((2, 3), 20.0), abs=1e-3)
    assert found.psnr == pytest.approx([-10 * math.log10(0.01 * 3 / 5)] * 2, abs=1e-3)
    assert found.ssim == pytest.approx(found.frames["ssim"].mean(axis=1))
    assert np.isinf(closeness(videos, videos).psnr).all()
    assert closeness(videos[0], videos[0]).temporal is None  # images have no time


def test_temporal_error_sees_flicker_and_not_what_is_steadily_different(videos):
    assert temporal_error(videos, videos).tolist() == [0, 0]
    steady = videos + np.random.default_rng(1).random((2, 1, 16, 24, 3), dtype=np.float32) * 0.5
    assert temporal_error(steady, videos) == pytest.approx([0, 0], abs=1e-6)
    flickering = videos.copy()
    flickering[1, ::2] += 0.25
    assert temporal_error(flickering, videos) == pytest.approx([0, 0.25], abs=1e-6)
    slow = np.repeat(videos[:, :1], 5, axis=1)
    expected = np.abs(np.diff(videos.astype(np.float64), axis=1)).mean(axis=(1, 2, 3, 4))
    assert temporal_error(slow, videos) == pytest.approx(expected)
    with pytest.raises(MeasureError, match="two frames or more"):
        temporal_error(videos[:, :1], videos[:, :1])


def test_arrays_and_clips_give_the_same(videos):
    clips = as_clips(videos)
    assert (len(clips), len(clips[0])) == (2, 5)
    assert np.abs(as_videos(clips) - videos).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(MeasureError, match=r"expected \[N, F, H, W, 3\]"):
        as_videos(videos[0])
    with pytest.raises(MeasureError, match="Clips of 4, 5 frames"):
        as_videos([clips[0], clips[1][:4]])
    with pytest.raises(MeasureError, match="differ in shape"):
        temporal_error(videos, videos[:, :4])


@pytest.mark.parametrize("frames", [2, 4, 7, 8])
def test_a_filmstrip_holds_its_frames_in_order(frames):
    drawn = clip(frames)
    strip = filmstrip(drawn)
    assert strip.width == 24 * min(frames, 4)
    assert pixels(split(strip, frames)) == pixels(drawn)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_an_animated_file_is_read_back_frame_by_frame(suffix, tmp_path):
    path = animate(tmp_path / "new" / f"clip{suffix}", clip(), fps=10)
    with Image.open(path) as read:
        assert read.n_frames == 6
        assert read.is_animated
        assert read.info.get("loop") == 0
        for i, frame in enumerate(clip()):
            read.seek(i)
            assert pixels([read]) == pixels([frame])
            assert read.info["duration"] == 100


def test_animated_files_are_of_two_kinds(tmp_path):
    with pytest.raises(MeasureError, match=r"clip.png: animated files are .webp or .gif"):
        animate(tmp_path / "clip.png", clip())
    with pytest.raises(MeasureError, match="at least one frame"):
        animate(tmp_path / "clip.gif", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError):
        animate(tmp_path / "file" / "clip.gif", clip())


def test_a_wall_runs_clips_side_by_side():
    frames = wall([[clip(), clip()[::-1]], [clip()]], gap=4)
    assert len(frames) == 6
    assert frames[0].size == (24 * 2 + 4, 16 * 2 + 4)
    assert pixels([frames[1].crop((28, 0, 52, 16))]) == pixels([clip()[4]])
    assert max(wall([[clip(2)] * 200], gap=4)[0].size) <= 4096


class Pipeline:
    """Draws the same clip for every caption."""

    brightness = 1.0

    def __call__(self, captions, seeds, steps):
        return as_videos([clip(8, (32, 32))] * len(captions)) * np.float32(self.brightness)


class Darker:
    """A method that darkens what the pipeline draws."""

    name, settings, fidelity = "darker", {}, "ours"

    def __init__(self, pipeline):
        self.pipeline = pipeline

    @contextlib.contextmanager
    def attach(self):
        self.pipeline.brightness = 0.9
        try:
            yield None
        finally:
            self.pipeline.brightness = 1.0


@pytest.fixture(scope="module")
def measured():
    """Videos of a pipeline beside darker ones, judged by the first pixel of their first frame."""
    pipeline = Pipeline()

    def judge(caption, frames):
        assert len(frames) == 8
        return frames[0].getpixel((0, 0))[0] > 120

    settings = {"steps": 4, "batch": 2, "fewer_steps": False, "progress": False}
    return bench([Darker(pipeline)], pipeline, CAPTIONS[:3], judge=judge, **settings)


def test_a_benchmark_of_videos_measures_frames_and_what_is_between_them(measured):
    base, row = measured.results.rows
    assert measured.results.conditions.resolution == [32, 32, 8]
    assert "32 × 32 × 8" in measured.results.conditions.caption()  # noqa: RUF001
    assert base.temporal_error == 0
    assert row.temporal_error > 0
    assert len(row.psnr_per_frame) == len(row.ssim_per_frame) == len(row.flip_per_frame) == 8
    assert row.ssim == pytest.approx(np.mean(row.ssim_per_frame))
    assert (base.accuracy, row.accuracy) == (1, 0), "the judge sees the frames"
    assert Results.from_dict(json.loads(measured.results.to_json())) == measured.results
    assert "temporal" in markdown_table(measured.results)
    assert [len(each) for each in measured.images["darker"]] == [8] * 3


def test_the_report_shows_filmstrips_and_writes_an_animated_file(measured, tmp_path):
    page = write_report(measured.results, measured.images, measured.captions, tmp_path / "a report.html")
    text = page.read_text(encoding="utf-8")
    assert "Temporal<br>error" in text
    assert '<a href="a%20report.webp">a report.webp</a>, a row each for uncached, darker' in text
    with Image.open(tmp_path / "a report.webp") as read:
        assert read.n_frames == 8
        assert read.size == (3 * 36 - 4, 2 * 36 - 4)


def test_a_report_of_images_has_no_animated_file(made_up, tmp_path):
    page = write_report(*made_up, tmp_path / "report.html")
    assert "Temporal<br>error" not in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert made_up[0].baseline.temporal_error is None
    assert isinstance(made_up[0].conditions, Conditions)


def test_clips_beside_the_results_are_read_back(measured, tmp_path):
    save_images(tmp_path, measured)
    images, captions = load_images(tmp_path, measured.results)
    assert captions == CAPTIONS[:3]
    for name, clips in measured.images.items():
        assert [pixels(each) for each in images[name]] == [pixels(each) for each in clips]


def test_one_clip_is_saved_as_a_strip_or_moves(tmp_path):
    frames = as_videos([clip()])[0]
    with Image.open(save_image(frames, tmp_path / "clip.png", {"seed": 1})) as strip:
        assert pixels(split(strip, 6)) == pixels(clip())
        assert json.loads(strip.info["cache4diffusion"]) == {"seed": 1}
    with Image.open(save_image(frames, tmp_path / "clip.webp", {})) as moving:
        assert moving.n_frames == 6
