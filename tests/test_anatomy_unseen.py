"""Observation leaves no trace, and says what it could not see."""

from __future__ import annotations

import copy
import functools
import gc
import time
import weakref

import pytest
import torch
from torch import nn

import anatomy_zoo as zoo
from anatomy_help import (
    EVERY,
    inner_of,
    observed,
    one_of_each,
    parts_of,
    run,
    tensors,
)
from cache4diffusion import anatomy
from cache4diffusion.errors import AnatomyError
from cache4diffusion.shadow import Shadow

# Observation leaves no trace ----


def attributes(module: nn.Module) -> list:
    return [
        (path, sorted(m.__dict__), [id(v) for v in m.__dict__.values()], [id(p) for p in m._parameters.values()])
        for path, m in module.named_modules()
    ]


def fake_tensors() -> dict:
    return {id(item): item for item in gc.get_objects() if type(item).__name__ == "FakeTensor"}


@one_of_each
def test_nothing_is_left_behind(name):
    module, args, kwargs = EVERY[name]()
    others = fake_tensors()  # of torch.compile, which keeps some
    before, expected = attributes(module), run(module, args, kwargs)
    random_state = torch.get_rng_state()
    given = [id(tensor) for tensor in tensors([args, kwargs])]
    anatomy.observe(module, args, kwargs)
    assert attributes(module) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [id(tensor) for tensor in tensors([args, kwargs])] == given
    assert torch.equal(run(module, args, kwargs), expected)
    gc.collect()
    assert fake_tensors().keys() == others.keys()


def test_the_arguments_are_not_kept():
    module, args, kwargs = zoo.flux()
    references = [weakref.ref(tensor) for tensor in tensors(kwargs)]
    found = anatomy.observe(module, args, kwargs)
    kwargs.clear()
    gc.collect()
    assert found.main
    assert not any(reference() is not None for reference in references)


def test_a_real_first_call_and_one_after_observation_agree_where_the_model_memoises():
    """Rotary tables of QwenImage are memoised: a fake one must not be found by the next real call."""
    expected = run(*zoo.qwen())
    module, args, kwargs = zoo.qwen()
    anatomy.observe(module, args, kwargs)
    assert torch.equal(run(module, args, kwargs), expected)


class Memory(nn.Module):
    """A table that is made once: the whole forward is memoised."""

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as some hosts do
    def forward(self, count: int) -> torch.Tensor:
        return torch.arange(count).float()


class Placed(zoo.PlainBlock):
    """Adds a memoised table of places."""

    def __init__(self, width):
        super().__init__(width)
        self.places = Memory()

    def forward(self, x, c):
        return super().forward(x + self.places(x.shape[1])[:, None], c)


def test_a_forward_that_is_memoised_itself_remembers_nothing_of_it():
    module, args, kwargs = zoo.plain(block=Placed)
    anatomy.observe(module, args, kwargs)
    assert type(run(module, args, kwargs)) is torch.Tensor


def test_hooks_wrappers_and_compiled_calls_are_not_run():
    module, args, kwargs = zoo.flux()
    expected = anatomy.observe(module, args, kwargs)
    calls = []
    block = module.transformer_blocks[0]
    block.register_forward_hook(lambda *_: calls.append("hook"))
    for each in module.single_transformer_blocks:
        each.compile(backend=lambda *_: calls.append("compiled"))
    plain = block.forward

    def wrapper(*args, **kwargs):
        calls.append("wrapper")
        return plain(*args, **kwargs)

    shadow = Shadow(block, "forward", wrapper)
    before = attributes(module)
    assert anatomy.observe(module, args, kwargs) == expected
    assert calls == []
    assert attributes(module) == before
    shadow.remove()


def test_a_compiled_denoiser_is_seen_as_itself():
    module, args, kwargs = zoo.dit()
    expected = anatomy.observe(module, args, kwargs)
    assert anatomy.observe(torch.compile(module, backend="eager"), args, kwargs) == expected
    assert anatomy.describe(torch.compile(module, backend="eager")) == anatomy.describe(module)


def test_observation_is_quick():
    module, args, kwargs = zoo.flux()
    anatomy.observe(module, args, kwargs)
    start = time.process_time()
    anatomy.observe(module, args, kwargs)
    assert time.process_time() - start < 1


def test_a_copy_made_after_observation_is_plain():
    module, args, kwargs = zoo.dit()
    anatomy.observe(module, args, kwargs)
    assert torch.equal(run(copy.deepcopy(module), args, kwargs), run(module, args, kwargs))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_the_mode_of_the_caller_does_not_matter(mode):
    with mode():
        module, args, kwargs = zoo.dit()
        found = anatomy.observe(module, args, kwargs)
    assert found == observed("dit")


# Denoisers that are hard to observe ----


class Reads(zoo.PlainBlock):
    """Reads its data, so that no fake tensor will do."""

    def forward(self, x, c):
        return super().forward(x, c) if c.abs().max() > 0 else x


def test_weights_cast_for_autocast_are_the_real_ones_afterwards():
    module, args, kwargs = zoo.flux()
    module.requires_grad_(True)  # autocast keeps casts of such weights only
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        anatomy.observe(module, args, kwargs)
        found = run(module, args, kwargs)
    assert type(found) is torch.Tensor


def test_a_denoiser_that_reads_its_data_is_watched_in_a_real_forward():
    module, args, kwargs = zoo.plain(block=Reads)
    found = anatomy.observe(module, args, kwargs)
    assert parts_of(found.main[0].blocks[0]) == {"mixer": "attn", "mapper": "ffn"}
    assert found.batch_axes[""].arguments[(0,)] == 0
    assert any("real forward" in note for note in found.notes)
    with pytest.raises(AnatomyError, match="PlainDiT could not be observed"):
        anatomy.observe(module, args, kwargs, may_compute=False)


def test_a_call_that_cannot_work_is_an_error_that_says_why():
    module, _, _ = zoo.plain()
    with pytest.raises(AnatomyError, match=r"PlainDiT could not be observed.*missing 1 required.*a call that works"):
        anatomy.observe(module, (torch.randn(2, 4, 8, 8), torch.ones(2)), {})


class Packed:
    """What a quantised layer keeps of the way in which its weight is stored."""

    def __init__(self, scale):
        self.scale, self.is_packed = scale, False


class Rearranging(nn.Linear):
    """Brings its weight, and what hangs on it, into another form at its first call, as layers of 4 and 8 bits do."""

    def forward(self, x):
        packed = self.weight.__dict__.setdefault("packed", Packed(torch.ones(1)))
        if not packed.is_packed:
            self.weight.data, packed.scale = self.weight.data / 2, packed.scale * 2
            packed.is_packed = True
        return nn.functional.linear(x, self.weight * packed.scale, self.bias)


def test_weights_that_are_rearranged_at_the_first_call_are_so_by_the_real_one():
    module, args, kwargs = zoo.plain()
    expected = run(module, args, kwargs)
    for block in module.layers:
        block.mapper[0].__class__ = Rearranging
        block.mapper[0].weight.packed = Packed(torch.ones(1))
    states = [block.mapper[0].weight.packed for block in module.layers]
    pointers = [block.mapper[0].weight.data_ptr() for block in module.layers]
    anatomy.observe(module, args, kwargs)
    assert not any(state.is_packed for state in states)
    assert [block.mapper[0].weight.data_ptr() for block in module.layers] == pointers
    assert torch.equal(run(module, args, kwargs), expected)
    assert all(state.is_packed for state in states)


class InPlace(zoo.PlainBlock):
    """Adds to its input in place, and scales what its parts return in place."""

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        mixed = self.mixer(zoo.modulate(self.first(x), shift1, scale1))
        mixed *= gate1.unsqueeze(1)
        x += mixed
        x[:, 1:] += (gate2.unsqueeze(1) * self.mapper(zoo.modulate(self.second(x), shift2, scale2)))[:, 1:]
        return x


def test_writing_in_place_is_followed_and_reported():
    block = anatomy.observe(*zoo.plain(block=InPlace)).main[0].blocks[1]
    assert parts_of(block) == {"mixer": "attn", "mapper": "ffn"}
    assert block.mutates == ((0,),)
    assert [part.is_mutated for part in block.parts] == [True, False]


class Adds(zoo.PlainDiT):
    """Writes into what its first block returns, and into what its last one does, behind which no block looks."""

    def forward(self, x, t, y):
        x = self.patches(x).flatten(2).transpose(1, 2)
        c = self.classes(y)
        first, second, third = self.layers
        x = first(x, c)
        x[:, 1:] = x[:, 1:] + c[:, None]
        x = second(x, c)
        x = third(x, c)
        x += c[:, None]
        return self.last(x)


def test_a_host_that_writes_between_its_blocks_is_reported():
    torch.manual_seed(0)
    call = torch.randn(2, 4, 8, 8), torch.full((2,), 3), torch.ones(2, dtype=torch.long)
    (stack,) = anatomy.observe(Adds().eval(), call, {}).main
    assert [block.is_written for block in stack.blocks] == [True, False, False]
    assert not any(block.is_written for block in anatomy.observe(*zoo.plain()).main[0].blocks)


class Masked(zoo.PlainBlock):
    """Keeps padding at zero, by truths that were made into numbers."""

    def forward(self, x, c):
        here = torch.arange(x.shape[1], device=x.device) < x.shape[1] - 1
        return super().forward(x, c) * here.to(x.dtype)[:, None].expand(-1, x.shape[-1])


class Scaled(zoo.PlainBlock):
    """Makes another stream of its own."""

    def forward(self, x, c):
        return super().forward(x, c) * torch.linspace(0.5, 1.0, x.shape[1], device=x.device)[:, None]


def test_a_stream_whose_padding_is_masked_by_numbers_is_still_that_stream():
    (stack,) = anatomy.observe(*zoo.plain(block=Masked)).main
    assert [parts_of(block) for block in stack.blocks] == [{"mixer": "attn", "mapper": "ffn"}] * 3
    assert not anatomy.observe(*zoo.plain(block=Scaled)).main


class PostNorm(zoo.PlainBlock):
    """Normalises what a part returns: the norm belongs to neither the part nor what may be skipped."""

    def forward(self, x, c):
        x = x + self.first(self.mixer(x))
        return x + self.second(self.mapper(x))


def test_post_norms_are_stepped_through():
    block = anatomy.observe(*zoo.plain(block=PostNorm)).main[0].blocks[0]
    assert parts_of(block) == {"mixer": "attn", "mapper": "ffn"}
    assert inner_of(block) == {}


class Strict(zoo.PlainBlock):
    """Insists on the shape of what its norm returns: no placeholder will do there."""

    def forward(self, x, c):
        x = x + self.mixer(self.first(x).view(x.shape))
        return x + self.mapper(self.second(x))


def test_a_placeholder_that_breaks_its_block_is_not_offered():
    found = anatomy.observe(*zoo.plain(block=Strict))
    assert all(inner_of(block) == {} for block in found.main[0].blocks)
    assert any("nan_token" in note for note in found.notes)


class Merging(zoo.PlainBlock):
    """Computes half of the tokens and hands out each twice, as token merging does: it picks them by number."""

    def forward(self, x, c):
        count = torch.arange(x.shape[1] // 2, device=x.device)
        every = (torch.arange(x.shape[1], device=x.device) // 2)[None, :, None].expand(x.shape)
        if self.picks_with == "gather":
            few = torch.gather(self.first(x), 1, 2 * count[None, :, None].expand(x.shape[0], -1, x.shape[2]))
        else:
            few = self.first(x).index_select(dim=1, index=2 * count)
        x = x + torch.gather(self.mixer(few), 1, every)
        return x + self.mapper(self.second(x))


@pytest.mark.parametrize("picks_with", ["gather", "index_select"])
def test_a_placeholder_of_one_token_is_not_offered_where_tokens_are_picked(picks_with, monkeypatch):
    """Fake tensors would not mind: they do not look which tokens are asked for."""
    monkeypatch.setattr(Merging, "picks_with", picks_with, raising=False)
    found = anatomy.observe(*zoo.plain(block=Merging))
    assert parts_of(found.main[0].blocks[0]) == {"mixer": "attn", "mapper": "ffn"}
    assert "first" not in inner_of(found.main[0].blocks[0])
    assert any("picks" in note for note in found.notes)


class Opaque(zoo.PlainBlock):
    """Has no residual stream at all."""

    def forward(self, x, c):
        return self.mapper(self.mixer(x))


def test_what_has_no_residual_stream_has_no_stack():
    found = anatomy.observe(*zoo.plain(block=Opaque))
    assert found.stacks == ()
    assert found.latent == (0,)
    assert found.batch_axes[""].outputs == {(): 0}
