"""A small pipeline, prompts for it, and calibrations made of them."""

import cache4diffusion as c4d
import toys
from cache4diffusion.calibration import Statistic, Training

STEPS = 6
CALL = {"height": 16, "width": 16, "guidance_scale": 1.0, "output_type": "latent"}
CALIBRATED = sorted(name for name, cls in c4d.METHODS.items() if cls.calibrator is not None)
TRAINED = [name for name in CALIBRATED if issubclass(c4d.METHODS[name].calibrator, Training)]
MEASURED = [name for name in CALIBRATED if issubclass(c4d.METHODS[name].calibrator, Statistic)]
BRIEF = {name: {"runs": 1} for name in TRAINED} | {"block-caching": {"runs": 1, "threshold": 0.8}}

OPTIONS = {"cachequant": {"unit": "span", "reach": 5}}  # of measurements on a transformer


def prompts(count, first=0):
    return [toys.prompt(seed=first + i) for i in range(count)]


def calibrated(pipe, method, count=2, first=0, steps=STEPS, **options):
    options = {"trial": 0, **OPTIONS.get(method, {}), **options}  # most tests are about the fit alone
    return c4d.calibrate(pipe, method, prompts(count, first), seeds=first, steps=steps, call=CALL, **options)
