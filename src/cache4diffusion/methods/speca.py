"""SpeCa: speculative caching. A Taylor draft, verified in the last block; a failed check makes the next step full.

Source: arXiv:2509.11628 (ACM MM 2025); released code in the Cache4Diffusion repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache4diffusion.gates import Speculative, Verification
from cache4diffusion.method import Composition, Dial, Method, MethodInfo
from cache4diffusion.predictors import Taylor
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts

_TUNED = ("threshold", "decay", "min_run", "max_run", "order", "warmup", "floor")  # what the released scripts set


@dataclass(frozen=True)
class SpeCa(Method):
    """TaylorSeer's draft, with a check of the last block on the later cached steps of a run.

    See `Speculative` for the rule; a check acts on the next step and nothing is rolled back, as in the released code.
    The checked tensor is the fused part of the last block (FLUX) or that block's output (DiT).

    Cost: TaylorSeer's memory; a checked step runs one block more. One host sync per checked step.
    Thresholds do not carry over between metrics or denoisers. Elementwise relative errors grow large near zero, which
    is why FLUX's published one is 7.
    Differences from the code: every row of a batch decides for itself (``decide="batch"`` is the code's one decision);
    ``threshold=0`` is off (the code still caches; ``variant="official"``). The default threshold, 0.3, is that of one
    DiT script, beside FLUX's other values: on FLUX it checks more strictly than the code and caches less. Progress is
    ``step / num_steps`` as for FLUX; the DiT code counts one step more. HunyuanVideo's code checks on every cached
    step and divides by ``|true| + 1e-8``; here checks begin after ``min_run`` steps, with 1e-10, everywhere.
    """

    threshold: float = setting(0.3, "first tolerance of the check; 0 is off. Code: 7 (FLUX), 0.1, 0.3 (DiT)", ge=0)
    decay: float = setting(0.3, "factor on the tolerance over the whole run. Code: 0.3 (FLUX), 0.01 (DiT)", gt=0, le=1)
    min_run: int = setting(2, "cached steps before checks begin. Code: 2", ge=1)
    max_run: int = setting(8, "cached steps after which a step is full. Code: 8 (FLUX)", ge=1)
    order: int = setting(2, "order of the Taylor draft. Code: 2 (FLUX), 4 (DiT)", ge=0, le=8)
    warmup: int = setting(3, "steps before this one begin as FcF... Code: 3", ge=0)
    floor: float = setting(0.1, "lower bound of the tolerance. Code: 0.1 (FLUX), 0.01 (DiT)", ge=0)
    metric: Literal["relative_l1", "l1", "l2", "relative_l2", "cosine"] = setting(
        "relative_l1", "how prediction and truth are compared. Code: relative_l1"
    )
    decide: Literal["batch", "any", "row"] = setting("row", "per row, one decision, or full if any row needs it")
    variant: Literal["default", "official"] = setting("default", "'official': threshold 0 still caches, as the code")

    info: ClassVar[MethodInfo] = MethodInfo(
        name="speca",
        title="SpeCa",
        arxiv="2509.11628",
        site="parts",
        gate="speculative check",
        predictor="Taylor",
        tokens=None,
        fidelity="code",
        off={"threshold": 0.0},
        family="adaptive gates",
        when="images of a batch differ: easy ones should skip more steps than hard ones",
        dial=Dial("threshold", 0.3, 30.0, beside={"floor": 0.0}),
        ladder=({"threshold": 0.1, "warmup": 10, "floor": 0.03}, {"warmup": 10}, {"threshold": 1.0, "floor": 0.3}),
        citation="Liu et al., SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching, ACM MM 2025",
        published={
            name: dict(zip(_TUNED, values, strict=False))
            for name, values in {
                "FLUX.1-dev": (7, 0.3, 2, 8, 2, 3, 0.1),
                "DiT-XL/2": (0.1, 0.01, 2, 5, 4, 3, 0.01),
                "DiT-XL/2, script for several GPUs": (0.3, 0.05, 3, 8, 4),
                "HunyuanVideo": (1, 0.1, 4, 12, 1, 1, 0.1),
            }.items()
        },
    )

    def compose(self) -> Composition:
        """Parts x speculative check x Taylor."""
        gate = Speculative(
            threshold=self.threshold,
            decay=self.decay,
            min_run=self.min_run,
            max_run=self.max_run,
            warmup=self.warmup,
            floor=self.floor,
            verification=Verification(metric=self.metric),
            is_off_at_zero=self.variant == "default",
        )
        return Composition(
            site=Parts(),
            gate=gate,
            predictor=Taylor(self.order, first_difference_step=max(self.warmup - 1, 0)),
            decide=self.decide,
        )
