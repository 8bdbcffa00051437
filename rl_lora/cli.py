"""The command line: `rl-lora train|sft|eval|compare|status|grade|report|export|models|study|lr`.

A user's mistake ends with one line and exit code 2; heavy libraries load only when they are needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rl_lora.errors import StaleAdapterError, UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 (user's mistake), 3 (the run had to stop)."""
    # OpenMP threads that spin while they wait make a shared machine many times slower (LOG.md); the
    # setting counts only before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = _parse(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"rl-lora: error: {error}", file=sys.stderr)
        return 2
    except (StaleAdapterError, FloatingPointError) as error:
        print(f"rl-lora: the run stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rl-lora: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before, between or after the options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    if strange := [text for text in rest if text.startswith("-") or not takes_overrides]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    from rl_lora import __version__
    from rl_lora.commands import lr
    from rl_lora.commands import study as study_command

    parser = argparse.ArgumentParser(
        prog="rl-lora", description="Reinforcement learning with a LoRA policy."
    )
    parser.add_argument("--version", action="version", version=f"rl-lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_training(commands)
    _add_evaluations(commands)
    _add_reading(commands)
    _add_models(commands)
    study = commands.add_parser("study", help="run a grid of jobs, or plan it")
    study_command.add_arguments(study)
    study.set_defaults(command=study_command.run)
    rate = commands.add_parser("lr", help="the article's learning-rate rule for a model")
    lr.add_arguments(rate)
    rate.set_defaults(command=lr.run)
    return parser


def _add_training(commands: Any) -> None:
    train = commands.add_parser("train", help="train a policy from a config file")
    _add_job(train, "quickstart", "settings, parameter counts, memory plan")
    train.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of the GPU that a dry run plans for"
    )
    train.set_defaults(command=_train)

    sft = commands.add_parser("sft", help="fine-tune by log loss on chats or completions")
    _add_job(sft, "sft_tiny", "settings, capacity and memory plan")
    sft.set_defaults(command=_sft)


def _add_job(parser: argparse.ArgumentParser, example: str, plan: str) -> None:
    """What both kinds of training take."""
    parser.add_argument(
        "config", type=Path, help=f"a TOML file, or a shipped config's name, e.g. {example}"
    )
    _add_overrides(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    _add_acceptance(parser)
    parser.add_argument("--dry-run", action="store_true", help=f"print {plan}; stop")
    parser.add_argument("--quiet", action="store_true", help="only warnings and the summary")


def _add_acceptance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="go on although base model or data are others than when the run began",
    )


def _add_evaluations(commands: Any) -> None:
    from rl_lora.commands import grade

    evaluate = commands.add_parser("eval", help="evaluate a run's adapter, or a config's base")
    evaluate.add_argument(
        "target", type=Path, help="a run folder, a TOML file, or a shipped config's name"
    )
    _add_overrides(evaluate)
    evaluate.add_argument(
        "--adapter",
        help="adapter directory or hub id, 'best', 'last' or 'base' (default: the run's last)",
    )
    evaluate.add_argument(
        "--against", help="a second policy, evaluated in the same engine with the same seeds"
    )
    evaluate.add_argument(
        "--name", default="evaluation", help="of the result files (default: evaluation)"
    )
    evaluate.add_argument(
        "--overwrite", action="store_true", help="start over instead of going on or refusing"
    )
    _add_acceptance(evaluate)
    evaluate.set_defaults(command=_eval)

    comparing = commands.add_parser(
        "compare", help="compare two evaluations on disk, problem by problem"
    )
    comparing.add_argument("first", type=Path, help="an evaluation's file, RUN/eval/NAME.jsonl.gz")
    comparing.add_argument("second", type=Path, help="the evaluation held against it")
    comparing.add_argument("--json", type=Path, help="write the comparison here")
    comparing.set_defaults(command=_compare)

    grading = commands.add_parser("grade", help="grade a file of completions")
    grade.add_arguments(grading)
    grading.set_defaults(command=grade.run)


def _add_reading(commands: Any) -> None:
    status = commands.add_parser("status", help="how runs stand: last numbers and curves")
    status.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    status.set_defaults(command=_status)

    report = commands.add_parser("report", help="one HTML file of a run, or of several overlaid")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    where = report.add_mutually_exclusive_group()
    where.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html, ./report.html for several runs",
    )
    where.add_argument("--watch", action="store_true", help="serve it on localhost, always fresh")
    report.add_argument("--port", type=int, help="of --watch (default: 8000, or any free one)")
    report.add_argument(
        "--study", action="store_true", help="RUN is a study's folder: the article's figures of it"
    )
    report.set_defaults(command=_report)


def _add_models(commands: Any) -> None:
    export = commands.add_parser("export", help="merge into a model directory, or push to the hub")
    export.add_argument("source", type=Path, help="a run folder, an adapter directory or a hub id")
    export.add_argument("--base", help="base model (default: the one the adapter names)")
    export.add_argument("--merged", type=Path, help="write a standalone model here, merged in fp32")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    export.add_argument("--push", metavar="REPO_ID", help="push the adapter with a model card")
    export.add_argument("--private", action="store_true", help="push to a private repository")
    export.set_defaults(command=_export)

    models = commands.add_parser("models", help="list the models at hand, or get one")
    models.add_argument("get", nargs="?", metavar="NAME", help="fetch or make this one")
    models.set_defaults(command=_models)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. lora.rank=8 data=my.jsonl"
    )


def _train(arguments: argparse.Namespace) -> int:
    from rl_lora.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from rl_lora.commands.plan import print_plan

        gpu_gib = arguments.gpu_memory
        print_plan(config, gpu_bytes=None if gpu_gib is None else int(gpu_gib * 2**30))
        return 0
    from rl_lora.train import train

    train(
        config,
        resume=arguments.resume,
        quiet=arguments.quiet,
        accept_changed_data=arguments.accept_changed_data,
    )
    return 0


def _sft(arguments: argparse.Namespace) -> int:
    from rl_lora.config.sft import load_sft_config

    config = load_sft_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from rl_lora.commands.plan import print_sft_plan

        print_sft_plan(config)
        return 0
    from rl_lora.sft.train import fine_tune

    fine_tune(
        config,
        resume=arguments.resume,
        quiet=arguments.quiet,
        accept_changed_data=arguments.accept_changed_data,
    )
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from rl_lora.commands.eval import evaluation

    evaluation(
        arguments.target,
        arguments.overrides,
        arguments.adapter,
        arguments.name,
        against=arguments.against,
        overwrite=arguments.overwrite,
        accept_changed_data=arguments.accept_changed_data,
    )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from rl_lora.commands.eval import compare

    compare(arguments.first, arguments.second, arguments.json)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from rl_lora.commands.status import run

    return run(arguments.runs)


def _report(arguments: argparse.Namespace) -> int:
    if arguments.study:
        from rl_lora.studies.figures import draw_study
        from rl_lora.studies.results import read_table

        for folder in arguments.runs:
            where = folder if folder.is_dir() else folder.parent
            for path in draw_study(read_table(folder), where / "figures"):
                print(path)
        return 0
    from rl_lora.commands.report import run

    return run(arguments.runs, arguments.output, is_watched=arguments.watch, port=arguments.port)


def _export(arguments: argparse.Namespace) -> int:
    from rl_lora.commands.export import run

    return run(arguments)


def _models(arguments: argparse.Namespace) -> int:
    from rl_lora.config import ModelSection
    from rl_lora.models.resolve import list_models, resolve_model

    if arguments.get:
        print(resolve_model(ModelSection(name=arguments.get)))
        return 0
    for entry in list_models():
        print(f"{entry.name:26s} {entry.path or '-'}  {entry.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
