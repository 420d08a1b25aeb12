"""With what: predictors make the feature of a cached step from those of full steps."""

from cache4diffusion.predictors.base import LinearPredictor, Predictor
from cache4diffusion.predictors.history import History, weighted_sum
from cache4diffusion.predictors.newton import Newton
from cache4diffusion.predictors.reuse import Reuse
from cache4diffusion.predictors.taylor import Taylor

# Names under which a predictor can be given in a composition, as in predictor="newton(order=2)".
PREDICTORS = {
    "reuse": Reuse,
    "taylor": Taylor,
    "newton": Newton,
}

__all__ = [
    "PREDICTORS",
    "History",
    "LinearPredictor",
    "Newton",
    "Predictor",
    "Reuse",
    "Taylor",
    "weighted_sum",
]
