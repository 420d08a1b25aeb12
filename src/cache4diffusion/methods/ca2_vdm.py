"""Ca2-VDM: in a video made chunk by chunk, keys and values of the frames that are done are computed once.

Source: arXiv:2411.16375 (ICML 2025); released code Dawn-LX/CausalCache-VDM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.gates import Throughout
from cache4diffusion.method import TRAINED, Composition, Method, MethodInfo
from cache4diffusion.predictors import Reuse
from cache4diffusion.settings import setting
from cache4diffusion.sites import PastFrames


@dataclass(frozen=True)
class Ca2VDM(Method):
    """The denoiser runs on the chunk; its attention over time goes back to kept keys and values of the frames in front.

    A call brings the window ``[clean frames, chunk]``, with timestep ``clean`` for the former. Attention over time is
    causal and the clean frames' timestep never changes, so their keys and values depend neither on the chunk nor on the
    step: one cache serves all steps, and within ``with handle.run():`` around the whole video also all chunks. New
    clean frames run once, with those held before them in sight; frames that the loop does not bring any more leave the
    queue. A chunk costs the same however long the video is: the strip of 4 steps is ``Fppp``, where ``p`` runs the
    chunk alone, 8 frames of 33.

    It is for denoisers that were trained so, with the places of frames in the video (cyclic or rotary) given as an
    argument. Which arguments have frames is declared: ``c4d.declare(denoiser, frames={"hidden_states": 2, "timestep":
    1}, first_frame="first_frame")``. It is tried at the first call, and a denoiser whose early frames know of later
    ones is refused. While every frame is still in the window, outputs are those of the plain loop. Later, what is kept
    still knows of frames that have left, as published; a loop that recomputes its window does not.

    Cost: keys and values of every attention over time, ``2 B L T S C`` for T frames of S tokens, and arguments and
    outputs of these frames, which are compared with what comes, and handed out again. One host sync per call (two where
    ``first_frame`` is a tensor), and three forwards at the first one of all.
    Differences from the code: keys are kept as attention sees them, normed and rotated for their place in the video,
    where the code rotates by the place in the queue, which is the same attention. Prefix-enhanced spatial attention is
    not served. The loop says which frames are in sight; the code counts them.
    """

    capacity: int = setting(25, "the most clean frames that a call may bring; 0 is off. Code: 25", ge=0)
    clean: float = setting(0.0, "timestep of clean frames. Code: 0 (an option: 50)", ge=0)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ca2-vdm",
        title="Ca2-VDM",
        arxiv="2411.16375",
        site="keys and values of past frames",
        gate="every step",
        predictor="reuse",
        tokens=None,
        fidelity="code",
        off={"capacity": 0},
        family="reuse of blocks and parts",
        when="a video is made chunk by chunk, by a denoiser that is causal in time",
        citation="Gao et al., Ca2-VDM: Efficient Autoregressive Video Diffusion Model with Causal Generation and Cache "
        "Sharing, ICML 2025",
        needs=TRAINED,
        is_exact=True,
        published={
            "33 frames, chunks of 8": {"capacity": 25, "clean": 0.0},
            "noisy frames in front": {"clean": 50.0},
        },
    )

    def compose(self) -> Composition:
        """Past frames x every step x reuse."""
        return Composition(
            site=PastFrames(max(self.capacity, 1), self.clean),
            gate=Throughout(is_on=self.capacity > 0),
            predictor=Reuse(),
        )
