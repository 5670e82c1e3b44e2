"""The time of a token in compressed and in standard decoders of the same sizes, in turns.

    python examples/compressed_attention/can_speed.py --rounds 15

Prints JSON. A call decodes TOKENS tokens one after another with cached keys and values; it begins
with the keys and values of a source of SOURCE positions. Both decoders run without adapters and
with Compacter adapters: behind Wo of a compressed layer, and behind the self-attention and the
feed-forward of a standard one. The rounds, and what counts as other load, are those of
`compacter-kernels bench`. The first program sets up the memory as that does, and starts a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from can_model import CompressedLayer, Decoder, StandardLayer
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.bench.cpu import Timing, environment, interleave

SIZES = {"words": 32, "length": 30, "hidden": 512, "inner": 2048, "heads": 8, "layers": 2}
SOURCE, TOKENS, BATCHES = 30, 30, (1, 8, 64)
LAYERS: dict[str, tuple[type[Any], list[str]]] = {  # with what adapters follow
    "standard": (StandardLayer, ["self_output", "second"]),
    "compressed": (CompressedLayer, ["output"]),
}


def decoder(kind: str, adapted: bool) -> Decoder:
    """A decoder with random weights, the same each time."""
    layer, targets = LAYERS[kind]
    torch.manual_seed(0)
    made = Decoder(layer, **SIZES).eval().requires_grad_(False)
    return ck.inject(made, ck.CompacterConfig(target_modules=targets)) if adapted else made


def decoding(model: Decoder, enc: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that decodes the tokens (batch, T) one after another, and gives all scores."""

    @torch.no_grad()
    def run() -> Tensor:
        seen = model.start(enc, tokens.shape[1])
        return torch.cat([model(tokens[:, i : i + 1], seen, i) for i in range(tokens.shape[1])], 1)

    return run


def row(batch: int, rounds: int) -> dict[str, Any]:
    """The times of a token in ms, by decoder, at that batch size."""
    generator = torch.Generator().manual_seed(0)
    enc = torch.randn(batch, SOURCE, SIZES["hidden"], generator=generator)
    tokens = torch.randint(SIZES["words"], (batch, TOKENS), generator=generator)
    timings = {}
    for kind in LAYERS:
        for adapted in (False, True):
            model = decoder(kind, adapted)
            timings[f"{kind}, adapters" if adapted else kind] = Timing(decoding(model, enc, tokens))
            cached = decoding(model, enc, tokens)()
            torch.testing.assert_close(cached, model(tokens, model.start(enc)), rtol=1e-4, atol=1e-4)
    threads = torch.get_num_threads()
    interleave(list(timings.values()), rounds, 0.0, threads, os.cpu_count() or threads)
    times = {}
    for name, timing in timings.items():
        low, median, high = (1e3 * seconds / TOKENS for seconds in timing.quantiles())
        times[name] = {"ms": median, "ms_q20": low, "ms_q80": high, **timing.columns()}
    return {"batch": batch, "times": times}


def measure(batches: tuple[int, ...], rounds: int, threads: int) -> dict[str, Any]:
    """The rows of these batch sizes, measured in a process of their own."""
    options = ["--rounds", rounds, "--threads", threads, "--batches", *batches, "--measure"]
    command = [sys.executable, "-W", "ignore", __file__, *map(str, options)]
    done = subprocess.run(command, env=environment("removed", threads), stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="in this process")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(args.threads)
        rows = [row(batch, args.rounds) for batch in args.batches]
        result = {"sizes": SIZES, "source": SOURCE, "tokens": TOKENS, "rounds": args.rounds, "rows": rows}
    else:
        result = measure(tuple(args.batches), args.rounds, args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
