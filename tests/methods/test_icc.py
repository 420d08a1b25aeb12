"""ICC: against linear layers that keep and correct themselves, factors against their formulas, and what is told."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.factors import SKETCH, LinearFactors, factors
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.errors import AnatomyError, CalibrationError, SettingError
from cache4diffusion.shapes import shape
from small_denoisers import accelerated, differences, dit, dit_inputs, flux, flux_inputs, sample

STEPS = 7


def linears(model):
    """Linear layers of attention and MLPs, by path: those of the modulation map the timestep."""
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in paths if "blocks." in name and ".norm" not in name]
    return {name: model.get_submodule(name) for name in inside}


class SlowLinear(nn.Module):
    """The card's pseudo-code: X and Y are stored at full steps, ``Y' = Y + A (B (x - X))`` at the others."""

    def __init__(self, linear, a, b, clock, period):
        super().__init__()
        self.linear, self.a, self.b, self.clock, self.period = linear, a, b, clock, period

    def forward(self, x):
        if self.clock["s"] % self.period == 0:
            self.x, self.y = x.clone(), self.linear(x)
            return self.y
        return self.y + (x - self.x) @ self.b.T @ self.a.T


def slow(model, inputs, fit, period, steps=STEPS):
    model, clock = copy.deepcopy(model), {"s": 0}
    for path, linear in linears(model).items():
        parent, _, name = path.rpartition(".")
        made = SlowLinear(linear, fit[f"{path}/0/a"].float(), fit[f"{path}/0/b"].float(), clock, period)
        setattr(model.get_submodule(parent), name, made)
    return sample(model, inputs, steps, before=lambda step: clock.update(s=step))


def by_hand(model, rank):
    """Plain singular value decompositions of a model's weights."""
    fit = {}
    for path, linear in linears(model).items():
        ones = [torch.ones(size) for size in linear.weight.shape]
        fit[f"{path}/0/a"], fit[f"{path}/0/b"] = factors(linear.weight.detach(), rank, *ones)
    return Calibration.by_hand("icc", STEPS, fit)


CASES = {"flux": (flux, flux_inputs), "dit": (dit, dit_inputs)}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, inputs = CASES[request.param]
    model = make()
    return model, inputs(2), sample(model, inputs(2), STEPS)


@pytest.mark.parametrize("period", [2, 3])
def test_every_step_equals_the_cards_pseudo_code(case, period):
    model, inputs, plain = case
    made = by_hand(model, 4)
    expected = slow(model, inputs, made.entry.fit, period)
    found, trace, stats = accelerated(model, inputs, STEPS, "icc", interval=period, calibration=made)
    assert trace.strip() == "".join("F" if s % period == 0 else "c" for s in range(STEPS))
    assert max(differences(found, expected)) < 1e-5
    assert max(differences(found, plain)) > 1e-3, "and it is an approximation"
    assert stats["syncs"] == 0


@pytest.mark.parametrize("period", [2, STEPS])
def test_full_rank_is_the_uncached_run_at_any_period(case, period):
    model, inputs, plain = case
    found, trace, _ = accelerated(model, inputs, STEPS, "icc", interval=period, calibration=by_hand(model, 999))
    assert "c" in trace.strip()
    assert max(differences(found, plain)) < 1e-5


def test_rank_0_is_reuse_of_linear_outputs_under_a_fresh_attention(case):
    model, inputs, plain = case
    found, _, _ = accelerated(model, inputs, STEPS, "icc", rank=0, calibration=by_hand(model, 4))
    reused, _, _ = accelerated(model, inputs, STEPS, "fora", gate="interval(interval=2)", site="linears")
    zeros = {name: torch.zeros_like(value) for name, value in by_hand(model, 4).entry.fit.items()}
    assert differences(found, reused) == [0.0] * STEPS
    assert max(differences(found, slow(model, inputs, zeros, 2))) < 1e-6
    parts, _, _ = accelerated(model, inputs, STEPS, "fora", gate="interval(interval=2)")
    assert differences(found, parts) == [0.0] * STEPS, "its projection's output is the old one"
    assert max(differences(found, plain)) > 1e-4


def test_a_lower_rank_takes_the_first_columns(case):
    model, inputs, _ = case
    few, _, _ = accelerated(model, inputs, STEPS, "icc", rank=2, calibration=by_hand(model, 8))
    made, _, _ = accelerated(model, inputs, STEPS, "icc", calibration=by_hand(model, 2))
    assert max(differences(few, made)) < 1e-6
    with pytest.raises(SettingError, match=r"rank=9.*has factors of rank 8.*--set rank=9"):
        c4d.method("icc", rank=9, calibration=by_hand(model, 8))


def test_bytes_are_those_of_inputs_outputs_and_factors(case):
    model, inputs, _ = case
    with c4d.accelerate(model, "icc", calibration=by_hand(model, 3)) as handle, handle.run(num_steps=STEPS):
        sample(model, inputs, STEPS)
        peak = handle.memory["peak"]
    counted, seen = 0, {}

    def note(path):
        return lambda module, args, output: seen.update({path: args[0].numel() + output.numel()})

    hooks = [module.register_forward_hook(note(path)) for path, module in linears(model).items()]
    sample(model, inputs, 1)
    for hook in hooks:
        hook.remove()
    for path, module in linears(model).items():
        counted += 4 * (seen[path] + 3 * sum(module.weight.shape))
    assert peak == counted


@pytest.mark.slow
def test_bytes_on_flux_dev_without_weights_or_a_calibration():
    """Per token: 12 widths in and out of a stream's 6 layers beside ... counted by hand, in bfloat16."""
    known, tokens, text, width, rank = shape("flux.1-dev"), 4096, 512, 3072, 128
    one = 4 * 2 + (1 + 4) + (4 + 1)  # q, k, v and the projection; the MLP's two
    single = 3 * 2 + (1 + 4) + (5 + 1)
    held = 2 * width * (tokens + text) * (19 * one + 38 * single)
    factor = 2 * rank * width * (19 * 2 * one + 38 * single)
    predicted = c4d.cache_bytes(known.denoiser(), "icc", inputs=known.calls(height=1024))
    assert abs(predicted - held - factor) < 0.01 * predicted


# -- factors -----------------------------------------------------------------------------------------------------------


def test_factors_are_the_cards_formula():
    g = torch.Generator().manual_seed(0)
    weight, left, right = torch.randn(6, 9, generator=g), torch.rand(6, generator=g) + 0.1, torch.rand(9, generator=g)
    right += 0.1
    a, b = factors(weight, 3, left, right)
    u, s, vh = torch.linalg.svd(torch.diag(left) @ weight @ torch.diag(right))
    torch.testing.assert_close(
        a @ b, torch.diag(left).inverse() @ u[:, :3] @ torch.diag(s[:3]) @ vh[:3] @ torch.diag(right).inverse()
    )
    best = left[:, None] * (weight - a @ b) * right
    plain_a, plain_b = factors(weight, 3, torch.ones(6), torch.ones(9))
    assert best.norm() < (left[:, None] * (weight - plain_a @ plain_b) * right).norm()


def test_channel_aware_with_weights_of_one_is_the_plain_decomposition():
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    a, b = factors(weight, 2, torch.ones(5), torch.ones(8))
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(a @ b, (u[:, :2] * s[:2]) @ vh[:2])


def test_all_of_the_rank_is_the_weight():
    weight = torch.randn(5, 8)
    a, b = factors(weight, 99, torch.rand(5) + 0.5, torch.rand(8) + 0.5)
    assert a.shape == (5, 5)
    torch.testing.assert_close(a @ b, weight, rtol=1e-4, atol=1e-5)


def observed(model, inputs, steps=4, **options):
    statistic = LinearFactors(**options)
    with Observer(model, statistic) as observer, observer.run(num_steps=steps):
        sample(model, inputs, steps)
    return observer.entries()["denoiser"], statistic


@pytest.mark.parametrize("source", ["magnitude", "increment", "none"])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_channel_sizes_are_those_of_plain_hooks(source, sides):
    model, inputs = flux(1, 1), flux_inputs(1)
    path, seen = "single_transformer_blocks.0.proj_out", []
    hook = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((args[0][0], out[0])))
    sample(model, inputs, 4)
    hook.remove()
    entry, _ = observed(model, inputs, source=source, sides=sides, rank=3, max_ratio=2.0)
    if source == "increment":
        seen = [(x - before, y - y_before) for (before, y_before), (x, y) in pairwise(seen)]
    scales = []
    for side in (1, 0):
        size = torch.stack([values[side].abs().mean(0) for values in seen]).mean(0).sqrt()
        size = size.clamp(size.max() / 2.0) + 1e-6
        is_used = source != "none" and sides in ("both", {1: "left", 0: "right"}[side])
        scales.append(size if is_used else torch.ones_like(size))
    a, b = factors(model.get_submodule(path).weight, 3, *scales)
    torch.testing.assert_close(entry.fit[f"{path}/0/a"] @ entry.fit[f"{path}/0/b"], a @ b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 8])
def test_the_verdict_is_the_share_of_the_change_that_the_factors_explain(rank):
    """Of the random projection, which comes close to the share itself."""
    model, inputs = flux(1, 1), flux_inputs(1)
    before, true = {}, {}

    def note(path):
        def hook(module, args, output):
            x = args[0].flatten(0, 1)
            if path in before:
                true.setdefault(path, []).append(x - before[path])
            before[path] = x.clone()

        return hook

    hooks = [module.register_forward_hook(note(path)) for path, module in linears(model).items()]
    entry, _ = observed(model, inputs, rank=rank)
    for hook in hooks:
        hook.remove()
    shares = []
    for path, module in linears(model).items():
        d, a, b = torch.cat(true[path]), entry.fit[f"{path}/0/a"], entry.fit[f"{path}/0/b"]
        shares.append(float((d @ (module.weight - a @ b).T).square().sum() / (d @ module.weight.T).square().sum()))
    assert entry.quality.count == len(shares)
    assert entry.quality.r2 == pytest.approx(1 - sum(shares) / len(shares), abs=3 / SKETCH)
    assert "the change of what leaves it" in entry.quality.verdict


def test_sums_are_small_and_factors_are_kept_in_float32(tmp_path):
    model, inputs = flux(1, 1), flux_inputs(1)
    entry, statistic = observed(model, inputs, rank=2)
    assert all(value.dtype == torch.float32 for value in entry.fit.values())
    widest = max(max(module.weight.shape) for module in linears(model).values())
    assert max(value.numel() for value in entry.sums.values()) <= SKETCH * widest, "no weight among them"
    with pytest.raises(CalibrationError, match="made from the denoiser's weights"):
        statistic.fit(entry.sums)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_without_a_calibration_the_command_is_named():
    with pytest.raises(CalibrationError, match="c4d calibrate MODEL --method icc"):
        c4d.accelerate(flux(1, 1), "icc")


def test_factors_of_another_denoiser_are_refused():
    model, inputs = flux(1, 1), flux_inputs(1)
    made = by_hand(model, 2).entry.fit
    fit = {name: value[..., :-1] if name.endswith("/b") else value for name, value in made.items()}
    with pytest.raises(CalibrationError, match=r"a tensor \[2, 31\] .* \[any, 32\] is needed"):
        accelerated(model, inputs, 3, "icc", calibration=Calibration.by_hand("icc", 3, fit))
    fit = {f"elsewhere.{name}": value for name, value in made.items()}
    with pytest.raises(AnatomyError, match="numbers for none of the sites"):
        accelerated(model, inputs, 3, "icc", calibration=Calibration.by_hand("icc", 3, fit))


def test_layers_without_factors_always_run():
    model, inputs = flux(1, 1), flux_inputs(1)
    fit = {name: value for name, value in by_hand(model, 1).entry.fit.items() if "ff" not in name}
    counts = {}

    def count(path):
        return lambda module, args, output: counts.update({path: counts.get(path, 0) + 1})

    hooks = [module.register_forward_hook(count(path)) for path, module in linears(model).items()]
    _, trace, _ = accelerated(model, inputs, 6, "icc", calibration=Calibration.by_hand("icc", 6, fit))
    for hook in hooks:
        hook.remove()
    assert any("no numbers for 4 sites" in note for note in trace.notes)
    assert counts["transformer_blocks.0.ff.net.2"] == 6


@pytest.mark.parametrize("bad", [{"rank": 0}, {"max_ratio": 0.5}, {"source": "fisher"}])
def test_wrong_options_are_refused(bad):
    with pytest.raises(SettingError, match=next(iter(bad))):
        LinearFactors(**bad)
