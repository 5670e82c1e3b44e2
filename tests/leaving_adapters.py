"""Loads what was converted from `adapters`, in an environment without it, and compares the outputs.

    python tests/leaving_adapters.py FOLDER...

Each folder holds the base model as transformers saved it in `base`, folders of adapters for peft
beside it, and `outputs.safetensors`: the inputs of the model, and for each folder of adapters what
the model of `adapters` computed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import safetensors.torch
import torch
import transformers

import compacter_kernels.peft

LIMIT = 1e-5  # of the largest output


def error(folder: Path, adapter: str, model: torch.nn.Module) -> float:
    """The largest difference between the outputs of a model and those saved for these adapters."""
    saved = safetensors.torch.load_file(folder / "outputs.safetensors")
    inputs = {key.removeprefix("inputs."): value for key, value in saved.items() if key.startswith("inputs.")}
    with torch.no_grad():
        output = model(**inputs)[0]
    return float((output - saved[adapter]).abs().max() / saved[adapter].abs().max())


def main(folders: list[str]) -> int:
    """Print the error of each, relative to the largest output; return 1 if one is too large."""
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, {compacter_kernels.peft.__name__}")
    errors = []
    for folder in map(Path, folders):
        config = transformers.AutoConfig.from_pretrained(folder / "base")
        model_class = getattr(transformers, config.architectures[0])
        for path in sorted(path for path in folder.iterdir() if (path / "adapter_config.json").is_file()):
            base = model_class.from_pretrained(folder / "base")
            errors.append(error(folder, path.name, peft.PeftModel.from_pretrained(base, path).eval()))
            print(f"{folder.name:12} {path.name:16} {errors[-1]:.1e}")
    return 0 if errors and max(errors) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
