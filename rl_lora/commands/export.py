"""`rl-lora export`: an adapter merged into its base model, pushed to the hub, or described."""

from __future__ import annotations

import argparse
from pathlib import Path

from rl_lora.commands.job_arguments import add_source
from rl_lora.errors import UserError

EXAMPLES = (
    "rl-lora export runs/quickstart --merged my-model",
    "rl-lora export runs/quickstart --merged my-model-bf16 --dtype bfloat16",
    "rl-lora export runs/quickstart/best --merged my-best-model",
    "rl-lora export runs/quickstart --push me/my-adapter --private",
    "rl-lora export runs/quickstart",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Merge an adapter into its base model, or push it to the hub.\n"
        "With neither --merged nor --push, write the model card into the adapter's directory."
    )
    add_source(parser)
    parser.add_argument(
        "--merged", type=Path, metavar="DIR", help="write a standalone model here, merged in fp32"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the merged weights (default: float32)",
    )
    parser.add_argument("--push", metavar="REPO_ID", help="push the adapter with a model card")
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private (with --push)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merges, pushes, or writes the card.

    Raises:
        UserError: as `export_merged` and `push_adapter`, or an adapter that names no base model.
    """
    import torch

    from rl_lora.adapters.files import find_adapter
    from rl_lora.adapters.model_card import write_card
    from rl_lora.adapters.peft_files import named_base, trained_on
    from rl_lora.config import ModelSection
    from rl_lora.export.merge import export_merged
    from rl_lora.export.push import push_adapter
    from rl_lora.models.dequantized import dequantized_dir
    from rl_lora.models.device import pick_dtype
    from rl_lora.models.resolve import resolve_model

    adapter_dir = find_adapter(arguments.source)
    if arguments.merged is not None:
        base = arguments.base or named_base(adapter_dir)
        if base is None:
            raise UserError(f"{adapter_dir} names no base model; give --base")
        model_dir, trained = resolve_model(ModelSection(name=base)), trained_on(adapter_dir)
        if trained.quantize is not None:
            print(f"base: dequantized from {trained.quantize}, as in training")
            dtype = pick_dtype(trained.dtype, torch.device("cpu"))
            model_dir = dequantized_dir(model_dir, trained.quantize, dtype)
            base = str(model_dir)
        # A directory may be a copy of the named base: then only the layers' shapes are checked.
        base_name = None if Path(base).is_dir() else base
        export_merged(
            model_dir, adapter_dir, arguments.merged, dtype=arguments.dtype, base_name=base_name
        )
        print(f"merged model: {arguments.merged}")
    if arguments.push is not None:
        print(f"pushed: {push_adapter(adapter_dir, arguments.push, private=arguments.private)}")
    if arguments.merged is None and arguments.push is None:
        print(f"model card: {write_card(adapter_dir)}")
    return 0
