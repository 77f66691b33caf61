"""The sources of a mixture in a recipe: read, overridden, written out, and every fault told at its line."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
import yaml

from sft_dist.config import DataSection, MixtureSource
from sft_dist.data.mixture_sources import key_of, sources_of, title_of
from sft_dist.recipe import document, dump_recipe, json_schema
from tests.recipe_texts import faults, load

HEAD = "model: {model_name_or_path: m}\noutput: {output_dir: o}\n"
# The sources begin on line 5, their keys on lines 6 and 9.
MIXED = """\
model:
  model_name_or_path: facebook/opt-1.3b
data:
  mixture:
    chat:
      dataset_name: chat.jsonl
      weight: 3
    docs:
      dataset_name: python-docs
output:
  output_dir: runs/one
"""


def mixed(chat: str = "", data: str = "") -> str:
    """The recipe with keys added to its first source, as lines 6 and on, and to its data section, as lines 4 and on."""
    text = MIXED.replace("    chat:\n", "    chat:\n" + "".join(f"      {line}\n" for line in chat.splitlines()))
    return text.replace("data:\n", "data:\n" + "".join(f"  {line}\n" for line in data.splitlines()))


# What is read


def test_each_source_has_keys_of_its_own() -> None:
    mixture = load(mixed("format: messages\ndataset_config: a")).data.mixture
    assert mixture == {
        "chat": MixtureSource(dataset_name="chat.jsonl", weight=3, format="messages", dataset_config="a"),
        "docs": MixtureSource(dataset_name="python-docs"),
    }
    assert list(mixture) == ["chat", "docs"]


@pytest.mark.parametrize(
    ("words", "name", "key", "value"),
    [
        (["data.mixture.chat.weight=2"], "chat", "weight", 2.0),
        (["data.mixture.chat.weight=null"], "chat", "weight", None),
        (["data.mixture.chat.dataset_name=*.jsonl"], "chat", "dataset_name", "*.jsonl"),
        (["data.mixture.docs.format=text"], "docs", "format", "text"),
        (["data.mixture.code.dataset_name=code", "data.mixture.code.weight=.5"], "code", "weight", 0.5),
        (["data.mixture.docs={dataset_name: other, weight: 1}"], "docs", "dataset_name", "other"),
        (["data.mixture.chat.dataset_name=~/chat"], "chat", "dataset_name", "/home/ada/chat"),
    ],
)
def test_the_command_line_reaches_every_key(
    words: list[str], name: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert getattr((load(MIXED, *words).data.mixture or {})[name], key) == value


def test_the_command_line_takes_a_source_out_and_changes_between_one_and_several() -> None:
    assert list(load(MIXED, "data.mixture.docs=null").data.mixture or {}) == ["chat"]
    one = load(MIXED, "data.mixture=null", "data.dataset_name=a.jsonl").data
    assert (one.mixture, one.dataset_name) == (None, "a.jsonl")
    text = MIXED.replace("  mixture:", "  dataset_name: a.jsonl\n  mixture:")
    assert load(text, "data.dataset_name=null").data.mixture is not None


def test_a_mixture_survives_a_dump() -> None:
    recipe = load(mixed("formatting: a.b:c", "mixture_temperature: 2\nstopping_strategy: all_exhausted"))
    text = dump_recipe(recipe)
    assert load(text) == recipe
    assert yaml.safe_load(text) == recipe.model_dump(mode="json")


# Faults


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("wieght: 2", "chat.wieght: no such key, did you mean data.mixture.chat.weight"),
        ("probability: 2", "chat.probability: no such key, did you mean data.mixture.chat.weight"),
        ("split: a", "chat.split: no such key, did you mean data.mixture.chat.dataset_train_split"),
        ("packing: true", "chat.packing: no such key of a source; it belongs to data.packing, for all sources"),
        ("zzz: 1", "chat.zzz: no such key; a source has dataset_name, dataset_config, dataset_revision, "),
        ("format: mesages", "chat.format: expected one of auto, .*, got 'mesages', did you mean messages"),
        ("dataset_config: [a]", "chat.dataset_config: expected text or null, got a list"),
        ("formatting: a.b", "chat.formatting: expected package.module:function, got 'a.b'"),
        ("dataset_train_split: ''", "chat.dataset_train_split: must not be empty, got ''"),
    ],
)
def test_a_fault_within_a_source_names_its_line_and_key(written: str, said: str) -> None:
    (found,) = faults(mixed(written))
    assert re.match(rf"r\.yaml:6: data\.mixture\.{said}", found), found


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("0", "must be above 0, got 0"),
        ("-1", "must be above 0, got -1"),
        ("much", "expected a number or null, got 'much'"),
        (".inf", "expected a finite number, got .inf"),
        ("{a: 1}", "expected a number or null, got keys and values"),
    ],
)
def test_a_bad_weight_is_one_line(weight: str, said: str) -> None:
    assert faults(MIXED.replace("weight: 3", f"weight: {weight}")) == [f"r.yaml:7: data.mixture.chat.weight: {said}"]


def test_a_source_without_a_data_set_names_what_to_write() -> None:
    said = "data.mixture.chat.dataset_name: missing; write `dataset_name: python-docs` (or your own) under `chat:`"
    assert faults(MIXED.replace("      dataset_name: chat.jsonl\n", "")) == [f"r.yaml:5: {said}"]
    nothing = MIXED.replace("      dataset_name: chat.jsonl\n      weight: 3\n", "")
    assert faults(nothing) == [f"r.yaml:5: {said}"]
    assert faults(MIXED.replace("dataset_name: chat.jsonl", "path: chat.jsonl")) == [
        "r.yaml:6: data.mixture.chat.path: no such key, did you mean data.mixture.chat.dataset_name"
    ]
    assert faults(MIXED.replace(" chat.jsonl", "")) == [
        "r.yaml:6: data.mixture.chat.dataset_name: has no value; write one"
    ]


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ("{}", "data.mixture: names no source; write `NAME: {dataset_name: ...}` below it, or leave it out"),
        ("5", "data.mixture: expected keys and values or null, got 5"),
        ("[a, b]", "data.mixture: expected keys and values or null, got a list"),
        (
            "{a: b}",
            "data.mixture.a: expected the keys of a source, got 'b'; write `dataset_name: ...` here",
        ),
        ("{a.b: {dataset_name: c}}", "data.mixture.a.b: a name is made of letters, digits, - and _; rename it"),
        ("{a: {dataset_name: c}, a: {dataset_name: c}}", "data.mixture.a: given twice, on lines 4 and 4; keep one"),
    ],
)
def test_what_is_no_mixture_is_one_line(mixture: str, said: str) -> None:
    assert faults(f"{HEAD}data:\n  mixture: {mixture}\n") == [f"r.yaml:4: {said}"]


def test_all_faults_of_a_mixture_are_told_at_once() -> None:
    text = mixed("format: x\nwieght: 1").replace("weight: 3", "weight: 0").replace("python-docs", "''")
    assert [line.split(": ")[:2] for line in faults(text)] == [
        ["r.yaml:6", "data.mixture.chat.format"],
        ["r.yaml:7", "data.mixture.chat.wieght"],
        ["r.yaml:9", "data.mixture.chat.weight"],
        ["r.yaml:11", "data.mixture.docs.dataset_name"],
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.mixture.chat.weight=0", "data.mixture.chat.weight: must be above 0, got 0"),
        ("data.mixture.chat.wieght=1", "data.mixture.chat.wieght: no such key, did you mean data.mixture.chat.weight"),
        ("data.mixture.chat.weight.x=1", "data.mixture.chat.weight.x: data.mixture.chat.weight is one value, without"),
        ("data.mixture.chat.dataset_name=null", "data.mixture.chat.dataset_name: has no default to go back to"),
        ("data.mixture.code.weight=1", "data.mixture.code.dataset_name: missing; write `dataset_name: python-docs`"),
        ("data.mixture.code=a.jsonl", "data.mixture.code: expected the keys of a source, got 'a.jsonl'"),
    ],
)
def test_a_fault_of_the_command_line_is_told_as_such(word: str, said: str) -> None:
    (found,) = faults(MIXED, word)
    assert found.startswith(f"command line: {said}"), found


@pytest.mark.parametrize(
    ("data", "key", "said"),
    [
        ("dataset_name: a.jsonl", "mixture", "cannot stand with data.dataset_name, which is trained on alone"),
        (
            "dataset_config: a",
            "dataset_config",
            "each source of data.mixture has its own; write it as data.mixture.chat",
        ),
        ("dataset_revision: a", "dataset_revision", "each source of data.mixture has its own"),
        ("dataset_train_split: a", "dataset_train_split", "each source of data.mixture has its own"),
        ("format: text", "format", "each source of data.mixture has its own"),
        ("formatting: a:b", "formatting", "each source of data.mixture has its own"),
        (
            "dataset_test_split: test",
            "dataset_test_split",
            "test is no local file or folder, as it must be with data.mi",
        ),
        ("dataset_test_split: chat.jsonl", "dataset_test_split", "chat.jsonl is what is trained on; name other data"),
        ("mixture_temperature: 0", "mixture_temperature", "must be above 0, got 0"),
        (
            "stopping_strategy: first",
            "stopping_strategy",
            "expected first_exhausted or all_exhausted, got 'first'",
        ),
    ],
)
def test_what_cannot_stand_with_a_mixture_is_refused(data: str, key: str, said: str) -> None:
    text = mixed(data=data)
    (found,) = faults(text)
    line = next(n for n, t in enumerate(text.splitlines(), 1) if t.strip().startswith(f"{key}:"))
    assert found.startswith(f"r.yaml:{line}: data.{key}: {said}"), found


@pytest.mark.parametrize("data", ["mixture_temperature: 2", "stopping_strategy: all_exhausted"])
def test_settings_of_a_mixture_have_no_effect_without_one(data: str) -> None:
    (found,) = faults(f"{HEAD}data:\n  {data}\n  dataset_name: a\n")
    key = data.split(":")[0]
    assert found == f"r.yaml:4: data.{key}: has no effect without data.mixture; name sources there or leave this out"


def test_a_stream_needs_every_weight() -> None:
    text = mixed(data="streaming: true") + "train: {max_steps: 5}\n"
    assert faults(text) == [
        "r.yaml:4: data.streaming: the sizes of the sources are not known beforehand; set data.mixture.docs.weight"
    ]
    assert load(text, "data.mixture.docs.weight=1").data.streaming


def test_a_streamed_mixture_has_no_end_to_choose() -> None:
    text = mixed(data="streaming: true\nstopping_strategy: all_exhausted") + "train: {max_steps: 5}\n"
    weights = "data.mixture.docs.weight=1"
    (found,) = faults(text, weights)
    assert found.startswith("r.yaml:5: data.stopping_strategy: has no effect with data.streaming")
    assert load(text, weights, "data.stopping_strategy=first_exhausted").data.streaming
    assert load(text, weights, "data.streaming=false").data.stopping_strategy == "all_exhausted"


@pytest.mark.parametrize("data", ["dataset_test_split: ./test.jsonl", "test_split_size: 0.1", "deduplicate: true"])
def test_what_can_stand_with_a_mixture_is_not_refused(data: str) -> None:
    assert load(mixed(data=data)).data.mixture


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("datasets", "data.mixture"),
        ("dataset_mixer", "data.mixture"),
        ("mixtur", "data.mixture"),
        ("probabilities", "data.mixture"),
        ("temperature", "data.mixture_temperature"),
    ],
)
def test_names_of_other_tools_lead_to_the_mixture(key: str, meant: str) -> None:
    (found,) = faults(f"{HEAD}data:\n  {key}: 1\n  dataset_name: a\n")
    assert found.startswith(f"r.yaml:4: data.{key}: no such key") and found.endswith(f", did you mean {meant}"), found


def test_neither_a_source_nor_a_mixture_is_one_fault() -> None:
    missing = "r.yaml: data.dataset_name: missing; write `dataset_name: python-docs` (or your own) under `data:`"
    assert faults(HEAD) == [missing]
    assert faults(HEAD + "data: {mixture: null}\n") == [missing]
    assert faults(HEAD + "data: {dataset_name: ''}\n") == ["r.yaml:3: data.dataset_name: must not be empty, got ''"]
    said = "r.yaml:3: data.datasets: no such key, did you mean data.mixture"
    assert faults(HEAD + "data: {datasets: [a]}\n") == [said]


# Schema and documentation


def test_the_schema_and_the_documentation_have_the_keys_of_a_source() -> None:
    schema = json_schema()
    jsonschema.validate(yaml.safe_load(MIXED), schema)
    for text in (
        MIXED.replace("chat:", "ch.at:"),
        MIXED.replace("weight: 3", "weight: 0"),
        MIXED.replace("weight:", "wieght:"),
        MIXED.replace("mixture:", "mixtur:"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text), schema)
    table = document().partition("## data.mixture.NAME\n")[2].partition("\n## ")[0]
    assert all(f"| `{key}` | " in table for key in MixtureSource.model_fields)


# Sources


def test_every_key_of_a_source_but_its_weight_is_a_key_of_the_data_section() -> None:
    for key, field in MixtureSource.model_fields.items():
        if key != "weight":
            same = DataSection.model_fields[key]
            assert key == "dataset_name" or (field.annotation, field.default) == (same.annotation, same.default)


def test_each_source_of_a_mixture_is_as_if_it_were_the_only_one() -> None:
    data = load(mixed("format: messages\nformatting: a:b", "packing: true\nmixture_temperature: 2")).data
    sources = sources_of(data)
    assert sources == {
        "chat": DataSection(dataset_name="chat.jsonl", format="messages", formatting="a:b", packing=True),
        "docs": DataSection(dataset_name="python-docs", packing=True),
    }
    assert [key_of(data, name) for name in sources] == [
        "data.mixture.chat.dataset_name",
        "data.mixture.docs.dataset_name",
    ]
    assert title_of(data) == "chat + docs"


def test_one_data_set_is_its_own_only_source() -> None:
    data = DataSection(dataset_name="a.jsonl", format="text")
    assert sources_of(data) == {"a.jsonl": data}
    assert (key_of(data, "a.jsonl"), title_of(data)) == ("data.dataset_name", "a.jsonl")
