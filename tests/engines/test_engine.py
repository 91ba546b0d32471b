"""What `make engines` installed, and how tests/engines gets at it."""

import base64
import csv
import hashlib
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

import engine

PINS = sorted(Path(__file__).parent.glob("*.txt"))


def distribution(pins: Path) -> Distribution:
    """The engine itself: the first package that the file names."""
    (info,) = engine.folder(pins.stem).glob(f"{pins.stem.split('-')[0]}*.dist-info")
    return PathDistribution(info)


@pytest.mark.parametrize("pins", PINS, ids=lambda pins: pins.stem)
def test_the_engine_is_what_was_published(pins: Path) -> None:
    """A pinned version, and every file as its wheel lists it."""
    dist = distribution(pins)
    assert f"{dist.metadata['Name']}=={dist.version}" in pins.read_text()
    parent, checked = engine.folder(pins.stem), 0
    for path, digest, _ in csv.reader((dist.read_text("RECORD") or "").splitlines()):
        if digest and not path.startswith(".."):  # the commands, which pip moves
            name, _, expected = digest.partition("=")
            actual = hashlib.new(name, (parent / path).read_bytes()).digest()
            assert base64.urlsafe_b64encode(actual).decode().rstrip("=") == expected, path
            checked += 1
    assert checked > 100


def test_a_missing_engine_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_TEST_ENGINES", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"sglang is missing.*`make engines` installs it"):
        engine.folder("sglang")
