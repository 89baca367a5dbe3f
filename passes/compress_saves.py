"""Let norms, ReLUs, pools and dropouts keep less for backward, where weight gradients are sparse.

With `norm_saves` other than "exact", so does what `swatfx.ops.coded.RULES` has a rule for, and
attention keeps codes; without, torch's attention no longer keeps its result or weights. Calls of it
by modules that tracing left to Python are seen to when they run (`compiled.eager_attention`).

Reads nodes, modules and LayerPlans; replaces batch norm (with the addition and the ReLU behind it,
if nobody else reads what lies between), ReLU, 2d pooling and dropout by calls of leaves below
`swat` (`swatfx.compiled.saves`), which the model's own modules go on to rule. Values stay what they
are, and so do parameters and their names. What has hooks, is parametrized, or works in place on a
tensor that others read, stays as it is. A second run finds nothing left and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from passes.reading.aliasing import Versions
from passes.reading.effects import storage_of
from passes.reading.saving_calls import ATTENTION, Calls
from passes.tracing.composites.window import window_attend
from passes.writing.saving_leaves import Leaves, replace_by_leaf
from swatfx import meta
from swatfx.compiled import SwatModule, all_parts, evaluate, join, relative, saves, sparse_nodes
from swatfx.meta import LayerPlan
from swatfx.ops.codes import BITS
from swatfx.passing import Context, PassResult


def compress_saves(gm: SwatModule, ctx: Context) -> PassResult:
    """Rewrite the root graph and every part, if at least one weight gradient is sparse."""
    if not any(_packs(x.plan) or _samples(x.plan) for x in sparse_nodes(gm)):
        return PassResult(gm, False, ("no weight gradient is sparse: every op keeps what it kept",))
    leaves = Leaves(gm)
    count = sum(_Rewriter(gm, part, prefix, leaves).run() for prefix, part in all_parts(gm))
    if gm.eager or gm.otherwise:
        leaf = leaves.attention_in_eager_code()
        for _, part in all_parts(gm):
            part.__dict__["eager_attention"] = leaf
    return PassResult(gm, count > 0, (f"{count} calls keep less",))


def _packs(plan: LayerPlan) -> bool:
    return plan.rule.backward_activation and not plan.activation_density.is_dense


def _samples(plan: LayerPlan) -> bool:
    """Whether active weights alone receive gradients.

    Inputs stay dense then, but the layer may run sparse kernels, and norms follow their layout.
    """
    return plan.rule.update == "active" and not plan.weight_density.is_dense


def _keeps_its_input(node: fx.Node) -> bool:
    """Whether `node` is a layer that keeps its whole input for backward."""
    record = meta.read(node)
    if record.plan is None:
        return False
    return record.role != "op" or not record.plan.rule.backward_activation


class _Rewriter:
    """Rewrites one graph.

    All is decided on the graph as it was found, since positions and aliases are of that; arguments
    are read when a node is replaced, since by then others may have been.
    """

    def __init__(self, gm: SwatModule, part: fx.GraphModule, prefix: str, leaves: Leaves) -> None:
        self.part = part
        self.prefix = prefix
        self.leaves = leaves
        self.codes = gm.swat.options.norm_saves in BITS
        eager = {relative(prefix, path): reason for path, reason in gm.eager.items()}
        self.calls = Calls(part, eager)
        self.versions = Versions(part, eager)
        self.taken: set[fx.Node] = set()

    def run(self) -> int:
        """Rewrite what can be; return how many calls that made."""
        nodes = list(self.part.graph.nodes)
        found = [self._relu(node) for node in nodes]
        found += [self._other(node) for node in nodes if node not in self.taken]
        rewrites = [rewrite for rewrite in found if rewrite is not None]
        for rewrite in rewrites:
            rewrite()
        if rewrites:
            self.part.recompile()
        return len(rewrites)

    # ---- ReLU, alone or behind a norm ----

    def _relu(self, node: fx.Node) -> Callable[[], None] | None:
        call = self.calls.relu(node)
        if call is None:
            return None
        source, inplace = call
        norm: fx.Node | None = source
        total: fx.Node | None = None
        if self._is_alone(source) and self.calls.total(source) is not None:
            norm, total = self._norm_of_sum(source, node), source
        if norm is not None and self._can_wait(norm, node):
            self.taken.add(norm)
            return lambda: self._replace_norm(norm, node, total)
        if inplace and self.versions.is_seen(node):
            return None
        if any(_keeps_its_input(user) for user in node.users):
            return None  # what a layer keeps anyway costs ReLU nothing
        return lambda: self._replace_relu(node)

    def _replace_relu(self, node: fx.Node) -> None:
        call = self.calls.relu(node)
        assert call is not None  # decided before
        options = {"inplace": True} if call[1] else {}
        replace_by_leaf(node, self.leaves.shared("relu"), call[:1], options)

    def _is_alone(self, node: fx.Node) -> bool:
        return len(node.users) == 1

    def _norm_of_sum(self, total: fx.Node, reader: fx.Node) -> fx.Node | None:
        """A norm that a sum reads and that can wait for `reader`, as the other operand can."""
        call = self.calls.total(total)
        assert call is not None  # the caller has asked
        one, other, writes = call
        # The second if both are norms: that is mostly the shortcut's, and computed last.
        pairs = [(other, one), (one, other)]
        for norm, residual in pairs[1:] if writes and self.versions.is_seen(total) else pairs:
            settled = norm is not residual and self._unchanged(residual, total.next, reader)
            if settled and self._can_wait(norm, reader):
                return norm
        return None

    def _can_wait(self, norm: fx.Node, reader: fx.Node) -> bool:
        """Whether `norm` is one that may as well be computed where `reader` is."""
        args = self.calls.norm(norm)
        if args is None or not self._is_alone(norm):
            return False
        total = next(iter(norm.users))
        node = norm.next
        while node is not reader:
            if node is not total and self._meets_state(node, norm):
                return False
            node = node.next
        return self._unchanged(args[0], norm, reader)

    def _meets_state(self, node: fx.Node, norm: fx.Node) -> bool:
        """Whether `node` may read or write parameters or statistics of `norm`, or its mode."""
        if self.versions.is_foreign(node):
            return True
        args = self.calls.norm(norm)
        assert args is not None  # the caller has asked
        given = [a for a in args[1:5] if isinstance(a, fx.Node)]
        if any(self.versions.shares(n, other) for n in node.all_input_nodes for other in given):
            return True
        # What comes from elsewhere than the model's own tensors may be any of them.
        told = all(self.versions.sources(n) or not self.versions.is_outside(n) for n in given)
        return not told or not self._storages(node).isdisjoint(self._storages(norm))

    def _storages(self, node: fx.Node) -> set[int]:
        """Of the parameters and buffers that `node` may read or write."""
        found: list[Tensor | None] = []
        if node.op == "call_module":
            module = self.part.get_submodule(str(node.target))
            found += [*module.parameters(), *module.buffers()]
        for source in node.all_input_nodes:
            found += [evaluate(self.part, n) for n in self.versions.sources(source)]
        return {storage_of(t) for t in found if t is not None}

    def _unchanged(self, tensor: fx.Node, first: fx.Node, then: fx.Node) -> bool:
        """Whether nobody writes into `tensor` between two of its readers."""
        return self.versions.of(tensor, first) == self.versions.of(tensor, then)

    def _replace_norm(self, norm: fx.Node, last: fx.Node, total: fx.Node | None) -> None:
        """A call of a leaf in place of `last`; the norm and the sum before it go."""
        args = self.calls.norm(norm)
        assert args is not None  # decided before
        options: dict[str, Any] = {}
        if total is not None:
            call = self.calls.total(total)
            assert call is not None
            one, other, writes = call
            options["residual"] = other if one is norm else one
            if writes:
                options["into"] = saves.NORM if one is norm else saves.RESIDUAL
        if last is not norm:
            options["relu"] = True
            relu = self.calls.relu(last)
            if relu is not None and relu[1]:
                options["inplace"] = True
        if norm.op == "call_module":
            target = self.leaves.norm(join(self.prefix, str(norm.target)))
        else:
            target = self.leaves.functional_norm()
        replace_by_leaf(last, target, args, options)
        for node in (total, norm):
            if node is not None and node is not last:
                self.part.graph.erase_node(node)

    # ---- The rest ----

    def _other(self, node: fx.Node) -> Callable[[], None] | None:
        if self.calls.norm(node) is not None:
            return lambda: self._replace_norm(node, node, None)
        # Written out, attention is recomputed by other means than eager's: for who asked for codes.
        exact = node.target is not window_attend
        if node.op == "call_function" and node.target in ATTENTION and (self.codes or exact):
            return lambda: self._replace_attention(node)
        coded = self.calls.coded(node) if self.codes else None
        if coded is not None:
            if coded[2] and self.versions.is_seen(node):
                return None
            return lambda: self._replace_coded(node)
        if self.calls.pool(node) is not None:
            return lambda: self._replace_pool(node)
        dropout = self.calls.dropout(node)
        if dropout is None or (dropout[1] and self.versions.is_seen(node)):
            return None
        return lambda: self._replace_dropout(node)

    def _replace_attention(self, node: fx.Node) -> None:
        function: Any = node.target
        target = self.leaves.attention(function, ATTENTION[function])
        replace_by_leaf(node, target, node.args, node.kwargs)

    def _replace_coded(self, node: fx.Node) -> None:
        call = self.calls.coded(node)
        assert call is not None  # decided before
        rule, args, _ = call
        replace_by_leaf(node, self.leaves.of_rule(rule, node, self.prefix), args)

    def _replace_pool(self, node: fx.Node) -> None:
        call = self.calls.pool(node)
        assert call is not None  # decided before
        args = (node.all_input_nodes[0], *call[1])
        replace_by_leaf(node, self.leaves.shared(call[0]), args)

    def _replace_dropout(self, node: fx.Node) -> None:
        call = self.calls.dropout(node)
        assert call is not None  # decided before
        if node.op == "call_module":
            target = self.leaves.dropout(join(self.prefix, str(node.target)))
        else:
            target = self.leaves.shared("dropout")
        replace_by_leaf(node, target, call[0])
