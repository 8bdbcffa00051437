"""What a quantized base changes: log-probs, bytes, and the learner's speed, on this CPU.

    python scripts/benchmarks/quantized.py     # minutes, with rl-lora[quant]
    python scripts/benchmarks/quantized.py --model tiny-noisy --rounds 1

Log-probs are of the text of docs/, without adapter. Speeds are processor seconds of one thread,
each kind in turn, and their ratio to the unquantized base is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from rl_lora.batches import whole_sequence  # noqa: E402
from rl_lora.errors import UserError  # noqa: E402
from rl_lora.nn.quantized import QuantizedWeight  # noqa: E402
from rl_lora.policy import Policy  # noqa: E402

KINDS = (None, "int8", "nf4")
NUM_SEQUENCES, LENGTH = 4, 256
TEXTS = ("docs/quickstart.md", "docs/evaluation.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        policies = {
            kind: Policy.load(options.model, device="cpu", dtype=options.dtype, quantize=kind)
            for kind in KINDS
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sequences = _sequences(policies[None])
    logprobs = {kind: _logprobs(policy, sequences) for kind, policy in policies.items()}
    speeds: dict[str | None, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind, policy in policies.items():
            speed = _tokens_a_second(policy, sequences[0])
            speeds[kind] += [speed] if number else []  # the first one warms up
    title = f"{options.model}, {options.dtype}, {len(logprobs[None]):,} tokens"
    table = Table("base", "mean |difference|", "mean", "largest", "weights", "learner", title=title)
    for kind, policy in policies.items():
        difference = logprobs[kind] - logprobs[None]
        ratio = statistics.median(b / a for a, b in zip(speeds[None], speeds[kind], strict=True))
        table.add_row(
            kind or "unquantized",
            f"{difference.abs().mean():.3f}",
            f"{difference.mean():+.3f}",
            f"{difference.abs().max():.2f}",
            f"{base_bytes(policy) / 2**20:,.1f} MiB",
            f"{ratio:.2f}",
        )
    Console().print(table)
    return 0


def _sequences(policy: Policy) -> list[tuple[int, ...]]:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = policy.tokenizer(text)["input_ids"]
    return [tuple(ids[n * LENGTH : (n + 1) * LENGTH]) for n in range(NUM_SEQUENCES)]


def _logprobs(policy: Policy, sequences: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Of all tokens, nats, by the base."""
    return torch.cat([policy.reference_logprobs(whole_sequence(ids), 1.0) for ids in sequences])


def _tokens_a_second(policy: Policy, ids: tuple[int, ...]) -> float:
    """Of a forward and a backward pass, by the processor's seconds."""
    start = time.process_time()
    logprobs, _ = policy.token_logprobs(whole_sequence(ids), 1.0)
    logprobs.sum().backward()
    return len(ids) / (time.process_time() - start)


def base_bytes(policy: Policy) -> int:
    """Of all frozen tensors."""
    frozen = (one for one in policy.model.parameters() if not one.requires_grad)
    return sum(
        one.stored_bytes if isinstance(one, QuantizedWeight) else one.nbytes for one in frozen
    )


if __name__ == "__main__":
    sys.exit(main())
