"""Records: what a second call leaves of the first, also when it is killed in between."""

import json
from pathlib import Path

import pytest

from flowkit.runs.records import recording, set_aside

NAMES = ("a.json", "a.png", "tables")


def _write(folder, text):
    files = [folder / name for name in NAMES]
    with recording({"text": text}, files):
        files[1].write_text(text)
        files[2].mkdir(exist_ok=True)
        (files[2] / "1").write_text(text)


def _texts(folder, number=""):
    """Return the three contents of a call; a number is that of an earlier one."""
    names = (f"a{number}.json", f"a{number}.png", f"tables{number}/1")
    record, *others = ((folder / name).read_text() for name in names)
    return [json.loads(record)["text"], *others]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_two_renames_separates_no_record_from_its_files(
    renames, tmp_path, monkeypatch
):
    _write(tmp_path, "one")
    _write(tmp_path, "two")
    rename, left = Path.rename, iter(range(renames))

    def killed(self, target):
        if next(left, None) is None:
            raise _Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        if renames < 3:
            with pytest.raises(_Killed):
                _write(tmp_path, "three")
    _write(tmp_path, "three")
    assert _texts(tmp_path) == ["three"] * 3
    assert _texts(tmp_path, "-2") == ["two"] * 3
    assert _texts(tmp_path, "-1") == ["one"] * 3


def test_files_of_a_deleted_record_are_not_overwritten(tmp_path):
    _write(tmp_path, "one")
    _write(tmp_path, "two")
    (tmp_path / "a-1.json").unlink()
    _write(tmp_path, "three")
    assert (tmp_path / "a-1.png").read_text() == "one"
    assert _texts(tmp_path, "-2") == ["two"] * 3


def test_files_with_numbers_of_their_own_go_to_a_folder(tmp_path):
    names = ("grid.json", "grid-1.json")
    for number in "12":
        for name in names:
            (tmp_path / name).write_text(name + number)
        set_aside([tmp_path / name for name in (*names, "none")], "earlier")
    found = {f.relative_to(tmp_path).as_posix(): f.read_text() for f in tmp_path.rglob("*.json")}
    assert found == {f"earlier-{n}/{name}": name + n for n in "12" for name in names}
