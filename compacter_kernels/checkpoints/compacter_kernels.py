"""The format of this package: what `save_adapter` writes (docs/checkpoints.md).

A folder has the form of `peft`, with Compacter adapters that `load_adapter` can put into a model.
"""

from __future__ import annotations

from compacter_kernels.checkpoints import peft
from compacter_kernels.checkpoints.checkpoint import Checkpoint
from compacter_kernels.checkpoints.files import CONFIG, of_model
from compacter_kernels.checkpoints.source import Source
from compacter_kernels.targets.added import adapters_of


def read(source: Source) -> Checkpoint:
    """Return the checkpoint in an adapter folder or adapted model; ValueError if there is none."""
    if source.model is not None:
        adapters = adapters_of(source.model)
        if adapters is None:
            raise ValueError(
                f"this {type(source.model).__name__} has no Compacter adapters; call compacter_kernels.inject first, "
                "or save_pretrained of a peft model"
            )
        name = source.choose(list(adapters.configs), default=adapters.active or next(iter(adapters.configs)))
        tensors = {key: tensor.detach() for key, tensor in adapters.tensors(source.model, name).items()}
        config, model = adapters.configs[name], of_model(source.model)
    elif source.is_whole_model():
        raise ValueError(
            f"it holds a whole {source.config['model_type']} with adapters in it, whose options no file says. Make "
            "them anew: inject(model, config, name=...) with the same config, model.load_state_dict of these tensors, "
            "then save_adapter(model, folder), which can be converted"
        )
    elif not source.config:
        raise ValueError(f"tensors of our format need their {CONFIG}; give the folder that holds both")
    else:
        return peft.read(source)
    checkpoint = Checkpoint(options=config.to_dict(), model=model)
    peft.sort(checkpoint, tensors)
    return checkpoint
