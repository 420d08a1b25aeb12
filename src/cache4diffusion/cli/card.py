"""The card of a method, put together from its docstring, its settings, its parts and its row of the registry."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any, NamedTuple

from cache4diffusion.calibration.store import command as calibrate_command
from cache4diffusion.cli.common import assignments, plain, source_line
from cache4diffusion.cli.show import NOT_REMEASURED, published_of, quotes_published, strip_of
from cache4diffusion.composition import Composition
from cache4diffusion.gates import FixedInterval
from cache4diffusion.info import MethodInfo
from cache4diffusion.method import Method
from cache4diffusion.sites import (
    Parts,
    PastFrames,
    PromptModules,
    SingleContext,
    Site,
    Trajectory,
    UNetEncoder,
    UNetLevel,
)
from cache4diffusion.units import size_text

WIDTH = 120


class Doc(NamedTuple):
    """A method's docstring, taken apart at its labels."""

    body: str  # what it does, with the formula
    cost: str | None
    differences: tuple[str, str] | None  # from what, and which


def doc_of(cls: type[Method]) -> Doc:
    """The docstring of a method: paragraphs, then ``Cost: ...`` and ``Differences from the code: ...``."""
    text = inspect.getdoc(cls) or ""
    found = re.split(r"^(Cost|Differences from [^:\n]+): ", text, flags=re.MULTILINE)
    labelled = {label: " ".join(words.split()) for label, words in zip(found[1::2], found[2::2], strict=True)}
    others = [label for label in labelled if label != "Cost"]
    differences = (others[0], labelled[others[0]]) if others else None
    return Doc(found[0].strip(), labelled.get("Cost"), differences)


def parts_of(chosen: Method) -> list[dict[str, str]]:
    """What a method is made of: axis, part with its settings, and what the part does, in the words of its docstring.

    Of a method without the calibration it needs only the site is known.
    """
    if chosen.info.needs_calibration and chosen.loaded is None:
        assert chosen.calibrator is not None
        parts: list[tuple[str, Any]] = [("site", chosen.calibrator().site)]
    else:
        made = chosen.compose()
        predictor = None if made.site is None else made.predictor
        parts = [("site", made.site), ("gate", made.gate), *(("guard", guard) for guard in made.guards)]
        parts += [("predictor", predictor), ("tokens", made.tokens), ("cfg", made.cfg)]
    return [
        {"axis": axis, "part": repr(part), "doc": _before_arguments(type(part))}
        for axis, part in parts
        if part is not None
    ]


def _before_arguments(cls: type) -> str:
    return re.split(r"^(?:Args|Raises|Memory):", inspect.getdoc(cls) or "", flags=re.MULTILINE)[0].strip()


def needs_of(chosen: Method) -> list[str]:
    """What must be there besides a denoiser that is called step by step."""
    needs, is_calibrated = [], not chosen.info.needs_calibration or chosen.loaded is not None
    if is_calibrated:
        made = chosen.compose()
    else:
        assert chosen.calibrator is not None
        made = Composition(chosen.calibrator().site, FixedInterval())  # its schedule is what is not known
    if chosen.info.needs is not None:
        needs.append(chosen.info.needs)
    if chosen.info.needs_calibration:
        needs.append("a calibration made on your denoiser")
    if made.needs_num_steps or not is_calibrated:
        needs.append("the number of steps (pipelines tell it; a loop of your own gives it to handle.run)")
    if made.needs_stack is not None:
        needs.append(f"blocks that carry the latent through the denoiser: {made.needs_stack}")
    if made.cfg is not None:
        needs.append("classifier-free guidance")
    return needs + _needs_of_site(made.site)


def _needs_of_site(site: Site | None) -> list[str]:
    if isinstance(site, PromptModules):
        return ["modules that work on the prompt alone"]
    if isinstance(site, PastFrames):
        return ["a declaration of where frames are: c4d.declare(denoiser, frames={...}, first_frame='...')"]
    if isinstance(site, SingleContext):
        return ["cross-attention to a single token"]
    if isinstance(site, Parts) and ("cross_attn" in site.required or site.kinds == ("cross_attn",)):
        return ["blocks with cross-attention"]
    if isinstance(site, Parts):
        return ["blocks with residual parts (attention, MLP)"]
    if isinstance(site, (UNetLevel, UNetEncoder)):
        return ["the levels of a U-Net"]
    if isinstance(site, Trajectory):
        return [f"a solver without a history: {', '.join(site.solvers)}"]
    return []


def facts_of(chosen: Method) -> dict[str, Any]:
    """The card as data."""
    info, doc, calibration = chosen.info, doc_of(type(chosen)), None
    if chosen.calibrator is not None:
        calibration = {"command": calibrate_command(info.name), "options": _plainly(chosen.calibrator.describe())}
    return {
        **chosen.row(),
        "doc": inspect.getdoc(type(chosen)) or "",
        "parts": parts_of(chosen),
        "settings": _plainly(chosen.describe()),
        "published": published_of(info),
        "ladder": [{name: plain(value) for name, value in rung.items()} for rung in info.ladder],
        "calibration": calibration,
        "cost": doc.cost,
        "needs": needs_of(chosen),
        "differences": doc.differences[1] if doc.differences else None,
        "strip": strip_of(chosen, 20),
        "citation": info.citation,
    }


def _plainly(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "default": plain(entry["default"])} for entry in settings]


def card_of(chosen: Method, name: str, counted: dict[str, Any] | None) -> str:
    """The card as text.

    Args:
        chosen: the method.
        name: as the user wrote it, with settings.
        counted: bytes of its cache on a model, and the conditions; None if nobody asked.
    """
    info, doc = chosen.info, doc_of(type(chosen))
    out = [f"{info.title}  ({info.name})", f"{info.family}: use it when {info.when}.", "", doc.body, "", "Made of"]
    for part in parts_of(chosen):
        out += [f"  {part['axis']}: {part['part']}", textwrap.indent(part["doc"], "    ")]
    out += ["", "Settings", *_settings(chosen)]
    out += _published(chosen)
    out += ["", "From gentle to hard, over about 50 steps (what c4d bench --methods all measures)"]
    out += [f"  {assignments(rung) or 'the defaults'}" for rung in info.ladder]
    out += _calibration(chosen)
    out += ["", *_labelled("Cost", doc.cost or "not stated")]
    out += _labelled("Needs", "; ".join(needs_of(chosen)) or "nothing else")
    if counted is not None:
        out += _labelled("Cache", f"{size_text(counted['bytes'])} with {name}: {counted['conditions']}")
        places = [f"{size_text(n)} on {place.replace(' ', ' as ')}" for place, n in counted["places"].items()]
        out += _labelled("", ", ".join(places))
    if doc.differences is not None:
        out += ["", *_wrapped(": ".join(doc.differences))]
    when = "in the calibration" if info.needs_calibration else "while sampling"
    out += ["", f"20 steps   {strip_of(chosen, 20) or f'decided {when}, by {info.gate}'}"]
    out += [f"Off        {assignments(info.off)}", f"Fidelity   {info.fidelity}", f"Source     {source_line(info)}"]
    return "\n".join(out)


def card_beside(info: MethodInfo) -> str:
    """The card of what has a call of its own: what that call's docstring says."""
    from cache4diffusion import edit

    call = {"fisedit": edit.record}[info.name]
    out = [f"{info.title}  ({info.name})", f"{info.family}: use it when {info.when}.", ""]
    out += [inspect.getdoc(call) or "", "", *_labelled("Needs", info.needs or "nothing else")]
    out += [f"Fidelity   {info.fidelity}", f"Source     {source_line(info)}"]
    return "\n".join(out)


def _labelled(label: str, text: str) -> list[str]:
    return _wrapped(text, first=f"{label:<11}", rest=" " * 11)


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def _settings(chosen: Method) -> list[str]:
    settings = chosen.describe()
    width = max(len(entry["name"]) for entry in settings)
    return [
        f"  {entry['name']:<{width}}  {entry['default']!r}  [{entry['accepts']}]  {entry['doc']}" for entry in settings
    ]


def _published(chosen: Method) -> list[str]:
    out, info = [], chosen.info
    for is_remeasured, words in ((True, "re-measured here"), (False, NOT_REMEASURED)):
        rows = [row for row in published_of(info) if row["remeasured"] is is_remeasured]
        width = max((len(row["name"]) for row in rows), default=0)
        out += ["", f"Published settings, {words}"] if rows else []
        out += [f"  {row['name']:<{width}}  {assignments(row['settings'])}" for row in rows]
    if not info.remeasured and quotes_published(chosen.describe()):
        out += ["", f"Values behind 'Code:' and 'Paper:' are published ones, {NOT_REMEASURED}."]
    return out


def _calibration(chosen: Method) -> list[str]:
    if chosen.calibrator is None:
        return []
    need = "Needs a calibration" if chosen.info.needs_calibration else "Can be calibrated"
    measured = chosen.calibrator.describe()
    width = max((len(entry["name"]) for entry in measured), default=0)
    out = ["", f"{need} on your denoiser: {calibrate_command(chosen.info.name)}"]
    return out + [f"  --set {entry['name']:<{width}}  {entry['default']!r}  {entry['doc']}" for entry in measured]
