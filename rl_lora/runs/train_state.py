"""What a learner and its process hold beside the weights, as tensors and JSON: random number
generators and the optimizer's moments."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rl_lora.errors import UserError

_LOG = logging.getLogger(__name__)


# --- random number generators ---------------------------------------------------------------------


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, state) of the global generators of python, numpy, torch and each GPU.

    torch's are uint8 tensors named rng/torch and rng/cuda/N; the others are JSON.
    """
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # a run on the CPU beside a GPU takes no part of it
        for index, cuda_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda/{index}"] = cuda_state
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (libraries draw from it)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore_rng(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Sets what `rng_state` gave; other tensors are not looked at.

    A GPU's state that this machine has no GPU for is left out with a logged warning.
    """
    torch.set_rng_state(tensors["rng/torch"])
    num_devices = torch.cuda.device_count()
    for name, tensor in tensors.items():
        if name.startswith("rng/cuda/"):
            index = int(name.rpartition("/")[2])
            if index < num_devices:
                torch.cuda.set_rng_state(tensor, index)
            else:
                _LOG.warning("no GPU %d here: its random state is left out", index)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = dict(state["numpy"])
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    numpy_state["state"] = {**numpy_state["state"], "key": key}
    np.random.set_state(numpy_state)  # noqa: NPY002


# --- optimizer ------------------------------------------------------------------------------------


def flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, meta) of the optimizer's state: optimizer/PARAMETER/KEY tensors, and JSON.

    Parameters are numbered through the groups in order, as in `Optimizer.state_dict`.
    """
    whole = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, parameter_state in whole["state"].items():
        scalars[str(index)] = {}
        for key, value in parameter_state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars[str(index)][key] = value
    shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    meta = {
        "class": type(optimizer).__name__,
        "groups": whole["param_groups"],
        "scalars": scalars,
        "shapes": shapes,
    }
    return tensors, meta


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> None:
    """Gives the optimizer the state that `flatten_optimizer` took, bit for bit.

    Hyperparameters are set as well. Other tensors are not looked at.

    Raises:
        UserError: the optimizer is of another class or has other parameters.
    """
    shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    if meta["class"] != type(optimizer).__name__ or meta["shapes"] != shapes:
        raise UserError(
            f"the checkpoint's optimizer ({meta['class']}, {len(meta['shapes'])} parameters) does "
            f"not fit this run's ({type(optimizer).__name__}, {len(shapes)} parameters): resume "
            "with the config that the run was started with"
        )
    parameter_states: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in meta["scalars"].items()
    }
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            # load_state_dict keeps tensors it need not cast, and `step` is updated in place.
            parameter_states[int(index)][key] = tensor.clone()
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in meta["groups"]
    ]
    optimizer.load_state_dict({"state": parameter_states, "param_groups": groups})
