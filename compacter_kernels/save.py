"""`save_adapter`: the trained part of a model into a folder of two files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, distributed as dist, nn

from compacter_kernels.checkpoints.files import TENSORS, require_safetensors, write_folder
from compacter_kernels.checkpoints.format import describe
from compacter_kernels.inject.control import known
from compacter_kernels.inject.exchanged import exchanged_modules
from compacter_kernels.inject.injection import injection
from compacter_kernels.inject.keys import named_tensors
from compacter_kernels.inject.offload import in_place
from compacter_kernels.nn.partitioned import gathered
from compacter_kernels.targets.wrappers import check_gathered, unwrapped


def save_adapter(model: nn.Module, folder: str | Path, *, name: str | None = None) -> None:
    """Write the adapters of that name, by default the active ones: `adapter_model.safetensors`, `adapter_config.json`.

    Shared weights once, trained layer norms and heads included, in the dtypes that they have; docs/checkpoints.md says
    under which names. A folder that exists keeps its other files. In a distributed run call it on all ranks: sharded
    parameters are gathered there (those of FSDP1 by its `summon_full_params`), and rank 0 writes.

    Raises:
        ValueError: a model without adapters, or without these, or whose weights are elsewhere (sharded, on "meta");
            one of which modules with adapters or trained copies were exchanged since.
        OSError, ImportError: the folder cannot be written, safetensors is not installed. What was there is unchanged.
    """
    require_safetensors()
    check_gathered(model)
    model = unwrapped(model)
    here = injection(model)
    name = here.active if name is None else known(model, name)
    if name is None:
        raise ValueError(f"no adapters are active; give name=, of {', '.join(here.configs)}")
    gone = list(exchanged_modules(model, here.placed, name))
    if gone:
        raise ValueError(
            f"modules that had adapters or trained copies of {name!r} were exchanged for others since: "
            f"{', '.join(gone[:4])}{', ...' if len(gone) > 4 else ''}. Put back what was there; or exchange modules "
            "first, then inject or load_adapter"
        )
    parts = list(here.parts(model, name))
    with in_place([module for _, part in parts for module in part.modules()]):
        named = named_tensors(model, parts)
        with gathered(named.values()):
            tensors = {key: _gathered(tensor) for key, tensor in named.items()}
            if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
                _check_values(tensors)
                write_folder(Path(folder), {TENSORS: tensors}, {**describe(model), **here.configs[name].to_dict()})


def _gathered(tensor: Tensor) -> Tensor:
    """A tensor of FSDP2 with all its values; any other as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel():
            raise ValueError(f"{key} holds no values here: it is on meta, or sharded otherwise than by FSDP or ZeRO")
