"""The processes that share the samples of a call, and how they come to one decision.

Where a sample is spread over processes, as diffusers' context parallelism does, each sees a share of its tokens, and a
step that one of them computes and another one predicts leaves both waiting for ever in the first exchange of that step.
So what a gate compares is added up over the group, in the order of its ranks, before anything is decided: every process
then decides from the same bits, and those of the whole sample. Nothing is ever added up over any other group.

One process has no group: `ALONE` answers at once and sends nothing.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.errors import RunError, SettingError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Processes = ProcessGroup | DeviceMesh

_RUNS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # begun so far, by process group
_BRISK, _PATIENT = 0.001, 0.05  # seconds of waiting without a pause, and before it is asked whether somebody failed


class Alone:
    """One process: what it sees is everything, and what it decides holds."""

    is_sharded = False  # whether a process holds only a share of every sample's tokens

    def enter(self, step: int, ordinal: int) -> None:
        """A call begins: which step, and which call of it."""

    def total(self, *sums: Tensor) -> Sequence[Tensor]:
        """Sums over the whole samples, of sums over what is here."""
        return sums

    def means(self, sums: Sequence[Tensor], counts: Sequence[int]) -> Sequence[Tensor]:
        """Means over the whole samples, of sums over so many numbers that are here."""
        return [total / count for total, count in zip(sums, counts, strict=True)]

    def count(self, here: int) -> int:
        """How many there are in the whole samples, of so many that are here."""
        return here

    def all(self, flag: bool) -> bool:
        """Whether it is true everywhere."""
        return flag

    def fail(self, error: BaseException | None) -> RunError | None:
        """The run has failed here (None: it was left by an exception elsewhere in the loop).

        Returns:
            What to raise instead: set where another process failed before, and this error is no more than its echo.
        """
        return None


ALONE = Alone()


class Group(Alone):
    """The processes of one group, in one run. All of them begin the same runs and take the same calls.

    Args:
        processes: the group.
        is_sharded: whether each holds a share of every sample's tokens; else all see the same.
    """

    def __init__(self, processes: ProcessGroup, is_sharded: bool = True) -> None:
        self.processes, self.is_sharded = processes, is_sharded
        self.ranks = _ranks(processes)
        self._is_on_host = "cpu" in dist.get_backend_config(processes)
        self._run = _RUNS[processes] = _RUNS.get(processes, 0) + 1
        self._place, self._asked, self._has_failed = (0, 0), 0, False

    def enter(self, step: int, ordinal: int) -> None:
        """A call begins."""
        self._place = (step, ordinal)

    def total(self, *sums: Tensor) -> Sequence[Tensor]:
        """On the host, in float32; the first process's, where all see the same."""
        shapes = [x.shape for x in sums]
        parts = self._gather(torch.cat([x.float().reshape(-1) for x in sums]))
        result = parts[0]
        for part in parts[1:] if self.is_sharded else []:
            result = result + part
        flat = result.split([shape.numel() for shape in shapes])
        return [x.reshape(shape) for x, shape in zip(flat, shapes, strict=True)]

    def means(self, sums: Sequence[Tensor], counts: Sequence[int]) -> Sequence[Tensor]:
        """In one exchange."""
        found = self.total(*sums, torch.tensor(counts, dtype=torch.float32, device=sums[0].device))
        return [total / count for total, count in zip(found[:-1], found[-1], strict=True)]

    def count(self, here: int) -> int:
        """One exchange."""
        return int(self.total(torch.tensor([float(here)]))[0])

    def all(self, flag: bool) -> bool:
        """One exchange."""
        return all(bool(part) for part in self._gather(torch.tensor([float(flag)])))

    def _gather(self, own: Tensor) -> list[Tensor]:
        """What every process brings, in the order of their ranks, on the host.

        Raises:
            RunError: they are not at the same place of the same run, or one of them has failed.
        """
        self._asked += 1
        header = torch.tensor([self._run, *self._place, self._asked], dtype=torch.float32)
        own = torch.cat([header.to(own.device), own])
        if self._is_on_host:
            own = own.cpu()
        elif own.device.type == "cpu":
            own = own.to(torch.accelerator.current_accelerator())
        parts = [torch.empty_like(own) for _ in self.ranks]
        self._wait(dist.all_gather(parts, own, group=self.processes, async_op=True))
        parts = list(torch.stack(parts).cpu())
        places = [tuple(int(x) for x in part[: len(header)].tolist()) for part in parts]
        if len(set(places)) > 1:
            words = [f"process {r}: run {p[0]}, step {p[1]}, call {p[2]}" for r, p in zip(self.ranks, places)]  # noqa: B905
            raise RunError(
                "The processes that share a sample are not at the same place, so they cannot decide together "
                f"({'; '.join(words)}). Each must run the same loop over the same inputs."
            )
        return [part[len(header) :] for part in parts]

    def _wait(self, work: Any) -> None:
        begun = time.monotonic()
        while not work.is_completed():
            waited = time.monotonic() - begun
            if waited > _PATIENT:
                note = self._note()
                if note:
                    raise self._echo(note)
                time.sleep(_PATIENT)
            elif waited > _BRISK:
                time.sleep(_BRISK)
        work.wait()

    # -- failures --------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return f"cache4diffusion/{self.processes.group_name}/{self._run}"

    def _note(self) -> str:
        """What the first process that failed in this run left for the others."""
        store = _store_of(self.processes)
        return store.get(self._key).decode() if store.check([self._key]) else ""

    def _echo(self, note: str) -> RunError:
        return RunError(
            f"{note.rstrip('.')}. It shares its samples with this process, which cannot go on without it. The group is "
            "out of step now: end its processes, or destroy the process group and make it anew."
        )

    def fail(self, error: BaseException | None) -> RunError | None:
        """Leave a note for those who wait, unless this was heard from somebody."""
        if self._has_failed:
            return None
        self._has_failed = True
        words = "its loop was left" if error is None else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store has gone with the process that kept it
            note = self._note()
            if not note:
                rank = self.ranks[self.processes.rank()]
                own = f"Process {rank} failed in step {self._place[0]}: {words[:500]}"
                _store_of(self.processes).set(self._key, own)
            elif _may_be_echo(error) and not note.endswith(words[:500]):
                return self._echo(note)
        return None


def _may_be_echo(error: BaseException | None) -> bool:
    """Whether it is of the kind that a broken exchange raises."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


def group_of(denoiser: nn.Module, given: Processes | Alone | None = None) -> Alone:
    """The processes that share what a denoiser is given in the run that begins now.

    Args:
        denoiser: with diffusers' ``enable_parallelism``, its own group is told by that.
        given: the group, where something else shares samples out.

    Raises:
        SettingError: ``given`` leaves out a process that diffusers has share the sample.
    """
    processes, is_sharded = _shared_by(denoiser, given)
    return ALONE if processes is None else Group(processes, is_sharded)


def shares_tokens(denoiser: nn.Module, given: Processes | Alone | None = None) -> bool:
    """Whether each process holds a share of every sample's tokens; arguments and errors as of `group_of`."""
    return _shared_by(denoiser, given)[1]


def _shared_by(denoiser: nn.Module, given: Processes | Alone | None) -> tuple[ProcessGroup | None, bool]:
    """The group, unless it is this process alone, and whether it shares tokens."""
    if isinstance(given, Alone):
        return None, False
    own, is_sharded = _told_by_diffusers(denoiser)
    chosen = own
    if given is not None:
        chosen = _as_group(given)
        missing = set(_ranks(own) if own is not None else ()) - set(_ranks(chosen))
        if missing:
            raise SettingError(
                f"group= leaves out {', '.join(f'process {rank}' for rank in sorted(missing))}, which diffusers "
                "has share every sample with this one. Leave group= away: it is told by the denoiser."
            )
        is_sharded = is_sharded or own is None
    if chosen is None or chosen.size() == 1:
        return None, False
    return chosen, is_sharded


def _ranks(processes: ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(processes)


def _as_group(given: Processes) -> ProcessGroup:
    """Its process group.

    Raises:
        SettingError: it is neither a group that this process is in, nor a mesh with one dimension.
    """
    get_group = getattr(given, "get_group", None)
    if get_group is not None and getattr(given, "ndim", 0) == 1:
        return get_group()
    if hasattr(given, "rank") and hasattr(given, "group_name"):
        return given  # type: ignore[return-value]
    raise SettingError(
        f"group={given!r}: give the process group of the processes that share every sample with this one (from "
        "torch.distributed.new_group), or a device mesh with one dimension."
    )


def _told_by_diffusers(denoiser: nn.Module) -> tuple[ProcessGroup | None, bool]:
    """The group of ``enable_parallelism``, and whether it splits the tokens (else the weights)."""
    config = getattr(unwrapped(denoiser), "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is not None:
        return context._flattened_mesh.get_group(), True
    tensor = getattr(config, "tensor_parallel_config", None)
    return (None, False) if tensor is None else (tensor._mesh.get_group(), False)


def _store_of(processes: ProcessGroup) -> dist.Store:
    """Where the processes of a group can leave a word without meeting."""
    return dist.distributed_c10d._get_process_group_store(processes)
