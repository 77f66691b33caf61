"""The command answers at once, and nothing of the control plane pays for torch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli, recipe_files
from sft_dist.errors import RecipeError
from sft_dist.recipe import json_schema, load_recipe
from tests.recipes import ROOT, sft_dist

HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "peft", "numpy", "pyarrow")
MODULES = sorted(f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__")
# The part of the training plane that the control plane may use.
SHARED = ["sft_dist.errors", "sft_dist.recipe", "sft_dist.rundir", "sft_dist.modelinfo", "sft_dist.hardware",
          "sft_dist.paths", "sft_dist.builtin_models", "sft_dist.data.sources",
          "sft_dist.render.comparison", "sft_dist.render.checkpoints",
          "sft_dist.checkpoints.listing"]  # fmt: skip


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("module", [*MODULES, *SHARED])
def test_no_module_of_the_control_plane_imports_torch(module: str) -> None:
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    done = python(code, module)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())


def test_the_training_plane_never_imports_the_control_plane() -> None:
    for path in (ROOT / "sft_dist").rglob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("import launch", "from launch", "import submitit"))], (
            path
        )
        assert "SLURM_" not in path.read_text(), path


def test_help_answers_within_0_3_seconds() -> None:
    command = [sys.executable, "-m", "launch.cli", "--help"]
    took = []
    for _ in range(5):
        # Of the processor: other tests run beside it.
        start = _processor_seconds()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        took.append(_processor_seconds() - start)
    assert "train by a recipe on this machine" in done.stdout
    assert min(took) < 0.3


def _processor_seconds() -> float:
    """Seconds of the processor that processes have taken which this one has started and waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_every_verb_tells_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (
        "run",
        "submit",
        "resume",
        "cancel",
        "check",
        "preview",
        "lengths",
        "eval",
        "chat",
        "recipes",
        "schema",
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        assert f"sft-dist {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["fly"], ["run"], ["run", "x", "--fast"], ["chat", "m", "a=b"], []])
def test_a_command_line_that_makes_no_sense_is_refused_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "sft-dist" in capsys.readouterr().err


def test_overrides_may_stand_behind_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("launch.local.run_module", lambda _, words: seen.extend(words) or 0)
    name = "smollm2-135m/sft-python-docs"
    assert cli.main(["preview", name, "--records", "1", "train.seed=7", "--split", "test", "train.max_steps=1"]) == 0
    assert seen[-2:] == ["train.seed=7", "train.max_steps=1"]


def test_packaged_recipes_are_listed_with_what_they_say_of_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    said = capsys.readouterr().out
    for name in ("smollm2-135m/sft-python-docs", "opt-1.3b/sft", "llama-2-7b/sft", "mistral-7b/sft",
                 "codellama-7b/sft"):  # fmt: skip
        assert name in said
    assert "The reference case: OPT-1.3B on EvolKit-75K" in said


@pytest.mark.parametrize("name", recipe_files.packaged())
def test_every_packaged_recipe_is_a_recipe_and_passes_the_schema(name: str) -> None:
    import jsonschema
    import yaml

    path = recipe_files.packaged()[name]
    load_recipe(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


# The demo's own, whose records take half a minute, is checked by `.ci/run`, in the wheel.
@pytest.mark.parametrize("name", [name for name in recipe_files.packaged() if not name.startswith("smollm2")])
def test_every_packaged_recipe_passes_check(name: str, tmp_path: Path) -> None:
    """Without a network, what is on the hub is told as not known; nothing is a fault."""
    pytest.importorskip("gguf")
    done = sft_dist(tmp_path, "check", name, "train.bf16=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("no ")]


def test_a_packaged_recipe_is_found_by_a_name_that_is_almost_right() -> None:
    with pytest.raises(RecipeError, match=r"opt-1\.3b/stf: no such recipe, did you mean opt-1\.3b/sft"):
        recipe_files.find("opt-1.3b/stf")


def test_the_schema_is_printed_for_editors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads((ROOT / "launch" / "recipes" / "recipe.schema.json").read_text())
    assert schema["properties"]["model"]


def test_eval_takes_the_recipe_beside_the_model_or_the_one_it_is_given(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"no recipe\.yaml beside the model; name the recipe of the data by --recipe"):
        recipe_files.model_and_recipe(str(run), None)
    (run / "recipe.yaml").write_text("")
    for name in (run, run / "model"):
        assert recipe_files.model_and_recipe(str(name), None) == (str(run / "model"), run / "recipe.yaml")
    assert recipe_files.model_and_recipe("gpt2", "opt-1.3b/sft")[1].name == "sft.yaml"
