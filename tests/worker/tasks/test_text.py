"""Which bytes are read and how they are split."""

from pathlib import Path

import pytest
import torch

from torch_ps.common.errors import ConfigError
from torch_ps.worker.tasks import text


def content(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


def folder(tmp_path: Path, files: int) -> Path:
    for number in range(files):
        place = tmp_path / f"{number % 3}" / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"<{number}>" * 50)
    return tmp_path


def test_without_a_path_it_is_the_standard_library() -> None:
    found = text.read()
    total = len(found.training) + len(found.validation)
    assert 2_000_000 < total < text.MOST_BYTES + 1000
    assert 0.04 < len(found.validation) / total < 0.1
    assert b"import " in content(found.validation)


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    found = text.read(str(folder(tmp_path, 60)))
    training, validation = (set(content(part).split(b"\n")) for part in found)
    assert len(training) + len(validation) == 60
    assert not training & validation
    assert 3 <= len(validation) <= 4


def test_the_split_depends_on_relative_paths_alone(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", 30), folder(tmp_path / "other" / "place", 30)
    assert all(torch.equal(a, b) for a, b in zip(text.read(str(one)), text.read(str(other)), strict=True))


def test_one_file_is_split_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(200)))
    assert [content(part) for part in text.read(str(file))] == [bytes(range(190)), bytes(range(190, 200))]


def test_few_files_are_split_as_one(tmp_path: Path) -> None:
    found = text.read(str(folder(tmp_path, 2)))
    assert (len(found.training), len(found.validation)) == (286, 15)


def test_binary_and_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0" * 100)
    (tmp_path / ".secret").write_text("secret" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "log").write_text("log" * 100)
    (tmp_path / "a.txt").write_text("a" * 100)
    assert set(b"".join(content(part) for part in text.read(str(tmp_path)))) == {ord("a")}


def test_no_more_than_the_cap_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_BYTES", 1000)
    found = text.read(str(folder(tmp_path, 60)))
    assert len(b"".join(content(part).replace(b"\n", b"") for part in found)) == 1000
    (tmp_path / "long.txt").write_bytes(b"x" * 5000)
    assert sum(map(len, text.read(str(tmp_path / "long.txt")))) == 1000


@pytest.mark.parametrize("kind", ["file", "folder", "folder of empty files"])
def test_an_empty_path_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "nothing"
    if kind == "file":
        place.touch()
    else:
        place.mkdir()
        if kind != "folder":
            (place / "a.txt").touch()
    with pytest.raises(ConfigError, match=rf"'{place}' is empty"):
        text.read(str(place))


def test_a_missing_path_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"'{tmp_path}/gone' does not exist"):
        text.read(str(tmp_path / "gone"))


def test_too_short_a_text_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    with pytest.raises(ConfigError, match=r"too short: 100 bytes .* at least 129"):
        text.read(str(tmp_path), least=129)
