"""Every format users bring becomes the same conversation, and every fault is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import formats
from sft_dist.data.formats import Fault, Turn

QA = (Turn("user", "What is 2+2?"), Turn("assistant", "4"))
SHAREGPT = [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]
OPENAI = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"conversations": SHAREGPT}, "conversations"),
        ({"conversations": [SHAREGPT]}, "conversations"),
        ({"conversations": OPENAI}, "conversations"),
        ({"conversation": SHAREGPT, "id": "1"}, "conversations"),
        ({"messages": OPENAI}, "messages"),
        ({"prompt": "What is 2+2?", "completion": "4"}, "prompt_completion"),
        ({"prompt": OPENAI[:1], "completion": OPENAI[1:]}, "prompt_completion"),
        ({"instruction": "What is 2+2?", "input": "", "output": "4"}, "instruction"),
        ({"instruction": "What is 2+2?", "input": None, "output": "4"}, "instruction"),
        ({"instruction": "What is 2+2?", "response": "4"}, "instruction"),
    ],
)
def test_every_format_gives_the_same_turns(record: dict[str, Any], name: str) -> None:
    assert formats.detect(record) == name
    assert formats.parse(record, name) == QA


def test_plain_text_is_one_turn() -> None:
    assert formats.parse({"text": "Once."}, formats.detect({"text": "Once."})) == (Turn("text", "Once."),)


def test_an_input_stands_below_its_instruction() -> None:
    turns = formats.parse({"instruction": "Translate.", "input": "Haus", "output": "house"}, "instruction")
    assert turns[0].content == "Translate.\n\nHaus"


def test_system_turns_are_kept_and_empty_ones_left_out() -> None:
    rows = [{"from": "system", "value": "Be brief."}, *SHAREGPT]
    assert formats.parse({"conversations": rows}, "conversations")[0] == Turn("system", "Be brief.")
    rows[0]["value"] = " "
    assert formats.parse({"conversations": rows}, "conversations") == QA


def test_a_question_without_an_answer_at_the_end_is_left_out() -> None:
    rows = [*SHAREGPT, {"from": "human", "value": "And 3+3?"}]
    assert formats.parse({"conversations": rows}, "conversations") == QA


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "the conversation is empty"),
        ([("alien", "a")], "turn 1 has the unknown role 'alien'"),
        ([("gpt", "a"), ("human", "b")], "turn 1 is of the assistant where one of the user must stand"),
        ([("human", "a"), ("human", "b")], "turn 2 is of the user where one of the assistant must stand"),
        ([("human", "a"), ("gpt", "b"), ("system", "c")], "turn 3 is of the system"),
        ([("human", "a")], "no assistant turn"),
        ([("system", "a")], "no assistant turn"),
        ([("human", " "), ("gpt", "b")], "turn 1 (user) is empty"),
        ([("human", "a"), ("gpt", "")], "every assistant turn is empty"),
        ([("human", 5), ("gpt", "b")], "turn 1 must be a string, got int"),
        ([("human", "a"), ("gpt", None)], "turn 2 must be a string, got nothing"),
        ([("human", "a"), ("gpt", "b\0c")], "turn 2 holds a NUL byte at character 2"),
        ([("human", "a\ud800"), ("gpt", "b")], "turn 1 holds a lone surrogate at character 2"),
    ],
)
def test_each_fault_of_a_conversation_is_named(turns: list[tuple[str, Any]], said: str) -> None:
    record = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    with pytest.raises(Fault, match=r".+") as caught:
        formats.parse(record, "conversations")
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["text", 5, None, {"from": "human"}, [5], ["a"], [[5]]])
def test_a_column_of_the_wrong_shape_is_a_fault(value: Any) -> None:
    with pytest.raises(Fault):
        formats.parse({"conversations": value}, "conversations")


def test_unknown_columns_and_missing_ones_are_named() -> None:
    with pytest.raises(Fault, match="the columns question, reply fit no format"):
        formats.detect({"question": "a", "reply": "b"})
    with pytest.raises(Fault, match="the column completion/response is missing"):
        formats.parse({"prompt": "a"}, "prompt_completion")


def test_a_hook_that_raises_or_answers_nonsense_is_a_fault_of_the_record() -> None:
    def raises(record: dict[str, Any]) -> dict[str, Any]:
        return {"text": record["nowhere"]}

    with pytest.raises(Fault, match="KeyError: 'nowhere'"):
        formats.apply_hook(raises, {"a": 1})
    with pytest.raises(Fault, match="must return a dict"):
        formats.apply_hook(lambda record: "text", {"a": 1})  # type: ignore[arg-type, return-value]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.sampled_from(list(formats.COLUMNS)), st.data())
def test_any_record_is_parsed_or_refused_in_one_line(name: str, data: st.DataObject) -> None:
    record = {choice[0]: data.draw(json_values) for choice in formats.COLUMNS[name]}
    try:
        turns = formats.parse(record, name)
    except Fault as fault:
        assert "\n" not in str(fault)
    else:
        assert turns[-1].role in ("assistant", "text")
