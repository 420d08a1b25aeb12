"""The site of linear layers: the same as parts, one level further inside."""

from __future__ import annotations

from cache4diffusion.anatomy import Block, Part
from cache4diffusion.anatomy.facts import call_name
from cache4diffusion.engine.parts import PartsDriver

_ADAPTER = "lora_"  # layers of an adapter beside the one it adapts: as cheap as any correction
_WRAPPED = ".base_layer"  # the layer inside the adapter's wrapper; without an adapter it has the wrapper's place


class LinearsDriver(PartsDriver):
    """Predicts the outputs of linear layers. Nothing rests with them: what feeds a layer is what a corrector sees.

    Each runs once in its block, so that its calls are counted as the block's are.
    """

    def sites_of(self, block: Block) -> list[tuple[str, Part]]:
        """The layers, named as they are without an adapter."""
        return [
            (
                call_name(path.removesuffix(_WRAPPED), block.turn),
                Part(
                    path,
                    part.kind,
                    (((), "unknown"),),
                    is_tokenwise=True,
                    inputs=((0,),),
                    is_mutated=True,
                    calls=block.calls,
                    turn=block.turn,
                ),
            )
            for _, part in super().sites_of(block)
            for path in part.linears
            if _ADAPTER not in path
        ]
