"""TokenCache: trained weights say which tokens of which blocks are worth computing between full steps.

Source: arXiv:2409.18523; its code is not out, and of the paper only the ideas could be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.calibration import Given
from cache4diffusion.calibration.token_weights import TokenWeights
from cache4diffusion.gates import PartInput, TwoPhase
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import WeightedTokens


@dataclass(frozen=True)
class TokenCache(Method):
    """Between full steps the least important blocks compute their most important tokens, and the others everything.

    ``w(l, t)`` in [0, 1] for every image token: its importance in block ``l`` at step ``t``, a function of nothing
    else, so of neither the image nor the prompt. ``c4d calibrate`` trains it on your denoiser, which stays as it is,
    with ``w f(z_t) + (1 - w) f(z_(t+1))`` in the place of what a block adds. On a cached step the ``pruned`` share of
    the blocks with the least mean of ``w`` compute the ``share`` of their tokens with the largest ``w``.

    Two phases, each with full steps at its own distance: ``early=4, late=2, switch=0.5`` over 12 steps is
    ``FpppFpppFpFp``. Weights of 1 compute everything, weights of 0 nothing: then it is `FORA` with these full steps.

    In a pruned block self-attention is reused as a whole, so that no token attends to keys and values of other steps;
    in the others all tokens attend to all. It is for the steps, scheduler, guidance and size it was trained with; a
    run of other steps needs ``resample=True``.

    Cost: 1 copy of every part's output, and of un-projected attention where a part is fused; per cached step the
    blocks that are not pruned, and of the others the share of the MLPs. No host sync.
    Differences from the paper: it leaves the keys and values of tokens that pass a block by open, and which of its
    phases has the longer turns; both are ours here, as are shares and distances. A token that is not computed keeps the
    outputs of the block's parts, before today's gates, where the paper keeps the block's output. Turns go over steps
    alone: blocks and tokens change as ``w`` does from step to step.
    """

    early: int = setting(4, "distance of two full steps in the early phase; 1 never caches", ge=1)
    late: int = setting(2, "the same in the late phase", ge=1)
    switch: float = setting(0.5, "where the late phase begins, fraction of the steps", ge=0, le=1)
    pruned: float | None = setting(
        None, "share of the blocks that computes some tokens only, None is what it was calibrated for", ge=0, le=1
    )
    share: float | None = setting(
        None, "of their tokens that is computed, None is what it was calibrated for", ge=0, le=1
    )
    calibration: Given = setting(None, "weights of your denoiser: a file of c4d calibrate, or what it returned")
    resample: bool = setting(False, "accept other steps or noise levels, by the nearest calibrated ones")

    calibrator = TokenWeights
    info: ClassVar[MethodInfo] = MethodInfo(
        name="tokencache",
        title="TokenCache",
        arxiv="2409.18523",
        site="parts",
        gate="two phases",
        predictor="reuse",
        tokens="trained weights",
        fidelity="reconstructed",
        off={"early": 1, "late": 1},
        family="tokens",
        when="images have their content at the same places, and weights may be trained for each of them",
        ladder=({"pruned": 0.5}, {}, {"early": 6, "late": 4}),
        citation="Lou et al., Token Caching for Diffusion Transformer Acceleration, arXiv 2409.18523",
        needs_calibration=True,
    )

    def compose(self) -> Composition:
        """Parts x two phases x reuse x weighted tokens."""
        entry, trained = self.measured, self.trained
        num_steps = len(next(iter(entry.fit.values())))
        return Composition(
            site=Parts(),
            gate=TwoPhase(self.early, self.late, self.switch),
            predictor=Reuse(),
            tokens=WeightedTokens(
                trained.pruned if self.pruned is None else self.pruned,
                trained.share if self.share is None else self.share,
                PartInput(entry.fit, num_steps, entry.levels, self.resample),
            ),
        )

    @property
    def trained(self) -> TokenWeights:
        """What it was calibrated with."""
        made = self.loaded
        assert made is not None and isinstance(made.statistic, TokenWeights)  # `measured` has seen to it
        return made.statistic
