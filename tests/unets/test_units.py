"""What is cached on a U-Net's maps: whole transformers, and the first convolutions of ResNet blocks."""

import copy

import pytest
import torch
from unet_zoo import CASES, call, counting, inputs, sd_like, sdxl_like, unconditional

import cache4diffusion as c4d
from cache4diffusion import anatomy
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.scale_shift import ScaleShift as Trained
from cache4diffusion.calibration.scale_shift import StepChanges
from cache4diffusion.calibration.trainer import Trainer
from cache4diffusion.errors import SettingError
from cache4diffusion.sites import GatedParts, Linears, Parts
from cache4diffusion.zoo import tiny
from cache4diffusion.zoo.unets import UNETS
from small_denoisers import accelerated, differences, sample, unet, unet_inputs

STEPS = 9
OF_OTHER_BUILD = ("StableCascadeUNet", "UNet1DModel", "UVit2DModel")  # without levels, or without such blocks
ON_MAPS = "parts(kinds=['transformer', 'conv'])"


def cases_but(*quick):
    """All cases; those not named are slow."""
    return pytest.mark.parametrize(
        "case", [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
    )


def modules(denoiser, ending):
    """Paths of the modules that are called so, of one class."""
    return [path for path, module in denoiser.named_modules() if type(module).__name__ == ending]


def transformers(denoiser):
    return modules(denoiser, "Transformer2DModel")


def first_convolutions(denoiser):
    return [f"{path}.conv1" for path in modules(denoiser, "ResnetBlock2D")]


def observed(denoiser, given):
    return anatomy.observe(denoiser, (), given).unet


def video():
    """Stable Video Diffusion's, and the arguments of a call."""
    denoiser, _, given = tiny("UNetSpatioTemporalConditionModel").make(batch=1)
    return denoiser, given


# -- what is found -----------------------------------------------------------------------------------------------------


@cases_but("sd", "unconditional")
def test_units_are_the_transformers_and_the_resnets_first_convolutions(case):
    make, kind = CASES[case]
    denoiser = make()
    units = observed(denoiser, inputs(kind)).units
    found = {kind: {unit.path for unit in units if unit.kind == kind} for kind in ("transformer", "conv")}
    assert found["transformer"] == set(transformers(denoiser))
    assert found["conv"] == set(first_convolutions(denoiser))
    assert bool(found["transformer"]) == (case != "unconditional")
    assert all(unit.adds_to == (0,) for unit in units if unit.kind == "transformer")
    norms = {inner.path for unit in units for inner in unit.inner}
    assert norms == {path.replace("conv1", "norm1") for path in found["conv"]}


@pytest.mark.slow
def test_video_u_nets_have_transformers_over_space_and_time():
    denoiser, given = video()
    units = observed(denoiser, given).units
    whole = {unit.path for unit in units if unit.kind == "transformer"}
    assert whole == set(modules(denoiser, "TransformerSpatioTemporalModel"))
    blocks = modules(denoiser, "ResnetBlock2D") + modules(denoiser, "TemporalResnetBlock")
    assert {unit.path for unit in units if unit.kind == "conv"} == {f"{path}.conv1" for path in blocks}


# -- off, and a frozen input -------------------------------------------------------------------------------------------


@cases_but("sd", "controlnet", "unconditional")
def test_units_are_off_when_off_and_exact_on_a_frozen_input(case):
    make, kind = CASES[case]
    denoiser = make()
    plain, frozen = [call(denoiser, inputs(kind, step=i)) for i in range(2)], inputs(kind)
    with c4d.accelerate(denoiser, "fora", interval=1, site=ON_MAPS) as handle:
        for i, expected in enumerate(plain):
            assert torch.equal(call(denoiser, inputs(kind, step=i)), expected)
        assert handle.memory["held"] > 0
    inside = (*[f"{path}." for path in transformers(denoiser)],)
    rest = {path.replace("conv1", "norm1") for path in first_convolutions(denoiser)}
    with c4d.accelerate(denoiser, "fora", interval=3, site=ON_MAPS) as handle:
        for _ in range(3):
            with counting(denoiser) as ran:
                output = call(denoiser, frozen)
            torch.testing.assert_close(output, plain[0], rtol=1e-5, atol=1e-6)
        assert handle.trace.strip() == "Fcc"
    conv = first_convolutions(denoiser)[0]
    assert ran[conv.replace("conv1", "conv2")] == 1, "the rest of a ResNet block runs"
    if inside:  # a unit is called still, but nothing inside of it runs
        assert not any(path.startswith(inside) for path in ran)
    with c4d.accelerate(denoiser, "fora", interval=3, site=ON_MAPS) as handle:
        call(denoiser, inputs(kind))
        assert rest | set(transformers(denoiser)) <= {*handle._engines[0].attachment.bypassed}


@pytest.mark.slow
@pytest.mark.parametrize("name", [tiny.kind for tiny in UNETS if tiny.kind not in OF_OTHER_BUILD])
@torch.no_grad()
def test_units_of_every_u_net_of_diffusers_are_exact_on_a_frozen_input(name):
    denoiser, _, given = tiny(name).make(batch=1)
    assert observed(denoiser, given).units
    plain = denoiser(**given)[0]
    with c4d.accelerate(denoiser, "fora", interval=3, site=ON_MAPS) as handle:
        for _ in range(3):
            torch.testing.assert_close(denoiser(**given)[0], plain, rtol=1e-4, atol=1e-5)
        assert handle.trace.strip() == "Fcc"


def test_a_norm_that_feeds_a_predicted_convolution_never_runs():
    denoiser, ran = unconditional(), []
    for path in modules(denoiser, "ResnetBlock2D"):
        norm = denoiser.get_submodule(f"{path}.norm1")
        norm.register_forward_hook(lambda module, args, output: ran.append(output.shape[-1]))
    frozen = inputs("unconditional")
    with c4d.accelerate(denoiser, "fora", interval=2, site=ON_MAPS):
        call(denoiser, frozen)
        full = len(ran)
        assert torch.isfinite(call(denoiser, frozen)).all()
    assert full == len(first_convolutions(denoiser))
    assert ran[full:] == [1] * full, "a placeholder of one place"


@pytest.mark.slow
@pytest.mark.parametrize("predictor", ["reuse", "taylor(order=1)"])
def test_units_inside_compiled_modules_are_cached_alike(predictor):
    denoiser, settings = unet(), {"interval": 3, "site": ON_MAPS, "predictor": predictor}
    expected = accelerated(denoiser, unet_inputs(1), STEPS, "fora", **settings)[0]
    for path in (*transformers(denoiser), *modules(denoiser, "ResnetBlock2D")):
        denoiser.get_submodule(path).compile(backend="eager")
    reached, trace, _ = accelerated(denoiser, unet_inputs(1), STEPS, "fora", **settings)
    assert trace.strip() == "FccFccFcc"
    assert max(differences(reached, expected)) <= 1e-6


def test_parts_inside_a_cached_transformer_are_left_alone():
    denoiser = sd_like()
    with c4d.accelerate(denoiser, "fora", site="parts(kinds=['attn', 'ffn', 'transformer'])") as handle:
        call(denoiser, inputs())
        assert sorted(handle._engines[0].attachment.bypassed) == sorted(transformers(denoiser))


@pytest.mark.parametrize("site", [GatedParts, Linears])
def test_sites_inside_of_parts_refuse_kinds_of_maps(site):
    with pytest.raises(
        SettingError, match=r"kinds=\('transformer',\)\): use one or more of attn, cross_attn, .*other\."
    ):
        site(kinds=("transformer",))
    assert Parts(("transformer", "conv")).kinds == ("transformer", "conv")


# -- FRDiff ------------------------------------------------------------------------------------------------------------


class SlowUNet:
    """A U-Net whose units are handed to ``unit(path, compute)``: a transformer's sum, or a convolution's output."""

    def __init__(self, denoiser):
        self.model, self.step = copy.deepcopy(denoiser), -1
        for path in transformers(self.model):
            self._replace(path, self._around_transformer)
        for path in first_convolutions(self.model):
            self._replace(path, self._around_convolution)

    def _replace(self, path, around):
        module = self.model.get_submodule(path)
        module.forward = around(path, module.forward)

    def _around_transformer(self, path, forward):
        def around(x, **kwargs):
            return (x + self.unit(path, lambda: forward(x, **kwargs)[0] - x),)

        return around

    def _around_convolution(self, path, forward):
        return lambda x: self.unit(path, lambda: forward(x))

    def unit(self, path, compute):
        return compute()

    def __call__(self, **kwargs):
        self.step += 1
        return self.model(**kwargs)


class SlowFRDiff(SlowUNet):
    """The card: at ``K = {0, M, 2M, ...}`` everything runs; else units are reused and mixed with the last output."""

    def __init__(self, denoiser, interval, bias, steps):
        super().__init__(denoiser)
        self.interval, self.bias, self.steps, self.kept, self.weights = interval, bias, steps, {}, set()

    def unit(self, path, compute):
        if self.step % self.interval == 0:
            self.kept[path] = compute()
        return self.kept[path]

    def __call__(self, **kwargs):
        out = super().__call__(**kwargs)[0]
        if self.step % self.interval == 0:
            self.jump = out
            return (out,)
        lam = min(max((30 * (self.step / self.steps - self.bias) + 2) / 4, 0), 1)
        self.weights.add(lam)
        return (lam * out + (1 - lam) * self.jump,)


@pytest.mark.parametrize("interval", [2, 3])
def test_frdiff_on_a_u_net_is_the_cards(interval):
    """40 steps, so that the ramp has cached steps on it."""
    denoiser, steps = unet(), 40
    reference = SlowFRDiff(denoiser, interval, 0.5, steps)
    expected = sample(reference, unet_inputs(2), steps)
    assert {0, 1} < reference.weights, "held, mixed and reused"
    reached, trace, stats = accelerated(denoiser, unet_inputs(2), steps, "frdiff", interval=interval)
    assert trace.strip() == ("F" + "c" * (interval - 1)) * (steps // interval) + "F" * (steps % interval > 0)
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0


@pytest.mark.parametrize(("make", "kind"), [(sdxl_like, "sdxl"), (unconditional, "unconditional")])
def test_frdiff_with_interval_1_is_bit_equal_on_u_nets(make, kind):
    denoiser = make()
    plain = [call(denoiser, inputs(kind, step=i)) for i in range(4)]
    with c4d.accelerate(denoiser, "frdiff", interval=1) as handle, handle.run(num_steps=4):
        assert all(torch.equal(call(denoiser, inputs(kind, step=i)), plain[i]) for i in range(4))


@torch.no_grad()
def test_frdiff_runs_on_video_u_nets():
    denoiser, given = video()
    plain = denoiser(**given).sample
    with c4d.accelerate(denoiser, "frdiff", bias=-0.5) as handle, handle.run(num_steps=4):
        for step in range(4):
            output = denoiser(**{**given, "timestep": given["timestep"] - step}).sample
            assert output.isfinite().all()
            assert step or torch.equal(output, plain)
        assert handle.trace.strip() == "FcFc"


# -- Block Caching -----------------------------------------------------------------------------------------------------


class SlowBlocks(SlowUNet):
    """Every transformer has its full steps; at others ``a * C + d`` per channel. Convolutions run."""

    def __init__(self, denoiser, full, tables=None):
        super().__init__(denoiser)
        self.full, self.tables, self.kept, self.seen = full, tables or {}, {}, {}

    def unit(self, path, compute):
        if path.endswith("conv1"):
            return compute()
        if self.step in self.full.get(path, range(1000)):
            self.kept[path] = compute()
            self.seen.setdefault(path, []).append(self.kept[path].clone())
            return self.kept[path]
        if path not in self.tables:
            return self.kept[path]
        a, d = (table[self.step][None, :, None, None] for table in self.tables[path])
        return a * self.kept[path] + d


def test_changes_of_transformers_are_those_of_what_they_add():
    denoiser = unet()
    slow = SlowBlocks(denoiser, {})
    sample(slow, unet_inputs(2), STEPS)
    with Observer(denoiser, StepChanges(unit="transformer")) as observer, observer.run(num_steps=STEPS):
        sample(denoiser, unet_inputs(2), STEPS)
    fit = observer.entries()["denoiser"].fit
    assert set(fit) == {f"change {path}" for path in transformers(denoiser)}
    for path, steps in slow.seen.items():
        for s in range(1, STEPS):
            r = (steps[s] - steps[s - 1]).abs().sum() / steps[s].abs().sum()
            assert float(fit[f"change {path}"][s]) == pytest.approx(float(r), rel=1e-3)


@pytest.mark.parametrize("is_mended", [False, True])
def test_every_transformer_follows_its_schedule_and_is_scaled_and_shifted_per_channel(is_mended):
    denoiser, generator = unet(), torch.Generator().manual_seed(2)
    fit, full, tables = {}, {}, {}
    for number, path in enumerate(transformers(denoiser)):
        change = 0.04 * (number + 1)
        fit[f"change {path}"] = torch.full((STEPS,), change, dtype=torch.float64)
        full[path] = list(range(0, STEPS, int(0.15 / change) + 1))
        if is_mended:
            width = denoiser.get_submodule(path).norm.num_channels
            a, d = (1 + 0.3 * torch.randn(STEPS, width, generator=generator) for _ in range(2))
            tables[path] = (a, d - 1)
            fit |= {f"scale {path} 0": a, f"shift {path} 0": d - 1}
    assert len({len(steps) for steps in full.values()}) > 1, "transformers differ"
    expected = sample(SlowBlocks(denoiser, full, tables), unet_inputs(2), STEPS)
    calibration = Calibration.by_hand("block-caching", STEPS, fit, threshold=0.15, unit="transformer")
    reached, _, stats = accelerated(denoiser, unet_inputs(2), STEPS, "block-caching", calibration=calibration)
    assert max(differences(reached, expected)) <= 1e-5
    assert stats["syncs"] == 0
    off = accelerated(denoiser, unet_inputs(2), STEPS, "block-caching", calibration=calibration, threshold=0.0)[0]
    assert differences(off, sample(denoiser, unet_inputs(2), STEPS)) == [0.0] * STEPS


def test_training_on_transformers_takes_from_the_error_and_learns_a_number_per_channel():
    denoiser, steps = unet(), 4
    paths = transformers(denoiser)
    training = Trained(runs=15, rate=0.02, threshold=0.15, unit="transformer")
    measured = {f"change {path}": torch.full((steps,), 0.04) for path in paths}
    plain = sample(denoiser, unet_inputs(1), steps)

    def run():
        with trainer.run(num_steps=steps):
            return sample(denoiser, unet_inputs(1), steps)[-1]

    with Trainer(denoiser, training, 0, {"denoiser": measured}) as trainer:
        trainer.look(run)
        for number in range(training.runs):
            trainer.teach(number, run)
        entry = trainer.entries()["denoiser"]
    assert float(entry.sums["sampled"]) < float(entry.sums["plain"])
    for path in paths:
        assert entry.fit[f"scale {path} 0"].shape == (steps, denoiser.get_submodule(path).norm.num_channels)
    assert differences(sample(denoiser, unet_inputs(1), steps), plain) == [0.0] * steps, "the denoiser is as it was"
