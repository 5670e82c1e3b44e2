"""Compacter under Hugging Face's Trainer: train, resume from a checkpoint, save and load again."""

from __future__ import annotations

import argparse

import peft
from small_task import base_model, examples, loss_of
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import compacter_kernels.peft as ckp


def main(out: str, steps: int) -> dict[str, float]:
    """Train for some steps, go on from the last checkpoint for as many, and load the result."""
    model = peft.get_peft_model(base_model(), ckp.CompacterConfig(task_type="CAUSAL_LM", reduction_factor=4))
    model.print_trainable_parameters()
    before = loss_of(model)
    for goal in (steps, 2 * steps):
        arguments = TrainingArguments(
            out, max_steps=goal, save_steps=steps, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[]
        )
        trainer = Trainer(model, arguments, train_dataset=examples())
        trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    model.save_pretrained(out)
    loaded = peft.PeftModel.from_pretrained(base_model(), out)
    return {"before": before, "after": loss_of(model), "loaded": loss_of(loaded)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out-trainer", help="a new folder")
    parser.add_argument("--steps", type=int, default=20)
    print(main(**vars(parser.parse_args())))
