"""Bad input of every kind: one line that names file, key or record and the mend, and exit code 2."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from tests import tiny
from tests.recipes import write_recipe

GOOD = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "an answer"}]}


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Runs `sft-dist VERB` on a recipe with one good record, changed by overrides; gives its faults, else its lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("launch.devices.gpus", list)

    def here(name: str, words: Sequence[str]) -> int:
        return int(importlib.import_module(name).main(list(words)))

    # The same code, without the seconds that a process of the training plane takes to start.
    monkeypatch.setattr("launch.local.run_module", here)
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    write_recipe(
        tmp_path / "recipe.yaml",
        model={"model_name_or_path": str(model)},
        data={"dataset_name": "good.jsonl"},
        train={"max_length": 64},
        output={"output_dir": "run"},
    )

    def run(verb: str, *overrides: str) -> list[str]:
        code = cli.main([verb, "recipe.yaml", *overrides])
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        # `check` reports what is well and what is not; the others say the faults only.
        faults = [line.removeprefix("no  ") for line in said.out.splitlines() if line.startswith("no  ")]
        faults += [line.removeprefix("sft-dist: ") for line in said.err.splitlines()]
        assert code == (2 if faults else 0), said
        return faults or said.out.splitlines()

    return run


def data_file(content: object, name: str = "bad.jsonl") -> str:
    """Write records, or a text as it is, and give the override that names the file."""
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)  # type: ignore[attr-defined]
    Path(name).write_text(text)
    return f"data.dataset_name={name}"


def test_a_good_recipe_passes(command: Callable[..., list[str]]) -> None:
    lines = command("check")
    assert lines[-1] == "train: the first 1 records are conversations, 18 tokens each, 33% trained, 0 truncated"
    assert not any(line.startswith("??") for line in lines)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.dataset_name=goood.jsonl",
            "data.dataset_name: no such file: goood.jsonl, did you mean good.jsonl",
        ),
        (
            "data.dataset_name=nowhere/x.json",
            "data.dataset_name: no such file: nowhere/x.json (nor is there a folder nowhere)",
        ),
        (
            "model.model_name_or_path=./no-such-model",
            "model.model_name_or_path: no such folder: ./no-such-model; give a model directory or a hub id",
        ),
        (
            "train.max_length=4096",
            "train.max_length: 4096 is beyond the model's 512 positions; lower it",
        ),
        (
            "output.resume=true",
            "output.resume: run holds no run to go on with; leave it out, or mend output.output_dir",
        ),
        (
            "output.output_dir=good.jsonl",
            "output.output_dir: good.jsonl is a file; name a folder",
        ),
        (
            "data.chat_template_path=none.jinja",
            "data.chat_template_path: no such file: none.jinja; give a Jinja file",
        ),
        (
            "data.formatting=no_such_module:f",
            (
                "data.formatting: no_such_module:f: No module named 'no_such_module'; "
                "it must be package.module:function, importable from here"
            ),
        ),
        (
            "train.learning_rte=1",
            "command line: train.learning_rte: no such key, did you mean train.learning_rate",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_starts(
    command: Callable[..., list[str]], override: str, said: str
) -> None:
    lines = command("check", override)
    assert lines == [said]


def test_a_folder_without_data_is_refused(command: Callable[..., list[str]]) -> None:
    Path("empty").mkdir()
    (line,) = command("check", "data.dataset_name=empty")
    assert line.startswith("data.dataset_name: folder empty holds no data file (.json, ")


def test_broken_json_names_its_line(command: Callable[..., list[str]]) -> None:
    (line,) = command("check", data_file(json.dumps(GOOD) + '\n{"conversations": [\n'))
    assert line.startswith("bad.jsonl:2: broken JSON: Expecting value (column ")
    assert line.endswith("; mend it, or skip so many by data.max_bad_records")
    (line,) = command("check", data_file('[{"text": "a"},\n {"text": "b",}]', "bad.json"))
    assert line.startswith("bad.json:2: broken JSON: ")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text_": "a"}, "the columns text_ fit no format"),
        ({"prompt": "a"}, "the columns prompt fit no format"),
        (chat(("human", "q"), ("robot", "a")), "turn 2 has the unknown role 'robot'"),
        (chat(("gpt", "a"), ("human", "q")), "turn 1 is of the assistant where one of the user must stand"),
        (chat(("human", "q")), "there is no assistant turn to learn from"),
        (chat(("human", "q"), ("gpt", 7)), "turn 2 must be a string, got int"),
        (chat(("human", "q"), ("gpt", None)), "turn 2 must be a string, got nothing"),
        (chat(("human", ""), ("gpt", "a")), "turn 1 (user) is empty"),
        (chat(("human", "q"), ("gpt", "  ")), "every assistant turn is empty"),
        (chat(), "the conversation is empty"),
        (chat(("human", "q"), ("gpt", "a\0b")), "turn 2 holds a NUL byte at character 2"),
        (chat(("human", "q"), ("gpt", "a\ud800")), "turn 2 holds a lone surrogate at character 2"),
        ({"conversations": "q"}, "conversations must be a list of turns, got str"),
        ([1, 2], "a record must be an object with columns, got list"),
    ],
)
def test_a_bad_record_is_refused_by_its_number(command: Callable[..., list[str]], record: object, said: str) -> None:
    first = {} if isinstance(record, dict) and not record.keys() & GOOD.keys() else GOOD
    rows = [record, GOOD] if first == {} else [GOOD, record]
    (line,) = command("check", data_file(rows))
    assert line.startswith(f"bad.jsonl:{rows.index(record) + 1}: {said}")
    assert line.endswith("; mend it, or skip so many by data.max_bad_records")
    assert command("check", data_file(rows), "data.max_bad_records=1")[-1].startswith("train: the first 1 records")


def test_a_named_format_whose_column_is_missing_is_refused(command: Callable[..., list[str]]) -> None:
    (line,) = command("check", "data.format=messages")
    assert line.startswith("good.jsonl:1: the column messages is missing (it has conversations)")


def test_data_in_which_nothing_would_be_trained_is_refused(command: Callable[..., list[str]]) -> None:
    (line,) = command("check", "train.max_length=4")
    assert line == (
        "data.dataset_name: no record has a response within train.max_length; raise it"
    )  # fmt: skip


MIXTURE = ("data.dataset_name=null", "data.mixture.chat.dataset_name=good.jsonl")


def test_check_looks_at_every_source_of_a_mixture(command: Callable[..., list[str]]) -> None:
    override = data_file([{"text": "plain words"}] * 2, "plain.jsonl").replace("data.", "data.mixture.docs.")
    Path("held.jsonl").write_text(Path("good.jsonl").read_text())
    lines = command("check", *MIXTURE, override, "data.dataset_test_split=held.jsonl")
    assert [line for line in lines if "data.mixture" in line] == [
        "ok  data.mixture.chat.dataset_name: 1 file, 0.0 MB (good.jsonl)",
        "ok  data.mixture.docs.dataset_name: 1 file, 0.0 MB (plain.jsonl)",
    ]
    assert [line.split(",")[0] for line in lines[-4:-1]] == [
        "train chat: the first 1 records are conversations",
        "train docs: the first 2 records are text",
        "test: the first 1 records are conversations",
    ]
    assert lines[-1].startswith("test: 1 of 1 held-out record")


def test_a_fault_of_one_source_of_a_mixture_names_its_key(command: Callable[..., list[str]]) -> None:
    assert command("check", *MIXTURE, "data.mixture.docs.dataset_name=goood.jsonl") == [
        "data.mixture.docs.dataset_name: no such file: goood.jsonl, did you mean good.jsonl"
    ]
    (line,) = command("check", *MIXTURE, data_file([GOOD, {"a": 1}]).replace("data.", "data.mixture.docs."))
    assert line.startswith("bad.jsonl:2: ")
    (line,) = command("check", *MIXTURE, "train.max_length=4")
    assert line == "data.mixture.chat.dataset_name: no record has a response within train.max_length; raise it"


def test_preview_shows_the_sources_of_a_mixture_in_turn(command: Callable[..., list[str]]) -> None:
    override = data_file([{"text": f"plain words {n}"} for n in range(3)], "plain.jsonl")
    said = "\n".join(command("preview", *MIXTURE, override.replace("data.", "data.mixture.docs."), "--records", "3"))
    places = [said.index(where) for where in ("good.jsonl:1", "plain.jsonl:1", "plain.jsonl:2")]
    assert places == sorted(places)
    assert "plain.jsonl:3" not in said
    assert "chat + docs (train)" in said


def test_a_folder_that_is_no_model_is_refused(command: Callable[..., list[str]]) -> None:
    Path("thing").mkdir()
    key = "model.model_name_or_path: thing"
    assert command("check", "model.model_name_or_path=thing") == [
        f"{key} holds no config.json, so it is no model directory; name one"
    ]
    Path("thing/config.json").write_text("{")
    assert command("check", "model.model_name_or_path=thing")[0].startswith(f"{key}/config.json: not readable: ")
    Path("thing/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert command("check", "model.model_name_or_path=thing") == [
        f"{key} holds no tokenizer; copy its tokenizer.json there"
    ]
    Path("thing/tokenizer.json").write_text("{}")
    assert command("check", "model.model_name_or_path=thing") == [
        f"{key} holds no weights (*.safetensors); copy them there"
    ]
    Path("thing/pytorch_model.bin").write_text("")
    assert command("check", "model.model_name_or_path=thing") == [
        f"{key} holds .bin weights only; set model.allow_pickle_weights=true to read them"
    ]


def test_a_model_that_is_no_causal_lm_is_refused(command: Callable[..., list[str]], model: Path) -> None:
    other = Path("bert")
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (other / "config.json").write_text(json.dumps(config))
    assert command("check", "model.model_name_or_path=bert") == [
        (
            "model.model_name_or_path: bert: not a causal language model (BertForMaskedLM); "
            "name one whose architecture ends in ForCausalLM"
        )
    ]


def test_an_output_folder_that_holds_another_run_is_refused(command: Callable[..., list[str]]) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("")
    assert command("run") == [
        (
            "output.output_dir: run holds another run; set output.resume=true to go on, "
            "output.overwrite=true to replace it, or name another folder"
        )
    ]
    assert Path("run/recipe.yaml").exists()


def test_bf16_on_hardware_that_has_none_is_refused(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.devices.cpu_has_bf16", lambda: False)
    assert command("run", "train.bf16=true") == [
        "train.bf16: this processor has no bf16 instructions, and there is no GPU; set train.bf16=false or leave it out"
    ]
    assert not Path("run").exists()


def test_a_disk_without_room_for_the_model_is_refused(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    (line,) = command("run")
    assert line.startswith("output.output_dir: ")
    assert line.endswith("GB; free some, or name another folder")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the room on the disk, in GB, for a model of 10 GB, whose checkpoints have 30 GB."""
    monkeypatch.setattr("launch.check._weight_bytes", lambda _: 10 * 10**9)

    def set_free(size: float) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": int(size * 10**9)})())

    return set_free


@pytest.mark.parametrize(
    ("keep", "free", "need", "at_once", "mend"),
    [
        # The model, the checkpoints that are kept, and the one that is written before another goes.
        ("checkpoint.keep=3", 129.9, 130, 4, "set checkpoint.keep=2, or name another folder"),
        ("checkpoint.keep=3", 100, 130, 4, "set checkpoint.keep=2, or name another folder"),
        ("checkpoint.keep=3", 99.9, 130, 4, "set checkpoint.keep=1, or name another folder"),
        ("checkpoint.keep=3", 70, 130, 4, "set checkpoint.keep=1, or name another folder"),
        ("checkpoint.keep=3", 69.9, 130, 4, "name another folder"),
        ("checkpoint.keep=3", 0, 130, 4, "name another folder"),
        ("checkpoint.keep=10", 250, 340, 11, "set checkpoint.keep=7, or name another folder"),
        ("checkpoint.keep=1", 69, 70, 2, "name another folder"),
        ("checkpoint.keep=null", 99, 100, 3, "name another folder"),
    ],
)
def test_a_disk_without_room_for_the_checkpoints_is_refused_with_the_arithmetic(
    command: Callable[..., list[str]], disk: Callable[[float], None],
    keep: str, free: float, need: int, at_once: int, mend: str,
) -> None:  # fmt: skip
    disk(free)
    words = ("train.save_strategy=steps", keep)
    said = (
        f"checkpoint.keep: {Path.cwd()} has {free:.1f} GB free and the run writes about {need}.0 GB: {at_once} "
        "checkpoints at once (one is written before another goes) of 30.0 GB, 3 x the weights, and the model, 10.0 GB; "
    )
    assert command("run", *words) == [said + mend]
    assert command("check", *words) == [said + mend]
    assert not Path("run").exists()
    if "set" in mend:
        # The mend mends it, and one more checkpoint would not fit.
        most = int(mend.split("=")[1].split(",")[0])
        assert f"about {10 + 30 * (most + 1)}.0 GB will be written" in "\n".join(
            command("check", words[0], f"checkpoint.keep={most}")
        )
        assert command("check", words[0], f"checkpoint.keep={most + 1}")[0].startswith("checkpoint.keep: ")


def test_the_best_checkpoint_takes_up_room_too(
    command: Callable[..., list[str]], disk: Callable[[float], None]
) -> None:
    disk(130)
    Path("held_out.jsonl").write_text(json.dumps(chat(("human", "another"), ("gpt", "question"))) + "\n")
    words = ("train.save_strategy=steps", "data.dataset_test_split=held_out.jsonl", "train.eval_strategy=steps")
    assert "about 130.0 GB will be written" in "\n".join(command("check", *words))
    (line,) = command("check", *words, "checkpoint.metric_for_best_model=eval_loss")
    assert "the run writes about 160.0 GB: 5 checkpoints at once" in line
    assert line.endswith("; set checkpoint.keep=2, or name another folder")


def test_without_checkpoints_the_model_alone_needs_room(
    command: Callable[..., list[str]], disk: Callable[[float], None]
) -> None:
    disk(9)
    said = "has 9.0 GB free and the run writes about 10.0 GB; free some, or name another folder"
    assert command("check") == [f"output.output_dir: {Path.cwd()} {said}"]
    disk(10)
    assert command("check")[-1].startswith("train: ")


def test_what_an_earlier_start_wrote_is_room_for_what_replaces_it(
    command: Callable[..., list[str]], disk: Callable[[float], None]
) -> None:
    """A disk that a run fitted on does not refuse it when it goes on, or is done anew."""

    def write(name: str, size: int) -> None:
        Path("run", name).mkdir(parents=True)
        with open(Path("run", name, "weights"), "wb") as file:
            file.truncate(size * 10**9)

    words = ("train.save_strategy=steps", "checkpoint.keep=3")
    # At its start there were 130 GB.
    for step in (1, 2, 3):
        write(f"checkpoints/checkpoint-{step}", 30)
    write("checkpoints/checkpoint-4.unfinished", 10)
    Path("run", "recipe.yaml").write_text(Path("recipe.yaml").read_text())
    disk(30)
    for how in ("output.resume=true", "output.overwrite=true"):
        assert command("check", *words, how)[-1].startswith("train: ")
    disk(29)
    said = "has 29.0 GB free, beside 100.0 GB that this run has used so far, and the run writes about 130.0 GB: 4 "
    for how in ("output.resume=true", "output.overwrite=true"):
        (line,) = command("check", *words, how)
        assert said in line and line.endswith("; set checkpoint.keep=2, or name another folder")
    # What is set aside stays where it is, unless all is replaced.
    write("checkpoints/checkpoint-0.damaged", 30)
    write("model", 10)
    (line,) = command("check", *words, "output.resume=true")
    assert said in line
    disk(0)
    assert command("check", *words, "output.overwrite=true")[-1].startswith("train: ")
    # Checkpoints beyond those that are kept are no room for the model.
    for step in range(5, 9):
        write(f"checkpoints/checkpoint-{step}", 30)
    disk(9)
    (line,) = command("check", *words, "output.resume=true")
    assert "has 9.0 GB free, beside 120.0 GB that this run has used so far" in line
    disk(10)
    assert command("check", *words, "output.resume=true")[-1].startswith("train: ")


def test_a_hub_model_that_cannot_be_had_is_refused_by_run_and_told_by_check(
    command: Callable[..., list[str]],
) -> None:
    said = "model.model_name_or_path: nobody/nothing is not in the cache, and the hub cannot be reached from here"
    assert command("run", "model.model_name_or_path=nobody/nothing") == [said]
    assert f"??  {said}" in command("check", "model.model_name_or_path=nobody/nothing")


def test_a_tokenizer_without_pad_or_eos_token_is_mended_and_said(
    command: Callable[..., list[str]], model: Path
) -> None:
    bare = Path("bare")
    bare.mkdir()
    for file in model.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("eos_token", "pad_token", "bos_token")})
    )
    lines = command("check", "model.model_name_or_path=bare")
    said = [line for line in lines if line.startswith("the tokenizer has no")]
    assert said == [
        "the tokenizer has no eos token: <|endoftext|> is used (found in its vocabulary)",
        "the tokenizer has no pad token: its eos token <|endoftext|> is used",
    ]
