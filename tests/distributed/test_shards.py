"""Weights go from the files straight into shards and back into files; no process holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.ranks import told
from tests.recipes import small_recipe

WORKER = Path(__file__).parent / "workers" / "load_shards.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 200 MB in several files, whose sizes do not divide by the number of processes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("big")
    tokenizer = tiny.chat_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2051, num_hidden_layers=7,
                         num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=512)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="50MB")
    tokenizer.save_pretrained(folder)
    return folder


def load_and_save(folder: Path, recipe: Path, strategy: str, processes: int) -> list[dict[str, Any]]:
    folder.mkdir()
    words = [str(WORKER), str(recipe), str(folder), f"parallel.strategy={strategy}", "parallel.global_batch_size=8"]
    # Freed memory goes back at once, so that what is seen is what is held.
    return told(folder, strategy, processes, *words, MALLOC_MMAP_THRESHOLD_="65536")


def tensors(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("strategy", "processes"), [("fsdp2", 2), ("zero3", 2), ("fsdp2", 4), ("fsdp2_hybrid", 2)])
def test_no_process_reads_or_gathers_a_whole_copy(tmp_path: Path, model: Path, strategy: str, processes: int) -> None:
    seen = load_and_save(tmp_path / "out", small_recipe(tmp_path, model), strategy, processes)
    before, after = tensors(model), tensors(tmp_path / "out" / "model")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    size = sum(tensor.numel() * 4 for tensor in before.values())
    for one in seen:
        assert one["said"] == []
        assert one["load"] < size / processes + 60e6, one
        # One file and one tensor at a time, and the interpreter's own.
        assert one["save"] < 80e6, one


def test_what_cannot_be_read_in_parts_is_read_whole_and_said(tmp_path: Path, model: Path) -> None:
    recipe = small_recipe(tmp_path, model)
    seen = load_and_save(tmp_path / "out", recipe, "zero3_hpz", 2)
    assert seen[0]["said"] == ["weights: each process reads all of them first (DeepSpeed places them a second time)"]
    after = tensors(tmp_path / "out" / "model")
    assert all((tensor == after[name]).all() for name, tensor in tensors(model).items())


def test_names_in_files_may_lack_the_prefix_of_the_model(tmp_path: Path) -> None:
    """As those of OPT's checkpoints do."""
    from safetensors.torch import save_file

    folder = tiny.save_model(tmp_path / "model", "opt")
    file = folder / "model.safetensors"
    held = load_file(file)
    save_file({name.removeprefix("model."): tensor for name, tensor in held.items()}, file, {"format": "pt"})
    seen = load_and_save(tmp_path / "out", small_recipe(tmp_path, folder), "fsdp2", 2)
    assert seen[0]["said"] == []
    after = tensors(tmp_path / "out" / "model")
    assert all((tensor == after[name]).all() for name, tensor in held.items())
