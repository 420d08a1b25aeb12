import zlib

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


# Tests of many cases that are alike: about three in four are left to the slow tests, so that the others stay quick.
THINNED = (
    "tests/test_composition.py::test_a_pair_is_made_or_refused_as_the_table_says",
    "tests/test_composition.py::test_rows_decide_wherever_that_can_be_made",
    "tests/test_composition.py::test_what_can_be_made_runs_on_a_transformer",
    "tests/test_composition.py::test_what_can_be_made_runs_on_a_unet",
    "tests/test_zoo.py::test_off_is_off_and_cached_steps_equal_full_ones",
    "tests/test_zoo.py::test_a_batch_of_one_works_too",
    "tests/test_zoo.py::test_a_call_gives_numbers_and_the_same_ones_every_time",
    "tests/test_zoo.py::test_a_rich_call_gives_what_the_plain_one_leaves_out",
    "tests/test_foreign.py::test_never_cached_is_bit_equal",
    "tests/test_foreign.py::test_cached_steps_on_the_same_input_equal_the_full_one_and_nothing_bypassed_runs",
    "tests/test_memory.py::test_equal_to_the_ledger_of_a_run",
    "tests/test_anatomy_unseen.py::test_nothing_is_left_behind",
    "tests/test_storage.py::test_the_ledger_holds_what_was_predicted",
    "tests/test_storage.py::test_what_was_offloaded_comes_back_unchanged",
    "tests/test_living_with_others.py::test_it_works_or_is_refused",
    "tests/invariants/test_off_is_off.py::test_flux_is_bit_equal",
    "tests/invariants/test_off_is_off.py::test_sequential_branches_are_bit_equal",
    "tests/invariants/test_off_is_off.py::test_pipeline_is_bit_equal",
    "tests/invariants/test_off_is_off.py::test_batched_guidance_on_dit_is_bit_equal",
    "tests/invariants/test_frozen_input.py::test_cached_steps_of_flux_equal_the_full_one",
    "tests/invariants/test_frozen_input.py::test_bypassed_modules_run_0_times",
    "tests/invariants/test_frozen_input.py::test_cached_steps_of_batched_guidance_on_dit_equal_the_full_one",
    "tests/invariants/test_guards.py::test_autocast_and_inference_mode",
    "tests/invariants/test_guards.py::test_nan_is_recomputed_at_once",
    "tests/invariants/test_guards.py::test_nan_read_at_the_next_step_makes_that_one_full",
    "tests/invariants/test_guards.py::test_the_ledger_equals_what_is_held",
    "tests/invariants/test_guards.py::test_type_shape_and_container_are_kept_on_cached_steps",
    "tests/invariants/test_removal.py::test_nothing_keeps_cached_tensors_alive_after_an_error",
    "tests/invariants/test_removal.py::test_nothing_keeps_cached_tensors_alive_after_a_run",
    "tests/invariants/test_guards.py::test_outputs_of_cached_steps_may_be_written_into",
    "tests/invariants/test_removal.py::test_remove_restores_what_was_found",
    "tests/invariants/test_state.py::test_each_of_three_branches_is_as_in_its_own_run",
    "tests/invariants/test_state.py::test_two_experts_of_one_pipeline_share_a_handle",
    "tests/invariants/test_removal.py::test_the_context_manager_removes_after_an_error",
    "tests/invariants/test_removal.py::test_paused_it_is_as_if_it_had_been_removed_and_then_it_goes_on",
    "tests/invariants/test_state.py::test_a_run_aborted_at_step_7",
    "tests/invariants/test_state.py::test_a_second_pipeline_on_the_accelerated_denoiser",
    "tests/invariants/test_state.py::test_two_pipelines_of_one_class_enable_both_remove_one",
    "tests/invariants/test_state.py::test_runs_in_a_row",
    "tests/invariants/test_state.py::test_branches_of_different_prompt_lengths",
    "tests/invariants/test_state.py::test_branches_of_which_one_has_an_ip_adapter_and_a_controlnet",
    "tests/invariants/test_state.py::test_two_threads_on_one_denoiser",
    "tests/invariants/test_state.py::test_two_threads_with_two_pipelines",
    "tests/invariants/test_state.py::test_a_prompt_replaced_midway_leaves_nothing_of_the_old_one",
    "tests/unets/test_deepcache.py::test_off_is_off_and_only_what_is_shallow_runs_on_a_frozen_input",
    "tests/unets/test_deepcache.py::test_half_precision_is_off_when_off_and_exact_on_a_frozen_input",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark three in four of the quick cases of `THINNED` tests as slow: by their names, so that kinds are mixed."""
    for item in items:
        if item.nodeid.split("[")[0] in THINNED and zlib.crc32(item.nodeid.encode()) % 4:
            item.add_marker(pytest.mark.slow)
