"""A composition: four axes that the engine runs together, and which of their parts do not fit each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cache4diffusion.errors import CompositionError, SettingError
from cache4diffusion.gates import Entrance, Front, Gate, Guard, LookAhead, PartInput, Place, Signal, Verification
from cache4diffusion.gates.guards import ForceLast, Warmup
from cache4diffusion.gates.timetable import positions_of
from cache4diffusion.guidance import BranchRule
from cache4diffusion.predictors import LinearPredictor, Predictor, Reuse, TwoSided
from cache4diffusion.sites import (
    Blocks,
    Denoiser,
    GatedParts,
    Linears,
    Parts,
    PartsAndStream,
    PastFrames,
    PromptModules,
    Reduced,
    ReducedAttention,
    ReducedLevel,
    SingleContext,
    Site,
    Span,
    SwitchingSpan,
    Trajectory,
    UNetEncoder,
    UNetLevel,
)
from cache4diffusion.tokens import Ranking, Reduction, TokenRule

Decide = Literal["batch", "any", "row"]

_EXAMPLES = {
    "site": "span(front=1)",
    "gate": "interval(interval=3)",
    "predictor": "taylor(order=1)",
    "tokens": "top(recompute_ratio=0.1)",
    "cfg": "fastercache(interval=5)",
}


@dataclass(frozen=True)
class Composition:
    """What the engine runs.

    Args:
        site: where features are recorded and replaced; None if only ``cfg`` is used.
        gate: when.
        predictor: with what.
        guards: limits that overrule the gate, in this order.
        tokens: which tokens are computed anyway on a cached step, or (at sites ``Reduced`` and ``ReducedLevel``)
            which are left out of a step's computation; None for none.
        decide: ``"batch"`` one decision from all rows together; ``"any"`` full if one row alone would be; ``"row"``
            each row for itself.
        branches: ``"independent"`` each CFG branch decides for itself; ``"tied"`` the first branch of a step decides
            and the others follow.
        cfg: predicts one CFG branch from another, outside everything else.
        made_for: length and noise levels (if known) of the only runs that its numbers are for; None for any.

    Raises:
        CompositionError: one of them is something else, or two of them cannot work together; the message says why.
    """

    site: Site | None
    gate: Gate | None
    predictor: Predictor = field(default_factory=Reuse)
    guards: tuple[Guard, ...] = ()
    tokens: TokenRule | Reduction | None = None
    decide: Decide = "batch"
    branches: Literal["independent", "tied"] = "independent"
    cfg: BranchRule | None = None
    made_for: tuple[int, tuple[float, ...] | None] | None = None

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("site", self.site, Site),
            ("gate", self.gate, Gate),
            ("predictor", self.predictor, Predictor),
            ("tokens", self.tokens, (TokenRule, Reduction)),
            ("cfg", self.cfg, BranchRule),
        ):
            if value is not None and not isinstance(value, kind):
                raise CompositionError(
                    f"{name}={value!r} is no {name}. Use a name such as {_EXAMPLES[name]!r}, or an object of that kind."
                )
        if (self.site is None) != (self.gate is None):
            raise CompositionError("A site needs a gate and a gate needs a site.")
        if self.site is None:
            if self.cfg is None:
                raise CompositionError("Nothing to do: give a site and a gate, or a CFG branch rule.")
            return
        assert self.gate is not None
        watch, site = self.gate.watch, self.site
        if isinstance(site, (Reduced, ReducedLevel)) != isinstance(self.tokens, Reduction):
            raise CompositionError(
                f"{type(self.tokens or self.predictor).__name__} and {site.words} do not fit: a rule that leaves "
                "tokens out of a step's computation needs site='reduced', site='reduced_attention' or "
                "site='reduced_level', and these sites such a rule. Use both, as in site='reduced', tokens='merge', or "
                "neither."
            )
        if isinstance(site, ReducedAttention) and isinstance(self.tokens, Ranking):
            raise CompositionError(
                f"{type(self.tokens).__name__} ranks the tokens of a block for all of its parts, and {site.words} has "
                "queries and values instead. Use site='reduced', or another rule, such as tokens='asymmetric'."
            )
        if isinstance(site, (Reduced, ReducedLevel)) and (
            watch is not None or self.decide != "batch" or not isinstance(self.predictor, Reuse)
        ):
            raise CompositionError(
                f"At {site.words} nothing is predicted but by reuse, and the step alone says when tokens are left out. "
                "Use predictor='reuse', decide='batch' and a gate that watches nothing, such as 'throughout'."
            )
        if isinstance(site, PastFrames) and (
            watch is not None
            or self.decide != "batch"
            or self.tokens is not None
            or not isinstance(self.predictor, Reuse)
        ):
            raise CompositionError(
                f"At {site.words} nothing is predicted: what is kept is what would be computed. Use "
                "predictor='reuse', decide='batch', no token rule and a gate that watches nothing: 'throughout'."
            )
        if isinstance(watch, Verification) and (not isinstance(site, Parts) or isinstance(site, PartsAndStream)):
            raise CompositionError(
                f"{type(self.gate).__name__} verifies a prediction by computing the last block from its own input; at "
                f"{site.words} that block has no input on a cached step. Use site='parts'."
            )
        if watch is not None and watch.needs_stack and isinstance(site, (UNetLevel, UNetEncoder)):
            raise CompositionError(
                f"{type(self.gate).__name__} watches the blocks of a stack, and a U-Net has levels instead. "
                "Use a gate that watches nothing, such as gate='interval'."
            )
        if watch is not None and isinstance(site, Blocks) != isinstance(watch, Entrance):
            raise CompositionError(
                f"{type(self.gate).__name__} and {site.words} do not fit: each block decides by what enters it, and "
                "only there. Use site='blocks' with gate='entrance', or a gate that watches nothing."
            )
        if isinstance(site, GatedParts) != isinstance(watch, PartInput):
            raise CompositionError(
                f"{type(self.gate).__name__} and {site.words} do not fit: each part decides by what enters it, and "
                "only there. Use site='gated_parts' with gate='learned', or another site with another gate."
            )
        if isinstance(watch, Front) and isinstance(site, SwitchingSpan):
            raise CompositionError(
                f"{type(self.gate).__name__} watches the first blocks, and {site.words} caches them late in the run. "
                "Use site='span', or a gate such as 'interval'."
            )
        sees, words = getattr(self.predictor, "sees", None), type(self.predictor).__name__
        if sees == "front" and not (isinstance(watch, Front) and isinstance(site, Span)):
            raise CompositionError(
                f"{words} reads what the first blocks add in the step itself. Use site='span' "
                "with a gate that watches them, such as gate='probe'."
            )
        if sees == "input" and isinstance(site, (Trajectory, UNetLevel, UNetEncoder)):
            raise CompositionError(
                f"{words} maps what enters a site to what leaves it, and at {site.words} no module has both: what is "
                "cached there is made by the whole denoiser. Use a site such as 'parts' or 'blocks'."
            )
        if sees == "input" and isinstance(site, GatedParts):
            raise CompositionError(
                f"{words} maps what enters a part, and {site.words}, are shown that only to decide. Use site='parts'."
            )
        if getattr(self.predictor, "predicts", "anything") == "residual" and getattr(site, "form", "") == "output":
            raise CompositionError(
                f"{words} predicts what is added to what enters, and {site.words} in the form 'output' is not a sum. "
                "Use form='residual', or a site such as 'blocks'."
            )
        if sees == "input" and self.tokens is not None:
            raise CompositionError(
                f"{words} maps every token as it is now, and a token rule hands it a selection. Use one of the two."
            )
        if isinstance(watch, Front) and isinstance(site, Span) and site.front < watch.blocks:
            raise CompositionError(
                f"{type(self.gate).__name__} watches the first {watch.blocks} block(s), but Span(front={site.front}) "
                f"would cache them. Use Span(front={watch.blocks}) or more."
            )
        if isinstance(site, Span) and site.per_list and watch is not None and not isinstance(watch, Front):
            raise CompositionError(
                f"What {type(self.gate).__name__} watches is one for the whole denoiser; with Span(per_list=True) each "
                "list decides by what its own first blocks make. Use per_list=False, or a gate such as 'probe'."
            )
        if isinstance(site, PartsAndStream) and (
            self.decide == "row" or (watch is not None and site.counted == "until")
        ):
            raise CompositionError(
                f"A jump of {site.words} is one for all rows, and told by how far full steps are: with decide='row' "
                "each row has its own, and a gate that watches does not know the next one. Use decide='batch' or "
                "'any', and counted='since'."
            )
        if (
            isinstance(site, UNetEncoder)
            and site.parallel
            and (watch is not None or self.guards or self.cfg is not None)
        ):
            raise CompositionError(
                "UNetEncoder(parallel=True) decodes steps before their time, so it must be known which are cached. Use "
                "a gate that watches nothing, no guards and no cfg; or parallel=False."
            )
        if isinstance(site, Trajectory) and (self.decide != "batch" or self.branches != "tied"):
            raise CompositionError(
                "The trajectory is one for all branches and rows of a step, and so is the decision. Use decide='batch' "
                "and branches='tied' with site='trajectory'."
            )
        if isinstance(site, Trajectory) and (self.cfg is not None or watch is not None):
            raise CompositionError(
                "A cached step of site='trajectory' runs no branch of the denoiser, so there is none to watch or to "
                "predict another one from. Use a gate that watches nothing, such as gate='interval', and no cfg."
            )
        if getattr(self.predictor, "needs_latents", False) and site != Trajectory("all", getattr(site, "solvers", ())):
            raise CompositionError(
                f"{type(self.predictor).__name__} predicts from latents and noise levels, which only "
                "site=Trajectory(feature='all') sees. Use that site, or another predictor, such as 'taylor'."
            )
        if isinstance(self.gate, LookAhead) != isinstance(self.predictor, TwoSided) or (
            isinstance(self.gate, LookAhead) and not isinstance(site, Trajectory)
        ):
            raise CompositionError(
                "LookAhead computes steps ahead of their time and TwoSided makes use of them: one needs the other, and "
                "both need site='trajectory'. Use all three, or another gate and predictor."
            )
        splits = isinstance(site, (Span, SwitchingSpan, Blocks, GatedParts))
        if self.decide == "row" and watch is not None and watch.is_inside and not splits:
            raise CompositionError(
                f"decide='row' with {type(self.gate).__name__} is decided in the middle of a call, when "
                f"{site.words} can no longer be split by rows. Use site='span', or decide='any'."
            )
        if (
            isinstance(site, Parts)
            and not isinstance(site, GatedParts)
            and site.decisions != "one"
            and (watch is not None or self.decide != "batch" or self.tokens is not None)
        ):
            raise CompositionError(
                f"{type(site).__name__}(decisions={site.decisions!r}) takes several decisions before the call, for the "
                "whole batch. Use a gate that watches nothing, decide='batch' and no token rule, or site='parts' with "
                "decisions='one'."
            )
        is_plain = watch is None and self.decide == "batch" and self.tokens is None
        if (
            self.cfg is not None
            and self.cfg.shares_history
            and not (is_plain and isinstance(site, Parts) and isinstance(self.predictor, LinearPredictor))
        ):
            raise CompositionError(
                f"{type(self.cfg).__name__}(shares_history=True) lets one branch go on with the parts that were cached "
                "for both. Use site='parts', a gate that watches nothing, a linear predictor such as 'reuse', "
                "decide='batch' and no token rule; or shares_history=False."
            )
        if self.tokens is not None and isinstance(site, GatedParts):
            raise CompositionError(
                "A token rule computes some tokens of every part on a cached step, and where each part decides for "
                "itself there is no such step. Use site='parts' with a gate such as 'interval'."
            )
        if self.tokens is not None and (self.decide == "row" or isinstance(watch, Verification)):
            raise CompositionError(
                "A token rule writes into the prediction that all rows share, so rows cannot decide for themselves and "
                "a prediction cannot be verified. Use decide='batch' or 'any' with a gate such as 'interval'."
            )
        if isinstance(site, (Reduced, ReducedLevel)):
            return
        if self.tokens is not None and isinstance(site, (PromptModules, SingleContext)):
            raise CompositionError(
                f"A token rule computes some tokens of a part, and {site.words} return nothing that differs from token "
                "to token of the image. Use site='parts'."
            )
        if self.tokens is not None and (not isinstance(site, Parts) or isinstance(site, Linears)):
            raise CompositionError(
                f"A token rule computes some tokens of a part; {site.words} has no parts. Use site='parts'."
            )

    @property
    def needs_stack(self) -> str | None:
        """What it needs a stack of blocks for that carries the latent through the denoiser; None if it does not.

        U-Nets have none: their transformer blocks are nested in levels, and what runs between them is not a block.
        """
        watch = self.gate.watch if self.gate is not None else None
        if isinstance(watch, Signal):
            return f"{type(self.gate).__name__} watches the modulated input of its first block"
        if isinstance(watch, Front):
            return f"{type(self.gate).__name__} watches the residual of its first blocks"
        if isinstance(watch, Verification):
            return f"{type(self.gate).__name__} verifies a prediction in its last block"
        if watch is not None and watch.needs_stack:
            return f"{type(self.gate).__name__} watches its blocks"
        if isinstance(self.site, (Span, SwitchingSpan, Blocks)):
            return "the residual of a span of its blocks is cached"
        if isinstance(self.site, PartsAndStream):
            return "what leaves its last block is kept"
        if isinstance(self.tokens, TokenRule):
            return f"{type(self.tokens).__name__} picks tokens by their place in it"
        return None

    @property
    def splits_rows(self) -> bool:
        """Whether rows of a batch may be computed at different steps."""
        return self.decide == "row" or (self.cfg is not None and self.cfg.shares_history)

    @property
    def needs_num_steps(self) -> bool:
        """Whether the run's length must be known."""
        rules: list[Any] = [*self.guards, self.predictor]
        rules += [rule for rule in (self.gate, self.cfg, self.tokens, self.site) if rule is not None]
        return self.made_for is not None or any(rule.needs_num_steps for rule in rules)

    @property
    def lives_on_other_steps(self) -> bool:
        """Whether it goes on with what other steps computed, so that few steps leave it little to gain."""
        return not isinstance(self.site, (Reduced, PastFrames)) or self.cfg is not None

    @property
    def is_off(self) -> bool:
        """Whether its settings say that nothing is ever cached: every interval is 1, or every threshold 0.

        A rule whose settings say it in another way has a property ``never_caches``.
        """
        rules = [rule for rule in (self.gate, self.cfg) if rule is not None]
        return all(
            getattr(rule, "interval", None) == 1
            or getattr(rule, "threshold", None) == 0
            or getattr(rule, "never_caches", False)
            for rule in rules
        )

    def check_group(self, is_sharded: bool) -> None:
        """Refuse what must see whole samples, where every process holds a share of their tokens.

        Raises:
            CompositionError: the message says what does.
        """
        watch = self.gate.watch if self.gate is not None else None
        is_outside = isinstance(self.site, (Denoiser, Trajectory))
        guilty = [
            self.gate if watch is not None and watch.mixes_tokens else None,
            self.predictor if getattr(self.predictor, "mixes_tokens", False) and not is_outside else None,
            self.tokens,
            self.site if isinstance(self.site, PastFrames) else None,
        ]
        names = [type(part).__name__ for part in guilty if part is not None]
        if is_sharded and names:
            raise CompositionError(
                f"{' and '.join(names)} must see all tokens of a sample, and each of the processes that share one (by "
                "enable_parallelism, or group=) holds some of them. Use other parts, or site='denoiser', whose input "
                "and output are whole."
            )

    def check_run(self, num_steps: int, levels: tuple[float, ...] | None = None) -> None:
        """Refuse settings that contradict the run's length (or its noise levels, where they are known).

        Raises:
            SettingError: the warm-up alone is as long as the run.
            CalibrationError: what was measured belongs to other runs.
        """
        if self.made_for is not None:
            positions_of(Place(num_steps, levels), *self.made_for, resample=False, has_option=False)
        rules = [rule for rule in (self.gate, self.cfg) if rule is not None]
        rules = [rule for rule in rules if getattr(rule, "interval", 0) != 1]  # 1 never caches
        rules = [rule for rule in rules if not getattr(rule, "never_caches", False)]
        guarded = [guard.steps for guard in self.guards if isinstance(guard, ForceLast)]
        guarded += [guard.steps for guard in self.guards if isinstance(guard, Warmup) and guard.interval == 1]
        # One of two rules may have something to cache before the other.
        warmup = max([*guarded, min((getattr(rule, "warmup", 0) for rule in rules), default=0)])
        if warmup >= num_steps and num_steps > 1:
            raise SettingError(
                f"warmup={warmup} leaves nothing to cache in a run of {num_steps} steps: use less than {num_steps}."
            )
