"""The site of attentions: parts, of which every kind of attention has a decision of its own."""

from __future__ import annotations

from cache4diffusion.anatomy import Anatomy, Block, Part
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import Attentions


class AttentionsDriver(PartsDriver):
    """Predicts the outputs of attentions, and of the MLPs of some blocks."""

    site: Attentions

    def install(self, anatomy: Anatomy | None) -> None:
        """As all parts.

        Raises:
            AnatomyError: there is no MLP in any of the blocks that are named.
        """
        super().install(anatomy)
        if self.site.mlp_blocks and not any(site.part.kind == "ffn" for site in self.sites):
            assert anatomy is not None
            numbers = [
                number
                for stack in anatomy.stacks
                for number, block in enumerate(stack.blocks)
                if any(part.kind == "ffn" for part in block.parts)
            ]
            accepted = f"use numbers up to {max(numbers)}" if numbers else "leave mlp_timesteps=() as it is"
            raise AnatomyError(
                f"mlp_blocks={self.site.mlp_blocks}: none of these blocks of {anatomy.denoiser} has an MLP of its own; "
                f"{accepted}."
            )

    def sites_of(self, block: Block) -> list[tuple[str, Part]]:
        """The attentions, and the MLPs if the block is one of those named."""
        assert self.host.anatomy is not None
        stacks = self.host.anatomy.stacks
        number = next((i for stack in stacks for i, other in enumerate(stack.blocks) if other.name == block.name), -1)
        has_mlp = number in self.site.mlp_blocks
        return [(name, part) for name, part in super().sites_of(block) if has_mlp or part.kind != "ffn"]

    def decision_for(self, name: str, part: Part) -> str:
        """By what the attention attends to."""
        if part.kind in ("cross_attn", "ffn"):
            return {"cross_attn": "cross", "ffn": "mlp"}[part.kind]
        return "temporal" if part.over == "time" else "spatial"
