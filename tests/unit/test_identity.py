"""What makes a run the same run: every setting that bears on its numbers, and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import create_model

from sft_dist.config import Recipe, TrainSection
from sft_dist.config_base import Section
from sft_dist.errors import UserError
from sft_dist.identity import differences, recipe_hash, refuse_other_run
from sft_dist.recipe import dump_recipe, load_recipe
from sft_dist.recipe import recipe_hash as hash_of_all
from sft_dist.recipe_names import SECTIONS
from tests.recipes import ROOT

BASE: dict[str, Any] = {
    "model": {"model_name_or_path": "org/model"},
    "data": {"dataset_name": "org/data"},
    "output": {"output_dir": "runs/x"},
}
FREE_SECTIONS = ("output", "eval", "parallel", "checkpoint", "guard")
# As the promise has it, written out.
FREE = {f"{name}.{key}" for name in FREE_SECTIONS for key in SECTIONS[name].model_fields}
FREE |= {
    "train.per_device_train_batch_size",
    "train.per_device_eval_batch_size",
    "train.gradient_accumulation_steps",
    "train.save_strategy",
    "train.save_steps",
    "train.logging_steps",
    "train.logging_first_step",
    "train.report_to",
    "train.run_name",
    "train.dataloader_num_workers",
    "train.eval_strategy",
    "train.eval_steps",
    "train.gradient_checkpointing",
    "train.gradient_checkpointing_kwargs",
    "data.dataset_num_proc",
    "data.max_bad_records",
}
EVERY = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({name: BASE.get(name, {}) | sections.get(name, {}) for name in {**BASE, **sections}})


def mixture(*sources: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"dataset_name": "", "mixture": dict(sources)}


def with_value(base: Recipe, dotted: str, value: Any) -> Recipe:
    """A recipe with one value, whether of its type or not."""
    name, key = dotted.split(".")
    return base.model_copy(update={name: getattr(base, name).model_copy(update={key: value})})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("dotted", EVERY)
def test_every_setting_makes_another_run_but_those_that_do_not_bear_on_numbers(dotted: str) -> None:
    old = recipe()
    new = with_value(old, dotted, "changed")
    found = differences(old, new)
    if dotted in FREE:
        assert found == [] and recipe_hash(new) == recipe_hash(old)
    else:
        assert len(found) == 1 and found[0].startswith(f"{dotted}: ") and found[0].endswith(" there, changed here")
        assert recipe_hash(new) != recipe_hash(old)


def test_the_settings_are_those_that_the_test_knows() -> None:
    assert set(EVERY) >= FREE
    assert {"train.learning_rate", "train.max_steps", "train.seed", "model.dtype", "peft.lora_r"} <= set(EVERY) - FREE


def test_a_difference_shows_both_values() -> None:
    old = recipe(train={"learning_rate": 2e-5, "bf16": None}, data={"packing": False})
    new = recipe(train={"learning_rate": 1e-5, "bf16": True}, data={"packing": "required", "response_template": "a\nb"})
    assert differences(old, new) == [
        "data.response_template: null there, \"a\\nb\" here",
        "data.packing: false there, required here",
        "train.learning_rate: 2e-05 there, 1e-05 here",
        "train.bf16: null there, true here",
    ]  # fmt: skip
    assert differences(new, new) == []


def test_another_stage_is_another_run() -> None:
    assert differences(recipe(), recipe().model_copy(update={"stage": "rm"})) == ["stage: sft there, rm here"]


def test_long_values_are_shortened_at_neither_end() -> None:
    one, other = (recipe(model={"model_name_or_path": f"/start/{'x' * 500}/{end}"}) for end in ("one", "other"))
    (line,) = differences(one, other)
    assert len(line) < 300
    assert "/start/" in line and "xx/one there" in line and "xx/other here" in line


@pytest.mark.parametrize("name", ["checkpoint", "guard"])
def test_sections_on_safety_may_change(name: str) -> None:
    assert _with_section(name, 1) == 0


def test_what_is_not_known_yet_bears_on_the_numbers() -> None:
    assert _with_section("novel", 1) == 1
    train = create_model("Train", __base__=TrainSection, novel=(int, 0), logging_novel=(int, 0))
    later = create_model("Later", __base__=Recipe, train=(train, train()))
    old = later.model_validate(BASE)
    assert differences(old, with_value(old, "train.novel", 1)) == ["train.novel: 0 there, 1 here"]
    assert differences(old, with_value(old, "train.logging_novel", 1)) == []


def _with_section(name: str, value: int) -> int:
    """How many differences a section of that name makes."""
    section = create_model("New", __base__=Section, key=(int, 0))
    later = create_model("Later", __base__=Recipe, **{name: (section, section())})  # type: ignore[call-overload]
    old = later.model_validate(BASE)
    new = with_value(old, f"{name}.key", value)
    assert (recipe_hash(old) == recipe_hash(new)) == (differences(old, new) == [])
    return len(differences(old, new))


@pytest.mark.parametrize(
    ("section", "key"), [("model", "model_name_or_path"), ("data", "dataset_name"), ("data", "dataset_test_split")]
)
def test_the_same_path_written_otherwise_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = ["here", "./here", "here/", "../" + tmp_path.name + "/here", "~/here", str(tmp_path / "here")]
    same = [recipe(**{section: {key: way}}) for way in ways]
    assert [differences(same[0], other) for other in same] == [[]] * len(ways)
    # Reading a recipe expands the tilde of most paths already.
    same.append(with_value(same[0], f"{section}.{key}", "~/here"))
    assert len({recipe_hash(each) for each in same}) == 1
    assert differences(same[0], recipe(**{section: {key: "there"}})) == [f"{section}.{key}: here there, there here"]


def test_a_template_and_the_sources_of_a_mixture_are_paths_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = recipe(data={**mixture(("a", {"dataset_name": "a.jsonl"})), "chat_template_path": "t.jinja"})
    other = recipe(data={**mixture(("a", {"dataset_name": str(tmp_path / "a.jsonl")})),
                         "chat_template_path": "./t.jinja"})  # fmt: skip
    assert differences(one, other) == [] and recipe_hash(one) == recipe_hash(other)


def test_a_name_on_the_hub_is_the_same_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = [recipe(), recipe(data=mixture(("a", {"dataset_name": "org/data"})))]
    before = [recipe_hash(one) for one in each]
    monkeypatch.chdir(tmp_path)
    assert [recipe_hash(one) for one in each] == before


def test_the_order_of_a_mixture_bears_on_the_numbers() -> None:
    a, b, c = ((name, {"dataset_name": f"org/{name}"}) for name in "abc")
    old, new = recipe(data=mixture(a, b)), recipe(data=mixture(b, a))
    assert old == new and hash_of_all(old) == hash_of_all(new)
    assert differences(old, new) == ["data.mixture: in the order a, b there, b, a here"]
    assert recipe_hash(old) != recipe_hash(new)
    heavier = recipe(data=mixture(("b", {"dataset_name": "org/b", "weight": 3}), a))
    assert differences(old, heavier)[1:] == ["data.mixture.b.weight: null there, 3.0 here"]
    (line,) = differences(old, recipe(data=mixture(a, b, c)))
    assert line.startswith('data.mixture.c: not set there, {"dataset_name": "org/c", ')


sources = st.permutations("abc").flatmap(
    lambda names: st.lists(st.sampled_from([None, 1, 2.0]), min_size=1, max_size=3).map(
        lambda weights: mixture(*((name, {"dataset_name": f"org/{name}", "weight": w})
                                  for name, w in zip(names, weights, strict=False)))))  # fmt: skip
kwargs = st.none() | st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from([1, 1.0, True, "1", 2, None]))
recipes = st.builds(
    lambda data, schedule, rate, dtype, folder, steps: recipe(
        data=data,
        train={"lr_scheduler_kwargs": schedule, "learning_rate": rate, "save_steps": steps},
        model={"dtype": dtype},
        output={"output_dir": folder},
    ),
    sources | st.just({}),
    kwargs,
    st.sampled_from([1, 1.0, 2e-5]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["a", "b"]),
    st.integers(1, 3),
)


@settings(max_examples=150, deadline=None)
@given(recipes, recipes)
def test_hashes_are_equal_where_and_only_where_nothing_differs(old: Recipe, new: Recipe) -> None:
    found = differences(old, new)
    assert (recipe_hash(old) == recipe_hash(new)) == (found == [])
    assert bool(differences(new, old)) == bool(found)
    assert all(len(line.splitlines()) == 1 and " there, " in line and line.endswith(" here") for line in found)


def test_a_whole_number_is_the_same_with_and_without_a_point_and_is_not_true() -> None:
    one, point, true = (recipe(train={"lr_scheduler_kwargs": {"power": value}}) for value in (1, 1.0, True))
    assert differences(one, point) == [] and recipe_hash(one) == recipe_hash(point)
    assert differences(one, true) == ["train.lr_scheduler_kwargs.power: 1 there, true here"]


def held(root: Path, one: Recipe) -> Path:
    root.mkdir()
    (root / "recipe.yaml").write_text(dump_recipe(one))
    return root


def test_a_run_is_resumed_with_its_own_recipe(tmp_path: Path) -> None:
    refuse_other_run(tmp_path, recipe())
    root = held(tmp_path / "x", recipe(output={"output_dir": str(tmp_path), "overwrite": True}))
    refuse_other_run(root, recipe(output={"resume": True}, train={"save_steps": 7}, parallel={"processes": 2}))


def test_a_run_of_another_recipe_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = held(Path("x"), recipe(model={"model_name_or_path": "a"}, train={"seed": 1}))
    with pytest.raises(UserError) as refused:
        refuse_other_run(root, recipe(model={"model_name_or_path": "b"}, train={"seed": 2}))
    assert str(refused.value) == (
        "output.resume: x is a run of another recipe: model.model_name_or_path: a there, b here; "
        "train.seed: 1 there, 2 here; resume with its own recipe (x/recipe.yaml), or name another output.output_dir"
    )


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, "; and 1 more"), (7, "; and 2 more")])
def test_five_differences_are_told_and_the_others_counted(tmp_path: Path, count: int, more: str) -> None:
    changed = {"learning_rate": 1.0, "weight_decay": 1.0, "adam_beta1": 0.5, "adam_beta2": 0.5, "seed": 1,
               "data_seed": 1, "full_determinism": True}  # fmt: skip
    root = held(tmp_path / "x", recipe())
    with pytest.raises(UserError) as refused:
        refuse_other_run(root, recipe(train=dict(list(changed.items())[:count])))
    said = str(refused.value)
    assert said.count(" there, ") == 5 and f"{more}; resume with its own recipe (" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {old_key: 1}", r"recipe\.yaml:\d+: train\.old_key: no such key"),
        ("train: {old_key: 1, older: 2}", r"train\.old_key: no such key.*; and 1 more; resume with the version"),
        ("", "the file is empty"),
        ("a: [", r"recipe\.yaml:1"),
    ],
    ids=["key", "keys", "empty", "yaml"],
)
def test_a_recipe_of_another_version_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{text}\n{yaml.safe_dump(BASE)}" if "train" in text else text)
    with pytest.raises(UserError, match=rf"^output\.resume: .*{said}") as refused:
        refuse_other_run(tmp_path, recipe())
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).endswith("; resume with the version that wrote it, or name another output.output_dir")


def test_what_was_resolved_and_written_is_the_run_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE | {"train": {"warmup_steps": 10, "lr_scheduler_type": "cosine"}}))
    root = held(tmp_path / "x", load_recipe(path))
    refuse_other_run(root, load_recipe(path, ["output.resume=true", f"output.output_dir={root}"]))
    for order in ("ab", "ba"):
        one = recipe(data=mixture(*((name, {"dataset_name": f"org/{name}"}) for name in order)))
        refuse_other_run(held(tmp_path / order, one), one)
    with pytest.raises(UserError, match=r"train\.warmup_steps: 10\.0 there, 20\.0 here"):
        refuse_other_run(root, load_recipe(path, ["train.warmup_steps=20"]))


def test_identity_is_free_of_torch() -> None:
    code = "import sys, sft_dist.identity; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "pyarrow"} & set(done.stdout.split())
