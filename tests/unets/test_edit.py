"""FISEdit: an edit computes where the picture changes, and takes everything else from the recorded run."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from test_pipelines import pipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from unet_zoo import sd_like

import cache4diffusion as c4d
from cache4diffusion.edit import masks, recording, sparse
from cache4diffusion.edit.sparse import Moments, Places
from cache4diffusion.errors import AlreadyAcceleratedError, AnatomyError, RunError, SettingError

SIDE, STEPS = 16, 5
CALL = {
    "prompt": "a red circle",
    "negative_prompt": "a background",
    "num_inference_steps": STEPS,
    "height": SIDE,
    "width": SIDE,
    "output_type": "latent",
}
NEW = {"prompt": "a blue star on a red background"}
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@pytest.fixture
def pipe():
    return made()


def made(scheduler=DDIMScheduler, **changes):
    return pipeline(scheduler=scheduler, unet=sd_like(down_block_types=DOWN, up_block_types=UP, **changes))


def noise():
    return torch.Generator().manual_seed(3)


def corner(side=8, of=SIDE):
    mask = torch.zeros(of, of, dtype=torch.bool)
    mask[:side, :side] = True
    return mask


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0), (3, 0), (5, 2)])
@pytest.mark.parametrize("size", [(8, 12), (9, 8)])
def test_tiles_with_their_halo_equal_the_dense_convolution(stride, kernel, padding, size):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, kernel, stride, padding), rand(2, 3, *size)
    dense = conv(x)
    mask = torch.rand(dense.shape[-2:], generator=torch.Generator().manual_seed(1)) < 0.2
    places, old = Places.of(mask), rand(*dense.shape, seed=2)
    found = sparse.conv2d(conv, x, old, places)
    tiles = torch.zeros_like(mask)
    for row, column in zip(places.rows.tolist(), places.columns.tolist(), strict=True):
        side = places.side
        tiles[row * side : (row + 1) * side, column * side : (column + 1) * side] = True
    assert tiles[mask].all()
    assert not tiles.all()
    torch.testing.assert_close(found[..., tiles], dense[..., tiles])
    assert torch.equal(found[..., ~tiles], old[..., ~tiles])


def test_tokens_and_queries_of_the_mask_alone():
    torch.manual_seed(0)
    layer, x, old = nn.Linear(4, 6), rand(2, 12, 4), rand(2, 12, 6, seed=1)
    places = Places.of(torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]) > 0)
    found, is_in = sparse.linear(layer, x, old, places), places.mask.flatten()
    torch.testing.assert_close(found[:, is_in], layer(x)[:, is_in])
    assert torch.equal(found[:, ~is_in], old[:, ~is_in])
    q, k, v = (rand(2, 2, 12, 4, seed=seed) for seed in (2, 3, 4))
    attend = nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        sparse.queries(lambda some: attend(some, k, v), q, places)[:, :, is_in], attend(q, k, v)[:, :, is_in]
    )


def test_moments_are_those_of_the_normalisation():
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(2, 6), 3 + 2 * rand(2, 6, 5, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(Moments.of(norm, x).apply(x), norm(x))


# -- masks -------------------------------------------------------------------------------------------------------------


def test_the_threshold_parts_two_classes_with_the_largest_variance_between():
    levels = (torch.cat([40 + 12 * rand(300), 190 + 20 * rand(100, seed=1)]).clamp(0, 255)).to(torch.uint8)

    def between(cut):
        low, high = levels[levels <= cut].double(), levels[levels > cut].double()
        return len(low) * len(high) * float((low.mean() - high.mean()) ** 2) if len(low) and len(high) else 0.0

    assert between(masks.otsu(levels)) == pytest.approx(max(map(between, range(255))))


def test_specks_are_taken_away():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1, 1] = mask[4:7, 3:6] = True
    kept = masks.dilated(masks.eroded(mask))
    assert not kept[1, 1]
    assert torch.equal(kept[4:7, 3:6], mask[4:7, 3:6])


def test_the_mask_is_where_two_runs_come_apart():
    old = [rand(2, 4, 16, 16, seed=seed) for seed in range(3)]
    assert not masks.from_differences(old, old).any()
    new = [x.clone() for x in old]
    for x in new:
        x[:, :, 4:8, 4:12] += 5
    found = masks.from_differences(old, new)
    assert found[5:7, 5:11].all()
    assert not found[:3].any()


def test_a_coarser_mask_has_whatever_it_covers():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3, 5] = True
    assert masks.resized(mask, 4, 4).nonzero().tolist() == [[1, 2]]
    assert masks.resized(mask, 1, 1).all()


# -- edits -------------------------------------------------------------------------------------------------------------


def test_recording_changes_nothing(pipe):
    plain = pipe(**CALL, generator=noise()).images
    before = {name: set(module.__dict__) for name, module in pipe.unet.named_modules()}
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        assert torch.equal(picture.result.images, plain)
        assert picture.memory > 0
    assert picture.memory == 0
    assert {name: set(module.__dict__) for name, module in pipe.unet.named_modules()} == before


def test_a_mask_of_ones_equals_dense(pipe):
    plain = pipe(**CALL | NEW, generator=noise()).images
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        found = picture.edit(**NEW, mask=torch.ones(SIDE, SIDE), dense=0).images
        assert torch.equal(picture.edit(**NEW, dense=1.0).images, plain)
    assert torch.equal(found, plain)
    assert not torch.equal(found, picture.result.images)


@pytest.mark.parametrize(
    ("scheduler", "changes"), [(DDIMScheduler, {}), (DPMSolverMultistepScheduler, {"use_linear_projection": True})]
)
def test_outside_of_the_mask_everything_is_the_recorded_bit_for_bit(scheduler, changes):
    pipe, seen, mask = made(scheduler, **changes), [], corner(6)
    layers = {p: m for p, m in pipe.unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        hooks = [
            module.register_forward_hook(lambda module, args, out, path=path: seen.append((path, out.clone())))
            for path, module in layers.items()
        ]
        found = picture.edit(**NEW, mask=mask, dense=0).images
        for hook in hooks:
            hook.remove()
        per_call, compared = len(seen) // STEPS, 0
        for index, (path, out) in enumerate(seen):
            kept = picture._calls[index // per_call].outputs.get(path)
            if kept is None:
                continue
            old = kept.read()
            if out.ndim == 4:
                area = masks.resized(masks.resized(mask, *(side // 2 for side in out.shape[-2:])), *out.shape[-2:])
                assert torch.equal(out[..., ~area], old[..., ~area]), path
            else:
                side = int(out.shape[1] ** 0.5)
                outside = ~masks.resized(mask, side, side).flatten()
                assert torch.equal(out[:, outside], old[:, outside]), path
            compared += 1
    assert compared > 100
    assert torch.equal(found[..., ~mask], picture.result.images[..., ~mask])
    assert not torch.equal(found[..., mask], picture.result.images[..., mask])


def test_an_empty_mask_and_an_unchanged_prompt_are_the_recorded_picture(pipe):
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        nothing = picture.edit(**NEW, mask=torch.zeros(SIDE, SIDE), dense=0).images
        assert torch.equal(nothing, picture.result.images)
        same = picture.edit().images
        assert not picture.mask.any()
    assert torch.equal(same, picture.result.images)


def test_the_mask_is_made_of_the_first_steps_which_are_dense(pipe):
    inputs = {}
    for name, call in (("old", CALL), ("new", CALL | NEW)):
        taken = inputs[name] = []
        hook = pipe.unet.register_forward_pre_hook(lambda module, args, taken=taken: taken.append(args[0]))
        pipe(**call, generator=noise())
        hook.remove()
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        picture.edit(**NEW, dense=0.4)
    expected = masks.from_differences(inputs["old"][1:3], inputs["new"][1:3])
    assert expected.any() and not expected.all()
    assert torch.equal(picture.mask, expected)


@pytest.mark.parametrize("side", [16, 32])
def test_thresholds_scale_with_the_latent(pipe, side):
    call = CALL | {"height": side, "width": side, "num_inference_steps": 1}
    with c4d.edit.record(pipe, **call, generator=noise(), least=1 / 4) as picture:
        (recorded,) = picture._calls
        areas = {kept.read().shape[-2:].numel() for kept in recorded.outputs.values() if kept.read().ndim == 4}
    assert areas == {side**2, side**2 // 4}


def test_flops_are_those_of_the_mask_and_of_the_dense_levels(pipe, capsys):
    def flops(run):
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        return counter.get_total_flops() / STEPS

    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        dense = flops(lambda: picture.edit(**NEW, mask=torch.ones(SIDE, SIDE), dense=0))
        low = flops(lambda: picture.edit(**NEW, mask=torch.zeros(SIDE, SIDE), dense=0))
        for side in (8, 12):
            share = (side / SIDE) ** 2
            some = flops(lambda side=side: picture.edit(**NEW, mask=corner(side), dense=0))
            with capsys.disabled():
                print(
                    f"\nmask {share:.1%}: {some / dense:.1%} of a dense step, {low / dense:.1%} of which always dense"
                )
            assert some <= low + 1.5 * share * (dense - low)


def test_a_mask_goes_to_where_the_latent_is(pipe, monkeypatch):
    """Indices on another device than the layers' outputs are an error there."""

    class Stop(Exception):
        pass

    def begun(mask, dense, calls):
        raise Stop(mask.device.type)

    monkeypatch.setattr(recording, "_Edit", begun)
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        picture._calls[0].latent = picture._calls[0].latent.to("meta")
        with pytest.raises(Stop, match="meta"):
            picture.edit(**NEW, mask=corner().numpy())


def test_two_edits_and_a_run_beside_them(pipe):
    plain = pipe(**CALL | NEW, generator=noise()).images
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        first = picture.edit(**NEW).images
        assert torch.equal(pipe(**CALL | NEW, generator=noise()).images, plain)
        assert torch.equal(picture.edit(**NEW).images, first)


def test_an_edit_that_fails_leaves_the_recording_usable(pipe):
    def stop(pipe, step, timestep, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        truth = picture.edit(**NEW).images
        with pytest.raises(KeyboardInterrupt):
            picture.edit(**NEW, callback_on_step_end=stop)
        assert torch.equal(picture.edit(**NEW).images, truth)


def test_what_cannot_be_edited_is_refused(pipe):
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        with pytest.raises(SettingError, match=r"edit\(generator, height=...\).*Record anew"):
            picture.edit(generator=noise(), height=8)
        with pytest.raises(SettingError, match=r"edit\(dense=2\)"):
            picture.edit(dense=2)
        with pytest.raises(SettingError, match=r"has the shape \[3\]"):
            picture.edit(mask=torch.ones(3))
        with pytest.raises(RunError, match="guidance, scheduler and size must be the recorded ones"):
            picture.edit(guidance_scale=1.0)
        with pytest.raises(AlreadyAcceleratedError, match="already accelerated by edit"):
            c4d.accelerate(pipe, "deepcache")
    with pytest.raises(RunError, match="The recording was removed"):
        picture.edit(**NEW)
    with c4d.accelerate(pipe, "deepcache"), pytest.raises(AlreadyAcceleratedError, match="deepcache"):
        c4d.edit.record(pipe, **CALL)
    with pytest.raises(SettingError, match=r"record\(least=3\)"):
        c4d.edit.record(pipe, least=3, **CALL)
    with pytest.raises(AnatomyError, match="has no U-Net"):
        c4d.edit.record(object())


def test_what_is_kept_may_be_smaller():
    pipe = made()
    with c4d.edit.record(pipe, **CALL, generator=noise()) as picture:
        whole, truth = picture.memory, picture.edit(**NEW, mask=corner()).images
    with c4d.edit.record(pipe, **CALL, generator=noise(), cache_dtype="bf16") as picture:
        assert picture.memory < 0.6 * whole
        found = picture.edit(**NEW, mask=corner()).images
    assert float((found - truth).abs().max()) < 0.05 * float(truth.abs().max())
