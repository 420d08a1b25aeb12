"""What a denoiser's arguments are: the clock, the latent, the conditioning."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from cache4diffusion.anatomy.flow import ancestors
from cache4diffusion.anatomy.hints import hint_of
from cache4diffusion.anatomy.tape import Recording
from cache4diffusion.anatomy.tree import LeafPath
from cache4diffusion.anatomy.vocabulary import words

TIMESTEP_NAMES = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "time_step",
    "sigma",
    "sigmas",
    "noise_level",
    "noise_labels",
    "r_timestep",
    "timestep_r",
)
"""Likeliest first."""

CLOCK_WORDS = words("timestep timesteps sigma sigmas time")
"""A name that has one of these as a word is a clock's, if no argument has one of the names above."""

LATENT_NAMES = words("hidden_states sample x latents latent noisy_latents x_t img image hidden_state")
_NO_PROMPT = words(
    "guidance _ids rotary freqs rope pos_ control residual block_samples adapter_states size grid height width indices "
    "indexes"
)
"""Arguments with one of these in their name do not vary with the prompt, or vary with every step."""
_PROMPT_IDS = "input_ids"  # words of a prompt, as numbers; other ids are places


def parameter_names(denoiser: nn.Module | type[nn.Module]) -> list[str]:
    """Names of the forward's parameters, in order."""
    kind = denoiser if isinstance(denoiser, type) else type(denoiser)
    try:
        parameters = inspect.signature(kind.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in kinds][1:]


def timestep_name(names: Sequence[str]) -> str | None:
    """The parameter that is the clock, by its name."""
    known = next((name for name in TIMESTEP_NAMES if name in names), None)
    return known or next((name for name in names if is_clock(name)), None)


def is_clock(name: str) -> bool:
    """Whether an argument of this name tells the noise level: ``timestep``, ``audio_timestep``, ``noise_time``."""
    return name in TIMESTEP_NAMES or not CLOCK_WORDS.isdisjoint(name.split("_"))


def is_no_prompt(name: str) -> bool:
    """Whether an argument of this name does not vary with the prompt: places, sizes, and what is added to features."""
    return any(word in f"_{name}" for word in _NO_PROMPT) and not name.endswith(_PROMPT_IDS)


class Arguments:
    """The roles of a recorded forward's tensor arguments.

    Args:
        denoiser: the module that was recorded.
        recording: its tape.
    """

    def __init__(self, denoiser: nn.Module, recording: Recording) -> None:
        self.recording, self.hint = recording, hint_of(denoiser)
        self.given = recording.root.arguments
        self.names = parameter_names(denoiser)
        self.notes: list[str] = []
        self.timestep = self._timestep()
        self.latent = self._latent()
        self.others = self._others()
        self.conditioning = tuple(path for path in self.given if self._varies_with_prompt(path))

    def name(self, path: LeafPath) -> str:
        """The name under which an argument is known, with its nested keys."""
        first = path[0]
        if isinstance(first, int):
            first = self.names[first] if first < len(self.names) else f"args_{first}"
        return "_".join(str(key) for key in (first, *path[1:]))

    @property
    def latents(self) -> frozenset[int]:
        """Serial numbers of the latent: one, or several where it is a list with a tensor per sample."""
        first = None if self.latent is None else self.latent[0]
        return frozenset(serial for path, serial in self.given.items() if path == self.latent or _is_item(path, first))

    def _timestep(self) -> LeafPath | None:
        if not self.hint.has_clock:
            return None
        wanted = self.hint.timestep or timestep_name(self.names)
        for path in self.given:
            if wanted is not None and len(path) == 1 and self.name(path) == wanted:
                return path
        if self.hint.timestep is not None:
            return None  # a number, perhaps
        for path in self.given:
            if len(path) == 1 and is_clock(self.name(path)):
                return path
        small = [path for path, serial in self.given.items() if self._feeds_sine(serial)]
        if len(small) == 1:
            self.notes.append(f"argument {small[0]} is taken for the timestep: sines and cosines are made of it alone")
            return small[0]
        self.notes.append("which argument is the timestep was not established")
        return None

    def _feeds_sine(self, serial: int) -> bool:
        recording = self.recording
        if len(recording.shape(serial)) > 1:
            return False
        waves = [op.outputs[0] for op in recording.ops if op.name in ("sin", "cos")]
        return serial in ancestors(recording, waves)

    def _latent(self) -> LeafPath | None:
        recording = self.recording
        declared = [path for path in self.given if self.name(path[:1]) == self.hint.latent]
        if declared:
            return declared[0]
        live = ancestors(recording, recording.root.outputs.values())
        outputs = [recording.shape(serial) for serial in recording.root.outputs.values()]
        able = [
            path
            for path, serial in self.given.items()
            if path != self.timestep
            and serial in live
            and recording.facts[serial].dtype.is_floating_point
            and len(recording.shape(serial)) >= 2
        ]
        if not able:
            self.notes.append("which argument is the latent was not established")
            return None

        def merit(path: LeafPath) -> tuple[int, ...]:
            shape, name = recording.shape(self.given[path]), self.name(path[:1])
            likeness = max((_likeness(shape, output) for output in outputs), default=0)
            return (int(name in LATENT_NAMES), likeness, -able.index(path))

        return max(able, key=merit)

    @property
    def likelier(self) -> str | None:
        """An argument that an output is like, where none is like the latent that was declared."""
        recording = self.recording
        if self.hint.latent is None or self.latent is None:
            return None
        outputs = [recording.shape(serial) for serial in recording.root.outputs.values()]
        alike = {
            path: max((_likeness(recording.shape(serial), output) for output in outputs), default=0)
            for path, serial in self.given.items()
            if recording.facts[serial].dtype.is_floating_point and path != self.timestep
        }
        if alike.get(self.latent, 1):  # indices of a codebook are like nothing
            return None
        best = max(alike, key=alike.__getitem__)
        return self.name(best) if alike[best] > 1 else None

    def _others(self) -> tuple[LeafPath, ...]:
        """Arguments that look like an output of another shape than the latent's."""
        if self.latent is None:
            return ()
        recording, latent = self.recording, self.recording.shape(self.given[self.latent])
        outputs = {recording.shape(serial) for serial in recording.root.outputs.values()} - {latent}
        if len(recording.root.outputs) < 2:
            return ()
        return tuple(
            path
            for path, serial in self.given.items()
            if path not in (self.latent, self.timestep)
            and recording.facts[serial].dtype.is_floating_point
            and len(recording.shape(serial)) > 1
            and recording.shape(serial) in outputs
        )

    def _varies_with_prompt(self, path: LeafPath) -> bool:
        if path in (self.timestep, self.latent, *self.others) or (
            self.latent is not None and path[:1] == self.latent[:1]
        ):
            return False
        if self.hint.conditioning is not None:
            return self.name(path[:1]) in self.hint.conditioning
        return not is_clock(self.name(path[:1])) and not is_no_prompt(self.name(path))


def _likeness(shape: tuple[int, ...], output: tuple[int, ...]) -> int:
    """How much an argument looks like an output: equal number of axes, then equal lengths (channels may differ)."""
    return 1 + sum(a == b for a, b in zip(shape, output, strict=True)) if len(shape) == len(output) else 0


def _is_item(path: LeafPath, first: int | str | None) -> bool:
    return len(path) > 1 and path[0] == first
