"""`check` refuses an attention that this machine cannot train with."""

from __future__ import annotations

import pytest

from launch import check, devices
from sft_dist.config import Recipe

H100 = devices.Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30)


def faults(monkeypatch: pytest.MonkeyPatch, gpus: list[devices.Gpu], kernel: str) -> list[str]:
    monkeypatch.setattr(devices, "gpus", lambda: gpus)
    recipe = Recipe.model_validate(
        {
            "model": {"model_name_or_path": "some/model", "attn_implementation": kernel},
            "data": {"dataset_name": "python-docs"},
            "output": {"output_dir": "run"},
        }
    )
    # The parts on the model and the data may ask the hub.
    monkeypatch.setattr(check, "_model", lambda _: ())
    return [finding.text for finding in check.findings(recipe) if finding.level == "fault"]


def test_flex_attention_does_not_train_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(monkeypatch, [], "flex_attention") == [
        "model.attn_implementation: flex_attention trains on a GPU only, and there is none; take sdpa"
    ]
    assert faults(monkeypatch, [], "sdpa") == []
    assert faults(monkeypatch, [H100], "flex_attention") == []
