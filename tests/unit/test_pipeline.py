"""Pipelines: which stage needs which, what is wrong with a file, and what is done with stages that were run before."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch import check, cli, recipe_files
from launch.pipeline import show, spec, state, view
from launch.pipeline.resolve import resolve
from launch.pipeline.runner import LocalRunner
from launch.pipeline.slurm import SlurmRunner
from launch.pipeline.stage import Pipeline
from launch.pipeline.tee import Tee
from launch.processes import Ending, Rank
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from tests import tiny
from tests.recipes import ROOT, small_recipe

CHAIN = """\
output_dir: out
stages:
  eval:
    kind: eval
    model: ${stages.more.output}
  sft: {recipe: recipe.yaml, set: {train.save_strategy: steps}}
  other: {recipe: recipe.yaml, model: "${stages.sft.output}"}
  more:
    recipe: recipe.yaml
    model: ${stages.sft.output}
    set: {train: {max_steps: 3}, data.chat_template_path: null}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small_recipe(folder, tiny.save_model(folder / "model"))
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, in which the test works."""
    shutil.copy(models / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.devices.gpus", list)
    return tmp_path


class Machine:
    """In place of the processes of a stage: what it did, and what it is to do with the stages named in `endings`."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.did: list[str] = []
        self.recipes: dict[str, Recipe] = {}
        self.endings: dict[str, Ending] = {}
        self._numbers = itertools.count()

    def train(self, _: Path, recipe: Recipe) -> Ending:
        folder = Path(recipe.output.output_dir)
        self.recipes[folder.name] = recipe
        self.did.append(f"{folder.name}{' goes on' if recipe.output.resume else ''}")
        ending = self.endings.pop(folder.name, Ending(0, False))
        if ending.code == 0:
            model = Path(recipe.model.model_name_or_path)
            shutil.copytree(model, folder / "model")
            if recipe.peft.use_peft:
                (folder / "model" / "config.json").rename(folder / "model" / "adapter_config.json")
            (folder / "summary.json").write_text(json.dumps({"seconds": next(self._numbers)}))
        return ending

    def module(self, ranks: list[Rank], **_: object) -> Ending:
        """The export and the evaluation."""
        _, _, _, name, *words = ranks[0].command
        output = Path(words[words.index("--output") + 1])
        self.did.append(f"{name.rpartition('.')[2]} {output.parent.name}/{output.name}")
        ending = self.endings.pop(output.name, Ending(0, False))
        if ending.code == 0 and name == "sft_dist.export":
            shutil.copytree(self.model, output)
        elif ending.code == 0:
            (output / "measure.json").write_text(json.dumps({"loss": next(self._numbers)}))
        return ending

    def done(self) -> list[str]:
        """What was done since it was asked last."""
        did, self.did = self.did, []
        return did


@pytest.fixture
def machine(here: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(models / "model")
    monkeypatch.setattr("launch.local.run", machine.train)
    monkeypatch.setattr("launch.pipeline.work.run_to_end", machine.module)
    monkeypatch.setattr("sft_dist.rundir.environment", lambda _: {})
    return machine


def written(text: str, *words: str) -> Pipeline:
    Path("p.yaml").write_text(text)
    return resolve(Path("p.yaml"), words)


def go(text: str, *words: str) -> int:
    Path("p.yaml").write_text(text)
    return cli.main(["pipeline", "p.yaml", *words])


def states() -> dict[str, str]:
    return {row.name: row.state for row in view.rows(resolve(spec.find("p.yaml")))}


def test_each_stage_comes_behind_what_it_needs_and_has_its_paths_before_anything_ran(here: Path) -> None:
    pipeline = written(CHAIN, "more.train.max_steps=4", "other.nodes=2")
    assert list(pipeline.stages) == ["sft", "other", "more", "eval"]
    assert {name: stage.needs for name, stage in pipeline.stages.items()} == {
        "sft": (), "other": ("sft",), "more": ("sft",), "eval": ("more",)}  # fmt: skip
    more, evaluated = pipeline.stages["more"], pipeline.stages["eval"]
    assert more.recipe.model.model_name_or_path == str(here / "out" / "sft" / "model")
    assert more.recipe.train.max_steps == 4 and pipeline.stages["other"].nodes == 2
    assert more.recipe.output.output_dir == str(here / "out" / "more")
    # The recipe of the stage whose model it takes, with what is set there: the same held-out data.
    assert evaluated.recipe.train.max_steps == 4 and not evaluated.trains
    assert evaluated.recipe.model.model_name_or_path == str(here / "out" / "more" / "model")
    assert evaluated.stand_in == pipeline.stages["sft"].recipe.model.model_name_or_path


def test_references_stand_in_any_text_of_set(here: Path) -> None:
    text = """\
output_dir: out
stages:
  a: {recipe: recipe.yaml, output_dir: elsewhere}
  b:
    recipe: recipe.yaml
    set:
      data: {chat_template_path: "${stages.a.run}/template.jinja"}
      model.model_name_or_path: ${stages.a.output}
"""
    b = written(text).stages["b"]
    assert b.recipe.data.chat_template_path == str(here / "elsewhere" / "template.jinja")
    assert b.recipe.model.model_name_or_path == str(here / "elsewhere" / "model") and b.needs == ("a",)


def test_every_kind_of_training_that_a_recipe_has_is_a_kind_of_stage() -> None:
    assert (*spec.TRAINING, "eval") == ("sft", "reward", "dpo", "ppo", "eval")


BAD = {
    "a circle": (
        ('  a: {recipe: recipe.yaml, model: "${stages.c.output}"}\n'
        '  b: {recipe: recipe.yaml, model: "${stages.a.output}"}\n'
        '  c: {recipe: recipe.yaml, model: "${stages.b.output}"}'),
        ["p.yaml:3: stages.a.model: the stages need one another: a -> c -> b -> a; break it"],
    ),
    "no such stage": (
        '  sft: {recipe: recipe.yaml}\n  b: {recipe: recipe.yaml, model: "${stages.sf.output}"}',
        ["p.yaml:4: stages.b.model: ${stages.sf.output}: no such stage, did you mean sft"],
    ),
    "no reference": (
        "  sft: {recipe: recipe.yaml, set: {data.dataset_name: '${HOME}/x'}}",
        ["p.yaml:3: stages.sft.set: ${HOME} is not read; write ${stages.NAME.output} or ${stages.NAME.run}"],
    ),
    "a model of an evaluation": (
        "  e: {kind: eval, recipe: recipe.yaml}\n  b: {recipe: recipe.yaml, model: '${stages.e.output}'}",
        ["p.yaml:4: stages.b.model: ${stages.e.output}: an evaluation makes no model; its folder is ${stages.e.run}"],
    ),
    "a run as a model": (
        "  a: {recipe: recipe.yaml}\n  b: {recipe: recipe.yaml, model: '${stages.a.run}'}",
        ["p.yaml:4: stages.b.model: ${stages.a.run} is a run's folder; its model is ${stages.a.output}"],
    ),
    "itself": (
        "  a: {recipe: recipe.yaml, model: '${stages.a.output}'}",
        ["p.yaml:3: stages.a.model: ${stages.a.output}: the stage refers to itself; name another one"],
    ),
    "keys": (
        "  a: {recpe: recipe.yaml, nodes: 0, kind: evl}",
        [
            "p.yaml:3: stages.a.kind: should be 'sft', 'reward', 'dpo', 'ppo' or 'eval'",
            "p.yaml:3: stages.a.nodes: should be greater than 0",
            "p.yaml:3: stages.a.recpe: no such key, did you mean recipe",
        ],
    ),
    "keys of the recipes, of all stages": (
        ("  a:\n    recipe: recipe.yaml\n    set:\n      train.learning_rte: 1\n      train: {max_steps: many}\n"
        "  b: {recipe: opt-1.3b/stf, model: '${stages.a.output}'}"),
        [
            "p.yaml:6: train.learning_rte: no such key, did you mean train.learning_rate",
            "p.yaml:7: train.max_steps: expected a whole number, got 'many'",
            "p.yaml:8: stages.b.recipe: opt-1.3b/stf: no such recipe, did you mean opt-1.3b/sft",
        ],
    ),
    "one folder": (
        "  a: {recipe: recipe.yaml}\n  b: {recipe: recipe.yaml, output_dir: out/x/../a}",
        ["p.yaml:4: stages.b.output_dir: HERE/out/a is the folder of stage a; give each its own output_dir"],
    ),
    "one folder in the other": (
        "  a: {recipe: recipe.yaml, output_dir: out}",
        [
            (
                "p.yaml:3: stages.a.output_dir: HERE/out and the folder of the pipeline itself, HERE/out/pipeline, "
                "lie one in the other; give each its own output_dir"
            )
        ],
    ),
    "the pipeline's keys": (
        "  a: {recipe: recipe.yaml, set: {output.overwrite: true}}",
        [("p.yaml:3: stages.a.set: output.overwrite: the pipeline's own to set; write output_dir under the stage for "
         "another folder")],
    ),
    "no recipe": ("  a: {nodes: 1}", ["p.yaml:3: stages.a.recipe: missing; name a recipe by path or packaged name"]),
    "nothing held out": (
        "  a: {kind: eval, recipe: recipe.yaml, set: {data.dataset_test_split: null}}",
        [("p.yaml:3: stages.a.recipe: the recipe holds nothing out; set data.dataset_test_split or "
         "data.test_split_size")],
    ),
    "nothing": ("  {}", ["p.yaml:2: stages: is empty; name at least one"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_by_file_line_and_mend(here: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages, lines = BAD[what]
    assert go(f"output_dir: out\nstages:\n{stages}\n") == 2
    said = capsys.readouterr().err.replace(str(here), "HERE").splitlines()
    assert said == [f"sft-dist: {line}" for line in lines]
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sf.train.seed=3"], "command line: sf.train.seed: no such stage, did you mean sft"),
        (["sft.train.lr=3"], "command line: sft.train.lr: no such key, did you mean train.learning_rate"),
        (["sft.nods=3"], "command line: stages.sft.nods: no such key, did you mean nodes"),
        (["sft=3"], "command line: sft: is a stage; write sft.section.key=value"),
        (["sft.output.resume=true"], "command line: sft.output.resume: the pipeline's own to set"),
        (["--nodes", "2"], "--nodes: belongs to --cluster"),
        (["--cluster", "h100"], "--cluster: h100: no such file"),
    ],
)
def test_bad_words_are_told(here: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(CHAIN, *words) == 2
    assert line in capsys.readouterr().err


def test_all_stages_are_checked_before_the_first_starts_with_a_model_that_is_not_there_yet(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(CHAIN, "more.train.max_length=100000", "other.data.dataset_name=no.jsonl") == 2
    assert capsys.readouterr().err.splitlines() == [
        "sft-dist: stage other: data.dataset_name: no such file: no.jsonl; give the path of a file or a folder",
        "sft-dist: stage more: train.max_length: 100000 is beyond the model's 512 positions; lower it",
        "sft-dist: stage eval: train.max_length: 100000 is beyond the model's 512 positions; lower it",
    ]
    assert not machine.did and not Path("out").exists()


def test_what_is_done_is_not_run_again(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(CHAIN, "--check") == 0 and not machine.did and not Path("out").exists()
    assert go(CHAIN) == 0
    assert machine.done() == ["sft", "other", "more", "evaluation out/eval"]
    assert set(states().values()) == {"done"}
    assert go(CHAIN) == 0 and not machine.did
    assert capsys.readouterr().out.count("done, not run again") == 4
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in Path("out/pipeline").rglob("*"))


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(machine: Machine) -> None:
    machine.endings = {"more": Ending(1, False)}
    assert go(CHAIN + "  base: {kind: eval, recipe: recipe.yaml}\n") == 1
    assert machine.done() == ["sft", "other", "more", "evaluation out/base"]
    assert states() == {"sft": "done", "other": "done", "more": "failed", "eval": "skipped", "base": "done"}
    assert go(CHAIN) == 0
    assert machine.done() == ["more goes on", "evaluation out/eval"]


@pytest.mark.parametrize("ending", [Ending(75, False), Ending(75, True), Ending(143, True)])
def test_a_pipeline_that_is_told_to_stop_starts_nothing_more_and_goes_on(machine: Machine, ending: Ending) -> None:
    machine.endings = {"other": ending}
    assert go(CHAIN) == 75
    assert machine.done() == ["sft", "other"]
    assert states() == {"sft": "done", "other": "stopped", "more": "pending", "eval": "pending"}
    assert go(CHAIN) == 0
    assert machine.done() == ["other goes on", "more", "evaluation out/eval"]


def test_a_signal_between_two_stages_is_heard(machine: Machine) -> None:
    pipeline = written(CHAIN)
    handler = signal.getsignal(signal.SIGTERM)
    runner = LocalRunner(pipeline, ["sft-dist"], 0)
    runner.start(pipeline.stages["sft"], [])
    signal.raise_signal(signal.SIGTERM)
    runner.start(pipeline.stages["other"], ["sft"])
    assert runner.finish() == 75 and machine.did == ["sft"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_while_a_stage_is_checked_is_heard(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check.findings

    def slow(recipe: Recipe) -> list[check.Finding]:
        if Path("out/pipeline/stages/other.json").exists():
            signal.raise_signal(signal.SIGTERM)
        return found(recipe)

    monkeypatch.setattr("launch.check.findings", slow)
    assert go(CHAIN) == 75
    assert machine.did == ["sft"] and states()["other"] in ("pending", "stopped")


def test_a_stage_whose_input_was_made_anew_is_stale_and_what_it_made_is_kept(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(CHAIN) == 0
    machine.done()
    assert go(CHAIN, "more.train.seed=7") == 0
    assert machine.done() == ["more", "evaluation out/eval"]
    said = capsys.readouterr().out
    assert "sft-dist: more: runs again, for train.seed: 42 there, 7 here" in said
    assert "sft-dist:   eval: runs again, for more is to run again" in said
    assert "sft-dist: more: what was there is kept as out/more.old-1" in said
    assert load_recipe("out/more.old-1/recipe.yaml").train.seed == 42 and Path("out/eval.old-1/measure.json").exists()
    # Run again by hand, as far as a pipeline can see.
    Path("out/sft/summary.json").write_text("{}")
    Path("p.yaml").write_text(CHAIN.replace("max_steps: 3", "max_steps: 3, seed: 7"))
    assert states() == {"sft": "done", "other": "stale", "more": "stale", "eval": "stale"}


def test_a_run_that_is_not_the_pipelines_is_not_touched(
    machine: Machine, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_recipe(here / "foreign", Path("model"))
    Path("out/sft").mkdir(parents=True)
    shutil.copy("foreign/recipe.yaml", "out/sft")
    assert go(CHAIN) == 2
    assert "stage sft: " in (said := capsys.readouterr().err) and "holds a run that this pipeline did not start" in said
    assert not machine.did and os.listdir("out/sft") == ["recipe.yaml"]


ADAPTED = """\
output_dir: out
stages:
  sft: {recipe: recipe.yaml, set: {peft.use_peft: true}}
  more: {recipe: recipe.yaml, model: "${stages.sft.output}", set: {peft.use_peft: true}}
"""


def test_an_adapter_is_merged_for_the_stage_that_takes_it_and_only_then(machine: Machine, here: Path) -> None:
    machine.endings = {"merged": Ending(137, False)}
    assert go(ADAPTED) == 137
    assert machine.done() == ["sft", "export sft/merged"] and states() == {"sft": "failed", "more": "skipped"}
    Path("out/sft/.merged.unfinished-x").mkdir()
    machine.endings = {"more": Ending(0, False)}
    assert go(ADAPTED) == 0
    assert machine.done() == ["export sft/merged", "more"]
    assert machine.recipes["more"].model.model_name_or_path == str(here / "out" / "sft" / "merged")
    assert not Path("out/sft/.merged.unfinished-x").exists()


def test_a_folder_of_a_pipeline_tells_all_that_its_file_does(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.endings = {"more": Ending(1, False)}
    assert go(CHAIN, "more.train.seed=7") == 1
    capsys.readouterr()
    assert cli.main(["pipeline", "out", "--status"]) == 0
    assert [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()][2:] == [
        "sft sft ✔ done 0 s out/sft/model",
        "├─ other sft ✔ done 0 s out/other/model",
        "└─ more sft ✘ failed 0 s see below",
        "└─ eval eval – skipped because more failed",
        "",
        "more: exit code 1 (log: out/pipeline/logs/more.log)",
        "out: 2 done, 1 failed, 1 skipped",
    ]
    machine.done()
    assert cli.main(["pipeline", "out"]) == 0
    assert machine.done() == ["more goes on", "evaluation out/eval"]


def test_in_the_graph_all_that_a_stage_needs_stands_above_it() -> None:
    needs = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "dpo": ("sft",), "eval": ("dpo", "ppo")}
    rows = [view.Row(name, "sft", need, "pending", "", None, "") for name, need in needs.items()]
    console = Console(record=True, width=80)
    show.to_terminal(Pipeline(Path("p.yaml"), Path("out"), {}), rows, console)
    lines = console.export_text().splitlines()[3:7]
    assert [line.split("sft ")[0].rstrip() for line in lines] == ["├─ reward", "│  └─ ppo", "└─ dpo", "   └─ eval"]
    assert "also needs ppo" in lines[3]


@pytest.mark.parametrize(("weights", "strategy"), [(1e9, "ddp"), (70e9, "zero3_offload")])
def test_on_a_cluster_auto_chooses_by_the_model_that_stands_for_one_that_is_yet_to_be_made(
    here: Path, models: Path, monkeypatch: pytest.MonkeyPatch, weights: float, strategy: str
) -> None:
    """Two nodes of eight H100, for a stage whose model an earlier stage is to write."""
    (here / "cluster.yaml").write_text("gpus_per_node: 8\ngpu_type: h100\ngpu_memory_gb: 80\n")
    monkeypatch.setattr("launch.fit.count_parameters", lambda _: weights)
    pipeline = written(CHAIN)
    stage = pipeline.stages["more"]
    assert stage.recipe.model.model_name_or_path.endswith("sft/model") and stage.stand_in == str(models / "model")
    job = SlurmRunner(pipeline, [], "cluster.yaml", 2)._job(stage, stage.recipe)
    submission = job.submission(None)
    assert (submission.strategy, submission.nodes, submission.tasks_per_node) == (strategy, 2, 8)


def test_no_module_of_it_imports_torch() -> None:
    code = "import sys, importlib; [importlib.import_module(f'launch.pipeline.{m}') for m in sys.argv[1:]]; "
    names = [path.stem for path in (ROOT / "launch" / "pipeline").glob("*.py") if path.stem != "__init__"]
    done = subprocess.run(
        [sys.executable, "-c", code + "print(*sys.modules)", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "transformers", "trl", "deepspeed", "accelerate", "datasets"} & set(done.stdout.split())


def test_a_record_that_cannot_be_read_is_none(machine: Machine) -> None:
    assert go(CHAIN) == 0
    pipeline = resolve(Path("p.yaml"))
    pipeline.dir.record("more").write_text("{")
    decisions = {name: decision.action for name, decision in state.plan(pipeline).items()}
    assert decisions == {"sft": "done", "other": "done", "more": "again", "eval": "again"}


def test_every_packaged_pipeline_resolves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_files.pipelines()
    for name in recipe_files.pipelines():
        assert resolve(spec.find(name)).stages
    assert not set(recipe_files.pipelines()) & set(recipe_files.packaged())
    assert not [name for name in recipe_files.packaged() if "pipeline" in name]


def test_the_demo_of_rlhf_hands_models_on_and_lies_where_make_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = resolve(spec.find("smollm2-135m/python-docs-rlhf"))
    stages = pipeline.stages
    assert {name: (stage.kind, stage.needs) for name, stage in stages.items()} == {
        "sft": ("sft", ()),
        "reward": ("reward", ("sft",)),
        "ppo": ("ppo", ("sft", "reward")),
        "dpo": ("dpo", ("sft",)),
    }
    assert stages["ppo"].recipe.ppo.reward == str(stages["reward"].output)
    assert {stages[name].recipe.model.model_name_or_path for name in ("reward", "ppo", "dpo")} == {
        str(stages["sft"].output)
    }
    makefile = (recipe_files.FOLDER.parents[1] / "Makefile").read_text(encoding="utf-8")
    assert f"RLHF := {pipeline.root.relative_to(tmp_path)}\n" in makefile


def test_a_name_that_is_almost_right_is_told() -> None:
    with pytest.raises(UserError, match="did you mean smollm2-135m/python-docs"):
        spec.find("smollm2-135m/python-doc")


def test_what_a_stage_prints_goes_to_the_terminal_with_its_name_and_into_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write: Callable[[int, bytes], int] = os.write
    with Tee("sft", tmp_path / "logs" / "sft.log"):
        write(1, b"one\ntwo ")
        write(2, b"10%\r50%\r100%\nlast")
    print("after")
    assert capfd.readouterr().out == "sft | one\nsft | 100%\nsft | last\nafter\n"
    assert (tmp_path / "logs" / "sft.log").read_bytes() == b"one\ntwo 10%\r50%\r100%\nlast"
    assert os.stat(tmp_path / "logs" / "sft.log").st_mode & 0o777 == 0o600
