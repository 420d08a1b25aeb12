"""What all tests of methods share."""

import pytest

from small_denoisers import dit, flux, remember_anatomy


@pytest.fixture(autouse=True)
def remembered_anatomy(monkeypatch):
    """The same small denoiser is accelerated dozens of times; it is looked at once."""
    remember_anatomy(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return flux()


@pytest.fixture(scope="module")
def class_model():
    return dit()
