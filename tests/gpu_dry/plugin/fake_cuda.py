"""A vLLM platform plugin: CUDA as on an H100, on a machine without a GPU. Nothing can be computed
on it; engines are configured, models built and adapters loaded as they would be there."""

from __future__ import annotations

from typing import Any


def platform() -> str:
    """The name of the class's maker, which vLLM resolves and calls."""
    return "fake_cuda.make_platform"


def make_platform() -> Any:
    """An H100 of 80 GiB that no driver is asked about."""
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class FakeCuda(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:  # type: ignore[override]
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 2**30

    return FakeCuda()
