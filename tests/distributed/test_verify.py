"""The matrix: OPT under every strategy, Llama in every case under one of each kind, have one process's numbers.

`sft-dist verify` without words is the whole of it: all three under all of them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import verify
from launch.environment import STRATEGIES
from sft_dist.verify.cases import CASES, SHAPES
from tests import tiny
from tests.ranks import verify_in_loaded
from tests.recipes import command, environment, sft_dist, small_recipe

SPREAD = [strategy for strategy in STRATEGIES if strategy != "single"]
EVERY = [case.name for case in CASES]
# Packing under ZeRO and FSDP2 has to do with a model's attention, LoRA with the names of its layers.
PLAN = {
    "opt": (["packed"], SPREAD),
    "llama": (EVERY, ["zero3", "fsdp2"]),
    "mistral": (["packed"], ["zero3"]),
}
MATRIX = [(shape, strategy, cases) for shape, (cases, under) in PLAN.items() for strategy in under]
MATRIX += [("llama", "single, accumulated", EVERY)]
assert set(PLAN) == set(SHAPES)
# Under ZeRO-1 some weights have no part on some of four processes.
ON_FOUR = ["zero1", "zero3_hpz", "fsdp2_hybrid"]
Cells = dict[tuple[str, str, str], dict[str, Any]]


def verified(folder: Path, shape: str, cases: Sequence[str], strategies: Sequence[str], processes: int = 2) -> Cells:
    """`sft-dist verify`, whose processes have loaded the libraries before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_ranks", verify_in_loaded)
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        code = verify.verify(None, [], strategies=strategies, cases=cases, shapes=[shape], processes=processes,
                             folder=folder / "out")  # fmt: skip
    assert code in (0, 1)
    return cells_of(folder)


def cells_of(folder: Path) -> Cells:
    cells = json.loads((folder / "out" / "differences.json").read_text())
    return {(cell["shape"], cell["strategy"], cell["case"]): cell for cell in cells}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {shape: tmp_path_factory.mktemp(shape) for shape in PLAN}


@pytest.fixture(scope="module")
def on_two(folders: dict[str, Path]) -> Cells:
    found: Cells = {}
    for shape, (cases, under) in PLAN.items():
        found |= verified(folders[shape], shape, cases, under)
    return found


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Two nodes of two processes, for what is sharded within a node."""
    return verified(tmp_path_factory.mktemp("four"), "llama", ["full"], ON_FOUR, processes=4)


def assert_equal(cell: dict[str, Any]) -> None:
    assert cell["difference"] is not None, cell["why"]
    assert cell["equal"], cell["difference"]
    assert max(cell["difference"].values()) <= 1e-5


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("shape", "strategy", "cases"), MATRIX)
def test_two_processes_have_the_numbers_of_one(on_two: Cells, shape: str, strategy: str, cases: list[str]) -> None:
    mine = [cell for (s, t, _), cell in on_two.items() if (s, t) == (shape, strategy)]
    assert [cell["case"] for cell in mine] == cases
    for cell in mine:
        assert_equal(cell)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("strategy", ON_FOUR)
def test_four_processes_have_the_numbers_of_one(on_four: Cells, strategy: str) -> None:
    assert_equal(on_four["llama", strategy, "full"])


def test_a_recipe_s_own_model_is_verified_in_its_shape(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model", "opt"))
    done = sft_dist(tmp_path, "verify", "--output", str(tmp_path / "out"), str(recipe), "train.weight_decay=0.1",
                    "--strategy", "ddp", "--case", "full")  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cells = cells_of(tmp_path)
    assert set(cells) == {("recipe", "single, accumulated", "full"), ("recipe", "ddp", "full")}
    for cell in cells.values():
        assert_equal(cell)
    assert "2 of 2 runs have the numbers of one process (to 1e-05, fp32)" in done.stdout
    trained = (tmp_path / "out" / "recipe" / "runs" / "ddp" / "full" / "recipe.yaml").read_text()
    assert "weight_decay: 0.1" in trained


@pytest.mark.usefixtures("on_two")
def test_a_difference_is_found_and_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """A loss that is off by 3e-5 at one step, and a run that is not there."""
    shutil.copytree(folders["mistral"] / "out", tmp_path / "out")
    run = tmp_path / "out" / "mistral" / "runs" / "zero3" / "packed"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[3]["loss"] *= 1 + 3e-5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("-m", "sft_dist.verify", "report", str(tmp_path / "out"), "accumulated", "zero3")
    done = command(tmp_path, sys.executable, *words)
    assert done.returncode == 1
    assert "mistral, zero3, packed: loss 3.0e-05" in done.stdout
    assert "1 of 2 runs have the numbers of one process" in done.stdout
    shutil.rmtree(run)
    done = command(tmp_path, sys.executable, *words)
    assert done.returncode == 1
    assert "mistral, zero3, packed: the run under zero3 did not end" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategy", "zero9"], "--strategy: zero9 is none of single, ddp, zero1"),
        (["--case", "fp8"], "--case: fp8 is none of full, packed, checkpointing, tied, lora, qlora"),
        (["--shape", "gpt"], "--shape: gpt is none of opt, llama, mistral"),
    ],
)
def test_what_there_is_not_cannot_be_verified(tmp_path: Path, words: list[str], said: str) -> None:
    done = sft_dist(tmp_path, "verify", *words)
    assert (done.returncode, done.stderr.strip()) == (2, f"sft-dist: {done.stderr.strip()[10:]}")
    assert said in done.stderr
