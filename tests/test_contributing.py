"""CONTRIBUTING.md's worked examples, applied to a copy of the package and run: one file, one export, one row each."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|diff) file=(\S+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


EXAMPLES = next(body for _, name, body in BLOCKS if name == "tests/test_late_stripes.py")


def insert(text: str, diff: str) -> str:
    """Insert the ``+`` lines of a diff behind the line before them."""
    lines, at = text.splitlines(), -1
    for line in diff.splitlines():
        if line.startswith("+"):
            at += 1
            lines.insert(at, line[1:])
        else:
            at = next(i for i, known in enumerate(lines) if known.startswith(line[1:].rstrip()))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its test helpers with all examples applied."""
    root = tmp_path_factory.mktemp("contributed")
    shutil.copytree(
        ROOT / "src", root / "src", ignore=lambda _, names: [n for n in names if n.endswith((".safetensors", ".pyc"))]
    )
    shutil.copytree(ROOT / "tests", root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for kind, name, body in BLOCKS:
        path = root / name
        if kind == "diff":
            path.write_text(insert(path.read_text(encoding="utf-8"), body), encoding="utf-8")
        else:
            assert not path.exists(), f"{name} is a new file"
            path.write_text(body, encoding="utf-8")
    return root


def run(root, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_there_is_an_example_for_every_axis():
    new = [name for kind, name, _ in BLOCKS if kind == "python" and name.startswith("src/")]
    folders = {Path(name).parent.name for name in new}
    assert folders == {"predictors", "gates", "tokens", "engine", "methods"}
    assert len(new) == 5, "one file each"
    changed = [name for kind, name, _ in BLOCKS if kind == "diff"]
    assert len(changed) == 5, "one place each for the export and the row"


def test_the_examples_work_and_the_general_tests_find_them(copy):
    """The new predictor, gate and rule take part in the tables of the other tests without a word there."""
    found = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rA",
        "-k", "late or stripes or damped or one_module",  # what is not new was run where it lies
        "tests/test_late_stripes.py",
        "tests/test_gates.py::test_propose_is_pure_and_the_first_step_is_full",
        "tests/test_predictors.py::test_every_predictor_of_the_table_keeps_the_contract",
        "tests/methods/test_toca.py::test_every_token_rule_of_the_table_keeps_the_contract",
        "tests/test_composition.py::test_a_pair_is_made_or_refused_as_the_table_says",
        "tests/test_composition.py::test_every_method_is_one_of_these_combinations",
    )  # fmt: skip
    assert found.count("PASSED tests/test_late_stripes.py") == len(re.findall(r"^def test_", EXAMPLES, re.MULTILINE))
    for name in ("late", "damped", "stripes", "late-stripes"):
        assert re.search(rf"^PASSED .*\[(.*-)?{name}(-.*)?\]$", found, flags=re.MULTILINE), name


def test_the_commands_it_names_exist():
    targets = set(re.findall(r"\bmake (\w+)", TEXT))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"install", "test", "lint", "format"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_examples_are_in_style(copy):
    pytest.importorskip("ruff")
    names = [name for kind, name, _ in BLOCKS if kind == "python"]
    run(copy, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *names)
    run(copy, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), *names)
