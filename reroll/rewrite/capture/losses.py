"""Find which loss a language model computes from its logits and labels.

Most models shift the labels by one token, so that each position predicts the next. Others compare
logits and labels position by position, and leave the shift to the caller. No configuration says
which. So the model runs without data on labels that are all different, and the targets that it
passes to cross entropy are intercepted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reroll.rewrite.capture.half_precision import without_data
from reroll.rewrite.ir.records import Loss

log = logging.getLogger(__name__)

IGNORED = -100


def loss_of(model: Any, inputs: Mapping[str, Tensor]) -> Loss | None:
    """Return the loss of a model on `inputs`; None if it has none, or neither of the two."""
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is None or tokens.ndim != 2:
        return None
    labels = torch.arange(tokens.numel()).reshape(tokens.shape)
    dtype = getattr(model, "dtype", torch.float32)
    with _kept(model), without_data(model, dtype), torch.no_grad():
        # some models read numbers from tensors to check them, others to split tensors by them
        for zeros in (False, True):
            try:
                target = _run(model, inputs, labels, zeros)
                return None if target is None else _alignment(labels, target)
            # a model may fail without labels, or without data, with any exception
            except Exception as error:
                log.info("the loss of %s is not known: %s", type(model).__name__, error)
    return None


def _run(model: Any, inputs: Mapping[str, Tensor], labels: Tensor, zeros: bool) -> Tensor | None:
    """Run a model; return the targets of the cross entropy that is its loss, else None.

    With `zeros`, numbers that it reads from its tensors are 0; else they are symbols.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode: FakeTensorMode = next(model.parameters()).fake_mode
    mode.shape_env, mode.allow_scalar_outputs = ShapeEnv(), True
    fakes = {n: mode.from_tensor(t.cpu(), static_shapes=True) for n, t in inputs.items()}
    with mode, _compiling(), _Intercepted(labels, zeros) as intercepted:
        loss = model(**fakes, labels=labels, return_dict=True).get("loss")
    return intercepted.target if loss is not None and loss is intercepted.loss else None


def _alignment(labels: Tensor, target: Tensor) -> Loss | None:
    """Return how the targets of a cross entropy, of any shape, follow from the labels."""
    following = labels[:, 1:]
    padded = torch.nn.functional.pad(following, (0, 1), value=IGNORED)
    known: dict[Loss, tuple[Tensor, ...]] = {"shifted": (following, padded), "aligned": (labels,)}
    for loss, targets in known.items():
        if any(torch.equal(target.flatten(), each.flatten()) for each in targets):
            return loss
    return None


@contextmanager
def _kept(model: Any) -> Iterator[None]:
    """Restore a model's configuration, into which classifiers write their kind of loss."""
    entries = vars(model.config)
    before = dict(entries)
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)


@contextmanager
def _compiling() -> Iterator[None]:
    """Let models choose kernels as under `torch.compile`, and not by values of tensors."""
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


class _Intercepted(TorchFunctionMode):
    """Interception of cross entropy; values computed from the labels alone are real tensors."""

    def __init__(self, labels: Tensor, zeros: bool) -> None:
        super().__init__()
        self.real, self.zeros = [labels], zeros
        self.target: Tensor | None = None
        self.loss: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        kwargs = kwargs or {}
        if func is torch.nn.functional.cross_entropy:
            return self._cross_entropy(*args, **kwargs)
        if func is torch.Tensor.nonzero:
            # loops over elements selected by data run zero times
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is torch.Tensor.item and self.zeros:
            return 0
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        if not tensors or not all(any(t is each for each in self.real) for t in tensors):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self.real.append(result)
        return result

    def _cross_entropy(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        plain = {"weight": None, "ignore_index": IGNORED, "reduction": "mean"}
        usual = all(options.get(name, value) == value for name, value in plain.items())
        known = any(target is each for each in self.real)
        # of several calls the last counts: the model returns it if it is the whole loss
        self.target = target if usual and known and not options.get("label_smoothing") else None
        self.loss = input.sum()
        return self.loss
