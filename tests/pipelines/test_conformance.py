"""Stock pipelines with tiny random components: every case of the table, on every kind of site.

Quick checks try one kind of site per pipeline, the slow ones all others.
"""

import json

import pytest
from diffusers.utils import is_torchvision_available

from pipelines import table
from pipelines.absent import absent
from pipelines.cases import CASES
from pipelines.conformance import check, check_refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is distilled to few steps"),  # tests/test_few_steps.py looks
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # at building some autoencoders
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # KDPM2's schedule
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's own
]
ROWS = [
    pytest.param(name, site, id=f"{name}-{site}", marks=() if site == case.core else pytest.mark.slow)
    for name, case in CASES.items()
    for site in case.sites
    if site not in case.without
]
REFUSED = [(name, site, words) for name, case in CASES.items() for site, words in case.without.items()]


@pytest.mark.parametrize(("name", "site"), ROWS)
def test_a_pipeline_conforms(name, site):
    check(CASES[name], site)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site", "words"), REFUSED)
def test_a_site_that_is_not_there_is_refused_with_the_reason(name, site, words):
    check_refused(CASES[name], site, words)


@pytest.mark.slow  # imports every pipeline
def test_what_cannot_be_had_here_is_told_with_the_reason():
    found = {name: reason for reason, names in absent().items() for name in names}
    assert "ConsisIDPipeline" not in found or "opencv" in found["ConsisIDPipeline"]
    if not is_torchvision_available():
        assert "torchvision" in found["OmniGenPipeline"]
        assert "torchvision" in found["Cosmos2_5_PredictBasePipeline"]
    assert not {type_of(case) for case in CASES.values() if case.core} & set(found)


def type_of(case):
    return type(case.pipe()).__name__


def test_the_table_tells_what_was_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "absent", lambda: {"only beside opencv": ["ConsisIDPipeline"]})
    words = ["--cases", "dit,lcm", "--write", str(tmp_path / "pipelines")]
    assert table.main(words) == 0
    result, text = json.loads((tmp_path / "pipelines.json").read_text()), (tmp_path / "pipelines.md").read_text()
    assert [row["case"] for row in result["rows"]] == ["dit", "lcm"]
    assert result["rows"][0]["sites"]["whole"] == {
        "outcome": "passed", "calls": 6, "full": 2, "strips": {"branch-0": "FccFcc"},
    }  # fmt: skip
    assert "2 cases of 2 pipeline classes under 2 schedulers" in text
    assert "| lcm | `LatentConsistencyModelPipeline` | LCM | text-to-image | distilled |  | 2 of 6 |" in text
    assert "| `LatentConsistencyModelPipeline` | 1 | 3 | 18 | 6 |" in text and "| `DDIM` | 1 | 3 | 18 |" in text
    assert "## What failed\n\nNothing." in text and "`ConsisIDPipeline`" in text

    def wrong(case, site):
        raise AssertionError("off is not off")

    monkeypatch.setattr(table, "check", wrong)
    assert table.main([*words, "--resume"]) == 0, "known cases are kept"
    assert table.main(["--cases", "dit", "--write", str(tmp_path / "other")]) == 1
    assert "- dit, span: AssertionError: off is not off" in (tmp_path / "other.md").read_text()
    with pytest.raises(SystemExit):
        table.main(["--cases", "sdxxl"])
    assert "use some of flux" in capsys.readouterr().err
