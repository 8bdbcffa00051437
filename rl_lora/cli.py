"""The command line: `rl-lora COMMAND ...`.

Each command is a module of `rl_lora.commands` with `add_arguments(parser)`, `run(arguments) -> int`
and EXAMPLES. Only the module of the command that was typed is imported, and it imports heavy
libraries inside `run`, so that help texts and usage errors are instant. Of a job's processes only
rank 0 runs the command, unless the module has IS_DIVIDED = True.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rl_lora.distributed import is_main, is_speaker, rank, tell
from rl_lora.errors import EngineError, OtherProcessError, RunStoppedError, UserError
from rl_lora.launchers import interruption
from rl_lora.launchers.environment import launched_rank
from rl_lora.storage.directories import disk_errors

EXAMPLES = (
    "rl-lora train quickstart",
    "rl-lora train quickstart lora.rank=8 run.name=rank8 --dry-run",
    "rl-lora status runs/quickstart",
    "rl-lora eval runs/quickstart --against base --name vs-base",
    "rl-lora report runs/quickstart",
    "rl-lora export runs/quickstart --merged my-model",
)


# name -> (module of rl_lora.commands, help)
COMMANDS = {
    "train": ("train", "train a LoRA policy with reinforcement learning"),
    "sft": ("sft", "fine-tune on chats or prompt-completion pairs (cross-entropy)"),
    "eval": ("eval_options", "evaluate a run's adapter, any adapter or the base model"),
    "pass-rates": (
        "pass_rates",
        "sample the training problems, and write how often each is solved",
    ),
    "compare": ("compare", "compare two evaluations problem by problem"),
    "grade": ("grade", "grade a file of completions, or regrade an evaluation"),
    "status": ("status", "show the progress, latest metrics and curves of runs"),
    "report": ("report", "write an HTML report of one run, or of several overlaid"),
    "chat": ("chat", "talk to an adapter in the terminal"),
    "serve-command": ("serve_command", "print the lines that serve an adapter with vLLM or PEFT"),
    "export": ("export", "merge an adapter into its base model, or push it to the hub"),
    "models": ("models", "list the built-in base models, or fetch one"),
    "study": ("study", "run a grid of jobs (ranks, learning rates, seeds), or plan it"),
    "lr": ("lr", "suggest a LoRA learning rate for a model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: success, 2: the user's mistake (one line on stderr), 3: the run had to stop, 130: Ctrl-C,
    143: SIGTERM or SIGUSR1, 129: SIGHUP. Of several processes only one prints the line.
    """
    # Idle OpenMP threads that spin make a shared machine many times slower (LOG.md). The setting
    # only has an effect before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        with interruption.handled(ends_process=True), disk_errors(None, "run the command again"):
            code: int = 0 if _is_for_rank_0(arguments) else arguments.command(arguments)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if _is_divided(arguments):
            tell(error)
        _print_error(f"error: {error}")
        return 2
    except (RunStoppedError, FloatingPointError) as error:
        is_engine = isinstance(error, EngineError)
        if is_engine and error.__cause__ is not None:  # a bug of the engine, or of its drivers
            lines = "".join(traceback.format_exception(error.__cause__)).splitlines()
            print(*map(_shown, lines), sep="\n", file=sys.stderr)
        hint = arguments.after_interrupt if is_engine else ""
        _print_error(f"the run stopped: {error}{hint}")
        return 3
    except OtherProcessError as error:
        _print_error(
            f"error: {error}"
            if error.code == 2
            else f"the run stopped: {error}{arguments.after_interrupt}"
        )
        return error.code
    except interruption.Interrupted as error:
        _print_error(f"{error}{arguments.after_interrupt}")
        return error.code
    except KeyboardInterrupt:
        _print_error(f"interrupted{arguments.after_interrupt}")
        return 130


def _is_divided(arguments: argparse.Namespace) -> bool:
    """Whether all of a job's processes run the command."""
    return arguments.is_divided and not getattr(arguments, "dry_run", False)


def _is_for_rank_0(arguments: argparse.Namespace) -> bool:
    """Whether a launcher has started this process for a command that only rank 0 runs."""
    number = launched_rank()
    if _is_divided(arguments) or number == 0:
        return False
    if not int(os.environ.get("LOCAL_RANK", 0)):  # once on a node; on rank 0's there is a result
        print(
            f"rl-lora: only rank 0 runs this command, and this process is rank {number}, by the "
            "environment that its launcher has set",
            file=sys.stderr,
        )
    return True


def _print_error(text: str) -> None:
    """Prints one line; what it quotes of data or a model's text cannot act on the terminal."""
    if is_speaker():
        who = "" if is_main() else f"rank {rank()}: "
        print(f"rl-lora: {who}{_shown(text)}", file=sys.stderr, flush=True)


def _shown(line: str) -> str:
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; overrides may come before, between or after the options."""
    parser = build_parser(next((word for word in argv if not word.startswith("-")), None))
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    if unknown := [word for word in rest if word.startswith("-") or not takes_overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only `command` gets its arguments, as the others' modules are not imported."""
    from rl_lora import __version__

    parser = argparse.ArgumentParser(
        prog="rl-lora",
        description="Reinforcement learning of language models with LoRA adapters.",
        **_with_examples(EXAMPLES),
    )
    parser.add_argument("--version", action="version", version=f"rl-lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, (module_name, help_text) in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=help_text)
            continue
        module = import_module(f"rl_lora.commands.{module_name}")
        subparser = commands.add_parser(
            name,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            **_with_examples(module.EXAMPLES),
        )
        module.add_arguments(subparser)
        subparser.set_defaults(
            command=module.run,
            is_divided=getattr(module, "IS_DIVIDED", False),
            after_interrupt=getattr(module, "AFTER_INTERRUPT", ""),
        )
    return parser


def _with_examples(examples: Sequence[str]) -> dict[str, Any]:
    """Options of a parser whose help ends with these command lines."""
    return {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "epilog": "\n".join(("examples:", *(f"  {line}" for line in examples))),
    }


if __name__ == "__main__":
    sys.exit(main())
