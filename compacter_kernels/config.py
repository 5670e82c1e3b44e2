"""The options of the adapters: Compacter, Compacter++ and the plain bottleneck adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from compacter_kernels.activations import resolve
from compacter_kernels.nn.bottleneck import INITIAL_WEIGHTS
from compacter_kernels.nn.initialisation import check_options

Options = TypeVar("Options", bound="AdapterConfig")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# The options that `CompacterAdapter` has under the same names.
_ADAPTER_OPTIONS = (
    *("phm_dim", "phm_rank", "phm_bias", "factorized_phm_W", "factorized_phm_rule"),
    *("learn_phm", "init", "phm_init_range", "phm_c_init"),
)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class AdapterConfig:
    """The options that bottleneck adapters of every kind have.

    By default an adapter follows each attention block and each feed-forward block. Most names are
    those of the `adapters` library. The `metadata["help"]` of a field says what it means.

    Raises:
        TypeError, ValueError: at construction. The message names the option, the value that was
            given and the values that are allowed.
    """

    reduction_factor: float | Mapping[str, float] = _option(
        16, 'hidden / bottleneck size, or a value for each layer: {"0": 16, "default": 32}, numbered as in leave_out'
    )
    non_linearity: str = _option("swish", "activation of the bottleneck")
    scaling: float | str = _option(1.0, 'factor on the adapter\'s output, or "learned"')
    dropout: float = _option(0.0, "dropout probability of the adapter's output, before the residual is added")
    ln_before: bool = _option(False, "a layer norm before the down projection")
    ln_after: bool = _option(False, "a layer norm after the up projection")
    adapter_residual_before_ln: bool = _option(False, "with ln_after: add the residual before that norm")
    mh_adapter: bool = _option(True, "an adapter after self-attention")
    output_adapter: bool = _option(True, "an adapter after the feed-forward block")
    cross_adapter: bool = _option(False, "an adapter after cross-attention")
    is_parallel: bool = _option(False, "adapters take the block's input and add to its output (arXiv 2110.04366)")
    original_ln_before: bool = _option(
        False, "adapters take the block's output plus its residual, and the model's layer norm of it if one follows"
    )
    residual_before_ln: bool = _option(
        True, "with original_ln_before: the adapter adds to the block's output, not to what it takes"
    )
    leave_out: Sequence[int] = _option((), "layers without adapters; those of a decoder count on after the encoder's")
    target_modules: Sequence[str] | None = _option(
        None, 'ends of module names, such as ("attn.out", "mlp.fc2"); None: as the table says for the type of the model'
    )
    train_layer_norms: bool = _option(False, "also train copies of the model's layer norms")
    modules_to_save: Sequence[str] | None = _option(
        None, "ends of the names of modules to train whole, as copies; None: classification and CTC heads"
    )
    dtype: str | None = _option(None, "of adapters and trained copies; None: that of the layers they follow or copy")

    def __post_init__(self) -> None:
        for name in ("leave_out", "target_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence | None):
                raise TypeError(f"{name} must be a list, got {value!r}")
            if name != "leave_out" and any(not isinstance(item, str) or not item for item in value or ()):
                raise TypeError(f"{name} must be names of modules, got {value!r}")
            if value is not None:
                setattr(self, name, tuple(value))
        if self.target_modules == ():
            raise ValueError("target_modules is empty; give names of modules, or None to go by the model's type")
        for option in dataclasses.fields(self):
            if isinstance(option.default, bool) and not isinstance(getattr(self, option.name), bool):
                raise TypeError(f"{option.name} must be True or False, got {getattr(self, option.name)!r}")
        if any(not isinstance(layer, int) or isinstance(layer, bool) or layer < 0 for layer in self.leave_out):
            raise ValueError(f"leave_out must be numbers of layers, from 0 on, got {list(self.leave_out)}")
        if not isinstance(self.non_linearity, str):
            raise TypeError(f"non_linearity must be a name, got {self.non_linearity!r}")
        resolve(self.non_linearity)
        factors = self.reduction_factor
        if isinstance(factors, Mapping):
            if not all(str(key) == "default" or str(key).isdecimal() for key in factors):
                raise ValueError(f'reduction_factor by layer has keys like "0" and "default", got {list(factors)}')
            self.reduction_factor = {str(key): value for key, value in factors.items()}
        values = list(factors.values()) if isinstance(factors, Mapping) else [factors]
        if not values or not all(_is_number(value) and value > 0 for value in values):
            raise ValueError(f"reduction_factor must be a number > 0, or one for each layer, got {factors!r}")
        if self.scaling != "learned" and not _is_number(self.scaling):
            raise ValueError(f"scaling must be a finite number or 'learned', got {self.scaling!r}")
        if not (_is_number(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; choose one of {', '.join(DTYPES)}, or None")
        if self.original_ln_before and self.is_parallel:
            raise ValueError("original_ln_before=True is for adapters that are not parallel; leave one of the two out")
        if self.target_modules is None and not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ValueError("no adapter is asked for: set mh_adapter, output_adapter or cross_adapter")

    def reduction_factor_of(self, layer: int) -> float:
        """The reduction factor of a layer; ValueError if the mapping has none, and no "default"."""
        if not isinstance(self.reduction_factor, Mapping):
            return self.reduction_factor
        factor = self.reduction_factor.get(str(layer), self.reduction_factor.get("default"))
        if factor is None:
            raise ValueError(f'reduction_factor has none for layer {layer}; add "{layer}" or "default" to it')
        return factor

    def of_each_adapter(self) -> dict[str, Any]:
        """The arguments that all adapters of the model have in common."""
        return {
            "activation": self.non_linearity,
            "add_residual": not self.is_parallel,
            "scale": self.scaling,
            "dropout": self.dropout,
            "ln_before": self.ln_before,
            "ln_after": self.ln_after,
            "residual_before_ln": self.adapter_residual_before_ln,
        }

    def to_dict(self) -> dict[str, Any]:
        """The options as values that JSON can store."""
        values = ((option.name, getattr(self, option.name)) for option in dataclasses.fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_dict(cls: type[Options], options: Mapping[str, Any]) -> Options:
        """The config that `to_dict` was called on; TypeError or ValueError for a wrong option."""
        known = [option.name for option in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"not an option of {cls.__name__}: {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**options)


@dataclass
class CompacterConfig(AdapterConfig):
    """Compacter (arXiv 2106.04647): adapters that share their slow weights.

    The defaults are the authors'. docs/options.md says what each option is.

    Raises:
        TypeError, ValueError: at construction, as `AdapterConfig` says.
    """

    reduction_factor: float | Mapping[str, float] = _option(
        32, 'hidden / bottleneck size, or a value for each layer: {"0": 16, "default": 32}, numbered as in leave_out'
    )
    non_linearity: str = _option("gelu_new", "activation of the bottleneck; the default of `adapters` is gelu")
    train_layer_norms: bool = _option(True, "also train copies of the model's layer norms, as the authors do")
    phm_dim: int = _option(4, "n, the number of Kronecker products; must divide the hidden and the bottleneck size")
    phm_rank: int = _option(1, "rank of the fast weights W_left W_right")
    phm_bias: bool = _option(True, "whether the projections have a bias")
    factorized_phm_W: bool = _option(True, "store W as the product W_left W_right, which makes Compacter small")
    factorized_phm_rule: bool = _option(False, "store phm_rule as the product phm_rule_left phm_rule_right")
    shared_phm_rule: bool = _option(True, "one phm_rule for all adapters, instead of one for each projection")
    shared_W_phm: bool = _option(False, "also one W for all down projections and one for all up projections")
    learn_phm: bool = _option(True, "train phm_rule")
    embedding_adapter: bool = _option(
        False, "also an adapter with ln_before of the input of the first layer of each stack, as in CIAT"
    )
    init: str = _option("paper", 'initial weights: those of the "paper" or those of the "adapters" library')
    phm_init_range: float = _option(1e-4, "spread of the initial values of a shared phm_rule")
    phm_c_init: str = _option("normal", 'distribution of the initial phm_rule, "normal" or "uniform"')

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("phm_dim", "phm_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_options(self.init, self.phm_c_init, self.phm_init_range)
        if self.shared_W_phm and isinstance(self.reduction_factor, Mapping):
            raise ValueError("shared_W_phm needs one reduction_factor for all layers")

    def of_each_adapter(self) -> dict[str, Any]:
        """The arguments of `CompacterAdapter` that all adapters of the model have in common."""
        return {
            **super().of_each_adapter(),
            **{name: getattr(self, name) for name in _ADAPTER_OPTIONS},
            "shared_phm_rule": False,  # Shared weights are lent to the adapters afterwards.
        }


@dataclass
class CompacterPlusPlusConfig(CompacterConfig):
    """Compacter++: `CompacterConfig` with adapters after the feed-forward block only."""

    mh_adapter: bool = _option(False, "an adapter after self-attention")


@dataclass
class BottleneckConfig(AdapterConfig):
    """The plain bottleneck adapter, with dense projections.

    The defaults are those of Houlsby et al. (arXiv 1902.00751), DoubleSeqBnConfig of `adapters`.

    Raises:
        TypeError, ValueError: at construction, as `AdapterConfig` says.
    """

    original_ln_after: bool = _option(True, "the model's residual and layer norm follow the adapter; always True")
    init_weights: str = _option("bert", 'how the initial weights are drawn: "bert", "mam_adapter" or "houlsby"')

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.original_ln_after:
            raise ValueError("original_ln_after=False: an adapter here does not take the model's own residual away")
        if self.init_weights not in INITIAL_WEIGHTS:
            raise ValueError(
                f"init_weights={self.init_weights!r} is not known; choose one of {', '.join(INITIAL_WEIGHTS)}"
            )

    def of_each_adapter(self) -> dict[str, Any]:
        """The arguments of `BottleneckAdapter` that all adapters of the model have in common."""
        return {**super().of_each_adapter(), "init_weights": self.init_weights}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
