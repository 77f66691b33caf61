"""`python -m sft_dist.verify make FOLDER [RECIPE WORDS...]` writes what is run, `... report FOLDER` compares it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sft_dist.process import guarded
from sft_dist.recipe import load_recipe
from sft_dist.render.verification import Cell, to_json, to_terminal
from sft_dist.verify.cases import ACCUMULATED, SINGLE, Plan, run_folder


def main(words: list[str]) -> int:
    """Do one of the two. Returns the exit code: of a report 0 if all is equal, else 1."""
    if words[0] == "make":
        return guarded(lambda: _make(Path(words[1]), words[2:]))
    found: list[Cell] = []
    code = guarded(lambda: found.extend(_report(Path(words[1]), words[2:])))
    return code or int(any(not cell.equal for cell in found))


def _make(folder: Path, words: list[str]) -> None:
    from sft_dist.verify.material import shape_of, write_material

    recipe = load_recipe(words[0], words[1:]) if words else None
    for shape in Plan.read(folder).shapes:
        write_material(folder / shape, shape_of(recipe, shape), recipe)


def _report(folder: Path, strategies: list[str]) -> list[Cell]:
    plan = Plan.read(folder)
    cells = [
        _cell(folder / shape, shape, strategy, case)
        for shape in plan.shapes
        for strategy in strategies
        for case in plan.cases
        if strategy != SINGLE
    ]
    to_terminal(cells)
    (folder / "differences.json").write_text(json.dumps(to_json(cells), indent=2) + "\n", encoding="utf-8")
    return cells


def _cell(folder: Path, shape: str, strategy: str, case: str) -> Cell:
    """What came of a case: the difference from one process, which for recomputed activations is one that keeps them."""
    from sft_dist.verify.differences import difference

    run, reference = run_folder(folder, strategy, case), run_folder(folder, SINGLE, _reference(case))
    title = "single, accumulated" if strategy == ACCUMULATED else strategy
    for which, where in ((strategy, run), (SINGLE, reference)):
        failed = where / "failed.json"
        if failed.is_file():
            return Cell(shape, title, case, None, json.loads(failed.read_text(encoding="utf-8"))["why"])
        if not (where / "summary.json").is_file():
            return Cell(shape, title, case, None, f"the run under {which} did not end; see {folder.parent / 'logs'}")
    try:
        return Cell(shape, title, case, difference(run, reference))
    except ValueError as error:
        return Cell(shape, title, case, None, str(error))


def _reference(case: str) -> str:
    return "full" if case == "checkpointing" else case


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
