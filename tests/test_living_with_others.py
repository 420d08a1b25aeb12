"""What else people put on a pipeline, before `accelerate` and after it (`companions.cases` is the table), and what the
engine must see of it."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, apply_first_block_cache
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK

import cache4diffusion as c4d
import toys
from cache4diffusion.anatomy.observe import observe
from cache4diffusion.engine import host
from cache4diffusion.errors import AlreadyAcceleratedError, RunError
from companions import table
from companions.cases import COMPANIONS
from companions.companion import ORDERS
from companions.conformance import CHECKS, check_refused

pytestmark = pytest.mark.filterwarnings("ignore")  # companions warn of themselves

# What is tried of each among the quick checks; all else among the slow ones.
USUAL = ("before", "whole")
QUICK = {
    "model offload": ("after", "whole"),
    "sequential offload": ("before", "span"),
    "sequential offload, then model offload": None,  # below: hooks that come and go
    "group offload, pairs of blocks": ("before", "span"),
    "layerwise casting": ("after", "whole"),
    "compiled blocks": None,  # test_compile.py
    "compiled denoiser": ("after", "part"),
    "LoRA": ("after", "whole"),
    "LoRA, fused": ("after", "whole"),
    "LoRA, merged": ("after", "whole"),
    "attention backend": ("after", "whole"),
    "diffusers' FirstBlockCache": ("after", "whole"),
    "GGUF file": ("after", "whole"),
}
ROWS = [
    pytest.param(name, order, site, marks=() if (order, site) == QUICK.get(name, USUAL) else pytest.mark.slow)
    for name, companion in COMPANIONS.items()
    for order in ORDERS
    for site in companion.subject.methods
]


@pytest.mark.parametrize(("name", "order", "site"), ROWS)
def test_it_works_or_is_refused(name, order, site, monkeypatch):
    monkeypatch.setattr(host, "observe", observe)  # not once for all: what is seen under a companion is tried, too
    companion = COMPANIONS[name]
    if companion.absence is not None:
        pytest.skip(companion.absence)
    if companion.refusal(order, site) is not None:
        check_refused(companion, order, site)
    else:
        CHECKS[order](companion, site)


# ---------------------------------------------------------------------- the table

COMMITTED = Path(__file__).parents[1] / "docs" / "compatibility.json"


def test_the_committed_table_has_every_case_and_no_failure():
    result = json.loads(COMMITTED.read_text())
    assert result["schema"] == table.SCHEMA
    assert [row["companion"] for row in result["rows"]] == list(COMPANIONS), "run `make compatibility`"
    for row in result["rows"]:
        companion = COMPANIONS[row["companion"]]
        assert row["how"] == companion.how
        assert list(row["cells"]) == [f"{order} {site}" for order in ORDERS for site in companion.subject.methods]
        for place, cell in row["cells"].items():
            refusal = companion.refusal(*place.split())
            if cell["outcome"] == table.ABSENT:
                assert companion.needs is not None and companion.needs in cell["words"]
            elif refusal is not None:
                assert cell["outcome"] == table.REFUSED and refusal in cell["words"]
            else:
                assert cell["outcome"] == table.WORKS, (row["companion"], place, cell)
    assert result["conditions"]["methods"] == table.conditions()["methods"]
    assert COMMITTED.with_suffix(".md").read_text() == table.page(result), "the page is another"


def test_the_table_tells_what_was_found(tmp_path, monkeypatch, capsys):
    companion = COMPANIONS["diffusers' FirstBlockCache"]
    stem = str(tmp_path / "found")
    words = ["--only", companion.name, "--write", stem]
    with warnings.catch_warnings():
        assert table.main(words) == 0
        monkeypatch.setattr(table, "row_of", lambda companion: pytest.fail("known rows are kept"))
        assert table.main([*words, "--resume"]) == 0
        monkeypatch.undo()
        monkeypatch.setattr(table, "check_refused", lambda *case: pytest.fail("it was not refused"))
        assert table.main(words) == 1
    text = Path(f"{stem}.md").read_text()
    assert "**0 checks passed, 6 failed**" in text and "before whole: Failed: it was not refused" in text
    with pytest.raises(SystemExit):
        table.main(["--only", "LoRa"])
    assert "use some of model offload" in capsys.readouterr().err


def test_what_is_absent_is_told_with_the_reason(monkeypatch):
    from companions import companion

    monkeypatch.setattr(companion, "version_of", lambda package: None)
    found = table.cell_of(COMPANIONS["torchao int8"], "before", "whole")
    assert found == {"outcome": "absent", "words": "torchao is not installed"}


# ---------------------------------------------------------------------- hooks that come and go


def run(denoiser, handle=None, steps=9):
    if handle is None:
        return torch.stack(toys.flux_loop(denoiser, toys.flux_inputs(), steps))
    with handle.run(num_steps=steps):
        return torch.stack(toys.flux_loop(denoiser, toys.flux_inputs(), steps))


def parts(denoiser):
    return [block.proj_out for block in denoiser.single_transformer_blocks]


@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_on_parts_may_come_and_go_while_attached(order):
    """They take the place of ``forward``, and put back what they found when they go."""
    denoiser = toys.flux()
    plain = run(denoiser)
    with c4d.accelerate(denoiser, "taylorseer", interval=3) as handle:
        alone = run(denoiser, handle)
    if order == "before":
        for part in parts(denoiser):
            add_hook_to_module(part, ModelHook())
    with c4d.accelerate(denoiser, "taylorseer", interval=3) as handle:
        assert torch.equal(run(denoiser, handle), alone)
        for _ in range(2):
            for part in parts(denoiser):
                remove_hook_from_module(part)
            assert torch.equal(run(denoiser, handle), alone)
            for part in parts(denoiser):
                add_hook_to_module(part, ModelHook())
            assert torch.equal(run(denoiser, handle), alone)
        assert handle.stats["strip"] == "FFFccFccF"
    assert torch.equal(run(denoiser), plain)


def test_a_class_that_is_patched_while_attached_is_looked_at_anew():
    denoiser = toys.flux()
    kind = type(denoiser.transformer_blocks[0])

    class Patched(kind):
        def forward(self, *args, **kwargs):
            text, image = super().forward(*args, **kwargs)
            return text, image + 0.1 * self.ff(self.norm2(image))

    def patch(to):
        for block in denoiser.transformer_blocks:
            block.__class__ = to

    with c4d.accelerate(denoiser, "fora", interval=3) as handle:
        alone = run(denoiser, handle)
        patch(Patched)
        after = run(denoiser, handle)
        patch(kind)
        assert torch.equal(run(denoiser, handle), alone)
    patch(Patched)
    with c4d.accelerate(denoiser, "fora", interval=3) as handle:
        assert torch.equal(run(denoiser, handle), after)


@pytest.mark.parametrize("interval", [1, 3])
def test_an_adapter_loaded_in_the_middle_of_a_run_counts_from_the_next_step_on(interval):
    pytest.importorskip("peft")

    def load(pipe, step, timestep, kwargs):
        if step == 3:
            COMPANIONS["LoRA"].apply(pipe)
        return kwargs

    pipe = toys.flux_pipeline()
    plain = toys.generate(pipe, 9, callback_on_step_end=load)
    pipe.unload_lora_weights()
    with c4d.accelerate(pipe, "taylorseer", interval=interval) as handle:
        found = toys.generate(pipe, 9, callback_on_step_end=load)
        assert handle.stats["strip"] == {1: "FFFFFFFFF", 3: "FFFcFFccF"}[interval]
    assert torch.equal(found, plain) if interval == 1 else found.isfinite().all()


class Sized(toys.Blocks):
    """Needs what a hook leaves on it, as tomesd's blocks need the latent's size."""

    size = None

    def forward(self, x, timestep, context):
        (rows,) = self.size
        return super().forward(x, timestep, context[:, :rows])


def test_what_a_hook_leaves_for_the_modules_is_there_when_they_are_observed():
    denoiser = toys.seeded(Sized)().eval()
    denoiser.register_forward_pre_hook(lambda module, args: setattr(module, "size", (args[0].shape[1],)))

    def loop():
        x, context, found = toys.flux_inputs()["hidden_states"][..., :4], torch.ones(1, 16, 8), []
        for t in toys.timesteps(9):
            found.append(denoiser(x, torch.tensor([t]), context))
            x = x - found[-1] / 9
        return torch.stack(found)

    with torch.no_grad():
        with c4d.accelerate(denoiser, "fora", interval=1) as handle, handle.run(num_steps=9):
            off = loop()
        with c4d.accelerate(denoiser, "fora", interval=3) as handle, handle.run(num_steps=9):
            assert not torch.equal(loop(), off)
            assert handle.stats["strip"] == "FccFccFcc"
        assert torch.equal(loop(), off)


# ---------------------------------------------------------------------- other caches, other denoisers


def test_caches_hooked_on_while_attached_are_noticed_at_the_next_run():
    denoiser = toys.flux()
    with c4d.accelerate(denoiser, "fora", interval=3) as handle:
        alone = run(denoiser, handle)
        apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=0.2))
        with pytest.raises(AlreadyAcceleratedError, match=r"fbc_leader_block_hook at transformer_blocks\.0.*'fbcache'"):
            run(denoiser, handle)
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        for name in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
            registry.remove_hook(name, recurse=True)
        assert torch.equal(run(denoiser, handle), alone)


def test_a_denoiser_put_in_the_place_of_an_accelerated_one_is_not_run_as_if_it_were():
    pipe, other = toys.flux_pipeline(), toys.flux(seed=1)
    with c4d.accelerate(pipe, "taylorseer-lite", interval=3) as handle:
        alone = toys.generate(pipe)
        mine, pipe.transformer = pipe.transformer, other
        with pytest.raises(RunError, match="transformer was exchanged after accelerate"):
            toys.generate(pipe)
        with handle.paused():
            assert torch.equal(toys.generate(pipe), toys.generate(toys.flux_pipeline(other)))
        pipe.transformer = torch.compile(mine, backend="eager")  # the same, wrapped
        handle._on_pipeline(pipe)
        pipe.transformer = mine
        assert torch.equal(toys.generate(pipe), alone)


def test_with_gradients_checkpointed_blocks_compute_what_they_would():
    denoiser = toys.flux().requires_grad_(True)
    denoiser.enable_gradient_checkpointing()
    twin, inputs = copy.deepcopy(denoiser), {**toys.flux_inputs(), "timestep": torch.tensor([0.5])}
    for name in ("dbcache", "fora"):
        with c4d.accelerate(denoiser, name, **toys.ACTIVE[name]) as handle:
            alone = run(denoiser, handle)  # blocks and parts are wrapped
            with pytest.warns(UserWarning, match="Gradients are enabled"):
                output = denoiser(**inputs).sample
            expected = twin(**inputs).sample
            assert torch.equal(output, expected)
            for each in (output, expected):
                each.square().sum().backward()
            assert torch.equal(run(denoiser, handle), alone)
        pairs = list(zip(denoiser.parameters(), twin.parameters(), strict=True))
        assert any(ours.grad is not None for ours, _ in pairs)
        for ours, theirs in pairs:
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
            ours.grad = theirs.grad = None


def test_a_group_of_blocks_is_loaded_by_whichever_comes_first_and_goes_when_the_call_ends():
    pipe = toys.flux_pipeline()
    denoiser = pipe.transformer
    COMPANIONS["group offload, pairs of blocks"].apply(pipe)
    before = toys.Dicts(denoiser)
    # The first block of a pair rests, then the last of another.
    for settings in ({"front": 1, "back": 2}, {"front": 1, "back": 0}):
        with c4d.accelerate(denoiser, "dbcache", warmup=1, threshold=1e9, **settings) as handle:
            assert torch.isfinite(run(denoiser, handle, 4)).all()
            assert handle.stats["strip"] == "Fccc"
        for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
            assert all(parameter.isnan().all() for parameter in block.parameters()), "still there after the call"
    assert not before.changed()
