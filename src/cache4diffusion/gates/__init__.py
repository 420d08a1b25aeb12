"""When: gates decide whether a step is full or cached; guards overrule them."""

from cache4diffusion.gates.accumulated import AccumulatedChange
from cache4diffusion.gates.adaptive import AdaptiveInterval
from cache4diffusion.gates.base import (
    WATCHES,
    Drift,
    Entrance,
    Front,
    Gate,
    Outputs,
    PartInput,
    Place,
    Placed,
    Remarking,
    Sated,
    Signal,
    Spectral,
    StaticGate,
    Step,
    Verification,
    Watch,
)
from cache4diffusion.gates.broadcast import Broadcast
from cache4diffusion.gates.code_table import CodeTable
from cache4diffusion.gates.depths import DepthTable
from cache4diffusion.gates.entrance import EntranceThreshold
from cache4diffusion.gates.frozen import FrozenCross
from cache4diffusion.gates.guards import (
    ForceLast,
    Guard,
    Mask,
    MaxAccumulated,
    MaxRun,
    MaxTotal,
    Warmup,
    Window,
)
from cache4diffusion.gates.interval import FixedInterval
from cache4diffusion.gates.laddered import LadderedEntrance
from cache4diffusion.gates.learned import LearnedScore, logit_of, score_of
from cache4diffusion.gates.lifetimes import accumulated_steps
from cache4diffusion.gates.look_ahead import LookAhead
from cache4diffusion.gates.magnitude import MagnitudeError
from cache4diffusion.gates.modulated import ModulatedInterval
from cache4diffusion.gates.phases import TwoPhase
from cache4diffusion.gates.quadratic import Quadratic
from cache4diffusion.gates.routed import routed_steps
from cache4diffusion.gates.schedule import ScaledSchedule, Schedule
from cache4diffusion.gates.significance import Significance
from cache4diffusion.gates.speculative import Speculative
from cache4diffusion.gates.step_mask import StepMask
from cache4diffusion.gates.threshold import ProbeThreshold
from cache4diffusion.gates.throughout import Throughout
from cache4diffusion.gates.timetable import Timetable
from cache4diffusion.gates.triggered import TriggeredInterval
from cache4diffusion.gates.widening import WideningInterval

# Names under which a gate can be given in a composition, as in gate="interval(interval=3)".
GATES = {
    "interval": FixedInterval,
    "modulated": ModulatedInterval,
    "two-phase": TwoPhase,
    "schedule": Schedule,
    "scaled": ScaledSchedule,
    "look-ahead": LookAhead,
    "quadratic": Quadratic,
    "widening": WideningInterval,
    "timetable": Timetable,
    "broadcast": Broadcast,
    "code-table": CodeTable,
    "depths": DepthTable,
    "frozen-cross": FrozenCross,
    "mask": StepMask,
    "magnitude": MagnitudeError,
    "accumulated": AccumulatedChange,
    "probe": ProbeThreshold,
    "adaptive": AdaptiveInterval,
    "entrance": EntranceThreshold,
    "significance": Significance,
    "laddered": LadderedEntrance,
    "learned": LearnedScore,
    "triggered": TriggeredInterval,
    "speculative": Speculative,
    "throughout": Throughout,
}

__all__ = [
    "GATES",
    "WATCHES",
    "AccumulatedChange",
    "AdaptiveInterval",
    "Broadcast",
    "CodeTable",
    "DepthTable",
    "Drift",
    "Entrance",
    "EntranceThreshold",
    "FixedInterval",
    "ForceLast",
    "Front",
    "FrozenCross",
    "Gate",
    "Guard",
    "LadderedEntrance",
    "LearnedScore",
    "LookAhead",
    "MagnitudeError",
    "Mask",
    "MaxAccumulated",
    "MaxRun",
    "MaxTotal",
    "ModulatedInterval",
    "Outputs",
    "PartInput",
    "Place",
    "Placed",
    "ProbeThreshold",
    "Quadratic",
    "Remarking",
    "Sated",
    "ScaledSchedule",
    "Schedule",
    "Signal",
    "Significance",
    "Spectral",
    "Speculative",
    "StaticGate",
    "Step",
    "StepMask",
    "Throughout",
    "Timetable",
    "TriggeredInterval",
    "TwoPhase",
    "Verification",
    "Warmup",
    "Watch",
    "WideningInterval",
    "Window",
    "accumulated_steps",
    "logit_of",
    "routed_steps",
    "score_of",
]
