"""What an optimizer stands at is put back into a new one: the steps that follow are the same, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Adafactor

from sft_dist.checkpoints import writer
from sft_dist.checkpoints.files import write_tensors
from sft_dist.checkpoints.pieces import Reader
from sft_dist.checkpoints.states import PlainStates
from sft_dist.errors import UserError

Make = Callable[[list[dict[str, object]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adamw amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    # As the trainer makes it.
    "adafactor": lambda groups: Adafactor(groups, lr=0.01, scale_parameter=False, relative_step=False),
    "adafactor relative": lambda groups: Adafactor(groups, lr=None, scale_parameter=True, relative_step=True),
    "adafactor momentum": lambda groups: Adafactor(groups, lr=0.01, beta1=0.9, scale_parameter=True,
                                                   relative_step=False),
}  # fmt: skip


class Training:
    """A model with tied weights, a frozen one, and one that gets no gradient."""

    def __init__(self, optimizer: str, width: int = 6, dtype: torch.dtype = torch.float32, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.ModuleDict(
            {
                "embed": torch.nn.Embedding(11, width),
                "norm": torch.nn.LayerNorm(width),
                "frozen": torch.nn.Linear(width, width),
                "head": torch.nn.Linear(width, 11, bias=False),
                "idle": torch.nn.Linear(2, 2),
            }
        ).to(dtype)
        self.model["head"].weight = self.model["embed"].weight
        self.model["frozen"].requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = OPTIMIZERS[optimizer](groups)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 11, (4, 5), generator=draw)
            hidden = self.model["frozen"](self.model["norm"](self.model["embed"](tokens)))
            loss = torch.nn.functional.cross_entropy(self.model["head"](hidden).flatten(0, 1).float(), tokens.flatten())
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Adafactor calls a function of torch by an old name.
                self.optimizer.step()
            self.optimizer.zero_grad()

    def states(self, rank: int = 0, world: int = 1) -> PlainStates:
        return PlainStates(self.model, self.optimizer, rank, world)

    def bits(self) -> dict[str, bytes]:
        """All that the training changes."""
        found = {name: raw(p) for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name} {kind}"] = raw(value) if isinstance(value, torch.Tensor) else repr(value).encode()
        return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def written(folder: Path, training: Training, world: int = 1) -> tuple[Reader, dict[str, float]]:
    """The checkpoint of a training that several ranks hold alike."""
    files, steps = [], {}
    for rank in range(world):
        states = training.states(rank, world)
        path = folder / f"rank-{rank:05d}.safetensors"
        write_tensors(path, [writer._flat(piece) for piece in states.pieces()])
        files.append(path)
        steps |= states.steps()
    return Reader(files, training.states().shapes()), steps


@pytest.mark.parametrize(("dtype", "world"), [(torch.float32, 1), (torch.bfloat16, 3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_new_optimizer_goes_on_bit_for_bit(tmp_path: Path, optimizer: str, dtype: torch.dtype, world: int) -> None:
    whole = Training(optimizer, dtype=dtype)
    whole.steps(0, 3)
    reader, steps = written(tmp_path, whole, world)
    fresh = Training(optimizer, dtype=dtype)
    # The frozen weights come from the model that is trained on, the others must come from the checkpoint.
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    fresh.states().load(reader, steps)
    assert fresh.bits() == whole.bits()
    whole.steps(3, 6)
    fresh.steps(3, 6)
    assert fresh.bits() == whole.bits()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd momentum", "adafactor"])
def test_a_used_optimizer_is_put_back(tmp_path: Path, optimizer: str) -> None:
    """As in a rollback: nothing of the steps since is left, not even their states."""
    training = Training(optimizer)
    training.steps(0, 2)
    before = training.bits()
    reader, steps = written(tmp_path, training)
    training.steps(50, 53)
    assert training.bits() != before
    training.states().load(reader, steps)
    assert training.bits() == before


@pytest.mark.parametrize("optimizer", ["adamw", "sgd momentum", "adafactor"])
def test_a_checkpoint_of_before_the_first_step_has_no_states(tmp_path: Path, optimizer: str) -> None:
    reader, steps = written(tmp_path, Training(optimizer))
    assert steps == {}
    used = Training(optimizer)
    used.steps(0, 2)
    used.states().load(reader, steps)
    fresh = Training(optimizer)
    assert used.bits() == fresh.bits()
    used.steps(0, 2)
    fresh.steps(0, 2)
    assert used.bits() == fresh.bits()


def test_the_trial_leaves_weights_and_gradients_alone(tmp_path: Path) -> None:
    whole = Training("adamw")
    whole.steps(0, 2)
    reader, steps = written(tmp_path, whole)
    fresh = Training("adamw")
    fresh.states().load(reader, steps)
    assert all(parameter.grad is None for parameter in fresh.model.parameters())
    assert {id(p) for p in fresh.optimizer.state} <= {id(p) for p in fresh.model.parameters()}


def test_other_sizes_are_one_line(tmp_path: Path) -> None:
    reader, steps = written(tmp_path, Training("adamw"))
    with pytest.raises(UserError) as caught:
        Training("adamw", width=8).states().load(reader, steps)
    assert str(caught.value) == (
        "output.resume: embed.weight has the shape [11, 8] here and [11, 6] in the checkpoint; resume with the model "
        "that it was written by"
    )


def test_a_weight_too_many_or_too_few_is_one_line(tmp_path: Path) -> None:
    reader, steps = written(tmp_path, Training("adamw"))
    thawed = Training("adamw")
    thawed.model["frozen"].requires_grad_(True)
    with pytest.raises(UserError) as caught:
        thawed.states().load(reader, steps)
    assert str(caught.value) == (
        "output.resume: the checkpoint has no frozen.weight; resume with the recipe that it was written by"
    )
    frozen = Training("adamw")
    frozen.model["norm"].requires_grad_(False)
    before = frozen.bits()
    with pytest.raises(UserError) as caught:
        frozen.states().load(reader, steps)
    assert str(caught.value) == (
        "output.resume: the checkpoint has norm.weight, which is not trained here; resume with the recipe that it was "
        "written by"
    )
    assert frozen.bits() == before


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("adamw", "sgd momentum", "states exp_avg, exp_avg_sq of embed.weight, this optimizer momentum_buffer"),
        ("adamw", "sgd", "states exp_avg, exp_avg_sq of embed.weight, this optimizer none"),
        ("sgd momentum", "adamw", "states momentum_buffer of embed.weight, this optimizer exp_avg, exp_avg_sq"),
        ("adafactor", "adamw", "of embed.weight, this optimizer exp_avg, exp_avg_sq"),
        ("adamw", "adafactor", "states exp_avg, exp_avg_sq of embed.weight, this optimizer RMS, exp_avg_sq_col"),
    ],
)
def test_another_optimizer_is_one_line(tmp_path: Path, there: str, here: str, said: str) -> None:
    whole = Training(there)
    whole.steps(0, 2)
    reader, steps = written(tmp_path, whole)
    with pytest.raises(UserError) as caught:
        Training(here).states().load(reader, steps)
    message = str(caught.value)
    assert message.startswith("output.resume: the checkpoint has the states ") and said in message
    assert message.endswith("; resume with the recipe that it was written by") and "\n" not in message
