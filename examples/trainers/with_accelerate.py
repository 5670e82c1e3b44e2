"""Compacter under Accelerate, with FSDP2 or DeepSpeed ZeRO-3, in one or several processes.

torchrun --nproc-per-node 2 with_accelerate.py --shard fsdp2
"""

from __future__ import annotations

import argparse

import peft
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from small_task import base_model, examples, loss_of
from torch.utils.data import DataLoader

import compacter_kernels.peft as ckp

BATCH = 4  # For each process.


def accelerator_of(shard: str) -> Accelerator:
    """An Accelerator that cuts the parameters into pieces in this way, or not at all."""
    cpu = not torch.cuda.is_available()
    if shard == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
        )
        return Accelerator(cpu=cpu, fsdp_plugin=plugin)
    if shard == "zero3":
        zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
        plugin = DeepSpeedPlugin({"zero_optimization": zero, "train_micro_batch_size_per_gpu": BATCH})
        return Accelerator(deepspeed_plugin=plugin)
    return Accelerator(cpu=cpu)


def main(out: str, steps: int, shard: str = "none") -> dict[str, float]:
    """Train on this process's share of the batches; the first process loads the result."""
    accelerator = accelerator_of(shard)
    set_seed(0)
    model = peft.get_peft_model(base_model(), ckp.CompacterConfig(task_type="CAUSAL_LM", reduction_factor=4))
    before = loss_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(examples(), BATCH, shuffle=True))
    model.train()
    step = 0
    while step < steps:
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return {}
    accelerator.unwrap_model(model).save_pretrained(out, state_dict=state)
    return {"before": before, "after": loss_of(peft.PeftModel.from_pretrained(base_model(), out))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out-accelerate", help="a new folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shard", choices=["none", "fsdp2", "zero3"], default="none")
    print(main(**vars(parser.parse_args())))
