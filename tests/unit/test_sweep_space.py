"""Which trials a sweep has: they follow from its file and its seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.sweep.space import Choices, Range, draw, grid, short_names
from launch.sweep.study import points, read_study
from sft_dist.errors import UserError
from tests.sweeps import write_sweep

RANDOM: dict[str, Any] = {"method": "random", "trials": 50}
PARAMETERS = {"train.learning_rate": {"min": 1e-6, "max": 1e-3, "log": True}, "peft.lora_r": {"min": 2, "max": 64},
              "train.optim": ["sgd", "adafactor"]}  # fmt: skip


def fault(tmp_path: Path, *words: str, **keys: Any) -> str:
    """By what a sweep is refused."""
    with pytest.raises(UserError) as caught:
        read_study(write_sweep(tmp_path, **keys), words)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_grid_is_every_combination_and_the_last_parameter_changes_fastest() -> None:
    found = list(grid({"a": Choices((1, 2)), "b": Choices(("x", "y", "z"))}))
    assert [(p["a"], p["b"]) for p in found] == [(1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")]


def test_random_trials_are_the_same_every_time_and_on_every_machine() -> None:
    space = {"rate": Range(1e-6, 1e-3, log=True, whole=False), "r": Range(4, 64, log=True, whole=True)}
    assert draw(space, 3, seed=1) == draw(space, 3, seed=1) != draw(space, 3, seed=2)
    # Written down once: another Python or processor must not change a study that goes on.
    expected = [{"rate": 0.000473, "r": 17}, {"rate": 0.000115, "r": 26}, {"rate": 1.89e-05, "r": 14}]
    assert draw(space, 3, seed=1) == expected


def test_more_trials_and_more_parameters_leave_the_values_what_they_were() -> None:
    one = {"rate": Range(1e-6, 1e-3, log=True, whole=False)}
    few = draw(one, 5, seed=3)
    assert draw(one, 9, seed=3)[:5] == few
    more = draw(one | {"decay": Range(0.0, 1.0, log=False, whole=False)}, 5, seed=3)
    assert [point["rate"] for point in more] == [point["rate"] for point in few]


def test_a_range_is_covered_to_its_ends_evenly_or_by_factors() -> None:
    logs = [p["x"] for p in draw({"x": Range(1e-6, 1e-2, log=True, whole=False)}, 1000, seed=0)]
    assert min(logs) >= 1e-6 and max(logs) <= 1e-2
    assert 0.2 < sum(value < 1e-5 for value in logs) / len(logs) < 0.3
    even = [p["x"] for p in draw({"x": Range(0.0, 1.0, log=False, whole=False)}, 500, seed=0)]
    assert 0.2 < sum(value < 0.25 for value in even) / len(even) < 0.3
    assert {p["x"] for p in draw({"x": Range(2, 5, log=False, whole=True)}, 50, seed=0)} == {2, 3, 4, 5}


def test_no_point_is_drawn_twice_and_there_are_no_more_than_exist() -> None:
    found = draw({"x": Choices((True, False)), "y": Range(1, 3, log=False, whole=True)}, 40, seed=0)
    assert len(found) == 6 and len({tuple(p.values()) for p in found}) == 6


def test_values_have_the_type_of_the_key(tmp_path: Path) -> None:
    study = read_study(write_sweep(tmp_path, parameters=PARAMETERS, **RANDOM))
    for point in points(study):
        assert isinstance(point["train.learning_rate"], float) and isinstance(point["peft.lora_r"], int)
    assert study.parameters["train.optim"] == Choices(("sgd", "adafactor"))


def test_keys_may_stand_below_their_section_and_the_command_line_counts(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, parameters={"train": {"seed": [1, 2]}}, set={"train": {"max_steps": 5}})
    study = read_study(file)
    assert study.parameters == {"train.seed": Choices((1, 2))} and study.fixed == {"train.max_steps": 5}
    study = read_study(file, ["parameters.train.seed=[4]", "set.train.max_steps=6", "seed=9", "train.logging_steps=1"])
    assert study.parameters == {"train.seed": Choices((4,))} and study.fixed == {"train.max_steps": 6}
    assert study.settings.seed == 9 and study.words == ("train.logging_steps=1",)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"train.learning_rte": [1]}, ("sweep.yaml:4: parameters.train.learning_rte: no such key, did you mean "
                                      "train.learning_rate")),
        ({"learning_rate": [1]}, ("sweep.yaml:4: parameters.learning_rate: no such section; it belongs to "
                                 "train.learning_rate")),
        ({"train.seed": 3}, ("parameters.train.seed: expected a list of values or a range, got 3; a fixed value "
                            "stands under `set:`")),
        ({"train.optim": ["adamw"]}, ("value 1: expected one of adamw_torch, adamw_torch_fused, adafactor, sgd, got "
                                     "'adamw', did you mean adamw_torch")),
        ({"train.seed": [1, 2, 1]}, "parameters.train.seed: 1 is listed twice; keep one"),
        ({"train.seed": []}, "parameters.train.seed: the list is empty; give the values to try"),
        ({"train.seed": {"min": 1, "max": 3}}, "a grid takes lists, this is a range; list values, or set method"),
        ({"train.seed": {"low": 1, "max": 3}}, "low is no word of a range, did you mean min"),
        ({"train.seed": {"min": 3, "max": 1}}, "min (3) is not below max (1)"),
        ({"train.seed": {"min": 0, "max": 1, "log": True}}, "min (0) has to be above 0 where log is true"),
        ({"train.seed": {"min": 0.5, "max": 1}}, "min: expected a whole number, got 0.5"),
        ({"train.optim": {"min": 0, "max": 1}}, "a range is for numbers only; list the values"),
        ({"output.output_dir": ["a"]}, "is the sweep's own, which sets the folder of each trial; leave it out"),
        ({}, "nothing is varied; name a recipe key with a list of values"),
        ([], "parameters: expected recipe keys with their values, such as `train.learning_rate: [1.0e-5, 2.0e-5]`"),
        ({"train.seed": list(range(40)), "train.data_seed": list(range(50))}, "a grid of 40 x 50 = 2,000 trials"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_with_its_place(tmp_path: Path, parameters: Any, text: str) -> None:
    assert text in fault(tmp_path, parameters=parameters)


def test_words_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    assert "set.train.weight_decay: is varied under parameters, too" in fault(tmp_path, set={"train.weight_decay": 1.0})
    said = fault(tmp_path, "train.weight_decay=0.5")
    assert said == ("command line: train.weight_decay: is varied by the sweep; leave it out, or override "
                    "parameters.train.weight_decay=[...]")  # fmt: skip
    assert "trials: is missing" in fault(tmp_path, method="random")
    assert "a grid has as many trials as combinations" in fault(tmp_path, trials=3)
    assert "sweep.yaml: recipe: no such file: other.yaml" in fault(tmp_path, recipe="other.yaml")
    assert "did you mean opt-1.3b/sft" in fault(tmp_path, recipe="opt-1.3b/stf")


def test_short_names_tell_keys_from_each_other() -> None:
    keys = ("train.seed", "data.mixture.a.weight", "data.mixture.b.weight")
    assert list(short_names(keys).values()) == ["seed", "a.weight", "b.weight"]
