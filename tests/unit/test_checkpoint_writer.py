"""Writing checkpoints in one process: complete or absent, told, and what was there at the moment of the save."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest, writer
from sft_dist.checkpoints.keeper import Keeper
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.checkpoints.states import PlainStates
from sft_dist.config import CheckpointSection
from sft_dist.errors import UserError

PATIENCE = 30.0


class Training:
    """A tiny model with AdamW, and the keeper of its checkpoints."""

    def __init__(self, folder: Path, seed: int = 0, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(5, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.said: list[str] = []
        self.keeper = Keeper(folder, CheckpointSection.model_validate(settings), 0, self.said.append)
        self.folder = folder
        self.step = 0

    @property
    def states(self) -> PlainStates:
        return PlainStates(self.model, self.optimizer, 0, 1)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            self.model(torch.ones(2, 5)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def begin_save(self, wait: bool = False) -> None:
        about = Manifest(self.step, 10 * self.step, self.step, 1, "single", 2, "hash", "data", metrics={"eval_loss": 1})
        self.keeper.save(about, self.states, {"own": self.step}, {"common": "ж"}, {"doc.json": "{}"}, wait=wait)

    def save(self, wait: bool = False) -> None:
        """Save, and look at what became of it."""
        self.begin_save(wait)
        assert self.keeper.wait(PATIENCE)
        self.keeper.look()

    def bits(self) -> dict[str, bytes]:
        return {piece.key: piece.tensor.detach().numpy().tobytes() for piece in self.states.pieces()}

    def bits_of(self, step: int) -> dict[str, bytes]:
        """What the checkpoint of a step holds, as a new training would load it."""
        held = Keeper(self.folder, self.keeper.settings, 0, print).choose()
        assert held is not None and held.manifest.step == step
        fresh = Training(self.folder, seed=1)
        fresh.states.load(held.reader(), held.steps)
        return fresh.bits()

    def names(self) -> set[str]:
        return set(os.listdir(self.folder))


@pytest.fixture(params=[True, False], ids=["beside", "waiting"])
def training(tmp_path: Path, request: pytest.FixtureRequest) -> Training:
    return Training(tmp_path / "checkpoints", keep=1, asynchronous=request.param)


class Slow:
    """Holds the writing of files until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        real = writer.write_tensors

        def held(*args: Any) -> manifest.File:
            self.begun.set()
            assert self.go_on.wait(PATIENCE)
            return real(*args)

        monkeypatch.setattr(writer, "write_tensors", held)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(monkeypatch)
    yield found
    found.go_on.set()


def full_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A disk that takes so many bytes more."""
    real, left = os.write, [count]

    def write(descriptor: int, content: Any) -> int:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return real(descriptor, content)
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(descriptor, content[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)


def no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(old: Any, new: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(old), None, str(new))

    monkeypatch.setattr(os, "rename", rename)


def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)


Fault = Callable[[pytest.MonkeyPatch], None]
FAULTS: list[tuple[Fault, str]] = [
    (lambda patch: full_after(patch, 0), "No space left on device"),
    (lambda patch: full_after(patch, 100), "No space left on device"),
    # Enough for the tensors, not for the documents.
    (lambda patch: full_after(patch, 900), "No space left on device"),
    (no_rename, "Input/output error"),
    (no_flush, "Input/output error"),
]


def test_a_save_is_complete(training: Training) -> None:
    training.steps(2)
    training.save()
    assert training.names() == {"checkpoint-2"}
    (found,) = folders.examine(training.folder)
    assert found.state == "complete" and found.manifest is not None
    assert set(found.manifest.files) == {"rank-00000.safetensors", "rank-00000.json", "common.json", "doc.json"}
    assert set(os.listdir(found.path)) == {*found.manifest.files, manifest.NAME}
    assert found.manifest.tokens == 20 and found.manifest.metrics == {"eval_loss": 1} and found.manifest.nodes == 1
    assert training.bits_of(2) == training.bits()
    held = training.keeper.choose()
    assert held is not None
    assert held.common == {"common": "ж", "shapes": {"weight": [3, 5], "bias": [3]}}
    assert held.ranks == {0: {"own": 2, "steps": {"weight": 2.0, "bias": 2.0}}}
    (line,) = training.said
    assert line.startswith("checkpoint-2: 0.000 GB in ") and "the training waited" in line
    assert training.keeper.newest == 2 and training.keeper.in_flight is None
    # What a run trains on is nobody else's.
    for path in (found.path, *found.path.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_older_ones_go_when_a_newer_one_is_complete(tmp_path: Path) -> None:
    training = Training(tmp_path / "checkpoints", keep=2, keep_every=3)
    for _ in range(6):
        training.steps(1)
        training.save()
    assert training.names() == {"checkpoint-3", "checkpoint-5", "checkpoint-6"}


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=["full", "full soon", "full late", "rename", "flush"])
def test_a_failing_write_leaves_nothing_and_removes_nothing(
    training: Training, monkeypatch: pytest.MonkeyPatch, fault: Fault, said: str
) -> None:
    training.steps(1)
    training.save()
    kept = training.bits()
    training.said.clear()
    for failure in (1, 2, 3):
        training.steps(1)
        with monkeypatch.context() as patch:
            fault(patch)
            training.save()
        assert training.names() == {"checkpoint-1"}
        line = training.said.pop()
        assert line.startswith(f"checkpoint-{training.step}: not written (rank 0: {training.folder}/checkpoint-")
        assert f": {said}); " in line
        then = "the training goes on and tries again" if failure < 3 else "the run stops"
        assert line.endswith(f"; {then} (failure {failure} of 3)")
        assert training.keeper.failures == failure and training.keeper.newest == 1
    assert training.bits_of(1) == kept
    # When there is space again.
    training.steps(1)
    training.save()
    assert training.keeper.failures == 0 and training.keeper.newest == 5
    assert training.names() == {"checkpoint-5"}
    assert training.bits_of(5) == training.bits()


def test_a_folder_that_is_away_is_a_failure(training: Training) -> None:
    training.steps(1)
    training.folder.rmdir()
    training.folder.write_text("not a folder")
    training.save()
    assert training.keeper.failures == 1 and "Not a directory" in training.said[0]
    training.folder.unlink()
    training.save()
    assert training.keeper.failures == 0 and training.names() == {"checkpoint-1"}


def test_a_name_that_is_not_on_the_disk_is_no_checkpoint(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last thing that can fail: the flush of the folder that holds the new name."""
    training.steps(1)
    real = manifest.flush_folder

    def flush(folder: Path) -> None:
        if folder == training.folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "flush_folder", flush)
        training.save()
    assert training.keeper.failures == 1
    assert training.names() == set()
    training.save()
    assert training.keeper.failures == 0 and training.names() == {"checkpoint-1"}


def test_what_is_no_fault_of_the_disk_is_raised(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.steps(1)

    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(writer, "write_tensors", broken)
    training.begin_save()
    assert training.keeper.wait(PATIENCE)
    with pytest.raises(RuntimeError, match="checkpoint-1 could not be written") as caught:
        training.keeper.look()
    assert isinstance(caught.value.__cause__, KeyError)
    assert training.names() == set()
    # It is told once.
    training.keeper.look()


def test_what_was_there_at_the_save_is_written(tmp_path: Path, slow: Slow) -> None:
    training = Training(tmp_path / "checkpoints")
    training.steps(2)
    then = training.bits()
    training.begin_save()
    assert slow.begun.wait(PATIENCE)
    training.steps(3)
    assert training.bits() != then
    # Nothing of it is a checkpoint yet.
    assert training.keeper.in_flight == 2 and not training.keeper.wait(0)
    training.keeper.look()
    assert training.said == [] and training.keeper.newest is None
    assert training.names() == {"checkpoint-2.unfinished"}
    assert folders.complete(training.folder) == {} == folders.damaged_steps(training.folder)
    slow.go_on.set()
    assert training.keeper.wait(PATIENCE)
    assert training.keeper.in_flight is None
    training.keeper.look()
    assert training.bits_of(2) == then
    # The memory is used again, for what is there now.
    now = training.bits()
    training.save()
    assert training.bits_of(5) == now


def test_without_a_copy_the_training_waits(tmp_path: Path, slow: Slow) -> None:
    training = Training(tmp_path / "checkpoints", asynchronous=False)
    training.steps(1)
    saving = threading.Thread(target=training.begin_save, daemon=True)
    saving.start()
    assert slow.begun.wait(PATIENCE)
    assert saving.is_alive() and training.names() == {"checkpoint-1.unfinished"}
    slow.go_on.set()
    saving.join(PATIENCE)
    assert training.names() == {"checkpoint-1"}
    assert not training.keeper._writer._copy._held


def test_one_of_the_same_step_is_left_as_it_is(training: Training) -> None:
    training.steps(1)
    training.save()
    (held,) = training.folder.iterdir()
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in held.iterdir()}
    training.steps(1)
    training.step = 1
    training.said.clear()
    training.save(wait=True)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in held.iterdir()} == before
    assert training.names() == {"checkpoint-1"} and training.said == []


def test_a_damaged_one_of_the_same_step_is_set_aside(training: Training) -> None:
    training.steps(1)
    training.save()
    (training.folder / "checkpoint-1" / "common.json").unlink()
    training.save()
    assert training.names() == {"checkpoint-1", "checkpoint-1.damaged"}
    assert training.bits_of(1) == training.bits()


@pytest.fixture
def three(tmp_path: Path) -> tuple[Training, dict[int, dict[str, bytes]]]:
    """Checkpoints of three steps, and what they hold."""
    training, held = Training(tmp_path / "checkpoints"), {}
    for _ in range(3):
        training.steps(1)
        training.save()
        held[training.step] = training.bits()
    return training, held


def damage(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def choice(training: Training) -> tuple[int | None, list[str]]:
    said: list[str] = []
    keeper = Keeper(training.folder, training.keeper.settings, 0, said.append)
    held = keeper.choose()
    assert keeper.newest == (held.manifest.step if held else None)
    return keeper.newest, said


def test_the_newest_is_chosen(three: tuple[Training, dict[int, dict[str, bytes]]]) -> None:
    training, held = three
    (training.folder / "checkpoint-4.unfinished").mkdir()
    assert choice(training) == (3, [f"{training.folder}/checkpoint-4.unfinished: not written to its end, removed"])
    assert choice(training) == (3, [])
    assert training.names() == {f"checkpoint-{step}" for step in held}
    assert training.bits_of(3) == held[3]


def test_a_damaged_one_is_named_and_set_aside(three: tuple[Training, dict[int, dict[str, bytes]]]) -> None:
    training, held = three
    damage(training.folder / "checkpoint-3" / "rank-00000.safetensors", -1)
    damage(training.folder / "checkpoint-2" / manifest.NAME, 20)
    faults = {2: manifest.NAME, 3: "rank-00000.safetensors"}
    said = [
        f"{training.folder}/checkpoint-{step}: damaged ({name} is damaged: its checksum is another); kept aside as "
        f"checkpoint-{step}.damaged"
        for step, name in faults.items()
    ]
    assert choice(training) == (1, said)
    assert training.names() == {"checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged"}
    assert training.bits_of(1) == held[1]


def test_with_none_that_is_sound_there_is_none(three: tuple[Training, dict[int, dict[str, bytes]]]) -> None:
    training, held = three
    for step in held:
        (training.folder / f"checkpoint-{step}" / "common.json").write_bytes(b"")
    step, said = choice(training)
    assert step is None and len(said) == 3
    assert training.names() == {f"checkpoint-{step}.damaged" for step in held}
    assert json.loads((training.folder / "checkpoint-3.damaged" / "rank-00000.json").read_text())["own"] == 3


def test_a_folder_that_cannot_be_written_is_one_line_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError) as caught:
        Keeper(tmp_path, CheckpointSection(), 0, print)
    assert str(caught.value) == f"output.output_dir: {tmp_path} cannot be written: Read-only file system; mend that"
