"""ClusCa: forecasts, corrected by one computed token per cluster.

Source: arXiv:2509.10312 (ACM MM 2025); released code Shenyi-Z/Cache4Diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import FixedInterval
from cache4diffusion.method import Composition, Method, MethodInfo
from cache4diffusion.predictors import Taylor
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import ClusterTokens


@dataclass(frozen=True)
class ClusCa(Method):
    """TaylorSeer, where in every MLP one random token per cluster is computed and moves the others by ``gamma``.

    A full step in ``interval`` after ``warmup``; the strip of ``interval=3, warmup=2`` is ``FFppFppF``. Every part is
    predicted; then ``out = P + gamma (mean of the computed outputs of its cluster - P)``, and the computed tokens are
    as they were computed. Clusters are found once per full step, in what leaves the last block with an MLP of its own;
    fused blocks (FLUX's single-stream ones) are predicted alone. See `ClusterTokens`. No attention map is needed.

    Both halves of batched guidance have one clustering and compute the same tokens.

    Cost: ``order + 1`` copies of every part's output; a clustering per full step; per cached step ``K / N`` of the
    MLPs. No host sync: k-means makes as many assignments as it may.
    Differences from the code: the released arithmetic lets what tokens were moved by stay with them, also for later
    differences, and adds the forecast's differences to tokens that were just computed: ``variant="official"`` (and
    order 0, where the two are one). In either, sums are in float32, clusters without tokens are left where they are and
    another token is computed for them (the code computes token 0 once more, and counts it twice), and k-means begins
    with distinct tokens and makes as many assignments as it may. HunyuanVideo's code can cluster each frame apart, and
    puts what it computed of the image into its text; here that is the text's own.
    """

    interval: int = setting(5, "distance of two full steps; 1 never caches. Code: 5 (FLUX), 4 (DiT)", ge=1)
    order: int = setting(1, "highest power of the step offset; 0 is plain reuse. Code: 1, 4 (DiT)", ge=0, le=8)
    warmup: int = setting(3, "first steps that are always full. Code: 3 (FLUX), 2 (DiT), 1 (HunyuanVideo)", ge=1)
    clusters: int = setting(16, "K, per stream; as many tokens are computed. Code: 16, 32 (HunyuanVideo)", ge=0)
    gamma: float = setting(
        0.005, "weight of a cluster's mean. Code: 0.005 (FLUX), 0.01 (HunyuanVideo), 0 (DiT)", ge=0, le=1
    )
    spreads_text: bool = setting(False, "whether text tokens are moved, too. Code: yes (HunyuanVideo), no (FLUX)")
    iterations: int = setting(10, "assignments of k-means", ge=1)
    seed: int = setting(0, "of the draws", ge=0)
    variant: Literal["ours", "official"] = setting("ours", "whose arithmetic")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="clusca",
        title="ClusCa",
        arxiv="2509.10312",
        site="parts",
        gate="fixed interval",
        predictor="Taylor",
        tokens="one per cluster",
        fidelity="code",
        off={"interval": 1},
        family="tokens",
        when="you forecast over long intervals, and a few fresh tokens per step should correct it",
        ladder=({"interval": 2}, {}, {"interval": 7}),
        citation="Zheng et al., Compute Only 16 Tokens in One Timestep (ClusCa), ACM MM 2025",
        published={
            "FLUX.1-dev": {"interval": 5, "order": 1, "warmup": 3, "clusters": 16, "gamma": 0.005},
            "FLUX.1-dev, on Ascend": {"interval": 6, "order": 1, "clusters": 16, "gamma": 0.007},
            "DiT-XL/2": {"interval": 4, "order": 4, "warmup": 2, "clusters": 16, "gamma": 0.0, "iterations": 100},
            "HunyuanVideo": {
                "interval": 5,
                "order": 1,
                "warmup": 1,
                "clusters": 32,
                "gamma": 0.01,
                "spreads_text": True,
            },
        },
    )

    def compose(self) -> Composition:
        """Parts x fixed interval after a warm-up x Taylor x one token per cluster."""
        return Composition(
            site=Parts(),
            gate=FixedInterval(self.interval, anchor="warmup", warmup=self.warmup),
            predictor=Taylor(self.order, first_difference_step=self.warmup - 1),
            tokens=ClusterTokens(
                self.clusters,
                self.gamma,
                self.spreads_text,
                self.iterations,
                self.seed,
                "official" if self.order == 0 else self.variant,  # of a reused feature, it is what stays in the cache
                self.order,
                self.warmup - 1,
            ),
        )
