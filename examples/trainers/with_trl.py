"""Compacter under TRL's SFTTrainer, which takes a config of peft as it is."""

from __future__ import annotations

import argparse

import peft
import torch
from datasets import Dataset
from small_task import LENGTH, TOKENIZER, base_model, lines, loss_of
from trl import SFTConfig, SFTTrainer

import compacter_kernels.peft as ckp


def main(out: str, steps: int) -> dict[str, float]:
    """Train, save and load the result."""
    arguments = SFTConfig(
        out,
        max_steps=steps,
        max_length=LENGTH,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        bf16=torch.cuda.is_available(),
        report_to=[],
    )
    trainer = SFTTrainer(
        base_model(),
        arguments,
        train_dataset=Dataset.from_dict({"text": lines()}),
        processing_class=TOKENIZER,
        peft_config=ckp.CompacterConfig(task_type="CAUSAL_LM", reduction_factor=4),
    )
    before = loss_of(trainer.model)
    trainer.train()
    trainer.save_model(out)
    loaded = peft.PeftModel.from_pretrained(base_model(), out)
    return {"before": before, "after": loss_of(trainer.model), "loaded": loss_of(loaded)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out-trl", help="a new folder")
    parser.add_argument("--steps", type=int, default=40)
    print(main(**vars(parser.parse_args())))
