"""A method is a named composition of four axes: site x gate x predictor x token rule."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from cache4diffusion.calibration import Calibration, Calibrator, Entry
from cache4diffusion.calibration.store import command, misshapen, opened
from cache4diffusion.errors import CalibrationError, CompositionError, SettingError, UnknownNameError, closest
from cache4diffusion.gates import Entrance, Front, Gate, Guard, LookAhead, PartInput, Place, Signal, Verification
from cache4diffusion.gates.guards import ForceLast, Warmup
from cache4diffusion.gates.timetable import positions_of
from cache4diffusion.guidance import BranchRule
from cache4diffusion.predictors import Predictor, Reuse, TwoSided
from cache4diffusion.settings import check, check_names, describe
from cache4diffusion.sites import (
    Blocks,
    GatedParts,
    Linears,
    Parts,
    Site,
    Span,
    SwitchingSpan,
    Trajectory,
    UNetLevel,
)
from cache4diffusion.tokens import TokenRule

Fidelity = Literal["code", "paper", "reconstructed", "ours"]
Decide = Literal["batch", "any", "row"]
Family = Literal[
    "forecasting",
    "reuse of blocks and parts",
    "adaptive gates",
    "correctors",
    "learned routers",
    "trajectory",
    "tokens",
    "guidance",
    "U-Net",
]
FAMILIES: tuple[Family, ...] = get_args(Family)
"""What methods are listed under, in this order."""

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
        tokens: which tokens are computed anyway on a cached step; None for none.
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
    tokens: TokenRule | None = None
    decide: Decide = "batch"
    branches: Literal["independent", "tied"] = "independent"
    cfg: BranchRule | None = None
    made_for: tuple[int, tuple[float, ...] | None] | None = None

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("site", self.site, Site),
            ("gate", self.gate, Gate),
            ("predictor", self.predictor, Predictor),
            ("tokens", self.tokens, TokenRule),
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
        if isinstance(watch, Verification) and not isinstance(site, Parts):
            raise CompositionError(
                f"{type(self.gate).__name__} verifies a prediction by computing the last block from its own input; at "
                f"{site.words} that block has no input on a cached step. Use site='parts'."
            )
        if watch is not None and watch.needs_stack and isinstance(site, UNetLevel):
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
        if sees == "input" and isinstance(site, (Trajectory, UNetLevel)):
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
                f"Parts(decisions={site.decisions!r}) takes several decisions before the call, for the whole batch: "
                "use a gate that watches nothing, decide='batch' and no token rule, or decisions='one'."
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
        if self.tokens is not None:
            return f"{type(self.tokens).__name__} picks tokens by their place in it"
        return None

    @property
    def needs_num_steps(self) -> bool:
        """Whether the run's length must be known."""
        rules: list[Any] = [*self.guards, self.predictor]
        rules += [rule for rule in (self.gate, self.cfg, self.tokens, self.site) if rule is not None]
        return self.made_for is not None or any(rule.needs_num_steps for rule in rules)

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

    def check_run(self, num_steps: int, levels: tuple[float, ...] | None = None) -> None:
        """Refuse settings that contradict the run's length (or its noise levels, where they are known).

        Raises:
            SettingError: the warm-up alone is as long as the run.
            CalibrationError: what was measured belongs to other runs.
        """
        if self.made_for is not None:
            positions_of(Place(num_steps, levels), *self.made_for, resample=False, has_option=False)
        rules = [rule for rule in (self.gate, self.cfg) if getattr(rule, "interval", 0) != 1]  # 1 never caches
        rules = [rule for rule in rules if not getattr(rule, "never_caches", False)]
        warmup = max(
            [guard.steps for guard in self.guards if isinstance(guard, ForceLast)]
            + [guard.steps for guard in self.guards if isinstance(guard, Warmup) and guard.interval == 1]
            + [getattr(rule, "warmup", 0) for rule in rules],
            default=0,
        )
        if warmup >= num_steps and num_steps > 1:
            raise SettingError(
                f"warmup={warmup} leaves nothing to cache in a run of {num_steps} steps: use less than {num_steps}."
            )


@dataclass(frozen=True)
class Dial:
    """The setting by which an adaptive method caches more or less: a threshold that scores are compared with.

    Args:
        setting: its name.
        low: a value at which little is cached.
        high: one at which most of what the limits allow is.
        unit: where the setting holds several thresholds: their values at 1, which a value multiplies.
        beside: further settings that a value needs, such as a floor that would take its place.
    """

    setting: str
    low: float
    high: float
    unit: tuple[float, ...] = ()
    beside: dict[str, Any] = field(default_factory=dict)

    OPEN: ClassVar[float] = 1e9  # accepts every score

    def values(self, count: int) -> list[float]:
        """Rising values at equal ratios from `low` to `high`, and `OPEN` as the last."""
        ratio = (self.high / self.low) ** (1 / max(count - 2, 1))
        return [self.low * ratio**i for i in range(count - 1)] + [self.OPEN]

    def at(self, value: float) -> dict[str, Any]:
        """The settings of a value."""
        return {**self.beside, self.setting: tuple(value * unit for unit in self.unit) if self.unit else value}


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One row of the registry.

    Args:
        name: slug, as in ``accelerate(pipe, name)``.
        title: name in print.
        arxiv: identifier of the paper, or None.
        site: where, in a word.
        gate: when, in a word.
        predictor: with what, in a word.
        tokens: which tokens anyway, in a word, or None.
        fidelity: ``code`` (from official code), ``paper``, ``reconstructed`` (no readable formula) or ``ours``.
        off: settings at which it never caches.
        family: what it is listed under, one of `FAMILIES`.
        when: one line that goes on from "use it when".
        citation: authors, title, venue.
        dial: of an adaptive method: what it caches more or less by.
        needs_calibration: whether a calibration file is needed.
        shares_branches: whether one CFG branch's prediction reads another's feature.
        published: settings of the paper or its released code, by what they are for. A set names what differs from our
            defaults or is worth saying; it is shown as *not re-measured* unless ``remeasured`` names it.
        remeasured: the published sets whose effect was measured again here, on real weights.

    Raises:
        SettingError: there is no such family, nothing is said of when to use it, or an adaptive method has no dial.
    """

    name: str
    title: str
    arxiv: str | None
    site: str
    gate: str
    predictor: str
    tokens: str | None
    fidelity: Fidelity
    off: dict[str, Any]
    family: Family
    when: str
    citation: str
    dial: Dial | None = None
    needs_calibration: bool = False
    shares_branches: bool = False
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    remeasured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise SettingError(
                f"MethodInfo(name={self.name!r}, family={self.family!r}){closest(self.family, FAMILIES) or '.'} "
                f"Families: {', '.join(FAMILIES)}."
            )
        if not self.when.strip() or self.when != self.when.strip() or self.when.endswith("."):
            raise SettingError(
                f'MethodInfo(name={self.name!r}, when={self.when!r}): go on from "use it when", without a full stop.'
            )
        if self.family == "adaptive gates" and self.dial is None:
            raise SettingError(
                f"MethodInfo(name={self.name!r}) has no dial: say what it caches more or less by, as in "
                "dial=Dial('threshold', low=0.01, high=1.0)."
            )


METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method: frozen settings that compose the four axes.

    A subclass declares its settings with `setting`, its `info`, and `compose`. Making it checks the settings.
    """

    info: ClassVar[MethodInfo]
    calibrator: ClassVar[type[Calibrator] | None] = None  # what a calibration of it makes; settings: calibration, ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "info" in cls.__dict__:
            METHODS[cls.info.name] = cls

    def __new__(cls, *args: Any, **settings: Any) -> Method:
        """Refuse unknown settings in words; Python's own TypeError would not name the nearest one."""
        check_names(f"Method {cls.info.name!r}", settings, [entry.name for entry in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check(self)
        made = self.loaded
        if made is None and self.info.needs_calibration:
            return  # compose() says what is missing; until then it can be shown, and calibrated
        names = list(made.entries) if made is not None else []
        for each in [self.of(name) for name in names] if len(names) > 1 else [self]:
            each.compose()  # contradictory settings fail here, not on the first step

    @abstractmethod
    def compose(self) -> Composition:
        """The composition these settings stand for."""

    def outline(self) -> Composition:
        """A composition that holds as many bytes as this one, also where its numbers are not measured yet.

        Raises:
            CalibrationError: how much is held depends on what is measured.
        """
        return self.compose()

    # -- calibration -----------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> Calibration | None:
        """The calibration among its settings, if one is given.

        Raises:
            FileFormatError: the file cannot be used.
            CalibrationError: it was made for another method.
        """
        given = getattr(self, "calibration", None)
        if given is None:
            return None
        made = opened(given)
        if made.method != self.info.name:
            raise CalibrationError(
                f"{made!r} was made for {made.method}, not for {self.info.name}. Make one: {command(self.info.name)}"
            )
        return made

    @property
    def measured(self) -> Entry:
        """What was measured of the denoiser, for `compose`.

        Raises:
            CalibrationError: there is no calibration; the command that makes one is named. Or its numbers have the
                wrong shape.
        """
        made = self.loaded
        if made is None:
            name = self.info.name
            raise CalibrationError(
                f"{name} needs a calibration made on your denoiser, and has none. Make one: {command(name)} (or "
                f"cache4diffusion.calibrate(pipe, {name!r}, prompts)), then give it: "
                f"accelerate(pipe, {name!r}, calibration='{name}.safetensors')."
            )
        problem = misshapen(made.statistic, made.entry.fit, made.provenance.steps)
        if problem:
            raise CalibrationError(f"{made!r}: {problem}")
        return made.entry

    def of(self, denoiser: str) -> Method:
        """This method for one of a pipeline's denoisers: with its own entry of the calibration."""
        made = self.loaded
        return self if made is None else dataclasses.replace(self, calibration=made.only(denoiser))  # type: ignore[call-arg]

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """Name and value of every setting."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Name, default, range and meaning of every setting."""
        return describe(cls)

    @classmethod
    def row(cls) -> dict[str, Any]:
        """The registry row, as ``c4d methods --json`` prints it."""
        info = cls.info
        return {
            "name": info.name,
            "title": info.title,
            "arxiv": info.arxiv,
            "site": info.site,
            "gate": info.gate,
            "predictor": info.predictor,
            "tokens": info.tokens,
            "needs_calibration": info.needs_calibration,
            "needs_num_steps": info.needs_calibration or cls().compose().needs_num_steps,
            "fidelity": info.fidelity,
            "off": dict(info.off),
            "family": info.family,
            "when": info.when,
            "use": info.when,  # its name in earlier releases
        }

    def is_off(self) -> bool:
        """Whether these settings never cache (as far as the registry's `off` row says)."""
        return all(getattr(self, name) == value for name, value in self.info.off.items())


def method(name: str, **settings: Any) -> Method:
    """Make a method by its slug.

    Raises:
        UnknownNameError: no method of that name; the nearest is named.
        SettingError: a setting is unknown or out of range.
    """
    return method_class(name)(**settings)


def method_class(name: str) -> type[Method]:
    """The class of a method, by its slug.

    Raises:
        UnknownNameError: no method of that name; the nearest is named.
    """
    if name not in METHODS:
        raise UnknownNameError(
            f"There is no method {name!r}{closest(name, METHODS) or '.'} Known: {', '.join(sorted(METHODS))}."
        )
    return METHODS[name]
