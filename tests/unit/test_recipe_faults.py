"""Every fault of a recipe is told in one line that names file, line and key, and what was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sft_dist import recipe_names
from sft_dist.errors import RecipeError
from sft_dist.recipe import load_recipe
from tests.recipe_texts import MINIMAL, faults, section, train

# Files that are no recipe

SECTIONS_TOLD = "stage, model, data, train, reward, dpo, ppo, peft, parallel, checkpoint, guard, output, eval"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the file is empty; a recipe has the sections model, data,"),
        ("# nothing\n---\n", "r.yaml: the file is empty"),
        ("\n- model\n", "r.yaml:2: not a recipe: expected the sections model, data, train, .*, got a list"),
        ("hello", "r.yaml:1: not a recipe: .*, got 'hello'"),
        ("train:\n\tmax_steps: 3", "r.yaml:2: not valid YAML: a tab stands here; indent with spaces"),
        ("train:\n  a: 1\n b: 2", "r.yaml:3: not valid YAML: the indentation does not fit"),
        ("train: a: 1", "r.yaml:1: not valid YAML: a ':' where no key can stand"),
        ("train:\n  - 1\nb", "r.yaml:3: not valid YAML: a line that is neither a key"),
        ("model:\n  a: 'x\nb: 2\n", "r.yaml:2: not valid YAML: a quote or a bracket is not closed"),
        ("model:\n  a: [x\nb: 2\n", "r.yaml:2: not valid YAML: a quote or a bracket is not closed"),
        ("model:\n  a: @x", "r.yaml:2: not valid YAML: a value cannot begin with '@'; put it in quotes"),
        ("model:\n  a: *x", "r.yaml:2: not valid YAML: no anchor 'x' above"),
        ("--- a\n--- b", "r.yaml:2: not valid YAML: a second document begins"),
        ("a: 1\nb: \x01", r"r.yaml:2: not valid YAML: the character U\+0001 is not allowed"),
        ('a: 1\nb: "\\Uffffffff"', "r.yaml:2: not valid YAML: a number in an escape or a directive is too large"),
        ("[" * 5000, "r.yaml: not valid YAML: it is nested too deeply"),
        ("a: " + "x" * 300_000, "r.yaml: not a recipe: larger than 256 kB"),
    ],
)
def test_text_that_is_no_recipe_is_one_fault(text: str, message: str) -> None:
    found = faults(text)
    assert len(found) == 1
    assert re.match(message, found[0]), found[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: !!python/object/apply:os.abort []\n",
            "r.yaml:1: run: the tag !!python/object/apply:os.abort is not read",
        ),
        ("train: !!set {a}\n", "r.yaml:1: train: the tag !!set is not read; leave it out"),
        ("train: {seed: !!int 3}\n", "r.yaml:1: train.seed: the tag !!int is not read; leave it out"),
        ('train: {run_name: "a\\0b"}\n', "r.yaml:1: train.run_name: holds a character that no text can have"),
        ('train: {run_name: "\\ud800"}\n', "r.yaml:1: train.run_name: holds a character that no text can have"),
        ("? [a]\n: b\n", "r.yaml:1: a key must be a plain word"),
        (
            '" ": 1\n',
            f"r.yaml:1: ' ': no such section; a recipe has {SECTIONS_TOLD}",
        ),
        ("peft: &a\n  lora_r: *a\n", "r.yaml:2: peft.lora_r: nested too deeply"),
        ("train: &a {seed: 1}\npeft:\n  <<: *a\n", "r.yaml:3: peft.<<: merge keys are not read; write the keys out"),
    ],
)
def test_what_yaml_can_and_a_recipe_cannot(text: str, message: str) -> None:
    found = [line for line in faults(text) if "missing" not in line]
    assert len(found) == 1
    assert re.match(message, found[0]), found[0]


def test_aliases_cannot_make_a_small_file_large() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    found = faults("\n".join(lines))
    assert sum("too many values; write it out shorter" in line for line in found) == 1


def test_a_key_that_is_given_twice_names_both_lines() -> None:
    text = MINIMAL + "train:\n  max_steps: 3\n  seed: 1\n  max_steps: 7\ntrain:\n  seed: 2\n"
    assert faults(text) == [
        "r.yaml:10: train.max_steps: given twice, on lines 8 and 10; keep one",
        "r.yaml:11: train: given twice, on lines 7 and 11; keep one",
    ]


def test_a_missing_file_names_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text(MINIMAL)
    for path, message in {
        "stf.yaml": "stf.yaml: no such file, did you mean sft.yaml",
        "zzzzzzzz": "zzzzzzzz: no such file; give the path of a recipe",
        "no/sft.yaml": "no/sft.yaml: no such file, nor is there a folder no",
        ".": ".: is a folder; name a recipe file, did you mean sft.yaml",
        "sft.yaml/x": "sft.yaml/x: cannot be read: Not a directory",
        "a\0b": r"a\x00b: cannot be read: embedded null byte",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == message


def test_a_file_that_may_not_be_read_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # A mode of 0 would not keep root out.
    monkeypatch.setattr("sft_dist.recipe.open", denied, raising=False)
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"/r\.yaml: cannot be read: Permission denied$"):
        load_recipe(path)


def test_a_file_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(MINIMAL.encode() + "# café\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"/r\.yaml: not UTF-8 \(byte \d+, line 7\); save the file as UTF-8$"):
        load_recipe(path)


# Names


@pytest.mark.parametrize(
    ("where", "key", "said"),
    [
        ("train", "learning_rat", "no such key, did you mean train.learning_rate"),
        ("train", "Max_Steps", "no such key, did you mean train.max_steps"),
        ("train", "output_dir", "no such key here; it belongs to output.output_dir"),
        ("train", "lora_r", "no such key here; it belongs to peft.lora_r"),
        ("train", "lora_alpa", "no such key, did you mean peft.lora_alpha"),
        ("train", "zzz", "no such key; `sft-dist schema` prints all keys"),
        ("parallel", "zzz", "no such key; parallel has strategy, offload_nvme_path, processes, global_batch_size"),
        ("train", "batch_size", "no such key, did you mean train.per_device_train_batch_size"),
        ("train", "lr", "no such key, did you mean train.learning_rate"),
        ("train", "epochs", "no such key, did you mean train.num_train_epochs"),
        ("train", "max_seq_length", "no such key, did you mean train.max_length"),
        ("train", "evaluation_strategy", "no such key, did you mean train.eval_strategy"),
        ("train", "packing", "no such key here; it belongs to data.packing"),
        ("train", "fp16", "no such key: .*, did you mean train.bf16"),
        ("train", "warmup_ratio", "no such key: .*, did you mean train.warmup_steps"),
        ("train", "deepspeed", "no such key: .*, did you mean parallel.strategy"),
        ("model", "name", "no such key, did you mean model.model_name_or_path"),
        ("model", "name_or_path", "no such key, did you mean model.model_name_or_path"),
        ("model", "torch_dtype", "no such key, did you mean model.dtype"),
        ("data", "path", "no such key, did you mean data.dataset_name"),
        ("data", "dataset", "no such key, did you mean data.dataset_name"),
        ("peft", "r", "no such key, did you mean peft.lora_r"),
        ("eval", "num_prompt", "no such key, did you mean eval.num_prompts"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(where: str, key: str, said: str) -> None:
    (found,) = faults(section(where, f"{key}: 1"))
    assert re.fullmatch(rf"r\.yaml:\d+: {where}\.{key}: {said}", found), found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trian", "no such section, did you mean train"),
        ("training", "no such section, did you mean train"),
        ("lora", "no such section, did you mean peft"),
        ("learning_rate", "no such section; it belongs to train.learning_rate"),
        ("max_seq_length", "no such section, did you mean train.max_length"),
        ("train.seed", "no such section; write seed under `train:`"),
        (
            "zzz",
            f"no such section; a recipe has {SECTIONS_TOLD}",
        ),
    ],
)
def test_an_unknown_section_names_the_one_that_was_meant(name: str, said: str) -> None:
    assert faults(f"{MINIMAL}{name}: 1\n") == [f"r.yaml:7: {name}: {said}"]


def test_names_that_other_tools_use_lead_to_keys_that_exist() -> None:
    meant = [*recipe_names._NEW_NAMES.values(), *(m for _, m in recipe_names._REASONS.values() if m)]
    for dotted in meant:
        name, key = dotted.split(".")
        assert key in recipe_names.SECTIONS[name].model_fields, dotted
    assert set(recipe_names._NEW_SECTIONS.values()) <= set(recipe_names.SECTIONS)
    for old in recipe_names._NEW_NAMES:
        assert all(old not in kind.model_fields for kind in recipe_names.SECTIONS.values()), old


# Values


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("max_steps: eight", "expected a whole number, got 'eight'"),
        ("max_steps: 2.5", "expected a whole number, got 2.5"),
        ("max_steps: true", "expected a whole number, got true"),
        ("max_steps: [1]", "expected a whole number, got a list"),
        ("max_steps: {a: 1}", "expected a whole number, got keys and values"),
        ("max_steps: .inf", "expected a whole number, got .inf"),
        ("max_steps: 99999999999999999999", "expected a whole number, got 99999999999999999999"),
        ("max_steps:", "has no value; write one"),
        ("learning_rate: fast", "expected a number, got 'fast'"),
        ("learning_rate: 1,5", "expected a number, got '1,5'"),
        ("learning_rate: true", "expected a number, got true"),
        ("learning_rate: .nan", "expected a finite number, got .nan"),
        ("learning_rate: 1e999", "expected a finite number, got 1e999"),
        ("learning_rate: 0", "must be above 0, got 0"),
        ("weight_decay: -0.1", "must be at least 0, got -0.1"),
        ("adam_beta1: 1", "must be below 1, got 1"),
        ("max_length: 1", "must be at least 2, got 1"),
        ("max_length: abc", "expected a whole number or null, got 'abc'"),
        ("seed: 4294967296", "must be below 4294967296, got 4294967296"),
        ("max_steps: -2", "must be at least -1, got -2"),
        ("bf16: maybe", "expected true, false or null, got 'maybe'"),
        ("full_determinism: 1", "expected true or false, got 1"),
        ("run_name: true", "expected text or null, got true"),
        ("run_name: [a]", "expected text or null, got a list"),
        ("eval_strategy: step", "expected no, steps or epoch, got 'step', did you mean steps"),
        ("eval_strategy: false", "expected no, steps or epoch, got false, did you mean no"),
        ("optim: adamw", "expected one of adamw_torch, .*, sgd, got 'adamw', did you mean adamw_torch"),
        ("report_to: mlflow", "expected wandb or tensorboard, got 'mlflow'"),
        ("report_to: [wandb, mlflow]", "item 2: expected wandb or tensorboard, got 'mlflow'"),
        ("report_to: {a: 1}", "expected a list, got keys and values"),
        ("lr_scheduler_kwargs: 3", "expected keys and values or null, got 3"),
        ("lr_scheduler_kwargs: {min_lr: .inf}", "expected a finite number, got .inf"),
        ("run_name: {x: " + "y" * 9 + "}", "expected text or null, got keys and values"),
        ("max_steps: " + "x" * 500, "expected a whole number, got 'x+[.][.][.]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_plain_words(written: str, said: str) -> None:
    (found,) = faults(train(written))
    assert re.fullmatch(rf"r\.yaml:8: train\.{written.split(':')[0]}: {said}", found), found


def test_a_section_must_have_keys() -> None:
    assert faults(MINIMAL + "train: 5\npeft: [a]\n") == [
        "r.yaml:7: train: expected the keys of a section, got 5",
        "r.yaml:8: peft: expected the keys of a section, got a list",
    ]


def test_the_stage_is_one_that_exists() -> None:
    told = "expected one of sft, reward, dpo, ppo, got 'stf', did you mean sft"
    assert faults("stage: stf\n" + MINIMAL) == [f"r.yaml:1: stage: {told}"]


def test_what_is_missing_is_named_with_what_to_write() -> None:
    assert faults("train: {seed: 1}") == [
        (
            "r.yaml: model.model_name_or_path: missing; write `model_name_or_path: facebook/opt-1.3b` (or your own) "
            "under `model:`"
        ),
        "r.yaml: data.dataset_name: missing; write `dataset_name: python-docs` (or your own) under `data:`",
        "r.yaml: output.output_dir: missing; write `output_dir: runs/my-run` (or your own) under `output:`",
    ]


def test_a_required_key_under_a_wrong_name_is_one_fault() -> None:
    assert faults(MINIMAL.replace("model_name_or_path", "model_nam_or_path").replace("output:", "ouput:")) == [
        "r.yaml:2: model.model_nam_or_path: no such key, did you mean model.model_name_or_path",
        "r.yaml:5: ouput: no such section, did you mean output",
    ]
    assert faults(MINIMAL.replace(" runs/one", " ''").replace(" train.jsonl", "")) == [
        "r.yaml:4: data.dataset_name: has no value; write one",
        "r.yaml:6: output.output_dir: must not be empty, got ''",
    ]


def test_all_faults_are_told_at_once_in_the_order_of_the_file() -> None:
    found = faults(
        MINIMAL + "train:\n  lr: 1\n  max_steps: x\n  seed: -1\nparallel: {strategy: single, processes: 2}\n",
        "nonsense",
        "eval.num_prompts=-3",
    )
    assert [line.rpartition(": ")[0].split(": ")[:2] for line in found] == [
        ["r.yaml:8", "train.lr"],
        ["r.yaml:9", "train.max_steps"],
        ["r.yaml:10", "train.seed"],
        ["r.yaml:11", "parallel.strategy"],
        ["command line", "nonsense"],
        ["command line", "eval.num_prompts"],
    ]


def test_every_message_is_one_line_whatever_it_quotes() -> None:
    found = faults('model: {"a\\nb\\u2028": "c\\nd"}\nstage: "x\\ny"\n', "a\nb")
    assert len(found) == len("\n".join(found).splitlines())


# Overrides


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_steps", "max_steps: not of the form section.key=value"),
        ("=3", "=3: not of the form section.key=value"),
        ("train..seed=3", "train..seed=3: not of the form section.key=value"),
        ("", "'': not of the form section.key=value"),
        ("train.lr=3", "train.lr: no such key, did you mean train.learning_rate"),
        ("trian.seed=3", "trian: no such section, did you mean train"),
        ("seed=3", "seed: no such section; it belongs to train.seed"),
        ("train.seed=x", "train.seed: expected a whole number, got 'x'"),
        ("train.seed=-1", "train.seed: must be at least 0, got -1"),
        ("train.seed.x=1", "train.seed.x: train.seed is one value, without keys below it"),
        ("train.report_to=[a", "train.report_to: not valid YAML: a quote or a bracket is not closed"),
        ("train={seed: 1, seed: 2}", "train.seed: given twice; keep one"),
        ("train=5", "train: expected the keys of a section, got 5"),
        ("output.output_dir=null", "output.output_dir: has no default to go back to; give a value"),
        ("output.output_dir=", "output.output_dir: has no default to go back to; give a value"),
        ("output=null", "output: has no default to go back to; give a value"),
        ("output.output_dir=a\udcff", "output.output_dir: holds a character that no text can have"),
        ("parallel.global_batch_size=9", "parallel.global_batch_size: 9 rows do not divide over micro-batches of 8"),
    ],
)
def test_a_fault_of_the_command_line_is_told_as_such(word: str, said: str) -> None:
    (found,) = faults(MINIMAL, word)
    assert found.startswith(f"command line: {said}"), found


def test_malformed_overrides_are_told_even_where_the_file_cannot_be_read() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("none.yaml", ["max_steps"])
    assert [line.split(":")[0] for line in str(caught.value).split("\n")] == ["none.yaml", "command line"]
