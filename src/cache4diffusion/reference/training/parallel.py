"""Training by a few single-threaded processes that share one copy of the weights.

On a CPU with other work on it, two threads that wait for each other inside every matrix product run many times slower
than one. Here each process has one thread and the processes meet three times per update only:

    1. main sets the learning rate                                            -- all meet
    2. everyone takes microbatches from a shared counter, adds up gradients   -- all meet
    3. everyone takes parameters from a shared counter, sums gradients, steps -- all meet

A process on a busy core simply takes fewer microbatches. The data of a microbatch depends on (seed, update, number of
the microbatch), not on who took it. On an accelerator the same loop runs in one process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache4diffusion.files import write_whole
from cache4diffusion.reference.training.optim import adam_step, muon_step

Loss = Callable[[nn.Module, torch.Generator, int, int], "tuple[Tensor, dict[str, float]]"]
"""(model, randomness of this microbatch, update, number of the microbatch) -> scalar loss, numbers for the log."""


_LONGEST_UPDATE = 120.0
"""Seconds; an update that took longer was suspended meanwhile, which does not count as training time."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        folder: where checkpoints, the log and the loss curve go.
        minutes: wall-clock budget of this call; the learning rate reaches 0 at its end.
        updates: stop after this many updates of this call, or -1 for no such limit.
        lr: learning rate after warm-up.
        warmup: updates of linear warm-up, also after a resume.
        cooldown: share of the time budget, at its end, in which the learning rate falls linearly to 0.
        microbatches: microbatches per update.
        workers: processes; 1 trains in this process alone.
        seed: of the data and the noise.
        save_minutes: time between two checkpoints.
        log_every: updates between two lines of the log.
        ema: share of the updates so far over which the averaged weights reach back.
        device: "cpu", or an accelerator such as "cuda".
        resume: "auto" continues from weights and optimizer state, "ema" from the averaged weights with a fresh
            optimizer (what is left when only those were kept); both start afresh where there is no checkpoint.
    """

    folder: Path
    minutes: float
    updates: int = -1
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.3
    microbatches: int = 8
    workers: int = 2
    seed: int = 0
    save_minutes: float = 5.0
    log_every: int = 50
    ema: float = 0.08
    device: str = "cpu"
    resume: str = "auto"


class Trainer:
    """Trains ``model`` on ``loss``; see the module's docstring for the loop.

    Args:
        model: on the CPU; moved to shared memory.
        loss: called for every microbatch, in any process; must draw all randomness from the given generator.
        is_matrix: whether a parameter, given by name, follows Muon. Others follow Adam.
        facts: recorded in the history.
        lr_scale: share of the learning rate that a parameter, given by name, gets.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        settings: TrainSettings,
        is_matrix: Callable[[str, Tensor], bool],
        facts: dict[str, Any] | None = None,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        if settings.workers < 1 or settings.microbatches < 1:
            raise ValueError(
                f"workers={settings.workers}, microbatches={settings.microbatches}: both must be 1 or more."
            )
        if settings.resume not in ("auto", "ema"):
            raise ValueError(f"resume={settings.resume!r}: choose 'auto' or 'ema'.")
        self.model, self.loss, self.settings = model, loss, settings
        self.device = torch.device(settings.device)
        self.workers = settings.workers if self.device.type == "cpu" else 1
        self.folder = Path(settings.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history: dict[str, Any] = {"updates": 0, "seconds": 0.0, "curve": [], "facts": facts or {}}

        model.to(self.device)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named.sort(key=lambda item: -item[1].numel())  # the long ones first: the work ends evenly
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.lr_scale = [lr_scale(name) for name in self.names]
        self.is_matrix = [p.ndim >= 2 and is_matrix(name, p) for name, p in named]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [
            torch.zeros(0, device=self.device) if m else torch.zeros_like(p)
            for p, m in zip(self.parameters, self.is_matrix, strict=True)
        ]
        self.optimizer_updates = 0
        self._load()
        self.grads = [[torch.zeros_like(p) for p in self.parameters] for _ in range(self.workers)]
        self.control = torch.zeros(6, dtype=torch.float64)  # lr, update, optimizer update, ema decay, stop
        if self.workers > 1:
            for tensor in [*self.ema, *self.first, *self.second, *chain(*self.grads), self.control]:
                tensor.share_memory_()
            model.share_memory()

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent, or SIGTERM or Ctrl-C; save; return the history."""
        context = mp.get_context("fork")
        self._barrier = context.Barrier(self.workers) if self.workers > 1 else None
        self._microbatch = context.Value("i", 0)
        self._parameter = context.Value("i", 0)
        self._numbers = context.SimpleQueue()
        children = [context.Process(target=self._child, args=(i,), daemon=True) for i in range(1, self.workers)]
        for child in children:
            child.start()
        stop = threading.Event()
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                handlers[signal_number] = signal.signal(signal_number, lambda *_: stop.set())
        ended = threading.Event()
        if children:
            threading.Thread(target=self._watch, args=(children, ended), daemon=True).start()
        try:
            self._main(stop)
            self.control[4] = 1
            ended.set()
            self._meet()
        except threading.BrokenBarrierError:
            raise RuntimeError("a training process died; resume from the last checkpoint.") from None
        finally:
            ended.set()
            for signal_number, handler in handlers.items():
                signal.signal(signal_number, handler)
            for child in children:
                child.join(timeout=30)
                if child.is_alive():
                    child.kill()
        return self.history

    def _main(self, stop: threading.Event) -> None:
        settings, history = self.settings, self.history
        last_save = last_log = time.monotonic()
        seconds_before, updates_before = history["seconds"], history["updates"]
        numbers: list[dict[str, float]] = []
        while not stop.is_set():
            spent = (history["seconds"] - seconds_before) / 60 / settings.minutes
            done, start = history["updates"] - updates_before, time.monotonic()
            if settings.updates >= 0:
                spent = max(spent, done / settings.updates if settings.updates else 1.0)
            if spent >= 1:
                break
            update = history["updates"] = history["updates"] + 1
            self.optimizer_updates += 1
            lr = settings.lr * min(
                1.0, (done + 1) / max(settings.warmup, 1), (1 - spent) / max(settings.cooldown, 1e-9)
            )
            decay = 1 - 1 / (1 + settings.ema * update)
            self.control[:4] = torch.tensor([lr, update, self.optimizer_updates, decay], dtype=torch.float64)
            self._microbatch.value = self._parameter.value = 0
            self._meet()
            self._update(0)
            numbers.append(self._collect())
            history["seconds"] += min(time.monotonic() - start, _LONGEST_UPDATE)
            if not math.isfinite(numbers[-1]["loss"]):
                raise FloatingPointError(
                    f"the loss is {numbers[-1]['loss']} at update {update}; resume from the last checkpoint, lower lr."
                )
            if update % settings.log_every == 0:
                means = {key: sum(n[key] for n in numbers) / len(numbers) for key in numbers[0]}
                pace = len(numbers) / (time.monotonic() - last_log) * 60
                last_log, numbers = time.monotonic(), []
                entry = {"update": update, "minutes": round(history["seconds"] / 60, 2)}
                entry |= {key: float(f"{value:.5g}") for key, value in means.items()}
                history["curve"].append(entry)
                line = " ".join(f"{key}={value}" for key, value in entry.items())
                print(f"{line} lr={lr:.2e} updates/min={pace:.1f}", flush=True)
            if time.monotonic() - last_save > 60 * settings.save_minutes:
                self.save()
                last_save = time.monotonic()
        self.save()

    def _watch(self, children: list[Any], ended: threading.Event) -> None:
        # Who dies never comes to the barrier: free those who wait there.
        while not ended.wait(2):
            if not all(child.is_alive() for child in children) and not ended.is_set():
                if self._barrier is not None:
                    self._barrier.abort()
                return

    def _child(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # main decides when to stop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
        # A broken barrier means that main is gone: so is the reason to train.
        with contextlib.suppress(threading.BrokenBarrierError):
            while True:
                self._meet()
                if self.control[4]:
                    return
                self._update(worker)

    def _update(self, worker: int) -> None:
        lr, update, optimizer_update, decay = self.control[:4].tolist()
        for parameter, grad in zip(self.parameters, self.grads[worker], strict=True):
            grad.zero_()
            parameter.grad = grad  # autograd adds to it in place
        while (i := _take(self._microbatch)) < self.settings.microbatches:
            generator = torch.Generator(device="cpu").manual_seed(_mix(self.settings.seed, int(update), i))
            loss, numbers = self.loss(self.model, generator, int(update), i)
            (loss / self.settings.microbatches).backward()
            self._numbers.put({"loss": loss.item(), **numbers})
        self._meet()
        with torch.no_grad():
            while (i := _take(self._parameter)) < len(self.parameters):
                parameter, grad = self.parameters[i], self.grads[0][i]
                for other in self.grads[1:]:
                    grad.add_(other[i])
                own_lr = lr * self.lr_scale[i]
                if self.is_matrix[i]:
                    muon_step(parameter, grad, self.first[i], own_lr)
                else:
                    adam_step(parameter, grad, self.first[i], self.second[i], own_lr, int(optimizer_update))
                self.ema[i].lerp_(parameter, 1 - decay)
        self._meet()

    def _collect(self) -> dict[str, float]:
        found = [self._numbers.get() for _ in range(self.settings.microbatches)]
        return {key: sum(f[key] for f in found) / len(found) for key in found[0]}

    def _meet(self) -> None:
        if self._barrier is not None:
            self._barrier.wait()  # without limit: a suspended process is only late

    def save(self) -> None:
        """Write ``ema.safetensors``, ``state.safetensors`` (weights and optimizer) and ``history.json``, atomically."""
        state = {}
        for i, name in enumerate(self.names):
            state |= {f"weight.{name}": self.parameters[i].detach(), f"first.{name}": self.first[i]}
            if not self.is_matrix[i]:
                state[f"second.{name}"] = self.second[i]
        counts = {"optimizer_updates": str(self.optimizer_updates), "updates": str(self.history["updates"])}
        write_whole(
            self.folder / "ema.safetensors",
            lambda path: save_file(_plain(dict(zip(self.names, self.ema, strict=True))), path),
        )
        write_whole(self.folder / "state.safetensors", lambda path: save_file(_plain(state), path, metadata=counts))
        write_whole(self.folder / "history.json", json.dumps(self.history))

    def _load(self) -> None:
        ema_file, state_file = self.folder / "ema.safetensors", self.folder / "state.safetensors"
        if not ema_file.exists():
            return
        ema = load_file(ema_file)
        state = load_file(state_file) if self.settings.resume == "auto" and state_file.exists() else {}
        for i, name in enumerate(self.names):
            self.ema[i].copy_(ema[name])
            with torch.no_grad():
                self.parameters[i].copy_(state.get(f"weight.{name}", ema[name]))
            if state:
                self.first[i].copy_(state[f"first.{name}"])
                if not self.is_matrix[i]:
                    self.second[i].copy_(state[f"second.{name}"])
        history_file = self.folder / "history.json"
        if history_file.exists():
            facts = self.history["facts"]
            earlier = json.loads(history_file.read_text())
            self.history = earlier | {"facts": earlier["facts"] | facts}
        self.optimizer_updates = self.history["updates"] if state else 0


def _take(counter: Any) -> int:
    with counter.get_lock():
        counter.value += 1
        return counter.value - 1


def _follow(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _mix(*numbers: int) -> int:
    """One seed from several numbers (FNV-1a)."""
    value = 0xCBF29CE484222325
    for number in numbers:
        value = ((value ^ (number & 0xFFFFFFFF)) * 0x100000001B3) % 2**64
    return value % 2**63


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
