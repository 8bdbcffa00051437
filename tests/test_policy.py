"""The policy's log-probs and LoRA layers against transformers and PEFT."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from rl_lora.adapters.files import open_adapter
from rl_lora.batches import pack_samples
from rl_lora.config import LoraSection, ModelSection
from rl_lora.errors import UserError
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.nn import attention, block_attention
from rl_lora.nn.lora import lora_layers
from rl_lora.nn.token_logprobs import take_positions
from rl_lora.policy import Policy, open_policy
from rl_lora.types import Microbatch, TrainSample
from tests.helpers.tiny_models import VOCAB, make_policy, random_llama, random_qwen3, shake

WINDOWED = ["sliding_attention", "full_attention"]  # kinds of two layers
USED = {"use_sliding_window": True}


def batch_of(*sequences: tuple[tuple[int, ...], tuple[int, ...]]) -> Microbatch:
    samples = [TrainSample(p, c, (0.0,) * len(c), 1.0, 0) for p, c in sequences]
    ((batch,),) = pack_samples(samples, microbatch_tokens=10_000)
    return batch


SEQUENCES = (((5, 6, 7), (8, 9, 2)), ((11, 12), (13, 14, 15, 16, 17, 2)), ((3,), (4,)))


def plain_logprobs(model: torch.nn.Module, temperature: float) -> list[float]:
    """One sequence at a time, through transformers' own logits, shortest sequence first."""
    out = []
    for prompt, completion in sorted(SEQUENCES, key=lambda s: len(s[0]) + len(s[1])):
        logits_TV = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
        logprobs_TV = logits_TV.log_softmax(-1)
        out += [
            float(logprobs_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)
        ]
    return out


@pytest.mark.parametrize("make", [random_llama, random_qwen3])
@torch.no_grad()
def test_logprobs_are_those_of_transformers(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path / "model")
    policy = make_policy(path)
    logprobs_C, entropy_C = policy.token_logprobs(batch_of(*SEQUENCES), temperature=0.7)
    expected = plain_logprobs(AutoModelForCausalLM.from_pretrained(path), 0.7)
    assert logprobs_C.tolist() == pytest.approx(expected, abs=1e-5)
    assert entropy_C.min() > 0


@torch.no_grad()
def test_entropy_is_of_the_tempered_distribution(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path)
    _, entropy_C = policy.token_logprobs(batch_of(((5, 6), (7,))), temperature=2.0)
    logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([[5, 6]])).logits[0, -1] / 2
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert float(entropy_C) == pytest.approx(float(expected), abs=1e-5)


def test_lora_output_and_gradients_match_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    path = random_llama(tmp_path / "model")
    policy = make_policy(path, rank=3, alpha=16.0)
    shake(policy)
    config = LoraConfig(r=3, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(policy.published_tensors()[name.replace(".default", "")])
    logprobs_C, _ = policy.token_logprobs(batch_of(((5, 6, 7), (8, 9))), temperature=1.0)
    logprobs_C.sum().backward()
    logits = peft_model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4].log_softmax(-1)
    (logits[0, 8] + logits[1, 9]).backward()
    assert logprobs_C.tolist() == pytest.approx(
        [logits[0, 8].item(), logits[1, 9].item()], abs=1e-5
    )
    theirs = {
        n.replace("base_model.model.", "").replace(".default.weight", ""): p.grad
        for n, p in peft_model.named_parameters()
        if p.requires_grad
    }
    ours = {n: p.grad for n, p in policy.trainable().items()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert torch.allclose(grad, theirs[name], atol=1e-5), name


def test_positions_read_by_many_completions_have_one_gradient() -> None:
    hidden_BTD = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    taken_CD = take_positions(hidden_BTD, torch.tensor([0, 1, 1]), torch.tensor([2, 0, 0]))
    assert taken_CD.tolist() == [[4, 5], [6, 7], [6, 7]]
    (gradient_BTD,) = torch.autograd.grad(taken_CD, hidden_BTD, torch.tensor([[1.0, 2.0]] * 3))
    assert gradient_BTD.tolist() == [[[0, 0], [0, 0], [1, 2]], [[2, 4], [0, 0], [0, 0]]]


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread adds in one order anyway")
def test_gradient_of_shared_positions_repeats_on_several_threads() -> None:
    """Indexing by [row, column] gives about 100 different gradients here."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(1, 3000, 64, generator=generator, requires_grad=True)
    column_C = torch.cat([torch.arange(2500) + 100, torch.arange(400) // 16])
    column_C = column_C[torch.randperm(len(column_C), generator=generator)]
    grad_CD = torch.randn(len(column_C), 64, generator=generator)
    row_C = torch.zeros_like(column_C)
    gradients = set()
    for _ in range(200):
        taken_CD = take_positions(hidden_BTD, row_C, column_C)
        (gradient_BTD,) = torch.autograd.grad(taken_CD, hidden_BTD, grad_CD)
        gradients.add(gradient_BTD.numpy().tobytes())
    assert len(gradients) == 1


@torch.no_grad()
def test_adapter_off_is_the_base(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path)
    batch = batch_of(*SEQUENCES)
    base_C, _ = policy.token_logprobs(batch, temperature=1.0)  # B = 0
    shake(policy)
    moved_C, _ = policy.token_logprobs(batch, temperature=1.0)
    assert (moved_C - base_C).abs().max() > 0.01
    assert policy.reference_logprobs(batch, 1.0).equal(base_C)
    assert policy.token_logprobs(batch, 1.0)[0].equal(moved_C)  # on again


def test_start_is_seeded_and_b_is_zero(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    first, again, other = (make_policy(path, seed=s).published_tensors() for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    for name, tensor in first.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:  # uniform in +-1/sqrt(d_in): the std is the bound over sqrt 3
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.25)


@pytest.mark.parametrize(
    ("layers", "lm_head", "expected"),
    [
        ("attention", False, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", False, {"gate_proj", "up_proj", "down_proj"}),
        ("mlp", True, {"gate_proj", "up_proj", "down_proj", "lm_head"}),
    ],
)
def test_layers_choose_the_targets(
    tmp_path: Path, layers: str, lm_head: bool, expected: set
) -> None:  # type: ignore[type-arg]
    policy = make_policy(random_llama(tmp_path / "model"), layers=layers, lm_head=lm_head)
    assert {name.rsplit(".", 1)[-1] for name in policy.target_names} == expected
    assert {name.rsplit(".", 1)[-1] for name, _ in lora_layers(policy.model)} == expected


def test_lm_head_adapter_on_tied_embeddings_moves_the_output_only(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"), layers="attention", lm_head=True)
    embedding = policy.model.get_input_embeddings().weight.clone()
    logprobs_C, _ = policy.token_logprobs(batch_of(*SEQUENCES), temperature=1.0)
    logprobs_C.sum().backward()
    assert policy.trainable()["lm_head.lora_B"].grad.abs().sum() > 0
    assert policy.model.get_input_embeddings().weight.equal(embedding)


def test_checkpointed_activations_change_no_gradient(tmp_path: Path) -> None:
    """Layers are computed again in the backward pass, in whichever thread that is: a GPU's own."""
    path = random_llama(tmp_path / "model")
    samples = [TrainSample(p, c, (0.0,) * len(c), 1.0, 0) for p, c in SEQUENCES]
    ((batch,),) = pack_samples(samples, microbatch_tokens=99, share_prompts=True)
    grads, num_calls = [], []
    for flag in (False, True):
        model = ModelSection(name=str(path), device="cpu", dtype="float32")
        policy = open_policy(path, model, LoraSection(), seed=0, checkpoint_activations=flag)
        shake(policy)
        calls: list[int] = []
        policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        with policy.training():
            loss = policy.token_logprobs(batch, temperature=1.0)[0].sum()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        grads.append({n: p.grad for n, p in policy.trainable().items()})
        num_calls.append(len(calls))
    assert num_calls == [1, 2]
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_base_fingerprint_sees_one_changed_bit_and_ignores_the_adapter(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    before = policy.base_fingerprint()
    shake(policy)
    assert policy.base_fingerprint() == before
    weight = next(layer for _, layer in lora_layers(policy.model)).base.weight
    weight.data.view(torch.int32)[0, 0] ^= 1
    assert policy.base_fingerprint() != before


def test_full_mode_keeps_a_reference(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "m"), keep_reference=True, mode="full")
    batch = batch_of(*SEQUENCES)
    base_C = policy.reference_logprobs(batch, 1.0)
    shake(policy)
    assert policy.reference_logprobs(batch, 1.0).equal(base_C)
    assert not policy.token_logprobs(batch, 1.0)[0].equal(base_C)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_loaded_policy_publishes_versions_of_itself(tmp_path: Path, mode: str) -> None:
    path = random_llama(tmp_path / "m")
    (path / "tokenizer.json").write_text("{}")
    policy = Policy.load(str(path), rank=2, device="cpu", dtype="float32", mode=mode)
    adapters = []
    for step in range(3):
        shake(policy, seed=step)
        adapters.append(policy.publish(step))
    assert [adapter.version for adapter in adapters] == [0, 1, 2]
    assert [adapter.path.exists() for adapter in adapters] == [False, True, True]
    assert {adapter.is_full for adapter in adapters} == {mode == "full"}
    assert policy.publish(3, tmp_path / "kept").path.parent == tmp_path / "kept"
    shake(policy, seed=9)
    assert open_adapter(adapters[-1].path, policy).fingerprint == adapters[-1].fingerprint


def test_a_bad_setting_of_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'rnak'; did you mean 'rank'"):
        Policy.load(str(random_llama(tmp_path / "m")), rnak=2)


def test_bad_models_and_devices_get_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.device='cuda:9' is not usable"):
        pick_device("cuda:9")
    path = random_llama(tmp_path / "model")
    (path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a loadable causal language model"):
        make_policy(path)


def test_dtype_is_chosen_by_probe() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("bfloat16", cpu) is torch.bfloat16
    assert pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


def test_rank_scales_by_alpha_over_rank(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"), rank=4, alpha=32.0)
    assert {layer.scaling for _, layer in lora_layers(policy.model)} == {8.0}
    assert LoraSection(rank=1).alpha == 32.0


@pytest.mark.parametrize("is_dropped", [False, True])
def test_a_model_that_ignores_the_layout_keeps_one_completion_a_row(
    is_dropped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not hand it on to its layers, or attends in another way."""
    path = random_llama(tmp_path / "model")
    assert make_policy(path).can_share_prompts

    def ignore(query: torch.Tensor, *others: object) -> torch.Tensor:
        return torch.zeros_like(query)

    def drop(*args: Any, layout: object = None, **kwargs: Any) -> Any:
        return attention._forward(*args, **kwargs)

    if is_dropped:
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, drop)
    else:
        monkeypatch.setattr(block_attention, "attend", ignore)
    policy = make_policy(path)
    assert not policy.can_share_prompts
    assert policy.model.config._attn_implementation == "sdpa"
    ((batch,),) = pack_samples([TrainSample((5,), (6,), (0.0,), 1.0, 0)], share_prompts=True)
    with pytest.raises(ValueError, match="pack with share_prompts=False"):
        policy.token_logprobs(batch, 1.0)


@pytest.mark.parametrize(
    ("name", "settings", "shares"),
    [
        ("Mistral", {"sliding_window": 4}, False),
        ("Mistral", {"sliding_window": None}, True),
        ("Gemma3", {"sliding_window": 4, "layer_types": WINDOWED, "head_dim": 32}, False),
        ("Olmo3", {"sliding_window": 4, "layer_types": WINDOWED}, False),
        ("Qwen2", {"sliding_window": 4, "layer_types": WINDOWED, **USED}, False),
        ("Qwen2", {"sliding_window": 4, "use_sliding_window": False}, True),
    ],
)
@torch.no_grad()
def test_a_sliding_window_keeps_one_completion_a_row_and_is_computed(
    name: str, settings: dict[str, Any], shares: bool, tmp_path: Path
) -> None:
    """The policy's log-probs are those of transformers for sequences beyond the window."""
    path = tmp_path / "model"
    config_class = getattr(transformers, f"{name}TextConfig", None)
    config_class = config_class or getattr(transformers, f"{name}Config")
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    config = config_class(**(size | heads | ids | settings))
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(path)
    policy = make_policy(path)
    assert policy.can_share_prompts is shares
    logprobs_C, _ = policy.token_logprobs(batch_of(*SEQUENCES), temperature=1.0)
    expected = plain_logprobs(AutoModelForCausalLM.from_pretrained(path), 1.0)
    assert logprobs_C.tolist() == pytest.approx(expected, abs=1e-5)
