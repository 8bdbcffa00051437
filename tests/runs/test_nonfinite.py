"""When steps whose gradient is not finite end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_lora.config import OptimSection
from rl_lora.runs.nonfinite import NonfiniteSteps

FINITE, TIED, NAN = (
    {"learn/updates": updates, "learn/nonfinite_updates": nonfinite}
    for updates, nonfinite in ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0))
)


@pytest.mark.parametrize(
    ("steps", "is_end"),
    [
        ([NAN, NAN], True),
        ([NAN, FINITE, NAN], False),
        ([NAN, TIED, TIED, NAN], True),  # nothing has been learned in between
        ([NAN, NAN, TIED], False),  # at its second step
        ([FINITE, NAN], False),
        ([NAN], False),
    ],
)
def test_so_many_without_a_finite_one_between_them_end_the_run(
    tmp_path: Path, steps: list[dict[str, float]], is_end: bool
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    steps_so_far = NonfiniteSteps(tmp_path, OptimSection(max_nonfinite_steps=2, lr=1e-4))
    if is_end:
        with pytest.raises(FloatingPointError, match=r"gradient of 2 steps .* lower optim\.lr"):
            steps_so_far.check(steps[-1])
    else:
        steps_so_far.check(steps[-1])
