"""A run's checkpoint becomes a model, by whatever number of ranks it was written; a damaged one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import cli
from sft_dist.adapters import lora_config
from sft_dist.checkpoints import manifest
from sft_dist.errors import UserError
from sft_dist.export.__main__ import main
from sft_dist.export.command import Wishes, export
from sft_dist.recipe import load_recipe
from tests import tiny
from tests.checkpoints import turn_a_bit, write_checkpoint, write_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings."""
    return tiny.save_model(tmp_path_factory.mktemp("base") / "model")


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are trained by the names that they have in a checkpoint, with other values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("world", [1, 3])
def test_a_model_of_any_number_of_ranks(base: Path, tmp_path: Path, world: int) -> None:
    """Its configuration, tokenizer and template are those that the recipe leads to; nothing else is needed."""
    run = write_run(tmp_path / "run", str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = write_checkpoint(run, 7, trained(model), world_size=world)
    export(str(folder), tmp_path / "out", Wishes(file_bytes=100_000))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = model.state_dict()
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["tie_word_embeddings"]


@pytest.mark.parametrize("settings", [
    {"lora_modules_to_save": ["norm"], "use_rslora": True}, {"use_dora": True}, {"load_in_4bit": True},
], ids=["saved", "dora", "qlora"])  # fmt: skip
def test_an_adapter_merged_and_alone(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Names are those of peft's parameters, `.default.` and all; the recipe says what adapter it is."""
    run = write_run(tmp_path / "run", str(base), peft={"use_peft": True, "lora_target_modules": "all-linear",
                                                       **settings})  # fmt: skip
    config = lora_config(load_recipe(run / "recipe.yaml").peft)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    folder = write_checkpoint(run, 7, trained(model))
    lines: list[str] = []
    export(str(folder), tmp_path / "alone", Wishes(keep_adapter=True))
    export(str(folder), tmp_path / "out", Wishes(), lines.append)
    assert any("over 4-bit weights" in line for line in lines) == ("load_in_4bit" in settings)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "alone")
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters())
    wanted = model.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == wanted.keys()
    assert all((ours[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)


def short(name: str) -> Callable[[Path], object]:
    """A file that lost its end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bit": ("rank-00001.safetensors is damaged", lambda f: turn_a_bit(f / "rank-00001.safetensors")),
    "cut": ("rank-00000.safetensors has ", short("rank-00000.safetensors")),
    "gone": ("rank-00001.safetensors: No such file", lambda f: (f / "rank-00001.safetensors").unlink()),
    "common": ("common.json is damaged", lambda f: turn_a_bit(f / "common.json")),
    "manifest": ("manifest.json is missing", lambda f: (f / "manifest.json").unlink()),
    "manifest cut": ("manifest.json cannot be read", short("manifest.json")),
    "unfinished": ("was not written to its end", lambda f: f.rename(f.with_name("checkpoint-7.unfinished"))),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_line_before_anything_is_written(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    wanted, damage = DAMAGES[case]
    damage(write_checkpoint(run, 7))
    (folder,) = (run / "checkpoints").iterdir()
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("sft-dist: ")]
    assert len(lines) == 1 and "Traceback" not in said
    assert f"{folder}: {wanted}" in lines[0] and lines[0].endswith("; take another checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_files_of_all_nodes_are_asked_for(base: Path, tmp_path: Path) -> None:
    """Each node's manifest knows the files of that node only."""
    run = write_run(tmp_path / "run", str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    whole = write_checkpoint(run, 7, trained(model), world_size=2)
    other = shutil.copytree(whole, tmp_path / "other")
    held = manifest.read(whole)
    mine = {name: file for name, file in held.files.items() if "00001" not in name}
    (whole / "manifest.json").write_text(replace(held, files=mine, nodes=2).to_json())
    (whole / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank-00001\.safetensors: the file is missing, .* on 2 nodes; gather"):
        export(str(whole), tmp_path / "out", Wishes())
    shutil.copy(other / "rank-00001.safetensors", whole)
    export(str(whole), tmp_path / "out", Wishes())
    ours, wanted = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)


def test_a_run_without_a_model_leads_to_its_newest_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step in (9, 10):
        write_checkpoint(run, step)
    (run / "checkpoints" / "checkpoint-11.unfinished").mkdir()
    with pytest.raises(UserError, match=r"name one of its checkpoints, such as .*/checkpoint-10$"):
        export(str(run), tmp_path / "out", Wishes())


@pytest.mark.parametrize("verb", ["eval", "chat"])
def test_eval_and_chat_ask_for_an_export_first(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a run")
    folder = write_checkpoint(run, 7)
    for name, what in ((folder, "a checkpoint, not a model"), (run, "no model yet")):
        assert cli.main([verb, str(name)]) == 2
        assert capsys.readouterr().err == (
            f"sft-dist: {name}: {what}; export it first: sft-dist export '{folder}' --output DIR\n"
        )
