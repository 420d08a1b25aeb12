"""With what: predictors make the feature of a cached step from those of full steps."""

from cache4diffusion.predictors.adams_bashforth import AdamsBashforth
from cache4diffusion.predictors.aligned import ProbeAligned
from cache4diffusion.predictors.bands import Bands
from cache4diffusion.predictors.base import LinearPredictor, Predictor, RecursivePredictor
from cache4diffusion.predictors.chebyshev import Chebyshev
from cache4diffusion.predictors.corrector import Blank, Corrector, Sited, Weights
from cache4diffusion.predictors.delta import Delta
from cache4diffusion.predictors.dmd import DynamicModes
from cache4diffusion.predictors.foca import ForecastCalibrate
from cache4diffusion.predictors.graded import Graded
from cache4diffusion.predictors.hermite import Hermite
from cache4diffusion.predictors.history import History, weighted_sum
from cache4diffusion.predictors.increment import Increment
from cache4diffusion.predictors.learned import LearnedCombination
from cache4diffusion.predictors.linear_map import LinearMap
from cache4diffusion.predictors.mean_velocity import MeanVelocity
from cache4diffusion.predictors.momentum import AdaptedMomentum, Momentum
from cache4diffusion.predictors.newton import Newton
from cache4diffusion.predictors.reuse import Reuse
from cache4diffusion.predictors.scale_shift import ScaleShift, scaled_and_shifted
from cache4diffusion.predictors.tao import ScaledDelta
from cache4diffusion.predictors.taylor import Taylor
from cache4diffusion.predictors.two_sided import TwoSided
from cache4diffusion.predictors.wavelet import WaveletExtrapolation
from cache4diffusion.predictors.weighted_change import WeightedChange

# Names under which a predictor can be given in a composition, as in predictor="newton(order=2)".
PREDICTORS = {
    "aligned": ProbeAligned,
    "reuse": Reuse,
    "graded": Graded,
    "taylor": Taylor,
    "newton": Newton,
    "hermite": Hermite,
    "foca": ForecastCalibrate,
    "delta": Delta,
    "momentum": Momentum,
    "adapted-momentum": AdaptedMomentum,
    "adams-bashforth": AdamsBashforth,
    "bands": Bands,
    "chebyshev": Chebyshev,
    "dmd": DynamicModes,
    "scaled-delta": ScaledDelta,
    "scale-shift": ScaleShift,
    "two-sided": TwoSided,
    "mean-velocity": MeanVelocity,
    "wavelet": WaveletExtrapolation,
    "weighted-change": WeightedChange,
    "increment": Increment,
    "linear-map": LinearMap,
    "learned": LearnedCombination,
}

__all__ = [
    "PREDICTORS",
    "AdamsBashforth",
    "AdaptedMomentum",
    "Bands",
    "Blank",
    "Chebyshev",
    "Corrector",
    "Delta",
    "DynamicModes",
    "ForecastCalibrate",
    "Graded",
    "Hermite",
    "History",
    "Increment",
    "LearnedCombination",
    "LinearMap",
    "LinearPredictor",
    "MeanVelocity",
    "Momentum",
    "Newton",
    "Predictor",
    "ProbeAligned",
    "RecursivePredictor",
    "Reuse",
    "ScaleShift",
    "ScaledDelta",
    "Sited",
    "Taylor",
    "TwoSided",
    "WaveletExtrapolation",
    "WeightedChange",
    "Weights",
    "scaled_and_shifted",
    "weighted_sum",
]
