"""Models side by side: what is drawn, how far from the first it is, and what the table and the page say of it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from launch import compare as launcher
from sft_dist.config import DataSection
from sft_dist.data.formats import Turn
from sft_dist.data.template import ChatTemplate, load_template
from sft_dist.errors import UserError
from sft_dist.evaluation.contest import Drawing, Judge, Responses, drawn, kl_per_response
from sft_dist.render.comparison import Measure
from sft_dist.render.contest import Asked, Contender, Contest, Sample, lines, to_html, to_terminal
from tests import tiny

PROMPTS = [(Turn("user", text),) for text in ("a", "the quick brown fox jumps over the lazy dog", "def add(a, b):")]
MEASURE = Measure(perplexity=12.5, loss=2.53, tokens=1234, records=40)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    """Two models of one shape and other weights."""
    folders = [tiny.save_model(tmp_path_factory.mktemp("model"), seed=seed) for seed in (5, 6)]
    return [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]


@pytest.fixture
def template() -> ChatTemplate:
    return load_template(tiny.chat_tokenizer(), DataSection(dataset_name="x"))


def test_a_response_depends_on_seed_and_place_and_not_on_its_batch(
    models: list[PreTrainedModel], template: ChatTemplate
) -> None:
    drawing = Drawing(temperature=1.0, max_new_tokens=8, seed=3)
    found = drawn(models[0], template, PROMPTS, drawing, 512)
    assert drawn(models[0], template, PROMPTS[:2], drawing, 512).responses == found.responses[:2]
    assert drawn(models[0], template, PROMPTS, replace(drawing, seed=4), 512).responses != found.responses
    assert all(1 <= len(ids) <= 8 for ids in found.responses)


def test_kl_is_the_sum_over_the_positions_of_a_response(models: list[PreTrainedModel]) -> None:
    prompt, response = [3, 4, 5], [7, 8]
    (found,) = kl_per_response(models[0], models[1], Responses([prompt], [response]), 0.7)
    expected = 0.0
    for end in range(len(prompt), len(prompt) + len(response)):
        ids = torch.tensor([[*prompt, *response][:end]])
        p, q = ((model(ids).logits[0, -1].double() / 0.7).softmax(-1) for model in models)
        expected += (p * (p.log() - q.log())).sum().item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert kl_per_response(models[0], models[0], Responses([prompt], [response]), 1.0) == [0.0]


def test_an_answer_is_scored_as_a_whole_conversation(template: ChatTemplate) -> None:
    given: list[list[int]] = []

    class Model:
        limit = None

        def rewards(self, rows: list[list[int]], batch_size: int) -> list[float]:
            given.extend(rows)
            return [0.0] * len(rows)

    Judge(Model(), template).rewards(PROMPTS[:1], ["yes"])  # type: ignore[arg-type]
    whole = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert given == [template.tokenizer(whole)["input_ids"]]


def contest(better: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Contest:
    def samples(rewards: tuple[float, ...], kl: float | None) -> tuple[Sample, ...]:
        return tuple(Sample(f"text <{r}>", r, 10 + i, i > 0, kl) for i, r in enumerate(rewards))

    first = Contender("sft", "runs/sft/model", MEASURE, samples((0.0, 1.0, 2.0), None))
    other = Contender("ppo", "runs/ppo/model", replace(MEASURE, perplexity=13.0), samples(better, 1.5))
    asked = tuple(Asked((("user", f"question {i}"),), f"answer {i}", 5.0 + i) for i in range(3))
    return Contest("runs/reward/model", "python-docs", 1.0, 64, asked, (first, other))


def test_the_table_compares_on_the_same_prompts() -> None:
    sft, ppo, data = lines(contest())
    assert (sft.reward, sft.change, sft.wins, sft.kl, sft.perplexity) == ("1.00 ± 0.58", "", "", "", "12.50")
    # Differences 1, 1, 2: mean 4/3, standard deviation 1/sqrt(3), over sqrt(3).
    assert (ppo.change, ppo.better, ppo.wins, ppo.kl) == ("+1.33 ± 0.33", True, "100%", "1.50")
    assert (ppo.tokens, ppo.ended, ppo.perplexity) == ("11", "67%", "13.00")
    assert (data.reward, data.change, data.kl) == ("6.00 ± 0.58", "+5.00 ± 0.00", "")


@pytest.mark.parametrize(
    ("rewards", "better"), [((1.0, 0.0, 2.5), None), ((-1.0, 0.0, 0.9), False), ((0.0, 1.0, 2.0), None)]
)
def test_a_change_within_two_standard_errors_is_none(rewards: tuple[float, ...], better: bool | None) -> None:
    assert lines(contest(rewards))[1].better is better


def test_the_page_has_every_response_and_no_markup_of_theirs() -> None:
    page = to_html(contest())
    assert page.count("text &lt;") == 6
    assert "text <" not in page
    assert page.count("cut at the limit") == 2
    for text in ("question 2", "answer 2", "runs/ppo/model", "+1.33 ± 0.33"):
        assert text in page


@pytest.mark.parametrize("width", [60, 120])
def test_the_terminal_shows_table_and_first_prompts(width: int) -> None:
    stream = io.StringIO()
    to_terminal(contest(), Console(file=stream, width=width, _environ={}), prompts=1)
    text = stream.getvalue()
    assert "question 0" in text
    assert "question 1" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_one_prompt_has_no_standard_error() -> None:
    whole = contest()
    one = replace(whole, asked=whole.asked[:1],
                  contenders=tuple(replace(c, samples=c.samples[:1]) for c in whole.contenders))  # fmt: skip
    assert lines(one)[1].change == "+1.00"
    assert lines(one)[1].better is None
    assert math.isfinite(one.contenders[0].rewards[0])


def run(folder: Path, stage: str = "sft") -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    recipe = {"stage": stage, "model": {"model_name_or_path": "m"}, "data": {"dataset_name": "python-docs"},
              "output": {"output_dir": "o"}}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def test_models_have_the_names_of_their_runs_or_those_they_are_given(tmp_path: Path) -> None:
    sft, ppo, reward = (run(tmp_path / name) for name in ("sft", "ppo", "reward"))
    found = launcher.arguments([str(sft), f"tuned={ppo}", str(ppo / "model")], str(reward), None)
    assert found == [str(sft / "recipe.yaml"), str(reward / "model"), f"sft={sft / 'model'}",
                     f"tuned={ppo / 'model'}", f"ppo={ppo / 'model'}"]  # fmt: skip


def test_names_that_are_one_and_recipes_without_conversations_are_refused(tmp_path: Path) -> None:
    sft, dpo = run(tmp_path / "sft"), run(tmp_path / "dpo", "dpo")
    with pytest.raises(UserError, match="sft: two models have this name; give them names"):
        launcher.arguments([str(sft), str(sft)], str(sft), None)
    with pytest.raises(UserError, match="a recipe of stage dpo, whose data are no conversations"):
        launcher.arguments([str(dpo), str(sft)], str(sft), None)


def test_a_model_beside_itself_and_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sft_dist.compare import Candidate, compare
    from sft_dist.config import Recipe

    folders = [tiny.save_model(tmp_path / f"model-{seed}", seed=seed) for seed in (5, 6)]
    judge = AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=1)
    judge.save_pretrained(tmp_path / "reward")
    tiny.chat_tokenizer().save_pretrained(tmp_path / "reward")
    records = tmp_path / "held-out.jsonl"
    turns = [[{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": f"It is {n}."}] for n in range(6)]
    records.write_text("".join(json.dumps({"conversations": one}) + "\n" for one in turns))
    recipe = Recipe.model_validate(
        {"model": {"model_name_or_path": str(folders[0])}, "output": {"output_dir": "o"},
         "data": {"dataset_name": str(records), "dataset_test_split": str(records)}, "train": {"max_length": 64}}
    )  # fmt: skip
    models = [Candidate("a", str(folders[0])), Candidate("b", str(folders[1])), Candidate("again", str(folders[0]))]
    drawing = Drawing(temperature=1.0, max_new_tokens=6, seed=0)
    compare(recipe, str(tmp_path / "reward"), models, 4, drawing, tmp_path / "out")
    a, b, again = json.loads((tmp_path / "out" / "comparison.json").read_text())["models"].values()
    assert a["kl"] is None
    assert again["kl"] == 0.0
    assert b["kl"] > 0.01
    assert again["tokens"] == a["tokens"]
    for name in ("reward", "perplexity"):
        assert again[name] == a[name] != b[name]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [one["reference"] for one in samples] == [f"It is {n}." for n in range(4)]
    assert samples[0]["a"]["text"] == samples[0]["again"]["text"]
    assert "What is 0?" in capsys.readouterr().out
