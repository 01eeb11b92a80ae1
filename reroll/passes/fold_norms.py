"""Fold norms: turn LayerNorm into RMSNorm, with its mean and its affine part in other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.analysis.residual import Stream, Tracer, channels
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.hidden import STATES, drop_marks, marked_names
from reroll.rewrite.ir.matching import all_arguments
from reroll.rewrite.ir.ops import RMS_NORM
from reroll.rewrite.ir.patterns import Miss, nearest
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weight_edit import WeightEditor
from reroll.rewrite.ir.weights import Expr, add, centre, matvec, mul, reshape
from reroll.rewrite.pipeline.base import Context, Pass, option

aten = torch.ops.aten
LAYER_NORM = aten.layer_norm.default
LINEAR = aten.linear.default


class FoldNorms(Pass):
    """Turn LayerNorm into RMSNorm, exactly, where a stack of layers is pre-norm.

    Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers" (arXiv 2305.14858), section 3. A
    LayerNorm first subtracts the mean over the channels. If everything that writes to the residual
    stream has mean zero, that subtraction does nothing. So the matrices and biases that write to
    the stream are centred over their outputs, and embeddings over their channels. Some writers
    outside loops cannot be centred in their weights: an embedding that is also the head, a
    LayerNorm after the embeddings, a patch projection. They get one explicit mean subtraction each.
    Layer scales are multiplied into the matrix before them.

    The norm's weight and bias then go into the linear layers that read it, which gain a bias if
    they have none. They stay as the weight of the RMSNorm and an addition after it where something
    else reads the norm too. They also stay where folding would take another matrix. That is so with
    tied blocks under norms that differ by depth, or with a head that is tied to the embeddings.
    `untie` gives the embeddings a table of their own, so that the head can be folded into.

    A stream that is read by anything but norms, as in post-norm models, cannot be converted; the
    nearest miss names the node that prevents it. Without any LayerNorm the program stays as it is.
    """

    name = "fold_norms"
    contract = "exact"

    untie: bool = option(False, help="untie head and embeddings, for one more vocabulary matrix")

    def run(self, program: Program, context: Context) -> Program:
        norms = [n for _, g in program.graphs() for n in g.nodes if n.target is LAYER_NORM]
        if not norms:
            context.remark("there is no LayerNorm")
            return program
        folder = _Folder(program, context)
        if self.untie:
            folder.untie_embeddings()
        done: dict[fx.Node, None] = {}
        misses: dict[fx.Node, Miss] = {}
        for norm in norms:
            if norm in done or norm in misses:
                continue
            # traced anew each time, because one stream's norm may write to the next
            stream = folder.convertible(norm)
            if isinstance(stream, Miss):
                misses[norm] = replace(stream, pattern=norm.name)
                continue
            readers = dict(stream.readers)
            folder.fold(stream)
            done.update(readers)
        for miss in dict.fromkeys(misses.values()):
            context.remark(f"not converted: {miss}")
        if not done:
            raise PassError(
                f"no LayerNorm can become an RMSNorm: {nearest(misses.values())}",
                hint="only streams that nothing but norms read, as in pre-norm models, can",
            )
        context.remark(f"{len(done)} of {len(norms)} LayerNorm nodes are RMSNorm now")
        result = folder.edit.result()
        if any(marked_names(result, STATES)):
            drop_marks(result, STATES)
            context.remark("hidden states are centred now, so the model does not give them")
        return result


class _Folder:
    """Converter of residual streams, one after the other; it edits the graphs in place."""

    def __init__(self, program: Program, context: Context) -> None:
        self.edit = WeightEditor(program)
        self.tracer = Tracer(program)
        self.context = context

    # ---- whether a stream can be converted

    def convertible(self, norm: fx.Node) -> Stream | Miss:
        """Return the stream that a norm reads, or the reason why it cannot be converted."""
        start = norm.args[0]
        assert isinstance(start, fx.Node)
        stream = self.tracer.trace(start)
        if isinstance(stream, Miss):
            return stream
        size = len(stream.nodes)
        for reader in stream.readers:
            if reader.target is not LAYER_NORM or reader.args[1] != [channels(reader)]:
                reason = f"{reader.name} reads the residual stream, and its mean with it"
                return Miss(reason, (reader.name,), depth=size)
        subtracted = 0
        for writer in stream.writers:
            if self.centring(writer) is None:
                loop = self.tracer.in_loop(writer)
                if loop is not None:
                    reason = (
                        f"{writer.name} ({writer.target}) writes to the residual stream of "
                        f"{loop.name}, and its mean is not in its weights"
                    )
                    return Miss(reason, (writer.name,), depth=size)
                subtracted += 1
        if subtracted >= sum(map(self.times, stream.readers)):
            return Miss("converting it would add as many mean subtractions as it removes", depth=1)
        return stream

    def times(self, node: fx.Node) -> int:
        """Return how often a node runs."""
        loop = self.tracer.in_loop(node)
        return 1 if loop is None else loop.trips

    def centring(self, writer: fx.Node) -> Callable[[], None] | None:
        """Return a function that centres a node's output in its weights, or None."""
        if writer.target is LINEAR and self.edit.owns(writer, *_weights(writer)):
            return lambda: self.centre_linear(writer)
        if writer.target is aten.mul.Tensor:
            return self.centring_of_scaled(writer)
        if writer.target is aten.embedding.default and self.edit.owns(writer, writer.args[0]):
            table = _name(writer.args[0])
            return lambda: self.edit.change(table, lambda e: centre(e, 1))
        if writer.op == "get_attr" and self.edit.owns(None, writer):
            last = len(self.edit.weights[_name(writer)].meta.shape) - 1
            return lambda: self.edit.change(_name(writer), lambda e: centre(e, last))
        return None

    def centring_of_scaled(self, writer: fx.Node) -> Callable[[], None] | None:
        """Return the same for the product of a linear layer and a layer scale."""
        linear, gain = writer.args[:2]
        if isinstance(gain, fx.Node) and gain.target is LINEAR:
            linear, gain = gain, linear
        if not isinstance(linear, fx.Node) or linear.target is not LINEAR or len(linear.users) > 1:
            return None
        scaled, weights = linear, _weights(linear)
        if not self.edit.owns(scaled, *weights) or not self.edit.owns(writer, gain):
            return None
        if not all(self.edit.fits(_name(w), _name(gain)) for w in weights):
            return None

        def apply() -> None:
            for weight in weights:
                self.edit.combine(_name(weight), [_name(weight), _name(gain)], _scale_rows)
            writer.replace_all_uses_with(scaled)
            writer.graph.erase_node(writer)
            self.centre_linear(scaled)

        return apply

    # ---- converting it

    def fold(self, stream: Stream) -> None:
        """Centre the writers of a stream, and replace the LayerNorms that read it by RMSNorms."""
        for writer in stream.writers:
            centring = self.centring(writer)
            if centring is None:
                _subtract_mean(writer)
                self.context.remark(f"the mean of {writer.name} is taken away in the graph")
            else:
                centring()
        for norm in stream.readers:
            self.to_rms_norm(norm)

    def centre_linear(self, linear: fx.Node) -> None:
        """Centre the outputs of a linear layer."""
        for weight in _weights(linear):
            self.edit.change(_name(weight), lambda e: centre(e, 0))

    def to_rms_norm(self, norm: fx.Node) -> None:
        x, _, gain, shift, eps, *_ = all_arguments(norm)
        folded = self.foldable(norm, gain, shift)
        build = Builder(norm.graph)
        with build.before(norm):
            new = build.call(RMS_NORM, x, None if folded else gain, float(eps), 0.0)
            if not folded and shift is not None:
                new = build.call(aten.add.Tensor, new, shift)
        norm.replace_all_uses_with(new)
        norm.graph.erase_node(norm)
        if folded:
            for linear in list(new.users):
                self.fold_affine(linear, gain, shift)
        elif gain is not None or shift is not None:
            self.context.remark(f"the weights of {norm.name} stay in it")

    def foldable(self, norm: fx.Node, gain: object, shift: object) -> bool:
        """Whether a norm's affine part fits into the layers that read it, without more storage."""
        affine = [v for v in (gain, shift) if v is not None]
        if any(not isinstance(v, fx.Node) or v.op != "get_attr" for v in affine):
            return False
        for user in norm.users:
            weights = _weights(user) if user.target is LINEAR else []
            if not weights or norm in weights or not self.edit.owns(user, *weights):
                return False
            if any(
                not self.edit.fits(_name(w), *map(_name, (weights[0], *affine))) for w in weights
            ):
                return False
        return bool(norm.users)

    def fold_affine(self, linear: fx.Node, gain: object, shift: object) -> None:
        """Fold gain g and shift b of a norm: W (g x + b) + c = (W g) x + (W b + c)."""
        weight, *bias = map(_name, _weights(linear))
        if shift is not None and bias:
            parts = [bias[0], weight, _name(shift)]
            self.edit.combine(bias[0], parts, lambda c, w, b: add(c, matvec(w, b)))
        elif shift is not None:
            new = self.edit.free_name(f"{weight.removesuffix('.weight')}.bias")
            self.edit.combine(new, [weight, _name(shift)], matvec)
            with linear.graph.inserting_before(linear):
                linear.args = (*linear.args[:2], self.edit.node(linear.graph, new))
        if gain is not None:
            self.edit.combine(weight, [weight, _name(gain)], mul)

    def untie_embeddings(self) -> None:
        """Give every embedding whose table has other readers a centred table of its own."""
        graph = self.edit.program.graph
        for node in [n for n in graph.nodes if n.target is aten.embedding.default]:
            table = node.args[0]
            if isinstance(table, fx.Node) and table.op == "get_attr" and len(table.users) > 1:
                new = self.edit.copy(_name(table), "input_embedding.weight")
                # centred at once: a copy with equal values would be taken for tied
                self.edit.change(new, lambda e: centre(e, 1))
                with graph.inserting_before(node):
                    node.replace_input_with(table, self.edit.node(graph, new))


def _weights(linear: fx.Node) -> list[fx.Node]:
    """Return a linear layer's matrix and, if it has one, its bias."""
    return [a for a in linear.args[1:3] if isinstance(a, fx.Node)]


def _name(node: object) -> str:
    assert isinstance(node, fx.Node)
    return str(node.target)


def _scale_rows(x: Expr, gain: Expr) -> Expr:
    """Multiply a matrix's rows, or a vector's elements, by the elements of a vector."""
    rows = gain.meta.elements
    return mul(x, reshape(gain, (rows, *[1] * (len(x.meta.shape) - 1))))


def _subtract_mean(node: fx.Node) -> None:
    """Subtract the mean over the channels from a value, for everything that uses it."""
    build = Builder(node.graph)
    build.wrap(
        node, lambda x: build.call(aten.sub.Tensor, x, build.call(aten.mean.dim, x, [-1], True))
    )
