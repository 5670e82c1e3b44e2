"""What lokr_step.py times: a layer and a small diffusion transformer with LoKr of peft.

    python benchmarks/lokr_models.py VARIANT

takes three training steps of the transformer and prints the peak memory in bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import peft
import torch
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.bench import load
from compacter_kernels.saved import saved_bytes

VARIANTS = {"base": "without LoKr", "shipped": "peft as shipped", "patched": "the same, patched"}
SETUPS: dict[str, dict[str, Any]] = {
    "w2 of rank 8": {"r": 8},
    "w1 and w2 of rank 8": {"r": 8, "decompose_both": True},
    "whole w2": {"r": 4096},  # so high a rank makes peft take w2 whole
    "whole w2, 8 x 8 w1": {"r": 4096, "decompose_factor": 8},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
BATCH, CLASSES = 4, 1000
STEPS = 3  # of the process that measures the memory


def with_lokr(model: nn.Module, variant: str, **options: Any) -> Any:
    """The model with LoKr whose weights are not zero; the frozen model for "base"."""
    model.requires_grad_(False)
    if variant == "base":
        return model
    model = peft.get_peft_model(model, peft.LoKrConfig(init_weights=False, alpha=1, **options))
    if variant == "patched":
        ck.patch(model)
    return model


class LayerStep:
    """Forward and backward of one linear layer, with the gradient of x and of what LoKr trains."""

    def __init__(self, width: int, tokens: int, setup: str, variant: str) -> None:
        torch.manual_seed(0)
        self.model = with_lokr(nn.Sequential(nn.Linear(width, width)), variant, target_modules=["0"], **SETUPS[setup])
        self.x, self.grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
        self.wanted = [self.x, *(p for p in self.model.parameters() if p.requires_grad)]

    def outcome(self) -> list[Tensor]:
        """The output and the gradients."""
        y = self.model(self.x)
        return [y.detach(), *torch.autograd.grad(y, self.wanted, self.grad)]

    def saved(self) -> int:
        """The bytes that a forward keeps, beyond x and the parameters."""
        return saved_bytes(lambda: self.model(self.x), (self.x, *self.model.parameters()))


class TransformerStep:
    """A training step of a transformer of the size of DiT-S/2 on 256 tokens of each picture."""

    def __init__(self, variant: str) -> None:
        torch.manual_seed(0)
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, num_layers=12, in_channels=4, out_channels=8,
            patch_size=2, sample_size=32, num_embeds_ada_norm=CLASSES,
        )  # fmt: skip
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        # as in a model that trains, the gradient goes back to the first layer
        model.pos_embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        self.model = with_lokr(model, variant, target_modules=TARGETS, r=8).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if self.trained else None
        self.data = {
            "hidden_states": torch.randn(BATCH, 4, 32, 32),
            "timestep": torch.randint(0, 1000, (BATCH,)),
            "class_labels": torch.randint(0, CLASSES, (BATCH,)),
        }
        self.target = torch.randn(BATCH, 8, 32, 32)

    def loss(self) -> Tensor:
        """The mean square error to random targets; no class is dropped."""
        torch.manual_seed(0)
        return (self.model(**self.data).sample - self.target).square().mean()

    def outcome(self) -> list[Tensor]:
        """The loss and the gradients."""
        loss = self.loss()
        return [loss.detach(), *(torch.autograd.grad(loss, self.trained) if self.trained else ())]

    def once(self) -> None:
        """A step."""
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saved(self) -> int:
        """The bytes that a forward keeps, beyond the data and the parameters."""
        return saved_bytes(self.loss, (*self.data.values(), self.target, *self.model.parameters()))


def calls(steps: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """What is timed of each step."""
    return {name: getattr(step, "once", step.outcome) for name, step in steps.items()}


def main() -> int:
    """Take three steps and print the peak memory."""
    step = TransformerStep(sys.argv[1])
    for _ in range(STEPS):
        step.once()
    print(load.peak_resident_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
