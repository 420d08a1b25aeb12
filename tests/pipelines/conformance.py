"""What must hold in every case, for one method on each kind of site; and what ran, counted."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
from cache4diffusion.trace import CACHED, FULL, Record
from pipelines.case import Case, denoisers
from toys import Dicts


@dataclass(frozen=True)
class Tried:
    """A method on one kind of site: settings at which it caches, whatever the weights, and at which it is off."""

    method: str
    settings: dict[str, Any]
    off: dict[str, Any]


METHODS = {
    "whole": Tried("taylorseer-lite", {"interval": 3, "warmup": 1}, {"interval": 1, "warmup": 1}),
    "span": Tried("dbcache", {"front": 1, "warmup": 1, "threshold": 1e9}, {"front": 1, "warmup": 1, "threshold": 0.0}),
    "part": Tried("fora", {"interval": 3}, {"interval": 1}),
    "level": Tried("deepcache", {"interval": 3}, {"interval": 1}),
}


class Spy:
    """What runs inside one denoiser, call by call: how often each of its smallest modules does.

    It takes the place of each ``forward`` before `accelerate` and so sees what is really computed: neither a module
    whose call is answered from the cache nor one whose ``forward`` is.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.calls: list[Counter[str]] = []
        self._modules = {
            path: module
            for path, module in denoiser.named_modules()
            if not path or not any(True for _ in module.children())
        }
        for path, module in self._modules.items():
            module.forward = self._watched(path, module.forward)

    def _watched(self, path: str, forward: Any) -> Any:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if path:
                self.calls[-1][path] += 1
            else:
                self.calls.append(Counter())
            return forward(*args, **kwargs)

        return watched

    def remove(self) -> None:
        for module in self._modules.values():
            del module.forward


@contextmanager
def spied(pipe: Any):
    """The spies of a pipeline's denoisers, by name."""
    spies = {name: Spy(denoiser) for name, denoiser in denoisers(pipe).items()}
    try:
        yield spies
    finally:
        for spy in spies.values():
            spy.remove()


@dataclass
class Counts:
    """What one case came to with one method."""

    case: str
    site: str
    calls: int = 0
    full: int = 0
    strips: dict[str, str] = field(default_factory=dict)  # by denoiser, run and branch

    @property
    def cached(self) -> int:
        return self.calls - self.full


def within(path: str, roots: list[str]) -> bool:
    """Whether a module is one of ``roots`` or inside of one; ``""`` is the denoiser."""
    return any(root in ("", path) or path.startswith(f"{root}.") for root in roots)


def check_counts(site: str, spy: Spy, plain: list[Counter[str]], records: list[Record], bypassed: list[str]) -> None:
    """A full call computes what the plain pipeline's does; of a cached one, nothing that the method says rests."""
    assert len(records) == len(plain), f"{len(records)} calls are on record, the pipeline made {len(plain)}"
    assert bypassed, "the method says that nothing rests"
    symbols = [record.symbol for record in records]
    assert set(symbols) == {FULL, CACHED}, symbols
    seen = iter(spy.calls)
    for record, wanted in zip(records, plain, strict=True):
        where = f"step {record.step}, branch {record.branch}"
        if record.symbol == FULL:
            assert next(seen) == wanted, f"a full call ran something else ({where})"
            continue
        found = Counter() if site == "whole" else next(seen)
        rested = {path: count for path, count in found.items() if within(path, bypassed)}
        assert not rested, f"a cached call ran {rested} ({where})"
        more = {path: (count, wanted[path]) for path, count in found.items() if count > wanted[path]}
        assert not more, f"a cached call ran more than the plain one: {more} ({where})"
        assert sum(wanted.values()) - sum(found.values()) > 0, f"a cached call saved nothing ({where})"
    assert next(seen, None) is None, "the denoiser ran without being on record"


def strips_of(records: list[Record]) -> dict[str, str]:
    """Symbols by denoiser, run and branch."""
    runs = {run: i for i, run in enumerate(dict.fromkeys(record.run for record in records))}
    names = {record.denoiser for record in records}
    found: dict[str, str] = {}
    for record in records:
        words = [record.denoiser] if len(names) > 1 else []
        words += [f"run {runs[record.run]}"] if len(runs) > 1 else []
        key = ", ".join([*words, record.branch])
        found[key] = found.get(key, "") + record.symbol
    return found


def keys_of(pipe: Any) -> dict[str, set[str]]:
    """Names of everything that a pipeline and what it holds carry on the instance."""
    owners = {"pipeline": pipe} | {name: value for name, value in pipe.components.items() if hasattr(value, "__dict__")}
    return {name: set(vars(owner)) for name, owner in owners.items()}


def check(case: Case, site: str, pipe: Any | None = None) -> Counts:
    """Off is off, a caching run computes what its strip says, the second run equals the first, nothing is left."""
    tried, pipe = METHODS[site], pipe or case.pipe()
    case.sample(pipe)  # what pipelines keep of their first run is there
    with spied(pipe) as spies:
        modules, keys = Dicts(*denoisers(pipe).values()), keys_of(pipe)
        plain = case.sample(pipe)
        wanted = {name: list(spy.calls) for name, spy in spies.items()}
        of_its_own = set(modules.changed())  # what the pipeline itself writes into its denoiser
        assert torch.isfinite(plain).all(), "the plain pipeline makes nothing of use"

        with c4d.accelerate(pipe, tried.method, **tried.off) as handle:
            assert torch.equal(case.sample(pipe), plain), "off is not off"
            assert {record.symbol for record in handle.trace.records} == {FULL}

        with c4d.accelerate(pipe, tried.method, **tried.settings) as handle:
            first = case.sample(pipe)
            assert handle.memory["held"] == 0, "something is kept after a run"
            start = len(handle.trace.records)
            for spy in spies.values():
                spy.calls.clear()
            second = case.sample(pipe)
            records = handle.trace.records[start:]
            for engine in handle._engines:
                mine = [record for record in records if record.denoiser == engine.name]
                name = engine.name
                check_counts(site, spies[name], wanted[name], mine, engine.attachment.bypassed)
            assert torch.equal(first, second), "the second run is not equal to the first"
            assert torch.isfinite(second).all()
            assert not torch.equal(second, plain), "what is cached cannot be seen"
        assert set(modules.changed()) <= of_its_own and keys_of(pipe) == keys, "something is left attached"
        assert torch.equal(case.sample(pipe), plain), "the pipeline is not what it was"
    full = sum(record.symbol == FULL for record in records)
    return Counts(case.name, site, len(records), full, strips_of(records))


def check_refused(case: Case, site: str, words: str) -> None:
    """A site that cannot be had is refused with the reason, and the pipeline goes on as if nothing had been asked."""
    tried, pipe = METHODS[site], case.pipe()
    plain = case.sample(pipe)
    modules, keys = Dicts(*denoisers(pipe).values()), keys_of(pipe)
    with pytest.raises(c4d.Cache4DiffusionError) as refused:
        c4d.accelerate(pipe, tried.method, **tried.settings)
        case.sample(pipe)
    assert words in " ".join(str(refused.value).split())
    assert not modules.changed() and keys_of(pipe) == keys, "something is left attached"
    assert torch.equal(case.sample(pipe), plain)
