"""Choose the devices and the dtype of the weights: check `Llama.build`'s arguments before anything is read.

What this module does not do: it reads no checkpoint and moves no weight.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import check_int

Device = str | int | torch.device
DeviceMap = Device | Mapping[str, Device]
MaxMemory = Mapping[int | str, int | str]

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_DTYPE_EXAMPLES = "'float16', 'bfloat16', 'float32', their torch.dtype, or 'auto' for the checkpoint's own"


@dataclass(frozen=True)
class Placement:
    """Placement of the weights, in transformers' and accelerate's terms.

    Args:
        dtype: the weights' dtype; `"auto"` is the checkpoint's own.
        device_map: a device, `"auto"` and its kin, or a mapping from modules to devices; None for the CPU.
        max_memory: what `"auto"` may use of each device.
        offload_folder: for modules on `"disk"`; a temporary folder if None.
    """

    dtype: torch.dtype | Literal["auto"]
    device_map: DeviceMap | None = None
    max_memory: MaxMemory | None = None
    offload_folder: str | Path | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that are not None, as keywords of transformers' `from_pretrained`."""
        return {name: value for name, value in vars(self).items() if value is not None}


def choose_placement(
    dtype: torch.dtype | str | None,
    device_map: DeviceMap | None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    model_parallel_size: int | None = None,
) -> Placement:
    """Complete `Llama.build`'s arguments: by default the first GPU, or `model_parallel_size` of them, else the CPU.

    Raises:
        ValueError: a device that this machine lacks, or a dtype that weights cannot have.
        TypeError: a device map of another type.
    """
    checked = _check_dtype(dtype)
    if model_parallel_size is not None:
        model_parallel_size = check_int("model_parallel_size", model_parallel_size, least=1)
    check_device_map(device_map)
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise TypeError(f'max_memory must map devices to bytes, got {max_memory!r}: give {{0: "10GiB", "cpu": ...}}')
    if offload_folder is not None and not isinstance(offload_folder, (str, os.PathLike)):
        raise TypeError(f"offload_folder must be a path, got {offload_folder!r}: leave it out for a temporary folder")
    gpus = torch.cuda.device_count()
    if device_map is None and gpus:
        several = min(model_parallel_size or 1, gpus) > 1
        rank = int(os.environ.get("LOCAL_RANK", 0))  # launchers start one process per GPU
        device_map = "auto" if several else f"cuda:{rank % gpus}"
        if several and max_memory is None:
            used = range(min(model_parallel_size or 1, gpus))
            max_memory = {index: torch.cuda.mem_get_info(index)[0] for index in used}
    if isinstance(device_map, str) and device_map == "disk":
        device_map = {"": "disk"}
    if checked is None:
        checked = torch.float16 if gpus and _names_a_gpu(device_map) else torch.float32
    return Placement(checked, device_map, max_memory, offload_folder)


def _check_dtype(dtype: Any) -> torch.dtype | Literal["auto"] | None:
    """Read a floating-point dtype, or its name."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return dtype  # type: ignore[return-value]
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype!r}: give {_DTYPE_EXAMPLES}")
    return found


def check_device_map(device_map: Any) -> None:
    """Refuse a device map with a device that this machine lacks."""
    if device_map is None:
        return
    if isinstance(device_map, Mapping):
        for module, device in device_map.items():
            check_device(device, f"device_map[{module!r}]")
    elif device_map not in AUTOMATIC:
        check_device(device_map, "device_map")


def check_device(device: Any, name: str = "device") -> str | int:
    """Read a device of this machine; return it in accelerate's spelling: a string, or a GPU's number.

    Raises:
        ValueError: there is no such device here; the message lists those that exist.
        TypeError: neither a name, a number nor a torch.device.
    """
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise TypeError(f"{name} is {_spellings()}, and {device!r} is none: give one of these")
    if device == "disk":
        return "disk"
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name} is {_spellings()}, and {device!r} is none: give one of these") from None
    count = _count(found.type)
    if count == 0 or (found.index or 0) >= count:
        here = "none" if count == 0 else f"{count}, counted from 0"
        raise ValueError(
            f"{name} must name a device of this machine, and {device!r} asks for a {found.type} device where torch "
            f"finds {here}: take 'cpu' or 'auto'"
        )
    return device if isinstance(device, int) else str(found)


def _spellings() -> str:
    return f"{', '.join(map(repr, AUTOMATIC))}, 'cpu', 'disk' or a device such as 'cuda:0'"


def _count(kind: str) -> int:
    """Count the devices of a kind that torch can use here."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and hasattr(module, "device_count") else 0


def _names_a_gpu(device_map: DeviceMap | None) -> bool:
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return any(str(device) not in ("cpu", "disk", "None") for device in devices)
