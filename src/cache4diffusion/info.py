"""What the registry says of a method: where and when it caches, what it is listed under, by what it caches more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from cache4diffusion.errors import SettingError, closest

Fidelity = Literal["code", "paper", "reconstructed", "ours"]
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
    "editing",
]
FAMILIES: tuple[Family, ...] = get_args(Family)
"""What methods are listed under, in this order."""

TRAINED = "a model trained for it"
"""What a method needs that was published together with weights."""


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
        ladder: up to three settings, from gentle to hard, that show what the method can reach (up to a sixth of the
            FLOPs); they are for runs of about 50 steps, and what ``c4d bench --methods all`` measures.
        needs_calibration: whether a calibration file is needed.
        needs: what else must be there that no call of a denoiser shows, such as `TRAINED`; None if nothing.
        shares_branches: whether one CFG branch's prediction reads another's feature.
        is_exact: whether what is predicted is what would be computed, but for rounding.
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
    ladder: tuple[dict[str, Any], ...] = ({},)
    needs_calibration: bool = False
    needs: str | None = None
    shares_branches: bool = False
    is_exact: bool = False
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    remeasured: tuple[str, ...] = ()

    def row(self, *, needs_num_steps: bool = False) -> dict[str, Any]:
        """The registry row, as ``c4d methods --json`` prints it.

        Args:
            needs_num_steps: whether the number of steps must be known before sampling.
        """
        return {
            "name": self.name,
            "title": self.title,
            "arxiv": self.arxiv,
            "site": self.site,
            "gate": self.gate,
            "predictor": self.predictor,
            "tokens": self.tokens,
            "needs_calibration": self.needs_calibration,
            "needs": [self.needs] if self.needs is not None else [],
            "needs_num_steps": needs_num_steps,
            "fidelity": self.fidelity,
            "off": dict(self.off),
            "family": self.family,
            "when": self.when,
            "use": self.when,  # its name in earlier releases
            "citation": self.citation,
        }

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
        if not 1 <= len(self.ladder) <= 3:
            raise SettingError(
                f"MethodInfo(name={self.name!r}) has a ladder of {len(self.ladder)} settings: give one to three."
            )
