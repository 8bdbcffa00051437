"""GPUs to plan for, with the figures of their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from rl_lora.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU.

    Example: Card("H100 SXM 80 GB", memory_gib=79, tflops=989, terabytes_s=3.35, link_gb_s=64,
    peer_gb_s=450)
    """

    name: str
    memory_gib: float  # as CUDA reports it, which is less than the name says
    tflops: float  # bfloat16 products with float32 sums, dense, 10^12 a second
    terabytes_s: float  # memory bandwidth, 10^12 bytes a second
    link_gb_s: float  # PCIe to the host, one way, 10^9 bytes a second
    # To the other GPUs of its node, one way: NVLink, or PCIe. 0: for one GPU only.
    peer_gb_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Its memory."""
        return int(self.memory_gib * 2**30)


# NVIDIA's data sheets of H100 (SXM; its 1,979 TFLOP/s are with sparsity), H200 (SXM), A100 (80 GB
# SXM) and L40S (362.05 without sparsity), and the white paper of the Ada architecture for the RTX
# 4090 (165.2 with float32 sums). PCIe 5.0 x16 has 64 GB/s one way, 4.0 half of that. The sheets
# count NVLink both ways: 900 and 600 GB/s.
CARDS = {
    "h100": Card("H100 SXM 80 GB", 79, 989, 3.35, 64, 450),
    "h200": Card("H200 SXM 141 GB", 139, 989, 4.8, 64, 450),
    "a100": Card("A100 SXM 80 GB", 79, 312, 2.039, 32, 300),
    "l40s": Card("L40S 48 GB", 44, 362, 0.864, 32, 32),
    "4090": Card("RTX 4090 24 GB", 23.5, 165.2, 1.008, 32, 32),
}


def find_card(name: str) -> Card:
    """The card of --gpu. Raises UserError for an unknown name."""
    if name.lower() not in CARDS:
        raise UserError(f"--gpu: {nearest(name.lower(), CARDS)}")
    return CARDS[name.lower()]


def card_of_device(device_name: str) -> Card | None:
    """The card that CUDA names so, e.g. "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    return next((card for key, card in CARDS.items() if key in device_name.lower()), None)
