"""What ``--model`` may be: a reference model by name, or the folder of a pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cache4diffusion.calls import subject
from cache4diffusion.errors import FileFormatError, SettingError, UnknownNameError, closest

REFERENCE_MODELS = ("scenes-flux", "scenes-dit", "scenes-pixart", "scenes-sd", "scenes-video")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Model:
    """A pipeline and what is known about using it.

    Args:
        pipe: the pipeline.
        name: in tables.
        call: arguments its calls need.
        steps: it is made for; None: the pipeline's default.
        judge: says whether an image (of a video: its frames) meets its caption, where that can be checked.
        family: of a caption.
        task: of a reference model: what it draws.
    """

    pipe: Any
    name: str
    call: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    judge: Callable[[str, Any], bool] | None = None
    family: Callable[[str], str] | None = None
    task: Any = None

    @property
    def is_scenes(self) -> bool:
        """Whether it is a reference model, with captions and a checker of its own."""
        return self.judge is not None

    def prompt(self, text: str) -> str | int:
        """What the pipeline is asked for by ``text``: the text, or the number of a class.

        Raises:
            SettingError: the pipeline takes classes, and it is no number.
        """
        if subject(self.pipe) == "prompt":
            return text
        if not text.strip().isdecimal():
            raise SettingError(f"{type(self.pipe).__name__} draws classes: give the number of one, not {text!r}.")
        return int(text)


def load_model(
    name: str, extra: Mapping[str, Any] | None = None, device: str | None = None, dtype: str | None = None
) -> Model:
    """Load a reference model (``scenes-flux``) or the pipeline in a folder, offline.

    Args:
        name: of the model, or a folder.
        extra: arguments of the pipeline's calls that replace the model's own.
        device: where it runs; None: reference models, which are made for it, on the CPU; others on the accelerator if
            there is one.
        dtype: of its weights, one of `DTYPES`; None: float32 for reference models and on the CPU, else bfloat16.

    Raises:
        UnknownNameError: neither; the nearest name is given.
        SettingError: no such device or dtype.
        FileFormatError: the folder cannot be loaded.
    """
    folder, precision = Path(name), _dtype(dtype)
    is_own = folder.is_dir() and not (folder / "facts.json").exists()
    where = _device(device, is_own)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise FileFormatError(f"{folder} is no pipeline folder: it has no model_index.json.")
        if is_own:
            model = _pipeline(folder, precision or (torch.float32 if where.type == "cpu" else torch.bfloat16))
        else:
            model = _scenes(folder, folder.resolve().name, precision)
    elif "/" in name or name.startswith("."):
        raise UnknownNameError(f"There is no folder {name}. Reference models: {', '.join(REFERENCE_MODELS)}.")
    elif name not in REFERENCE_MODELS:
        hint = closest(name, REFERENCE_MODELS) or "."
        raise UnknownNameError(
            f"There is no model {name!r}{hint} Give a reference model ({', '.join(REFERENCE_MODELS)}) or a folder that "
            "a diffusers pipeline was saved to."
        )
    else:
        model = _scenes(name, name, precision)
    model.call |= dict(extra or {})
    try:
        model.pipe.to(where)
    except (RuntimeError, AssertionError) as error:  # out of memory, no such device, or torch was built without it
        raise SettingError(f"--device {where}: {(str(error).splitlines() or [''])[0]}") from error
    return model


def _device(name: str | None, is_own: bool) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator() if is_own and torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"--device {name!r}: write it like cpu, cuda, cuda:1 or mps.") from error


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise SettingError(f"--dtype {name!r}{closest(name, DTYPES) or '.'} Use one of {', '.join(DTYPES)}.")
    return None if name is None else getattr(torch, name)


def _pipeline(folder: Path, dtype: torch.dtype) -> Model:
    import warnings

    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            # The newer name of this argument is unknown to the oldest diffusers we support.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except Exception as error:  # any part may be broken in any way
        raise FileFormatError(f"{folder} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    return Model(pipe, folder.resolve().name)


def _scenes(source: str | Path, name: str, dtype: torch.dtype | None) -> Model:
    from cache4diffusion import reference

    pipe = reference.load(source, dtype or torch.float32)
    described = reference.model_of(pipe)
    call, task = dict(described.sampling), described.task
    steps = call.pop("num_inference_steps")

    def judge(prompt: Any, picture: Any) -> bool:
        return task.check(picture, prompt).ok

    return Model(pipe, name, call, steps, judge, task.family_of, task)


def captions_for(model: Model, count: int | None, file: Path | None, seed: int) -> tuple[list[Any], Model]:
    """Captions to measure: the first ``count`` lines of a file, or of the reference model's held-out captions.

    Returns:
        The captions, and the model; without its judge if the captions are none of its world.

    Raises:
        SettingError: there is neither file nor reference model, or nothing in the file.
        FileFormatError: the file cannot be read.
    """
    if count is not None and count < 1:
        raise SettingError(f"--captions {count}: use 1 or more.")
    if file is None:
        if not model.is_scenes:
            raise SettingError(f"{model.name} has no captions of its own: give --prompts FILE, one prompt per line.")
        return [model.task.prompt(drawn) for drawn in model.task.held_out(count or 16, seed)], model
    prompts = [model.prompt(text) for text in read_prompts(file)[:count]]
    if model.is_scenes and not all(_is_known(model.task, prompt) for prompt in prompts):
        model.judge = model.family = None
    return prompts, model


def prompts_to_calibrate(model: Model, count: int | None, file: Path | None, seed: int) -> list[Any]:
    """Prompts to calibrate with: the first ``count`` lines of a file, or captions of the reference model's training.

    Never the held-out ones, by which methods are judged.

    Raises:
        SettingError: there is neither file nor reference model, or nothing in the file.
        FileFormatError: the file cannot be read.
    """
    if count is not None and count < 1:
        raise SettingError(f"--captions {count}: use 1 or more.")
    if file is not None:
        return [model.prompt(text) for text in read_prompts(file)[:count]]
    if not model.is_scenes:
        raise SettingError(f"{model.name} has no captions of its own: give --prompts FILE, one prompt per line.")
    rng = random.Random(seed)
    return [model.task.prompt(model.task.training(rng, 1)[0]) for _ in range(count or 16)]


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        SettingError: there are none.
        FileFormatError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise FileFormatError(f"The prompts {file} cannot be read: {reason}.") from error
    lines = [line.strip() for line in text.splitlines()]
    if not any(lines):
        raise SettingError(f"{file} holds no prompts: write one per line.")
    return [line for line in lines if line]


def _is_known(task: Any, prompt: Any) -> bool:
    try:
        task.family_of(prompt)
    except ValueError:
        return False
    return True
