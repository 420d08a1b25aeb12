"""Which driver puts which kind of site to work: one row per site."""

from __future__ import annotations

from cache4diffusion.engine.attentions import AttentionsDriver
from cache4diffusion.engine.denoiser import DenoiserDriver
from cache4diffusion.engine.driver import Driver
from cache4diffusion.engine.encoder import EncoderDriver
from cache4diffusion.engine.gated import GatedPartsDriver
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.last_stream import LastStreamDriver
from cache4diffusion.engine.level import LevelDriver
from cache4diffusion.engine.linears import LinearsDriver
from cache4diffusion.engine.mixed import MixedScoreDriver
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.past_frames import PastFramesDriver
from cache4diffusion.engine.prompt_modules import PromptModulesDriver
from cache4diffusion.engine.reducing import ReductionDriver
from cache4diffusion.engine.reducing_attention import AttentionReductionDriver
from cache4diffusion.engine.reducing_level import ReducedLevelDriver
from cache4diffusion.engine.scaled import ScaledPartsDriver
from cache4diffusion.engine.single_context import SingleContextDriver
from cache4diffusion.engine.span import BlocksDriver, SpanDriver, SwitchingSpanDriver
from cache4diffusion.engine.trajectory import TrajectoryDriver
from cache4diffusion.errors import CompositionError
from cache4diffusion.sites import (
    Attentions,
    Blocks,
    Denoiser,
    GatedParts,
    Linears,
    MixedScore,
    Parts,
    PartsAndStream,
    PastFrames,
    PromptModules,
    Reduced,
    ReducedAttention,
    ReducedLevel,
    ScaledParts,
    SingleContext,
    Site,
    Span,
    SwitchingSpan,
    Trajectory,
    UNetEncoder,
    UNetLevel,
)

DRIVERS: dict[type[Site], type[Driver]] = {
    Denoiser: DenoiserDriver,
    Span: SpanDriver,
    SwitchingSpan: SwitchingSpanDriver,
    Blocks: BlocksDriver,
    Parts: PartsDriver,
    Attentions: AttentionsDriver,
    Linears: LinearsDriver,
    GatedParts: GatedPartsDriver,
    MixedScore: MixedScoreDriver,
    ScaledParts: ScaledPartsDriver,
    SingleContext: SingleContextDriver,
    PromptModules: PromptModulesDriver,
    PastFrames: PastFramesDriver,
    PartsAndStream: LastStreamDriver,
    Reduced: ReductionDriver,
    ReducedAttention: AttentionReductionDriver,
    ReducedLevel: ReducedLevelDriver,
    UNetLevel: LevelDriver,
    UNetEncoder: EncoderDriver,
    Trajectory: TrajectoryDriver,
}


def driver_of(host: Host, site: Site) -> Driver:
    """Make the driver of a site.

    Raises:
        CompositionError: the site has no row in the table.
    """
    if type(site) not in DRIVERS:
        raise CompositionError(
            f"{type(site).__name__} has no driver, so the engine cannot put it to work. Add its row to DRIVERS in "
            "cache4diffusion/engine/drivers.py."
        )
    return DRIVERS[type(site)](host, site)
