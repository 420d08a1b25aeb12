"""A benchmark as it could have been, for tests of tables and reports."""

import math

import numpy as np
from PIL import Image, ImageDraw

from cache4diffusion.measure import Conditions, Results, Row, flip, paired_interval, psnr, ssim, wilson_interval

FAMILIES = ["single object", "two objects", "counting", "colours", "position", "colour attribution"]
CAPTIONS = [
    "a red circle on a gray background",
    "a blue star and a yellow square on a white background",
    "three green triangles on a black background",
    "an orange hexagon on a purple background",
    "a red circle left of a blue star on a gray background",
    "a cyan square and a magenta triangle on a white background",
    "a yellow circle above a green square on a blue background",
    'two white stars on a <dark> & "red" background',
]
STRIPS = {
    "taylorseer": "FFF" + "ccccF" * 9 + "cc",
    "taylorseer-lite": "FFF" + "ccccF" * 9 + "cc",
    "fora": "F" + "ccF" * 16 + "c",
    "dbcache": "FFFFcFccFcccFccccFcccccFcccccFccccFcccFcccFccFcFFF",
    "speca": "FFF" + "cccF" * 11 + "ccc",
    "toca": "F" + "ppF" * 16 + "p",
    "teacache": "FFcFcFccFccFcccFcccFcccFccFccFcFcFFcFccFccFccFcFFF",
}
#              steps, noise, accuracy
FEWER_STEPS = [
    (26, 0.022, 0.860),
    (23, 0.026, 0.855),
    (18, 0.034, 0.846),
    (16, 0.040, 0.840),
    (13, 0.054, 0.815),
    (12, 0.060, 0.800),
]
#           settings, flops, latency, noise, accuracy, cache MiB, fidelity
METHODS = {
    "taylorseer": ({"interval": 5, "order": 1}, 3.72, 3.31, 0.010, 0.866, 6.9, "code"),
    "taylorseer-lite": ({"interval": 5, "order": 1}, 4.16, 4.05, 0.026, 0.835, 0.5, "code"),
    "fora": ({"interval": 3}, 2.72, 2.44, 0.030, 0.829, 3.4, "paper"),
    "dbcache": ({"threshold": 0.12, "front": 1}, 2.10, 2.02, 0.008, 0.872, 1.2, "code"),
    "speca": ({"threshold": 0.3, "interval": 4}, 3.05, 2.60, 0.014, 0.860, 7.4, "paper"),
    "toca": ({"interval": 3, "recompute_ratio": 0.1}, 2.21, 1.72, 0.020, 0.850, 9.1, "reconstructed"),
    "teacache": ({"threshold": 0.25, "coefficients": "identity"}, 1.92, 1.88, 0.018, 0.862, 0.4, "code"),
}


def scene(index: int, size: int = 128) -> Image.Image:
    """A shaded shape or two on a coloured background."""
    rng = np.random.default_rng(index)
    palette = [(214, 69, 65), (52, 106, 201), (240, 190, 60), (70, 160, 90), (150, 90, 190), (235, 130, 50)]
    base = np.array([(128, 128, 132), (236, 236, 232), (24, 24, 30), (70, 80, 120)][index % 4], float)
    ramp = np.linspace(-14, 14, size)[:, None, None]
    image = Image.fromarray((base + ramp + np.zeros((size, size, 1))).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for i in range(1 + index % 3):
        x, y, r = (
            (22 + 40 * i + rng.integers(-6, 6)) * size // 128,
            rng.integers(40, 88) * size // 128,
            17 * size // 128,
        )
        colour = palette[rng.integers(len(palette))]
        kind = (index + i) % 3
        if kind == 0:
            draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        elif kind == 1:
            draw.rectangle([x - r, y - r, x + r, y + r], fill=colour)
        else:
            points = [
                (
                    x + (r if j % 2 == 0 else r / 2) * math.sin(j * math.pi / 5),
                    y - (r if j % 2 == 0 else r / 2) * math.cos(j * math.pi / 5),
                )
                for j in range(10)
            ]
            draw.polygon(points, fill=colour)
    return image


def spoil(image: Image.Image, amount: float, seed: int) -> Image.Image:
    """Shift and disturb smoothly, more with ``amount``."""
    rng = np.random.default_rng(seed)
    array = np.asarray(image, float) / 255
    coarse = rng.normal(size=(array.shape[0] // 16, array.shape[1] // 16, 3))
    smooth = np.stack(
        [np.asarray(Image.fromarray(coarse[..., c]).resize(image.size, Image.Resampling.BICUBIC)) for c in range(3)], -1
    )
    moved = np.roll(array, int(amount * 60), axis=1)
    mixed = 0.6 * array + 0.4 * moved + smooth * amount + rng.normal(size=array.shape) * amount / 6
    return Image.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))


def synthetic(captions: int = 480, size: int = 128) -> tuple[Results, dict[str, list[Image.Image]], list[str]]:
    """Results, images and captions of a made-up benchmark."""
    rng = np.random.default_rng(0)
    truth = [scene(i, size) for i in range(len(CAPTIONS))]
    base_correct = rng.random(captions) < 0.868
    images = {"uncached": truth}

    def measured(noise: float, accuracy: float, seed: int) -> tuple[dict, list[Image.Image]]:
        pictures = [spoil(image, noise, seed * 100 + i) for i, image in enumerate(truth)]
        correct = base_correct.copy()
        lost = rng.choice(np.flatnonzero(base_correct), max(0, round((0.868 - accuracy) * captions)) + 4, False)
        won = rng.choice(np.flatnonzero(~base_correct), 4, False)
        correct[lost], correct[won] = False, True
        share = float(correct.mean())
        by_family = {name: float(correct[i::6].mean()) for i, name in enumerate(FAMILIES)}
        values = {
            "psnr": float(psnr(pictures, truth).mean()),
            "ssim": float(ssim(pictures, truth).mean()),
            "flip": float(flip(pictures, truth).mean()),
            "accuracy": share,
            "accuracy_interval": list(wilson_interval(int(correct.sum()), captions)),
            "accuracy_by_family": by_family,
            "accuracy_difference": share - float(base_correct.mean()),
            "accuracy_difference_interval": list(paired_interval(correct, base_correct)),
        }
        return values, pictures

    rows = [
        Row(
            method="uncached", full_steps=50, total_steps=50, flops_speedup=1.0, latency_speedup=1.0, psnr=math.inf,
            ssim=1.0, flip=0.0, accuracy=float(base_correct.mean()), strip="F" * 50, fidelity="baseline",
            accuracy_interval=list(wilson_interval(int(base_correct.sum()), captions)), peak_bytes=931 << 20,
            accuracy_by_family={name: float(base_correct[i::6].mean()) for i, name in enumerate(FAMILIES)},
            latency_ms=412.0, flops=48_200_000_000,
        )
    ]  # fmt: skip
    for n, noise, accuracy in FEWER_STEPS:
        values, images[f"fewer-steps-{n}"] = measured(noise, accuracy, n)
        rows.append(
            Row(
                method=f"fewer-steps-{n}", settings={"steps": n}, full_steps=n, total_steps=n,
                flops_speedup=50 / n, latency_speedup=50 / n * 0.99, strip="F" * n, fidelity="baseline",
                peak_bytes=931 << 20, latency_ms=412.0 * n / 50, **values,
            )
        )  # fmt: skip
    for seed, (name, (settings, flops, latency, noise, accuracy, cache, fidelity)) in enumerate(METHODS.items()):
        values, images[name] = measured(noise, accuracy, seed + 50)
        n = math.ceil(50 / flops)
        reference = min(
            (row for row in rows if row.kind == "fewer-steps" and row.total_steps >= min(n, 26)),
            key=lambda row: row.total_steps,
        )
        strip = STRIPS[name]
        error, errors = 0.0, []
        for letter in strip:
            error = error * 0.985 + (noise * 0.16 if letter == "c" else noise * 0.06 if letter == "p" else 0.0)
            errors.append(error + 1e-4)
        rows.append(
            Row(
                method=name, settings=settings, full_steps=strip.count("F"), total_steps=50, flops_speedup=flops,
                latency_speedup=latency, predicted_flops_speedup=flops * 1.01,
                predicted_latency_speedup=1 / (0.04 + 0.96 / (flops * 1.01)), strip=strip, fidelity=fidelity,
                cache_bytes=int(cache * 2**20), peak_bytes=int((931 + cache * 2) * 2**20), latency_ms=412.0 / latency,
                reference_row=reference.method, psnr_wins=min(1.0, 0.78 + 0.05 * flops),
                psnr_wins_interval=list(wilson_interval(round(captions * min(1.0, 0.78 + 0.05 * flops)), captions)),
                error_per_step=errors, syncs=0 if name != "dbcache" else 50, **values,
                notes=["coefficients not fitted to this denoiser"] if name == "teacache" else [],
            )
        )  # fmt: skip
    conditions = Conditions(
        denoiser="scenes-flux", steps=50, resolution=[128, 128], batch=16, captions=captions,
        seeds=list(range(1000, 1000 + captions)), dtype="float32", device="cpu", threads=1,
        scheduler="FlowMatchEulerDiscreteScheduler", guidance=3.5, peak_source="rss", counted=2,
        versions={"cache4diffusion": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
    )  # fmt: skip
    return Results(conditions=conditions, rows=rows), images, CAPTIONS
