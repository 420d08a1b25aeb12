"""The site of cross-attentions to one token: what they return is the same for every query."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import SingleContext


class SingleContextDriver(PartsDriver):
    """Keeps the first token of what a cross-attention returns, and hands out as many of it as there are queries."""

    site: SingleContext

    def install(self, anatomy: Anatomy | None) -> None:
        """Look at the contexts, then as all parts.

        Raises:
            AnatomyError: a context has more than one token.
        """
        super().install(anatomy)
        assert anatomy is not None
        longest = max(self.sites, key=lambda site: site.part.context)
        if longest.part.context != 1:
            raise AnatomyError(
                f"{longest.name} of {anatomy.denoiser} attends to {longest.part.context} tokens, so what it returns "
                "depends on the query. This method is for contexts of one token, such as an image embedding (Stable "
                "Video Diffusion); without an IP-adapter. Others may work: 'fora', 't-gate-v2'."
            )

    def keep(
        self,
        context: Context,
        name: str,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor] = (),
        rows: Sequence[int] | None = None,
    ) -> None:
        """Only the first token."""
        context.state.extra.setdefault("queries", {})[name] = leaves[0].shape[-2]
        super().keep(context, name, [leaf.narrow(-2, 0, 1) for leaf in leaves], seen, rows)

    def forecast(
        self, context: Context, name: str, seen: Sequence[Tensor] = (), rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """It stands for all of them."""
        count = context.state.extra["queries"][name]
        return [leaf.expand(*leaf.shape[:-2], count, -1) for leaf in super().forecast(context, name, seen, rows)]
