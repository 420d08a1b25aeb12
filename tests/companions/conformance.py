"""What must hold of every companion that is put on before `accelerate`, or after it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

import cache4diffusion as c4d
from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.observe import observe
from cache4diffusion.engine import host
from cache4diffusion.trace import CACHED
from companions.cases import COMPANIONS
from companions.companion import Companion, Subject, accelerate, denoiser_of
from toys import Dicts

SLACK = 4.0  # times the companion's own error: so near to the method alone is what both make. None of it is bit-equal


@dataclass
class Outcome:
    """What one companion came to in one order on one kind of site.

    Args:
        strip: of the run with both.
        error: of the companion alone, relative to the plain pipeline.
        apart: how far both together are from the method alone, likewise.
    """

    strip: str
    error: float
    apart: float


@dataclass
class Known:
    """What is known of a run: its result, and its strip if a method was at work."""

    result: Tensor
    strip: str = ""


@contextmanager
def contained() -> Iterator[None]:
    """What companions change of the whole process is put back: the attention backend, what was compiled."""
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(backend)
        torch._dynamo.reset()


@functools.cache
@contained()
def plain(subject: Subject) -> Tensor:
    return subject.sample(subject.make())


@functools.cache
@contained()
def alone(name: str) -> Tensor:
    """What the companion makes of the pipeline without a cache."""
    companion = COMPANIONS[name]
    pipe = companion.subject.make()
    companion.apply(pipe)
    return companion.subject.sample(pipe)


@functools.cache
@contained()
def method_alone(subject_name: str, site: str) -> Known:
    companion = COMPANIONS[subject_name]
    pipe = companion.subject.make()
    with accelerate(pipe, companion, site) as handle:
        return Known(plain_sample(companion.subject, pipe), handle.stats["strip"])


_BOTH: dict[tuple[str, str], Known] = {}  # the companion first, then the method: by companion and kind of site


@contained()
def both(companion: Companion, site: str) -> Known:
    """The companion first, then the method, on a pipeline of its own."""
    key = (companion.name, site)
    if key not in _BOTH:
        pipe = companion.subject.make()
        companion.apply(pipe)
        with accelerate(pipe, companion, site) as handle:
            _BOTH[key] = Known(companion.subject.sample(pipe), handle.stats["strip"])
    return _BOTH[key]


_ANATOMIES: dict[tuple[Subject, int], Anatomy] = {}  # by pipeline and number of the denoiser's arguments


def plain_sample(subject: Subject, pipe: Any) -> Tensor:
    """A run of an accelerated pipeline on which no companion is: what it is built like is observed once for all."""

    def known(denoiser: nn.Module, args: Any, kwargs: Any) -> Anatomy:
        key = (subject, len(kwargs))
        if key not in _ANATOMIES:
            _ANATOMIES[key] = observe(denoiser, args, kwargs)
        return _ANATOMIES[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "observe", known)
        return subject.sample(pipe)


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative distance; NaN counts as infinitely far."""
    distance = float((found - expected).norm() / expected.norm())
    return distance if distance == distance else float("inf")


def method_of(companion: Companion, site: str) -> Known:
    return method_alone(next(n for n, other in COMPANIONS.items() if other.subject is companion.subject), site)


def judge(companion: Companion, site: str, found: Known) -> Outcome:
    """Cached steps happened where they happen without the companion, and came to the same within its own error."""
    method, error = method_of(companion, site), apart(alone(companion.name), plain(companion.subject))
    assert found.strip == method.strip, f"{found.strip} with it, {method.strip} without"
    assert CACHED in found.strip
    distance = apart(found.result, method.result)
    assert distance <= SLACK * error, f"{distance} from the method alone, {error} is the companion's own error"
    assert not torch.equal(found.result, alone(companion.name)), "what is cached cannot be seen"
    return Outcome(found.strip, error, distance)


@contained()
def check_before(companion: Companion, site: str) -> Outcome:
    """Put on first: off is off, cached steps are as good as its own error, and removing leaves what was found."""
    pipe, sample = companion.subject.make(), companion.subject.sample
    companion.apply(pipe)
    assert companion.also is None or companion.also(pipe), "it does nothing here"
    expected = sample(pipe)
    assert torch.equal(expected, alone(companion.name)), "it is not the same twice: nothing could be told"
    modules = Dicts(denoiser_of(pipe))
    sample(pipe)
    of_its_own = set(modules.changed())  # what the host itself writes in every run
    with accelerate(pipe, companion, site, is_off=True) as handle:
        assert torch.equal(sample(pipe), expected), "off is not off"
        assert CACHED not in handle.stats["strip"]
    with accelerate(pipe, companion, site) as handle:
        first = _BOTH[companion.name, site] = Known(sample(pipe), handle.stats["strip"])
        assert torch.equal(sample(pipe), first.result), "the second run is not equal to the first"
        assert handle.memory["held"] == 0
        handle.report()
        outcome = judge(companion, site, first)
        if companion.undo is not None:
            companion.undo(pipe)
            _check_restored(companion, sample(pipe), method_of(companion, site).result)
            companion.apply(pipe)
            assert torch.equal(sample(pipe), first.result), "put on again it is not what it was"
    if companion.undo is None:
        assert set(modules.changed()) <= of_its_own, "something is left attached"
    assert torch.equal(sample(pipe), expected), "the pipeline is not what it was"
    if companion.undo is not None:
        companion.undo(pipe)
        _check_restored(companion, sample(pipe), plain(companion.subject))
    return outcome


@contained()
def check_off_after(companion: Companion, site: str) -> None:
    """Put on a pipeline whose method caches nothing, it is as alone."""
    pipe, sample = companion.subject.make(), companion.subject.sample
    with accelerate(pipe, companion, site, is_off=True):
        assert torch.equal(plain_sample(companion.subject, pipe), plain(companion.subject)), "off is not off"
        companion.apply(pipe)
        assert torch.equal(sample(pipe), alone(companion.name)), "off is not off"
    assert torch.equal(sample(pipe), alone(companion.name)), "the pipeline is not what it was"


@contained()
def check_after(companion: Companion, site: str) -> Outcome:
    """Put on a pipeline at work, it comes to the same as put on first; taken away, as never put on."""
    check_off_after(companion, site)
    pipe, sample = companion.subject.make(), companion.subject.sample
    with accelerate(pipe, companion, site) as handle:
        assert torch.equal(plain_sample(companion.subject, pipe), method_of(companion, site).result)
        companion.apply(pipe)
        found = Known(sample(pipe), handle.stats["strip"])
        assert torch.equal(found.result, both(companion, site).result), "the order makes a difference"
        assert torch.equal(sample(pipe), found.result), "the second run is not equal to the first"
        assert handle.memory["held"] == 0
        outcome = judge(companion, site, found)
        if companion.undo is not None:
            companion.undo(pipe)
            _check_restored(companion, sample(pipe), method_of(companion, site).result)
            companion.apply(pipe)
            assert torch.equal(sample(pipe), found.result), "put on again it is not what it was"
    assert torch.equal(sample(pipe), alone(companion.name)), "the pipeline is not what it was"
    if companion.undo is not None:
        companion.undo(pipe)
        _check_restored(companion, sample(pipe), plain(companion.subject))
    return outcome


def _check_restored(companion: Companion, found: Tensor, expected: Tensor) -> None:
    if companion.restores:
        assert apart(found, expected) <= companion.restores, "taken away it leaves something"
    else:
        assert torch.equal(found, expected), "taken away it leaves something"


CHECKS = {"before": check_before, "after": check_after}


@contained()
def check_refused(companion: Companion, order: str, site: str) -> str:
    """The error's words; what was refused changes nothing, or goes on alone once the handle is gone."""
    words, sample = companion.refusal(order, site), companion.subject.sample
    assert words is not None
    pipe, is_applied = companion.subject.make(), order == "before"
    if order == "before":
        companion.apply(pipe)
        modules = Dicts(pipe, denoiser_of(pipe))
        with refused(words) as told:
            accelerate(pipe, companion, site)
        assert not modules.changed(), "something is left attached"
    else:
        with accelerate(pipe, companion, site):
            method = method_of(companion, site).result
            assert torch.equal(plain_sample(companion.subject, pipe), method)
            with refused(words) as told:
                companion.apply(pipe)
                is_applied = True
                sample(pipe)
            assert is_applied or torch.equal(sample(pipe), method), "what is refused changes something"
    expected = alone(companion.name) if is_applied else plain(companion.subject)
    assert torch.equal(sample(pipe), expected), "the pipeline is not what it was"
    return told[0]


@contextmanager
def refused(words: str) -> Iterator[list[str]]:
    """An error of this library with these words; gives the whole sentence."""
    told: list[str] = []
    with pytest.raises(c4d.Cache4DiffusionError) as error:
        yield told
    told.append(" ".join(str(error.value).split()))
    assert words in told[0]
