"""What a run trains on: the rows of a trainer, of data that are prepared beforehand or while it trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from sft_dist.attention import Way
from sft_dist.config import Recipe
from sft_dist.data.account import Account, summary_lines
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.digests import overlap
from sft_dist.data.mixture import Mixture
from sft_dist.data.mixture_sources import sources_of
from sft_dist.data.overlap import overlap_line
from sft_dist.data.packing import fill
from sft_dist.data.prepare import TrainingRows, data_seed, prepare, prepare_test
from sft_dist.data.rows import Prepared
from sft_dist.data.stream import Layout, Position, Stream
from sft_dist.data.stream_sources import stream_sources
from sft_dist.data.streaming import Saved, open_stream
from sft_dist.data.template import ChatTemplate
from sft_dist.packing_choice import packed_length, packed_line, packed_way
from sft_dist.render.wording import count

if TYPE_CHECKING:
    from sft_dist.trainers.sft import SFTTrainer
    from sft_dist.world import World

Say = Callable[[str], None]


def prepared_rows(
    recipe: Recipe, template: ChatTemplate, limit: int | None
) -> tuple[TrainingRows, Prepared | None]:  # fmt: skip
    """The training rows and the held-out rows; of a stream, none of the first (see `arrange_stream`)."""
    if not recipe.data.streaming:
        return prepare(recipe, template, limit)
    from datasets import Dataset

    # TRL's trainer wants rows to look at when it is made.
    stand_in = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[-100, 0]]})
    return TrainingRows(stand_in, Account()), prepare_test(recipe, template, limit)


def data_lines(train: TrainingRows, held_out: Prepared | None) -> list[str]:
    """What the data came to, in lines for people."""
    lines = []
    several = len(train.parts) > 1
    parts = [(f"train {name}" if several else "train", account) for name, account in train.parts.items()]
    parts += [("held out", held_out.account)] if held_out is not None else []
    for name, account in parts:
        lines += summary_lines(name, account)
        lines += [f"  skipped {where}" for where in account.bad]
    if held_out is not None and train.parts:
        line = overlap_line(overlap(train.rows, held_out.rows), f"{len(held_out.rows):,} held-out rows")
        lines += [f"held out: {line}"] if line else []
    return lines


def mixture_line(train: TrainingRows, mixture: Mixture) -> str:
    """What a mixture comes to, in a line for people."""
    read = mixture.source_epochs(0)
    told = [
        f"{name} {counted / len(mixture):.1%} ({counted:,} of {size:,} documents, {times:.2f} epochs)"
        for name, counted, size, times in zip(train.parts, mixture.counts, mixture.sizes, read, strict=True)
    ]
    return f"mixture: {len(mixture):,} documents an epoch: {'; '.join(told)}"


def arrange(trainer: SFTTrainer, recipe: Recipe, train: TrainingRows, limit: int | None, say: Say) -> None:
    """Settle the rows: packed in the way that the loaded model proves exact, or one document each."""
    capacity, way = _packing(trainer, recipe, limit, say)
    arrangement = Arrangement(document_lengths(train.rows), capacity, data_seed(recipe), train.mixture)
    if way is not None:
        say(f"packed: {packed_line(arrangement)}")
    if train.mixture is not None:
        say(mixture_line(train, train.mixture))
    trainer.arrange(arrangement, way, train.sources)


def arrange_stream(
    trainer: SFTTrainer, recipe: Recipe, limit: int | None, world: World, checkpoint: Path | None, ending: ExitStack,
    say: Say,
) -> Stream:  # fmt: skip
    """Settle the rows of a stream, from its beginning or from where a checkpoint left it.

    `ending` ends the process that prepares the blocks. Raises :class:`DataError` where the first cannot be made.
    """
    capacity, way = _packing(trainer, recipe, limit, say)
    fingerprints = tuple(source.fingerprint for source in stream_sources(recipe))
    saved = Saved.read(checkpoint, fingerprints) if checkpoint else Saved(0, Position(), fingerprints)
    layout = Layout(capacity, data_seed(recipe))
    together = trainer.accelerator.wait_for_everyone
    stream, process = open_stream(recipe, limit, layout, saved.position, world.local_rank == 0, together)
    if process is not None:
        ending.callback(process.stop)
    first = stream.block(saved.position.block)
    lengths = document_lengths(first.rows)
    full = "" if capacity is None else f", {fill(first.packs, lengths, capacity):.1%} full"
    say(f"stream: blocks of {count(len(lengths), 'document')}; the first has {count(len(first.packs), 'row')}{full}")
    names = list(sources_of(recipe.data)) if recipe.data.mixture is not None else []
    trainer.arrange_stream(stream, way, saved.row, float(lengths.mean()), names, fingerprints)
    clock = StreamClock(trainer, saved, stream)
    trainer.stream_position = clock.document
    trainer.add_callback(clock)
    return stream


def _packing(trainer: SFTTrainer, recipe: Recipe, limit: int | None, say: Say) -> tuple[int | None, Way | None]:
    capacity = packed_length(recipe.data.packing, limit)
    way = packed_way(trainer.model, recipe.data.packing, trainer.args.bf16, say, trainer.backend.shards_weights)
    return None if way is None else capacity, way


class StreamClock(TrainerCallback):  # type: ignore[misc]
    """Tells the position of a stream, and its share of the training as its epoch, which has no end of its own."""

    def __init__(self, trainer: SFTTrainer, saved: Saved, stream: Stream) -> None:
        self.trainer, self.saved, self.stream = trainer, saved, stream
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.epoch = state.global_step / state.max_steps

    def document(self) -> dict[str, str]:
        """What a checkpoint of now keeps of the stream, as a file by its name."""
        row = self.saved.row + (self.trainer.state.global_step - self._first_step) * self.trainer.rows_per_step
        return Saved(row, self.stream.position_at(row), self.saved.fingerprints).document()
