"""Decoder layers compiled in place: values and gradients of eager ones, few graphs, few kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rl_lora.batches import pack_samples
from rl_lora.config import LoraSection, ModelSection
from rl_lora.errors import UserError
from rl_lora.nn import attention, compiled, token_logprobs
from rl_lora.nn.compiled import compile_layers, decoder_layers
from rl_lora.nn.lora import attach_lora
from rl_lora.nn.segments import make_layout
from rl_lora.policy import Policy, open_policy
from rl_lora.types import Microbatch, TrainSample
from tests.helpers.architectures import ARCHITECTURES, Architecture, make_architecture
from tests.helpers.tiny_models import VOCAB, random_llama, random_qwen3, random_qwen3_moe, shake

NUM_LAYERS_OF_SMOLLM2 = 30


@pytest.fixture(autouse=True)
def _layers_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs of one test are not another's; lm_head's are tested elsewhere."""
    monkeypatch.setattr(token_logprobs, "_compiled", lambda function: function)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated but run by PyTorch's operators: building kernels takes
    a minute of a CPU."""
    monkeypatch.setattr(compiled, "_backend", lambda budget: "aot_eager")


def opened(path: Path, *, compiles: bool, checkpoints: bool = False, **lora: Any) -> Policy:
    """A float32 policy whose adapter matters."""
    model = ModelSection(name=str(path), device="cpu", dtype="float32", compile=compiles)
    section = LoraSection(**lora)
    policy = open_policy(path, model, section, seed=0, checkpoint_activations=checkpoints)
    shake(policy)
    return policy


def batch(seed: int) -> Microbatch:
    """Two prompts with three completions each, in one row, of random lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    samples = []
    for _ in range(2):
        prompt = ids(3, 9)
        for number in range(3):
            completion = ids(4, 20)
            samples.append(
                TrainSample(prompt, completion, (-4.0,) * len(completion), number - 1.0, 0)
            )
    ((found,),) = pack_samples(samples, microbatch_tokens=512, share_prompts=True)
    return found


def log_probs_and_gradients(policy: Policy, microbatch: Microbatch) -> list[Tensor]:
    with policy.training():
        logprobs_C, _ = policy.token_logprobs(microbatch, temperature=1.0)
        parameters = list(policy.trainable().values())
        gradients = torch.autograd.grad((logprobs_C * microbatch.advantages_C).sum(), parameters)
    return [logprobs_C.detach(), *gradients]


def assert_agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-5
        )
        assert (one - other).norm() <= 1e-5 * other.norm()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("_without_kernels")
@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (random_llama, {"rank": 1}),
        pytest.param(random_qwen3, {"rank": 4, "variant": "dora"}, marks=pytest.mark.long),
        pytest.param(random_llama, {"rank": 1, "variant": "pissa"}, marks=pytest.mark.long),
    ],
)
def test_ten_batches_take_two_graphs_and_agree_with_eager_layers(
    make: Any, lora: dict[str, Any], tmp_path: Path
) -> None:
    """One graph for the first layer, whose input needs no gradient, and one for all others."""
    path = make(tmp_path / "model")
    policies = [opened(path, compiles=compiles, **lora) for compiles in (False, True)]
    for seed in range(10):
        expected, found = (log_probs_and_gradients(policy, batch(seed)) for policy in policies)
        assert_agree(found, expected)
    assert num_graphs() == 2
    with torch.no_grad():
        eager, compiled_ = (policy.reference_logprobs(batch(0), 1.0) for policy in policies)
        torch.testing.assert_close(compiled_, eager)
    assert num_graphs() == 3
    ids_BT = torch.arange(3, 12).unsqueeze(0)
    texts = [p.model.generate(ids_BT, max_new_tokens=5, do_sample=False) for p in policies]  # type: ignore[operator]
    assert torch.equal(*texts)
    assert num_graphs() == 3, "decoding is not compiled"


@pytest.mark.usefixtures("_without_kernels")
def test_each_thread_may_compile_all_graphs(tmp_path: Path) -> None:
    """Any thread may run a pass, and Dynamo's settings are each thread's own."""
    policy = opened(random_llama(tmp_path / "model"), compiles=True)

    def passes() -> int:
        torch._dynamo.config.recompile_limit = 1
        policy.token_logprobs(batch(0), 1.0)
        with torch.no_grad():
            policy.token_logprobs(batch(0), 1.0)
        return num_graphs()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(passes).result() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if not a.refused], ids=lambda a: a.key
)
def test_a_layer_of_each_architecture_is_one_graph(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_backend", lambda budget: "eager")
    words = Tokenizer(WordLevel({str(token): token for token in range(VOCAB)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
    path = make_architecture(architecture, tmp_path, tokenizer)
    policies = [
        opened(path, compiles=compiles, mode=architecture.mode) for compiles in (False, True)
    ]
    ids_BT, position_BT = torch.arange(3, 12).unsqueeze(0), torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        expected, found = (
            p.model.base_model(input_ids=ids_BT, position_ids=position_BT, use_cache=False)[0]
            for p in policies
        )
    assert num_graphs() >= 1
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_without_kernels")
def test_a_layer_with_experts_stays_eager_and_is_named(tmp_path: Path) -> None:
    path = random_qwen3_moe(tmp_path / "model", mlp_only_layers=[0])
    with pytest.warns(UserWarning, match=r"1 of 2 layers have experts.*model\.layers\.1"):
        policy = opened(path, compiles=True, checkpoints=True, rank=2)
    dense, mixed = (layer for _, layer in decoder_layers(policy.model))
    assert not dense.gradient_checkpointing
    assert mixed.gradient_checkpointing, "eager layers keep transformers' checkpoints"
    eager = opened(path, compiles=False, rank=2)
    found, expected = (log_probs_and_gradients(p, batch(0)) for p in (policy, eager))
    assert_agree(found, expected)
    assert num_graphs() == 1


def test_a_compiler_that_fails_is_one_line_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nhere")

    monkeypatch.setattr(compiled, "_backend", lambda budget: broken)
    policy = opened(random_llama(tmp_path / "model"), compiles=True)
    with pytest.raises(UserError, match=r"no C\+\+ compiler; model\.compile=false") as caught:
        policy.token_logprobs(batch(0), 1.0)
    assert "\n" not in str(caught.value)


class Layer:
    """One layer of SmolLM2-135M's shape in bfloat16, as each but the first one runs."""

    def __init__(self, *, keeps_activations: bool = True) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=1,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
        config._attn_implementation = attention.NAME
        self.model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        attach_lora(self.model, LoraSection(rank=1), 0)
        compile_layers(self.model, keeps_activations=keeps_activations)
        self.layout = make_layout([20, 30], [[40, 50], [60]])

    def kept_bytes(self) -> float:
        """Runs forward and backward; returns what is kept in between for a token, bytes."""
        num_tokens = 200
        x = torch.randn(1, num_tokens, 576, dtype=torch.bfloat16, requires_grad=True)
        base: Any = self.model.base_model
        position_embeddings = base.rotary_emb(x, torch.arange(num_tokens).unsqueeze(0))
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = base.layers[0](
                x,
                position_embeddings=position_embeddings,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
                layout=self.layout,
            )
        out.sum().backward()
        fixed = [*self.model.parameters(), *position_embeddings]
        for tensor in fixed:  # weights, and what all layers share
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(kept.values()) / num_tokens


@pytest.mark.long
@pytest.mark.slow
def test_a_layer_takes_few_kernels_and_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the schedule of the CPU's compiler, which joins fewer loops than that for GPUs
    (tests/scripts/test_gpu_dry.py counts those); kernels are not built, so the results mean
    nothing."""
    counts: list[int] = []

    def count(nodes: list[Any]) -> list[Any]:
        """Loops that only a CPU runs within one outer loop are counted one by one."""
        real = [node for node in nodes if "Nop" not in type(node).__name__]
        counts.append(sum(len(getattr(node, "outer_fused_nodes", "1")) for node in real))
        return nodes

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *a, **k: lambda *args: None)
    with torch._inductor.config.patch(force_disable_caches=True, _post_fusion_custom_pass=count):
        kept = Layer().kept_bytes()
        forward, backward = counts
        kept_with_checkpoints = Layer(keeps_activations=False).kept_bytes()
    # Attention is one node in each graph; on a GPU (`flash`) 9 kernels and 14.
    assert forward + backward + 8 + 13 <= 117
    assert kept * NUM_LAYERS_OF_SMOLLM2 <= 0.36e6
    assert 576 * 2 <= kept_with_checkpoints < 576 * 2 + 1  # the layer's input, and the layout


@pytest.mark.long
@pytest.mark.slow
def test_built_kernels_agree_with_eager_layers(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policies = [opened(path, compiles=compiles) for compiles in (False, True)]
    expected, found = (log_probs_and_gradients(policy, batch(0)) for policy in policies)
    assert_agree(found, expected)
