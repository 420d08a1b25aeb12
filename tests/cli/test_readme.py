"""What the README says can be typed and run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, WanTransformer3DModel
from typer.main import get_command
from typer.testing import CliRunner

import cache4diffusion as c4d
from cache4diffusion.beside import BESIDE
from cache4diffusion.cli.app import app
from cache4diffusion.reference import load

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^c4d .*$", TEXT, re.MULTILINE)


def block(word):
    (found,) = [text for text in PYTHON if word in text]
    return found


@pytest.fixture
def pipe(scenes, monkeypatch):
    """A tiny FLUX that answers to the large one's name, and lies on every device."""
    pipe = load(scenes)
    pipe.default_sample_size = 2  # 16 x 16 pixels
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda name, torch_dtype: pipe)
    monkeypatch.setattr(pipe, "to", lambda device: pipe, raising=False)
    return pipe


def test_the_first_example_runs(pipe, capsys):
    exec(block("FLUX.1-dev"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^strip +FFFc{4}F", printed, re.MULTILINE)
    assert re.search(r"^speed-up +[\d.]+x expected from FLOPs, [\d.]+x achieved", printed, re.MULTILINE)
    c4d.accelerate(pipe, "fora").remove()  # nothing was left attached


def test_the_example_of_comparing_runs(pipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block("c4d.compare"), {"c4d": c4d, "pipe": pipe})
    assert float(capsys.readouterr().out) > 0
    assert (tmp_path / "report.html").exists()


def test_the_loop_runs():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=3, rope_max_seq_len=8,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(12)
    given = {"c4d": c4d, "torch": torch, "transformer": transformer, "scheduler": scheduler}
    exec(block("handle.run"), {**given, "latents": torch.randn(2, 4, 1, 4, 4), "prompt": torch.randn(2, 3, 8)})


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    words = shlex.split(line, comments=True)[1:]
    command = get_command(app).commands[words[0]]
    command.make_context(words[0], words[1:])


def test_every_command_is_shown():
    shown = {line.split()[1] for line in COMMANDS} | set(re.findall(r"`?c4d (\w+)", TEXT))
    assert shown >= set(get_command(app).commands)


def test_the_table_of_methods_is_the_registrys():
    table = CliRunner().invoke(app, ["methods", "--markdown"]).stdout
    assert table in TEXT, "put what `c4d methods --markdown` prints into README.md, under Methods"
    assert all(f"| `{name}` |" in table for name in (*c4d.METHODS, *BESIDE))
    assert table.count("\n") == 2 + len(c4d.METHODS) + len(BESIDE)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
