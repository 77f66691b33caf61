"""Whatever stands in a recipe file or on the command line: a recipe, or lines that name the place of each fault."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft_dist.config import MixtureSource, Recipe
from sft_dist.config_base import SOURCE_NAME
from sft_dist.errors import RecipeError
from sft_dist.recipe import dump_recipe, load_recipe, recipe_hash
from sft_dist.recipe_names import SECTIONS
from sft_dist.recipe_yaml import plain_value, read, write

VALID: dict[str, Any] = {
    "stage": "sft",
    "model": {"model_name_or_path": "facebook/opt-1.3b", "dtype": "bfloat16"},
    "data": {"dataset_name": "train.jsonl", "test_split_size": 0.1, "format": "auto"},
    "train": {
        "max_steps": 5,
        "learning_rate": 1e-4,
        "eval_strategy": "steps",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "bf16": None,
        "report_to": ["wandb"],
    },
    "peft": {"use_peft": True, "lora_target_modules": ["q_proj"]},
    "parallel": {"processes": 2, "global_batch_size": 32},
    "output": {"output_dir": "runs/x", "resume": True},
    "eval": {"temperature": 0.5},
}
MIXED: dict[str, Any] = VALID | {
    "data": {
        "test_split_size": 0.1,
        "stopping_strategy": "all_exhausted",
        "mixture": {
            "chat": {"dataset_name": "a.jsonl", "weight": 3},
            "docs": {"dataset_name": "python-docs", "format": "auto", "weight": None},
        },
    }
}
DOTTED = [f"{name}.{key}" for name, kind in SECTIONS.items() for key in kind.model_fields]
DOTTED += [f"data.mixture.{name}.{key}" for name in ("chat", "new") for key in MixtureSource.model_fields]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3)
)
names = st.sampled_from([d.rpartition(".")[2] for d in DOTTED]) | st.text(max_size=12)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A valid recipe with up to four keys or sections renamed, deleted, added or given other values."""
    recipe: dict[str, Any] = copy.deepcopy(draw(st.sampled_from([VALID, MIXED])))
    for _ in range(draw(st.integers(0, 4))):
        inner = [v for v in recipe.values() if isinstance(v, dict)]
        mixed = [v["mixture"] for v in inner if isinstance(v.get("mixture"), dict)]
        inner += [*mixed, *(v for mixture in mixed for v in mixture.values() if isinstance(v, dict))]
        target = draw(st.sampled_from([recipe, *inner]))
        key = draw(st.sampled_from(sorted(target, key=str)) if target else names)
        change = draw(st.sampled_from(["rename", "delete", "value", "add"]))
        if change == "add":
            target[draw(names)] = draw(anything)
        elif change == "value":
            target[key] = draw(anything)
        else:
            value = target.pop(key, None)
            if change == "rename":
                target[draw(names)] = value
    return recipe


def judged(text: str | bytes, overrides: list[str] | None = None) -> Recipe | None:
    """The recipe of a text. Fails unless it is one, or is refused by lines of the promised form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            return load_recipe(path, overrides or [])
        except RecipeError as error:
            said = str(error)
        form = re.compile(rf"{re.escape(str(path))}(:\d+)?: \S|command line: ")
        assert said.splitlines() == said.split("\n")
        assert [line for line in said.split("\n") if not form.match(line)] == []
        return None


def round_trip(recipe: Recipe) -> None:
    again = judged(dump_recipe(recipe))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_recipe_that_is_mutated_is_valid() -> None:
    assert judged(yaml.safe_dump(VALID)) is not None
    assert judged(yaml.safe_dump(MIXED)) is not None


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_a_mutated_recipe_is_read_or_refused_and_what_is_read_survives_a_dump(recipe: dict[str, Any]) -> None:
    found = judged(yaml.safe_dump(recipe, allow_unicode=True))
    if found is not None:
        round_trip(found)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_recipe_with_a_few_characters_changed_is_read_or_refused(data: st.DataObject) -> None:
    text = yaml.safe_dump(data.draw(st.sampled_from([VALID, MIXED])), sort_keys=False)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        put = data.draw(st.text(st.sampled_from("\t\n :-#'\"[]{}*&!|>%@`,?~<=01.eE_x\0\x85\u2028é"), max_size=4))
        text = text[:at] + put + text[at + cut :]
    found = judged(text)
    if found is not None:
        round_trip(found)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60))
@example("%YAML 1.99999999999999999999999\n---\na: 1")
@example('"\\UFFFFFFFF"')
@example("&a [*a]")
@example("? ? ? a")
def test_any_file_is_read_or_refused(content: str | bytes) -> None:
    judged(content)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds("{}={}".format, st.sampled_from(DOTTED) | st.text(max_size=12), st.text(max_size=12))
        | st.builds(lambda d, v: f"{d}={yaml.safe_dump(v)}", st.sampled_from([*DOTTED, *SECTIONS]), anything)
        | st.text(max_size=12),
        max_size=4,
    ),
    st.sampled_from([VALID, MIXED]),
)
def test_any_override_is_taken_or_refused(overrides: list[str], recipe: dict[str, Any]) -> None:
    found = judged(yaml.safe_dump(recipe), overrides)
    if found is not None:
        round_trip(found)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
_words = ["no", "1e-5", "010", "0o17", "~", "null", "2024-01-01", "1:30", ".5", "1_0", "+.inf", "a: b", "a #b", "- a"]
_signs = ["", " ", "<<", "=", "\ufeff", "\x85", "\u2028", "\n", "a\n", "\n a", "\t", "'", '"', "🙂"]
tricky = st.sampled_from(_words + _signs)


one_source = {"dataset_name": (texts | tricky).map("d{}".format), "dataset_config": st.none() | texts | tricky}
mixtures = st.dictionaries(
    st.sampled_from(["no", "1", "1e5", "null", "-", "0o17", "_", "yes"]) | st.from_regex(SOURCE_NAME, fullmatch=True),
    st.fixed_dictionaries(one_source, optional={"weight": st.none() | st.floats(1e-300, 1e300)}),
    min_size=1,
    max_size=3,
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes without faults, with difficult texts and numbers."""
    text = draw(texts | tricky) or "x"
    positive = st.integers(1, 2**40)
    number = st.floats(1e-300, 1e300)
    sections = {
        "model": {"model_name_or_path": f"m{text}"},
        "data": {
            **draw(st.fixed_dictionaries({"mixture": mixtures}) | st.fixed_dictionaries(one_source)),
            "test_split_size": draw(st.floats(0, 0.99) | positive),
            "response_template": draw(st.none() | texts | tricky),
        },
        "train": {
            "run_name": text,
            "learning_rate": draw(number),
            "weight_decay": draw(number),
            "max_steps": draw(positive),
            "warmup_steps": draw(st.integers(0, 2**40)),
            "gradient_checkpointing_kwargs": draw(st.none() | st.dictionaries(texts | tricky, nested, max_size=3)),
            "report_to": draw(st.sampled_from(["none", "all", "wandb", ["tensorboard"]])),
        },
        "peft": {"use_peft": True, "lora_target_modules": draw(st.lists(st.text("ab.:1", min_size=1), min_size=1))},
        "output": {"output_dir": f"o{text}"},
        "eval": {"temperature": draw(number)},
    }
    return Recipe.model_validate(sections)


finite = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
nested = st.recursive(
    finite | texts | tricky, lambda s: st.lists(s, max_size=3) | st.dictionaries(texts | tricky, s, max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(recipes())
def test_every_recipe_survives_a_dump(recipe: Recipe) -> None:
    round_trip(recipe)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(texts | tricky, nested, max_size=3))
def test_what_is_written_means_the_same_under_both_versions_of_yaml(values: dict[str, Any]) -> None:
    text = write(values)
    assert yaml.safe_load(text) == values
    assert read(text)[1] == []


@given(st.integers(-(2**80), 2**80) | st.floats(allow_nan=False))
def test_numbers_are_read_as_python_writes_them(value: float) -> None:
    if abs(value) != float("inf"):
        assert plain_value(repr(value)) == value
