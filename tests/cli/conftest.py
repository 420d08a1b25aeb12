import pytest

import tiny_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder like that of scenes-flux, tiny and untrained."""
    return tiny_scenes.save(tmp_path_factory.mktemp("weights") / "tiny-scenes")
