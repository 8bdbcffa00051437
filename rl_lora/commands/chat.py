"""`rl-lora chat`: a conversation with an adapter in the terminal, sampled by plain PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora.commands.job_arguments import add_source
from rl_lora.errors import UserError

if TYPE_CHECKING:
    from rl_lora.commands.served import Served
    from rl_lora.data.messages import Message
    from rl_lora.samplers.torch_sampler import TorchSampler
    from rl_lora.types import Adapter

EXAMPLES = (
    "rl-lora chat runs/quickstart",
    "rl-lora chat runs/quickstart --instruct --temperature 0",
    "rl-lora chat runs/quickstart/best",
    "rl-lora chat me/my-adapter --base HuggingFaceTB/SmolLM2-135M-Instruct",
)
_HELP = "/new starts again, /base switches the adapter off or on, /quit or Ctrl-D ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Talk to an adapter in the terminal. The conversation is rendered as in the adapter's run."
    )
    add_source(parser)
    parser.add_argument(
        "--instruct",
        action="store_true",
        help="append the run's data.instruction to each message, as in training",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0: greedy (default: 1, as in training)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Answers line by line until the input ends. Raises UserError for a bad adapter or option."""
    from rl_lora.commands.served import read_served

    if arguments.temperature < 0:
        raise UserError(f"--temperature {arguments.temperature:g}: 0 (greedy) or more")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UserError(f"--max-tokens {arguments.max_tokens}: 1 or more")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` then edits lines and remembers them
    with opened(read_served(arguments.source, arguments.base)) as (served, sampler, adapter):
        print(f"{served.adapter_dir} on {served.model.name}. {_HELP}.")
        talk(Conversation(served, sampler, adapter, arguments), input)
    return 0


@contextlib.contextmanager
def opened(served: Served) -> Iterator[tuple[Served, TorchSampler, Adapter]]:
    """The adapter on its base model, with a sampler."""
    from rl_lora.adapters.files import open_adapter
    from rl_lora.adapters.resize import fitted
    from rl_lora.build import open_model
    from rl_lora.policy import open_policy
    from rl_lora.samplers.end_tokens import end_token_ids
    from rl_lora.samplers.torch_sampler import TorchSampler

    model_dir, tokenizer, context = open_model(served.model, print)
    policy = open_policy(model_dir, served.model, served.lora, seed=0)
    ends = end_token_ids(model_dir, tokenizer, served.template, served.template_kwargs)
    sampler = TorchSampler(policy, tokenizer=tokenizer, end_token_ids=ends, max_model_len=context)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = open_adapter(fitted(served.adapter_dir, policy, Path(scratch) / "fit"), policy)
        yield served, sampler, adapter


class Conversation:
    """The turns so far, and who answers."""

    def __init__(
        self,
        served: Served,
        sampler: TorchSampler,
        adapter: Adapter,
        options: argparse.Namespace,
    ) -> None:
        self._served, self._sampler, self._adapter, self._options = (
            served,
            sampler,
            adapter,
            options,
        )
        self._turns: list[Message] = []
        self._num_answers = 0
        self.is_base = False
        sampler.set_adapter(adapter)

    def start_again(self) -> None:
        """Forgets all turns."""
        self._turns = []

    def switch(self) -> None:
        """Between adapter and base; the turns stay. Raises UserError for a whole model."""
        self._sampler.set_adapter(self._adapter if self.is_base else None)
        self.is_base = not self.is_base

    def answer(self, text: str) -> str:
        """The next turn's text; " [...]" at its end: cut off at --max-tokens.

        Raises UserError, and forgets the message, if the conversation leaves no room for an answer.
        """
        from rl_lora.data.chat_template import check_characters, encode_prompts
        from rl_lora.data.messages import Message
        from rl_lora.seeds import mix_seed
        from rl_lora.types import Prompt, SampleParams

        served, options, sampler = self._served, self._options, self._sampler
        if options.instruct and served.instruction:
            text = f"{text}\n{served.instruction}"
        check_characters(text, "the message")
        turns = [*self._turns, Message("user", text)]
        rendered = served.prompt(turns, sampler.tokenizer)
        (ids,) = encode_prompts([rendered], sampler.tokenizer, with_start=served.template == "base")
        max_tokens = options.max_tokens or served.max_tokens
        if len(ids) + max_tokens > sampler.max_model_len:
            raise UserError(
                f"{len(ids)} tokens so far and an answer of up to {max_tokens} exceed the context "
                f"of {sampler.max_model_len}; type /new, or give a smaller --max-tokens"
            )
        seed = mix_seed(options.seed, "chat", self._num_answers)
        ((completion,),) = sampler.sample(
            [Prompt(f"chat/{self._num_answers}", "chat", text, "", tuple(ids))],
            SampleParams(1, max_tokens, options.temperature, seed=seed),
        )
        self._num_answers += 1
        self._turns = [*turns, Message("assistant", completion.text)]
        return completion.text + (" [...]" if completion.is_truncated else "")


def talk(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Reads lines until the input ends, and prints the answers; what a model writes cannot act on
    the terminal."""
    from rl_lora.report.tables import printable

    while True:
        try:
            text = read("> ").strip()
        except EOFError:
            print()
            return
        if text in ("/quit", "/exit"):
            return
        try:
            if text == "/new":
                conversation.start_again()
            elif text == "/base":
                conversation.switch()
                print(
                    "(the base model answers)" if conversation.is_base else "(the adapter answers)"
                )
            elif text.startswith("/"):
                print(_HELP)
            elif text:
                answer = conversation.answer(text)
                print("\n".join(printable(line) for line in answer.split("\n")))
        except UserError as error:
            print(f"error: {error}")
