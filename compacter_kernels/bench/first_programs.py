"""The programs whose first call is timed: what a user writes to get one adapter and train it.

Each program is text, because its process imports what it needs and nothing else. LoRA and LoKr
adapt a linear layer that returns its input, as in `peer_modules.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from compacter_kernels.cases import Shape


class Program(NamedTuple):
    """what: in words. imports and construct: Python. package: the one that it needs beside torch.

    construct: assigns `call`, a function of x; {k}, {d}, {n} and {factor} stand for the sizes.
    """

    what: str
    imports: str
    construct: str
    package: str | None = None


_OURS = "adapter = ck.CompacterAdapter({k}, reduction_factor={factor}, phm_dim={n}"
_CK = "import compacter_kernels as ck"
_ADAPTERS = """\
config = adapters.CompacterConfig(reduction_factor={factor}, phm_dim={n}, non_linearity="gelu_new", \
shared_phm_rule=False)
adapter = Adapter("first", {k}, {d}, config)
"""
_BOTTLENECK = """\
down, up = torch.nn.Linear({k}, {d}), torch.nn.Linear({d}, {k})
def call(x):
    return x + up(torch.nn.functional.gelu(down(x), approximate="tanh"))
"""
_PASSES_ON = """\
class PassesOn(torch.nn.Linear):
    def forward(self, x):
        return x
layer = PassesOn({k}, {k}).requires_grad_(False)
"""
_PEFT = _PASSES_ON + "call = peft.get_peft_model(torch.nn.Sequential(layer), peft.{kind}(r=8, target_modules=['0']))\n"
_LORA, _LOKR = (_PEFT.replace("{kind}", kind) for kind in ("LoraConfig", "LoKrConfig"))
_LYCORIS = _PASSES_ON + 'LokrModule("lokr", layer, lora_dim=8, alpha=8, bypass_mode=False).apply_to()\ncall = layer\n'
_FROM_LYCORIS = "from lycoris.modules.lokr import LokrModule"
_FROM_ADAPTERS = "import adapters\nfrom adapters.methods.modeling import Adapter"

OURS = "compacter_kernels"
PROGRAMS = {
    OURS: Program("CompacterAdapter of this package", _CK, _OURS + ")\ncall = adapter"),
    "factored-compiled": Program(
        "the same with impl='factored' under torch.compile",
        _CK,
        _OURS + ", impl='factored')\ncall = torch.compile(adapter)",
    ),
    "adapters": Program(
        "Compacter of adapters as shipped", _FROM_ADAPTERS, _ADAPTERS + "call = lambda x: adapter(x, x)[0]", "adapters"
    ),
    "adapters-compiled": Program(
        "the same under torch.compile",
        _FROM_ADAPTERS,
        _ADAPTERS + "call = torch.compile(lambda x: adapter(x, x)[0])",
        "adapters",
    ),
    "bottleneck": Program("plain bottleneck adapter of two nn.Linear", "", _BOTTLENECK),
    "bottleneck-compiled": Program("the same under torch.compile", "", _BOTTLENECK + "call = torch.compile(call)"),
    "lora": Program("LoRA of peft, rank 8", "import peft", _LORA, "peft"),
    "lokr": Program("LoKr of peft as shipped, rank 8", "import peft", _LOKR, "peft"),
    "lokr-patched": Program("the same under ck.patch", f"import peft\n{_CK}", _LOKR + "ck.patch(call)", "peft"),
    "lycoris": Program("LoKr of lycoris as shipped, rank 8", _FROM_LYCORIS, _LYCORIS, "lycoris-lora"),
    "lycoris-patched": Program(
        "the same under ck.patch", f"{_FROM_LYCORIS}\n{_CK}", _LYCORIS + "ck.patch(layer)", "lycoris-lora"
    ),
}

_CHILD = """\
import gc, os, sys, time
marks, cpu, collections = [float(sys.argv[1]), time.monotonic()], [], []
gc.callbacks.append(lambda phase, info: collections.append(time.process_time() * (1 if phase == "stop" else -1)))
import torch
{imports}
marks.append(time.monotonic())
{construct}
x, grad = torch.randn({tokens}, {k}, requires_grad=True), torch.randn({tokens}, {k})
marks.append(time.monotonic())
for _ in range(2):
    (call(x) * grad).sum().backward()
    marks.append(time.monotonic())
    cpu.append(sum(os.times()[:4]))  # of this process and of those that it started, until now
    cpu.append(sum(collections))
assert x.grad is not None and bool(torch.isfinite(x.grad).all())
print(*marks, *cpu[:2])
"""


def source(program: Program, shape: Shape, tokens: int) -> str:
    """Return the text that a new process runs, whose argument is the time of its start."""
    sizes = {**shape._asdict(), "factor": shape.k / shape.d, "tokens": tokens}
    construct = program.construct
    for name, value in sizes.items():
        construct = construct.replace(f"{{{name}}}", str(value))
    return _CHILD.format(imports=program.imports, construct=construct, **sizes)
