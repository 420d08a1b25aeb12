"""docs/oracles.md: every oracle of a published method names tests, and they exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

import cache4diffusion as c4d

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "oracles.md").read_text(encoding="utf-8")
METHODS = (
    "taylorseer", "taylorseer-lite", "speca", "fora", "deepcache", "teacache", "fbcache", "dbcache", "toca",
    "fastercache", "frdiff", "delta-dit", "skip-dit", "dbprune", "adacache", "dicache", "magcache", "easycache", "scm",
    "bwcache", "seacache", "smoothcache", "dpcache", "bacache", "feb-cache", "icc", "fastcache",
    "l2p", "lemica", "l2c", "harmonica", "lazydit", "block-caching", "md-dit", "tokencache", "pab",
    "t-gate-v1", "t-gate-v2", "vcut", "text-kv-cache", "faster-diffusion",
    "duca", "clusca", "tome", "ca-tome", "todo", "tofu", "importance-merging",
    "toma", "at-edm", "asymrnr", "ca2-vdm", "cachequant", "quantcache", "dato",
)  # fmt: skip
BESIDE = {"fisedit": c4d.edit.record}  # published methods that are no composition
ROWS = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (`tests/.+`) \|$", TEXT, flags=re.MULTILINE)

CONTRACT = re.findall(r"^\| \((\w+)\) .+? \| (`tests/.+`) \|$", TEXT, flags=re.MULTILINE)


@functools.cache
def functions_of(path):
    """Names of the test functions at the top of a file, without importing it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def ids_of(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_every_line_of_the_table_is_read():
    lines = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(lines) == len(ROWS), "a row is '| `method` | what must hold | `tests/file.py::test`, ... |'"
    assert len({(method, oracle) for method, oracle, _ in ROWS}) == len(ROWS), "one row per oracle"


@pytest.mark.parametrize("method", [*METHODS, *BESIDE])
def test_every_method_has_its_oracles(method):
    assert (method in c4d.METHODS) != (method in BESIDE)
    assert sum(name == method for name, _, _ in ROWS) >= 5


def test_every_point_of_the_token_contract_is_there():
    assert [number for number, _ in CONTRACT] == ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix"]


CELLS = [*(cell for _, _, cell in ROWS), *(cell for _, cell in CONTRACT)]


@pytest.mark.parametrize("cell", sorted({test for cell in CELLS for test in ids_of(cell)}))
def test_the_test_exists(cell):
    path, separator, name = cell.partition("::")
    assert separator, f"{cell!r} is no test: write tests/file.py::test_name"
    assert (ROOT / path).is_file(), f"{path} does not exist: correct docs/oracles.md"
    assert Path(path).name.startswith("test_")
    assert name in functions_of(path), f"{path} has no {name}: correct docs/oracles.md, or give the oracle a test again"


def test_the_table_names_methods_only():
    assert {method for method, _, _ in ROWS} <= {*c4d.METHODS, *BESIDE}
