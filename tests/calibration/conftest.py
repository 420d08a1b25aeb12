"""What all tests of calibrations share."""

import pytest

from small_denoisers import remember_anatomy


@pytest.fixture(autouse=True)
def remembered_anatomy(monkeypatch):
    """The same small denoiser is accelerated dozens of times; it is looked at once."""
    remember_anatomy(monkeypatch)
