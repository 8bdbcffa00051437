"""An adapter's model card: base model, training settings and scores, from its run folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from rl_lora.adapters.peft_files import (
    is_peft_loadable,
    peft_rank,
    peft_settings,
    peft_variants,
    read_manifest,
)
from rl_lora.config import VARIANT_NAMES, RunConfig, parse_as, parse_config
from rl_lora.config.sft import SftConfig
from rl_lora.data.sources import LOADERS
from rl_lora.errors import UserError
from rl_lora.evaluation.scores import EvalResult, load_result
from rl_lora.models.resolve import EMBEDDED
from rl_lora.storage.jsonl import read_json

CARD_FILE = "README.md"
_NOT_PEFT = (
    "PEFT cannot load this adapter: it mistakes dense layers (gate, up and down of a shared "
    "expert, or of a layer without experts) for experts. `rl-lora export --merged` writes a merged "
    "model that needs no PEFT."
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_NAMES = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Contents of a model card.

    Example: AdapterFacts(base_model="Qwen/Qwen3-8B-Base", rank=1, alpha=32.0,
    target_modules=("down_proj", "q_proj"), config=RunConfig(...), evaluations={"base":
    EvalResult(...)})
    """

    base_model: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    variant: str = "lora"  # as trained; PiSSA and OLoRA are saved as plain LoRA
    trained_rank: int | None = None  # if other than the saved rank
    expert_rank: int | None = None  # in a mixture, one expert's: rank / number of active experts
    is_peft: bool = True  # whether PEFT can load it
    num_steps: int | None = None  # training steps
    config: RunConfig | SftConfig | None = None  # None: an adapter outside a run folder
    evaluations: dict[str, EvalResult] | None = None  # by evaluated policy

    @property
    def base_hub_id(self) -> str | None:
        """The base model's hub id; None for a local directory."""
        return hub_id(self.base_model)


def hub_id(model_name: str) -> str | None:
    """The hub id of a model's name, or None."""
    name = _HUB_NAMES.get(model_name, model_name)
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def read_facts(adapter_dir: Path) -> AdapterFacts:
    """Reads adapter_config.json, the manifest, and the run folder around the adapter.

    Raises:
        UserError: adapter_dir is not a PEFT LoRA directory.
    """
    peft, manifest = peft_settings(adapter_dir), read_manifest(adapter_dir)
    trained = manifest.get("trained_as", {})
    rank = peft_rank(peft, manifest)
    run_folder = _run_folder(adapter_dir)
    evaluations = None
    if run_folder is not None:
        evaluations = _evaluations(run_folder / "eval", int(manifest.get("version", -1)))
    return AdapterFacts(
        base_model=manifest.get("base_model") or peft.get("base_model_name_or_path") or "unknown",
        rank=rank,
        expert_rank=int(peft["r"]) if int(peft["r"]) != rank else None,
        is_peft=is_peft_loadable(adapter_dir),
        alpha=float(peft["lora_alpha"]),
        target_modules=_module_names(peft["target_modules"]),
        variant=trained.get("variant") or next(iter(peft_variants(peft)), "lora"),
        trained_rank=trained.get("rank"),
        num_steps=manifest.get("version"),
        config=run_config(adapter_dir),
        evaluations=evaluations,
    )


def run_config(adapter_dir: Path) -> RunConfig | SftConfig | None:
    """Settings of the run in whose folder an adapter is; None outside a run folder.

    Raises:
        UserError: the run's record cannot be read.
    """
    run_folder = _run_folder(adapter_dir)
    if run_folder is None:
        return None
    raw = read_json(run_folder / "run.json").get("config", {})
    return parse_as(SftConfig, raw) if "sft" in raw else parse_config(raw)


def card_text(facts: AdapterFacts, *, merged: bool = False) -> str:
    """The card as Markdown with the hub's metadata block, without local paths."""
    is_sft = isinstance(facts.config, SftConfig)
    data = ModelCardData(
        base_model=facts.base_hub_id,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["lora", *([] if is_sft else ["reinforcement-learning"]), "rl-lora"],
        datasets=_hub_sets(facts.config) or None,
    )
    base = facts.base_hub_id or Path(facts.base_model).name
    kind = "merged into its base model" if merged else "LoRA adapter"
    lines = [
        f"# {base}, {'fine-tuned' if is_sft else 'trained by reinforcement learning'} ({kind})",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _table(facts, base).items()),
    ]
    if facts.evaluations:
        lines += ["", "## Held-out accuracy", "", *_evaluation_lines(facts.evaluations)]
    if merged or facts.is_peft:
        lines += ["", "## Use", "", "```python", *_usage(base, merged=merged), "```", ""]
    else:
        lines += ["", "## Use", "", _NOT_PEFT, ""]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines)))


def write_card(adapter_dir: Path) -> Path:
    """Writes README.md into an adapter directory, without network."""
    path = adapter_dir / CARD_FILE
    try:
        path.write_text(card_text(read_facts(adapter_dir)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def _table(facts: AdapterFacts, base: str) -> dict[str, str]:
    rows = {
        "base model": base,
        "rank, alpha": f"{facts.rank}, {facts.alpha:g}",
        **({"rank of one expert": str(facts.expert_rank)} if facts.expert_rank else {}),
        **_variant_rows(facts),
        "adapted layers": ", ".join(facts.target_modules),
    }
    config = facts.config
    if config is None:
        return rows
    ratio = config.optim.lora_plus_ratio
    plus = f" (B {ratio:g} times that, LoRA+)" if ratio != 1 else ""
    sets = ", ".join(_set_name(source.name) for source in config.data.train)
    adam = f"Adam, learning rate {config.optim.lr:g}{plus}, {config.optim.schedule}"
    if isinstance(config, SftConfig):
        return rows | {
            "training data": sets,
            "steps": f"{facts.num_steps} of {config.sft.batch_size} sequences, up to "
            f"{config.data.max_tokens} tokens",
            "loss": "cross-entropy of the answers",
            "optimizer": adam,
            "seed": str(config.run.seed),
        }
    sampling, algorithm = config.sampling, config.algorithm
    rows |= {
        "training problems": sets,
        "steps": f"{facts.num_steps} of {sampling.num_prompts} prompts x "
        f"{sampling.num_samples} samples, up to {sampling.max_tokens} tokens",
        "advantage, loss": f"{algorithm.advantage}, {algorithm.loss}",
        "optimizer": adam,
        "reward": f"{config.reward.name}, policy {config.reward.policy}, "
        f"format weight {config.reward.format_weight:g}",
        "seed": str(config.run.seed),
    }
    if config.warm_start.num_steps:
        rows["warm start"] = f"{config.warm_start.num_steps} supervised steps before"
    return rows


def _variant_rows(facts: AdapterFacts) -> dict[str, str]:
    """How the variant differs from plain LoRA, for the card."""
    if facts.variant == "lora":
        return {}
    served = {
        "dora": "; PEFT serves it, vLLM does not",
        "rslora": ": the scaling is alpha / sqrt(rank)",
    }
    start = f": trained at rank {facts.trained_rank}, its start subtracted; served as plain LoRA"
    return {"variant": VARIANT_NAMES[facts.variant] + served.get(facts.variant, start)}


def _evaluation_lines(evaluations: dict[str, EvalResult]) -> list[str]:
    lines = ["| policy | accuracy | interval | problems |", "|---|---|---|---|"]
    for name, evaluation in evaluations.items():
        total = evaluation.total
        lines.append(
            f"| {name} | {total.accuracy:.1%} | {total.accuracy_low:.1%} to "
            f"{total.accuracy_high:.1%} ({evaluation.confidence:.0%}, {evaluation.interval}) | "
            f"{total.num_problems} x {total.num_samples} |"
        )
    return lines


def _usage(base: str, *, merged: bool) -> list[str]:
    if merged:
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")',
    ]


def _evaluations(folder: Path, version: int) -> dict[str, EvalResult]:
    """Evaluations of the base, before the first step, and of the adapter's version."""
    files = {
        "base model": folder / "base.json",
        "before RL": folder / "step_000000.json",
        "this adapter": folder / f"step_{version:06d}.json",
    }
    if version <= 0:
        del files["this adapter"]
    return {name: load_result(file) for name, file in files.items() if file.is_file()}


def _run_folder(adapter_dir: Path) -> Path | None:
    """The run folder with adapter_dir as adapter/, best/ or adapters/vNNNNNN/; None without one."""
    parents = adapter_dir.resolve().parents
    return next((folder for folder in parents[:2] if (folder / "run.json").is_file()), None)


def _hub_sets(config: RunConfig | SftConfig | None) -> list[str]:
    names = [source.name for source in config.data.train] if config else []
    known = [LOADERS[name].hub_id if name in LOADERS else name for name in names]
    return [name for name in known if _HUB_ID.fullmatch(name) and not Path(name).exists()]


def _set_name(name: str) -> str:
    return name if name in LOADERS or ":" in name or hub_id(name) else Path(name).stem


def _module_names(raw: str | list[str]) -> tuple[str, ...]:
    return (raw,) if isinstance(raw, str) else tuple(sorted(raw))
