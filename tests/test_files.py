"""Files are written whole or not at all."""

import pytest

from cache4diffusion.errors import FileFormatError
from cache4diffusion.files import check_writable, write_whole
from cache4diffusion.profile import Profile, load_profile, save_profile


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "new" / "file.txt"
    assert write_whole(path, "first") == path

    def half(draft):
        draft.write_text("sec")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileFormatError, match=r"file\.txt cannot be written: No space left on device\."):
        write_whole(path, half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, lambda draft: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    write_whole(path, lambda draft: draft.write_text("second"))
    assert path.read_text() == "second"


def test_what_cannot_be_written_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder" / "file")
    assert not (tmp_path / "new").exists()
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x" / "y", "file is no folder")):
        with pytest.raises(FileFormatError, match=words):
            check_writable(path)
        with pytest.raises(FileFormatError, match="cannot be written"):
            write_whole(path, "text")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(FileFormatError, match="may not be written to"):
        check_writable(tmp_path / "new" / "file")


@pytest.mark.parametrize("name", ["mine.yaml", "mine.json"])
def test_a_profile_survives_saving(name, tmp_path):
    profile = Profile(method="dbcache", settings={"threshold": 0.1, "mask": (True, False)}, axes={"cfg": "fastercache"})
    save_profile(tmp_path / name, profile)
    assert load_profile(tmp_path / name) == profile
