"""How fast data are prepared, beside TRL's own preparation and the bare tokenizer, and in how much memory.

    python -m tests.benchmarks.preparation [--conversations 100000] [--workers 2] [--memory]

prints the tables of docs/benchmarks.md. Each measure is a process of its own, one after the other, on one corpus. TRL
prepares it as messages, which trains every token, and as prompt and completion, which trains the last answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.corpus import conversations, short_conversations, write

LENGTH = 2048


def model_folder() -> str:
    from sft_dist import builtin_models

    return str(builtin_models.resolve("smollm2-135m-instruct"))


def messages(file: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in Path(file).read_text(encoding="utf-8").splitlines()]


def ours(file: str, workers: int) -> dict[str, Any]:
    """Template, tokens, masks, packing; `SFT_DIST_CACHE` and `SFT_DIST_FASTOKENS` are set from outside."""
    from sft_dist.config import DataSection, ModelSection
    from sft_dist.data.arrangement import document_lengths
    from sft_dist.data.packing import fill, pack
    from sft_dist.data.rows import rows_of
    from sft_dist.data.template import load_template
    from sft_dist.data.tokenizer import load_tokenizer

    data = DataSection(dataset_name=file, dataset_num_proc=workers)
    template = load_template(load_tokenizer(model_folder(), ModelSection(model_name_or_path="-")), data)
    began = time.perf_counter()
    rows = rows_of(data, template, LENGTH, "train", "data.dataset_name")
    lengths = document_lengths(rows.rows)
    packs = pack(lengths, LENGTH, seed=0)
    took = time.perf_counter() - began
    return {"tokens": rows.account.tokens, "seconds": took, "fill": fill(packs, lengths, LENGTH),
            "encoder": rows.account.encoder}  # fmt: skip


def trl(file: str, workers: int, masks: bool) -> dict[str, Any]:
    """TRL's own preparation, without the model and the trainer around it."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    rows = messages(file)
    columns = {"prompt": [r[:-1] for r in rows], "completion": [r[-1:] for r in rows]} if masks else {"messages": rows}
    table = datasets.Dataset.from_dict(columns)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, max_length=LENGTH, packing=True, dataset_num_proc=workers, use_cpu=True,
                         report_to="none", bf16=False)  # fmt: skip
        trainer = object.__new__(SFTTrainer)
        trainer._tokenizer, trainer._is_vlm, trainer.completion_only_loss = tokenizer, False, masks
        trainer.chat_template = tokenizer.chat_template
        began = time.perf_counter()
        packed = SFTTrainer._prepare_dataset(trainer, table, tokenizer, args, True, None, "train")
        took = time.perf_counter() - began
    tokens = sum(len(ids) for ids in packed.with_format("numpy")["input_ids"])
    return {"tokens": tokens, "seconds": took, "fill": tokens / len(packed) / LENGTH}


def bare(file: str) -> dict[str, Any]:
    """`encode_batch` on all cores, on the rendered texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    rows = messages(file)
    texts = tokenizer.apply_chat_template(rows, tokenize=False)
    tokens, took = 0, 0.0
    for start in range(0, len(texts), 2000):
        began = time.perf_counter()
        encodings = tokenizer.backend_tokenizer.encode_batch(texts[start : start + 2000], add_special_tokens=False)
        took += time.perf_counter() - began
        tokens += sum(map(len, encodings))
    return {"tokens": tokens, "seconds": took}


MEASURES = {
    "bare": lambda file, workers: bare(file),
    "trl": lambda file, workers: trl(file, workers, masks=False),
    "trl-masks": lambda file, workers: trl(file, workers, masks=True),
    "ours": ours,
}


def in_a_process(measure: str, file: Path, workers: int, **variables: str) -> dict[str, Any]:
    """A measure in a fresh process, and the most memory that it and its children held together, in GB."""
    command = [sys.executable, "-m", "tests.benchmarks.preparation", "--measure", measure, "--file", str(file),
               "--workers", str(workers)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=os.environ | variables) as process:  # fmt: skip
        most = 0
        while process.poll() is None:
            most = max(most, resident(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        return json.loads(process.stdout.read().splitlines()[-1]) | {"memory": most / 1e9}


def resident(root: int) -> int:
    """Bytes of a process and its children that are their own: pages of files are the kernel's to take back."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            todo += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    return total


def speed(count: int, workers: int, folder: Path) -> None:
    file = write(folder / "corpus.jsonl", conversations(count))
    cache = {name: {"SFT_DIST_CACHE": str(folder / name), "SFT_DIST_FASTOKENS": name} for name in ("0", "1")}
    for own in cache.values():
        # The model stays where it is.
        (Path(own["SFT_DIST_CACHE"])).mkdir()
        (Path(own["SFT_DIST_CACHE"]) / "models").symlink_to(Path(model_folder()).parent)
    found = {
        "`encode_batch` of tokenizers alone, all cores": in_a_process("bare", file, workers),
        "TRL, every token trained": in_a_process("trl", file, workers),
        "TRL, prompt and completion": in_a_process("trl-masks", file, workers),
        "this project, tokenizers": in_a_process("ours", file, workers, **cache["0"]),
        "this project, fastokens": in_a_process("ours", file, workers, **cache["1"]),
        "this project, second start": in_a_process("ours", file, workers, **cache["1"]),
    }
    print(f"\n{count:,} conversations, {workers} workers, rows of {LENGTH}:\n")
    print("| preparation | M tokens | seconds | M tokens/s | fill | memory, GB |\n|---|---|---|---|---|---|")
    for name, one in found.items():
        full = f"{one['fill']:.2%}" if "fill" in one else ""
        rate = one["tokens"] / one["seconds"] / 1e6
        print(
            f"| {name} | {one['tokens'] / 1e6:.1f} | {one['seconds']:.1f} | {rate:.2f} | {full} | {one['memory']:.2f} |"
        )


def memory(workers: int, folder: Path) -> None:
    print("\n| short conversations | seconds | memory, GB |\n|---|---|---|")
    for count in (100_000, 1_000_000):
        file = write(folder / f"{count}.jsonl", short_conversations(count))
        cache = folder / f"cache-{count}"
        cache.mkdir()
        (cache / "models").symlink_to(Path(model_folder()).parent)
        one = in_a_process("ours", file, workers, SFT_DIST_CACHE=str(cache))
        print(f"| {count:,} | {one['seconds']:.1f} | {one['memory']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.file, options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            memory(options.workers, Path(folder))
        else:
            speed(options.conversations, options.workers, Path(folder))


if __name__ == "__main__":
    main()
