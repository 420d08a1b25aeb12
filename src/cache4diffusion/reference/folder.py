"""Reference pipelines on disk: load the ones that ship, write new ones from training checkpoints.

A folder is what ``DiffusionPipeline.from_pretrained(folder)`` reads, offline and without code of this library. A stock
pipeline assumes the sizes of the model it was made for, so calls must say the reference model's own: the ``sampling``
of its description (`cache4diffusion.reference.models`); `SAMPLING` is that of ``scenes-flux``.

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

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from cache4diffusion.errors import FileFormatError, MissingExtraError, UnknownNameError, closest
from cache4diffusion.reference.models import MODELS, ReferenceModel

WEIGHTS = Path(__file__).parent / "weights"
"""Where the pipelines that ship with the package lie."""

SAMPLING: dict[str, Any] = dict(MODELS["scenes-flux"].sampling)
"""Arguments of a call that fit ``scenes-flux``. With ``true_cfg_scale=1`` guidance is off and a step costs half."""

MAX_FOLDER_BYTES = 20_000_000
"""Of one pipeline, so that its weights may lie in the repository."""

_PARTS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def available() -> list[str]:
    """Names of the reference pipelines that this installation has: that ship with it, or were built."""
    return sorted(folder.parent.name for folder in WEIGHTS.glob("*/model_index.json"))


def folder_of(name: str = "scenes-flux") -> Path:
    """The folder of a reference pipeline, for ``from_pretrained``.

    Raises:
        UnknownNameError: this installation has no such pipeline.
    """
    folder = WEIGHTS / name
    if name not in available():
        if name in MODELS:
            raise UnknownNameError(
                f"The reference model {name!r} does not ship: `make reference MODELS={name}`, in a checkout, trains "
                f"and builds it. Available: {', '.join(available()) or 'none'}."
            )
        raise UnknownNameError(
            f"There is no reference model {name!r} in {WEIGHTS}{closest(name, available()) or '.'} "
            f"Available: {', '.join(available()) or 'none'}."
        )
    return folder


def load(name: str | Path = "scenes-flux", dtype: torch.dtype = torch.float32) -> Any:
    """A reference pipeline on the CPU, ready to call with its model's ``sampling``.

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
    missing = [part for part in ("model_index.json", *_parts_of(folder)) if not (folder / part).exists()]
    if missing:
        raise FileFormatError(
            f"{folder} is no reference pipeline: it lacks {', '.join(missing)}. Build or install it anew."
        )
    try:
        with warnings.catch_warnings(), without_progress_bars():
            # The newer name of this argument is unknown to the oldest diffusers we support.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{folder} cannot be loaded ({reason}). Build or install it anew.") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parts_of(folder: Path) -> list[str]:
    """Those that the folder's index names; all if it has none."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return list(_PARTS)
    return [part for part in _PARTS if isinstance(index.get(part), list) and index[part][0] is not None]


def save_folder(
    path: Path | str,
    vae: AutoencoderKL,
    parts: Any,
    card: str | None = None,
    model: ReferenceModel = MODELS["scenes-flux"],
) -> Path:
    """Write a pipeline in bfloat16.

    Args:
        path: folder to write; what it holds of an earlier pipeline is replaced.
        vae: the trained autoencoder, its scaling and shift set.
        parts: the trained `Parts`: denoiser and text encoders.
        card: text of ``README.md``.
        model: what they are the parts of.

    Raises:
        ValueError: the folder would be larger than `MAX_FOLDER_BYTES`.
    """
    path = Path(path)
    vae, parts = copy.deepcopy(vae), copy.deepcopy(parts)
    for parameter in [*vae.parameters(), *parts.parameters()]:
        parameter.data = parameter.data.to(torch.bfloat16)
    make: Any = getattr(diffusers, model.pipeline)
    options = parts.options()
    pipe = make(vae=vae, scheduler=model.noise.scheduler(), **parts.modules_of_pipeline(), **options)
    with without_progress_bars():
        pipe.save_pretrained(path, safe_serialization=True)
    # What a pipeline's class takes and does not keep, stands in the index all the same.
    _edit(path / "model_index.json", **{key: value for key, value in options.items() if value is not None})
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
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    for part in ("tokenizer", "tokenizer_2"):
        if part in index:
            _edit(path / part / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
            _edit(path / "model_index.json", **{part: ["transformers", "PreTrainedTokenizerFast"]})
    for part in ("text_encoder", "text_encoder_2"):
        if part not in index:
            continue
        if index[part][1].startswith("CLIP"):
            weights = path / part / "model.safetensors"
            tensors = load_file(weights)
            named = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
            save_file(named, weights, metadata={"format": "pt"})
        # Asked for no dtype, transformers 5 takes the file's and diffusers float32: the pipeline would mix the two.
        _edit(path / part / "config.json", dtype="float32")
    for file in path.rglob("*.safetensors"):
        file.chmod(0o644)  # written readable by their owner only


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content | changes, indent=2) + "\n")


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within: diffusers and transformers load and save in silence."""
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
