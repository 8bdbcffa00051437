"""Plans for several GPUs: a rank's memory and time by hand, and the changes that make jobs fit."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rl_lora.cli import main
from rl_lora.commands.plan import print_plan, way_text
from rl_lora.config import RunConfig, load_config, parse_config
from rl_lora.config.sft import SftConfig
from rl_lora.errors import UserError
from rl_lora.models.shapes import build_on_meta, known_config
from rl_lora.planning.cards import CARDS, Card, find_card
from rl_lora.planning.counts import ParameterCounts, parameter_counts
from rl_lora.planning.fit import Change, Job, changed, misfits, what_fits
from rl_lora.planning.links import all_reduce_s, gather_s
from rl_lora.planning.memory import bytes_to_come, memory_plan
from rl_lora.planning.speed import step_time
from tests.helpers.tiny_models import small_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LLAMA_8B, WEIGHTS, RANK_1 = "meta-llama/Llama-3.1-8B", 8_030_261_248, 2_621_440
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
OUTER = 2 * 128256 * 4096  # embedding and output layer
TWO_LAYERS = 2 * LAYER + 2 * 4096 // 32  # the last norm is counted among the 32 layers
H100 = CARDS["h100"].num_bytes


def job(**sections: Any) -> RunConfig:
    model = {"name": LLAMA_8B, "device": "cuda", "dtype": "bfloat16"} | sections.pop("model", {})
    return parse_config({"model": model, **sections})


def shape(name: str = LLAMA_8B) -> Any:
    """The config of a known model."""
    config = known_config(name)
    assert config is not None
    return config


def sizes(config: RunConfig, num_trainable: int, num_ranks: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for part in memory_plan(config, shape(), WEIGHTS, num_trainable, H100, num_ranks):
        found.setdefault(part.part, []).append(part.num_bytes)
    return found


def test_a_rank_has_a_copy_of_the_base_and_its_share_of_the_prompts() -> None:
    config = job(sampling={"num_prompts": 12, "num_samples": 4, "max_tokens": 256})
    one, eight = (memory_plan(config, shape(), WEIGHTS, RANK_1, H100, n) for n in (1, 8))
    assert [part.num_bytes for part in one] == [part.num_bytes for part in eight]
    # 12 prompts on 8 ranks: two each at most, of 4 samples.
    assert "48 sequences x 1280 tokens" in one[-1].note
    assert "8 sequences x 1280 tokens" in eight[-1].note
    (host,) = (part.note for part in eight if part.note.startswith("vLLM's copy"))
    assert "119.66 GiB for the 8 of a node" in host  # 8 x 2 x 8,030,261,248 bytes
    (host,) = (
        part.note
        for part in memory_plan(config, shape(), WEIGHTS, RANK_1, H100, 12)
        if part.note.startswith("vLLM's copy")
    )
    assert "for the 8 of a node" in host  # 12 GPUs are more than one node has


def test_a_sharded_base_is_divided_and_its_adapter_is_not() -> None:
    found = sizes(job(model={"shard": True}), RANK_1, 4)
    assert found["base weights"] == [WEIGHTS * 2 // 4, WEIGHTS * 2]  # learner, engine
    assert found["gathered weights"] == [(OUTER + TWO_LAYERS) * 2]
    assert found["adapter"] == found["gradients"] == [4 * RANK_1]
    assert found["optimizer"] == [8 * RANK_1]
    single = sizes(job(model={"shard": True}), RANK_1, 1)
    assert single["base weights"] == [WEIGHTS * 2] * 2
    assert "gathered weights" not in single


def test_full_fine_tuning_divides_all_that_grows_with_the_weights() -> None:
    full = {"lora": {"mode": "full"}, "algorithm": {"kl": "loss", "kl_weight": 0.1}}
    found = sizes(job(**full), WEIGHTS, 8)
    share = WEIGHTS // 8
    # The shares are float32 and their own masters, which a whole model has besides.
    assert found["base weights"] == [4 * share, 2 * WEIGHTS]
    assert "master weights" not in found
    assert found["reference weights"] == [2 * share]
    assert found["gradients"] == [4 * share]
    assert found["optimizer"] == [8 * share]
    assert found["gathered weights"] == [2 * (OUTER + TWO_LAYERS) * 2]  # with their gradients
    whole = sizes(job(**full, model={"shard": False}), WEIGHTS, 8)
    assert whole["base weights"] == [2 * WEIGHTS, 2 * WEIGHTS]
    assert whole["master weights"] == [4 * WEIGHTS]
    assert whole["optimizer"] == [8 * WEIGHTS]
    # The engine leaves room for what the learner will still take: gradients and optimizer.
    assert bytes_to_come(job(**full), shape(), WEIGHTS, WEIGHTS, 8) == 12 * share


def test_the_torch_sampler_gathers_all_layers() -> None:
    config = job(model={"shard": True}, sampling={"backend": "torch"})
    parts = memory_plan(config, shape(), WEIGHTS, RANK_1, H100, 2)
    found = {part.phases: part.num_bytes for part in parts if part.part == "gathered weights"}
    assert found == {("learning",): (OUTER + TWO_LAYERS) * 2, ("sampling",): 2 * WEIGHTS}


def test_exchanges_take_their_bytes_over_the_slowest_link() -> None:
    card = Card("x", 1, 1, 1, 1, peer_gb_s=100)
    assert gather_s(10**9, 1, card) == 0
    # 7 of 8 GB over 78 GB/s, and 3 doublings of 20 us.
    assert gather_s(8e9, 8, card) == pytest.approx(7 / 78 + 60e-6)
    assert all_reduce_s(8e9, 8, card) == pytest.approx(2 * (7 / 78 + 60e-6))
    # Over 8 GPUs there is a network: 15 of 16 GB over 0.78 x 50 GB/s.
    assert gather_s(16e9, 16, card) == pytest.approx(15 / 39 + 80e-6)
    assert gather_s(16e9, 16, Card("x", 1, 1, 1, 1, peer_gb_s=10)) > 15 / 7.8


def test_a_step_is_divided_but_for_its_longest_completion() -> None:
    sampling = {"num_prompts": 8, "num_samples": 2, "max_tokens": 1000, "max_num_seqs": 1}
    config = parse_config({"sampling": sampling, "optim": {"microbatch_tokens": 1000}})
    counts = ParameterCounts(10**9, 10**9, 25_000_000, 0, 25_000_000, 1)
    card = Card("x", 1, 1000 / 0.66, 1 / 0.9, link_gb_s=1.25, peer_gb_s=1 / 0.78)
    one, four = (step_time(config, small_config(), counts, 2**20, card, n) for n in (1, 4))
    # 2 GB of weights take 2 ms a token, the engine 1.5 ms, the adapter 24 us in each of 2 layers.
    # A sequence has the mean length, except the last of a GPU. Of 4 that end together the longest
    # has mean 400 (log 4 + 0.577), and so has one of 16, cut at 1000. A prompt has 256 x 10^9 x 2
    # products.
    mean, token_s = 400 * (1 - math.exp(-2.5)), 3.548e-3
    by_hand = (15 * mean + 400 * 0.577) * token_s + 8 * 0.512e-3
    assert one.sample_s == pytest.approx(by_hand, rel=1e-4)
    by_hand = (3 * mean + 400 * (math.log(4) + 0.577)) * token_s + 2 * 0.512e-3
    assert four.sample_s == pytest.approx(by_hand, rel=1e-4)
    assert one.longest_s == four.longest_s == pytest.approx(1000 * token_s, rel=1e-4)
    assert four.learn_s == pytest.approx(one.learn_s / 4)
    # 100 MB of gradients: 2 x 3/4 of them at 1 GB/s, and 2 x 2 x 20 us.
    assert (one.all_reduce_bytes, one.all_reduce_s) == (0, 0)
    assert four.all_reduce_bytes == 100_000_000
    assert four.all_reduce_s == pytest.approx(0.15 + 80e-6)
    # The adapter's 100 MB cross the link of 1 GB/s twice.
    assert four.hand_over_s == pytest.approx(0.05 + 0.2)
    assert four.total_s == pytest.approx(four.sample_s + four.learn_s + 0.15008 + 0.25 + 4.0)


@pytest.mark.parametrize(("mode", "num_bytes"), [("lora", 2 * 2), ("full", 2 * 2 + 4)])
def test_a_sharded_model_is_gathered_for_each_microbatch(mode: str, num_bytes: int) -> None:
    sections = {"sampling": {"num_prompts": 8, "num_samples": 2, "max_tokens": 1000}}
    config = parse_config(
        {
            **sections,
            "model": {"shard": True},
            "lora": {"mode": mode},
            "optim": {"microbatch_tokens": 1000},
        }
    )
    counts = ParameterCounts(10**9, 10**9, 1, 0, 1, 1)
    slow = Card("x", 1, 1e6, 1e6, link_gb_s=1, peer_gb_s=1 / 0.78)
    found = step_time(config, small_config(), counts, 2**30, slow, 4)
    # The products take no time. Of 16 x 367.2 + 8 x 256 = 7,923 tokens a rank has 2 microbatches.
    # Each gathers 3/4 of 2 GB twice, and full mode adds up 4 GB of gradients.
    latency = 2 * (num_bytes // 2 if mode == "lora" else 3) * 40e-6
    assert found.learn_s == pytest.approx(2 * 0.75 * num_bytes + latency)
    assert (found.all_reduce_bytes > 0) == (mode == "lora")


def planned(config: RunConfig, num_bytes: int = H100, num_ranks: int = 1) -> Job:
    model = shape(config.model.name)
    counts = parameter_counts(build_on_meta(model), config.lora)
    return Job(config, model, counts.base, counts.trainable, num_bytes, num_ranks)


QWEN_30B = {"name": "Qwen/Qwen3-30B-A3B-Base"}
LONG = {"max_tokens": 2048, "num_prompts": 64}


@pytest.mark.parametrize(
    ("sections", "gigabytes", "num_ranks", "expected"),
    [
        ({"optim": {"microbatch_tokens": 32768}}, 80, 1, r"optim\.microbatch_tokens=\d+"),
        # One sequence of 33 k tokens is the smallest microbatch.
        (
            {"sampling": {"max_tokens": 32768}, "optim": {"microbatch_tokens": 32768}},
            80,
            1,
            r"optim\.checkpoint_activations=true",
        ),
        ({"sampling": {"memory_fraction": 0.9}}, 80, 1, r"sampling\.memory_fraction=none"),
        ({"sampling": {"memory_fraction": 0.2}}, 80, 1, r"sampling\.memory_fraction=none"),
        ({"sampling": {"max_staleness": 1}}, 50, 1, r"optim.checkpoint_activations=true"),
        ({"model": QWEN_30B, "lora": {"rank": 8}}, 80, 8, r"model\.shard=true"),
        (
            {"sampling": {"backend": "torch", "max_num_seqs": 1024, **LONG, "num_samples": 32}},
            40,
            1,
            r"sampling\.max_num_seqs=\d+",
        ),
    ],
)
def test_a_suggested_setting_makes_the_job_fit(
    sections: dict[str, Any], gigabytes: int, num_ranks: int, expected: str
) -> None:
    tried = planned(job(**sections), gigabytes * 2**30, num_ranks)
    assert misfits(tried)
    found = what_fits(tried)
    assert found is not None
    assert (found.num_ranks, found.card) == (num_ranks, None)
    (override,) = found.overrides
    assert re.fullmatch(expected, override)
    assert not misfits(changed(tried, found.overrides))


def test_settings_come_first_then_more_gpus_then_larger_ones() -> None:
    mixture = job(
        model=QWEN_30B, lora={"rank": 8}, sampling={"num_prompts": 64, "max_tokens": 8192}
    )
    # The base twice takes 114 GiB. On 4 GPUs, 57 + 14 GiB of weights leave the engine no cache.
    found = what_fits(planned(mixture))
    assert found == Change(("model.shard=true",), 8)
    assert way_text(planned(mixture), found) == (
        "It fits on 8 GPUs (--gpus 8) with model.shard=true."
    )
    few = job(model=QWEN_30B, lora={"rank": 8}, sampling={"num_prompts": 2})
    found = what_fits(planned(few))
    assert found == Change((), 1, CARDS["h200"])
    assert way_text(planned(few), found) == "It fits on H200 SXM 141 GB (--gpu h200)."
    # An engine with all of its weights does not fit into 24 GB, on any number of them.
    small = planned(mixture, CARDS["4090"].num_bytes)
    found = what_fits(small)
    assert found is not None
    assert found.card is CARDS["h200"]
    full = planned(job(model=QWEN_30B, lora={"mode": "full"}, sampling={"num_prompts": 1}))
    assert what_fits(full) is None
    assert "no number of GPUs up to sampling.num_prompts=1 and no known card" in way_text(
        full, None
    )


def test_a_cache_without_room_for_one_sequence_is_a_misfit() -> None:
    # vLLM refuses to start. Two copies of the base take 30 GiB, the engine 2 and the reserve 4.
    sections = {"sampling": {"max_tokens": 30_000}, "optim": {"checkpoint_activations": True}}
    tight = planned(job(**sections), 38 * 2**30)
    (line,) = misfits(tight)
    assert line == "the KV cache has no room for one sequence of 31,024 tokens (3.79 GiB)"
    assert not misfits(changed(tight, ("sampling.max_tokens=1000",)))


def test_a_supervised_job_gets_the_same_advice() -> None:
    config = SftConfig.model_validate(
        {
            "model": {"name": LLAMA_8B, "device": "cuda", "dtype": "bfloat16"},
            "optim": {"microbatch_tokens": 65536},
        }
    )
    tried = Job(config, shape(), WEIGHTS, RANK_1, H100)
    assert [line.split()[0] for line in misfits(tried)] == ["learning"]
    found = what_fits(tried)
    assert found is not None
    assert found.overrides[0].startswith("optim.microbatch_tokens=")


def printed(config: RunConfig, num_gpus: int, **gpu: Any) -> str:
    console = Console(file=io.StringIO(), width=130)
    print_plan(config, console=console, num_gpus=num_gpus, **gpu)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_plan_of_several_gpus() -> None:
    text = printed(load_config(CONFIGS / "deepmath_qwen3_8b.toml"), 8, card=find_card("h100"))
    assert "Memory plan of each of 8 GPUs" in text
    assert "Time on 8 x H100 SXM 80 GB, estimated" in text
    assert "8 prompts, 128 completions" in text
    assert re.search(r"longest completion +│ \d+\.\d s, on any number of GPUs", text)
    assert re.search(r"all-reduce +│ 0\.\d\d ms a step; 10\.4 MiB of gradients", text)
    assert "GPU hours" in text


def test_the_plan_names_phases_bottleneck_and_cost_and_the_best_splits() -> None:
    config = load_config(CONFIGS / "deepmath_qwen3_8b.toml")
    text = printed(config, 64, card=find_card("h100"), gpu_price=2.5)
    for phase in ("decoding, bound by bandwidth", "decoding, launches", "long tail", "hand-over"):
        assert re.search(rf"{phase} +│ \d+\.\d+ s", text)
    assert re.search(r"bottleneck +│ long tail, \d+\.\d s; estimated", text)
    found = re.search(r"([\d.]+) GPU hours; costs ([\d.]+) at 2\.5 a GPU hour", text)
    assert found is not None
    assert float(found[2]) == pytest.approx(2.5 * float(found[1]), rel=1e-3)
    assert "64 GPUs divided into samplers (resources.samplers) and learners; estimated" in text
    rows = re.findall(r"│ (\d) +│ (\d+) +│ (\d+) +│ +[\d.]+ s", text)
    assert [row[0] for row in rows] == ["0", "1", "2", "4"]
    assert {int(samplers) + int(learners) for _, samplers, learners in rows} == {64}
    assert "costs" not in printed(config, 8, card=find_card("h100"))


def test_a_plan_says_what_its_times_do_not_count() -> None:
    plain = load_config(CONFIGS / "deepmath_qwen3_8b.toml", ["model.device=cuda"])
    assert "not counted" not in printed(plain, 8, card=find_card("h100"))
    turns, rounds = {"name": "retry", "max_turns": 3}, {"max_rounds": 3}
    changed_config = plain.model_copy(
        update={
            "environment": plain.environment.model_copy(update=turns),
            "sampling": plain.sampling.model_copy(update=rounds),
        }
    )
    text = " ".join(printed(changed_config, 8, card=find_card("h100")).split())
    assert text.count("not counted: an environment's turns after the first") == 2  # both tables
    assert "further rounds of dynamic sampling (sampling.max_rounds)" in text
    assert "dequantization" not in text


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dry-run", "--gpu-price", "-1"], "--gpu-price -1: give what a GPU costs for an hour"),
        (["--dry-run", "--gpu-price", "nan"], "--gpu-price nan: give what a GPU costs"),
        (["--gpu-price", "2.5"], "--gpu-price 2.5 is for plans: add --dry-run"),
        (["--dry-run", "--gpu-price", "2.5"], "--gpu-price plan for GPUs, and the job has"),
    ],
)
def test_a_price_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert main(["train", str(CONFIGS / "smoke.toml"), *options]) == 2
    assert line in " ".join(capsys.readouterr().err.split())


def test_gpus_without_a_card_are_planned_for_memory_only() -> None:
    text = printed(job(), 2, gpu_bytes=80 * 2**30)
    assert "a GPU's 80.00 GiB" in text
    assert "Time on" not in text
    assert "--gpu h100" in text
    # A device that is left to the machine is a GPU, and its weights are in bfloat16.
    text = printed(job(model={"device": "auto", "dtype": "auto"}), 2, gpu_bytes=80 * 2**30)
    assert "learner, bfloat16" in text


@pytest.mark.parametrize(
    ("num_gpus", "device", "line"),
    [
        (0, "cuda", "--gpus 0: a job has at least one"),
        (-1, "cuda", "--gpus -1: a job has at least one"),
        (17, "cuda", r"more processes than prompts \(sampling\.num_prompts=16\).* --gpus 16"),
        (2, "cpu", "model.device=cpu: add model.device=cuda"),
    ],
)
def test_impossible_numbers_of_gpus_are_refused(num_gpus: int, device: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        printed(job(model={"device": device}), num_gpus)


RECIPES = ("gsm8k_llama31_8b", "math_llama31_8b", "deepmath_qwen3_8b", "deepmath_qwen3_30b_a3b")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_gpus_that_it_names(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    stated = re.search(r"^# .*For (one|\d+) GPUs? with (\d+) GB", path.read_text(), re.M)
    assert stated is not None
    number = 1 if stated[1] == "one" else int(stated[1])
    assert stated[2] == "80"
    config = load_config(path)
    assert number <= config.sampling.num_prompts
    recipe = planned(config, H100, number)
    assert misfits(recipe) == []
    if name == "deepmath_qwen3_30b_a3b":
        assert number == 8
        half = planned(config, H100, 4)
        assert misfits(half)


def test_a_plan_with_samplers_elsewhere_has_the_learners_gpu_and_the_split_of_the_job() -> None:
    config = load_config(CONFIGS / "deepmath_qwen3_8b.toml", ["resources.samplers=7"])
    text = printed(config, 8, card=find_card("h100"))
    assert "KV cache" not in text
    assert "does not fit" not in text
    rows = re.findall(r"│ (\d) +│ (\d+) +│ (\d+) +│ +([\d.,]+) s", text)
    assert [row[:3] for row in rows] == [(bound, "7", "1") for bound in "0124"]
    # As the best split of as many GPUs, where that is into 7 and 1, or slower.
    plain = load_config(CONFIGS / "deepmath_qwen3_8b.toml")
    best = re.findall(
        r"│ (\d) +│ (\d+) +│ (\d+) +│ +([\d.,]+) s", printed(plain, 8, card=find_card("h100"))
    )
    for own, other in zip(rows, best, strict=True):
        seconds = [float(row[3].replace(",", "")) for row in (own, other)]
        assert seconds[0] == seconds[1] if own[1] == other[1] else seconds[0] > seconds[1]
    with pytest.raises(UserError, match="--gpus 7: a job has at least one and those of its 7"):
        printed(config, 7, card=find_card("h100"))
