"""The GPU check itself: how a stage can end, its figures' arithmetic, and stages on a CPU."""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_stages import learn, libraries, measures, models, parity, release
from gpu_stages.caches import caches, split
from gpu_stages.cuda_tests import counts
from gpu_stages.run import RESULTS, run_stage, run_stages, run_together, table
from gpu_stages.stages import STAGES, CheckFailedError, Context, Stage, chosen
from gpu_stages.turns import turn, wait_until_ready
from safetensors.torch import save
from transformers import AutoModelForCausalLM, LlamaConfig

from rl_lora.batches import pack_samples
from rl_lora.config import LoraSection, OptimSection, RunConfig
from rl_lora.errors import UserError
from rl_lora.models import resolve
from rl_lora.planning.cards import Card
from rl_lora.planning.roofline import learner_token_s, shape_of
from rl_lora.types import Completion, Microbatch, TrainSample
from tests.helpers.tiny_models import make_policy, random_llama

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("compiled", "eager")


def context_at(folder: Path, device: str = "cpu") -> Context:
    return Context(torch.device(device), folder / "out", folder / "work")


def stage(name: str, limit_s: float = 120) -> Stage:
    return Stage(name, 1, f"tests.helpers.fake_stages:{name}", limit_s)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_however_a_stage_ends_it_is_reported_and_the_others_run(tmp_path: Path) -> None:
    stages = [
        stage("fails"),
        stage("fails_a_check"),
        stage("hangs", limit_s=1.5),
        stage("is_killed"),
        stage("exits"),
        stage("exits_after_figures"),
        Stage("absent", 1, "tests.helpers.fake_stages:absent", 120),
        stage("passes"),
    ]
    context = context_at(tmp_path)
    rows = run_stages(stages, context, lambda one: one.limit_s, on_line=lambda text: None)
    found = {row["stage"]: (row["status"], row.get("error")) for row in rows}
    assert found == {
        "fails": ("failed", "ValueError: the last line of it"),
        "fails_a_check": ("failed", "CheckFailedError: KL is over its limit"),
        "hangs": ("hung", found["hangs"][1]),
        "is_killed": ("killed", found["is_killed"][1]),
        "exits": ("failed", "it ended without a result"),
        "exits_after_figures": ("failed", "it ended without a result"),
        "absent": (
            "failed",
            "AttributeError: module 'tests.helpers.fake_stages' has no attribute 'absent'",
        ),
        "passes": ("passed", None),
    }
    assert str(found["hangs"][1]).startswith("still running after 1.5 s")
    assert str(found["is_killed"][1]).startswith("by SIGKILL")
    assert rows[1]["figures"] == {"kl": 0.5}
    assert rows[0]["figures"] == rows[5]["figures"] == {"kept": 1}
    assert rows[-1]["figures"] == {"device": "cpu", "speed": {"tokens_per_s": 1234.5}}
    for row in (rows[0], rows[3], rows[-1]):  # also where the stage did not end by itself
        assert row["versions"]["torch"]
        assert "cores" in row["card"]
    lines = (tmp_path / "out" / RESULTS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert "Traceback" in (tmp_path / "out" / "fails.log").read_text()
    shown = table(rows).splitlines()
    assert shown[-1].split()[:2] == ["passes", "passed"]
    assert "speed.tokens_per_s=1234" in shown[-1]
    assert "KL is over its limit" in shown[1]


def test_a_call_ends_in_its_time_whatever_hangs(tmp_path: Path) -> None:
    stages = [stage("hangs"), stage("passes")]
    rows = run_stages(
        stages, context_at(tmp_path), lambda one: 60, total_s=0.5, on_line=lambda text: None
    )
    assert [(row["status"], row["error"].split(";")[0]) for row in rows] == [
        ("hung", "still running after 0.5 s"),
        ("late", "the 0.5 s were used up before it"),
    ]
    assert len((tmp_path / "out" / RESULTS).read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_side_by_side_turns_come_one_after_the_other(tmp_path: Path) -> None:
    names = ("takes_a_turn", "takes_another_turn", "fails")
    stages = [replace(stage(name), takes_turns="turn" in name) for name in names]
    told: list[str] = []
    rows = run_together(stages, context_at(tmp_path), 240, 300, on_line=told.append)
    assert [row["status"] for row in rows] == ["passed", "passed", "failed"]
    (first, end), (start, _) = sorted(row["figures"]["turn"] for row in rows[:2])
    assert first < end <= start
    assert all(row["figures"]["is_shared"] for row in rows[:2])
    assert "turns begin; not ready: none" in told
    lines = (tmp_path / "out" / RESULTS).read_text().splitlines()
    assert sorted(json.loads(line)["stage"] for line in lines) == sorted(names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_side_by_side_stages_end_with_the_check(tmp_path: Path) -> None:
    """On Ctrl-C or a signal; they would take an hour otherwise."""

    def interrupted(text: str) -> None:
        if text.startswith("turns begin"):
            raise KeyboardInterrupt

    stages = [replace(stage("hangs"), takes_turns=True)]
    with pytest.raises(KeyboardInterrupt):
        run_together(stages, context_at(tmp_path), 5, 3600, on_line=interrupted)
    (line,) = (tmp_path / "out" / RESULTS).read_text().splitlines()
    assert json.loads(line)["status"] == "killed"


def test_side_by_side_a_hanging_stage_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "ready").touch()
    late = wait_until_ready(tmp_path, {"ready", "failed", "hangs"}, {"failed"}, 0)
    assert late == {"hangs"}
    with turn(tmp_path / "hangs"):  # it may still come to its turn
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_stage_started_ends_with_it(tmp_path: Path) -> None:
    row = run_stage(stage("leaves_a_process"), context_at(tmp_path), 120)
    assert row["status"] == "passed"
    try:
        process = os.pidfd_open(row["figures"]["pid"])
    except ProcessLookupError:
        return  # its end was seen already
    ended, _, _ = select.select([process], [], [], 60)
    assert ended == [process]
    os.close(process)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/gpu_check.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_choice_of_stages_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    places = ["--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    result = run_script("caches", "libraries", "release", *places)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["libraries", "release", "caches"]
    assert rows[0]["figures"]["rms_norm_error"] < 1e-6
    assert rows[1]["figures"]["max_difference"] < 1e-5
    failed = run_script("parity-float32", *places, "--limit", "0.2")
    assert failed.returncode == 1
    assert "hung" in failed.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_learners_stage_on_a_cpu(tmp_path: Path) -> None:
    """Compiled and eager; it compiles for minutes."""
    places = ["--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    result = run_script("learn-qwen3-8b", *places)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    learned = row["figures"]
    assert learned["layers"] == 4
    assert learned["eager"]["launches_per_layer"] > learned["compiled"]["launches_per_layer"] > 1
    assert 2 <= learned["graphs"] < 10
    for found in (learned[kind][tokens] for kind in KINDS for tokens in ("256", "1024")):
        # Speeds of a shared machine are in no order that a test could rely on.
        assert found.keys() >= {"tokens_per_s_whole", "roofline_whole", "peak_bytes"}
        assert all(found[key] > 0 for key in ("tokens_per_s", "mfu", "roofline"))
    assert "Self CPU" in (tmp_path / "out" / "learn-qwen3-8b.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing", "--device", "cpu"], "no stage 'nothing'; known: all, caches, call1,"),
        (["all", "--device", "cpu", "--gguf", "absent.gguf"], "--gguf: no file absent.gguf"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = run_script(*arguments, "--out", str(tmp_path))
    assert result.returncode == 2
    assert told in result.stderr


def test_choices_of_stages() -> None:
    assert chosen(["all"]) == list(STAGES)
    assert [s.name for s in chosen(["call3"])] == ["convert", "grpo", "decode-lora"]
    assert [s.name for s in chosen(["grpo", "libraries"])] == ["libraries", "grpo"]
    with pytest.raises(ValueError, match="no stage 'call5'"):
        chosen(["call5"])


@pytest.mark.parametrize(
    ("shape", "num_layers", "num_weights"),
    [  # as the models' own files have them
        ("smollm2-135m", None, 134_515_008),
        ("qwen3-0.6b", None, 596_049_920),
        ("qwen3-8b", None, 8_190_735_360),
        ("qwen3-8b", 8, 8_190_735_360 - 28 * 192_946_432),
    ],
)
def test_the_shapes_are_the_models(
    shape: str, num_layers: int | None, num_weights: int, tmp_path: Path
) -> None:
    config = models.make_config(shape, context_at(tmp_path, "cuda"), num_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == num_weights


def test_the_needed_operations_of_a_microbatch() -> None:
    """Weights of a layer: 2 * 8 * (8 + 4) + 3 * 8 * 16 = 576.

    One sequence of 4 tokens sees 1 + 2 + 3 + 4 keys, 2 of its tokens are scored:
    3 * (4 * 576 * 4 + 12 * 8 * 10) + 4 * 8 * 10 * 2. A second completion of one token in the same
    row sees 3 keys: 3 * (4 * 576 * 5 + 12 * 8 * 13) + 4 * 8 * 10 * 3.
    """
    config = LlamaConfig(
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        vocab_size=10,
    )
    policy: Any = SimpleNamespace(model=SimpleNamespace(config=config), lora=LoraSection())
    samples = [
        TrainSample((1, 5), (7, 2), (0.0, 0.0), 1.0, 0),
        TrainSample((1, 5), (9,), (0.0,), 1.0, 0),
    ]

    def batch(count: int, share_prompts: bool) -> Microbatch:
        ((one,),) = pack_samples(samples[:count], microbatch_tokens=64, share_prompts=share_prompts)
        return one

    for share_prompts in (False, True):
        flops = measures.needed_flops(policy, batch(1, share_prompts))
        assert flops == pytest.approx(31_168, rel=1e-12)
    assert measures.needed_flops(policy, batch(2, True)) == pytest.approx(39_264, rel=1e-12)
    reached = measures.Device(matmul_flops=100e9, bytes_per_s=1e9)
    seconds = measures.bound_s(policy, batch(2, True), reached)
    layers_s, head_s = learner_token_s(
        RunConfig.model_construct(lora=LoraSection(), optim=OptimSection()),
        shape_of(config),
        Card("", 0, tflops=0.125, terabytes_s=1 / 900, link_gb_s=0),
        context=13 / 5,
    )
    assert seconds == pytest.approx(5 * layers_s + 3 * head_s)
    assert seconds > 39_264 / 100e9


def test_the_speed_at_another_depth() -> None:
    assert measures.at_depth(100, 150, 8, 4, 36) == pytest.approx(30)
    assert measures.at_depth(100, 150, 8, 4, 8) == 100
    many = {"tokens_per_s": 100, "bound_tokens_per_s": 200}
    few = {"tokens_per_s": 150, "bound_tokens_per_s": 300}
    found = learn.extrapolated(many, few, 8, 4, 36)
    assert found == pytest.approx({"tokens_per_s_whole": 30, "roofline_whole": 0.5})
    assert learn.extrapolated(few, many, 8, 4, 36) == {
        "tokens_per_s_whole": None,  # eight layers faster than four: noise
        "roofline_whole": None,
    }


def test_a_model_of_its_first_layers(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    ids = torch.arange(5, 9).unsqueeze(0)
    whole = policy.model(input_ids=ids).logits
    with measures.only_first(1, policy):
        assert policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1] is not None
        first = policy.model(input_ids=ids).logits
    assert not torch.allclose(first, whole)
    assert torch.equal(policy.model(input_ids=ids).logits, whole)


def test_microbatches_are_new_and_near_their_size(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    sizes = learn.Sizes((200,), prompt=(4, 8), completion=(4, 12), repetitions=1)
    first, again, other = (
        learn.microbatches(policy, sizes, 200, seed=seed, count=2) for seed in (1, 1, 2)
    )
    assert all(140 <= batch.num_tokens <= 200 for batch in (*first, *other))
    assert torch.equal(first[0].token_ids_BT, again[0].token_ids_BT)
    assert [b.num_tokens for b in first] != [b.num_tokens for b in other]


def test_what_a_rest_must_leave_and_keep(tmp_path: Path) -> None:
    """37 of 40 GB released is enough, 35 is not; a log-prob 0.02 away is another model's."""
    assert release.largest_difference([[-1.0, -2.0], []], [[-1.0, -2.25], []]) == 0.25
    good = {"used_gb_before": 2.0, "used_gb_awake": 42.0, "used_gb_released": 5.0}
    gpu, cpu = context_at(tmp_path, "cuda"), context_at(tmp_path)
    release.check(good | {"max_difference": 0.0}, gpu, 1e-2)
    with pytest.raises(CheckFailedError, match="keeps its memory"):
        release.check(good | {"used_gb_released": 7.0, "max_difference": 0.0}, gpu, 1e-2)
    release.check(good | {"used_gb_released": 7.0, "max_difference": 0.0}, cpu, 1e-2)
    for difference in (0.02, float("nan")):
        with pytest.raises(CheckFailedError, match="other log-probs"):
            release.check(good | {"max_difference": difference}, cpu, 1e-2)


def test_what_of_a_mismatch_rounding_explains() -> None:
    """Eight times the learner's own and a little more, but never more than a run allows."""
    assert parity.allowed_kl({"mismatch/kl": 9.0}, torch.float32) == 1e-4
    for rounding, allowed in ((0.0, 1e-4), (1e-3, 8.1e-3), (1e-2, 2e-2)):
        found = {"mismatch/kl": 9.0, "rounding/kl": rounding}
        assert parity.allowed_kl(found, torch.bfloat16) == pytest.approx(allowed)


def test_the_rounding_of_a_policy_is_its_kl_to_the_same_in_float32(tmp_path: Path) -> None:
    context = context_at(tmp_path)
    folder = models.make_model("smollm2-135m", context)
    narrow, own, exact = (
        models.make_policy(folder, context, dtype, compiles=False)
        for dtype in (torch.bfloat16, torch.float32, torch.float32)
    )
    for policy in (narrow, own):
        models.shake(policy, seed=1)
    prompts = parity.random_prompts(512, 2, 9)
    groups = [
        [Completion((5, 6, 7, 8), "", (-6.0,) * 4, False, 1)],
        [Completion((9, 3), "", (-6.0,) * 2, False, 1)],
    ]
    assert parity.rounding_kl(own, exact, prompts, groups) == 0  # it has got the adapter
    logprobs = [
        torch.cat([one.logprobs_C.double() for _, one in parity.scores(p, prompts, groups)])
        for p in (narrow, own)
    ]
    off = logprobs[1] - logprobs[0]
    assert len(off) == 6
    found = parity.rounding_kl(narrow, exact, prompts, groups)
    assert found == pytest.approx(float((off.exp() - 1 - off).mean()))
    assert 0 < found < 1e-3
    assert parity.rounding_kl(own, exact, prompts, groups, adapter_off=True) == 0


def test_random_models_add_little_to_the_residual_stream() -> None:
    """Of two layers, a half of what the other projections would add."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    models.tame(model)
    for layer in model.model.layers:
        usual = layer.self_attn.q_proj.weight.std()
        for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert float(added.weight.detach().std() / usual) == pytest.approx(0.5, rel=0.1)


def test_attention_over_a_paged_cache_is_that_over_the_rows() -> None:
    """The cache and its table, read back as a kernel reads them."""
    _, k, _ = libraries.heads(torch.device("cpu"), torch.float32)
    cache, block_table = libraries.paged(k)
    rows = [
        cache[blocks.long()].flatten(0, 1)[:length]
        for blocks, length in zip(block_table, libraries.LENGTHS, strict=True)
    ]
    assert torch.equal(torch.cat(rows), k)
    q, k, v = libraries.heads(torch.device("cpu"), torch.float32)
    found = libraries.torch_attention(q, k, v)
    assert libraries.relative_error(found, libraries.plain_attention(q, k, v)) < 1e-6
    wrong = libraries.torch_attention(q, k.flip(0), v)
    assert libraries.relative_error(wrong, libraries.plain_attention(q, k, v)) > 0.1


def test_counts_of_a_pytest_report() -> None:
    report = (
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase><testcase name='d'><error/></testcase>"
        "</testsuite></testsuites>"
    )
    assert counts(report) == {"passed": 1, "failed": ["b", "d"], "skipped": 1}


def test_compile_caches_in_parts(tmp_path: Path) -> None:
    whole, out = tmp_path / "x.tar.xz", tmp_path / "out"
    out.mkdir()
    (out / "x.tar.xz.07").touch()  # of an earlier, larger one
    whole.write_bytes(bytes(range(25)))
    parts = split(whole, out, 10)
    assert [(p.name, p.stat().st_size) for p in parts] == [
        ("x.tar.xz.00", 10),
        ("x.tar.xz.01", 10),
        ("x.tar.xz.02", 5),
    ]
    assert b"".join(p.read_bytes() for p in sorted(out.iterdir())) == whole.read_bytes()

    context = context_at(tmp_path, "cuda")
    with pytest.raises(CheckFailedError, match="nothing was compiled"):
        caches(context)
    (context.work / "caches" / "triton").mkdir(parents=True)
    (context.work / "caches" / "triton" / "kernel").write_bytes(b"code")
    assert caches(context)["parts"] == 1
    command = "cat out/caches.tar.xz.* | tar xJ -C back"
    (tmp_path / "back").mkdir()
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "back" / "caches" / "triton" / "kernel").read_bytes() == b"code"


def test_the_embedded_model_from_a_file_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text('{"model_type": "llama"}')
        (target / "tokenizer.json").write_text("{}")
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve, "_convert_gguf", convert)
    file = tmp_path / "embedded.gguf"
    weights = save({"weight": torch.ones(2)})
    file.write_bytes(weights)
    with pytest.raises(UserError, match=r"embedded\.gguf has sha256"):
        resolve.convert_embedded(file)
    monkeypatch.setattr(resolve, "_GGUF_SHA256", hashlib.sha256(weights).hexdigest())
    folder = resolve.convert_embedded(file)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert resolve.is_at_hand(resolve.EMBEDDED)
