"""One seed, one result on a CPU: sums in one order, MKL with a fixed number of threads."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lora.batches import pack_samples
from rl_lora.learner import Learner
from rl_lora.models.load import _align
from rl_lora.nn.cpu_workers import map_on_cores
from rl_lora.nn.deterministic import deterministic, fix_num_threads
from tests.helpers.tiny_models import make_policy, random_llama
from tests.test_learner import samples_of

OPTIONS: Any = torch.utils.deterministic
THREADS = 4  # more than there may be cores: the order in which they come varies all the more

MKL_PROGRAM = """
import sys
from pathlib import Path
import torch
from tests.helpers.tiny_models import make_policy

policy = make_policy(Path(sys.argv[1]))
with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
    torch.ones(64, 64) @ torch.ones(64, 64)
"""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def gradient_of_indexing() -> bytes:
    """Of rows that are read several times, in all threads' parts."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 64, generator=generator, requires_grad=True)
    index_C = torch.randint(500, (3000,), generator=generator)
    grad_CD = torch.randn(3000, 64, generator=generator)
    (gradient_TD,) = torch.autograd.grad(x_TD[index_C], x_TD, grad_CD)
    return gradient_TD.numpy().tobytes()


@pytest.mark.usefixtures("threads")
def test_a_gradient_of_indexing_is_that_of_one_thread() -> None:
    with deterministic():
        found = {gradient_of_indexing() for _ in range(20)}
    torch.set_num_threads(1)
    assert found == {gradient_of_indexing()}


def test_the_settings_are_given_back() -> None:
    def settings() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            OPTIONS.fill_uninitialized_memory,
        )

    before = settings()
    inside = []
    with contextlib.suppress(ZeroDivisionError), deterministic():
        inside.append(settings())
        raise ZeroDivisionError
    assert inside == [(True, True, False)]
    assert settings() == before == (False, False, True)
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic():  # a user's stricter setting stays
            assert settings() == (True, False, False)
        assert settings() == (True, False, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens", [8, 999])
def test_every_pass_of_the_learner_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """In one thread and in several, forward and backward."""
    policy = make_policy(random_llama(tmp_path / "model"))
    (microbatches,) = pack_samples(samples_of(policy), microbatch_tokens=tokens)
    learner = Learner(policy)
    found: list[bool] = []
    compute: Callable[..., tuple[Tensor, Tensor]] = policy.token_logprobs

    def noting(*arguments: object, **keywords: object) -> tuple[Tensor, Tensor]:
        logprobs_C, entropy_C = compute(*arguments, **keywords)
        found.append(torch.are_deterministic_algorithms_enabled())
        logprobs_C.register_hook(
            lambda _: found.append(torch.are_deterministic_algorithms_enabled())
        )
        return logprobs_C, entropy_C

    monkeypatch.setattr(policy, "token_logprobs", noting)
    learner.update([microbatches])
    learner.fit(microbatches)
    assert found == [True] * 4 * len(microbatches)


def test_each_of_the_learners_threads_computes_the_same_bytes() -> None:
    """Whichever takes a microbatch, and whatever the threads were before."""
    a_NN, b_NN = torch.randn(300, 300), torch.randn(300, 300)

    def product(_: int) -> tuple[int, bytes]:
        return torch.get_num_threads(), (a_NN @ b_NN).softmax(-1).numpy().tobytes()

    found = {one for _ in range(5) for one in map_on_cores(product, range(8))}
    assert len(found) == 1


def test_weights_are_aligned(tmp_path: Path) -> None:
    """MKL rounds by where its operands start; files and heaps put weights anywhere."""
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.arange(17.0)[1:].view(4, 4)
    assert layer.weight.data_ptr() % 64
    _align(layer)  # type: ignore[arg-type]
    assert layer.weight.data_ptr() % 64 == 0
    assert layer.weight.flatten().tolist() == list(range(1, 17))
    policy = make_policy(random_llama(tmp_path / "model"))
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    starts = [*frozen, *policy.model.buffers(), policy.optimized.tensors["lora_A"]]
    assert {tensor.data_ptr() % 64 for tensor in starts} == {0}


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch has no MKL")
def test_mkl_does_not_choose_its_number_of_threads(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    output = subprocess.run(
        [sys.executable, "-c", MKL_PROGRAM, str(random_llama(tmp_path / "model"))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.findall(r"SGEMM\(.*Dyn:(\d).*NThr:(\d)", output) == [("0", "2")]


@pytest.mark.usefixtures("threads")
def test_the_host_of_a_gpu_computes_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
    fix_num_threads(torch.device("cuda"))
    assert torch.get_num_threads() == THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    fix_num_threads(torch.device("cpu"))
    assert torch.get_num_threads() == THREADS
    fix_num_threads(torch.device("cuda"))
    assert torch.get_num_threads() == 1
