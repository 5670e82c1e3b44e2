"""What the adapters of a model share: their slow weights, and where it is asked for their fast ones."""

from __future__ import annotations

from torch import nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.initialisation import reset_rule


class SharedWeights(nn.Module):
    """Owns each shared parameter once: phm_rule or phm_rule_left and phm_rule_right, W_down_left, W_up_right and so on.

    The adapters borrow them (`PHMLinear.borrow`) and hold none, so nothing is saved, counted or sharded twice. Names
    are those of the `adapters` library's `shared_parameters`.
    """

    def __init__(self, adapter: CompacterAdapter, config: CompacterConfig) -> None:
        """Take the parameters of the first adapter."""
        super().__init__()
        self.names: dict[str, dict[str, str]] = {"down": {}, "up": {}}
        for position, names in self.names.items():
            if config.shared_phm_rule:
                names.update({name: name for name in adapter.down.rule_names()})
            if config.shared_W_phm:
                names.update({name: name.replace("W", f"W_{position}") for name in adapter.down.factor_names()})
            for name, own in names.items():
                self.register_parameter(own, getattr(getattr(adapter, position), name))
        if config.shared_phm_rule:
            rules = [getattr(self, name) for name in adapter.down.rule_names()]
            reset_rule(rules, config.phm_init_range, config.phm_c_init)

    def lend(self, adapter: CompacterAdapter) -> None:
        """Let the adapter borrow all that is shared.

        Raises:
            ValueError: a shared weight that has another shape in this adapter.
        """
        adapter.down.borrow(self, **self.names["down"])
        adapter.up.borrow(self, **self.names["up"])
