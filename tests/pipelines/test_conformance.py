"""Stock pipelines with tiny random components: every case of the table, on every kind of site.

Quick checks try one kind of site per pipeline, the slow ones all others.
"""

import pytest

from pipelines.cases import CASES
from pipelines.conformance import check, check_refused


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is distilled to few steps"),  # tests/test_few_steps.py looks
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # at building some autoencoders
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
def test_what_cannot_be_had_is_refused_with_the_reason(name, site, words):
    check_refused(CASES[name], site, words)
