"""The `sft-dist` command: one small function a verb, no logic. What a verb needs is imported inside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from sft_dist.errors import EXIT_DONE, EXIT_USER, UserError

Verb = Callable[[argparse.Namespace], int]


def main(words: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 the user can mend it, 75 resumable, 1 a bug."""
    parser = _parser()
    # argparse gives up on overrides that stand behind an option; they are whatever has no dash.
    options, rest = parser.parse_known_args(words)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    verb: Verb = options.verb
    try:
        return verb(options)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"sft-dist: {line}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from launch import check, local, recipe_files, retries
    from sft_dist.recipe import load_recipe
    from sft_dist.rundir import command_line
    from sft_dist.runlock import RunLock

    recipe = load_recipe(recipe_files.find(options.recipe), options.overrides)
    check.refuse_faults(check.findings(recipe), unverified_too=True)
    with RunLock(Path(recipe.output.output_dir)) as lock:
        if lock.replaced:
            print(f"sft-dist: {lock.replaced}", file=sys.stderr)
        return retries.run(recipe, command_line(), options.retries, local.run)


def _submit(options: argparse.Namespace) -> int:
    from launch import recipe_files
    from launch.slurm import command
    from sft_dist.recipe import load_recipe

    recipe = load_recipe(recipe_files.find(options.recipe), options.overrides)
    return command.submit_run(recipe, options.cluster, options.nodes, options.print, options.probe)


def _resume(options: argparse.Namespace) -> int:
    from launch.slurm import command

    return command.resume(options.run, options.cluster, options.nodes)


def _cancel(options: argparse.Namespace) -> int:
    from launch.slurm import command

    return command.cancel(options.run)


def _check(options: argparse.Namespace) -> int:
    from launch import check, recipe_files
    from sft_dist.recipe import load_recipe

    file = recipe_files.find(options.recipe)
    return check.report(load_recipe(file, options.overrides), file, options.overrides)


def _preview(options: argparse.Namespace) -> int:
    words = ["--records", str(options.records), "--split", options.split]
    return _look_at_data("sft_dist.preview", options, *words, *(["--html", options.html] if options.html else []))


def _lengths(options: argparse.Namespace) -> int:
    words = ["--split", options.split]
    return _look_at_data("sft_dist.lengths", options, *words, *(["--image", options.image] if options.image else []))


def _look_at_data(module: str, options: argparse.Namespace, *words: str) -> int:
    """Run a module on a recipe that is known to be sound."""
    from launch import recipe_files
    from sft_dist.recipe import load_recipe

    file = recipe_files.find(options.recipe)
    load_recipe(file, options.overrides)
    return _module(module, *words, str(file), *options.overrides)


def _eval(options: argparse.Namespace) -> int:
    from launch import recipe_files

    model, recipe = recipe_files.model_and_recipe(options.model, options.recipe)
    words = ["--output", options.output] if options.output else []
    return _module("sft_dist.evaluation", *words, model, str(recipe), *options.overrides)


def _checkpoints(options: argparse.Namespace) -> int:
    from launch import checkpoints

    return checkpoints.show(options.run, contents=not options.quick, as_json=options.json)


def _status(options: argparse.Namespace) -> int:
    from launch.status import command

    return command.show(options.run, as_json=options.json, forget=options.forget)


def _logs(options: argparse.Namespace) -> int:
    from launch.logs import command

    return command.show(
        options.run, ranks=options.rank, follow=options.follow, since_text=options.since, lines=options.lines
    )


def _export(options: argparse.Namespace) -> int:
    words = ["--output", options.output, "--max-shard-size", options.max_shard_size]
    words += ["--dtype", options.dtype] if options.dtype else []
    words += ["--base", options.base] if options.base else []
    words += ["--keep-adapter"] if options.keep_adapter else []
    return _module("sft_dist.export", *words, options.source)


def _chat(options: argparse.Namespace) -> int:
    from launch import recipe_files

    words = ["--max-new-tokens", str(options.max_new_tokens), "--temperature", str(options.temperature)]
    words += ["--system", options.system] if options.system else []
    return _module("sft_dist.chat", *words, recipe_files.model_folder(options.model))


def _verify(options: argparse.Namespace) -> int:
    from pathlib import Path

    from launch import recipe_files, verify
    from sft_dist.recipe import load_recipe

    recipe = None
    if options.recipe is not None:
        recipe = Path(recipe_files.find(options.recipe))
        load_recipe(recipe, options.overrides)
    return verify.verify(
        recipe,
        options.overrides,
        strategies=options.strategy,
        cases=options.case,
        shapes=options.shape,
        processes=options.processes,
        folder=Path(options.output) if options.output else None,
    )


def _dev_cluster(options: argparse.Namespace) -> int:
    from launch import dev_cluster

    if options.action == "up":
        return dev_cluster.up(options.nodes, options.gpus, options.cpus, options.folder, options.foreground)
    return {"down": dev_cluster.down, "status": dev_cluster.status}[options.action](options.folder)


def _sweep(options: argparse.Namespace) -> int:
    from pathlib import Path

    from launch.sweep.command import Wishes, sweep

    wishes = Wishes(
        show_only=options.dry_run,
        report_only=options.report,
        retry_failed=options.retry_failed,
        tries=options.retries,
        cluster=options.cluster,
        nodes=options.nodes,
        at_once=options.at_once,
    )
    return sweep(Path(options.sweep).expanduser(), options.overrides, wishes)


def _pipeline(options: argparse.Namespace) -> int:
    from launch.pipeline import command

    wishes = command.Wishes(
        status_only=options.status,
        check_only=options.check,
        tries=options.retries,
        cluster=options.cluster,
        nodes=options.nodes,
    )
    return command.run(options.pipeline, options.overrides, wishes)


def _recipes(_: argparse.Namespace) -> int:
    from launch import recipe_files

    for name, path in recipe_files.packaged().items():
        print(f"{name:32} {recipe_files.first_comment(path)}")
    print("\npipelines, for `sft-dist pipeline`:")
    for name, path in recipe_files.pipelines().items():
        print(f"{name:32} {recipe_files.first_comment(path)}")
    print(f"\nfiles: {recipe_files.FOLDER}")
    return EXIT_DONE


def _schema(_: argparse.Namespace) -> int:
    import json

    from sft_dist.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
    return EXIT_DONE


def _module(name: str, *words: str) -> int:
    """Run a module of the training plane in a process of its own, so that this one stays free of torch."""
    from launch.local import run_module

    return run_module(name, words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-dist",
        description="Distributed post-training of causal language models, from one recipe file.",
        epilog="A RECIPE is a YAML file or the name of a packaged one (see `sft-dist recipes`); "
        "behind it, section.key=value overrides its settings.",
    )
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, verb, text in _VERBS:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=verb)
        _OPTIONS.get(name, _no_options)(sub)
    return parser


def _no_options(_: argparse.ArgumentParser) -> None:
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


_VERBS: tuple[tuple[str, Verb, str], ...] = (
    ("run", _run, "train by a recipe on this machine"),
    ("submit", _submit, "train by a recipe on a Slurm cluster"),
    ("resume", _resume, "submit a run again that has ended before it was done"),
    ("cancel", _cancel, "end the job of a run; its checkpoints stay"),
    ("check", _check, "find now what would fail later"),
    ("preview", _preview, "show records as the model will see them, trained tokens in colour"),
    ("lengths", _lengths, "show how long the rows are, and how much of them is trained"),
    ("verify", _verify, "prove that no strategy changes a number: a model in small, trained under each"),
    ("sweep", _sweep, "try many settings of one recipe, and compare what they come to"),
    ("pipeline", _pipeline, "run a chain of stages, each from what others made, and go on where it ended"),
    ("eval", _eval, "measure a model on the held-out data"),
    ("checkpoints", _checkpoints, "list the checkpoints of a run, and whether they are sound"),
    ("status", _status, "show what a run is doing, or all of your runs on Slurm"),
    ("logs", _logs, "show the first error and the logs of all ranks as one"),
    ("export", _export, "write what a training left as a plain model directory"),
    ("chat", _chat, "talk to a model in the terminal"),
    ("dev-cluster", _dev_cluster, "a real Slurm of several nodes on this machine, to try things out on"),
    ("recipes", _recipes, "list the packaged recipes"),
    ("schema", _schema, "print the JSON Schema of recipes, for editors"),
)
_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
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
    "checkpoints": _checkpoints_options,
    "status": _status_options,
    "logs": _logs_options,
    "export": _export_options,
    "chat": _chat_options,
    "dev-cluster": _dev_cluster_options,
}

if __name__ == "__main__":
    sys.exit(main())
