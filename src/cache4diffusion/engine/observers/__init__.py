"""Seeing what gates watch. Which observer sees which kind of watch: one row per kind."""

from __future__ import annotations

from cache4diffusion.engine.decisions import Decisions
from cache4diffusion.engine.driver import Driver
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.observers.base import Observer
from cache4diffusion.engine.observers.drift import DriftObserver
from cache4diffusion.engine.observers.entrance import EntranceObserver
from cache4diffusion.engine.observers.front import FrontObserver
from cache4diffusion.engine.observers.outputs import OutputsObserver
from cache4diffusion.engine.observers.part_input import PartInputObserver
from cache4diffusion.engine.observers.signal import SignalObserver
from cache4diffusion.engine.observers.spectral import SpectralObserver
from cache4diffusion.errors import CompositionError
from cache4diffusion.gates import Drift, Entrance, Front, Outputs, PartInput, Signal, Spectral, Verification, Watch

OBSERVERS: dict[type[Watch], type[Observer]] = {
    Signal: SignalObserver,
    Spectral: SpectralObserver,
    Front: FrontObserver,
    Entrance: EntranceObserver,
    PartInput: PartInputObserver,
    Drift: DriftObserver,
    Outputs: OutputsObserver,
    Verification: Observer,  # the driver verifies
}

__all__ = ["OBSERVERS", "Observer", "observer_of"]


def observer_of(host: Host, driver: Driver, decisions: Decisions) -> Observer:
    """Make the observer of what the gate watches.

    Raises:
        CompositionError: the watch has no row in the table.
    """
    watch = host.gate.watch if host.gate is not None else None
    if watch is None:
        return Observer(host, driver, decisions)
    if type(watch) not in OBSERVERS:
        raise CompositionError(
            f"Nothing observes a {type(watch).__name__}. Add its row to OBSERVERS in "
            "cache4diffusion/engine/observers/__init__.py."
        )
    return OBSERVERS[type(watch)](host, driver, decisions)
