"""Compacter in a LightningModule, whose checkpoints hold the adapter alone."""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import peft
import torch
from small_task import base_model, examples, loss_of
from torch.utils.data import DataLoader

import compacter_kernels.peft as ckp


class Adapted(lightning.LightningModule):
    """A model with adapters; only they train and only they are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # A checkpoint does not hold the base.
        self.model = peft.get_peft_model(base_model(), ckp.CompacterConfig(task_type="CAUSAL_LM", reduction_factor=4))

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What trains."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if key in trained}


def main(out: str, steps: int) -> dict[str, float]:
    """Train, save a checkpoint and load it into a new module."""
    module = Adapted()
    before = loss_of(module.model)
    module.train()
    trainer = lightning.Trainer(
        max_steps=steps, default_root_dir=out, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(examples(), batch_size=8, shuffle=True))
    trainer.save_checkpoint(f"{out}/adapter.ckpt")
    loaded = Adapted.load_from_checkpoint(f"{out}/adapter.ckpt", weights_only=True)
    return {"before": before, "after": loss_of(module.model), "loaded": loss_of(loaded.model)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out-lightning", help="a new folder")
    parser.add_argument("--steps", type=int, default=40)
    print(main(**vars(parser.parse_args())))
