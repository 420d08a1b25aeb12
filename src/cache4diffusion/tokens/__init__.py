"""Which tokens anyway: rules that compute some tokens of a part on cached steps."""

from cache4diffusion.tokens.asymmetric import AsymmetricTokens
from cache4diffusion.tokens.base import Segment, Spreading, Surveying, TokenPlace, TokenRule, Wholesale
from cache4diffusion.tokens.clusters import ClusterTokens
from cache4diffusion.tokens.dynamic import DynamicTokens
from cache4diffusion.tokens.facility import FacilityTokens
from cache4diffusion.tokens.merging import KeyStride, MergeTokens
from cache4diffusion.tokens.ranked import RankedTokens
from cache4diffusion.tokens.reduction import LinearPlan, Plan, Ranking, Reduction
from cache4diffusion.tokens.routed import RoutedTokens, routed_count
from cache4diffusion.tokens.topk import TopScore
from cache4diffusion.tokens.weighted import WeightedTokens, important_tokens, pruned_blocks

# Names under which a token rule can be given in a composition, as in tokens="top(recompute_ratio=0.1)".
TOKEN_RULES = {
    "asymmetric": AsymmetricTokens,
    "clusters": ClusterTokens,
    "dynamic": DynamicTokens,
    "facility": FacilityTokens,
    "ranked": RankedTokens,
    "routed": RoutedTokens,
    "merge": MergeTokens,
    "key-stride": KeyStride,
    "top": TopScore,
    "weighted": WeightedTokens,
}

__all__ = [
    "TOKEN_RULES",
    "AsymmetricTokens",
    "ClusterTokens",
    "DynamicTokens",
    "FacilityTokens",
    "KeyStride",
    "LinearPlan",
    "MergeTokens",
    "Plan",
    "RankedTokens",
    "Ranking",
    "Reduction",
    "RoutedTokens",
    "Segment",
    "Spreading",
    "Surveying",
    "TokenPlace",
    "TokenRule",
    "TopScore",
    "WeightedTokens",
    "Wholesale",
    "important_tokens",
    "pruned_blocks",
    "routed_count",
]
