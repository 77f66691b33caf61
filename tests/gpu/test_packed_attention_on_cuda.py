"""Packed documents do not see each other in the kernels that a processor does not have. Skipped aloud without CUDA."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sft_dist.attention import Way
from sft_dist.packing_proof import prove
from tests.architectures import FLEX, SDPA, model_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("name", SDPA)
def test_every_architecture_has_an_exact_way_with_sdpa(name: str) -> None:
    proof = prove(model_of(name).cuda())
    assert proof.way is not None, proof.line()


@pytest.mark.parametrize("name", [*FLEX, "gpt_oss"])
@pytest.mark.parametrize("candidates", [None, [Way.FLEX]])
def test_compiled_flex_attention_is_exact_forward_and_backward(name: str, candidates: list[Way] | None) -> None:
    proof = prove(model_of(name, "flex_attention").cuda(), candidates)
    assert proof.way is not None, proof.line()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn, which is not installed")
@pytest.mark.parametrize("name", SDPA)
def test_rows_joined_for_flash_attention_are_exact_in_bf16(name: str) -> None:
    proof = prove(model_of(name, "flash_attention_2").cuda(), [Way.VARLEN], autocast=torch.bfloat16)
    assert proof.way is Way.VARLEN, proof.line()
