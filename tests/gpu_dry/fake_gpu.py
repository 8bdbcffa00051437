"""PyTorch's compiler for an H200 on a machine without a GPU: all but running the kernels.

Tensors are fake (`FakeTensorMode`): they have a shape, a dtype and a device, but no data. Inductor
makes its code for them, and Triton and ptxas make machine code of that, as on the GPU. Needs the
stubs of `make gpu-dry`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.backends
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import fuse_attention
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import fake_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

# What the compiler asks about a device.
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    total_memory=141 * 10**9,
    L2_cache_size=60 * 2**20,
    gcnArchName="",
)
# Of generated code: a kernel of Triton's or (on the host) C++, a library's product, an operator.
CALL = re.compile(r"^ +(?:\w+ = )?(triton_\w+\.run|cpp_\w+|extern_kernels\.\w+|torch\.ops[\w.]+)\(")


@dataclass(frozen=True)
class Graph:
    """A graph that Inductor compiled.

    Example: Graph(is_backward=False, is_inference=True, calls=("triton_poi_fused_add_0.run",),
    num_bytes=1024)
    """

    is_backward: bool
    is_inference: bool
    calls: tuple[str, ...]  # what the generated code calls, in its order
    num_bytes: int  # that these read and write, at the sizes that the graph was compiled for


@dataclass
class Compiled:
    """What was compiled so far."""

    graphs: list[Graph] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)  # Triton's, by name
    failed: dict[str, str] = field(default_factory=dict)  # errors by the kernel's name


@contextmanager
def fake_gpu() -> Iterator[Compiled]:
    """Within it tensors are fake, and what is compiled for "cuda" is compiled for an H200."""
    compiled = Compiled()
    with ExitStack() as stack:
        for patch in (*_device(), *_without_loading(), *_recorded(compiled)):
            stack.enter_context(patch)
        stack.enter_context(
            fake_tensor.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        )
        yield compiled


class _Driver:
    """Triton's, for a device that is there."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)

    def get_current_device(self) -> int:
        return 0


def _device() -> Iterator[AbstractContextManager[Any]]:
    """Patches that answer for the driver."""
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "_get_device_properties": lambda _: H200,
        # Dynamo puts the generator's state back after tracing.
        "get_rng_state": lambda *_: torch.empty(0),
        "set_rng_state": lambda *_: None,
    }
    for name, answer in answers.items():  # some exist only once CUDA is initialised: create
        yield mock.patch.object(torch.cuda, name, answer, create=True)
    nvidia = replace(triton.backends.backends["nvidia"], driver=_Driver)
    yield mock.patch.dict(triton.backends.backends, nvidia=nvidia)


class _OnHost(TorchDispatchMode):
    """Tensors for a device are made on the CPU."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        host = torch.device("cpu")
        args, kwargs = tree_map_only(torch.device, lambda _: host, (args, kwargs or {}))
        return function(*args, **kwargs)


def _without_loading() -> Iterator[AbstractContextManager[Any]]:
    """Patches of what would load kernels into the device, or tensors."""
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_host(folder: UniformValueConstantFolder, node: torch.fx.Node) -> Any:
        with _OnHost():
            return deduce(folder, node)

    yield mock.patch.object(CachingAutotuner, "_make_launchers")
    # Other block sizes by the registers that a loaded kernel takes.
    yield mock.patch.object(CachingAutotuner, "_dynamic_scale_rblock")
    # A tensor for each device, so that CUDA is initialised.
    yield mock.patch.object(fake_tensor, "init_gpu_context")
    # Tensors with one number throughout are found by computing that number.
    yield mock.patch.object(UniformValueConstantFolder, "_deduce_value", deduce_on_host)
    # Patterns of attention written as products, made of numbers on the device; ours is an operator.
    yield mock.patch.object(fuse_attention, "_sfdp_init")


def _recorded(compiled: Compiled) -> Iterator[AbstractContextManager[Any]]:
    """Patches that record what is compiled, and continue after a kernel that is not."""
    precompile, to_module = CachingAutotuner._precompile_worker, GraphLowering.compile_to_module
    compile_whole, compile_inner = compile_fx.compile_fx, compile_fx.compile_fx_inner

    def precompile_recorded(kernel: CachingAutotuner) -> None:
        name = kernel.inductor_meta["kernel_name"]
        compiled.kernels.append(name)
        try:
            precompile(kernel)
            least = min(result.kernel.metadata.shared for result in kernel.compile_results)
            if least > H200.shared_memory_per_block_optin:
                raise OutOfResources(least, H200.shared_memory_per_block_optin, "shared memory")
        except Exception as error:  # noqa: BLE001 (reported, as are those of further kernels)
            compiled.failed[name] = f"{type(error).__name__}: {error}"

    def to_module_recorded(graph: GraphLowering) -> Any:
        module = to_module(graph)
        lines = Path(graph.cache_path).read_text(encoding="utf-8").splitlines()
        calls = tuple(found[1] for line in lines if (found := CALL.match(line)))
        num_bytes = sum(int(node.get_read_write_buffers_sizes()) for node in graph.scheduler.nodes)
        compiled.graphs.append(Graph(graph.is_backward, graph.is_inference, calls, num_bytes))
        return module

    def compile_inner_only(
        graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any
    ) -> Any:
        kept = copy.deepcopy(graph)  # Inductor changes it
        compile_inner(graph, inputs, **options)

        def run(inputs: list[Any]) -> Any:  # without the kernels, on fake tensors
            taken = list(inputs)
            inputs.clear()
            return torch.fx.Interpreter(kept).run(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]  # it empties the list of its inputs
        return run

    def compile_recorded(graph: Any, inputs: Any, **options: Any) -> Any:
        return compile_whole(graph, inputs, inner_compile=compile_inner_only, **options)

    yield mock.patch.object(CachingAutotuner, "_precompile_worker", precompile_recorded)
    yield mock.patch.object(GraphLowering, "compile_to_module", to_module_recorded)
    yield mock.patch.object(compile_fx, "compile_fx", compile_recorded)
    # In this process, where the patches are; no graph of an earlier run; kernels that tell their
    # shared memory.
    yield inductor_config.patch(
        compile_threads=1, fx_graph_cache=False, use_static_cuda_launcher=False
    )
