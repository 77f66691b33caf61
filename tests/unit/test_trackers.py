"""One run in its log and its trackers: what is dropped, kept and said when a run is killed or a disk is full."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft_dist import metrics_file
from sft_dist.config import Recipe
from sft_dist.metrics_file import LogFile, append, rewind_metrics
from sft_dist.rundir import RunDir
from sft_dist.trackers import OneTensorBoard, OneWandbRun, callbacks, prepare, wandb_run_id
from sft_dist.wandb_log import last_step


def at(step: int, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, is_world_process_zero=main)


def log(callback: Any, step: int, **logs: float) -> None:
    callback.on_log(TrainingArguments(report_to="none"), at(step), TrainerControl(), logs=logs)


def write_records(path: Path, *steps: int) -> Path:
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps))
    return path


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# metrics.jsonl


def test_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    path = write_records(tmp_path / "metrics.jsonl", 1, 2, 3, 3, 4, 5)
    assert rewind_metrics(path, 3) == 5
    assert steps_in(path) == [1, 2, 3, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\0\0\0", "7", '{"loss": 1}', '{"step": "3"}', "\ufffd"])
def test_a_line_that_was_never_finished_is_dropped(tmp_path: Path, torn: str) -> None:
    path = write_records(tmp_path / "metrics.jsonl", 1, 2)
    with open(path, "a", encoding="utf-8") as file:
        file.write(torn)
    assert rewind_metrics(path, 9) == 2
    assert steps_in(path) == [1, 2]


def test_a_last_record_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = write_records(tmp_path / "metrics.jsonl", 1, 2)
    path.write_text(path.read_text().rstrip("\n"))
    assert rewind_metrics(path, 2) == 2
    assert path.read_text().endswith("}\n")
    assert steps_in(path) == [1, 2]


def test_without_later_steps_the_log_is_left_as_it_is(tmp_path: Path) -> None:
    assert rewind_metrics(tmp_path / "absent", 4) == 0
    assert not (tmp_path / "absent").exists()
    path = write_records(tmp_path / "metrics.jsonl", 1, 2)
    before = path.stat().st_ino
    assert rewind_metrics(path, 2) == 2
    assert path.stat().st_ino == before


def test_what_cannot_be_written_whole_is_not_written_at_all(tmp_path: Path) -> None:
    path = write_records(tmp_path / "log", 1)
    before = path.read_bytes()
    with full_disk(len(before) + 10), pytest.raises(OSError, match=r"File too large|No space left"):
        append(path, b"x" * 40 + b"\n")
    assert path.read_bytes() == before


def test_a_part_of_a_line_that_could_not_be_taken_back_is_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    path.write_bytes(b"on")
    append(path, b"one\n")
    assert path.read_bytes() == b"one\n"


def test_a_full_disk_is_said_once_and_its_lines_come_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    callback = LogFile(path)
    log(callback, 1, loss=1.0)
    for outage in range(2):
        with full_disk(path.stat().st_size + 5):
            log(callback, 3 * outage + 2, loss=1.0)
            log(callback, 3 * outage + 3, loss=1.0)
        log(callback, 3 * outage + 4, loss=1.0)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2
        assert said[0].startswith(f"warning: {path} cannot be written: ")
        assert said[1] == f"warning: {path} is written again"
    assert steps_in(path) == list(range(1, 8))


def test_lines_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "_MOST_KEPT", 3)
    folder = tmp_path / "away"
    callback = LogFile(folder / "metrics.jsonl")
    for step in range(1, 6):
        log(callback, step, loss=1.0)
    folder.mkdir()
    log(callback, 6, loss=1.0)
    assert steps_in(folder / "metrics.jsonl") == [4, 5, 6]


def test_a_record_says_when_it_was_and_how_many_steps_there_will_be(tmp_path: Path) -> None:
    """`sft-dist status` reads both; a resumed tracker is given neither."""
    path = tmp_path / "metrics.jsonl"
    before = time.time()
    state = TrainerState(global_step=3, max_steps=40, is_world_process_zero=True)
    LogFile(path).on_log(None, state, TrainerControl(), {"loss": 1.0})
    record = json.loads(path.read_text())
    assert before - 0.01 <= record.pop("time") <= time.time() + 0.01
    assert record == {"step": 3, "loss": 1.0, "max_steps": 40}
    assert list(metrics_file.records(path)) == [(3, {"loss": 1.0})]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    LogFile(tmp_path / "log").on_log(None, at(1, main=False), TrainerControl(), {"loss": 1.0})
    assert not (tmp_path / "log").exists()


# The run's id and the environment


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_its_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first = wandb_run_id(run, resume=False, given=None)
    assert stat.S_IMODE(run.tracker.stat().st_mode) == 0o600
    assert wandb_run_id(run, resume=True, given=None) == first
    assert wandb_run_id(run, resume=False, given=None) != first


@pytest.mark.parametrize("resume", [True, False])
def test_the_users_own_id_wins_and_is_kept(tmp_path: Path, resume: bool) -> None:
    run = RunDir(tmp_path)
    wandb_run_id(run, resume=False, given=None)
    assert wandb_run_id(run, resume, given="mine") == "mine"
    assert wandb_run_id(run, resume=True, given=None) == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"wandb_run_id": 3}', '{"wandb_run_id": ""}', "{"])
def test_an_unreadable_id_is_replaced(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.tracker.write_text(text)
    found = wandb_run_id(run, resume=True, given=None)
    assert json.loads(run.tracker.read_text()) == {"wandb_run_id": found}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the trackers, no key."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TENSORBOARD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"HOME": str(tmp_path)})


def recipe_of(run: Path, *names: str) -> Recipe:
    return Recipe.model_validate(
        {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "output": {"output_dir": str(run)},
         "train": {"report_to": list(names)}}
    )  # fmt: skip


@pytest.mark.usefixtures("bare")
def test_the_environment_names_the_run_and_is_offline_without_a_key(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    prepare(recipe_of(tmp_path, "wandb"), run, is_main=True)
    assert os.environ["WANDB_RUN_ID"] == json.loads(run.tracker.read_text())["wandb_run_id"]
    assert (os.environ["WANDB_RESUME"], os.environ["WANDB_MODE"]) == ("allow", "offline")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("names", "main"), [(["wandb"], False), (["tensorboard"], True)])
def test_nobody_else_makes_an_id(tmp_path: Path, names: list[str], main: bool) -> None:
    prepare(recipe_of(tmp_path, *names), RunDir(tmp_path), main)
    assert "WANDB_RUN_ID" not in os.environ
    assert not RunDir(tmp_path).tracker.exists()


@pytest.mark.usefixtures("bare")
def test_trackers_come_before_the_log(tmp_path: Path) -> None:
    made = callbacks(recipe_of(tmp_path, "wandb", "tensorboard"), RunDir(tmp_path), None)
    assert [type(callback) for callback in made] == [OneWandbRun, OneTensorBoard, LogFile]


# TensorBoard


def board(folder: Path, resumed_step: int | None, monkeypatch: pytest.MonkeyPatch) -> OneTensorBoard:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    return OneTensorBoard(resumed_step)


def shown(folder: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_tensorboard_shows_the_steps_of_the_newest_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, resumed in enumerate([None, 3, 4]):
        callback = board(tmp_path, resumed, monkeypatch)
        callback.on_train_begin(TrainingArguments(report_to="none"), at(resumed or 0), TrainerControl())
        for step in range((resumed or 0) + 1, 7):
            log(callback, step, loss=start)
        assert shown(tmp_path)[-1] == (6, start)
    assert shown(tmp_path) == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 2)]


def test_tensorboard_on_a_full_disk_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = board(tmp_path, None, monkeypatch)
    log(callback, 1, loss=1)
    with full_disk(2):
        for step in (2, 3, 4):
            log(callback, step, loss=1)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(callback, "_next_attempt", 0.0)
    log(callback, 5, loss=1)
    callback.on_train_end(TrainingArguments(report_to="none"), at(5), TrainerControl())
    assert [step for step, _ in shown(tmp_path)] == [1, 5]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith("warning: tensorboard cannot be written: ")
    assert said[1] == "warning: tensorboard is written again"


# W&B


def wandb_run(metrics: Path, resumed_step: int | None, **run: Any) -> tuple[OneWandbRun, MagicMock]:
    """The callback over a W&B that notes what it is told."""
    callback, module = OneWandbRun(metrics, resumed_step), MagicMock(Error=ConnectionError)
    module.run.configure_mock(**run)
    callback._filed._module = module
    callback.on_train_begin(TrainingArguments(report_to="none"), at(resumed_step or 0), TrainerControl())
    return callback, module


def filed(module: MagicMock) -> list[tuple[int, dict[str, Any]]]:
    return [(call.kwargs["step"], call.args[0]) for call in module.log.call_args_list]


def test_wandb_files_each_record_under_its_step(tmp_path: Path) -> None:
    callback, module = wandb_run(write_records(tmp_path / "metrics.jsonl", 1, 2), None)
    log(callback, 1, loss=0.5, train_runtime=3.0)
    log(callback, 1, eval_loss=0.4)
    assert filed(module) == [
        (1, {"train/loss": 0.5, "train/global_step": 1}),
        (1, {"eval/loss": 0.4, "train/global_step": 1}),
    ]
    module.run.summary.__setitem__.assert_called_once_with("train_runtime", 3.0)


@pytest.mark.parametrize(("starting_step", "steps"), [(0, [1, 2, 3, 4, 5]), (3, [3, 4, 5]), (5, [5]), (9, [])])
def test_a_resumed_wandb_run_is_given_what_its_server_lacks(
    tmp_path: Path, starting_step: int, steps: list[int]
) -> None:
    metrics = write_records(tmp_path / "metrics.jsonl", 1, 2, 3)
    callback, module = wandb_run(metrics, 3, offline=False, starting_step=starting_step)
    log(callback, 4, loss=1 / 4)
    log(callback, 5, loss=1 / 5)
    assert filed(module) == [(step, {"train/loss": 1 / step, "train/global_step": step}) for step in steps]


def test_a_resumed_offline_run_is_given_what_its_earlier_files_lack(tmp_path: Path) -> None:
    for start, steps in {"offline-run-1-a": (1,), "offline-run-2-a": (2,), "offline-run-3-ab": (1, 2, 3)}.items():
        (tmp_path / start).mkdir()
        write_wandb_log(tmp_path / start / "run.wandb", *steps)
    _, module = wandb_run(
        write_records(tmp_path / "metrics.jsonl", 1, 2, 3, 4), 4, offline=True, id="a",
        settings=MagicMock(sync_dir=str(tmp_path / "offline-run-4-a")),
    )  # fmt: skip
    assert [step for step, _ in filed(module)] == [3, 4]


def test_a_wandb_that_fails_does_not_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, module = wandb_run(tmp_path / "metrics.jsonl", None)
    module.log.side_effect = BrokenPipeError(32, "Broken pipe")
    log(callback, 1, loss=1.0)
    log(callback, 2, loss=1.0)
    assert (
        capsys.readouterr().err
        == "warning: W&B cannot be written: Broken pipe; its records are left out until it can\n"
    )


def write_wandb_log(path: Path, *steps: int, filler: int = 0) -> list[int]:
    """A `.wandb` file of one row a step, each with so many bytes of a value; returns where they end."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, ends = b":W&B\xe1\xbe\x00", []
    for step in steps:
        record = Record()
        record.history.step.num = step
        record.history.item.add(key="x", value_json="1" * filler)
        payload, first = record.SerializeToString(), True
        while payload or first:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += b"\0" * room
                continue
            piece, payload = payload[: room - 7], payload[room - 7 :]
            kind = (1 if not payload else 2) if first else (4 if not payload else 3)
            data += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
        ends.append(len(data))
    path.write_bytes(data)
    return ends


def test_the_last_step_of_a_torn_wandb_file_is_its_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "run.wandb"
    ends = write_wandb_log(path, *range(1, 12), filler=9_000)
    data = path.read_bytes()
    for size in (0, 3, 7, *range(8, len(data), 997), *(end + by for end in ends for by in (-1, 0, 1))):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert last_step(path) == (whole or -1)


def test_other_files_hold_no_step(tmp_path: Path) -> None:
    path = tmp_path / "run.wandb"
    assert last_step(path) == -1
    for data in (b"", b"no log at all" * 9000, b":W&B\xe1\xbe\x00" + bytes(40_000)):
        path.write_bytes(data)
        assert last_step(path) == -1
    path.write_bytes(b":W&B\xe1\xbe\x00" + struct.pack("<IHB", 0, 5, 1) + b"\xff" * 5)
    assert last_step(path) == -1
