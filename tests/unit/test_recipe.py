"""A recipe is read as it is meant, overridden by the command line, and written out so that it can be repeated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config import Recipe
from sft_dist.recipe import document, dump_recipe, json_schema, load_recipe, recipe_hash
from sft_dist.recipe_docs import DOCUMENT_FILE, SCHEMA_FILE, schema_text, write_files
from tests.recipe_texts import MINIMAL, load, section, train

ROOT = Path(__file__).resolve().parents[2]

# What is read


def test_what_a_recipe_leaves_out_has_its_default() -> None:
    recipe = load(MINIMAL)
    assert recipe == Recipe.model_validate(
        {
            "model": {"model_name_or_path": "facebook/opt-1.3b"},
            "data": {"dataset_name": "train.jsonl"},
            "output": {"output_dir": "runs/one"},
        }
    )
    assert load(MINIMAL + "train:\npeft: ~\n") == recipe


RECIPES = sorted(p for p in (ROOT / "launch/recipes").rglob("*.yaml") if not p.name.endswith(".pipeline.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_the_packaged_recipes_load_and_name_the_schema(path: Path) -> None:
    assert load_recipe(path).model.model_name_or_path
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / first.partition("$schema=")[2]).resolve() == ROOT / SCHEMA_FILE


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: 1E-5", "learning_rate", 1e-5),
        ("learning_rate: '1e-5'", "learning_rate", 1e-5),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("num_train_epochs: 2", "num_train_epochs", 2.0),
        ("max_steps: 8.0", "max_steps", 8),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: '8'", "max_steps", 8),
        ("max_steps: 010", "max_steps", 10),
        ("max_steps: 1_000", "max_steps", 1000),
        ("max_steps: 0x10", "max_steps", 16),
        ("max_length: null", "max_length", None),
        ("max_length:", "max_length", None),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: 'no'", "save_strategy", "no"),
        ("full_determinism: yes", "full_determinism", True),
        ("full_determinism: off", "full_determinism", False),
        ("bf16: true", "bf16", True),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 1e10", "run_name", "1e10"),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: 12:30:00", "run_name", "12:30:00"),
        ("run_name: no", "run_name", "no"),
        ("report_to: none", "report_to", []),
        ("report_to: [none]", "report_to", []),
        ("report_to: []", "report_to", []),
        ("report_to: all", "report_to", ["wandb", "tensorboard"]),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("report_to: [wandb, wandb]", "report_to", ["wandb"]),
    ],
)
def test_values_mean_what_they_look_like(written: str, key: str, value: Any) -> None:
    found = getattr(load(train(written)).train, key)
    assert found == value
    assert type(found) is type(value)


def test_a_share_and_a_number_of_held_out_records_are_told_apart() -> None:
    assert load(section("data", "test_split_size: 0.1")).data.test_split_size == 0.1
    for written in ("512", "512.0"):
        size = load(section("data", f"test_split_size: {written}")).data.test_split_size
        assert size == 512
        assert isinstance(size, int)


def test_one_module_is_a_pattern_and_several_are_names() -> None:
    peft = load(section("peft", "use_peft: true\nlora_target_modules: .*q_proj\nlora_modules_to_save: lm_head")).peft
    assert peft.lora_target_modules == ".*q_proj"
    assert peft.lora_modules_to_save == ["lm_head"]
    peft = load(section("peft", "use_peft: true\nlora_target_modules: [q_proj, v_proj]")).peft
    assert peft.lora_target_modules == ["q_proj", "v_proj"]


def test_anchors_stand_for_their_values() -> None:
    recipe = load(train("per_device_train_batch_size: &rows 4\nper_device_eval_batch_size: *rows"))
    assert recipe.train.per_device_eval_batch_size == 4


def test_the_home_folder_is_expanded_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = load(
        """\
        model: {model_name_or_path: ~/models/opt}
        data: {dataset_name: ~/a.jsonl, dataset_test_split: ~/b.jsonl, chat_template_path: ~/c.jinja}
        output: {output_dir: ~/runs/one}
        train: {run_name: ~/x}
        """
    )
    assert recipe.model.model_name_or_path == "/home/ada/models/opt"
    assert recipe.data.dataset_name == "/home/ada/a.jsonl"
    assert recipe.data.dataset_test_split == "/home/ada/b.jsonl"
    assert recipe.data.chat_template_path == "/home/ada/c.jinja"
    assert recipe.output.output_dir == "/home/ada/runs/one"
    assert recipe.train.run_name == "~/x"


def test_a_byte_order_mark_is_not_part_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(tmp_path / "r.yaml").output.output_dir == "runs/one"


# Overrides


@pytest.mark.parametrize(
    ("words", "dotted", "value"),
    [
        (["train.max_steps=3"], "train.max_steps", 3),
        (["train.max_steps=3", "train.max_steps=4"], "train.max_steps", 4),
        (["train.learning_rate=1e-6"], "train.learning_rate", 1e-6),
        (["train.report_to=[]"], "train.report_to", []),
        (["train.report_to=none"], "train.report_to", []),
        (["train={seed: 5}"], "train.seed", 5),
        (["peft.use_peft=true", "peft.lora_target_modules=[q_proj,v_proj]"], "peft.lora_target_modules",
         ["q_proj", "v_proj"]),
        (["stage=sft"], "stage", "sft"),
        (["train.run_name=a: b # c"], "train.run_name", "a: b # c"),
        (["train.run_name='quoted'"], "train.run_name", "quoted"),
        (["train.run_name=a=b"], "train.run_name", "a=b"),
        (["data.dataset_name=*.jsonl"], "data.dataset_name", "*.jsonl"),
        (['data.response_template="### Answer:\\n"'], "data.response_template", "### Answer:\n"),
        (["data.response_template=### Answer: "], "data.response_template", "### Answer: "),
        (["train.max_length=null"], "train.max_length", None),
        (["train.seed=null"], "train.seed", 42),
        (["train=null"], "train.seed", 42),
        (["train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs.min_lr=1e-6"],
         "train.lr_scheduler_kwargs", {"min_lr": 1e-6}),
    ],
)  # fmt: skip
def test_the_command_line_overrides_the_file(words: list[str], dotted: str, value: Any) -> None:
    found: Any = load(train("seed: 7\nmax_steps: 9"), *words)
    for name in dotted.split("."):
        found = getattr(found, name)
    assert found == value


def test_an_override_mends_what_the_file_has_wrong() -> None:
    assert load(train("max_steps: eight"), "train.max_steps=8").train.max_steps == 8
    assert load("output: {output_dir: x}", "model.model_name_or_path=m", "data.dataset_name=d").data.dataset_name == "d"


def test_nested_keys_join_those_of_the_file() -> None:
    text = train("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: 2}")
    assert load(text, "train.lr_scheduler_kwargs.lr_end=0").train.lr_scheduler_kwargs == {"power": 2, "lr_end": 0}
    assert load(text, "train.lr_scheduler_kwargs.power=null").train.lr_scheduler_kwargs == {}


# Written out


def test_a_dumped_recipe_holds_every_key_and_loads_to_an_equal_one() -> None:
    recipe = load(section("peft", "use_peft: true\nlora_r: 8") + "train: {report_to: none}\n", "train.seed=5")
    text = dump_recipe(recipe)
    assert text.startswith("# ")
    keys = [line.split(":")[0] for line in text.splitlines() if line[0] not in "#- "]
    assert keys == list(Recipe.model_fields)
    assert all(f"\n  {key}:" in text for key in type(recipe.train).model_fields)
    assert load(text) == recipe


def test_a_dumped_recipe_means_the_same_to_a_reader_of_yaml_1_1() -> None:
    import yaml

    recipe = load(train("save_strategy: no\nlearning_rate: 1e-5\nrun_name: 1e10"))
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json")


def test_the_hash_is_that_of_the_settings_and_not_of_the_text() -> None:
    one = recipe_hash(load(MINIMAL))
    assert re.fullmatch("[0-9a-f]{64}", one)
    assert recipe_hash(load("# other\n" + train("warmup_steps: 0\nseed: 42"))) == one
    assert recipe_hash(load(dump_recipe(load(MINIMAL)))) == one
    assert recipe_hash(load(MINIMAL, "train.seed=43")) != one


# Schema and documentation


def test_the_schema_file_is_what_the_tree_says() -> None:
    assert (ROOT / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), "run: python -m sft_dist.recipe --write ."


def test_the_documentation_is_what_the_tree_says() -> None:
    assert (ROOT / DOCUMENT_FILE).read_text(encoding="utf-8") == document(), "run: python -m sft_dist.recipe --write ."


def test_both_files_are_written_by_one_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist.recipe", "--write", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()
    assert write_files(tmp_path) == [tmp_path / SCHEMA_FILE, tmp_path / DOCUMENT_FILE]


def test_the_schema_closes_every_section_and_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    assert "$id" not in schema
    assert schema["required"] == ["model", "data", "output"]
    assert schema["additionalProperties"] is False
    for name, kind in schema["$defs"].items():
        assert kind["additionalProperties"] is False, name
        for key, field in kind["properties"].items():
            assert field["description"].strip(), f"{name}.{key}"
    descriptions = re.findall(r'"description": ("(?:[^"\\]|\\.)*")', schema_text())
    assert len(descriptions) > 60
    assert all("\n" not in json.loads(text) for text in descriptions)


def test_the_documentation_has_a_row_for_every_key() -> None:
    text = document()
    for name, field in Recipe.model_fields.items():
        assert f"## {name}\n" in text
        for key in getattr(field.annotation, "model_fields", {}):
            assert re.search(rf"^\| `{key}` \| [^|]+ \| .*[^ |].* \|$", text, re.MULTILINE), key


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys, sft_dist.recipe\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'deepspeed', 'peft', 'numpy', 'launch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
