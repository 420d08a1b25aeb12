"""FLOPs of what a thread runs, with the formulas torch's own counter lacks.

FLOPs are counted with torch's `FlopCounterMode`: two per multiply-add of matrix products, convolutions and attention;
element-wise work, norms and softmax count 0. The formulas it lacks are added here, for this count only (torch's global
registry stays as it is). What runs on a placeholder counts what it really does: 0 for a zero-width tensor, one token's
worth for a one-token tensor, 0 for a module that is bypassed.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """FLOPs of fused attention, masked or not: scores ``2 B H N M D`` plus weighted sum ``2 B H N M D_v``.

    Args:
        query, key, value: shapes ``[..., N, D]``, ``[..., M, D]``, ``[..., M, D_v]``; fewer key heads (GQA) are
            broadcast by the kernel and cost as many products as there are query heads.
    """
    *batch, tokens, width = query
    return 2 * math.prod(batch) * tokens * key[-2] * (width + value[-1])


def _attention_backward(_grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    # Scores again, then the gradients of value, weights, query and key: five products where forward has two.
    *batch, tokens, width = query
    return 2 * math.prod(batch) * tokens * key[-2] * (3 * width + 2 * value[-1])


def _native_attention(query: Any, key: Any, value: Any, embed_dim: int, heads: int, *args: Any, **kwargs: Any) -> int:
    batch, tokens, width = query
    sources = key[1]
    projections = 2 * batch * embed_dim * (2 * tokens * width + 2 * sources * width)  # q and output; k and v
    return projections + 4 * batch * tokens * sources * embed_dim


def _encoder_layer(source: Any, embed_dim: int, heads: int, *args: Any, **kwargs: Any) -> int:
    weights = [shape for shape in args if isinstance(shape, tuple | torch.Size) and len(shape) == 2]
    batch, tokens = source[0], source[1]
    linears = sum(2 * batch * tokens * math.prod(shape) for shape in weights)  # qkv, projection, the two of the MLP
    return linears + 4 * batch * tokens * tokens * embed_dim


def _product(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _matrix_vector(matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _from_second(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda bias, *args, **kwargs: formula(*args, **kwargs)


def _batched_sum(_self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _linear(input: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(input) * weight[0]


def _packed_linear(input: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(input) * out_shape[-1]  # packed weights have no readable shape; the output has


def _convolution(input: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _foreach(many: Any, others: Any, *args: Any, **kwargs: Any) -> int:
    return sum(_product(a, b) for a, b in zip(many, others, strict=True))


def _convolution_1d(input: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * weight[0] * weight[1]  # conv_tbc: weight is [kernel, in, out]


# Operators torch has (some only in some builds) and its counter does not know, by name.
MISSING_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "_scaled_dot_product_fused_attention_overrideable": attention_flops,
    "_scaled_dot_product_attention_math_for_mps": attention_flops,
    "_scaled_dot_product_cudnn_attention": attention_flops,  # known to newer versions of torch only
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "_triton_scaled_dot_attention": attention_flops,
    "_native_multi_head_attention": _native_attention,
    "_triton_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "mv": _matrix_vector,
    "addmv": _from_second(_matrix_vector),
    "dot": _matrix_vector,
    "vdot": _matrix_vector,
    "addbmm": _batched_sum,
    "_addmm_activation": _from_second(_product),
    "_int_mm": _product,
    "_scaled_mm_v2": _product,
    "_foreach_mm": _foreach,
    "mkldnn_linear": _linear,
    "_mixed_dtypes_linear": _packed_linear,
    "_weight_int4pack_mm": _packed_linear,
    "_weight_int4pack_mm_for_cpu": _packed_linear,
    "_weight_int4pack_mm_with_scales_and_zeros": _packed_linear,
    "_weight_int8pack_mm": _packed_linear,
    "_dyn_quant_matmul_4bit": _packed_linear,
    "_grouped_mm": _packed_linear,
    "_scaled_grouped_mm": _packed_linear,
    "_scaled_grouped_mm_v2": _packed_linear,
    "mkldnn_convolution": _convolution,
    "cudnn_convolution_relu": _convolution,
    "cudnn_convolution_add_relu": _convolution,
    "miopen_convolution": _convolution,
    "miopen_depthwise_convolution": _convolution,
    "_mps_convolution": _convolution,
    "_conv_depthwise2d": _convolution,
    "conv_depthwise3d": _convolution,
    "slow_conv_dilated2d": _convolution,
    "slow_conv_dilated3d": _convolution,
    "conv_tbc": _convolution_1d,
}

_LOOKS_COSTLY = re.compile(r"attention|attn|conv|linear|lstm|gru|rnn|(^|_)(mm|bmm|matmul)(_|$)|scaled_dot")
_LOOKS_CHEAP = re.compile(r"backward|prepack|reorder|convert|upsample|to_mkldnn")


def missing_formulas() -> dict[Any, Callable[..., int]]:
    """The formulas of this module for the operators that exist here and that torch's counter does not know."""
    packets = {name: getattr(torch.ops.aten, name, None) for name in MISSING_FORMULAS}
    return {
        packet: MISSING_FORMULAS[name]
        for name, packet in packets.items()
        if packet is not None and packet not in flop_registry
    }


class _Watch(TorchDispatchMode):
    """Notes operators that look costly and have no formula. Sits below the counter: sees what it decomposed into."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known, self.uncounted = known, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in self.known:
            name = func.name().split("::")[-1].split(".")[0]
            if _LOOKS_COSTLY.search(name) and not _LOOKS_CHEAP.search(name):
                self.uncounted.add(func.name())
        return func(*args, **(kwargs or {}))


class FlopCounter:
    """Counts the FLOPs of everything this thread runs inside ``with FlopCounter() as counter:``.

    Works around a whole pipeline call, with or without gradients or inference mode. Compiled regions run eagerly while
    counted, so do not time a counted run; it takes a few per cent longer on large tensors, several times as long on
    tiny ones. Products hidden in a foreign extension (flash-attn, sage, Triton) are not seen by torch; those it can
    name are in ``uncounted``.

    Args:
        module: also count what runs inside this module's forward (a denoiser), or these modules', in ``module_total``.

    After the block: ``total`` and ``module_total`` (int), ``by_operator`` (name -> FLOPs), ``uncounted`` (names of
    operators that look like a product or attention and have no formula; empty when the count is complete).
    """

    def __init__(self, module: torch.nn.Module | Sequence[torch.nn.Module] | None = None) -> None:
        self.modules = [module] if isinstance(module, torch.nn.Module) else list(module or ())
        self.total = 0
        self.module_total = 0
        self.by_operator: dict[str, int] = {}
        self.uncounted: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FlopCounter:
        counter = FlopCounterMode(display=False, custom_mapping=missing_formulas())
        self._counter, self._watch = counter, _Watch(counter.flop_registry)
        self.module_total, depth, begun = 0, 0, 0

        def enter(*_: Any) -> None:
            nonlocal depth, begun
            if depth == 0:
                begun = counter.get_total_flops()
            depth += 1

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                self.module_total += counter.get_total_flops() - begun

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._watch)
            stack.enter_context(counter)
            for module in self.modules:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)
        self.total = int(self._counter.get_total_flops())
        counts = self._counter.get_flop_counts().get("Global", {})
        self.by_operator = {str(operator): int(count) for operator, count in counts.items()}
        self.uncounted = sorted(self._watch.uncounted)


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs of one call of ``fn``; see `FlopCounter` for what counts."""
    with FlopCounter() as counter:
        fn()
    return counter.total
