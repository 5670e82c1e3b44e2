"""The weights that all adapters of one name share: slow weights and, if asked for, fast weights."""

from __future__ import annotations

from torch import nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.initialisation import reset_rule


class SharedWeights(nn.Module):
    """Owns the shared parameters, for example phm_rule, W_down_left and W_up_right.

    The adapters borrow them (`PHMLinear.borrow`) and hold none, so that each is saved, counted and
    sharded once. Names are those of `shared_parameters` in the `adapters` library.
    """

    def __init__(self, adapter: CompacterAdapter, config: CompacterConfig) -> None:
        """Take over the parameters of the first adapter."""
        super().__init__()
        # For each projection: its name for a parameter, and the name here.
        self.names: dict[str, dict[str, str]] = {"down": {}, "up": {}}
        rule_names = adapter.down.rule_names() if config.shared_phm_rule else ()
        factor_names = adapter.down.factor_names() if config.shared_W_phm else ()
        for projection, names in self.names.items():
            names.update({name: name for name in rule_names})
            names.update({name: name.replace("W", f"W_{projection}") for name in factor_names})
            for name, shared_name in names.items():
                self.register_parameter(shared_name, getattr(getattr(adapter, projection), name))
        if rule_names:
            reset_rule([getattr(self, name) for name in rule_names], config.phm_init_range, config.phm_c_init)

    def lend(self, adapter: CompacterAdapter) -> None:
        """Let the adapter borrow the shared weights.

        Raises:
            ValueError: a shared weight has another shape in this adapter.
        """
        for projection, names in self.names.items():
            getattr(adapter, projection).borrow(self, **names)
