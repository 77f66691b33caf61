"""The folder of checkpoints: what is complete, what is cleaned away, and what is never removed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.files import write_bytes
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.config import CheckpointSection


def about(step: int, files: dict[str, manifest.File] | None = None, **metrics: float) -> Manifest:
    return Manifest(
        step=step, tokens=0, trained_tokens=0, world_size=1, strategy="single", rows_per_step=1, recipe_hash="",
        data="", metrics=metrics, files=files or {},
    )  # fmt: skip


def checkpoint(folder: Path, step: int, name: str | None = None, content: bytes = b"weights") -> Path:
    path = folder / (name or f"checkpoint-{step}")
    path.mkdir(parents=True)
    files = {"rank-00000.safetensors": write_bytes(path / "rank-00000.safetensors", content)}
    (path / manifest.NAME).write_text(about(step, files).to_json())
    return path


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def test_each_state_is_told(tmp_path: Path) -> None:
    checkpoint(tmp_path, 8)
    checkpoint(tmp_path, 30)
    cut = checkpoint(tmp_path, 20) / "rank-00000.safetensors"
    cut.write_bytes(b"w")
    flipped = checkpoint(tmp_path, 10) / "rank-00000.safetensors"
    flipped.write_bytes(b"weightz")
    (checkpoint(tmp_path, 40) / manifest.NAME).unlink()
    checkpoint(tmp_path, 7, name="checkpoint-50")
    checkpoint(tmp_path, 60, name="checkpoint-60.unfinished")
    checkpoint(tmp_path, 61, name="checkpoint-61.removed")
    checkpoint(tmp_path, 5, name="checkpoint-5.damaged")
    (tmp_path / "checkpoint-70").write_text("a file")
    (tmp_path / "notes").mkdir()

    # At a glance, for which the content of files does not count.
    assert set(folders.complete(tmp_path)) == {8, 10, 30}
    assert folders.damaged_steps(tmp_path) == {
        20: "rank-00000.safetensors has 1 bytes instead of 7",
        40: "manifest.json is missing",
        50: "is the checkpoint of step 7",
    }
    found = {each.path.name: (each.state, each.fault) for each in folders.examine(tmp_path)}
    assert found == {
        "checkpoint-8": ("complete", None),
        "checkpoint-10": ("damaged", "rank-00000.safetensors is damaged: its checksum is another"),
        "checkpoint-20": ("damaged", "rank-00000.safetensors has 1 bytes instead of 7"),
        "checkpoint-30": ("complete", None),
        "checkpoint-40": ("damaged", "manifest.json is missing"),
        "checkpoint-50": ("damaged", "is the checkpoint of step 7"),
        "checkpoint-60.unfinished": ("unfinished", "was not written to its end; nothing reads it"),
        "checkpoint-5.damaged": ("damaged", "set aside when it was found damaged"),
    }
    assert [each.path.name for each in folders.examine(tmp_path)[:3]] == ["checkpoint-8", "checkpoint-10",
                                                                          "checkpoint-20"]  # fmt: skip


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert folders.complete(absent) == {} == folders.damaged_steps(absent)
    assert folders.examine(absent) == [] == folders.clean(absent)


def test_only_what_is_unfinished_or_half_removed_is_cleaned_away(tmp_path: Path) -> None:
    kept = ["checkpoint-1", "checkpoint-2.damaged", "checkpoint-2.1.damaged", "checkpoint-x.unfinished",
            "my-checkpoint-3.unfinished", "checkpoint-4.unfinished.bak", "checkpoint-5-copy", "notes"]  # fmt: skip
    gone = ["checkpoint-6.unfinished", "checkpoint-7.removed", "checkpoint-12.unfinished"]
    for name in kept + gone:
        checkpoint(tmp_path, 1, name=name)
    assert folders.clean(tmp_path) == ["checkpoint-12.unfinished", "checkpoint-6.unfinished"]
    assert names(tmp_path) == set(kept)
    assert folders.clean(tmp_path) == []


def test_what_is_set_aside_overwrites_nothing(tmp_path: Path) -> None:
    places = []
    for number in range(4):
        checkpoint(tmp_path, 5, content=f"{number}".encode())
        places.append(folders.set_aside(tmp_path, 5))
    assert names(tmp_path) == {place.name for place in places}
    assert places[0].name == "checkpoint-5.damaged"
    assert [(place / "rank-00000.safetensors").read_text() for place in places] == ["0", "1", "2", "3"]
    assert {each.state for each in folders.examine(tmp_path)} == {"damaged"}
    assert len(folders.examine(tmp_path)) == 4
    assert folders.clean(tmp_path) == [] and len(names(tmp_path)) == 4


def test_a_removed_one_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, 5)
    # As if the process died before the first file was gone.
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
        folders.remove(path)
    assert names(tmp_path) == {"checkpoint-5.removed"}
    assert folders.complete(tmp_path) == {} == folders.damaged_steps(tmp_path)
    # What was left of it is not in the way of the next one.
    folders.remove(checkpoint(tmp_path, 5))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({"keep": None}, []),
        ({"keep": None, "keep_every": 20}, []),
        ({"keep": 6}, []),
        ({"keep": 1}, [10, 20, 30, 40]),
        ({"keep": 2}, [10, 20, 30]),
        ({"keep": 2, "keep_every": 20}, [10, 30]),
        ({"keep": 2, "metric_for_best_model": "eval_loss"}, [10, 30]),
        ({"keep": 2, "metric_for_best_model": "eval_loss", "greater_is_better": True}, [20, 30]),
        ({"keep": 1, "metric_for_best_model": "eval_other"}, [10, 20, 30, 40]),
        ({"keep": 1, "keep_every": 30, "metric_for_best_model": "eval_loss"}, [10, 40]),
    ],
)
def test_what_the_recipe_keeps(settings: dict[str, object], gone: list[int]) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 1.5}
    held = [about(step, eval_loss=loss) for step, loss in losses.items()]
    assert folders.superfluous(held, CheckpointSection.model_validate(settings)) == gone


@pytest.mark.parametrize("greater", [False, True])
def test_the_best_is_the_later_of_equal_ones(greater: bool) -> None:
    recipe = CheckpointSection(metric_for_best_model="eval_loss", greater_is_better=greater)
    held = [about(step, eval_loss=2.0) for step in (30, 10, 20)]
    assert folders.best_of(held, recipe) == 30
    assert folders.best_of([about(10), about(20)], recipe) is None
    assert folders.best_of([about(10), about(20, eval_loss=9.0)], recipe) == 20
    assert folders.best_of(held, CheckpointSection()) is None


@pytest.mark.parametrize("greater", [False, True])
def test_a_value_that_is_no_number_is_never_the_best(greater: bool) -> None:
    recipe = CheckpointSection(metric_for_best_model="eval_loss", greater_is_better=greater)
    values = {10: math.nan, 20: 2.0, 30: math.nan}
    held = [about(step, eval_loss=value) for step, value in values.items()]
    assert folders.best_of(held, recipe) == 20
    assert folders.best_of(held[::-1], recipe) == 20
    assert folders.best_of(held[:1], recipe) is None


STEPS = st.dictionaries(st.integers(1, 200), st.none() | st.floats(), max_size=20)
SETTINGS = st.builds(
    CheckpointSection,
    keep=st.none() | st.integers(1, 8),
    keep_every=st.none() | st.integers(1, 60),
    metric_for_best_model=st.sampled_from([None, "eval_loss", "eval_other"]),
    greater_is_better=st.booleans(),
)


@settings(deadline=None)
@given(STEPS, SETTINGS, st.randoms(use_true_random=False))
def test_retention(steps: dict[int, float | None], recipe: CheckpointSection, draw: object) -> None:
    held = [about(step, **({} if value is None else {"eval_loss": value})) for step, value in steps.items()]
    draw.shuffle(held)  # type: ignore[attr-defined]
    gone = folders.superfluous(held, recipe)
    kept = set(steps) - set(gone)
    assert gone == sorted(set(gone)) and set(gone) <= set(steps)
    if recipe.keep is None:
        assert gone == []
        return
    assert set(sorted(steps)[-recipe.keep :]) <= kept
    if recipe.keep_every:
        assert {step for step in steps if step % recipe.keep_every == 0} <= kept
    best = folders.best_of(held, recipe)
    measured = {step: value for step, value in steps.items() if value is not None and not math.isnan(value)}
    if recipe.metric_for_best_model == "eval_loss" and measured:
        assert best is not None and best in kept
        assert measured[best] == (max if recipe.greater_is_better else min)(measured.values())
        assert all(step <= best for step, value in measured.items() if value == measured[best])
    else:
        assert best is None
    every = len(steps) if recipe.keep_every == 1 else len([s for s in steps if s % (recipe.keep_every or 999) == 0])
    assert len(kept) <= recipe.keep + every + 1
    # Once they are gone, the same rule removes no more.
    assert folders.superfluous([each for each in held if each.step in kept], recipe) == []
