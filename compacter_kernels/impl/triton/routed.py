"""The `Kernel` of a routed bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels.calls import BankCall, Call
from compacter_kernels.impl import Gradients, empty_gradients
from compacter_kernels.impl.memory import addresses, readable
from compacter_kernels.impl.triton import bank
from compacter_kernels.impl.triton.kernel import KERNELS, REDUCE, REDUCE_WARPS, Optionals, TritonKernel, reduction
from compacter_kernels.impl.triton.launch import Launch, Tiled
from compacter_kernels.impl.triton.reduce import reduce_bank
from compacter_kernels.impl.triton.routes import adapter_table
from compacter_kernels.impl.triton.sizes import Sizes, power_of_two
from compacter_kernels.problem import Problem

BANK_KERNELS = {name: getattr(bank, f"bank_{name}") for name in KERNELS}
REDUCE_FEW = {"BLOCK": 128, "BR": 16}  # an adapter of several has few rows of partials


def bank_reduction(s: Sizes) -> dict[str, Any]:
    """The compile-time arguments of the second stage."""
    adapters = s.ADAPTERS or s.MIXED
    return {**reduction(s), **(REDUCE if adapters == 1 else REDUCE_FEW), "E": adapters}


class Order(NamedTuple):
    """The groups of a call in the order of their adapters: ids, ascending, and their numbers.

    A group is `per` neighbouring rows of one adapter.
    """

    ids: Tensor
    order: Tensor
    groups: int
    per: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """As the kernels take them."""
        return self.ids, self.order


class RoutedKernel(TritonKernel):
    """The `Kernel` of a bank in which each row has an adapter (bank.py)."""

    kernels = BANK_KERNELS

    def __init__(self, problem: Problem, turned: tuple[bool, ...] = (False, False)) -> None:
        super().__init__(problem, turned)
        assert problem.bank is not None
        self.adapters = adapters = problem.bank.adapters
        constants = {"E": adapters, "PADDED": power_of_two(adapters + 1)}
        self.table = Launch(adapter_table, constants, 4, self.device)
        self.shared_rules = [1 + 4 * side for side in (0, 1) if self.sizes.SHARED[side]]

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        assert isinstance(call, BankCall) and call.route is not None
        x = readable(call.x, "x")
        params, _ = self.parameters.readable((*call.down, *call.up))
        added = x if call.add_x else None
        if call.residual is not None:
            residual = readable(call.residual, "residual")
            added = residual + x if call.add_x else residual
        out = torch.empty_like(x) if out is None else out
        if rows := x.numel() // self.width:
            order = self._order(call.route, rows)
            table = self._empty_table(x)
            tensors = (x, added, out, *params, *order.tensors, table)
            if "forward" in self.served:
                launch = self._launch("forward", tensors, added is x and self.square)
            else:
                launch = self._launch("forward_streamed", tensors)
            programs = self._divide(launch, order, 1, launch.most, table)
            self._run(launch, programs, 1, tensors, call.scale, rows, order.per)
        return out

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        assert isinstance(call, BankCall) and call.route is not None
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        params, _ = self.parameters.readable((*call.down, *call.up))
        results = empty_gradients([x, *params], wanted[:-1])
        rows = x.numel() // self.width
        if not rows:
            return (*[None if result is None else result.zero_() for result in results], None)
        each = self._of_each(results)
        dx, rule1, left1, right1, bias1, rule2, left2, right2, bias2 = each
        grads: Optionals = (left1, right2, bias2, rule1, right1, bias1, rule2, left2)
        order = self._order(call.route, rows)
        if "backward" in self.served:
            part, table = self._partials(x, "backward"), self._empty_table(x)
            tensors = (x, grad, dx, part, *params[:7], *order.tensors, table)
            launch = self._launch("backward", tensors, False, call.add_x, bias2 is not None)
            programs = self._divide(launch, order, 1, launch.most, table)
            self._run(launch, programs, 1, tensors, call.scale, rows, order.per)
            tables = [table] * 3
        else:
            part, tables = self._phases(x, grad, dx, params, call, bias2 is not None, order, rows)
        self._reduce_bank(part, grads, tables)
        self._add_shared(results, each)
        return (*results, None)

    def _of_each(self, results: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients, with one of a shared rule for each adapter."""
        each = list(results)
        for i in self.shared_rules:
            if (rule := results[i]) is not None:
                each[i] = rule.new_empty((self.adapters, *rule.shape), dtype=torch.float32)
        return each

    def _add_shared(self, results: list[Tensor | None], each: list[Tensor | None]) -> None:
        """Write the gradients of shared rules: the sums over the adapters."""
        for i in self.shared_rules:
            if (rule := results[i]) is not None and (of_each := each[i]) is not None:
                rule.copy_(of_each.sum(0))

    def _phases(
        self, x: Tensor, g: Tensor, dx: Tensor | None, params: Optionals, call: BankCall, has_bias: bool, order: Order,
        rows: int,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The partials, and the tables of `reduce_bank`."""
        s = self.sizes
        part = self._partials(x, "columns", "sums")
        z, dv, dz, v2 = self._narrow(x, rows)
        rule1, left1, right1, bias1, rule2, left2, _, _ = params
        table = self._empty_table(x)
        tensors: Optionals = (x, g, z, dv, dz, v2, *params[:7], dx if s.DENSE else None, *order.tensors, table)
        launch = self._launch("tokens", tensors, False, call.add_x)
        programs = self._divide(launch, order, 1, launch.most, table)
        self._run(launch, programs, 1, tensors, call.scale, rows, order.per)
        table = self._empty_table(x)
        tensors = (z, dv, part, rule1, right1, bias1, rule2, left2, order.order, table)
        for in_side in s.sums:
            launch = self._launch("sums", tensors, False, False, False, in_side, not in_side)
            programs = self._divide(launch, order, 1, launch.most, table)
            self._run(launch, s.blocks, programs, tensors, order.per)
        tables, most = [table] if s.sums else [], 0
        for in_side, out_side in [(True, True)] if self.square else [(False, True), (True, False)]:
            side = s.IN if in_side else s.OUT
            table = self._empty_table(x)
            tensors = (x, g, None if s.DENSE else dx, dz, v2, part, left1, *order.tensors, table)
            launch = self._launch("columns", tensors, False, call.add_x, has_bias, in_side, out_side)
            if not most:
                blocks = self._blocks(launch, s.K)
                most = max(1, min(launch.programs(rows * max(s.IN.N, s.OUT.N)), launch.most // blocks))
            programs = self._divide(launch, order, side.N, most, table)
            self._run(launch, self._blocks(launch, side.K), programs, tensors, call.scale, rows, order.per)
            tables.insert(0, table)
        return part, [tables[0], tables[1 if len(tables) == 3 else 0], tables[-1]]

    def _order(self, route: Tensor, rows: int) -> Order:
        ids, order = torch.sort(route.reshape(-1), stable=True)
        return Order(ids, order, ids.numel(), rows // ids.numel())

    def _empty_table(self, x: Tensor) -> Tensor:
        return x.new_empty(2 * (self.adapters + 1), dtype=torch.int32)

    def _divide(self, launch: Tiled, order: Order, n: int, most: int, table: Tensor) -> int:
        """Fill the table of a launch, and return how many programs cover all adapters.

        n: the parts of a row; a tile has launch.tokens parts. most: the programs for one adapter.
        """
        scalars = order.groups, order.groups.bit_length(), order.per, n, launch.tokens, most
        self._run(self.table, 1, 1, (order.ids, table), *scalars)
        tiles = -(-order.groups * order.per * n // launch.tokens)
        others = min(self.adapters, order.groups) if self.adapters > 1 else 0
        return min(tiles, most) + others

    def _run(self, launch: Launch, columns: int, rows: int, tensors: Optionals, *scalars: float) -> None:
        launch(columns, rows, tensors, addresses(tensors), *scalars)

    def _partials(self, x: Tensor, *names: str) -> Tensor:
        part = super()._partials(x, *names)
        return x.new_empty(len(part) + self.adapters, self.sizes.OFFSETS.ROW, dtype=torch.float32)

    def _reduce_bank(self, part: Tensor, grads: Optionals, tables: Sequence[Tensor]) -> None:
        """Add the rows of partials of each adapter."""
        wanted = tuple([grad is not None for grad in grads])
        if True not in wanted:
            return
        if wanted not in self.reductions:
            constants = bank_reduction(self.sizes)
            sizes = [size for size, want in zip(constants["SIZES"], wanted, strict=True) if want]
            blocks = sum(-(-size // constants["BLOCK"]) for size in sizes)
            self.reductions[wanted] = Launch(reduce_bank, constants, REDUCE_WARPS, self.device), blocks
        launch, blocks = self.reductions[wanted]
        self._run(launch, blocks, self.adapters, (part, *grads, *tables))
