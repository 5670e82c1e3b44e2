"""`compacter-kernels convert`: convert a checkpoint into another format, or report its content."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compacter_kernels.checkpoints.checkpoint import MissingRuleError
from compacter_kernels.checkpoints.convert import FORMATS, LAYERS, convert, format_of, read
from compacter_kernels.checkpoints.source import Source, open_source

EPILOG = """examples:
  compacter-kernels convert bert-adapter                       # what is it, and is it complete?
  compacter-kernels convert bert-adapter --to compacter-kernels --out converted
  compacter-kernels convert ~/.cache/huggingface/hub/models--AdapterHub--NAME --to peft --out moved --allow-pickle
  compacter-kernels convert model.safetensors --to adapters --out folder --non-linearity gelu_new --allow-loss
  compacter-kernels convert t5-adapter --to compacter-kernels --out repaired --phm-rule rule.safetensors

files are read as safetensors and JSON. A pytorch_adapter.bin is a pickle, and is read only with --allow-pickle.
Another .bin that you trust becomes a safetensors file by two lines of Python:
  import torch; from safetensors.torch import save_file
  save_file(torch.load("model.bin", weights_only=True), "model.safetensors")

exits 0 when the checkpoint is complete and, with --to, converted; 1 when it lacks shared weights; 2 on any error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `convert`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a .safetensors file, or a folder with one and its config")
    add("--to", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}; without it, only a report")
    add("--out", type=Path, metavar="PATH", help="the folder to write, or the .safetensors file")
    add("--from", dest="source_format", choices=FORMATS, metavar="FORMAT", help="by default recognised")
    add("--name", help="of the adapter, or of the task, where the source has several")
    add("--target-name", metavar="NAME", help="of the adapter in the target; by default as --name, or default")
    add("--model-type", help="config.model_type of the base, such as bert, where the source does not say it")
    add("--non-linearity", help="of the adapters, where the source does not say it")
    add("--phm-rule", type=Path, metavar="FILE", help="a .safetensors file with the shared rule that the source lacks")
    add("--allow-pickle", action="store_true", help="read a pytorch_adapter.bin, by torch.load(weights_only=True)")
    add("--allow-loss", action="store_true", help="leave out what the target cannot hold")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _contents(source: Source, source_format: str) -> dict[str, Any]:
    if source_format in LAYERS:
        return {"tensors": len(source.tensors)}
    checkpoint = read(source, source_format)
    tensors = [*checkpoint.shared.values(), *(t for adapter in checkpoint.adapters.values() for t in adapter.values())]
    return {
        "adapters": len(checkpoint.adapters),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "shared": sorted(checkpoint.shared),
        "trained_beside": sorted(checkpoint.copies),
        "model": checkpoint.model,
        "options": checkpoint.config.to_dict(),
        "notes": checkpoint.notes,
    }


def run(args: argparse.Namespace) -> int:
    """Report or convert, and print the result; return 1 if the checkpoint lacks shared weights."""
    if (args.to is None) != (args.out is None):
        raise ValueError("--to and --out belong together: the format, and where to write it")
    told = {key: getattr(args, key) for key in ("name", "model_type", "non_linearity", "phm_rule", "allow_pickle")}
    result: dict[str, Any] = {"source": str(args.source)}
    try:
        if args.to is None:
            source = open_source(args.source, **told)
            source_format = args.source_format or format_of(source)
            result |= {"source_format": source_format, "complete": True}
            result |= _contents(source, source_format)
        else:
            options = {key: getattr(args, key) for key in ("source_format", "target_name", "allow_loss")}
            converted = convert(args.source, args.to, args.out, **told, **options)
            result |= {"source_format": converted.source_format, "target_format": args.to, "complete": True}
            result |= {"written": str(args.out), "tensors": len(converted.tensors)}
            result |= {"losses": converted.losses, "notes": converted.notes}
    except MissingRuleError as error:
        result |= {"complete": False, "missing": str(error)}
    if args.json:
        print(json.dumps(result, indent=2))
    for key, value in () if args.json else result.items():
        lines = [f"{option} {item}" for option, item in value.items()] if isinstance(value, dict) else value
        for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
            print(f"{key if number == 0 else '':<16}{line}")
    return 0 if result["complete"] else 1
