"""The benchmark of training in small on CUDA: every way ends with figures. Skipped aloud without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sft_dist.hardware import peak_flops
from tests.benchmarks import gpu_sft
from tests.benchmarks.sft_cells import Way

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_every_way_measures_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "found.json"
    gpu_sft.main(["--models", "tiny", "--json", str(file), "--table", str(tmp_path / "table.md")])
    found = json.loads(file.read_text())
    assert [cell["way"] for cell in found["cells"]] == [way.value for way in Way]
    for cell in found["cells"]:
        assert "figures" in cell, cell
        assert cell["figures"]["tokens_per_second"] > 0
        assert (cell["figures"]["mfu"] is None) == (peak_flops(torch.cuda.get_device_name()) is None)
    assert found["device"] == torch.cuda.get_device_name()
