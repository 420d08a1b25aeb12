"""The site of cross-attentions to one token: what they return is the same for every query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cache4diffusion.anatomy import Anatomy, observe
from cache4diffusion.anatomy.tree import argument_leaves
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import SingleContext


class SingleContextDriver(PartsDriver):
    """Keeps the first token of what a cross-attention returns, and hands out as many of it as there are queries."""

    site: SingleContext

    def __init__(self, host: Host, site: SingleContext) -> None:
        super().__init__(host, site)
        self._kinds: set[Any] = set()  # of calls whose contexts were looked at

    def install(self, anatomy: Anatomy | None) -> None:
        """As all parts, then look at the contexts.

        Raises:
            AnatomyError: a context has more than one token.
        """
        super().install(anatomy)
        assert anatomy is not None
        self._check(anatomy)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As all parts; a call of other shapes may have longer contexts, so it is looked at before.

        Raises:
            AnatomyError: a context has more than one token.
        """
        shapes = ((path, leaf.shape[1:]) for path, leaf in argument_leaves(args, kwargs) if isinstance(leaf, Tensor))
        kind = frozenset(shapes)
        if kind not in self._kinds:
            if self._kinds:  # the first call is the one that was examined
                self._check(observe(self.host.denoiser, args, kwargs))
            self._kinds.add(kind)
        return super().run(context, inner, args, kwargs)

    def _check(self, anatomy: Anatomy) -> None:
        mine = {site.part.path for site in self.sites}
        parts = [part for stack in anatomy.stacks for block in stack.blocks for part in block.parts]
        longest = max((part for part in parts if part.path in mine), key=lambda part: part.context)
        if longest.context != 1:
            raise AnatomyError(
                f"{longest.path} of {anatomy.denoiser} attends to {longest.context} tokens, so what it returns "
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
