"""Registers methods with peft, which has no public way for a method of another package.

`peft.utils.register_peft_method` is public, and takes only names in the enum `PeftType`. A plain
string does not do, as transformers asks the type for its `value`. So a member is added to the enum.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

try:
    import peft
    from peft.utils import PeftType, register_peft_method
except ImportError as error:
    raise ImportError("compacter_kernels.peft needs the package peft: pip install 'compacter-kernels[peft]'") from error


def peft_type(name: str) -> Any:
    """The member of PeftType of this name, such as COMPACTER, which is added if it is missing.

    ImportError: this version of peft has changed its enum.
    """
    if name not in PeftType.__members__:
        try:
            _add_member(PeftType, name)
            complete = PeftType(name) is PeftType[name] and PeftType[name] in list(PeftType)
        except (AttributeError, KeyError, TypeError, ValueError):
            complete = False
        if not complete:
            raise ImportError(
                f"compacter_kernels.peft cannot add its methods to peft {peft.__version__}; it is tested with peft "
                "0.18 to 0.21"
            )
    return PeftType[name]


def _add_member(enum: type[Enum], name: str) -> None:
    """Add a member whose value is its name. `enum` has the base str. Python has no public way."""
    member: Any = str.__new__(enum, name)  # type: ignore[type-var]
    member._name_ = member._value_ = name
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = enum._value2member_map_[name] = member
    type.__setattr__(enum, name, member)


def register(name: str, config: type, tuner: type) -> None:
    """Make a method known to peft, once in a process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        prefix: Any = tuner.prefix  # type: ignore[attr-defined]
        register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=prefix)
