"""Model directories in and out: types, files, refusals, and memory that does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.errors import UserError
from sft_dist.export.__main__ import main
from sft_dist.export.command import Wishes, export
from sft_dist.export.writer import size_of
from sft_dist.straight import build
from tests import tiny
from tests.checkpoints import write_checkpoint, write_run
from tests.recipes import environment


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of several files."""
    folder = tiny.save_model(tmp_path / "model", "opt")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model as transformers loads them, in their own type."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def left_behind(folder: Path, *known: str) -> list[str]:
    """What lies in a folder beside what the test put there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def test_the_same_weights_in_one_file(model: Path, tmp_path: Path) -> None:
    export(str(model), tmp_path / "out", Wishes())
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.index.json"))
    before, after = loaded(model), loaded(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert left_behind(tmp_path) == ["model", "out"]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_another_type(model: Path, tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    export(str(model), tmp_path / "out", Wishes(dtype=dtype))
    before, after = loaded(model), loaded(tmp_path / "out")
    assert all(after[name].dtype == dtype and torch.equal(before[name].to(dtype), after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_files_of_a_size_and_their_index(model: Path, tmp_path: Path) -> None:
    export(str(model), tmp_path / "out", Wishes(file_bytes=70_000, dtype=torch.bfloat16))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= 70_000
    before, after = loaded(model), loaded(tmp_path / "out")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)


def test_integers_stay_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    file = folder / "model.safetensors"
    odd = {"odd": torch.arange(7, dtype=torch.uint8), "one": torch.tensor(3.5), "flags": torch.tensor([True, False])}
    save_file({**load_file(file), **odd}, file, metadata={"format": "pt"})
    export(str(folder), tmp_path / "out", Wishes(dtype=torch.bfloat16))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["odd"], odd["odd"]) and torch.equal(after["flags"], odd["flags"])
    assert after["one"].dtype == torch.bfloat16 and after["one"].shape == ()
    assert after["one"].item() == 3.5


def test_the_tokenizer_and_its_template_come_along(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    export(str(folder), tmp_path / "out", Wishes())
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert before.chat_template == after.chat_template
    assert before("def add(a, b)")["input_ids"] == after("def add(a, b)")["input_ids"]
    assert (tmp_path / "out" / "generation_config.json").read_text() == (folder / "generation_config.json").read_text()


def cut_short(model: Path) -> str:
    """Take the end of a file away."""
    file = sorted(model.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def take_away(model: Path) -> str:
    """Take a file away."""
    file = sorted(model.glob("*.safetensors"))[0]
    file.unlink()
    return file.name


def lose_a_tensor(model: Path) -> str:
    """Write a file again without one of its tensors."""
    file = sorted(model.glob("*.safetensors"))[-1]
    held = load_file(file)
    held.pop(lost := sorted(held)[0])
    save_file(held, file, metadata={"format": "pt"})
    return lost


def lose_a_tensor_and_its_mention(model: Path) -> str:
    """The same, with an index that does not know of it."""
    lost = lose_a_tensor(model)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][lost]
    index.write_text(json.dumps(content))
    return lost


def change_a_shape(model: Path) -> str:
    """Give a tensor a row more."""
    file = sorted(model.glob("*.safetensors"))[-1]
    held = load_file(file)
    name = sorted(held)[0]
    held[name] = torch.cat([held[name], held[name][:1]])
    save_file(held, file, metadata={"format": "pt"})
    return name


def name_a_file_outside(model: Path) -> str:
    """An index that points out of its folder."""
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../other.safetensors"
    index.write_text(json.dumps(content))
    return "../other.safetensors"


@pytest.mark.parametrize("damage", [cut_short, take_away, lose_a_tensor, lose_a_tensor_and_its_mention, change_a_shape,
                                    name_a_file_outside])  # fmt: skip
def test_damage_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = damage(model)
    assert main([str(model), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("sft-dist: ") and named in said
    assert left_behind(tmp_path) == ["model"]


def test_a_folder_that_holds_something_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        export(str(model), tmp_path / "out", Wishes())
    (tmp_path / "out" / "mine").unlink()
    export(str(model), tmp_path / "out", Wishes())
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_disk_without_room_is_found_before_writing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_dist.export.writer.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(UserError, match="are needed"):
        export(str(model), tmp_path / "out", Wishes())
    assert left_behind(tmp_path) == ["model"]


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    file = folder / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"][3] = 1e6
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight has numbers beyond"):
        export(str(folder), tmp_path / "out", Wishes(dtype=torch.float16))
    assert left_behind(tmp_path) == ["model"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("20 MiB", 20 * 2**20), ("1.5kb", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size"):
        size_of(text)


@pytest.mark.parametrize("name", ["nothing-here", "."])
def test_a_source_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SOURCE|neither a model"):
        export(name if name != "." else str(tmp_path), tmp_path / "out", Wishes())


_MEASURED = """
import sys
from pathlib import Path
from sft_dist.export.__main__ import main

def kilobytes(name):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)).split()[1])

small, large, out, *words = sys.argv[1:]
assert main([small, "--output", out + "-small", *words]) == 0
# The peak begins anew from what the libraries take.
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
assert main([large, "--output", out, *words]) == 0
print("grown", (kilobytes("VmHWM") - before) / 1000)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
@pytest.mark.parametrize("kind", ["model", "adapter", "checkpoint"])
def test_memory_is_that_of_a_file_and_not_of_the_model(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig

    size = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 1000}
    sources = {}
    for name, layers in (("small", 1), ("large", 17)):
        config = LlamaConfig(**size, num_hidden_layers=layers, tie_word_embeddings=False)
        # Which numbers they are is of no matter here.
        made = build(partial(AutoModelForCausalLM.from_config, config), nullcontext())
        made.save_pretrained(tmp_path / name, max_shard_size="20MB")
        sources[name] = tmp_path / name
        if kind == "checkpoint":
            tiny.chat_tokenizer().save_pretrained(tmp_path / name)
            run = write_run(tmp_path / f"run-{name}", str(tmp_path / name))
            sources[name] = write_checkpoint(run, 7, {n: p.detach() for n, p in made.named_parameters()})
        if kind == "adapter":
            from peft import LoraConfig, get_peft_model

            made = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear"))
            made.peft_config["default"].base_model_name_or_path = str(tmp_path / name)
            sources[name] = tmp_path / f"{name}-adapter"
            made.save_pretrained(sources[name])
    total = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert total > 285e6
    words = [str(sources["small"]), str(sources["large"]), str(tmp_path / "out"), "--max-shard-size", "20MB"]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *words], env=environment(tmp_path), text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout.split("grown ")[1])
    print(f"{total / 1e6:.0f} MB exported, {grown:.0f} MB more memory at most")
    assert grown < 60, grown
