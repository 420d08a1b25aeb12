"""Published methods that are no composition of the four axes: each has a call of its own."""

from __future__ import annotations

from cache4diffusion.info import MethodInfo

BESIDE: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            name="fisedit",
            title="FISEdit",
            arxiv="2305.17423",
            site="layers of a U-Net",
            gate="the mask of what changes",
            predictor="reuse",
            tokens="those of the mask",
            fidelity="code",
            off={},
            family="editing",
            when="a few words of a U-Net's prompt change, and most of the picture stays",
            citation="Yu et al., FISEdit: Accelerating Text-to-image Editing via Cache-enabled Sparse Diffusion "
            "Inference, AAAI 2024",
            needs="a call of its own, c4d.edit.record(pipe, prompt=...)",
        ),
    )
}
"""By slug. They are listed with the methods and cannot be attached."""
