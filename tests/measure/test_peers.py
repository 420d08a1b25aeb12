"""Peers under the bench: what is seen of them from outside, and that nothing of them is left."""

from dataclasses import replace

import pytest
import torch

import cache4diffusion as c4d
from cache4diffusion.compare import variants_of
from pipelines.cases import CASES
from scripts import script

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # FasterCache's FFT

PEERS = {  # by name: the case, what is changed so that few steps show it, and what its strip is made of
    "DeepCache package": ("sd", {}, "Fc"),
    "tomesd package": ("sd", {}, "r"),
    "diffusers FirstBlockCache": ("flux", {"threshold": 10.0}, "Fc"),
    "diffusers TaylorSeerCache": ("flux", {}, "Fc"),
    "diffusers PyramidAttentionBroadcast": ("latte", {}, "Fc"),
    "diffusers FasterCache": ("latte", {"unconditional_batch_skip_range": 2}, "Fh"),
}


@pytest.fixture(scope="module")
def peers():
    return script("peers")


def rows_for(peers, case):
    pipe = CASES[case].pipe()
    rows, missing = peers.rows_for(pipe)
    return pipe, rows, missing


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_watched_and_leaves_nothing(peers, name):
    case, changes, letters = PEERS[name]
    pipe, rows, missing = rows_for(peers, case)
    if name in missing:
        pytest.skip(missing[name])
    plain = CASES[case].sample(pipe)
    for row in [row for row in rows if getattr(row, "name", None) == name]:
        with replace(row, settings={**row.settings, **changes}).attach() as seen:
            reached = CASES[case].sample(pipe)
        assert seen.total_steps == len(seen.strip)
        assert set(seen.strip) == set(letters)
        assert seen.full_steps == sum({"F": 1, "r": 1, "h": 0.5}.get(letter, 0) for letter in seen.strip)
        assert (seen.cache_bytes > 0) == (letters != "r")
        assert not torch.equal(reached, plain)
        assert torch.equal(CASES[case].sample(pipe), plain)


@pytest.mark.parametrize("case", ["sd", "flux", "latte"])
def test_each_peer_stands_behind_ours(peers, case):
    pipe, rows, missing = rows_for(peers, case)
    ours = [row for row in rows if isinstance(row, str)]
    assert len(rows) == 2 * len(ours) > 0 or missing
    assert all(isinstance(row, str) != isinstance(other, str) for row, other in zip(rows[::2], rows[1::2], strict=True))
    for variant in variants_of(pipe, ours):
        with variant.attach() as seen:
            CASES[case].sample(pipe, num_inference_steps=20)
        assert seen.total_steps == 20


def test_ours_and_the_package_compute_the_same_steps(peers):
    pytest.importorskip("DeepCache")
    pipe, rows, _ = rows_for(peers, "sd")
    for ours, theirs in zip(rows[:6:2], rows[1:6:2], strict=True):
        with theirs.attach() as seen:
            expected = CASES["sd"].sample(pipe)
        with variants_of(pipe, [ours])[0].attach() as mine:
            found = CASES["sd"].sample(pipe)
            assert mine.strip == seen.strip
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pipelines_that_no_peer_serves_are_refused(peers):
    with pytest.raises(SystemExit, match="No peer serves PixArtTransformer2DModel"):
        peers.rows_for(CASES["pixart"].pipe())


def test_a_peer_is_a_row_of_the_bench(peers, tmp_path):
    pipe, rows, _ = rows_for(peers, "flux")
    bench = c4d.compare(
        pipe, ["a", "b"], rows[-2:], steps=5, batch=2, call=CASES["flux"].call(), results=tmp_path / "x.json",
        progress=False, fewer_steps=False,
    )  # fmt: skip
    ours, theirs = bench.results.methods
    assert (ours.fidelity, theirs.fidelity) == ("code", "peer")
    assert 0 < theirs.full_steps < 5
    assert theirs.flops_speedup > 1
    assert "diffusers TaylorSeerCache" in peers.page(bench.results, ["diffusers"])
