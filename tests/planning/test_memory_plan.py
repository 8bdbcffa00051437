"""The dry run's numbers, checked by hand on published shapes and against what autograd keeps."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from rl_lora.commands.plan import print_plan
from rl_lora.commands.plan_tables import memory_table
from rl_lora.config import LoraSection, ModelSection, OptimSection, RunConfig, parse_config
from rl_lora.errors import UserError
from rl_lora.models.shapes import (
    KNOWN_SHAPES,
    build_on_meta,
    known_config,
    kv_bytes_per_token,
    load_model_config,
)
from rl_lora.models.tiny import RECIPES, build_model
from rl_lora.planning.counts import matmul_counts, parameter_counts
from rl_lora.planning.memory import (
    ASSUMED_GPU_BYTES,
    PHASES,
    MemoryItem,
    activation_bytes,
    bytes_to_come,
    largest_microbatch,
    memory_plan,
    peak,
)
from tests.helpers.tiny_models import (
    make_policy,
    random_gpt2,
    random_llama,
    random_mixtral,
    random_qwen3,
    random_qwen3_moe,
    small_config,
)

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
# A layer of rank r has r (d_in + d_out) parameters. Llama-3.1-8B, per unit of rank:
ATTENTION = 32 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096))  # q, k and v, o
MLP = 32 * 3 * (4096 + 14336)  # gate, up, down
LM_HEAD = 4096 + 128256


@pytest.mark.parametrize(
    ("layers", "rank", "by_hand", "article"),
    [
        ("all", 256, 256 * (ATTENTION + MLP), 0.70e9),
        ("mlp", 256, 256 * MLP, 0.49e9),
        ("attention", 256, 256 * ATTENTION, 0.25e9),
        ("mlp", 128, 128 * MLP, 0.24e9),
    ],
)
def test_adapters_of_llama_8b_have_the_articles_sizes(
    layers: Any, rank: int, by_hand: int, article: float
) -> None:
    counts = parameter_counts(build_on_meta(LLAMA_8B), LoraSection(layers=layers, rank=rank))
    assert counts.base == 8_030_261_248  # as published
    assert counts.adapter == by_hand
    assert counts.adapter_with_lm_head == by_hand + rank * LM_HEAD
    assert counts.trainable == counts.adapter
    # The article's figures have two digits and count lm_head.
    assert round(counts.adapter_with_lm_head / 1e9, 2) == article / 1e9


def test_lm_head_and_full_mode_change_what_trains() -> None:
    model = build_on_meta(LLAMA_8B)
    with_head = parameter_counts(model, LoraSection(rank=1, lm_head=True))
    assert with_head.trainable == ATTENTION + MLP + LM_HEAD
    assert with_head.num_targets == 32 * 7 + 1
    full = parameter_counts(model, LoraSection(mode="full"))
    assert full.trainable == full.base


@pytest.mark.parametrize("make", [random_llama, random_qwen3, random_gpt2])
@pytest.mark.parametrize("layers", ["all", "attention", "mlp"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_counts_equal_those_of_the_real_policy(
    tmp_path: Path, make: Any, layers: Any, lm_head: bool
) -> None:
    path = make(tmp_path)
    section = LoraSection(rank=3, layers=layers, lm_head=lm_head)
    config, _ = load_model_config(ModelSection(name=str(path)), path)
    counts = parameter_counts(build_on_meta(config), section)
    policy = make_policy(path, rank=3, layers=layers, lm_head=lm_head)
    assert counts.trainable == sum(p.numel() for p in policy.trainable().values())
    frozen = sum(p.numel() for p in policy.model.parameters() if not p.requires_grad)
    assert counts.base == frozen  # a tied lm_head counts once
    assert counts.num_targets == len(policy.target_names)


def test_known_shapes_have_the_published_sizes() -> None:
    sizes = {
        name: parameter_counts(build_on_meta(config_class(**shape)), LoraSection(rank=8)).base
        for name, (config_class, shape) in KNOWN_SHAPES.items()
    }
    assert sizes == {
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
        "Qwen/Qwen3-8B-Base": 8_190_735_360,
        "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
        "smollm2-135m-instruct": 134_515_008,
    }


def test_multiply_adds_are_the_articles_formula() -> None:
    # 2 layers of hidden size 8: q, o 8x8; k, v 8x4; gate, up, down 8x16; lm_head 8x10.
    config = small_config()
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 128) + 80
    sides = 2 * (2 * 16 + 2 * 12 + 3 * 24)  # sum of d_in + d_out over the adapted layers
    counts = matmul_counts(build_on_meta(config), LoraSection(rank=5))
    assert counts.full == 3 * weights
    assert counts.lora == 2 * weights + 3 * 5 * sides
    # For one square layer of size N this is 2 N^2 + 6 N R; at rank 1 of a large model, 2/3.
    assert matmul_counts(build_on_meta(LLAMA_8B), LoraSection(rank=1)).ratio == pytest.approx(
        2 / 3, abs=2e-3
    )


def test_kv_cache_of_llama_8b_takes_128_kib_per_token() -> None:
    # 2 (keys, values) x 32 layers x 8 heads x 128 x 2 bytes
    assert kv_bytes_per_token(LLAMA_8B, torch.bfloat16) == 131_072


def test_memory_plan_adds_up_by_hand() -> None:
    config = parse_config(
        {
            "model": {"name": "meta-llama/Llama-3.1-8B", "device": "cuda", "dtype": "bfloat16"},
            "lora": {"rank": 1},
            "data": {"max_prompt_tokens": 256},
            "optim": {"microbatch_tokens": 4096},
            "sampling": {"max_tokens": 256, "num_prompts": 4, "num_samples": 8},
        }
    )
    counts = parameter_counts(build_on_meta(LLAMA_8B), config.lora)
    parts = memory_plan(config, LLAMA_8B, counts.base, counts.trainable, 64 * 2**30)
    assert [(part.part, part.num_bytes) for part in parts if part.part != "activations"] == [
        ("base weights", 2 * 8_030_261_248),
        ("adapter", 4 * 2_621_440),
        ("gradients", 4 * 2_621_440),
        ("optimizer", 8 * 2_621_440),
        ("logits", 2 * 2 * 2**27),
        ("CUDA", 2**29),
        ("base weights", 2 * 8_030_261_248),
        ("adapter slot", 2 * 2_621_440),
        ("vLLM", 2 * 2**30),
        ("vLLM, asleep", 2**30),
        # The rest of the GPU, less 4 GiB in reserve, is vLLM's, whatever the job needs.
        ("KV cache", pytest.approx(57.5 * 2**30 - 4 * 8_030_261_248 - 18 * 2_621_440, abs=1)),
    ]
    assert "32 sequences x 512 tokens x 128 KiB" in parts[-1].note
    (activations,) = (part.num_bytes for part in parts if part.part == "activations")
    assert peak(parts, "sampling") == pytest.approx(60 * 2**30, abs=1)
    assert peak(parts, "learning") == (
        2 * 8_030_261_248 + 16 * 2_621_440 + 2**29 + 3 * 2**29 + activations
    )
    # Twice the activations fit into the learner's peak and as many bytes more.
    room = peak(parts, "learning") + activations
    assert largest_microbatch(parts, 4096, room) == 8192
    assert largest_microbatch(parts, 4096, activations) == 0
    # The engine is asked for what is left when the learner's weights are loaded already: gradients
    # and optimizer come later, and if it learns meanwhile activations and logits too.
    assert bytes_to_come(config, LLAMA_8B, counts.base, counts.trainable) == 12 * 2_621_440
    overlap = {"sampling": config.sampling.model_copy(update={"max_staleness": 1})}
    both = config.model_copy(update=overlap)
    come = bytes_to_come(both, LLAMA_8B, counts.base, counts.trainable)
    assert come == 12 * 2_621_440 + 2**29 + activations
    together = memory_plan(both, LLAMA_8B, counts.base, counts.trainable, 64 * 2**30)
    assert peak(together, "sampling") == peak(together, "learning")
    assert peak(together, "learning") == pytest.approx(60 * 2**30, abs=1)
    assert "vLLM, asleep" not in {part.part for part in together}
    # A run that chooses the size of microbatches, 16,384 tokens, takes 3/4 of what is free.
    usual = both.model_copy(update={"optim": OptimSection()})
    come = bytes_to_come(usual, LLAMA_8B, counts.base, counts.trainable)
    assert come == pytest.approx((12 * 2_621_440 + 2**29 + 4 * activations) / 0.75, abs=1)
    parts = memory_plan(usual, LLAMA_8B, counts.base, counts.trainable, 200 * 2**30)
    engine = sum(part.num_bytes for part in parts[7:])  # base, slot, vLLM, cache
    held = 2 * 8_030_261_248 + 4 * 2_621_440 + 2**29 + come
    assert engine == pytest.approx(196 * 2**30 - held, abs=1)


def test_memory_plan_on_a_cpu_frees_what_sampling_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=400 * 2**30, total=800 * 2**30)
    monkeypatch.setattr("rl_lora.planning.memory.psutil.virtual_memory", lambda: free)
    for dtype, is_merged in (("float32", True), ("bfloat16", False)):
        config = parse_config({"model": {"name": "x", "device": "cpu", "dtype": dtype}})
        parts = memory_plan(config, LLAMA_8B, 1000, 10)
        weights, cache = parts[-2:]
        assert weights.note == "vLLM's copy"
        assert weights.phases == (("sampling",) if is_merged else PHASES)
        assert cache.phases == ("sampling",)


def test_kv_cache_of_a_gpu_is_what_vllms_share_leaves() -> None:
    settings = {"max_tokens": 8192, "num_prompts": 64, "num_samples": 16, "memory_fraction": 0.5}
    engine = 2 * 2**30 + 2 * 2_621_440  # vLLM's own and the adapter's slot
    config = parse_config(
        {"model": {"name": "x", "device": "cuda", "dtype": "bfloat16"}, "sampling": settings}
    )
    counts = parameter_counts(build_on_meta(LLAMA_8B), config.lora)
    cache = memory_plan(config, LLAMA_8B, counts.base, counts.trainable, 80 * 2**30)[-1]
    assert cache.num_bytes == 40 * 2**30 - 2 * counts.base - engine
    # 256 sequences of 1024 + 8192 tokens would like 288 GiB.
    assert "256 sequences x 9216 tokens x 128 KiB would be 288.00 GiB" in cache.note
    assert f"{cache.num_bytes // (131_072 * 9216)} of full length fit" in cache.note
    # Without a GPU here the plan is for an 80 GB card.
    nowhere = memory_plan(config, LLAMA_8B, counts.base, counts.trainable)[-1]
    if not torch.cuda.is_available():
        assert nowhere.num_bytes == ASSUMED_GPU_BYTES // 2 - 2 * counts.base - engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_plan_of_full_training_has_masters_of_bfloat16(dtype: str) -> None:
    config = parse_config(
        {
            "model": {"name": "x", "device": "cpu", "dtype": dtype},
            "lora": {"mode": "full"},
            "sampling": {"backend": "torch"},
            "algorithm": {"kl": "loss", "kl_weight": 0.1},
        }
    )
    counts = parameter_counts(build_on_meta(LLAMA_8B), config.lora)
    sizes: dict[str, list[int]] = {}
    for part in memory_plan(config, LLAMA_8B, counts.base, counts.trainable):
        sizes.setdefault(part.part, []).append(part.num_bytes)
    size = 4 if dtype == "float32" else 2
    assert "adapter" not in sizes
    assert sizes["base weights"] == [size * counts.base]  # TorchSampler samples from the learner's
    assert sizes["reference weights"] == [size * counts.base]
    assert sizes.get("master weights") == (None if dtype == "float32" else [4 * counts.base])
    assert sizes["gradients"] == [4 * counts.base]
    assert sizes["optimizer"] == [8 * counts.base]


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, MixtralConfig, Qwen3MoeConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_estimate_is_near_what_autograd_keeps(
    tmp_path: Path, config_class: Any, dtype: torch.dtype
) -> None:
    more = {
        Qwen3Config: {"head_dim": 16},
        MixtralConfig: {"num_local_experts": 4, "num_experts_per_tok": 2},
        Qwen3MoeConfig: {"head_dim": 16, "moe_intermediate_size": 96, "num_experts_per_tok": 4},
    }.get(config_class, {})
    config = config_class(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=200,
        **more,
    )
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = make_policy(tmp_path, rank=getattr(config, "num_experts_per_tok", 1))
    policy.model.to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a freed tensor's address would be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    token_ids_BT = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.model.base_model(input_ids=token_ids_BT, use_cache=False)
    estimate = activation_bytes(config, 128, dtype, is_checkpointed=False, joins_swiglu=True)
    assert 0.7 < estimate / sum(kept.values()) < 1.3


def test_checkpointing_keeps_one_tensor_per_layer_and_one_layer() -> None:
    # Per token: 32 layers of 4096, and one layer of 6 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336.
    per_token = 32 * 4096 + 6 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336
    assert activation_bytes(LLAMA_8B, 10, torch.bfloat16, is_checkpointed=True) == 20 * per_token


def test_plan_reads_a_model_directory_without_its_weights(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    for file in path.glob("*.safetensors"):
        file.unlink()
    text = _printed(RunConfig(model=ModelSection(name=str(path), device="cpu", dtype="float32")))
    assert "Memory plan" in text
    assert "of this machine's" in text


def test_plan_marks_departures_from_the_defaults() -> None:
    config = parse_config({"lora": {"rank": 8}, "data": "gsm8k", "model": {"dtype": "float32"}})
    lines = [line.strip("│ ") for line in _printed(config).splitlines()]
    assert any(line.startswith("* lora.rank") and "8" in line for line in lines)
    assert any(line.startswith("* data.train") and "gsm8k" in line for line in lines)
    assert any(line.startswith("lora.alpha") for line in lines)
    assert not any(line.startswith("* lora.alpha") for line in lines)


def test_plan_of_a_gpu_job_needs_neither_gpu_nor_network() -> None:
    config = parse_config(
        {"model": {"name": "Qwen/Qwen3-8B-Base", "device": "cuda", "dtype": "bfloat16"}}
    )
    text = _printed(config)
    assert "8,190,735,360" in text
    assert "built-in table" in text
    if not torch.cuda.is_available():
        assert "Time on one H100" in text
        assert "largest microbatch" in text


def test_plan_says_when_the_machine_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "plan_tables"):
        monkeypatch.setattr(f"rl_lora.commands.{module}.machine_bytes", lambda device: 2**30)
    config = parse_config({"model": {"device": "cpu"}, "optim": {"microbatch_tokens": 10**6}})
    text = _printed(config)
    assert "MORE than this machine's 1.00 GiB" in text
    assert "No setting that leaves the results as they are makes it fit" in text


def test_tiny_model_that_is_not_made_yet_has_its_recipes_shape() -> None:
    recipe = RECIPES["tiny-fast"]
    tokenizer: Any = SimpleNamespace(eos_token_id=0, pad_token_id=1)
    made = sum(parameter.numel() for parameter in build_model(recipe, tokenizer).parameters())
    known = known_config("tiny-fast")
    assert known is not None
    assert parameter_counts(build_on_meta(known), LoraSection()).base == made


def test_kv_cache_is_bounded_by_what_vllm_sets_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=4 * 2**30, total=8 * 2**30)
    monkeypatch.setattr("rl_lora.planning.memory.psutil.virtual_memory", lambda: free)
    config = parse_config({"model": {"device": "cpu", "dtype": "float32"}})
    known = known_config("smollm2-135m-instruct")
    assert known is not None
    counts = parameter_counts(build_on_meta(known), config.lora)
    cache = memory_plan(config, known, counts.base, counts.trainable)[-1]
    assert cache.num_bytes == 2**30  # a quarter of what is free
    # A sequence of 1280 tokens takes 2 x 30 x 3 x 64 x 4 bytes a token.
    assert f"; {2**30 // (1280 * 46_080)} of full length fit" in cache.note


def test_unknown_model_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"config\.json is not on this machine") as caught:
        print_plan(RunConfig(model=ModelSection(name="nobody/no-such-model")))
    assert "\n" not in str(caught.value)


def test_broken_config_json_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        load_model_config(ModelSection(name=str(tmp_path)), tmp_path)
    assert "\n" not in str(caught.value)


def test_parts_have_readable_sizes() -> None:
    console = Console(file=io.StringIO(), width=100)
    model = ModelSection(name="x", device="cuda")
    console.print(memory_table([MemoryItem("adapter", 3 * 2**29, "float32")], model, 2**30))
    assert isinstance(console.file, io.StringIO)
    assert "1.50 GiB" in console.file.getvalue()
    assert "MORE than a GPU's 1.00 GiB" in console.file.getvalue()


def test_plan_says_what_the_job_may_teach_and_what_the_rank_holds() -> None:
    raw = {
        "run": {"num_steps": 156},
        "model": {"name": "meta-llama/Llama-3.1-8B", "device": "cuda", "dtype": "bfloat16"},
        "sampling": {"num_prompts": 64, "num_samples": 32},
    }
    text = _printed(parse_config(raw))
    # 2 x 2,621,440 bits against 156 x 64 x 32 episodes
    assert "holds about 5.24 M bits; offered at most 319 k bits (319,488 episodes)" in text
    assert "warning" not in text
    raw["run"]["num_steps"] = 10_000  # type: ignore[index]
    text = _printed(parse_config(raw))
    assert "warning: rank 1 holds about 5.24 M bits, less than the 20.5 M bits" in text
    assert "lora.rank=4 or more" in text


def _printed(config: RunConfig) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_plan(config, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


QWEN3_30B_A3B = Qwen3MoeConfig(**KNOWN_SHAPES["Qwen/Qwen3-30B-A3B-Base"][1])


def test_a_mixtures_experts_share_the_rank() -> None:
    model = build_on_meta(QWEN3_30B_A3B)
    counts = parameter_counts(model, LoraSection(rank=8))
    assert counts.base == 30_532_122_624  # published: 30.5B in all, 3.3B active
    expert = 3 * 2048 * 768
    assert counts.active == counts.base - 48 * (128 - 8) * expert
    assert round(counts.active / 1e9, 1) == 3.4  # the published number leaves out some embedding
    # Rank 8 on q, k and v, o; rank 1 on gate, up and down of each of 128 experts.
    attention = 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert counts.adapter == attention + 48 * 128 * 3 * (2048 + 768)
    assert counts.num_targets == 48 * (4 + 128 * 3)
    assert parameter_counts(model, LoraSection(rank=8, layers="attention")).adapter == attention
    with pytest.raises(UserError, match=r"lora\.rank=12 is divided among 8 active experts"):
        parameter_counts(model, LoraSection(rank=12))
    assert parameter_counts(model, LoraSection(rank=12, mode="full")).trainable == counts.base


def test_multiply_adds_of_a_mixture_are_those_of_its_active_experts() -> None:
    matmuls = matmul_counts(build_on_meta(QWEN3_30B_A3B), LoraSection(rank=8))
    linear = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512) + 2048 * 151936
    weights = linear + 48 * 8 * 3 * 2048 * 768
    sides = 48 * (8 * (2 * (2048 + 4096) + 2 * (2048 + 512)) + 8 * 3 * (2048 + 768))
    assert matmuls.full == 3 * weights
    assert matmuls.lora == 2 * weights + 3 * sides


@pytest.mark.parametrize("make", [random_mixtral, random_qwen3_moe])
def test_counts_of_a_mixture_are_those_of_the_policy(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    policy = make_policy(path, rank=4)
    config, _ = load_model_config(ModelSection(name=str(path)), path)
    counts = parameter_counts(build_on_meta(config), policy.lora)
    assert counts.trainable == sum(p.numel() for p in policy.trainable().values())
    assert counts.trainable == sum(t.numel() for t in policy.published_tensors().values())
    assert 2 * counts.num_targets == len(policy.published_tensors())


def test_the_plan_of_a_mixture_names_its_active_parameters(tmp_path: Path) -> None:
    path = random_qwen3_moe(tmp_path / "model")
    console = Console(file=io.StringIO(), width=200)
    overrides = {"model": {"name": str(path)}, "lora": {"rank": 4}}
    print_plan(parse_config(overrides), path, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "base, active per token" in text
    bad = parse_config({"model": {"name": str(path)}, "lora": {"rank": 3}})
    with pytest.raises(UserError, match="set a multiple of 2"):
        print_plan(bad, path, console)
