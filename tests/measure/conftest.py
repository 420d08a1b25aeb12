import pytest
import torch
from measure_fixtures import synthetic


@pytest.fixture(scope="session")
def made_up():
    """(results, images, captions) of a benchmark that never happened."""
    return synthetic(size=64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
