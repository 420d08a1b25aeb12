import pytest
from measure_fixtures import synthetic


@pytest.fixture(scope="session")
def made_up():
    """(results, images, captions) of a benchmark that never happened."""
    return synthetic(size=64)
