"""What is verified: the settings that are trained under every strategy, and the rows they train on. Free of torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# The reference, and the same process with one row a micro-batch.
SINGLE, ACCUMULATED = "single", "accumulated"
# Rows of a global batch. One process takes them as one micro-batch, so that accumulation is compared as well.
GLOBAL_BATCH = 8
STEPS_OF_AN_EPOCH = 4
# The last global batch of an epoch holds three rows.
RECORDS = GLOBAL_BATCH * (STEPS_OF_AN_EPOCH - 1) + 3
EPOCHS = 2
LEARNING_RATE = 1e-3
SHAPES = ("opt", "llama", "mistral")
# Relative, in fp32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One setting: its name, the overrides that make it, and whether the embeddings are tied to the head."""

    name: str
    overrides: tuple[str, ...] = ()
    tied: bool = False


# LoRA's B begins at zero and has small gradients: where they are about as large as epsilon, Adam's step is as uncertain
# as they are (docs/parity.md).
_LORA = ("peft.use_peft=true", "train.adam_epsilon=1e-2")
CASES = (
    Case("full"),
    Case("packed", ("data.packing=true",)),
    Case("checkpointing", ("train.gradient_checkpointing=true",)),
    Case("tied", tied=True),
    Case("lora", _LORA),
    Case("qlora", (*_LORA, "peft.load_in_4bit=true")),
)


def micro_batch(processes: int) -> int:
    """Rows of a micro-batch: on one process the global batch, on several half of a process's share, or one."""
    return GLOBAL_BATCH if processes == 1 else max(1, GLOBAL_BATCH // processes // 2)


@dataclass(frozen=True)
class Plan:
    """Which cases are run for which shapes, each shape in a folder of its own name."""

    shapes: tuple[str, ...]
    cases: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Leave it where the processes of all strategies find it."""
        (folder / "plan.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a folder."""
        held = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        return cls(tuple(held["shapes"]), tuple(held["cases"]))


def run_folder(folder: Path, strategy: str, case: str) -> Path:
    """Where the run of a case lies in the folder of its shape."""
    return folder / "runs" / strategy / case
