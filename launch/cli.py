"""The `sft-dist` command: one small function a verb, no logic. What a verb needs is imported inside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from launch.options import OPTIONS, no_options
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


def _compare(options: argparse.Namespace) -> int:
    from launch import compare

    words = ["--prompts", str(options.prompts), "--temperature", str(options.temperature), "--seed", str(options.seed)]
    words += ["--max-new-tokens", str(options.max_new_tokens)] if options.max_new_tokens else []
    words += ["--output", options.output] if options.output else []
    return _module("sft_dist.compare", *words, *compare.arguments(options.models, options.reward, options.recipe))


def _score(options: argparse.Namespace) -> int:
    from launch import recipe_files
    from sft_dist.data.sources import is_local, local_files

    if is_local(options.file):
        local_files(options.file, options.split, "FILE")
    words = ["--split", options.split, "--format", options.format, "--dtype", options.dtype]
    words += ["--batch-size", str(options.batch_size), "--max-bad-records", str(options.max_bad_records)]
    words += ["--output", options.output] if options.output else []
    words += ["--formatting", options.formatting] if options.formatting else []
    return _module("sft_dist.score", *words, "--", recipe_files.model_folder(options.model), options.file)


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
        OPTIONS.get(name, no_options)(sub)
    return parser


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
    ("compare", _compare, "set models side by side on held-out prompts, scored by a reward model"),
    ("score", _score, "give the rewards of a reward model for any records"),
    ("checkpoints", _checkpoints, "list the checkpoints of a run, and whether they are sound"),
    ("status", _status, "show what a run is doing, or all of your runs on Slurm"),
    ("logs", _logs, "show the first error and the logs of all ranks as one"),
    ("export", _export, "write what a training left as a plain model directory"),
    ("chat", _chat, "talk to a model in the terminal"),
    ("dev-cluster", _dev_cluster, "a real Slurm of several nodes on this machine, to try things out on"),
    ("recipes", _recipes, "list the packaged recipes"),
    ("schema", _schema, "print the JSON Schema of recipes, for editors"),
)

if __name__ == "__main__":
    sys.exit(main())
