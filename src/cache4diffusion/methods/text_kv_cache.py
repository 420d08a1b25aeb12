"""Text-KV cache: keys and values of the text are computed once per prompt, exactly.

Source: diffusers, hooks/text_kv_cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import FixedInterval, Schedule
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import PromptModules


@dataclass(frozen=True)
class TextKVCache(Method):
    """Every module that works on the prompt and on nothing else runs at the first step of a run, and never again.

    Which modules those are is seen, in any denoiser: the projections to keys and values of cross-attention (PixArt,
    Stable Diffusion, Wan), those of a text stream that no block updates, and what embeds or refines the text. Exact. In
    an MMDiT whose text is modulated by the timestep and updated by attention (FLUX, SD3), keys and values are functions
    of the step, so only the text's embedding is kept.

    Cost: the outputs of these modules, once for each branch: for cross-attention keys and values of the text per block.
    Differences from the code: theirs knows one denoiser, by its class, and keeps entries by the address of the text's
    memory, which another prompt may be given later; here what is kept belongs to a branch of a run, and conditioning
    that is replaced or written into makes it compute anew. A module that also reads a mask is left alone. That an
    adapter's scale changes within a run is not seen.
    """

    interval: int = setting(0, "steps after which it is computed anew; 0: once in a run, 1: always", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="text-kv-cache",
        title="Text-KV cache",
        arxiv=None,
        site="modules of the prompt",
        gate="the first step",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"interval": 1},
        family="reuse of blocks and parts",
        when="nothing may be lost, and text enters by cross-attention or as a stream of its own",
        citation="The diffusers team, Text KV cache hook, diffusers 0.37",
        is_exact=True,
    )

    def compose(self) -> Composition:
        """Modules of the prompt x the first step x reuse."""
        gate = FixedInterval(self.interval) if self.interval else Schedule((0,))
        return Composition(site=PromptModules(), gate=gate, predictor=Reuse())
