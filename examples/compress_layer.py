"""A layer of a pretrained encoder as PHMLinear, fitted to its matrix and to its outputs.

    python examples/compress_layer.py --out layer

The encoder and its sentences are those of train_topics.py; nothing is downloaded. The covariance of
the layer's inputs is taken over some of the sentences, the error of its outputs over the others. It
writes layer.json, and the table as layer.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import compacter_kernels as ck
from text_task import quiet
from train_topics import TOPICS, encoder_folder, sentences

LAYER = "encoder.layer.3.attention.output.dense"
FORMS = ((4, 1), (4, 4))  # phm_dim, phm_rank
EVERY, HELD_OUT = 3, 0.25  # the sentences that are used, and the part of them that is held out


def covariance_of(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> ck.InputStatistics:
    """The statistics of the layer's inputs: one sentence at a time, so that none is padded."""
    stats = ck.InputStatistics()
    with torch.inference_mode(), stats.recording(encoder.get_submodule(LAYER)):
        for text in texts:
            encoder(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt"))
    return stats


def output_error(stats: ck.InputStatistics, dense: Tensor, fitted: Tensor) -> float:
    """|X (H - H')| / |X H| over the inputs X of the statistics, for weights (out, in)."""
    covariance = stats.of_width(dense.shape[1], LAYER)
    error, all_of_it = (float(((weight @ covariance) * weight).sum()) for weight in (dense - fitted, dense))
    return math.sqrt(error / all_of_it)


def measured(encoder: nn.Module, tokenizer: Any, texts: Sequence[str], seed: int) -> list[list[float]]:
    """For each form the held-out error of the fit to the matrix, and of that to the outputs."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = round(HELD_OUT * len(texts))
    seen = covariance_of(encoder, tokenizer, [texts[i] for i in order[count:]])
    others = covariance_of(encoder, tokenizer, [texts[i] for i in order[:count]])
    linear: Any = encoder.get_submodule(LAYER)
    rows = []
    for n, r in FORMS:
        fits = [
            ck.PHMLinear.from_dense(linear, inputs=inputs, phm_dim=n, phm_rank=r, seed=seed)[0]
            for inputs in (None, seen)
        ]
        dense = linear.weight.detach().double()
        rows.append([output_error(others, dense, fitted.weight.detach().double()) for fitted in fits])
    return rows


def table(errors: Sequence[Sequence[Sequence[float]]]) -> str:
    """Markdown: for each form the mean over the seeds, and their standard deviation."""
    lines = ["| phm_dim | phm_rank | fitted to the matrix | fitted to the outputs |", "|---|---|---|---|"]
    for (n, r), of_seeds in zip(FORMS, zip(*errors, strict=True), strict=True):
        cells = [f"{statistics.mean(each):.3f} ± {statistics.stdev(each):.3f}" for each in zip(*of_seeds, strict=True)]
        lines.append(f"| {n} | {r} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every form with several seeds; print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="each divides the sentences anew (3)")
    parser.add_argument("--out", type=Path, default=Path("layer"), help="the folder of the results (layer)")
    args = parser.parse_args(arguments)
    quiet()
    folder = encoder_folder()
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    texts = [sentence for topic in TOPICS for sentence in sentences(topic)][::EVERY]
    errors = [measured(encoder, AutoTokenizer.from_pretrained(folder), texts, seed) for seed in range(args.seeds)]
    print(text := table(errors))
    settings = {"layer": LAYER, "sentences": len(texts), "held_out": HELD_OUT, "torch": torch.__version__}
    document = json.dumps({"settings": settings, "forms": FORMS, "errors": errors}, indent=2)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "layer.json").write_text(document + "\n", encoding="utf-8")
    (args.out / "layer.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
