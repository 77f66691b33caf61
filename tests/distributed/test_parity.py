"""Why OPT under ZeRO-2 and ZeRO-3 may leave the path of one process: docs/parity.md, in tests that could fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import orders
from tests.recipes import command

WORKER = Path(__file__).parent / "workers" / "zero.py"
ORDER = {1: "ranks last", 2: "ranks first", 3: "ranks first"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Kernels may sum in another order on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def test_deepspeed_differs_from_one_process_by_the_order_of_a_sum_and_by_nothing_else(tmp_path: Path) -> None:
    """One process that sums in ZeRO's order has ZeRO's weights, bit for bit: nothing races, nothing counts twice."""
    done = command(
        tmp_path, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(orders.RANKS),
        str(WORKER), str(tmp_path), OMP_NUM_THREADS="1", ACCELERATE_USE_DEEPSPEED="true", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path: dict[str, Any] = {}
    for order in orders.ORDERS:
        network = orders.model()
        path[order] = orders.train(network, order), dict(network.named_parameters())
    for stage, order in ORDER.items():
        found = torch.load(tmp_path / f"{stage}.pt")
        norms, weights = path[order]
        assert worst(found["norms"], norms) < 2e-6, f"ZeRO-{stage}"
        for name, weight in weights.items():
            assert torch.equal(found["weights"][name], weight), f"ZeRO-{stage}: {name}"
    # The orders are told apart, or the equality above would show nothing.
    last, first = (path[order][1] for order in ("ranks last", "ranks first"))
    assert not all(torch.equal(last[name], first[name]) for name in last)


def test_a_unit_at_zero_moves_the_gradient_norm_and_not_the_loss() -> None:
    """The inputs of one unit are moved so that it is 1e-12 from zero for one token, once above and once below."""
    batch = orders.steps()[0]

    def gradient(bias: float | None = None, unit: int = 0) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
        network = orders.model(torch.float64)
        layer = network.model.decoder.layers[1]
        (_, watched) = orders.watch(network)
        if bias is not None:
            with torch.no_grad():
                layer.fc1.bias[unit] = bias
        seen: list[torch.Tensor] = []
        layer.fc2.register_full_backward_hook(lambda _, into, __: seen.append(into[0]))
        loss = orders.loss_sum(network, batch) / orders.trained_tokens(batch)
        loss.backward()
        everything = torch.cat([weight.grad.flatten() for weight in network.parameters()])
        return loss.item(), everything, watched.inputs[0], seen[0]

    _, _, entered, into_units = gradient()
    # The token and unit on which the loss depends most.
    token, unit = divmod(int(into_units.abs().argmax()), into_units.shape[1])
    at_zero = -entered[token, unit].item()
    (loss, below, *_), (other_loss, above, *_) = (gradient(at_zero + by, unit) for by in (-1e-12, 1e-12))
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert abs(above.norm() / below.norm() - 1) > 1e-5
    assert (above - below).norm() / below.norm() > 1e-3


@pytest.mark.parametrize("order", ["ranks last", "ranks first"])
def test_orders_agree_where_no_unit_can_flip(order: str) -> None:
    """In float64; in float32 with the units of the other run; and with a smooth activation."""
    one = orders.train(orders.model(torch.float64), "one")
    assert worst(orders.train(orders.model(torch.float64), order), one) < 1e-11
    # Adam's steps would blow up round-off where gradients are smaller than its epsilon (docs/parity.md).
    network, other = orders.model(), orders.model()
    units = orders.watch(network)
    one = orders.train(network, "one", epsilon=1e-4)
    orders.watch(other, units)
    assert worst(orders.train(other, order, epsilon=1e-4), one) < 5e-6
    network, other = (orders.model(activation="gelu") for _ in range(2))
    one = orders.train(network, "one", epsilon=1e-4)
    assert worst(orders.train(other, order, epsilon=1e-4), one) < 5e-6
    for name, weight in network.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], weight, rtol=1e-5, atol=2e-6)
