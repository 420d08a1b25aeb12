"""The reference models, one description each: what it draws, by which noise process, and how its pipeline is called.

Training, building and evaluation read this table and know no model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cache4diffusion.errors import UnknownNameError, closest
from cache4diffusion.reference.motion import FRAME_SIZE, FRAMES
from cache4diffusion.reference.networks import TEXT_LENGTH
from cache4diffusion.reference.noise import FlowMatching, Noise, VPrediction
from cache4diffusion.reference.parts import DitParts, FluxParts, LatteParts, Parts, PixArtParts, SdParts
from cache4diffusion.reference.scenes import IMAGE_SIZE
from cache4diffusion.reference.tasks import Classes, Clips, Scenes, Task


@dataclass(frozen=True)
class Training:
    """How a denoiser is trained unless told otherwise.

    Args:
        updates: in all, over which the learning rate rises, stays and falls.
        batch: examples per microbatch.
        microbatches: per update.
        pool: examples that are kept encoded.
        reuse: how often each is met, about.
        cooldown: share of the updates, at their end, in which the learning rate falls to 0.
        lr: of the parameters that follow Muon.
        seed: of weights, data and noise.
    """

    updates: int = 10_000
    batch: int = 16
    microbatches: int = 2
    pool: int = 32768
    reuse: int = 4
    cooldown: float = 0.3
    lr: float = 2e-3
    seed: int = 2


@dataclass(frozen=True)
class ReferenceModel:
    """One model.

    Args:
        name: of the model, and of its folder.
        about: what it is, a sentence or two for the model card.
        pipeline: name of its class in diffusers.
        denoiser: name of its denoiser in the pipeline.
        parts: makes denoiser and text encoders from a seed.
        task: what it draws, and how that is judged.
        noise: the process it was trained under.
        sampling: arguments of a call of its pipeline.
        tokens: what the denoiser works on, for the model card.
        training: how it is trained.
        borrowed: what it takes over from ``scenes-flux``, in words; empty if nothing.
        record: name under which ``facts.json`` keeps the history of its training.
    """

    name: str
    about: str
    pipeline: str
    denoiser: str
    parts: Callable[[int], Parts]
    task: Task
    noise: Noise
    sampling: Mapping[str, Any]
    tokens: str
    training: Training = field(default_factory=Training)
    borrowed: str = ""
    record: str = "denoiser"

    @property
    def has_own_vae(self) -> bool:
        """Whether the autoencoder is trained for it."""
        return not self.borrowed

    @property
    def guidance(self) -> str:
        """Name of the argument that sets the guidance scale."""
        return "true_cfg_scale" if "true_cfg_scale" in self.sampling else "guidance_scale"


_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_SOME_FAMILIES = {"single_object": 0.15, "colors": 0.25, "position": 0.6}

MODELS: dict[str, ReferenceModel] = {
    model.name: model
    for model in (
        ReferenceModel(
            name="scenes-flux",
            about="described by captions of the six GenEval task families.",
            pipeline="FluxPipeline",
            denoiser="transformer",
            parts=FluxParts,
            task=Scenes(),
            noise=FlowMatching(),
            sampling=_SQUARE
            | {
                "num_inference_steps": 50,
                "max_sequence_length": TEXT_LENGTH,
                "negative_prompt": "",
                "true_cfg_scale": 2.0,
            },
            tokens="packed to 64 image tokens, beside 16 text tokens",
            training=Training(updates=21_500, microbatches=4),
            record="flow",
        ),
        ReferenceModel(
            name="scenes-dit",
            about="asked for by class: a colour and a shape, on any background.",
            pipeline="DiTPipeline",
            denoiser="transformer",
            parts=DitParts,
            task=Classes(),
            noise=VPrediction(),
            sampling={"num_inference_steps": 50, "guidance_scale": 2.0},
            tokens="cut into 64 image tokens",
            training=Training(updates=16_000),
            borrowed="autoencoder",
        ),
        ReferenceModel(
            name="scenes-pixart",
            about="described by captions of three task families; the denoiser looks at the text through "
            "cross-attention, and has 256 image tokens, so that token methods can be judged.",
            pipeline="PixArtSigmaPipeline",
            denoiser="transformer",
            parts=PixArtParts,
            task=Scenes(_SOME_FAMILIES),
            noise=VPrediction(),
            sampling=_SQUARE
            | {
                "num_inference_steps": 50,
                "max_sequence_length": TEXT_LENGTH,
                "negative_prompt": "",
                "guidance_scale": 2.0,
                "clean_caption": False,
                "use_resolution_binning": False,
            },
            tokens="256 image tokens of one latent pixel each, beside 16 text tokens",
            borrowed="autoencoder and T5 encoder",
        ),
        ReferenceModel(
            name="scenes-sd",
            about="described by captions of three task families; the denoiser is a U-Net.",
            pipeline="StableDiffusionPipeline",
            denoiser="unet",
            parts=SdParts,
            task=Scenes(_SOME_FAMILIES),
            noise=VPrediction(),
            sampling=_SQUARE | {"num_inference_steps": 50, "guidance_scale": 2.0},
            tokens="maps of 16 x 16, 8 x 8 and 4 x 4, beside 16 text tokens",
            borrowed="autoencoder and CLIP encoder (which learned along)",
        ),
        ReferenceModel(
            name="scenes-video",
            about="that move: 8 frames of 96 x 96 pixels, described by captions that name a direction.",
            pipeline="LattePipeline",
            denoiser="transformer",
            parts=LatteParts,
            task=Clips(),
            noise=VPrediction(),
            sampling={
                "height": FRAME_SIZE,
                "width": FRAME_SIZE,
                "video_length": FRAMES,
                "num_inference_steps": 50,
                "negative_prompt": "",
                "guidance_scale": 2.0,
                "clean_caption": False,
                "mask_feature": False,  # or else what a caption is padded with depends on the batch
            },
            tokens="36 image tokens in each of 8 frames, beside 120 text tokens",
            training=Training(batch=8, pool=8192, reuse=8),
            borrowed="autoencoder and T5 encoder (with new rows for words of motion)",
        ),
    )
}
"""Every reference model by name, in the order in which they are built."""


def model_named(name: str) -> ReferenceModel:
    """The description of a reference model.

    Raises:
        UnknownNameError: there is none of that name; the nearest is given.
    """
    if name not in MODELS:
        raise UnknownNameError(
            f"There is no reference model {name!r}{closest(name, MODELS) or '.'} Models: {', '.join(MODELS)}."
        )
    return MODELS[name]


def model_of(pipe: Any) -> ReferenceModel:
    """The reference model that a pipeline is one of: each has a class of its own.

    Raises:
        UnknownNameError: there is none.
    """
    for model in MODELS.values():
        if model.pipeline == type(pipe).__name__:
            return model
    raise UnknownNameError(
        f"{type(pipe).__name__} is the class of no reference model: {', '.join(m.pipeline for m in MODELS.values())}."
    )
