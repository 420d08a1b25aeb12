"""benchmarks/resume.py: which rows of an earlier run are gone on with."""

import json

import pytest

from scripts import script

resume = script("resume")
CONDITIONS, ROWS = {"device": "cpu", "steps": 8}, [{"method": "fora", "found": "pp"}]


@pytest.fixture
def stem(tmp_path):
    (tmp_path / "known.json").write_text(json.dumps({"schema": 1, "conditions": CONDITIONS, "rows": ROWS}))
    return str(tmp_path / "known")


def test_rows_of_the_same_conditions_are_kept(stem):
    assert resume.kept(stem, 1, dict(CONDITIONS)) == ROWS


def test_without_a_file_there_are_none(tmp_path):
    assert resume.kept(str(tmp_path / "absent"), 1, CONDITIONS) == []


@pytest.mark.parametrize(("schema", "conditions"), [(2, CONDITIONS), (1, {**CONDITIONS, "device": "cuda"})])
def test_rows_of_other_conditions_are_refused(stem, schema, conditions):
    with pytest.raises(SystemExit, match=r"known\.json was measured under other conditions: leave out --resume"):
        resume.kept(stem, schema, conditions)
