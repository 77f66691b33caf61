"""DPO's trainer on one process: its losses are TRL's, filler counts for nothing, dropout is off, bad references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from sft_dist.backend import Backend
from sft_dist.config_stages import DPOSection
from sft_dist.dpo.batch import PairCollator
from sft_dist.dpo.losses import OF_TOKENS
from sft_dist.dpo.measures import HELD_OUT, PairSums, held_out_means
from sft_dist.dpo.reference import FullReference
from sft_dist.dpo.scoring import divergence
from sft_dist.trainers.dpo import DPOTrainer
from tests import tiny

FILLER = {"prompt_ids": [0], "chosen_ids": [], "rejected_ids": [], "is_filler": True}


def pairs(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    chance = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return [int(token) for token in chance.integers(5, 250, chance.integers(1, most))]

    return [{"prompt_ids": ids(6), "chosen_ids": ids(20), "rejected_ids": ids(20)} for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small take ten times as long on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FullReference, Any]:
    """A policy with dropout, a reference that differs from it, and their tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder, "opt", activation="gelu")
    policy = AutoModelForCausalLM.from_pretrained(folder, dropout=0.3)
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    add_fused_lm_head(other)
    reference = FullReference(other.eval(), torch.device("cpu"), bf16=False, sharded=False)
    return policy, reference, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def made(models: tuple[Any, FullReference, Any], tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    policy, reference, tokenizer = models
    args = trl.DPOConfig(output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, bf16=False, report_to="none",
                         remove_unused_columns=False, gradient_checkpointing=False, use_weighting=True)  # fmt: skip
    rows = Dataset.from_list([{**pair, "length": 9, "margin": None} for pair in pairs(2)])
    return DPOTrainer(policy, args, rows, None, tokenizer, Backend(), DPOSection(use_weighting=True), reference)


def loss_and_gradient(trainer: DPOTrainer, rows: list[dict[str, Any]], settings: DPOSection) -> tuple[float, float]:
    trainer.settings, trainer.use_weighting = settings, settings.use_weighting
    batch = PairCollator(1)(rows)
    tokens = batch["completion_mask"][: len(rows), 1:]
    trainer._in_step = (max(int(batch["is_pair"].sum()), 1), max(int(tokens.sum()), 1))
    trainer.sums = PairSums(torch.device("cpu"))
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    squares = sum(float(p.grad.pow(2).sum()) for p in trainer.model.parameters() if p.grad is not None)
    return loss.item(), squares**0.5


SETTINGS = [
    {"loss_type": kind, "label_smoothing": 0.1 if kind in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0}
    for kind in ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
                 "aot_unpaired", "apo_zero", "apo_down", "discopop", OF_TOKENS, "sigmoid_norm")
] + [
    {"loss_type": ["sigmoid", "bco_pair", OF_TOKENS], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": "sigmoid", "ld_alpha": 0.4},
    {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
    {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: "-".join(map(str, given.values())))
def test_the_loss_of_a_whole_batch_is_that_of_trl(made: DPOTrainer, given: dict[str, Any]) -> None:
    settings, rows = DPOSection(**given), pairs(5, seed=3)
    ours = loss_and_gradient(made, rows, settings)
    batch = PairCollator(1)(rows)
    known = made.reference.log_probs(batch) if made.reference is not None else torch.empty(0)
    theirs = made
    theirs.loss_types, theirs.loss_weights = (
        settings.loss_type,
        settings.loss_weights or [1.0] * len(settings.loss_type),
    )
    for name in ("beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"):
        setattr(theirs, name, getattr(settings, name))
    weights = made_weights(batch, settings)
    theirs.precompute_ref_logps = True
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (known * weights).sum(1).chunk(2)
    made.model.zero_grad()
    loss = trl.DPOTrainer._compute_loss(theirs, made.model, inputs, False)
    loss.backward()
    squares = sum(float(p.grad.pow(2).sum()) for p in made.model.parameters() if p.grad is not None)
    assert ours == pytest.approx((loss.item(), squares**0.5), rel=2e-5)


def made_weights(batch: dict[str, torch.Tensor], settings: DPOSection) -> torch.Tensor:
    from sft_dist.dpo.scoring import token_weights

    return token_weights(batch["completion_mask"][:, 1:].bool(), settings.ld_alpha)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sppo_hard", "aot", OF_TOKENS])
def test_filler_changes_neither_loss_nor_gradient_nor_measure(made: DPOTrainer, kind: str) -> None:
    rows, settings = pairs(3, seed=5), DPOSection(loss_type=kind)
    alone = (*loss_and_gradient(made, rows, settings), made.sums.look(lambda sums: sums))
    beside = (*loss_and_gradient(made, [rows[0], FILLER, *rows[1:], FILLER], settings), made.sums.look(lambda s: s))
    assert beside[:2] == pytest.approx(alone[:2], rel=1e-6)
    assert beside[2] == pytest.approx(alone[2], rel=1e-6)


def test_a_micro_batch_of_filler_has_a_gradient_of_zero(made: DPOTrainer) -> None:
    """And a graph: processes wait for each other's gradients."""
    assert loss_and_gradient(made, [FILLER, FILLER], DPOSection(loss_type=["sigmoid", OF_TOKENS])) == (0.0, 0.0)


def test_dropout_is_off_where_a_model_keeps_its_rates_as_numbers(made: DPOTrainer) -> None:
    assert made.model.config.dropout == 0.3
    rows = pairs(2)
    assert loss_and_gradient(made, rows, DPOSection()) == loss_and_gradient(made, rows, DPOSection())


def test_held_out_means_weigh_pairs_and_tokens() -> None:
    rows = torch.zeros(2, len(HELD_OUT), dtype=torch.float64)
    for name, values in {"loss": (1.0, 3.0), "nll": (6.0, 2.0), "chosen": (3.0, 1.0), "kl": (0.3, 0.5),
                         "rewards/accuracies": (1.0, 0.0)}.items():  # fmt: skip
        rows[:, HELD_OUT.index(name)] = torch.tensor(values, dtype=torch.float64)
    mixed = DPOSection(loss_type=["sigmoid", OF_TOKENS], loss_weights=[1.0, 0.5])
    found = held_out_means(rows, mixed)
    assert found["loss"] == pytest.approx(2 + 0.5 * 2)
    assert found["nll"] == pytest.approx(2)
    assert found["perplexity"] == pytest.approx(np.exp(2))
    assert found["kl"] == pytest.approx(0.2)
    assert found["rewards/accuracies"] == 0.5
    assert (found["tokens"], found["records"]) == (4, 2)
    rows[:, HELD_OUT.index("kl")] = torch.nan
    assert "kl" not in held_out_means(rows, mixed)


def test_the_divergence_is_over_the_whole_vocabulary() -> None:
    chance = np.random.default_rng(0)
    ours, theirs = chance.normal(size=(2, 4, 6)), chance.normal(size=(2, 4, 6))
    mask = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])

    def softmax(x: Any) -> Any:
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(ours), softmax(theirs)
    each = (p * np.log(p / q)).sum(-1)
    # What a token has is predicted by the one before it.
    expected = [sum(each[row, at - 1] for at in range(1, 4) if mask[row, at]) for row in range(2)]
    found = divergence(torch.tensor(ours), torch.tensor(theirs), torch.tensor(mask))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
