"""The options of each verb of the `sft-dist` command."""

from __future__ import annotations

import argparse
from collections.abc import Callable

# Of records that a reward can be given for.
FORMATS = ("auto", "conversations", "messages", "prompt_completion", "instruction", "text", "preference")


def no_options(_: argparse.ArgumentParser) -> None:
    return None


def _recipe_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run_options(sub: argparse.ArgumentParser) -> None:
    _recipe_options(sub)
    sub.add_argument("--retries", type=_count, default=0, metavar="N", help="start again so often where it dies (0)")


def _cluster_options(sub: argparse.ArgumentParser, required: bool) -> None:
    held = "" if required else " (default: as before)"
    sub.add_argument(
        "--cluster", metavar="PROFILE", required=required, help=f"the cluster's YAML; see slurm/clusters{held}"
    )
    sub.add_argument("--nodes", type=_positive, metavar="N", help=held.strip() or "(default: as the profile says)")


def _submit_options(sub: argparse.ArgumentParser) -> None:
    _recipe_options(sub)
    _cluster_options(sub, required=True)
    sub.add_argument("--print", action="store_true", help="show the batch script and touch nothing")
    sub.add_argument(
        "--probe", action="store_true", help="first look at the nodes and their links by a job of a minute"
    )


def _resume_options(sub: argparse.ArgumentParser) -> None:
    _cancel_options(sub)
    _cluster_options(sub, required=False)


def _cancel_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help="the folder of a run that was submitted")


def _positive(word: str) -> int:
    if not word.isdigit() or not int(word):
        raise argparse.ArgumentTypeError(f"{word} is no number above 0")
    return int(word)


def _count(word: str) -> int:
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word} is no number of times")
    return int(word)


def _preview_options(sub: argparse.ArgumentParser) -> None:
    _recipe_options(sub)
    sub.add_argument("--records", type=int, default=3, help="how many records (3)")
    sub.add_argument("--split", choices=("train", "test"), default="train")
    sub.add_argument("--html", metavar="FILE", help="write them as a page, too")


def _lengths_options(sub: argparse.ArgumentParser) -> None:
    _recipe_options(sub)
    sub.add_argument("--split", choices=("train", "test"), default="train")
    sub.add_argument("--image", metavar="FILE", help="write the histogram as an SVG picture, too")


def _verify_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE", nargs="?", help="whose model's shape (default: OPT, Llama, Mistral)")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--strategy", action="append", default=[], help="only this one; may be repeated")
    sub.add_argument("--case", action="append", default=[], help="only this one (full, packed, lora ...)")
    sub.add_argument("--shape", action="append", default=[], help="only opt, llama or mistral, without a recipe")
    sub.add_argument("--processes", type=int, metavar="N", help="default: one per GPU, or 2")
    sub.add_argument("--output", metavar="DIR", help="keep the runs and differences.json there")


def _sweep_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("sweep", metavar="SWEEP.yaml", help="what is varied; run again, it goes on where it stopped")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the sweep, or section.key=value of its recipe"
    )
    sub.add_argument("--dry-run", "--list", action="store_true", help="check all trials and list them, start none")
    sub.add_argument("--report", action="store_true", help="show and write the results so far, start nothing")
    sub.add_argument("--retry-failed", action="store_true", help="try the trials that failed once more")
    sub.add_argument(
        "--retries", type=_count, default=0, metavar="N", help="start a trial again so often if it dies (0)"
    )
    sub.add_argument("--cluster", metavar="PROFILE", help="run the trials on Slurm")
    sub.add_argument("--nodes", type=_positive, metavar="N", help="nodes of each trial on Slurm")
    sub.add_argument("--at-once", type=_positive, metavar="N", help="trials at the same time on Slurm")


def _pipeline_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("pipeline", metavar="PIPELINE", help="a pipeline file, a packaged one, or a pipeline's folder")
    sub.add_argument("overrides", nargs="*", metavar="stage.section.key=value")
    sub.add_argument("--status", action="store_true", help="show what has become of the stages, start nothing")
    sub.add_argument("--check", action="store_true", help="check all stages and say what would be done, start nothing")
    sub.add_argument(
        "--retries", type=_count, default=0, metavar="N", help="start a stage that dies so often again (0)"
    )
    sub.add_argument("--cluster", metavar="PROFILE", help="run the stages as jobs of a cluster")
    sub.add_argument("--nodes", type=_positive, metavar="N", help="nodes of the stages that name none")


def _eval_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL_DIR", help="a run's folder, a model directory or a hub id")
    sub.add_argument("--recipe", help="recipe that names the held-out data (default: that of the model's run)")
    sub.add_argument("--output", metavar="DIR", help="write answers, page and figures there")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")


def _compare_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("models", metavar="[NAME=]MODEL", nargs="+", help="runs or models; the first is the measure")
    sub.add_argument("--reward", metavar="MODEL", required=True, help="the reward model: a run's folder or a model")
    sub.add_argument("--recipe", help="recipe that names the held-out data (default: that of the first model's run)")
    sub.add_argument("--prompts", type=_positive, default=48, metavar="N", help="held-out prompts to answer (48)")
    sub.add_argument("--max-new-tokens", type=_positive, metavar="N", help="of a response (default: as in the recipe)")
    sub.add_argument("--temperature", type=_temperature, default=1.0, help="of the responses (1.0); 0 is greedy")
    sub.add_argument("--seed", type=_count, default=0, metavar="N", help="of the responses (0)")
    sub.add_argument("--output", metavar="DIR", help="write page, figures and samples there")


def _temperature(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is no temperature; give 0 or more")
    return value


def _score_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="a reward run's folder, a reward model or its adapter, or a hub id")
    sub.add_argument("file", metavar="FILE", help="records of any format: a file, folder, glob or data set")
    sub.add_argument("--output", metavar="FILE", help="write the lines of JSON there (default: standard output)")
    sub.add_argument("--split", default="train", help="of a folder or data set (train)")
    sub.add_argument("--format", choices=FORMATS, default="auto", help="of the records (default: by their columns)")
    sub.add_argument("--formatting", metavar="package.module:function", help="turns a record into one of the formats")
    sub.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="texts at once (8)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    sub.add_argument("--max-bad-records", type=_count, default=0, metavar="N", help="go on beyond so many faults (0)")


def _checkpoints_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help="a run's folder, or its checkpoints folder")
    sub.add_argument("--quick", action="store_true", help="look at sizes only, do not read the contents")
    sub.add_argument("--json", action="store_true", help="print the same as JSON")


def _status_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", nargs="?", help="a run's folder (default: all of your runs on Slurm)")
    sub.add_argument("--json", action="store_true", help="print the same as JSON")
    sub.add_argument("--forget", action="store_true", help="forget the runs whose folders are gone")


def _logs_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help="a run's folder")
    sub.add_argument("--rank", action="append", default=[], metavar="R", help="only these: 3, 0-7; may be repeated")
    sub.add_argument("--follow", action="store_true", help="go on with what comes, until the run is over")
    sub.add_argument("--since", metavar="TIME", help="90s, 10m, 2h, 1d ago, or a time such as 2026-11-25T17:01")
    sub.add_argument("--lines", metavar="N", help="the last so many, or all (100; all with --since)")


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SOURCE", help="a run's folder, a checkpoint, a model or an adapter directory")
    sub.add_argument("--output", metavar="DIR", required=True, help="a folder that does not exist yet")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: as in SOURCE)")
    sub.add_argument("--base", metavar="MODEL", help="model to merge an adapter onto (default: the one it names)")
    sub.add_argument("--keep-adapter", action="store_true", help="write the adapter alone, do not merge it")
    sub.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of an output file (5GB)")


def _chat_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL_DIR", help="a run's folder, a model directory or a hub id")
    sub.add_argument("--system", help="system prompt")
    sub.add_argument("--max-new-tokens", type=int, default=256)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")


def _dev_cluster_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("action", choices=("up", "down", "status"), help="start one, end it, show how it is")
    sub.add_argument("--nodes", type=_within(1, 64), default=4, help="how many nodes to start (4)")
    sub.add_argument("--gpus", type=_within(0, 64), default=2, help="pretended GPUs of each node (2)")
    sub.add_argument("--cpus", type=_within(1, 1024), help="processors of each node (4, or one per GPU)")
    sub.add_argument("--folder", metavar="DIR", help="where everything lies (one per user, in the temporary folder)")
    sub.add_argument("--foreground", action="store_true", help="stay, and end it at Ctrl-C or when this dies")


def _within(low: int, high: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdecimal() or not low <= int(word) <= high:
            raise argparse.ArgumentTypeError(f"{word} is no number from {low} to {high}")
        return int(word)

    return number


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "run": _run_options,
    "submit": _submit_options,
    "resume": _resume_options,
    "cancel": _cancel_options,
    "check": _recipe_options,
    "preview": _preview_options,
    "lengths": _lengths_options,
    "verify": _verify_options,
    "sweep": _sweep_options,
    "pipeline": _pipeline_options,
    "eval": _eval_options,
    "compare": _compare_options,
    "score": _score_options,
    "checkpoints": _checkpoints_options,
    "status": _status_options,
    "logs": _logs_options,
    "export": _export_options,
    "chat": _chat_options,
    "dev-cluster": _dev_cluster_options,
}
