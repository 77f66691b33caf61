"""The loss and the figures of a reward model, and its rewards for records of any format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from sft_dist.config import DataSection, Recipe
from sft_dist.data.pair_batches import PairCollator, PairRows, margins_of
from sft_dist.data.template import load_template, stop_token_ids
from sft_dist.errors import UserError
from sft_dist.heads import draw_head, prepared_config
from sft_dist.models import has_dropout, switch_dropout_off
from sft_dist.recipe import combinations
from sft_dist.render.rewards import RewardMeasure, RewardReport, ScoredPair, histogram, to_html
from sft_dist.reward_model import RewardModel, settle_pad_token
from sft_dist.score.__main__ import main
from sft_dist.trainers.reward import pair_losses
from tests import tiny


@pytest.mark.parametrize("centre", [None, 0.01, 2.0])
def test_the_loss_is_that_of_the_papers(centre: float | None) -> None:
    draw = np.random.default_rng(0)
    chosen, rejected, margin = draw.normal(0, 3, (3, 200))
    expected = np.log1p(np.exp(-(chosen - rejected - margin))) + (centre or 0.0) * (chosen + rejected) ** 2
    found = pair_losses(*(torch.from_numpy(part) for part in (chosen, rejected, margin)), centre)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_a_batch_has_chosen_sides_first_and_filler_that_is_no_pair() -> None:
    from datasets import Dataset

    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [8], "margin": 1.37},
        {"prompt_ids": [4], "chosen_ids": [3], "rejected_ids": [2, 2], "margin": None},
    ]
    pairs = PairRows(Dataset.from_list(rows), 2, filler_token=9)
    batch = PairCollator(0)([pairs[(1,)], pairs[(0,)], pairs[()]])
    assert batch["input_ids"].tolist() == [
        [4, 3, 0, 0, 0], [5, 6, 7, 8, 9], [9, 0, 0, 0, 0], [4, 2, 2, 0, 0], [5, 6, 8, 0, 0], [9, 0, 0, 0, 0]
    ]  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == [2, 5, 1, 3, 3, 1]
    assert batch["is_pair"].tolist() == [True, True, False]
    assert margins_of(batch).tolist() == pytest.approx([0.0, 1.37, 0.0])
    # Held-out rows come as they are.
    assert margins_of(PairCollator(0)(rows)).tolist() == pytest.approx([1.37, 0.0])


SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "pad_token_id": 1, "max_position_embeddings": 64}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=32),
    "mistral": lambda: MistralConfig(**SIZES, intermediate_size=32, num_key_value_heads=1),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_reward_is_read_off_the_last_token_whatever_the_padding(architecture: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(prepared_config(CONFIGS[architecture](), "reward")).eval()
    switch_dropout_off(model)
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 2], [3]]

    def alone(row: list[int]) -> float:
        base = model.get_decoder() if architecture == "opt" else model.model
        hidden = base(input_ids=torch.tensor([row])).last_hidden_state
        return float(model.score(hidden)[0, -1, 0])

    with torch.no_grad():
        expected = [alone(row) for row in rows]
        left = torch.tensor([[1] * (6 - len(row)) + row for row in rows])
        on_the_left = model(input_ids=left, attention_mask=(left != 1).long()).logits[:, 0].tolist()
    assert RewardModel(model, AutoPad(), None).rewards(rows, batch_size=2) == pytest.approx(expected, abs=1e-5)
    assert on_the_left == pytest.approx(expected, abs=1e-5)


class AutoPad:
    """What of a tokenizer a reward model asks for."""

    pad_token_id = 1


@pytest.mark.parametrize("architecture", CONFIGS)
def test_dropout_is_off_in_every_architecture(architecture: str) -> None:
    config = CONFIGS[architecture]()
    for name in ("dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    model = AutoModelForSequenceClassification.from_config(prepared_config(config, "reward")).train()

    @torch.no_grad()
    def different() -> int:
        return len({float(model(input_ids=torch.arange(3, 20)[None]).logits) for _ in range(3)})

    assert has_dropout(model)
    assert different() > 1
    switch_dropout_off(model)
    assert not has_dropout(model)
    assert different() == 1


def test_the_pad_token_ends_no_answer() -> None:
    said: list[str] = []
    tokenizer = tiny.chat_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    ends = stop_token_ids(load_template(tokenizer, DataSection(dataset_name="none")))
    settle_pad_token(tokenizer, ends, said.append)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in ends
    settle_pad_token(tokenizer, ends, said.append)
    assert len(said) == 1
    settle_pad_token(tokenizer, tokenizer.all_special_ids, said.append)
    assert "read off the token before it" in said[1]


def reward_folder(folder: Path) -> Path:
    """A reward model of random weights."""
    tiny.save_model(folder)
    config = prepared_config(AutoConfig.from_pretrained(folder), "reward")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    draw_head([(n, p) for n, p in model.named_parameters() if n.startswith("score")], seed=1)
    model.save_pretrained(folder)
    return folder


def test_records_of_every_format_get_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = reward_folder(tmp_path / "model")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    records: list[dict[str, Any]] = [
        {"messages": turns},
        {"prompt": "Why?", "completion": "Because."},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        {"prompt": "Why?", "completion": ""},
        {"text": "Because."},
        {"prompt": "Why?", "completion": "because " * 400},
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "rewards.jsonl"
    words = [str(model), str(file), "--output", str(output)]
    assert main(words) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft-dist: ")]
    assert told == [f"sft-dist: {file}:5: every assistant turn is empty; mend it, or skip so many by --max-bad-records"]
    assert not output.exists()
    assert main([*words, "--max-bad-records", "2"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[-3:-1] == [
        "7 records, 6 rewards, " + told[-3].partition("rewards, ")[2],
        "without a reward for a fault: 2",
    ]
    assert told[-1].endswith("of 1 pair")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{file}:{number}" for number in range(1, 8)]
    assert "the model reads 512" in lines[6]["fault"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        expected = float(loaded(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits)
    assert [line["reward"] for line in lines[:3]] == pytest.approx([expected] * 3, abs=1e-5)
    assert lines[3]["chosen_reward"] == pytest.approx(expected, abs=1e-5)
    assert lines[3]["margin"] == pytest.approx(lines[3]["chosen_reward"] - lines[3]["rejected_reward"])


def test_a_model_without_a_head_gives_no_rewards(tmp_path: Path) -> None:
    from sft_dist.reward_model import load_reward_model

    with pytest.raises(UserError, match="no reward model \\(LlamaForCausalLM\\)"):
        load_reward_model(str(tiny.save_model(tmp_path / "causal")))


def test_the_histogram_has_an_edge_at_zero_and_every_pair() -> None:
    held = histogram(np.array([-0.3, 0.0, 0.2]), np.array([2.9, -1.1, 3.0]))
    assert held is not None
    assert held.before is not None
    assert held.after is not None
    assert 0.0 in held.edges
    assert sum(held.before) == sum(held.after) == 3
    assert sum(count for count, low in zip(held.after, held.edges, strict=False) if low < 0) == 1
    assert histogram(None, None) is None


def test_the_page_escapes_what_it_shows() -> None:
    measure = RewardMeasure(0.5, 0.75, 1.0, 0.1, 0.2, 4)
    pair = ScoredPair("<f>:1", (("user", "<b>q"),), "<i>a", "<u>b", (0.0, 1.0), (2.0, -1.0))
    bins = histogram(np.array([-1.0]), np.array([3.0]))
    page = to_html(RewardReport("<t>", "<m>", "<d>", measure, measure, bins, (pair,), (pair,), (("f", "<v>"),)))
    for raw in ("<b>q", "<i>a", "<u>b", "<f>", "<m>", "<d>", "<v>"):
        assert raw not in page
    assert "margin 3.000" in page


@pytest.mark.parametrize(
    ("stage", "data", "key"),
    [
        ("sft", {"format": "preference"}, "data.format"),
        ("reward", {"format": "messages"}, "data.format"),
        ("dpo", {"truncation_mode": "keep_end"}, "data.truncation_mode"),
        ("reward", {"min_response_length": 3}, "data.min_response_length"),
        ("reward", {"packing": True}, "data.packing"),
        ("reward", {"format": "preference", "truncation_mode": "drop"}, None),
    ],
)
def test_settings_that_pairs_do_not_have_are_refused(stage: str, data: dict[str, Any], key: str | None) -> None:
    recipe = Recipe.model_validate(
        {"stage": stage, "model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d.jsonl", **data},
         "output": {"output_dir": "run"}}
    )  # fmt: skip
    assert [found for found, _ in combinations(recipe)] == ([key] if key else [])
