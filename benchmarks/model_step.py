"""A training step of a whole transformer: what its adapters add to the frozen model's own time and memory.

    python benchmarks/model_step.py OUT [--model bert-base|t5-base] [--device cuda] [--dtype bfloat16] [--rounds 20]

Random weights at the model's size, random tokens, AdamW over what trains. In every round one step of each variant, in
rotating order. *Share*: the median over the rounds of a variant's step minus the bare step of the same round. The bare
step is that of the frozen model whose gradient goes as far down as the first adapter. Before anything is timed, logits
and gradients of the patched model and of the one that `adapters` ships must agree. On the CPU page faults are removed, as in
`compacter-kernels bench` (benchmarks/README.md), and a step beside other load is repeated; peak memory is that of a fresh
process that keeps them. Writes OUT/model_step_MODEL.json and .txt. Needs transformers 4.57 and adapters 1.3.0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels import machine
from compacter_kernels.bench import load, page_faults
from compacter_kernels.saved import saved_bytes

BATCH, LENGTH = {"cpu": 8, "cuda": 32}, 128
REDUCTION = 32
ATTEMPTS = 4  # at a step without other load; the last one counts as it is


def bert_base() -> nn.Module:
    """BERT-base with a classifier."""
    return transformers.BertForSequenceClassification(transformers.BertConfig())


def t5_base() -> nn.Module:
    """A T5 of T5-base's size."""
    config = transformers.T5Config(
        vocab_size=32100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"bert-base": bert_base, "t5-base": t5_base}


def batch(name: str, device: str) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(0)
    size = BATCH[device]
    words = torch.randint(3, 30000, (size, LENGTH), generator=generator)
    labels = words if name == "t5-base" else torch.randint(0, 2, (size,), generator=generator)
    return {"input_ids": words.to(device), "labels": labels.to(device)}


def bare(model: nn.Module) -> nn.Module:
    """Frozen, with the gradient as far down as the first adapter would need it."""
    model.requires_grad_(False)
    ends = ("attention.output.dense", "SelfAttention.o")
    first = next(module for path, module in model.named_modules() if path.endswith(ends))
    first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def shipped(config: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """The adapters of the `adapters` library."""

    def prepare(model: nn.Module) -> nn.Module:
        adapters.init(model)
        chosen = getattr(adapters, config)(reduction_factor=REDUCTION, non_linearity="gelu_new", **options)
        model.add_adapter("task", config=chosen)
        model.train_adapter("task")
        for path, parameter in model.named_parameters():
            if not path.startswith(("bert", "encoder", "decoder", "shared")):
                parameter.requires_grad_(False)  # the head, which the bare model does not train either
        return model

    return prepare


def patched(model: nn.Module) -> nn.Module:
    """Compacter of the `adapters` library through our kernels."""
    model = shipped("CompacterConfig")(model)
    ck.patch(model)
    return model


def injected(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """Our own adapters."""
    return lambda model: ck.inject(model, ck.CompacterConfig(modules_to_save=(), **options))


VARIANTS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "bare": ("frozen model", bare),
    "bottleneck": ("plain bottleneck adapter of `adapters`", shipped("DoubleSeqBnConfig")),
    "adapters": ("Compacter of `adapters` as shipped", shipped("CompacterConfig")),
    "patched": ("the same, patched", patched),
    "injected": ("Compacter by inject, layer norms frozen", injected(train_layer_norms=False)),
    "injected+norms": ("Compacter by inject, layer norms trained", injected()),
}


def build(name: str, variant: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A variant of the model, the same weights for all."""
    torch.manual_seed(0)
    model = VARIANTS[variant][1](MODELS[name]())
    return model.to(device=device, dtype=dtype).train()


class Step:
    """One training step."""

    def __init__(self, model: nn.Module, data: dict[str, Tensor], device: str) -> None:
        self.model, self.data, self.device = model, data, device
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def __call__(self) -> float:
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
        """Seconds of a step, and whether no other load was beside it."""
        threads = torch.get_num_threads()
        for _ in range(ATTEMPTS):
            before, switches = load.Moment.now(), load.involuntary_switches()
            seconds = self()
            preempted = load.preempted(load.involuntary_switches() - switches, seconds)
            quiet = not (preempted or before.crowded(load.Moment.now(), threads, threads))
            if quiet or self.device == "cuda":
                break
        return seconds, quiet

    def saved_bytes(self) -> int:
        """Bytes that a forward keeps for the backward, parameters and inputs left out."""
        known = (*self.model.parameters(), *self.data.values())
        return saved_bytes(lambda: self.model(**self.data).loss, known)


def disagreement(a: nn.Module, b: nn.Module, data: dict[str, Tensor]) -> float:
    """Largest difference of logits and gradients, relative to the largest entry."""
    found = []
    for model in (a, b):
        result = model.eval()(**data)
        result.loss.backward()
        found.append([result.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
        model.train()
    return max(
        float((x.float() - y.float()).abs().max() / x.float().abs().max().clamp_min(1e-30))
        for x, y in zip(*found, strict=True)
    )


def peak_memory(args: argparse.Namespace, variant: str) -> int:
    """Peak bytes of a process that takes three steps: resident on the CPU, allocated on a GPU."""
    command = [sys.executable, __file__, args.out, "--model", args.model, "--device", args.device]
    done = subprocess.run(
        [*command, "--dtype", args.dtype, "--peak", variant],
        env=page_faults.environment("kept", None), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    """What `peak_memory` asks a fresh process for."""
    step = Step(
        build(args.model, args.peak, args.device, getattr(torch, args.dtype)),
        batch(args.model, args.device),
        args.device,
    )
    for _ in range(3):
        step()
    on_gpu = args.device == "cuda"
    print(torch.cuda.max_memory_allocated() if on_gpu else resident_peak())


def resident_peak() -> int:
    """Peak resident bytes of this process since it began; `ru_maxrss` would count the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it is written."""
    dtype = getattr(torch, args.dtype)
    data = batch(args.model, args.device)
    names = [name for name in VARIANTS if args.only is None or name in ("bare", *args.only)]
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            steps[name] = Step(build(args.model, name, args.device, dtype), data, args.device)
            steps[name]()
        except (RuntimeError, ValueError, AttributeError) as error:
            skipped[name] = " ".join(str(error).split())[:200]
            steps.pop(name, None)
    error = (
        disagreement(steps["adapters"].model, steps["patched"].model, data)
        if {"adapters", "patched"} <= set(steps)
        else None
    )
    if error is not None and error > (1e-4 if dtype == torch.float32 else 5e-2):
        raise SystemExit(f"patched and shipped differ by {error:.1e}: nothing was timed")
    rows = {
        name: {
            "what": VARIANTS[name][0],
            "saved_bytes": step.saved_bytes(),
            "trained": sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        }
        for name, step in steps.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, disturbed = list(steps), 0
    for step in steps.values():
        step()
    for turn in range(args.rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            taken, quiet = steps[name].undisturbed()
            seconds[name].append(taken)
            disturbed += not quiet
        print(f"\rround {turn + 1} of {args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    steps.clear()
    for name, row in rows.items():
        shares = [a - b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
        row |= {"step_ms": 1e3 * statistics.median(seconds[name]), "share_ms": 1e3 * statistics.median(shares)}
        low, *_, high = statistics.quantiles(shares, n=5)
        row |= {"share_ms_20": 1e3 * low, "share_ms_80": 1e3 * high, "peak_bytes": peak_memory(args, name)}
    return {
        "model": args.model, "batch": BATCH[args.device], "length": LENGTH, "dtype": args.dtype, "device": args.device,
        "rounds": args.rounds, "disturbed_steps": disturbed, "disagreement": error, "skipped": skipped, "rows": rows,
        "machine": machine.describe(),
        "versions": {"transformers": transformers.__version__, "adapters": adapters.__version__},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows, in columns."""
    rows = result["rows"]
    own = rows.get("adapters", {}).get("share_ms")
    beside = result["disturbed_steps"]
    quiet = f", {beside} steps beside other load" if beside else ""
    size = f"batch {result['batch']} x {result['length']}, {result['dtype']}, {result['device']}"
    heads = ("step ms", "share ms", "20 %", "80 %", "of adapters", "saved MiB", "peak MiB", "trained")
    lines = [f"{result['model']}, {size}, medians of {result['rounds']} rounds{quiet}"]
    lines.append(f"{'':<42}" + "".join(f"{head:>12}" for head in heads))
    for row in rows.values():
        times = [f"{row[key]:.1f}" for key in ("step_ms", "share_ms", "share_ms_20", "share_ms_80")]
        memory = [f"{row[key] / 2**20:.0f}" for key in ("saved_bytes", "peak_bytes")]
        cells = [*times, f"{row['share_ms'] / own:.2f}" if own else "-", *memory, f"{row['trained']:,}"]
        lines.append(f"{row['what']:<42}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"{VARIANTS[name][0]}: {why}" for name, why in result["skipped"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out")
    add("--model", choices=MODELS, default="bert-base")
    add("--device", choices=BATCH, default="cpu")
    add("--dtype", default="float32")
    add("--rounds", type=int, default=20)
    add("--only", nargs="+", choices=VARIANTS)
    add("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args)
        return 0
    removed = page_faults.environment("removed", None)
    if args.device == "cpu" and removed != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], removed)  # the C library reads them at its start
    result = measure(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"model_step_{args.model}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"model_step_{args.model}.txt").write_text(table(result) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
