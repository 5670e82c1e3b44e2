"""The configs of the methods, which `peft.get_peft_model` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn

from compacter_kernels import config as options
from compacter_kernels.checkpoints.files import VERSION, of_model
from compacter_kernels.peft.registration import peft_type


@dataclass
class _Config(PeftConfig):
    """What the configs of all methods have beside the options of their adapters."""

    target_modules: Sequence[str] | str | None = field(
        default=None,
        metadata={
            "help": "ends of module names, or a regular expression for whole names; None: as the table of "
            "compacter_kernels says for the type of the model"
        },
    )
    exclude_modules: Sequence[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression of modules that get no adapter"}
    )
    format_version: int = field(default=VERSION, metadata={"help": "of the folder that holds the adapters"})
    model_type: str | None = field(default=None, metadata={"help": "of the model, set when it gets adapters"})
    hidden_size: int | None = field(default=None, metadata={"help": "of the model, set when it gets adapters"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "of the model, set when it gets adapters"})
    adapter_model_sha256: InitVar[str | None] = None  # `save_adapter` writes it, and peft has no use for it.

    def _check_options(self, kind: type[options.AdapterConfig]) -> None:
        """Check all options, as the config without peft does, and give them the types of peft."""
        if self.format_version != VERSION:
            raise ValueError(
                f"these adapters have format_version {self.format_version!r}, and peft reads version {VERSION}: "
                "`compacter-kernels convert FOLDER --to compacter-kernels --out NEW` brings version 1 to it"
            )
        PeftConfig.__post_init__(self)  # type: ignore[no-untyped-call]
        given: Any = self.target_modules
        if isinstance(given, str):
            self.target_modules = (given,)
        elif isinstance(given, set | frozenset):
            self.target_modules = tuple(sorted(given))
        kind.__post_init__(self)  # type: ignore[arg-type]
        # peft adds names to these lists, and tells a regular expression from names by its type.
        self.target_modules = given if isinstance(given, str | None) else list(self.target_modules or ())
        self.modules_to_save: Any = None if self.modules_to_save is None else list(self.modules_to_save)

    def describe(self, model: nn.Module) -> None:
        """Set what the folder says about the model."""
        about = of_model(model)
        self.model_type, self.hidden_size = about["model_type"], about["hidden_size"]
        self.num_hidden_layers = about["num_hidden_layers"]


@dataclass
class CompacterConfig(_Config, options.CompacterConfig):
    """Compacter (arXiv 2106.04647) as a method of peft.

    It has the options of `compacter_kernels.CompacterConfig` and those of `peft.PeftConfig`, such
    as task_type. As in every method of peft, target_modules may also be a regular expression for
    whole names. Layer norms and heads that are trained become a part of modules_to_save.

    Raises:
        TypeError, ValueError: at construction. The message names the option, the value that was
            given and the values that are allowed.
    """

    def __post_init__(self, adapter_model_sha256: str | None) -> None:
        self._check_options(options.CompacterConfig)
        if self.embedding_adapter:
            raise ValueError("embedding_adapter=True: peft has adapters of layers only; use compacter_kernels.inject")
        self.peft_type = peft_type("COMPACTER")


@dataclass
class CompacterPlusPlusConfig(CompacterConfig):
    """Compacter++: `CompacterConfig` with adapters after the feed-forward block only."""

    mh_adapter: bool = field(default=False, metadata={"help": "an adapter after self-attention"})


@dataclass
class BottleneckConfig(_Config, options.BottleneckConfig):
    """The plain bottleneck adapter as a method of peft, with dense projections.

    It computes what the `adapters` library does for the same options, and has those of
    `peft.PeftConfig` too. The defaults are those of Houlsby et al. (arXiv 1902.00751), in the
    library DoubleSeqBnConfig. Its other two configs are

        SeqBnConfig (Pfeiffer et al., arXiv 2005.00247): mh_adapter=False, original_ln_before=True,
            non_linearity="relu"
        ParBnConfig (He et al., arXiv 2110.04366): mh_adapter=False, is_parallel=True, scaling=4.0,
            non_linearity="relu", reduction_factor=2, init_weights="mam_adapter"

    A parallel adapter takes the residual of the block, which in models with the layer norm before a
    block is the input of the norm. In wav2vec2, whose models differ in that, it takes the input of
    the block, and with target_modules that of the module itself.

    Raises:
        TypeError, ValueError: at construction. The message names the option, the value that was
            given and the values that are allowed.
    """

    def __post_init__(self, adapter_model_sha256: str | None) -> None:
        self._check_options(options.BottleneckConfig)
        self.peft_type = peft_type("BOTTLENECK")
