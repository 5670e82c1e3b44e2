"""PHMLinear, a linear layer whose matrix is a sum of Kronecker products."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.dispatch import check_name
from compacter_kernels.functional import phm_linear, phm_matrix
from compacter_kernels.input_statistics import InputStatistics
from compacter_kernels.kronecker_fit import fit, relative_error
from compacter_kernels.nn.borrower import Borrower
from compacter_kernels.nn.dense import DenseProjection, load_weights, random_state_kept, read_projection, rounded
from compacter_kernels.nn.initialisation import OWN_RULE_RANGE, check_options, reset_factors, reset_rule
from compacter_kernels.nn.partitioned import full_shape, gathered
from compacter_kernels.output_fit import refit
from compacter_kernels.private import parameter
from compacter_kernels.problem import check_phm_dim
from compacter_kernels.weights import PHMWeights, factorised_rule

Rule = Tensor | tuple[Tensor, ...]


def rule_shapes(phm_dim: int, factorized_phm_rule: bool) -> tuple[tuple[int, int, int], ...]:
    """The shapes of phm_rule, or of phm_rule_left and phm_rule_right."""
    n = phm_dim
    return ((n, n, 1), (n, 1, n)) if factorized_phm_rule else ((n, n, n),)


class PHMLinear(Borrower):
    """y = x H + b with H = sum_i A_i (x) (s_i t_i) (arXiv 2106.04647, equation 5).

    It is a drop-in for nn.Linear. Its parameters, with n = phm_dim and r = phm_rank:
        W_left (n, in/n, r) and W_right (n, r, out/n); W (n, in/n, out/n) if not factorized_phm_W;
        phm_rule (n, n, n); phm_rule_left (n, n, 1), phm_rule_right (n, 1, n) if it is factorised;
        b (out,), or None with bias=False.

    Args:
        in_features, out_features: the widths; phm_dim must divide both.
        bias, device, dtype: as for nn.Linear, in the same positions; all other options have names.
        phm_rule: a shared Parameter (n, n, n), or a pair if it is factorised, which stays as it is.
        learn_phm: False keeps the rule fixed, even if a training script sets requires_grad.
        init: of W_left and W_right: "paper", xavier uniform with gain sqrt 2, as the authors do, or
            "adapters", xavier normal, as the library `adapters` does.
        phm_init_range: the spread of a rule that modules share; otherwise it is the authors' 0.01.
        phm_c_init: the distribution of the rule, "normal" or "uniform".
        impl: see `compacter_kernels.phm_linear`.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it and a value that does.
    """

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
        if not isinstance(bias, bool):  # the authors' PHMLinear takes phm_dim in this position
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
        rules = [parameter(*s, learn=learn_phm) for s in shapes] if phm_rule is None else _rule_list(phm_rule, shapes)
        for name, rule in zip(self.rule_names(), rules, strict=True):
            self.register_parameter(name, rule)
        self.register_parameter("b", parameter(out_features) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        linear: DenseProjection,
        *,
        inputs: InputStatistics | None = None,
        phm_dim: int = 4,
        phm_rank: int = 1,
        starts: int = 8,
        seed: int = 0,
        **options: Any,
    ) -> tuple[PHMLinear, float]:
        """The layer nearest to a dense one, and |H - H'| / |H| in the Frobenius norm.

        linear: an nn.Linear, a weight (out, in) or a pair (weight, bias), with the dtype and device
        of the layer. inputs: an InputStatistics of its inputs X, which makes the outputs nearest,
        and the error |X (H - H')| / |X H|. options: those of the constructor. See also
        `compacter_kernels.from_dense`.
        """
        weight, bias = read_projection(linear, "linear")
        if unknown := {"bias", "device", "dtype", "phm_rule", "factorized_phm_rule"} & options.keys():
            raise TypeError(f"from_dense takes no {', '.join(sorted(unknown))}")
        options |= {"phm_dim": phm_dim, "phm_rank": phm_rank, "bias": bias is not None, "dtype": weight.dtype}
        out_features, in_features = weight.shape
        if not (inputs is None or isinstance(inputs, InputStatistics)):
            raise TypeError(f"inputs must be InputStatistics or None, got {type(inputs).__name__}")
        covariance = None if inputs is None else inputs.of_width(in_features, "inputs")
        cls(in_features, out_features, device="meta", **options)  # raises for a wrong option
        matrix = weight.detach().to("cpu", torch.float64).T
        rank = phm_rank if options.get("factorized_phm_W", True) else None
        nearest = fit([matrix], phm_dim, rank, starts=starts, seed=seed)
        weights = rounded(refit([matrix], [covariance], nearest)[0], weight.dtype)
        with random_state_kept(weight.device):
            layer = cls(in_features, out_features, device=weight.device, **options)
        load_weights(layer, weights._replace(bias=bias))
        return layer, relative_error(matrix, weights, covariance)

    def _weight(self, name: str) -> Any:
        """A parameter of this layer, or a borrowed one, on the device of this layer."""
        if self._borrowed is None or name not in self._borrowed:
            return parameter(self, name)
        weight, b = super()._weight(name), super()._weight("b")
        like = super()._weight(self.factor_names()[0]) if b is None else b
        return weight if weight.device == like.device else weight.to(like.device)

    def rule_names(self) -> tuple[str, ...]:
        """The names of the slow weights."""
        return ("phm_rule_left", "phm_rule_right") if self.factorized_phm_rule else ("phm_rule",)

    def factor_names(self) -> tuple[str, ...]:
        """The names of the fast weights."""
        return ("W_left", "W_right") if self.factorized_phm_W else ("W",)

    def rule_parameters(self) -> tuple[nn.Parameter, ...]:
        """phm_rule or its two factors, which another module takes as `phm_rule=` to share them."""
        return tuple(self._weight(name) for name in self.rule_names())

    def reset_parameters(self) -> None:
        """Draw new weights, except a shared rule and borrowed parameters; the bias becomes zero."""
        borrowed = self._borrowed or {}
        reset_factors([getattr(self, name) for name in self.factor_names() if name not in borrowed], self.init)
        if not self.shared_phm_rule:
            reset_rule(self.rule_parameters(), OWN_RULE_RANGE, self.phm_c_init)
        b = None if "b" in borrowed else self.b
        if b is not None:
            with gathered([b], change=True):
                nn.init.zeros_(b)

    def weights(self) -> PHMWeights:
        """The parameters for the functions: a factorised rule multiplied, a fixed one detached."""
        return self.packed(self._weight if self._borrowed else partial(parameter, self))

    def packed(self, read: Callable[[str], Any]) -> PHMWeights:
        """The parameters that `read` gives by their names, as `weights` packs its own."""
        if self.factorized_phm_rule:
            rule: Tensor = factorised_rule(read("phm_rule_left"), read("phm_rule_right"))
        else:
            rule = read("phm_rule")
        if not self.learn_phm and rule.requires_grad:
            rule = rule.detach()
        if self.factorized_phm_W:
            return PHMWeights(rule, read("W_left"), read("W_right"), read("b"))
        return PHMWeights(rule, read("W"), None, read("b"))

    @property
    def weight(self) -> Tensor:
        """H^T (out, in), like the weight of nn.Linear, for code that reads the matrix.

        Each read computes it again, differentiable and in the dtype of the parameters; values
        written into it are lost. A call of the layer never builds it, and is more exact than it in
        bfloat16 and float16.
        """
        weights = self.weights()
        return phm_matrix(weights).T.to(weights.left.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The parameter `b`, by nn.Linear's name."""
        return self._weight("b")  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out) in x's dtype."""
        return phm_linear(x, self.weights(), impl=self.impl)

    def extra_repr(self) -> str:
        """The arguments that rebuild this layer. A shared rule appears as phm_rule."""
        values = {"bias": self.bias is not None}
        return arguments(self, "in_features", "out_features", shared_rule=self.shared_phm_rule, values=values)


def _rule_list(phm_rule: Rule, shapes: tuple[tuple[int, int, int], ...]) -> list[nn.Parameter]:
    rules = list(phm_rule) if isinstance(phm_rule, (tuple, list)) else [phm_rule]
    if len(rules) != len(shapes):
        raise ValueError(f"phm_rule must be {len(shapes)} tensor(s) of shapes {shapes}, got {len(rules)}")
    for rule, shape in zip(rules, shapes, strict=True):
        if not isinstance(rule, nn.Parameter):
            raise TypeError(f"phm_rule must be a torch.nn.Parameter, so that it is shared, got {type(rule).__name__}")
        if tuple(full_shape(rule)) != shape:
            raise ValueError(f"phm_rule must have shape {shape}, got {tuple(full_shape(rule))}")
    return rules  # type: ignore[return-value]


def arguments(module: nn.Module, *positional: str, shared_rule: bool, values: Mapping[str, Any]) -> str:
    """The arguments of the module's constructor that differ from their defaults, for its repr.

    positional: attributes that are printed first, without a name. values: arguments whose value is
    not an attribute of the same name. A shared rule and functions are printed as bare names.
    """
    parts = [repr(getattr(module, name)) for name in positional]
    first = next(module.parameters(), torch.empty(0))
    for name, spec in inspect.signature(type(module)).parameters.items():
        if name in positional:
            continue
        if name == "phm_rule":
            text = name if shared_rule else ""
        elif name == "device":
            text = repr(str(first.device)) if first.device.type != "cpu" else ""
        elif name == "dtype":
            text = str(first.dtype) if first.dtype != torch.get_default_dtype() else ""
        else:
            value = values[name] if name in values else getattr(module, name)
            text = getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
            text = text if value != spec.default else ""
        if text:
            parts.append(f"{name}={text}")
    return ", ".join(parts)
