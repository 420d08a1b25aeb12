"""When: gates decide whether a step is full or cached; guards overrule them."""

from cache4diffusion.gates.accumulated import AccumulatedChange
from cache4diffusion.gates.base import Front, Gate, Signal, StaticGate, Step, Verification, Watch
from cache4diffusion.gates.guards import ForceLast, Guard, Mask, MaxAccumulated, MaxRun, MaxTotal, Warmup, Window
from cache4diffusion.gates.interval import FixedInterval
from cache4diffusion.gates.look_ahead import LookAhead
from cache4diffusion.gates.modulated import ModulatedInterval
from cache4diffusion.gates.quadratic import Quadratic
from cache4diffusion.gates.schedule import ScaledSchedule, Schedule
from cache4diffusion.gates.speculative import Speculative
from cache4diffusion.gates.threshold import ProbeThreshold
from cache4diffusion.gates.widening import WideningInterval

# Names under which a gate can be given in a composition, as in gate="interval(interval=3)".
GATES = {
    "interval": FixedInterval,
    "modulated": ModulatedInterval,
    "schedule": Schedule,
    "scaled": ScaledSchedule,
    "look-ahead": LookAhead,
    "quadratic": Quadratic,
    "widening": WideningInterval,
    "accumulated": AccumulatedChange,
    "probe": ProbeThreshold,
    "speculative": Speculative,
}

__all__ = [
    "GATES",
    "AccumulatedChange",
    "FixedInterval",
    "ForceLast",
    "Front",
    "Gate",
    "Guard",
    "LookAhead",
    "Mask",
    "MaxAccumulated",
    "MaxRun",
    "MaxTotal",
    "ModulatedInterval",
    "ProbeThreshold",
    "Quadratic",
    "ScaledSchedule",
    "Schedule",
    "Signal",
    "Speculative",
    "StaticGate",
    "Step",
    "Verification",
    "Warmup",
    "Watch",
    "WideningInterval",
    "Window",
]
