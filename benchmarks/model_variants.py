"""The models of model_step.py, the variants of adapting them, and the process that takes the steps.

    python benchmarks/model_variants.py MODEL VARIANT DEVICE DTYPE BATCH

takes three steps and prints the peak memory in bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import adapters
import torch
import transformers
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.bench import load
from compacter_kernels.saved import saved_bytes

LENGTH = 128
FIRST = (
    "bert.encoder.layer.0.attention.output.dense",
    "encoder.block.0.layer.0.SelfAttention.o",
    "decoder.block.0.layer.0.SelfAttention.o",
)
REDUCTION = 32
ATTEMPTS = 4  # to take a step without other load; the last attempt counts in any case


def bert_base() -> nn.Module:
    """BERT-base with a classifier."""
    return transformers.BertForSequenceClassification(transformers.BertConfig())


def t5_base() -> nn.Module:
    """A T5 of the size of T5-base."""
    config = transformers.T5Config(
        vocab_size=32100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"bert-base": bert_base, "t5-base": t5_base}


def batch(name: str, device: str, size: int) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 30000, (size, LENGTH), generator=generator)
    labels = words if name == "t5-base" else torch.randint(0, 2, (size,), generator=generator)
    return {"input_ids": words.to(device), "labels": labels.to(device)}


def bare(model: nn.Module) -> nn.Module:
    """The frozen model. Its gradient goes back as far as the first adapter of each stack needs."""
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for path in FIRST:
        if path in modules:
            modules[path].register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def shipped(config: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """The adapters of the library `adapters`."""

    def prepare(model: nn.Module) -> nn.Module:
        adapters.init(model)
        chosen = getattr(adapters, config)(reduction_factor=REDUCTION, non_linearity="gelu_new", **options)
        model.add_adapter("task", config=chosen)
        model.train_adapter("task")
        for path, parameter in model.named_parameters():
            if not path.startswith(("bert", "encoder", "decoder", "shared")):
                parameter.requires_grad_(False)  # the head: the bare model does not train it either
        return model

    return prepare


def patched(model: nn.Module) -> nn.Module:
    """Compacter of the library `adapters`, computed by our kernels."""
    model = shipped("CompacterConfig")(model)
    ck.patch(model, shortcuts=True)
    return model


def injected(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """The adapters of this package."""
    return lambda model: ck.inject(model, ck.CompacterConfig(modules_to_save=(), **options))


VARIANTS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "bare": ("frozen model", bare),
    "bottleneck": ("plain bottleneck adapter of `adapters`", shipped("DoubleSeqBnConfig")),
    "adapters": ("Compacter of `adapters` as shipped", shipped("CompacterConfig")),
    "patched": ("the same, patched", patched),
    "injected": ("Compacter by inject, layer norms frozen", injected(train_layer_norms=False)),
    "injected+norms": ("Compacter by inject, layer norms trained", injected()),
}


class Step:
    """A training step of a variant. The base model has the same weights in all variants."""

    def __init__(self, name: str, variant: str, device: str, dtype: str, size: str) -> None:
        torch.manual_seed(0)
        model = VARIANTS[variant][1](MODELS[name]())
        self.model = model.to(device=device, dtype=getattr(torch, dtype)).train()
        self.data, self.device = batch(name, device, int(size)), device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def once(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.model(**self.data).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def undisturbed(self) -> tuple[float, bool]:
        """Seconds of a step, and whether the step ran without other load beside it."""
        threads = torch.get_num_threads()
        for _ in range(ATTEMPTS):
            before, switches = load.Moment.now(), load.involuntary_switches()
            seconds = self.once()
            preempted = load.preempted(load.involuntary_switches() - switches, seconds)
            quiet = not (preempted or before.crowded(load.Moment.now(), threads, threads))
            if quiet or self.device == "cuda":
                break
        return seconds, quiet

    def facts(self) -> dict[str, int]:
        """The number of trained parameters, and the bytes that a forward saves for the backward.

        Parameters and inputs do not count as saved.
        """
        known = (*self.model.parameters(), *self.data.values())
        return {"trained": self.trained, "saved_bytes": saved_bytes(lambda: self.model(**self.data).loss, known)}

    def outcome(self) -> list[Tensor]:
        """The logits and the gradients, without dropout.

        GELU replaces ReLU here, since ReLU's kink turns rounding errors into large differences.
        """
        bent = [module for module in self.model.modules() if isinstance(getattr(module, "act", None), nn.ReLU)]
        for module in bent:
            module.act = nn.GELU()
        result = self.model.eval()(**self.data)
        result.loss.backward()
        for module in bent:
            module.act = nn.ReLU()
        found = [result.logits.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        self.model.zero_grad()
        self.model.train()
        return [tensor.float().cpu() for tensor in found]


def serve(connection: Connection, *setting: str) -> None:
    """Build a variant, and call the methods of its step that are requested by name, until None."""
    step = Step(*setting)
    connection.send(None)
    while (method := connection.recv()) is not None:
        connection.send(getattr(step, method)())


def peak_bytes(device: str) -> int:
    """The peak memory of this process: allocated on the GPU, or resident on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else load.peak_resident_bytes()


def main() -> int:
    """Take three steps and print the peak memory."""
    step = Step(*sys.argv[1:])
    for _ in range(3):
        step.once()
    print(peak_bytes(step.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
