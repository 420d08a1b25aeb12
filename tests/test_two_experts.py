"""Pipelines with two denoisers, each for its own part of the steps: what is done for one is done for both."""

import pytest
import torch
from torch import nn

import cache4diffusion as c4d
from cache4diffusion.engine import host
from cache4diffusion.engine.part_sites import PartSite
from cache4diffusion.errors import AnatomyError, RunError, SettingError
from toys import Dicts, Experts, flux_inputs

STEPS = 6


@pytest.fixture
def pipe():
    return Experts()


def one_call():
    return {**flux_inputs(2), "timestep": torch.ones(2)}


# ---------------------------------------------------------------------- prepare


def test_prepare_attaches_to_both(pipe):
    with c4d.accelerate(pipe, "fora", interval=3) as handle:
        plain = Dicts(pipe.transformer), Dicts(pipe.transformer_2)
        handle.prepare(**one_call())
        assert all(found.changed() for found in plain)


def test_prepare_attaches_to_the_one_that_is_named(pipe):
    with c4d.accelerate(pipe, "fora", interval=3) as handle:
        plain = Dicts(pipe.transformer), Dicts(pipe.transformer_2)
        handle.prepare(denoiser="transformer_2", **one_call())
        assert [bool(found.changed()) for found in plain] == [False, True]
        with pytest.raises(SettingError, match="did you mean 'transformer_2'"):
            handle.prepare(denoiser="transformer2", **one_call())


def test_what_the_second_expert_lacks_shows_in_prepare_and_leaves_neither_attached(pipe):
    pipe.transformer_2.single_transformer_blocks = pipe.transformer_2.single_transformer_blocks[:1]
    with c4d.accelerate(pipe, "dbcache", front=4, back=0) as handle:
        plain = Dicts(pipe.transformer, pipe.transformer_2)
        with pytest.raises(AnatomyError, match="watches the first 4 blocks"):
            handle.prepare(**one_call())
        assert not plain.changed()


def test_prepare_after_remove_is_refused(pipe):
    handle = c4d.accelerate(pipe, "fora")
    handle.remove()
    with pytest.raises(RunError, match="accelerate"):
        handle.prepare(**one_call())


# ---------------------------------------------------------------------- selfcheck


def test_selfcheck_checks_both(pipe):
    found = c4d.selfcheck(pipe, "fora", steps=STEPS)
    assert found.ok, str(found)
    for invariant in ("frozen_input", "kept_type", "nan_guard", "ledger_equals_held"):
        detail = found.of("fora", invariant).detail
        assert "transformer: " in detail and "; transformer_2: " in detail


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_selfcheck_names_the_expert_whose_part_is_wrong(pipe, expert, monkeypatch):
    broken = getattr(pipe, expert).transformer_blocks[1].attn
    given = PartSite.given

    def swapped(self, *call):
        return given(self, *call)[::-1] if self.module is broken else given(self, *call)

    monkeypatch.setattr(PartSite, "given", swapped)
    finding = c4d.selfcheck(pipe, "fora", steps=STEPS).of("fora", "frozen_input")
    assert (finding.status, finding.site) == ("failed", f"{expert}.transformer_blocks.1.attn")
    assert finding.detail.startswith(f"{expert}: a cached step failed")


def test_selfcheck_says_which_expert_a_run_does_not_call():
    found = c4d.selfcheck(Experts(share=1.0), "taylorseer-lite", steps=STEPS)
    assert found.ok, str(found)
    finding = found.of("taylorseer-lite", "frozen_input")
    assert finding.status == "passed"
    assert finding.detail.endswith(f"; transformer_2: not called in a run of {STEPS} steps")


def test_selfcheck_of_a_method_that_one_expert_cannot_run(pipe):
    pipe.transformer_2.single_transformer_blocks = nn.ModuleList()
    pipe.transformer_2.transformer_blocks = pipe.transformer_2.transformer_blocks[:1]
    found = c4d.selfcheck(pipe, c4d.methods.DBCache(front=2, back=0), steps=STEPS)
    assert {finding.status for finding in found.findings} == {"not applicable"}


# ---------------------------------------------------------------------- compare


def test_compare_looks_at_each_expert_once(pipe, monkeypatch):
    seen, observe = [], host.observe

    def observed(denoiser, args, kwargs):
        seen.append(denoiser)
        return observe(denoiser, args, kwargs)

    monkeypatch.setattr(host, "observe", observed)
    c4d.compare(pipe, ["a", "b"], ["fora(interval=3)"], steps=4, batch=1, progress=False)
    assert seen == [pipe.transformer, pipe.transformer_2]
