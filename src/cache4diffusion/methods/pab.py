"""PAB: attention outputs are reused for a range of steps, the longer the less that kind of attention changes.

Source: arXiv:2408.12588 (ICLR 2025); released code NUS-HPC-AI-Lab/VideoSys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cache4diffusion.gates import Broadcast
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Attentions

_FIVE = (0, 1, 2, 3, 4)


def _published(
    ranges: tuple[int, int, int],
    window: tuple[float, float],
    mlp_timesteps: tuple[float, ...] = (),
    mlp_blocks: tuple[int, ...] = _FIVE,
) -> dict[str, Any]:
    """Settings from a pipeline's configuration: ranges of spatial, temporal and cross attention."""
    mlp = {"mlp_timesteps": mlp_timesteps, "mlp_blocks": mlp_blocks, "mlp_skip": 2} if mlp_timesteps else {}
    return {"spatial": ranges[0], "temporal": ranges[1], "cross": ranges[2], "window": window, **mlp}


@dataclass(frozen=True)
class PAB(Method):
    """In the middle of the run, each kind of attention is computed on every n-th step, with an n of its own.

    An attention is reused where ``step % range != 0`` and ``window[0] < int(timestep) < window[1]``. Whether an
    attention is spatial (within a frame, or over all tokens at once), temporal (over the frames) or cross is seen from
    what it attends over. The first five blocks' MLPs (``mlp_blocks``) may be reused as well, for ``mlp_skip`` steps
    from each of ``mlp_timesteps`` on.

    Cost: one copy of every attention's output. An attention that is reused costs nothing, its norm included.
    Differences from the code: Open-Sora's and Latte's keep what leaves the gate, of the step it was computed at; here,
    as in its CogVideoX, the gate is the current step's. A window is compared with timesteps on a scale of 1000,
    whatever the pipeline's own (with evenly spaced ones where its clock is a logarithm); an MLP is computed at the step
    nearest to a listed timestep, so that lists hold for any number of steps. Where attention and MLP are one part
    (FLUX's single-stream blocks), it counts as spatial. Sharing work among devices is not part of this.
    """

    spatial: int = setting(2, "range of attention within a frame or over all tokens; 1 never caches. Code: 2", ge=1)
    temporal: int = setting(4, "range of attention over frames. Code: 4, 3 (Latte)", ge=1)
    cross: int = setting(6, "range of cross-attention. Code: 6", ge=1)
    window: tuple[float, float] = setting((100.0, 850.0), "timesteps between which is reused. Code: (100, 850)")
    mlp_timesteps: tuple[float, ...] = setting((), "timesteps at which MLPs are computed to be reused; (): none are")
    mlp_blocks: tuple[int, ...] = setting(
        _FIVE, "blocks whose MLPs are reused, by number in their list. Code: 0 to 4, 0 to 6"
    )
    mlp_skip: int = setting(2, "steps for which an MLP is reused. Code: 2", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="pab",
        title="PAB",
        arxiv="2408.12588",
        site="attentions",
        gate="a range per kind of attention",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"spatial": 1, "temporal": 1, "cross": 1, "mlp_timesteps": ()},
        family="reuse of blocks and parts",
        when="a video transformer attends over space, over time and to the text in separate modules",
        ladder=({}, {"spatial": 3, "temporal": 5, "cross": 7}, {"spatial": 5, "temporal": 7, "cross": 9}),
        citation="Zhao et al., Real-Time Video Generation with Pyramid Attention Broadcast, ICLR 2025",
        published={
            "Open-Sora 1.2": _published((2, 4, 6), (450, 930), (676, 788, 864)),
            "Latte": _published((2, 3, 6), (100, 800), (720, 640, 560, 480, 400)),
            "Open-Sora-Plan 1.1": _published((2, 4, 6), (100, 850), tuple(range(738, 425, -24)), tuple(range(7))),
            "Open-Sora-Plan 1.2": {"spatial": 2, "temporal": 1, "cross": 6, "window": (100, 850)},
            "CogVideoX": {"spatial": 2, "temporal": 1, "cross": 1, "window": (100, 850)},
            "Vchitect": _published((2, 4, 6), (100, 800)),
        },
    )

    def compose(self) -> Composition:
        """Attentions x a range for each kind x reuse."""
        has_mlp = bool(self.mlp_timesteps)
        return Composition(
            site=Attentions(mlp_blocks=self.mlp_blocks if has_mlp else ()),
            gate=Broadcast(self.spatial, self.temporal, self.cross, self.window, self.mlp_timesteps, self.mlp_skip),
            predictor=Reuse(),
        )
