"""The anatomy of denoisers is found by observation, and what is found is true."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anatomy_zoo as zoo
from anatomy_help import (
    EVERY,
    every_denoiser,
    every_transformer,
    inner_of,
    observed,
    parts_of,
    run,
)
from cache4diffusion import anatomy
from cache4diffusion.anatomy.facts import StreamRef
from cache4diffusion.anatomy.tree import map_leaves
from cache4diffusion.shadow import Shadow

# What is found ----


def test_flux_has_one_main_road_over_two_lists():
    found = observed("flux")
    assert [stack.path for stack in found.main] == ["transformer_blocks", "single_transformer_blocks"]
    assert found.seams == (True,)
    assert found.timestep == ("timestep",)
    assert found.latent == ("hidden_states",)
    assert found.conditioning == (("encoder_hidden_states",), ("pooled_projections",))
    assert found.outputs == ((0,),)
    assert found.signal == anatomy.Signal("transformer_blocks.0.attn", ("hidden_states",))
    assert not found.notes


def test_flux_double_block_has_three_parts_and_two_streams():
    block = observed("flux").main[0].blocks[0]
    assert parts_of(block) == {"attn": "attn", "ff": "ffn", "ff_context": "ffn"}
    assert block.parts[0].outputs == (((0,), "image"), ((1,), "text"))
    assert block.parts[0].inputs == (("hidden_states",), ("encoder_hidden_states",))
    assert [part.is_tokenwise for part in block.parts] == [False, True, True]
    assert inner_of(block) == dict.fromkeys(["norm1.norm", "norm1_context.norm", "norm2", "norm2_context"], "nan_token")
    assert [(s.kind, s.argument, s.output) for s in block.streams] == [
        ("text", ("encoder_hidden_states",), (0,)),
        ("image", ("hidden_states",), (1,)),
    ]


def test_flux_single_block_is_one_fused_part():
    block = observed("flux").main[1].blocks[0]
    assert parts_of(block) == {"proj_out": "fused"}
    (part,) = block.parts
    assert part.outputs == (((), "joint"),)
    assert [block.streams[i].kind for i in part.segments[0]] == ["text", "image"]
    assert [(i.path.rpartition("0.")[2], i.role, i.kind) for i in part.inner] == [
        ("norm.norm", "nan_token", "norm"),
        ("proj_mlp", "zero_width", "tokenwise"),
        ("act_mlp", "zero_width", "tokenwise"),
        ("attn", "zero_width", "attn"),
    ]


def test_the_text_of_the_last_flux_block_reaches_nothing():
    blocks = observed("flux").main[1].blocks
    assert [[s.feeds_output for s in block.streams] for block in blocks] == [[True, True], [False, True]]


def test_an_ip_adapter_adds_a_third_output_and_a_conditioning_argument():
    found = observed("flux, IP-adapter")
    assert found.main[0].blocks[0].parts[0].outputs == (((0,), "image"), ((1,), "text"), ((2,), "image"))
    assert ("joint_attention_kwargs", "ip_hidden_states", 0) in found.conditioning


def test_controlnet_samples_are_glue_between_blocks_and_no_conditioning():
    plain, controlled = observed("flux"), observed("flux, ControlNet")
    assert controlled.main == plain.main
    assert controlled.seams == plain.seams
    assert controlled.conditioning == plain.conditioning


@pytest.mark.parametrize(
    ("name", "path", "parts"),
    [
        ("dit", "transformer_blocks", {"attn1": "attn", "ff": "ffn"}),
        ("pixart", "transformer_blocks", {"attn1": "attn", "attn2": "cross_attn", "ff": "ffn"}),
        ("wan", "blocks", {"attn1": "attn", "attn2": "cross_attn", "ffn": "ffn"}),
        ("qwen", "transformer_blocks", {"attn": "attn", "img_mlp": "ffn", "txt_mlp": "ffn"}),
        ("cogvideox", "transformer_blocks", {"attn1": "attn", "ff": "ffn"}),
        ("plain", "layers", {"mixer": "attn", "mapper": "ffn"}),
    ],
)
def test_parts_of_other_classes(name, path, parts):
    found = observed(name)
    assert [stack.path for stack in found.main] == [path]
    assert all(parts_of(block) == parts for block in found.main[0].blocks)
    assert found.latent is not None
    assert found.timestep is not None
    assert found.signal is not None
    assert found.signal.path == f"{path}.0.{next(iter(parts))}"
    assert not found.notes


def test_blocks_of_one_list_differ_in_sd3():
    first, second, last = observed("sd3").main[0].blocks
    assert list(parts_of(first)) == ["attn", "attn2", "ff", "ff_context"]
    assert list(parts_of(second)) == ["attn", "ff", "ff_context"]
    assert list(parts_of(last)) == ["attn", "ff"]
    assert [s.kind for s in last.streams if s.output is None] == ["text"]
    assert last.output_template == (None, StreamRef(0))
    assert last.can_rebuild
    shared = next(inner for part in first.parts for inner in part.inner if inner.path.endswith("norm1.norm"))
    assert shared.feeds == ("transformer_blocks.0.attn", "transformer_blocks.0.attn2")


def test_where_latent_and_text_are_embedded_together_the_tokens_still_tell_them_apart():
    block = observed("cogvideox").main[0].blocks[0]
    assert [(s.argument, s.kind) for s in block.streams] == [
        (("hidden_states",), "image"),
        (("encoder_hidden_states",), "text"),
    ]
    feed_forward = block.parts[1]
    assert feed_forward.outputs == (((), "joint"),)
    assert [block.streams[i].kind for i in feed_forward.segments[0]] == ["text", "image"]


def test_a_text_refiner_is_a_stack_but_not_a_main_one():
    found = observed("hunyuan_video")
    assert [(stack.path, stack.is_main) for stack in found.stacks] == [
        ("context_embedder.token_refiner.refiner_blocks", False),
        ("transformer_blocks", True),
        ("single_transformer_blocks", True),
    ]
    assert [block.streams[0].kind for block in found.stacks[0].blocks] == ["text"]


def test_a_stream_that_restarts_behind_a_long_skip_is_followed():
    found = observed("hunyuan_dit")
    assert all(
        parts_of(block) == {"attn1": "attn", "attn2": "cross_attn", "ff": "ffn"} for block in found.main[0].blocks
    )
    assert any("starts behind blocks.3.skip_linear" in note for note in found.notes)


def test_refiners_before_text_and_image_meet_are_not_main():
    """Lumina2 reads its masks, so it is watched in a real forward; text and image are then one stream."""
    found = observed("lumina2")
    assert [stack.path for stack in found.main] == ["layers"]
    assert {stack.path for stack in found.stacks if not stack.is_main} == {"noise_refiner", "context_refiner"}
    assert found.main[0].blocks[0].streams[0].kind == "joint"


# What only some classes have ----


def of_class(kind):
    return anatomy.observe(*zoo.of_class(kind)())


def test_a_text_of_one_row_for_all_is_a_stream_like_any_other():
    """The first block makes as many rows of it as there are images."""
    denoiser, args, kwargs = zoo.flux(3)
    whole = anatomy.observe(denoiser, args, kwargs)
    found = anatomy.observe(denoiser, args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][:1]})
    assert found.main == whole.main
    assert found.seams == whole.seams


def test_text_that_the_denoiser_widens_between_blocks_is_still_text():
    """BriaFibo puts another layer of the text encoder into half of the text's channels in front of every block."""
    found = of_class("BriaFiboTransformer2DModel")
    kinds = [[stream.kind for stream in block.streams] for block in found.main[0].blocks]
    assert kinds == [["text", "image"], ["text", "image"]]
    assert found.main[0].breaks == (1,)


@pytest.mark.parametrize(
    ("kind", "breaks"),
    [
        ("ConsisIDTransformer3DModel", (1,)),  # what is added between the blocks is made of what the first one left
        ("WanAnimateTransformer3DModel", (1,)),
        ("WanVACETransformer3DModel", ()),  # what is added is made of the control
        ("FluxTransformer2DModel", ()),
    ],
)
def test_blocks_go_on_with_what_the_one_before_left_or_do_not(kind, breaks):
    assert of_class(kind).main[0].breaks == breaks


def test_lists_that_take_turns_are_told_in_the_order_in_which_they_run():
    found = of_class("LatteTransformer3DModel")
    assert [block.path for stack in found.main for block in stack.blocks] == [
        f"{side}transformer_blocks.{number}" for number in range(2) for side in ("", "temporal_")
    ]
    assert found.seams == (False,) * 3
    assert [len(stack.blocks) for stack in found.stacks] == [2, 2]
    assert "main: transformer_blocks and temporal_transformer_blocks, by turns" in anatomy.summary(found)


def test_who_reads_what_a_block_left_besides_the_next_one():
    assert [block.read_by for block in observed("hunyuan_dit").main[0].blocks] == [("blocks.3",), (), (), ()]
    assert all(not block.read_by for stack in observed("flux").main for block in stack.blocks)
    found = of_class("UniDiffuserModel")
    assert found.main[0].blocks[0].read_by == ("transformer.transformer_out_blocks.1.block",)


@pytest.mark.parametrize(
    ("kind", "part", "expected", "resting"),
    [
        ("PRXTransformer2DModel", "down_proj", "ffn", {"gate_proj": "one_token", "up_proj": "one_token"}),
        ("MiniMaxMusic3Transformer1DModel", "ff_out", "ffn", {"ff_in": "one_token"}),
        ("LuminaNextDiT2DModel", "attn2.to_out.0", "attn", {"attn1": "one_token", "attn2": "one_token"}),
        ("AuraFlowTransformer2DModel", "ff", "ffn", {"attn": "one_token"}),
    ],
)
def test_modules_that_work_for_a_part_alone_rest_with_it(kind, part, expected, resting):
    found = of_class(kind).main[0].blocks[0]
    assert parts_of(found)[part] == expected
    assert resting.items() <= inner_of(found).items()


def test_what_else_is_denoised_is_neither_image_nor_text():
    found = of_class("LTX2VideoTransformer3DModel")
    assert found.others == (("audio_hidden_states",),)
    assert ("audio_hidden_states",) not in found.conditioning
    assert [stream.kind for stream in found.main[0].blocks[0].streams] == ["image", "other"]


def test_tokens_packed_into_one_row_have_blocks_too():
    found = of_class("Cosmos3OmniTransformer")
    assert [stream.kind for stream in found.main[0].blocks[0].streams] == ["text", "image"]
    assert parts_of(found.main[0].blocks[0]) == {"self_attn": "attn", "mlp": "ffn", "mlp_moe_gen": "ffn"}


def test_the_batch_may_be_on_another_axis_or_look_like_a_number_of_frames():
    llama = of_class("HiDreamImageTransformer2DModel").batch_axes[""].arguments[("encoder_hidden_states_llama3",)]
    assert llama == 1
    axes = of_class("HunyuanVideoFramepackTransformer3DModel").batch_axes[""].arguments
    assert axes[("latents_clean",)] == 0
    assert axes[("indices_latents_clean",)] is None


def test_streams_handed_from_list_to_list_are_no_skips():
    assert of_class("MotifVideoTransformer3DModel").unet is None


def test_a_level_that_makes_its_skip_last_is_a_level():
    found = of_class("Kandinsky3UNet").unet
    assert [level.tail_skip for level in found.down] == [0, 1, None]
    assert (found.mid, found.skips) == (None, 2)


# What is found is true ----


@torch.no_grad()
@every_transformer
def test_parts_and_inner_modules_are_all_that_a_cached_step_may_skip(name):
    """Parts that return what they returned, and placeholders for what only feeds them, give the same bits."""
    module, args, kwargs = EVERY[name]()
    found = observed(name)
    parts = {part.path for stack in found.stacks for block in stack.blocks for part in block.parts}
    inner = {i.path: i for stack in found.stacks for block in stack.blocks for part in block.parts for i in part.inner}
    seen: dict[str, list] = {}
    keep = [
        module.get_submodule(path).register_forward_hook(
            lambda _, __, result, path=path: seen.setdefault(path, []).append(result)
        )
        for path in {*parts, *inner}
    ]
    expected = run(module, args, kwargs)
    for hook in keep:
        hook.remove()
    assert seen.keys() == parts | inner.keys()

    def stand_in(path):
        def placeholder(_, leaf):
            if path in parts or not isinstance(leaf, torch.Tensor):
                return leaf
            if inner[path].role == "zero_width":
                return leaf.new_empty(*leaf.shape[:-1], 0)
            return leaf.new_full((leaf.shape[0], 1, leaf.shape[-1]), float("nan"))

        return lambda *args, **kwargs: map_leaves(placeholder, seen[path].pop(0))

    shadows = [Shadow(module.get_submodule(path), "forward", stand_in(path)) for path in {*parts, *inner}]
    cached = run(module, args, kwargs)
    for shadow in shadows:
        shadow.remove()
    assert torch.equal(cached, expected)
    assert not any(seen.values())


@torch.no_grad()
@every_transformer
def test_blocks_pass_their_streams_through_when_rebuilt(name):
    """A block whose output is built around its own input streams is taken by the loop like the real one."""
    module, args, kwargs = EVERY[name]()
    found = observed(name)
    shadows = []
    for stack in found.main:
        for block in stack.blocks:
            assert block.can_rebuild

            def passed(*args, block=block, **kwargs):
                return block.rebuild([anatomy.tree.argument_at(args, kwargs, s.argument) for s in block.streams])

            shadows.append(Shadow(module.get_submodule(block.path), "forward", passed))
    shape = run(module, args, kwargs).shape
    for shadow in shadows:
        shadow.remove()
    assert shape == run(module, args, kwargs).shape


@every_denoiser
def test_batch_axes_are_those_of_the_arguments(name):
    _, args, kwargs = EVERY[name]()
    found = observed(name)
    batch = anatomy.tree.argument_at(args, kwargs, found.latent).shape[0]
    axes = found.batch_axes[""]
    for path, axis in axes.arguments.items():
        tensor = anatomy.tree.argument_at(args, kwargs, path)
        assert axis is None or tensor.shape[axis] == batch
    assert axes.arguments[found.latent] == 0
    assert all(axes.arguments[path] == 0 for path in found.conditioning)
    assert set(axes.outputs.values()) == {0}
    for stack in found.stacks:
        for block in stack.blocks:
            assert all(found.batch_axes[block.path].arguments[s.argument] == 0 for s in block.streams)
            assert all(
                found.batch_axes[part.path].outputs[leaf] == 0 for part in block.parts for leaf, _ in part.outputs
            )


def test_shared_arguments_carry_no_batch():
    axes = observed("flux, batch 1").batch_axes
    assert axes[""].arguments[("img_ids",)] is None
    assert axes["transformer_blocks.0"].arguments[("image_rotary_emb", 0)] is None


# U-Nets ----


@pytest.mark.parametrize("name", ["unet", "unet, no mid", "unet, ControlNet"])
def test_levels_of_a_unet(name):
    found = observed(name).unet
    assert found is not None
    assert found.head == "conv_in"
    assert found.mid == (None if "no mid" in name else "mid_block")
    assert found.skips == 6
    assert [(layer.modules, layer.skip) for level in found.down for layer in level.layers] == [
        (("down_blocks.0.resnets.0", "down_blocks.0.attentions.0"), 1),
        (("down_blocks.0.resnets.1", "down_blocks.0.attentions.1"), 2),
        (("down_blocks.1.resnets.0",), 4),
        (("down_blocks.1.resnets.1",), 5),
    ]
    assert [(level.tail, level.tail_skip) for level in found.down] == [
        (("down_blocks.0.downsamplers.0",), 3),
        ((), None),
    ]
    assert [(layer.modules, layer.skip) for level in found.up for layer in level.layers] == [
        (("up_blocks.0.resnets.0",), 5),
        (("up_blocks.0.resnets.1",), 4),
        (("up_blocks.0.resnets.2",), 3),
        (("up_blocks.1.resnets.0", "up_blocks.1.attentions.0"), 2),
        (("up_blocks.1.resnets.1", "up_blocks.1.attentions.1"), 1),
        (("up_blocks.1.resnets.2", "up_blocks.1.attentions.2"), 0),
    ]
    assert [level.tail for level in found.up] == [("up_blocks.0.upsamplers.0",), ()]
    assert found.up[0].argument == ("hidden_states",)
    assert found.up[0].layers[0].leaf == ("res_hidden_states_tuple", 2)
    assert (found.down[0].output, found.down[0].tail_leaf) == ((0,), (1, 2))
    assert found.down[0].output_template == (None, (None, None, None))


def test_a_unet_without_text_is_a_unet_too():
    found = observed("unet2d").unet
    assert found is not None
    assert found.skips == 4
    assert [layer.leaf for level in found.up for layer in level.layers] == [(1, 1), (1, 0), (1, 1), (1, 0)]


def test_token_blocks_inside_a_unet_have_parts_but_are_not_main():
    found = observed("unet")
    assert found.main == ()
    assert {stack.path for stack in found.stacks} == {
        f"{place}.transformer_blocks"
        for place in ["mid_block.attentions.0"]
        + [f"down_blocks.0.attentions.{i}" for i in range(2)]
        + [f"up_blocks.1.attentions.{i}" for i in range(3)]
    }
    kinds = {"attn1": "attn", "attn2": "cross_attn", "ff": "ffn"}
    assert all(parts_of(block) == kinds for stack in found.stacks for block in stack.blocks)


@every_transformer
def test_transformers_are_no_unets(name):
    assert observed(name).unet is None


# For people ----


def test_the_summary_says_it_all_on_one_screen():
    text = anatomy.summary(observed("flux"))
    assert "main: transformer_blocks > single_transformer_blocks (shape kept between)" in text
    assert "part attn: attn, [0] image, [1] text; may rest: norm1.norm (nan_token)" in text
    assert "part proj_out: fused, output joint" in text
    assert len(text.splitlines()) < 30
    text = anatomy.summary(observed("unet"))
    assert "up_blocks.1: resnets.0, attentions.0 uses 2; resnets.1, attentions.1 uses 1" in text


# Without a forward ----


def test_description_needs_no_forward():
    outline = anatomy.describe(zoo.flux()[0])
    assert outline.lists == (("transformer_blocks", 2), ("single_transformer_blocks", 2))
    assert outline.timestep == "timestep"
    assert not outline.is_unet_like
    assert anatomy.describe(zoo.unet()[0]).is_unet_like
    assert anatomy.describe(zoo.plain()[0]).timestep == "t"
    assert anatomy.describe(nn.Linear(2, 2)).lists == ()
