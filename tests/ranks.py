"""Processes that are one group of ``torch.distributed``, for tests of what goes on between them.

They are forked from a server that has imported everything once, so that a new pair for every test costs little.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import traceback
import warnings
from multiprocessing import forkserver

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def on_ranks(job, *args, tmp_path, count=2, timeout=600.0, seconds=300.0, mortal=()):
    """What ``job(*args)`` returns in each process of a group, by rank.

    Args:
        job: a function at the top of its module.
        args: for it.
        tmp_path: where they meet.
        count: how many processes.
        timeout: of the group's own exchanges, in seconds.
        seconds: after which processes are taken for stuck.
        mortal: ranks that may end without a result (None).
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("processes cannot be forked on this platform")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toys"])
    found = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server, which is started here if it was not before
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if found is None else os.environ.update(PYTHONPATH=found)
    processes = [
        context.Process(target=_run, args=(rank, count, str(tmp_path), timeout, job, args), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in stuck:
        processes[rank].kill()
    assert not stuck, f"processes {stuck} were stuck for {seconds} s"
    results = []
    for rank in range(count):
        path = tmp_path / f"result-{rank}"
        silent = (None, None if rank in mortal else "it ended without a word")
        result, error = torch.load(path, weights_only=False) if path.exists() else silent
        assert error is None, f"process {rank}: {error}"
        results.append(result)
    return results


def _run(rank, count, folder, timeout, job, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        found = (job(*args), None)
    except BaseException:
        found = (None, traceback.format_exc())
    torch.save(found, f"{folder}/result-{rank}")
    os._exit(0)  # nothing more is exchanged: the others may have failed, and leaving properly would wait for them


class Spy:
    """Every collective of ``torch.distributed`` that this process begins while it is active, by operator."""

    def __init__(self):
        self.calls = []

    def __enter__(self):
        calls = self.calls

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.namespace in ("c10d", "_c10d_functional"):
                    calls.append(str(function))
                return function(*args, **(kwargs or {}))

        self._watch = Watch()
        self._watch.__enter__()
        return self

    def __exit__(self, *error):
        self._watch.__exit__(*error)
