"""PHMLinear, a linear layer whose matrix is a sum of Kronecker products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.dispatch import check_name
from compacter_kernels.functional import phm_linear, phm_matrix
from compacter_kernels.kronecker_fit import fit, relative_error
from compacter_kernels.nn.dense import DenseProjection, random_state_kept, read_projection, rounded
from compacter_kernels.nn.initialisation import OWN_RULE_RANGE, check_options, reset_factors, reset_rule
from compacter_kernels.nn.partitioned import full_shape, gathered
from compacter_kernels.nn.representation import arguments
from compacter_kernels.private import parameter
from compacter_kernels.problem import check_phm_dim
from compacter_kernels.weights import PHMWeights, factorised_rule

Rule = Tensor | tuple[Tensor, ...]


def rule_shapes(phm_dim: int, factorized_phm_rule: bool) -> tuple[tuple[int, int, int], ...]:
    """The shapes of phm_rule, or of phm_rule_left and phm_rule_right."""
    n = phm_dim
    return ((n, n, 1), (n, 1, n)) if factorized_phm_rule else ((n, n, n),)


class PHMLinear(nn.Module):
    """y = x H + b with H = sum_i A_i (x) (s_i t_i), a drop-in for nn.Linear (arXiv 2106.04647, equation 5).

    Parameters, named as the field names them, n = phm_dim and r = phm_rank:
        W_left (n, in/n, r), W_right (n, r, out/n), or W (n, in/n, out/n) with factorized_phm_W=False;
        phm_rule (n, n, n), or phm_rule_left (n, n, 1) and phm_rule_right (n, 1, n) with factorized_phm_rule=True;
        b (out,), or None with bias=False.

    Args:
        in_features, out_features: widths; phm_dim must divide both.
        bias, device, dtype: as nn.Linear has them, also in its order, without names. All else is given by name.
        phm_rule: a Parameter (n, n, n), or a pair of them where the rule is factorised, to share with other modules.
        learn_phm: False keeps the rule as it is, whatever a training script does to requires_grad.
        init: "paper" or "adapters", see `compacter_kernels.nn.initialisation`.
        phm_init_range: spread of a rule that modules share; one that the layer has for itself starts at the authors'
            0.01. A rule passed in is never drawn anew.
        phm_c_init: "normal" or "uniform", how the rule is drawn.
        impl: see `compacter_kernels.phm_linear`.

    Raises:
        TypeError, ValueError: at construction, naming the option and what would do.
    """

    W: nn.Parameter
    W_left: nn.Parameter
    W_right: nn.Parameter
    phm_rule: nn.Parameter
    phm_rule_left: nn.Parameter
    phm_rule_right: nn.Parameter
    b: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        phm_dim: int = 4,
        phm_rank: int = 1,
        factorized_phm_W: bool = True,
        factorized_phm_rule: bool = False,
        phm_rule: Rule | None = None,
        learn_phm: bool = True,
        init: str = "paper",
        phm_init_range: float = 1e-4,
        phm_c_init: str = "normal",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(bias, bool):  # the authors' PHMLinear has phm_dim there
            raise TypeError(f"bias must be True or False, got {bias!r}; phm_dim is given by name, phm_dim={bias!r}")
        check_phm_dim(phm_dim, phm_rank, in_features=in_features, out_features=out_features)
        check_options(init, phm_c_init, phm_init_range)
        check_name(impl)
        self.in_features, self.out_features = in_features, out_features
        self.phm_dim, self.phm_rank, self.learn_phm = phm_dim, phm_rank, learn_phm
        self.factorized_phm_W, self.factorized_phm_rule = factorized_phm_W, factorized_phm_rule
        self.shared_phm_rule = phm_rule is not None
        self.init, self.phm_init_range, self.phm_c_init, self.impl = init, phm_init_range, phm_c_init, impl

        def parameter(*shape: int, learn: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=learn)

        n, chunk_in, chunk_out = phm_dim, in_features // phm_dim, out_features // phm_dim
        if factorized_phm_W:
            self.W_left = parameter(n, chunk_in, phm_rank)
            self.W_right = parameter(n, phm_rank, chunk_out)
        else:
            self.W = parameter(n, chunk_in, chunk_out)
        shapes = rule_shapes(n, factorized_phm_rule)
        rules = [parameter(*s, learn=learn_phm) for s in shapes] if phm_rule is None else _given(phm_rule, shapes)
        for name, rule in zip(self.rule_names(), rules, strict=True):
            self.register_parameter(name, rule)
        self.register_parameter("b", parameter(out_features) if bias else None)
        self._borrowed: dict[str, tuple[nn.Module, str]] = {}
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        linear: DenseProjection,
        *,
        phm_dim: int = 4,
        phm_rank: int = 1,
        starts: int = 8,
        seed: int = 0,
        **options: Any,
    ) -> tuple[PHMLinear, float]:
        """The layer nearest to a dense one, in its dtype and on its device, and |H - H'| / |H| in the Frobenius norm.

        Takes an nn.Linear, a weight (out, in) or a pair (weight, bias); options are those of the constructor. See
        `compacter_kernels.from_dense`, also for when the error can be small.
        """
        weight, bias = read_projection(linear, "linear")
        if unknown := {"bias", "device", "dtype", "phm_rule", "factorized_phm_rule"} & options.keys():
            raise TypeError(f"from_dense takes no {', '.join(sorted(unknown))}")
        options |= {"phm_dim": phm_dim, "phm_rank": phm_rank, "bias": bias is not None, "dtype": weight.dtype}
        out_features, in_features = weight.shape
        cls(in_features, out_features, device="meta", **options)  # raises for what does not fit
        matrix = weight.detach().to("cpu", torch.float64).T
        rank = phm_rank if options.get("factorized_phm_W", True) else None
        (weights,) = fit([matrix], phm_dim, rank, starts=starts, seed=seed)
        weights = rounded(weights, weight.dtype)
        with random_state_kept(weight.device):
            layer = cls(in_features, out_features, device=weight.device, **options)
        layer.load_weights(weights._replace(bias=bias))
        return layer, relative_error(matrix, weights)

    @torch.no_grad()
    def load_weights(self, weights: PHMWeights, with_rule: bool = True) -> None:
        """Copy these weights into the parameters, a bias where both have one."""
        if with_rule:
            self.phm_rule.copy_(weights.rule)
        if weights.right is None:
            self.W.copy_(weights.left)
        else:
            self.W_left.copy_(weights.left)
            self.W_right.copy_(weights.right)
        if weights.bias is not None and self.b is not None:
            self.b.copy_(weights.bias)

    def borrow(self, owner: nn.Module, **names: str) -> None:
        """Use parameters of another module in place of this layer's, which it then neither holds, moves nor saves.

        The owner is asked in every call, so that whatever replaces its parameters (a sharded model, say) is followed.

        names: this layer's parameter -> the owner's, for example phm_rule="phm_rule", W_left="W_down_left".
        """
        for name, theirs in names.items():
            shape = full_shape(getattr(self, name))
            if full_shape(getattr(owner, theirs)) != shape:
                raise ValueError(f"{name} has shape {tuple(shape)}, the owner's {theirs} another")
        for name, theirs in names.items():
            delattr(self, name)
            self._borrowed[name] = (owner, theirs)

    def _weight(self, name: str) -> nn.Parameter:
        """A parameter, this layer's or one that it borrows, on this layer's device."""
        if name not in self._borrowed:
            return parameter(self, name)  # type: ignore[no-any-return]
        owner, theirs = self._borrowed[name]
        weight: nn.Parameter = getattr(owner, theirs)
        b = parameter(self, "b")
        return weight if b is None or weight.device == b.device else weight.to(b.device)  # type: ignore[return-value]

    def rule_names(self) -> tuple[str, ...]:
        """The names of the slow weights."""
        return ("phm_rule_left", "phm_rule_right") if self.factorized_phm_rule else ("phm_rule",)

    def factor_names(self) -> tuple[str, ...]:
        """The names of the fast weights."""
        return ("W_left", "W_right") if self.factorized_phm_W else ("W",)

    def rule_parameters(self) -> tuple[nn.Parameter, ...]:
        """phm_rule, or its two factors: what `phm_rule=` of another module takes to share it."""
        return tuple(self._weight(name) for name in self.rule_names())

    def reset_parameters(self) -> None:
        """Draw all weights anew, except a shared rule and what is borrowed; biases are zero."""
        reset_factors([getattr(self, name) for name in self.factor_names() if name not in self._borrowed], self.init)
        if not self.shared_phm_rule:
            reset_rule(self.rule_parameters(), OWN_RULE_RANGE, self.phm_c_init)
        if self.b is not None:
            with gathered([self.b], change=True):
                nn.init.zeros_(self.b)

    def weights(self) -> PHMWeights:
        """The parameters as the functions take them; a factorised rule is multiplied out, a fixed one detached."""
        if self.factorized_phm_rule:
            rule: Tensor = factorised_rule(self._weight("phm_rule_left"), self._weight("phm_rule_right"))
        else:
            rule = self._weight("phm_rule")
        if not self.learn_phm and rule.requires_grad:
            rule = rule.detach()
        b = parameter(self, "b")
        if self.factorized_phm_W:
            return PHMWeights(rule, self._weight("W_left"), self._weight("W_right"), b)
        return PHMWeights(rule, self._weight("W"), None, b)

    @property
    def weight(self) -> Tensor:
        """H^T (out, in), as nn.Linear has it, for code that reads the matrix; computed anew in each read.

        It is differentiable, in the dtype of the layer's parameters. What is written into it is lost. A call of the
        layer itself never builds it, and keeps more digits in bfloat16 and float16.
        """
        weights = self.weights()
        return phm_matrix(weights).T.to(weights.left.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The parameter `b`, by nn.Linear's name."""
        return parameter(self, "b")  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        return phm_linear(x, self.weights(), impl=self.impl)

    def extra_repr(self) -> str:
        """The arguments that rebuild this layer; a shared rule appears by the name phm_rule."""
        rule = {"phm_rule": "phm_rule"} if self.shared_phm_rule else {}
        return arguments(self, "in_features", "out_features", bias=self.b is not None, names=rule)


def _given(phm_rule: Rule, shapes: tuple[tuple[int, int, int], ...]) -> list[nn.Parameter]:
    rules = list(phm_rule) if isinstance(phm_rule, (tuple, list)) else [phm_rule]
    if len(rules) != len(shapes):
        raise ValueError(f"phm_rule must be {len(shapes)} tensor(s) of shapes {shapes}, got {len(rules)}")
    for rule, shape in zip(rules, shapes, strict=True):
        if not isinstance(rule, nn.Parameter):
            raise TypeError(f"phm_rule must be a torch.nn.Parameter, so that it is shared, got {type(rule).__name__}")
        if tuple(full_shape(rule)) != shape:
            raise ValueError(f"phm_rule must have shape {shape}, got {tuple(full_shape(rule))}")
    return rules  # type: ignore[return-value]
