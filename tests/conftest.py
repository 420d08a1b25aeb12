from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree

from cache4diffusion.engine import host

torch.set_num_threads(1)  # toys are too small to share; two threads beside another process are slower than one

_KNOWN = {}


@pytest.fixture(autouse=True)
def anatomies_are_observed_once(request, monkeypatch):
    """An anatomy is frozen facts that depend on the denoiser's class, sizes and arguments; observing is slow."""
    if "anatomy" in request.path.name:  # where observing is what is tested
        return
    observe = host.observe

    def known(denoiser, args, kwargs):
        leaves, spec = pytree.tree_flatten((args, kwargs))
        call = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
        sizes = [(name, type(module).__qualname__) for name, module in denoiser.named_modules()]
        sizes += [(name, p.shape, p.dtype) for name, p in denoiser.named_parameters()]
        key = str((sizes, call, spec))
        if key not in _KNOWN:
            _KNOWN[key] = observe(denoiser, args, kwargs)
        return _KNOWN[key]

    monkeypatch.setattr(host, "observe", known)


# Tests of many cases that are alike: every second one is left to the slow tests, so that the others stay quick.
HALVED = (
    "tests/test_composition.py::test_what_can_be_made_runs_on_a_transformer",
    "tests/test_composition.py::test_what_can_be_made_runs_on_a_unet",
    "tests/test_zoo.py::test_off_is_off_and_cached_steps_equal_full_ones",
    "tests/test_memory.py::test_equal_to_the_ledger_of_a_run",
    "tests/test_anatomy_unseen.py::test_nothing_is_left_behind",
    "tests/test_storage.py::test_the_ledger_holds_what_was_predicted",
    "tests/invariants/test_state.py::test_runs_in_a_row",
    "tests/invariants/test_state.py::test_a_prompt_replaced_midway_leaves_nothing_of_the_old_one",
    "tests/unets/test_deepcache.py::test_half_precision_is_off_when_off_and_exact_on_a_frozen_input",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark every second quick case of the tests in `HALVED` as slow."""
    seen = Counter()
    for item in items:
        name = item.nodeid.split("[")[0]
        if name in HALVED and item.get_closest_marker("slow") is None:
            seen[name] += 1
            if seen[name] % 2 == 0:
                item.add_marker(pytest.mark.slow)
