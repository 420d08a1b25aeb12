"""The table of companions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload
from torch import nn

import toys
from companions.companion import UNET, Companion, denoiser_of

CPU = torch.device("cpu")

# --- offload ----------------------------------------------------------------------------------------------------------


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does to each component, with the CPU in the accelerator's place.

    Between the calls of a module its weights are on the meta device: whoever reads them there reads nothing.
    """
    pipe.remove_all_hooks()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            cpu_offload(component, CPU)


def other_offload(pipe: Any) -> None:
    """The second takes the hooks of the first away."""
    sequential_offload(pipe)
    toys.generate(pipe, 3)
    model_offload(pipe)


def group_offload(pipe: Any, kind: str, count: int | None = None) -> None:
    """With the CPU for both devices, nothing is ever away; so what is offloaded is filled with NaN in between."""
    denoiser = denoiser_of(pipe)
    denoiser.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=count)
    hooks = [module._diffusers_hook.get_hook("group_offloading") for module in hooked(denoiser)]
    for group in {id(hook.group): hook.group for hook in hooks}.values():
        take_away(group)


def hooked(denoiser: nn.Module) -> list[nn.Module]:
    """The modules whose calls load a group of weights, or take it away."""
    found = [module for module in denoiser.modules() if "_diffusers_hook" in vars(module)]
    return [module for module in found if module._diffusers_hook.get_hook("group_offloading") is not None]


def take_away(group: Any) -> None:
    """Make a group's offloading take something away, and its loading bring it back."""
    tensors = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
    tensors = [*dict.fromkeys([*tensors, *group.parameters, *group.buffers])]
    kept: list[torch.Tensor] = []

    def onload() -> None:
        for tensor, values in zip(tensors, kept, strict=False):
            tensor.data.copy_(values)
        kept.clear()

    def offload() -> None:
        if not kept:
            kept.extend(tensor.detach().clone() for tensor in tensors)
        for tensor in tensors:
            tensor.data.fill_(float("nan"))

    group.onload_, group.offload_ = onload, offload
    offload()


def is_away(pipe: Any) -> bool:
    """Whether the blocks' weights are not there between calls."""
    blocks = denoiser_of(pipe).transformer_blocks
    return all(parameter.is_meta or bool(parameter.isnan().all()) for parameter in blocks.parameters())


# --- weights in another form ------------------------------------------------------------------------------------------


def layerwise_casting(pipe: Any) -> None:
    denoiser_of(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def torchao(pipe: Any, config: str) -> None:
    from torchao import quantization

    quantization.quantize_(denoiser_of(pipe), getattr(quantization, config)())


def quanto(pipe: Any, weights: str) -> None:
    from optimum import quanto

    quanto.quantize(denoiser_of(pipe), weights=getattr(quanto, weights))
    quanto.freeze(denoiser_of(pipe))


def exchange_linears(denoiser: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put other layers in the place of the linear ones of the blocks, as loading quantised weights does."""
    linears = [(path, module) for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    for path, module in linears:
        if "blocks." in path and not module.in_features % 64:  # whole groups of weights that share a scale
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, make(module).eval().requires_grad_(False))


def bitsandbytes(pipe: Any, bits: int) -> None:
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        weight = linear.weight.detach().clone()
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        return layer.to(CPU)

    exchange_linears(denoiser_of(pipe), make)


def gguf(pipe: Any) -> None:
    """The layers that loading a GGUF file makes, in place."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quantize

    kind = GGMLQuantizationType.Q8_0

    def make(linear: nn.Linear) -> nn.Module:
        layer = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        data = torch.from_numpy(quantize(linear.weight.detach().numpy(), kind))
        layer.weight, layer.bias = GGUFParameter(data, quant_type=kind), linear.bias
        return layer

    exchange_linears(denoiser_of(pipe), make)


def gguf_file(pipe: Any) -> None:
    """A transformer loaded from a GGUF file takes the place of the pipeline's."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    kind = GGMLQuantizationType.Q8_0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "flux.gguf")
        writer = GGUFWriter(path, "flux")
        for name, tensor in pipe.transformer.state_dict().items():
            values = tensor.numpy().astype(np.float32)
            if "blocks." in name and values.ndim == 2 and not values.shape[1] % 64:
                writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        pipe.transformer.save_config(folder)
        pipe.transformer = diffusers.FluxTransformer2DModel.from_single_file(
            str(path),
            config=folder,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora_weights() -> dict[str, torch.Tensor]:
    """Of rank 2 for some layers of every kind of block; parts begin and end with some of them."""
    generator, found, width = torch.Generator().manual_seed(7), {}, 32
    layers = {"attn.to_q": (width, width), "attn.to_out.0": (width, width), "ff.net.2": (width, 4 * width)}
    paths = {f"transformer_blocks.{i}.{name}": sizes for i in range(2) for name, sizes in layers.items()}
    paths |= {f"single_transformer_blocks.{i}.proj_out": (width, 5 * width) for i in range(3)}
    for path, (out, entering) in paths.items():
        found[f"transformer.{path}.lora_A.weight"] = 0.2 * torch.randn(2, entering, generator=generator)
        found[f"transformer.{path}.lora_B.weight"] = 0.2 * torch.randn(out, 2, generator=generator)
    return found


def lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_weights(), adapter_name="style")


def fused_lora(pipe: Any) -> None:
    lora(pipe)
    pipe.fuse_lora()


def merged_lora(pipe: Any) -> None:
    fused_lora(pipe)
    pipe.unload_lora_weights()


def unfuse(pipe: Any) -> None:
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


# --- other ways to run ------------------------------------------------------------------------------------------------


def compiled_blocks(pipe: Any) -> None:
    denoiser_of(pipe).compile_repeated_blocks(backend="eager", fullgraph=True)


def compiled_whole(pipe: Any) -> None:
    denoiser_of(pipe).compile(backend="eager")


def attention_backend(pipe: Any) -> None:
    pipe.transformer.set_attention_backend("_native_math")


def tome(pipe: Any) -> None:
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=2, use_rand=False)


def without_tome(pipe: Any) -> None:
    import tomesd

    tomesd.remove_patch(pipe)
    del pipe.unet._tome_info


CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeerCache": lambda: diffusers.TaylorSeerCacheConfig(),
    "MagCache": lambda: diffusers.MagCacheConfig(mag_ratios=[1.0] * 9, num_inference_steps=9),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


def own_cache(pipe: Any, name: str) -> None:
    denoiser_of(pipe).enable_cache(CACHES[name]())


def without_cache(pipe: Any) -> None:
    denoiser_of(pipe).disable_cache()


WHOLE = "compile_repeated_blocks"  # words of refusals: what to do instead
ONE_CACHE = "disable_cache"

_TABLE = (
    Companion(
        "model offload",
        "`pipe.enable_model_cpu_offload()`",
        model_offload,
        lambda pipe: pipe.remove_all_hooks(),
    ),
    Companion(
        "sequential offload, then model offload",
        "`pipe.enable_sequential_cpu_offload(); pipe.enable_model_cpu_offload()`",
        other_offload,
        lambda pipe: pipe.remove_all_hooks(),
    ),
    Companion(
        "sequential offload",
        "`pipe.enable_sequential_cpu_offload()`",
        sequential_offload,
        lambda pipe: pipe.remove_all_hooks(),
        also=is_away,
    ),
    Companion(
        "group offload, blocks",
        "`enable_group_offload(..., 'block_level', num_blocks_per_group=1)`",
        partial(group_offload, kind="block_level", count=1),
        also=is_away,
    ),
    Companion(
        "group offload, pairs of blocks",
        "`enable_group_offload(..., 'block_level', num_blocks_per_group=2)`",
        partial(group_offload, kind="block_level", count=2),
        also=is_away,
    ),
    Companion(
        "group offload, leaves",
        "`enable_group_offload(..., 'leaf_level')`",
        partial(group_offload, kind="leaf_level"),
        also=is_away,
    ),
    Companion(
        "layerwise casting", "`enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, ...)`", layerwise_casting
    ),
    Companion("compiled blocks", "`compile_repeated_blocks(fullgraph=True)`", compiled_blocks),
    Companion(
        "compiled denoiser", "`denoiser.compile()`", compiled_whole, refused={"span": WHOLE, "part": WHOLE}
    ),
    Companion(
        "torchao int8", "`quantize_(denoiser, Int8WeightOnlyConfig())`",
        partial(torchao, config="Int8WeightOnlyConfig"), needs="torchao",
    ),
    Companion(
        "torchao int8 dynamic", "`quantize_(denoiser, Int8DynamicActivationInt8WeightConfig())`",
        partial(torchao, config="Int8DynamicActivationInt8WeightConfig"), needs="torchao",
    ),
    Companion(
        "torchao fp8", "`quantize_(denoiser, Float8WeightOnlyConfig())`",
        partial(torchao, config="Float8WeightOnlyConfig"), needs="torchao",
    ),
    Companion(
        "quanto int8", "`quantize(denoiser, weights=qint8); freeze(denoiser)`", partial(quanto, weights="qint8"),
        needs="optimum-quanto",
    ),
    Companion(
        "quanto fp8", "`quantize(denoiser, weights=qfloat8); freeze(denoiser)`", partial(quanto, weights="qfloat8"),
        needs="optimum-quanto",
    ),
    Companion("bitsandbytes int8", "`Linear8bitLt` layers", partial(bitsandbytes, bits=8), needs="bitsandbytes"),
    Companion("bitsandbytes nf4", "`Linear4bit` layers", partial(bitsandbytes, bits=4), needs="bitsandbytes"),
    Companion("GGUF layers", "`GGUFLinear` layers", gguf, needs="gguf"),
    Companion(
        "GGUF file", "`from_single_file(..., quantization_config=GGUFQuantizationConfig(...))`", gguf_file,
        needs="gguf", refused={"after": "was exchanged after accelerate()"},
    ),
    Companion("LoRA", "`pipe.load_lora_weights(...)`", lora, lambda pipe: pipe.unload_lora_weights(), needs="peft"),
    Companion("LoRA, fused", "`pipe.fuse_lora()`", fused_lora, unfuse, restores=1e-5, needs="peft"),
    Companion("LoRA, merged", "`pipe.fuse_lora(); pipe.unload_lora_weights()`", merged_lora, needs="peft"),
    Companion(
        "attention backend", "`set_attention_backend(...)`", attention_backend,
        lambda pipe: pipe.transformer.set_attention_backend("native"),
    ),
    Companion(
        "gradient checkpointing", "`enable_gradient_checkpointing()`",
        lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
        lambda pipe: pipe.transformer.disable_gradient_checkpointing(),
    ),
    Companion("tomesd", "`tomesd.apply_patch(pipe)`", tome, without_tome, needs="tomesd", subject=UNET),
    *(
        Companion(
            f"diffusers' {name}", f"`enable_cache({name}Config(...))`", partial(own_cache, name=name), without_cache,
            refused={"": ONE_CACHE},
        )
        for name in CACHES
    ),
)  # fmt: skip

COMPANIONS = {companion.name: companion for companion in _TABLE}
