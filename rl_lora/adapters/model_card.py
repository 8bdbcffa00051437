"""An adapter's model card: base model, training settings and scores, from its run folder."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from rl_lora.adapters.peft_files import (
    is_peft_loadable,
    named_base,
    peft_rank,
    peft_settings,
    peft_variants,
    read_manifest,
    trained_on,
)
from rl_lora.config import VARIANT_NAMES, RunConfig, parse_as, parse_config, with_present_names
from rl_lora.config.sft import SftConfig
from rl_lora.data.sources import LOADERS
from rl_lora.errors import UserError
from rl_lora.evaluation.scores import load_result
from rl_lora.models.resolve import EMBEDDED
from rl_lora.storage.jsonl import read_json, write_text_atomically

CARD_FILE = "README.md"
_NOT_PEFT = (
    "PEFT cannot load this adapter: it mistakes dense layers (gate, up and down of a shared "
    "expert, or of a layer without experts) for experts. `rl-lora export --merged` writes a merged "
    "model that needs no PEFT."
)
_USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")"""
_USE_NF4 = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{dtype},
)
base = AutoModelForCausalLM.from_pretrained(
    "{base}", dtype=torch.{dtype}, quantization_config=nf4
)
model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")"""
_USE_MERGED = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")"""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_NAMES = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def hub_id(model_name: str) -> str | None:
    """The hub id of a model's name, or None."""
    name = _HUB_NAMES.get(model_name, model_name)
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def run_config(adapter_dir: Path) -> RunConfig | SftConfig | None:
    """Settings of the run in whose folder an adapter is; None outside a run folder.

    Raises:
        UserError: the run's record cannot be read.
    """
    run_folder = _run_folder(adapter_dir)
    if run_folder is None:
        return None
    raw = with_present_names(read_json(run_folder / "run.json").get("config", {}))
    return parse_as(SftConfig, raw) if "sft" in raw else parse_config(raw)


def card_text(adapter_dir: Path, *, merged: bool = False) -> str:
    """The card as Markdown with the hub's metadata block, without local paths.

    Raises:
        UserError: adapter_dir is not a PEFT LoRA directory.
    """
    config, name = run_config(adapter_dir), named_base(adapter_dir) or "unknown"
    is_sft = isinstance(config, SftConfig)
    base = hub_id(name) or Path(name).name
    data = ModelCardData(
        base_model=hub_id(name),
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["lora", *([] if is_sft else ["reinforcement-learning"]), "rl-lora"],
        datasets=_hub_sets(config) or None,
    )
    kind = "merged into its base model" if merged else "LoRA adapter"
    lines = [
        f"# {base}, {'fine-tuned' if is_sft else 'trained by reinforcement learning'} ({kind})",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base} |",
        *(f"| {key} | {value} |" for key, value in _table(adapter_dir, config).items()),
        *_evaluation_lines(adapter_dir),
        *("", "## Use", ""),
    ]
    trained = trained_on(adapter_dir)
    use = _USE_MERGED if merged else _USE_NF4 if trained.quantize == "nf4" else _USE
    if merged or is_peft_loadable(adapter_dir):
        lines += ["```python", use.format(base=base, dtype=trained.dtype), "```", ""]
    else:
        lines += [_NOT_PEFT, ""]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines)))


def write_card(adapter_dir: Path) -> Path:
    """Writes README.md into an adapter directory, without network."""
    path = adapter_dir / CARD_FILE
    try:
        write_text_atomically(path, card_text(adapter_dir))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def _table(adapter_dir: Path, config: RunConfig | SftConfig | None) -> dict[str, str]:
    peft, manifest = peft_settings(adapter_dir), read_manifest(adapter_dir)
    rank, num_steps = peft_rank(peft, manifest), manifest.get("version")
    rows = {"rank, alpha": f"{rank}, {float(peft['lora_alpha']):g}"}
    if int(peft["r"]) != rank:  # in a mixture: rank / number of active experts
        rows["rank of one expert"] = str(peft["r"])
    # PiSSA and OLoRA are saved as plain LoRA.
    trained = manifest.get("trained_as", {})
    variant = trained.get("variant") or next(iter(peft_variants(peft)), "lora")
    if variant != "lora":
        rows["variant"] = VARIANT_NAMES[variant] + {
            "dora": "; PEFT serves it, vLLM does not",
            "rslora": ": the scaling is alpha / sqrt(rank)",
        }.get(
            variant,
            f": trained at rank {trained.get('rank')}, its start subtracted; served as plain LoRA",
        )
    if (quantize := trained_on(adapter_dir).quantize) is not None:
        rows["base in training"] = (
            f"quantized to {quantize} (bitsandbytes), all linear layers but lm_head; on "
            "unquantized weights this adapter gives other log-probs. `rl-lora export --merged` "
            "adds it to the dequantized ones"
        )
    modules = peft["target_modules"]
    rows["adapted layers"] = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    if config is None:
        return rows
    ratio = config.optim.lora_plus_ratio
    plus = f" (B {ratio:g} times that, LoRA+)" if ratio != 1 else ""
    sets = ", ".join(_set_name(source.name) for source in config.data.train)
    last = {
        "optimizer": f"Adam, learning rate {config.optim.lr:g}{plus}, {config.optim.schedule}",
        "seed": str(config.run.seed),
    }
    if isinstance(config, SftConfig):
        return rows | {
            "training data": sets,
            "steps": f"{num_steps} of {config.sft.batch_size} sequences, up to "
            f"{config.data.max_tokens} tokens",
            "loss": "cross-entropy of the answers",
            **last,
        }
    sampling, algorithm, reward = config.sampling, config.algorithm, config.reward
    rows |= {
        "training problems": sets,
        "steps": f"{num_steps} of {sampling.num_prompts} prompts x "
        f"{sampling.num_samples} samples, up to {sampling.max_tokens} tokens",
        "advantage, loss": f"{algorithm.advantage}, {algorithm.loss}",
        "reward": f"{reward.name}, policy {reward.policy}, format weight {reward.format_weight:g}",
        **last,
    }
    if config.environment.name is not None:
        rows["environment"] = f"{config.environment.name}, {config.environment.max_turns} turns"
    if config.warm_start.num_steps:
        rows["warm start"] = f"{config.warm_start.num_steps} supervised steps before"
    return rows


def _evaluation_lines(adapter_dir: Path) -> list[str]:
    """Evaluations of the base, before the first step, and of the adapter's version."""
    run_folder, version = (
        _run_folder(adapter_dir),
        int(read_manifest(adapter_dir).get("version", -1)),
    )
    if run_folder is None:
        return []
    names = {"base model": "base", "before RL": "step_000000"}
    if version > 0:
        names["this adapter"] = f"step_{version:06d}"
    lines = []
    for policy, name in names.items():
        file = run_folder / "eval" / f"{name}.json"
        if file.is_file():
            result = load_result(file)
            total = result.total
            lines.append(
                f"| {policy} | {total.accuracy:.1%} | {total.accuracy_low:.1%} to "
                f"{total.accuracy_high:.1%} ({result.confidence:.0%}, {result.interval}) | "
                f"{total.num_problems} x {total.num_samples} |"
            )
    title = ["", "## Held-out accuracy", ""]
    header = ["| policy | accuracy | interval | problems |", "|---|---|---|---|"]
    return [*title, *header, *lines] if lines else []


def _run_folder(adapter_dir: Path) -> Path | None:
    """The run folder with adapter_dir as adapter/, best/ or adapters/vNNNNNN/; None without one."""
    parents = adapter_dir.resolve().parents
    return next((folder for folder in parents[:2] if (folder / "run.json").is_file()), None)


def _hub_sets(config: RunConfig | SftConfig | None) -> list[str]:
    names = [source.name for source in config.data.train] if config else []
    known = [LOADERS[name].hub_id if name in LOADERS else name for name in names]
    return [name for name in known if hub_id(name)]


def _set_name(name: str) -> str:
    return name if name in LOADERS or ":" in name or hub_id(name) else Path(name).stem
