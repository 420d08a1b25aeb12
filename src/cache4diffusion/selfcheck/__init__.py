"""`selfcheck`: on *this* pipeline, does caching keep its promises? One finding per method and invariant.

Most checks drive a denoiser directly with the arguments of a real call, repeated unchanged from step to step: a cached
step must then return what a full one returns, whatever the method; the first site that does not is the culprit.
"""

from cache4diffusion.selfcheck.findings import INVARIANTS, Finding, SelfCheck, Status
from cache4diffusion.selfcheck.run import selfcheck

__all__ = ["INVARIANTS", "Finding", "SelfCheck", "Status", "selfcheck"]
