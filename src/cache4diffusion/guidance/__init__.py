"""Between CFG branches: predicting one branch's output from another's."""

from cache4diffusion.guidance.base import BranchRule
from cache4diffusion.guidance.drop import DropBranch
from cache4diffusion.guidance.frequency import FrequencyResidual

# Names under which a branch rule can be given in a composition, as in cfg="fastercache(interval=5)".
BRANCH_RULES = {"fastercache": FrequencyResidual, "drop": DropBranch}

__all__ = ["BRANCH_RULES", "BranchRule", "DropBranch", "FrequencyResidual"]
