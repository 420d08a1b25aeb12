"""What ``--model`` may be: a reference model by name, or the folder of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache4diffusion.errors import FileFormatError, SettingError, UnknownNameError, closest

REFERENCE_MODELS = ("scenes-flux",)


@dataclass
class Model:
    """A pipeline and what is known about using it.

    Args:
        pipe: the pipeline.
        name: in tables.
        call: arguments its calls need.
        steps: it is made for; None: the pipeline's default.
        judge: says whether an image meets its caption, where that can be checked.
        family: of a caption.
    """

    pipe: Any
    name: str
    call: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    judge: Callable[[str, Any], bool] | None = None
    family: Callable[[str], str] | None = None

    @property
    def is_scenes(self) -> bool:
        """Whether it is a reference model, with captions and a checker of its own."""
        return self.judge is not None


def load_model(name: str, extra: Mapping[str, Any] | None = None) -> Model:
    """Load a reference model (``scenes-flux``) or the pipeline in a folder, offline.

    Args:
        name: of the model, or a folder.
        extra: arguments of the pipeline's calls that replace the model's own.

    Raises:
        UnknownNameError: neither; the nearest name is given.
        FileFormatError: the folder cannot be loaded.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise FileFormatError(f"{folder} is no pipeline folder: it has no model_index.json.")
        model = _scenes(folder, folder.name) if (folder / "facts.json").exists() else _pipeline(folder)
    elif "/" in name or name.startswith("."):
        raise UnknownNameError(f"There is no folder {name}. Reference models: {', '.join(REFERENCE_MODELS)}.")
    elif name not in REFERENCE_MODELS:
        hint = closest(name, REFERENCE_MODELS) or "."
        raise UnknownNameError(
            f"There is no model {name!r}{hint} Give a reference model ({', '.join(REFERENCE_MODELS)}) or a folder that "
            "a diffusers pipeline was saved to."
        )
    else:
        model = _scenes(name, name)
    model.call |= dict(extra or {})
    return model


def _pipeline(folder: Path) -> Model:
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # any part may be broken in any way
        raise FileFormatError(f"{folder} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    return Model(pipe, folder.name)


def _scenes(source: str | Path, name: str) -> Model:
    from cache4diffusion import reference

    call = dict(reference.SAMPLING)
    steps = call.pop("num_inference_steps")

    def judge(caption: str, image: Any) -> bool:
        return reference.check(image, caption).ok

    return Model(reference.load(source), name, call, steps, judge, family_of)


def family_of(caption: str) -> str:
    """Task family of a scene's caption, by what it asks for."""
    from cache4diffusion.reference.checker import parse_caption

    demands = parse_caption(caption)
    kinds = set(demands.objects)
    if demands.relation is not None:
        return "position"
    if len(demands.objects) == 1:
        return "colors" if demands.objects[0][0] is not None else "single_object"
    if len(kinds) == 1:
        return "counting"
    return "color_attr" if all(colour is not None for colour, _ in demands.objects) else "two_object"


def captions_for(model: Model, count: int | None, file: Path | None, seed: int) -> tuple[list[str], Model]:
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
        from cache4diffusion import reference

        return reference.held_out_captions(count or 16, seed), model
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"The prompts {file} cannot be read: {error}.") from error
    captions = [line for line in lines if line][:count]
    if not captions:
        raise SettingError(f"{file} holds no prompts: write one per line.")
    if model.is_scenes and not all(_is_scene(caption) for caption in captions):
        model.judge = model.family = None
    return captions, model


def _is_scene(caption: str) -> bool:
    from cache4diffusion.reference.checker import parse_caption

    try:
        parse_caption(caption)
    except ValueError:
        return False
    return True
