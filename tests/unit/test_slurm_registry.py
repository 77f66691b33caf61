"""What is remembered of the runs that were submitted from this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import registry


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_run_is_remembered_once_and_as_the_newest(tmp_path: Path, state: Path) -> None:
    assert registry.read() == []
    for name in ("a", "b", "a"):
        registry.add(tmp_path / name)
    assert registry.read() == [tmp_path / "b", tmp_path / "a"]
    assert registry.path() == state / "sft-dist" / "runs.jsonl"
    assert registry.path().stat().st_mode & 0o777 == 0o600
    assert registry.path().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("torn", ['{"run": "/x', "null", '{"run": 3}', '{"run": "relative"}', "\x00"])
def test_lines_that_make_no_sense_are_passed_over(tmp_path: Path, torn: str) -> None:
    registry.add(tmp_path / "a")
    with open(registry.path(), "a") as file:
        file.write(torn)
    registry.add(tmp_path / "b")
    assert registry.read() == [tmp_path / "a", tmp_path / "b"]


def test_a_folder_that_is_gone_is_kept_until_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("here", "gone"):
        registry.add(tmp_path / name)
    (tmp_path / "here").mkdir()
    assert len(registry.read()) == 2
    assert registry.forget_gone() == [tmp_path / "gone"]
    assert registry.read() == [tmp_path / "here"]
    assert registry.forget_gone() == []
