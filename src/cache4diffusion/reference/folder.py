"""Reference pipelines on disk: load the ones that ship, write new ones from training checkpoints.

A folder is what ``FluxPipeline.from_pretrained(folder)`` reads, offline and without code of this library. A stock
pipeline assumes FLUX's sizes, so calls must say the reference model's own: `SAMPLING`.

    pipe = load("scenes-flux")
    image = pipe("a red circle left of a blue star on a gray background", **SAMPLING).images[0]
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import load_file, save_file

from cache4diffusion.errors import FileFormatError, MissingExtraError, UnknownNameError, closest
from cache4diffusion.reference.networks import TEXT_LENGTH, build_scheduler, build_tokenizer
from cache4diffusion.reference.scenes import IMAGE_SIZE

WEIGHTS = Path(__file__).parent / "weights"
"""Where the pipelines that ship with the package lie."""

SAMPLING: dict[str, Any] = {
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
    "num_inference_steps": 50,
    "max_sequence_length": TEXT_LENGTH,
    "negative_prompt": "",
    "true_cfg_scale": 2.0,
}
"""Arguments of a call that fit ``scenes-flux``. With ``true_cfg_scale=1`` guidance is off and a step costs half."""

MAX_FOLDER_BYTES = 40_000_000

_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def available() -> list[str]:
    """Names of the reference pipelines that ship with this installation."""
    return sorted(folder.parent.name for folder in WEIGHTS.glob("*/model_index.json"))


def folder_of(name: str = "scenes-flux") -> Path:
    """The folder of a reference pipeline, for ``from_pretrained``.

    Raises:
        UnknownNameError: no such pipeline ships with this installation.
    """
    folder = WEIGHTS / name
    if name not in available():
        raise UnknownNameError(
            f"There is no reference model {name!r} in {WEIGHTS}{closest(name, available()) or '.'} "
            f"Available: {', '.join(available()) or 'none'}."
        )
    return folder


def load(name: str | Path = "scenes-flux", dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """A reference pipeline on the CPU, ready to call with `SAMPLING`.

    Args:
        name: one of `available`, or the path of a folder made by `save_folder`.
        dtype: of all weights. The files hold bfloat16; float32 computes faster on most CPUs.

    Raises:
        UnknownNameError: no such pipeline, and no such folder.
        FileFormatError: the folder lacks a part, or a file in it cannot be read.
        MissingExtraError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "reference")
    folder = Path(name) if isinstance(name, Path) or Path(name).is_dir() else folder_of(name)
    if not folder.is_dir():
        raise UnknownNameError(f"There is no folder {folder}. Reference models: {', '.join(available()) or 'none'}.")
    missing = [part for part in ("model_index.json", *_PARTS) if not (folder / part).exists()]
    if missing:
        raise FileFormatError(
            f"{folder} is no reference pipeline: it lacks {', '.join(missing)}. Build or install it anew."
        )
    try:
        with warnings.catch_warnings(), _without_progress_bars():
            # The newer name of this argument is unknown to the oldest diffusers we support.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{folder} cannot be loaded ({reason}). Build or install it anew.") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_folder(path: Path | str, vae: AutoencoderKL, model: Any, card: str | None = None) -> Path:
    """Write a pipeline in bfloat16.

    Args:
        path: folder to write; what it holds of an earlier pipeline is replaced.
        vae: the trained autoencoder, its scaling and shift set.
        model: a trained `FlowModel`: its ``transformer``, ``text_encoder`` and ``text_encoder_2``.
        card: text of ``README.md``.

    Raises:
        ValueError: the folder would be larger than `MAX_FOLDER_BYTES`.
    """
    path = Path(path)
    vae, model = copy.deepcopy(vae), copy.deepcopy(model)
    for parameter in [*vae.parameters(), *model.parameters()]:
        parameter.data = parameter.data.to(torch.bfloat16)
    make: Any = FluxPipeline  # typed for CLIPTokenizer; any tokenizer of transformers serves
    pipe = make(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(with_start=True),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=build_tokenizer(with_start=False),
        transformer=model.transformer,
    )
    with _without_progress_bars():
        pipe.save_pretrained(path, safe_serialization=True)
    make_portable(path)
    if card is not None:
        (path / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if size > MAX_FOLDER_BYTES:
        raise ValueError(f"{path} holds {size} bytes; a reference pipeline may have {MAX_FOLDER_BYTES}.")
    return path


def make_portable(path: Path) -> None:
    """Bring a saved pipeline into the form that transformers 4 and 5 read alike; harmless when repeated.

    transformers 5 gave names of its own to two things. The class of the tokenizers: 4 does not know the new one, both
    know the old one. The weights of CLIP: 4 wants the prefix ``text_model.`` and, without it, starts from random
    weights with no more than a warning; 5 takes the prefix away itself.
    """
    for part in ("tokenizer", "tokenizer_2"):
        _edit(path / part / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        _edit(path / "model_index.json", **{part: ["transformers", "PreTrainedTokenizerFast"]})
    weights = path / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    named = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(named, weights, metadata={"format": "pt"})
    # Asked for no dtype, transformers 5 takes the file's and diffusers float32: the pipeline would mix the two.
    for part in ("text_encoder", "text_encoder_2"):
        _edit(path / part / "config.json", dtype="float32")
    for file in path.rglob("*.safetensors"):
        file.chmod(0o644)  # written readable by their owner only


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content | changes, indent=2) + "\n")


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    import diffusers.utils.logging
    import transformers.utils.logging

    loggings = [diffusers.utils.logging, transformers.utils.logging]
    shown = [logging for logging in loggings if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()
