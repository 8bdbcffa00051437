"""`rl-lora chat` and `rl-lora serve-command`, on a real adapter of a tiny model."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora import cli
from rl_lora.adapters.files import is_lora_dir
from rl_lora.commands import chat
from rl_lora.commands.chat import Conversation, opened, talk
from rl_lora.commands.serve_command import lines
from rl_lora.commands.served import Served, read_served
from rl_lora.config import ModelSection, load_config
from rl_lora.data.messages import Message
from rl_lora.errors import UserError
from rl_lora.models.resolve import resolve_model
from rl_lora.report.tables import printable
from rl_lora.types import Prompt, SampleParams
from tests.helpers.tiny_models import make_policy, shake

OPTIONS = argparse.Namespace(instruct=False, temperature=0.0, max_tokens=8, seed=0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of tiny-noisy whose adapter is random, far from the base."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    policy = make_policy(resolve_model(ModelSection(name="tiny-noisy")), rank=2)
    policy.base_name = "tiny-noisy"
    shake(policy, size=0.1)
    policy.publish(1, folder / "adapters", run_name="mine")
    config = load_config(Path("smoke"), ["run.name=mine", "data.system=Add.", "lora.rank=2"])
    record = {"format": 2, "config": config.model_dump(mode="json"), "dtype": "torch.float32"}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def parts(run_folder: Path) -> Iterator[tuple[Served, Any, Any]]:
    with opened(read_served(run_folder)) as found:
        yield found


def replies(conversation: Conversation, *typed: str) -> None:
    words = iter(typed)

    def read(prompt: str) -> str:
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    talk(conversation, read)


def shown(answer: str) -> str:
    """As the terminal shows it; a random adapter may write several lines."""
    return "\n".join(printable(line) for line in answer.split("\n")) + "\n"


def test_the_adapter_answers_and_remembers_until_a_new_conversation(
    parts: tuple[Served, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, sampler, _ = parts
    asked: list[str] = []
    sample = type(sampler).sample

    def noting(self: Any, prompts: list[Prompt], params: SampleParams) -> Any:
        asked.append(self.tokenizer.decode(prompts[0].token_ids))
        return sample(self, prompts, params)

    monkeypatch.setattr(type(sampler), "sample", noting)
    conversation = Conversation(*parts, OPTIONS)
    first = conversation.answer("7 + 2")
    conversation.answer("and 3?")
    conversation.start_again()
    assert conversation.answer("7 + 2") == first
    turns = [Message("user", "7 + 2"), Message("assistant", first.removesuffix(" [...]"))]
    assert asked[0] == asked[2] == served.prompt(turns[:1], sampler.tokenizer)
    assert asked[1] == served.prompt([*turns, Message("user", "and 3?")], sampler.tokenizer)
    assert "Add." in asked[0]


def test_the_base_answers_otherwise_and_the_instruction_is_appended_on_demand(
    parts: tuple[Served, Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    served, _, _ = parts
    conversation = Conversation(*parts, OPTIONS)
    answer = shown(conversation.answer("7 + 2"))
    conversation.start_again()
    conversation.switch()
    base = shown(conversation.answer("7 + 2"))
    assert answer != base
    conversation = Conversation(*parts, OPTIONS)
    replies(conversation, "7 + 2", "/new", "/base", "7 + 2", "/new", "/base", "7 + 2", "/what", "")
    first, rest = capsys.readouterr().out.split("(the base model answers)\n")
    second, rest = rest.split("(the adapter answers)\n")
    assert (first, second) == (answer, base)
    assert rest.removeprefix(answer).startswith("/new starts again")
    assert rest.endswith("\n\n")
    instructed = Conversation(*parts, argparse.Namespace(**{**vars(OPTIONS), "instruct": True}))
    assert served.instruction
    assert instructed.answer("7 + 2") == Conversation(*parts, OPTIONS).answer(
        f"7 + 2\n{served.instruction}"
    )


def test_samples_are_of_the_seed_and_the_turn(parts: tuple[Served, Any, Any]) -> None:
    def answers(seed: int) -> list[str]:
        options = argparse.Namespace(**{**vars(OPTIONS), "temperature": 2.0, "seed": seed})
        conversation = Conversation(*parts, options)
        found = []
        for _ in range(2):
            found.append(conversation.answer("7 + 2"))
            conversation.start_again()
        return found

    first, second = answers(0)
    assert [first, second] == answers(0) != answers(1)
    assert first != second


def test_a_conversation_that_is_too_long_is_one_line_and_can_be_left(
    parts: tuple[Served, Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(*parts, OPTIONS)
    replies(conversation, "7 + " * 2000, "7 + 2", "/quit", "never read")
    error, rest = capsys.readouterr().out.split("\n", 1)
    assert "exceed the context of" in error
    assert "type /new" in error
    assert rest == shown(Conversation(*parts, OPTIONS).answer("7 + 2"))


def test_what_a_model_writes_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile:
        def answer(self, text: str) -> str:
            return "\x1b[2Jgone\n\x07second"

    replies(Hostile(), "hello")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "\\x1b[2Jgone\n\\x07second\n\n"


def test_the_command_talks(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = iter(["7 + 2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(words))
    assert cli.main(["chat", str(run_folder), "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "on tiny-noisy. /new starts again" in out
    assert cli.main(["chat", str(run_folder), "--temperature", "-1"]) == 2
    assert cli.main(["chat", str(run_folder / "nothing")]) == 2
    assert chat.EXAMPLES


def words_of(run_folder: Path) -> tuple[list[str], list[str], str]:
    """(server's words, request's words, Python program)."""
    _, serve, _, request, _, program = lines(read_served(run_folder), 8001)
    return shlex.split(serve), shlex.split(request), program


def test_the_lines_of_the_server_ask_as_in_training(run_folder: Path) -> None:
    serve, request, _ = words_of(run_folder)
    assert serve[:2] == ["vllm", "serve"]
    assert Path(serve[2]) == resolve_model(ModelSection(name="tiny-noisy"))
    options = dict(zip(serve[3::2], serve[4::2], strict=False))
    assert options["--port"] == "8001"
    flags = " ".join(serve)
    assert "--dtype float32 --enable-lora --max-lora-rank 8 " in flags  # vLLM's slot for rank 2
    name, _, path = serve[-1].partition("=")
    assert is_lora_dir(Path(path))
    assert request[2] == "http://localhost:8001/v1/chat/completions"
    body = json.loads(request[-1])
    assert body["model"] == name == "mine-v000001"
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"].endswith(load_config(Path("smoke")).data.instruction)


def test_the_python_program_loads_the_adapter(
    run_folder: Path, parts: tuple[Served, Any, Any]
) -> None:
    names: dict[str, Any] = {}
    exec(words_of(run_folder)[2], names)  # noqa: S102 (the printed program)
    ids = torch.tensor([names["tokenizer"]("7 + 2 = 9")["input_ids"]])
    policy = parts[1].policy
    with torch.no_grad():
        expected, found = policy.model(ids).logits, names["model"](ids).logits
        with policy.adapter_off():
            base = policy.model(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-1)


def test_a_whole_model_is_refused(run_folder: Path) -> None:
    whole = read_served(run_folder)
    whole = Served(**{**vars(whole), "lora": whole.lora.model_copy(update={"mode": "full"})})
    with pytest.raises(
        UserError, match=r"is a whole model; write it .* rl-lora export .* --merged"
    ):
        lines(whole, 8000)


def test_the_command_prints_the_lines(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve-command", str(run_folder)]) == 0
    assert "--lora-modules mine-v000001=" in capsys.readouterr().out


@pytest.mark.long  # vLLM takes long to import
@pytest.mark.usefixtures("vllm_installed")
def test_vllm_accepts_the_line(run_folder: Path) -> None:
    program = (
        "import json, sys\n"
        "try:\n"
        "    from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "except ImportError:\n"
        "    from vllm.entrypoints.openai.cli_args import make_arg_parser\n"
        "try:\n"
        "    from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "except ImportError:\n"
        "    from vllm.utils import FlexibleArgumentParser\n"
        "found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "print(json.dumps([found.model_tag, found.enable_lora, found.max_lora_rank, "
        "[[one.name, one.path] for one in found.lora_modules]]))\n"
    )
    serve, _, _ = words_of(run_folder)
    result = subprocess.run(
        [sys.executable, "-c", program, *serve[2:]], capture_output=True, text=True, check=True
    )
    model, is_enabled, rank, modules = json.loads(result.stdout.splitlines()[-1])
    assert (model, is_enabled, rank) == (serve[2], True, 8)
    assert [f"{name}={path}" for name, path in modules] == [serve[-1]]
