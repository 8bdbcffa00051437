"""`rl-lora serve-command`: the lines that serve an adapter with vLLM, and load it with PEFT; for a
job's config, the line of a server that the job can sample from (`resources.servers`)."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora.commands.job_arguments import add_overrides, add_source
from rl_lora.errors import UserError

if TYPE_CHECKING:
    from rl_lora.commands.served import Served

EXAMPLES = (
    "rl-lora serve-command runs/quickstart",
    "rl-lora serve-command runs/quickstart/best --port 8001",
    "rl-lora serve-command job.toml lora.rank=8",
)
_PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base!r})
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r})
model = PeftModel.from_pretrained(base, {adapter!r})"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Print the lines that serve an adapter with vLLM, and load it with PEFT; for a job's "
        "config (JOB.toml), the line that starts a server for resources.servers."
    )
    add_source(parser)
    add_overrides(parser, example="lora.rank=8, of a job's config")
    parser.add_argument("--port", type=int, default=8000, help="of the server (default: 8000)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the lines. Raises UserError for a bad adapter, one without a base model, or a bad
    config."""
    from rl_lora.commands.served import read_served

    source, overrides = arguments.source, arguments.overrides
    if source.suffix == ".toml":
        print("\n".join(job_lines(source, overrides, arguments.port)))
        return 0
    if overrides:
        raise UserError(
            f"{overrides[0]} is a job's setting, and {source} is no job's config (JOB.toml); "
            "remove it"
        )
    print("\n".join(lines(read_served(source, arguments.base), arguments.port)))
    return 0


def job_lines(path: Path, overrides: list[str], port: int) -> list[str]:
    """What is printed for a job: how to start a server, and how to train with it.

    Raises UserError for a bad config, or one that vLLM's servers cannot sample for.
    """
    from rl_lora.config import load_config
    from rl_lora.models.resolve import resolve_model
    from rl_lora.samplers.fleet.server_job import server_command

    address = f'resources.servers=["http://localhost:{port}"]'
    config = load_config(path, [*overrides, address])
    train = ["rl-lora", "train", str(path), *overrides, address]
    return [
        f"# one server for each engine; each sees {config.run.folder} under the same path, or",
        "# resources.servers_folder (vLLM 0.26: without --enable-scale-out)",
        server_command(config, resolve_model(config.model), port),
        "# then, with the addresses of all servers",
        shlex.join(train),
    ]


def lines(served: Served, port: int) -> list[str]:
    """What is printed: shell lines, and a Python program after the last comment.

    Raises UserError for a whole model, which has no adapter.
    """
    from rl_lora.adapters.peft_files import is_peft_loadable, read_manifest
    from rl_lora.models.dequantized import dequantized_dir
    from rl_lora.models.device import pick_device, pick_dtype
    from rl_lora.models.resolve import resolve_model
    from rl_lora.samplers.vllm.settings import lora_settings

    adapter_dir, merged = served.adapter_dir.resolve(), "rl-lora export {} --merged DIR"
    merge = merged.format(shlex.quote(str(adapter_dir)))
    if served.lora.mode == "full":
        raise UserError(f"{adapter_dir} is a whole model; write it to a directory by {merge}")
    dtype = pick_dtype(served.model.dtype, pick_device(served.model.device))
    quantize = served.model.quantize
    base = str(dequantized_dir(resolve_model(served.model), quantize, dtype))
    dtype_name = str(dtype).removeprefix("torch.")
    name = str(read_manifest(adapter_dir).get("name", adapter_dir.name))
    rank = lora_settings(served.lora, dtype)["max_lora_rank"]
    serve = ["vllm", "serve", base, "--port", str(port), "--dtype", dtype_name, "--enable-lora"]
    serve += ["--max-lora-rank", str(rank), "--lora-modules", f"{name}={adapter_dir}"]
    is_served, is_loadable = served.lora.variant != "dora", is_peft_loadable(adapter_dir)
    peft = _PEFT.format(base=base, adapter=str(adapter_dir), dtype=dtype_name)
    note = f"# the base has the weights dequantized from {quantize} that the adapter was trained on"
    return [
        *([note] if quantize else []),
        "# vLLM: a server with OpenAI's API",
        shlex.join(serve) if is_served else f"# it does not serve DoRA: {merge}",
        "# a question to it, as in training",
        shlex.join(_request(served, name, port)),
        "# Python: transformers and PEFT",
        peft if is_loadable else f"# PEFT cannot load this adapter: {merge}",
    ]


def _request(served: Served, name: str, port: int) -> list[str]:
    """The words of a curl command that asks as the run's prompts did."""
    question = "What is 4 + 3?" + (f"\n{served.instruction}" if served.instruction else "")
    body: dict[str, object] = {"model": name, "max_tokens": served.max_tokens}
    if served.template == "base":
        body["prompt"] = served.few_shot + question
    else:
        system = [] if served.system is None else [{"role": "system", "content": served.system}]
        body["messages"] = [*system, {"role": "user", "content": question}]
        if served.template_kwargs:
            body["chat_template_kwargs"] = served.template_kwargs
    end = "completions" if served.template == "base" else "chat/completions"
    url = f"http://localhost:{port}/v1/{end}"
    return ["curl", "-s", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
