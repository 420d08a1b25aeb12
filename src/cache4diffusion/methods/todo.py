"""ToDo: self-attention keeps all queries, and keys and values of every second row and column.

Source: arXiv:2402.13573 (IJCAI workshop 2024); released code ethansmith2000/ImprovedTokenMerge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import Throughout
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.settings import setting
from cache4diffusion.sites import Reduced
from cache4diffusion.tokens import KeyStride


@dataclass(frozen=True)
class ToDo(Method):
    """On every step, self-attention looks at ``N / factor^2`` keys; every token asks. Nothing has to be restored.

    Exact where the image is constant over cells of ``factor x factor`` tokens: equal keys of equal multiplicity change
    no softmax. Text is not touched: cross-attention runs as always. The strip is ``rrrr``.

    Cost: nothing but an index per block; no similarities, all shapes known.
    Differences from the code: nearest neighbours only (it can also pool); only the finest level with attention, or as
    far as ``max_downsample`` says, with one factor (the code has one per width of a level); no stop along the run.
    """

    factor: int = setting(2, "keys are every so many rows and columns; 1 is off. Code: 2 (1024 px), 3 (1536)", ge=1)
    max_downsample: float = setting(1.0, "up to how much coarser levels are served. Code: 1", ge=1)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="todo",
        title="ToDo",
        arxiv="2402.13573",
        site="parts on fewer tokens",
        gate="every step",
        predictor="none",
        tokens="fewer keys",
        fidelity="code",
        off={"factor": 1},
        family="tokens",
        when="a U-Net makes images far larger than it was trained for",
        ladder=({}, {"factor": 3}, {"factor": 4}),
        citation="Smith et al., ToDo: Token Downsampling for Efficient Generation of High-Resolution Images, 2024",
        published={
            "Stable Diffusion 1.x, 1024 px": {"factor": 2},
            "Stable Diffusion 1.x, 1536 px": {"factor": 3},
            "Stable Diffusion 1.x, 2048 px": {"factor": 4},
        },
    )

    def compose(self) -> Composition:
        """Parts on fewer tokens x every step x fewer keys."""
        return Composition(
            site=Reduced(("attn",), self.max_downsample),
            gate=Throughout(is_on=self.factor > 1),
            tokens=KeyStride(self.factor),
        )
