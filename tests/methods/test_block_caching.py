"""Block Caching: the card's schedule, its scale and shift while sampling and in training, against slow references."""

from itertools import pairwise

import pytest
import torch
from slow_training import adam, train, update

import cache4diffusion as c4d
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.observer import Observer
from cache4diffusion.calibration.scale_shift import ScaleShift as Trained
from cache4diffusion.calibration.scale_shift import StepChanges
from cache4diffusion.errors import AnatomyError, CalibrationError, SettingError
from cache4diffusion.gates import accumulated_steps
from cache4diffusion.predictors import Reuse, ScaleShift
from small_denoisers import (
    Plainly,
    SlowFlux,
    accelerated,
    differences,
    flux_inputs,
    sample,
    unet,
    unet_inputs,
)

STEPS, BLOCKS, WIDTH = 8, 5, 32


def changes(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"change block.{i}": 0.2 * torch.rand(STEPS, generator=g) for i in range(BLOCKS)}


def leaves_of(block):
    """The last block's text is read by nobody."""
    return 1 if block == BLOCKS - 1 else 2


def mending(seed=1):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for block in range(BLOCKS):
        for leaf in range(leaves_of(block)):
            found[f"scale block.{block} {leaf}"] = 1 + 0.3 * torch.randn(STEPS, WIDTH, generator=g)
            found[f"shift block.{block} {leaf}"] = 0.1 * torch.randn(STEPS, WIDTH, generator=g)
    return found


def by_hand(fit, threshold=0.15, **options):
    return Calibration.by_hand("block-caching", STEPS, fit, threshold=threshold, **options)


# -- the schedule ------------------------------------------------------------------------------------------------------


def slow_schedule(curve, delta):
    """The card's pseudo-code."""
    computed, acc = [0], 0.0
    for i in range(1, len(curve)):
        acc += curve[i]
        if acc <= delta:
            continue
        computed.append(i)
        acc = 0.0
    return tuple(computed)


@pytest.mark.parametrize("seed", range(10))
def test_the_schedule_is_the_cards(seed):
    curve = torch.rand(30, generator=torch.Generator().manual_seed(seed)).tolist()
    for delta in (0.1, 0.9, 3.0, 1e9):
        assert accumulated_steps(curve, delta) == slow_schedule(curve, delta)


def test_threshold_0_never_caches_and_an_endless_one_computes_only_the_first_step():
    assert accumulated_steps([0.0, 0.1, 0.2, 0.0], 0.0) == (0, 1, 2, 3)
    assert accumulated_steps([0.0, 0.1, 0.2, 0.0], float("inf")) == (0,)


@pytest.mark.parametrize(("c", "delta"), [(0.25, 0.5), (0.25, 0.6), (0.125, 0.1), (0.5, 2.0)])
def test_a_constant_change_gives_the_cards_lifetime(c, delta):
    steps = accumulated_steps([c] * 40, delta)
    assert {b - a for a, b in pairwise(steps)} == {int(delta / c) + 1}


def test_a_larger_threshold_never_computes_more_often():
    curve = torch.rand(40, generator=torch.Generator().manual_seed(3)).tolist()
    counts = [len(accumulated_steps(curve, delta / 10)) for delta in range(40)]
    assert counts == sorted(counts, reverse=True)


def test_changes_are_the_cards_by_plain_hooks(model):
    kept = {i: [] for i in range(BLOCKS)}
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]

    def keep(i):
        def hook(module, args, kwargs, output):
            text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
            residuals = [output[1] - image, output[0] - text]
            kept[i].append([r.clone() for r in residuals[: leaves_of(i)]])

        return hook

    hooks = [block.register_forward_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
    sample(model, flux_inputs(2), 6)
    for hook in hooks:
        hook.remove()
    with Observer(model, StepChanges()) as observer, observer.run(num_steps=6):
        sample(model, flux_inputs(2), 6)
    fit = observer.entries()["denoiser"].fit
    assert len(fit) == BLOCKS
    for i, steps in kept.items():
        curve = fit[f"change block.{i}"]
        assert float(curve[0]) == 0.0
        for s in range(1, 6):
            pairs = list(zip(steps[s], steps[s - 1], strict=True))
            r = sum((now - then).abs().sum() for now, then in pairs) / sum(now.abs().sum() for now, _ in pairs)
            assert float(curve[s]) == pytest.approx(float(r), rel=1e-4)


# -- while sampling ----------------------------------------------------------------------------------------------------


class BlockByBlock(SlowFlux):
    """Every block has its full steps; on others it adds ``a * C + d``."""

    def __init__(self, model, full, mend):
        super().__init__(model, Plainly())
        self.full, self.mend, self.kept = full, mend, {}

    def through(self, image, text, temb, rope):
        for number, block in enumerate(self.blocks()):
            if self.step in self.full[number]:
                new_image, new_text = block(image, text, temb, rope)
                self.kept[number] = [(new_image - image).detach(), (new_text - text).detach()]
                image, text = new_image, new_text
            else:
                added = self.mend(number, self.step, self.kept[number])
                image, text = image + added[0], text + added[1]
        return image, text


def plainly(number, step, kept):
    return kept


@pytest.mark.parametrize("is_mended", [False, True])
def test_every_block_follows_its_schedule_and_is_scaled_and_shifted(model, is_mended):
    curves, tables = changes(), mending()
    full = {i: accumulated_steps(curves[f"change block.{i}"].tolist(), 0.15) for i in range(BLOCKS)}
    assert len(set(full.values())) > 2, "blocks differ"

    def mend(number, step, kept):
        return [
            tables[f"scale block.{number} {leaf}"][step] * kept[leaf] + tables[f"shift block.{number} {leaf}"][step]
            if leaf < leaves_of(number)
            else kept[leaf]
            for leaf in (0, 1)
        ]

    slow = BlockByBlock(model, full, mend if is_mended else plainly)
    expected = sample(slow, flux_inputs(2), STEPS)
    calibration = by_hand({**curves, **(tables if is_mended else {})})
    reached, trace, stats = accelerated(model, flux_inputs(2), STEPS, "block-caching", calibration=calibration)
    assert max(differences(reached, expected)) <= 1e-5
    assert "m" in trace.strip() and trace.strip()[0] == "F"
    assert stats["syncs"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_1_and_a_shift_of_0_are_plain_reuse_bit_for_bit(dtype):
    feature = [torch.randn(2, 3, 4).to(dtype), torch.randn(2, 5, 4).to(dtype)]
    table = (torch.ones(6, 4, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64))
    predictor = ScaleShift({"block.0": (table, table)})
    state, plain = predictor.init_at("block.0", None), Reuse().init(None)
    predictor.update(state, feature, 1.0)
    Reuse().update(plain, feature, 1.0)
    for mine, theirs in zip(predictor.predict(state, 3.0), Reuse().predict(plain, 3.0), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == dtype


def test_each_step_and_site_has_numbers_of_its_own():
    table = (torch.arange(1.0, 7.0)[:, None].expand(6, 2), torch.full((6, 2), 0.5))
    predictor = ScaleShift({"a": (table,)})
    states = {site: predictor.init_at(site, 2) for site in "ab"}
    for state in states.values():
        predictor.update(state, [torch.ones(2, 3, 2)], 0.0)
    assert predictor.predict(states["a"], 2.0)[0].unique().tolist() == [3.5]
    assert predictor.predict(states["a"], 4.0, [1])[0].unique().tolist() == [5.5]
    assert predictor.predict(states["a"], 0.0)[0].unique().tolist() == [1.0], "the full step itself"
    assert predictor.predict(states["b"], 2.0)[0].unique().tolist() == [1.0]


def test_a_feature_of_another_step_than_the_schedules_is_reused_as_it_is():
    """Guidance that ends early, or a prediction that was not finite, has a step computed that the schedule caches."""
    table = (torch.full((6, 2), 3.0), torch.zeros(6, 2))
    predictor = ScaleShift({"a": (table,)}, {"a": (0, 3)})
    state = predictor.init_at("a", None)
    found = []
    for computed, asked in ((0.0, 1.0), (0.0, 2.0), (1.0, 2.0), (3.0, 4.0), (3.0, 5.0), (4.0, 5.0)):
        predictor.update(state, [torch.ones(2, 3, 2)], computed)
        found += predictor.predict(state, asked)[0].unique().tolist()
    assert found == [3.0, 3.0, 1.0, 3.0, 3.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_branches_hold_numbers_of_their_own_as_the_ledger_counts_them(dtype):
    table = (torch.ones(6, 4, dtype=dtype), torch.zeros(6, 4, dtype=dtype))
    predictor = ScaleShift({"a": (table,)})
    states = [predictor.init_at("a", None) for _ in range(2)]
    for _ in range(2):
        for state in states:
            predictor.update(state, [torch.randn(2, 3, 4)], 1.0)
    tensors = [tensor for state in states for tensor in state.tensors()]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(held.values()) == sum(tensor.nbytes for tensor in tensors)
    assert not held.keys() & {tensor.untyped_storage().data_ptr() for tensor in table}


def test_threshold_0_is_bit_equal_also_with_scale_and_shift(model):
    calibration = by_hand({**changes(), **mending()})
    reached, trace, _ = accelerated(
        model, flux_inputs(1), STEPS, "block-caching", calibration=calibration, threshold=0.0
    )
    assert trace.strip() == "F" * STEPS
    assert differences(reached, sample(model, flux_inputs(1), STEPS)) == [0.0] * STEPS


def test_scale_and_shift_belong_to_one_schedule_and_to_its_steps():
    calibration = by_hand({**changes(), **mending()})
    with pytest.raises(SettingError, match=r"trained for the schedule of threshold 0\.15\. Calibrate with --set"):
        c4d.method("block-caching", calibration=calibration, threshold=0.2)
    with pytest.raises(SettingError, match=r"resample=True.*give scale_shift=False"):
        c4d.method("block-caching", calibration=calibration, resample=True)
    other = c4d.method("block-caching", calibration=calibration, threshold=0.2, scale_shift=False).compose()
    assert other.predictor == Reuse()


def test_another_number_of_steps_is_refused_unless_resampling_is_asked_for(model):
    calibration = by_hand(changes())
    with pytest.raises(CalibrationError, match=r"calibrated for 8 steps, and the run has 4 steps\. .*resample=True"):
        accelerated(model, flux_inputs(1), 4, "block-caching", calibration=calibration)
    _, trace, _ = accelerated(
        model, flux_inputs(1), 4, "block-caching", calibration=calibration, resample=True, scale_shift=False
    )
    assert len(trace.strip()) == 4


# -- what is trained ---------------------------------------------------------------------------------------------------


def slow_training(model, full, steps, runs, rate):
    """The card: the student caches along the fixed schedule, on the teacher's trajectory; L2 between their outputs."""
    a, d = (
        {
            (s, b, leaf): torch.full((WIDTH,), value, requires_grad=True)
            for s in range(steps)
            for b in range(BLOCKS)
            for leaf in range(leaves_of(b))
            if s not in full[b]
        }
        for value in (1.0, 0.0)
    )

    def mend(number, step, kept):
        return [
            a[step, number, leaf] * kept[leaf] + d[step, number, leaf] if leaf < leaves_of(number) else kept[leaf]
            for leaf in (0, 1)
        ]

    optimizers = {
        s: adam([numbers[key] for numbers in (a, d) for key in numbers if key[0] == s], rate)
        for s in {key[0] for key in a}
    }
    teacher, student = SlowFlux(model, Plainly()), BlockByBlock(model, full, mend)
    for run in range(runs):
        inputs = flux_inputs(1, seed=run)
        x = inputs["hidden_states"]
        student.step = -1
        for s in range(steps):
            call = {**inputs, "hidden_states": x, "timestep": torch.full((1,), 1 - s / steps)}
            with torch.no_grad():
                target = teacher(**call)[0]
            out = student(**call)[0]
            if s in optimizers:
                update(optimizers[s], ((target - out) ** 2).mean(), [])
            x = x - target / steps
    return a, d


def test_scale_and_shift_are_trained_as_the_card_says(model):
    steps, threshold = 5, 0.15
    curves = {name: curve[:steps] for name, curve in changes(2).items()}
    full = {i: accumulated_steps(curves[f"change block.{i}"].tolist(), threshold) for i in range(BLOCKS)}
    entry = train(model, Trained(runs=4, rate=0.01, threshold=threshold), steps, measured=curves)
    a, d = slow_training(model, full, steps, 4, 0.01)
    assert any(float((value.detach() - 1).abs().max()) > 0.02 for value in a.values()), "something was learned"
    for word, numbers, neutral in (("scale", a, 1.0), ("shift", d, 0.0)):
        for block in range(BLOCKS):
            for leaf in range(leaves_of(block)):
                row = entry.fit.get(f"{word} block.{block} {leaf}")
                for s in range(steps):
                    if s in full[block]:
                        assert row is None or bool((row[s] == neutral).all())
                    else:
                        torch.testing.assert_close(
                            row[s].float(), numbers[s, block, leaf].detach(), rtol=1e-4, atol=1e-4
                        )
    assert all(torch.equal(entry.fit[name], curve.double()) for name, curve in curves.items())


def test_training_takes_from_the_error_and_says_how_much(model):
    curves = {f"change block.{i}": torch.full((4,), 0.04) for i in range(BLOCKS)}
    entry = train(model, Trained(runs=40, rate=0.01), 4, measured=curves)
    assert float(entry.sums["sampled"]) < float(entry.sums["plain"])
    share = 1 - float(entry.sums["sampled"]) / float(entry.sums["plain"])
    assert f"scale and shift take {share:.0%} from the error of plain reuse" in entry.quality.verdict
    assert "100% of the blocks are" in entry.quality.verdict


def test_a_schedule_that_caches_nothing_is_refused_with_what_to_do(model):
    curves = {f"change block.{i}": torch.full((4,), 9.0) for i in range(BLOCKS)}
    with pytest.raises(CalibrationError, match="every block is computed at every step: use a larger one"):
        train(model, Trained(runs=1), 4, measured=curves)


# -- U-Nets ------------------------------------------------------------------------------------------------------------


def test_on_a_unet_the_parts_of_its_transformer_blocks_are_cached():
    levels, steps = unet(), 5
    with Observer(levels, StepChanges(unit="part")) as observer, observer.run(num_steps=steps):
        sample(levels, unet_inputs(1), steps)
    curves = dict(observer.entries()["denoiser"].fit)
    assert any("attentions.0.transformer_blocks.0.attn2" in name for name in curves)
    fit = {name: torch.full((steps,), 0.04, dtype=torch.float64) for name in curves}
    calibration = Calibration.by_hand("block-caching", steps, fit, unit="part")
    reached, trace, _ = accelerated(levels, unet_inputs(1), steps, "block-caching", calibration=calibration)
    fora, _, _ = accelerated(levels, unet_inputs(1), steps, "fora", interval=3)
    assert trace.strip() == "FccFc"
    assert differences(reached, fora) == [0.0] * steps


def test_a_unet_has_no_stack_of_blocks_and_is_told_to_take_its_transformers():
    levels = unet()
    with (
        pytest.raises(AnatomyError, match=r"'block-caching' .*unit='transformer'"),
        Observer(levels, StepChanges()) as observer,
        observer.run(num_steps=4),
    ):
        sample(levels, unet_inputs(1), 4)
