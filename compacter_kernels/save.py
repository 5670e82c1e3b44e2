"""`save_adapter` writes the trained part of a model into a folder of two files."""

from __future__ import annotations

from pathlib import Path

from torch import distributed as dist, nn

from compacter_kernels.checkpoints.bank import save_one
from compacter_kernels.checkpoints.files import FORMAT, TENSORS, of_model, require_safetensors, write_folder
from compacter_kernels.inject.injection import injection_of
from compacter_kernels.inject.keys import name_in_file, named_tensors
from compacter_kernels.inject.offload import onloaded
from compacter_kernels.nn.bank import AdapterBank
from compacter_kernels.nn.partitioned import gathered
from compacter_kernels.targets.wrappers import check_gathered, unwrapped


def save_adapter(model: nn.Module, folder: str | Path, *, name: str | None = None) -> None:
    """Write the adapters of that name, by default the active ones, into a folder.

    The files are `adapter_model.safetensors` and `adapter_config.json`. The tensors keep their
    dtypes, shared weights are written once, and trained layer norms and heads are included.
    `peft.PeftModel.from_pretrained` reads the folder too, after an import of
    compacter_kernels.peft. docs/checkpoints.md gives the names of the tensors. Other files in the
    folder stay.

    In a distributed run call this on all ranks. They gather sharded parameters (those of FSDP1
    within its `summon_full_params`), and rank 0 writes.

    model may also be an `AdapterBank`, of which one adapter is written into a folder that
    `load_adapter` reads into a bank again.

    Raises:
        KeyError: the bank has no adapter of that name.
        ValueError: the model has no adapters of that name; their weights are not here (sharded, on
            "meta"); modules with adapters or trained copies were exchanged since `inject`.
        OSError, ImportError: the folder cannot be written; safetensors is not installed. Files that
            were in the folder are unchanged.
    """
    require_safetensors()
    if isinstance(model, AdapterBank):
        if name is None:
            raise ValueError(f"name= must say which adapter of the bank, of {', '.join(model.names)}")
        save_one(model, folder, name)
        return
    check_gathered(model)
    model = unwrapped(model)
    injection = injection_of(model)
    name = injection.active if name is None else injection.require(name)
    if name is None:
        raise ValueError(f"no adapters are active; give name=, of {', '.join(injection.configs)}")
    exchanged = injection.exchanged(model, name)
    if exchanged:
        raise ValueError(
            f"modules that had adapters or trained copies of {name!r} were exchanged for others since: "
            f"{', '.join(exchanged[:4])}{', ...' if len(exchanged) > 4 else ''}. Put back what was there; or exchange "
            "modules first, then inject or load_adapter"
        )
    parts = list(injection.parts(model, name))
    with onloaded([module for _, part in parts for module in part.modules()]):
        named = named_tensors(model, parts)
        with gathered(named.values()):
            # A sharded tensor of FSDP2 has the method full_tensor.
            tensors = {key: getattr(t.detach(), "full_tensor", t.detach)() for key, t in named.items()}
            if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
                for key, tensor in tensors.items():
                    if tensor.is_meta or not tensor.numel():
                        raise ValueError(
                            f"{key} holds no values here: it is on meta, or sharded otherwise than by FSDP or ZeRO"
                        )
                config = {**FORMAT, **of_model(model), **injection.configs[name].to_dict()}
                of_file = {name_in_file(model, key): tensor for key, tensor in tensors.items()}
                write_folder(Path(folder), {TENSORS: of_file}, config)
