"""The inputs of a lowered model: what callers give, what follows from it, and what is refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.rewrite.analysis.reach import out_of_reach
from reroll.rewrite.capture.pictures import ROLE
from reroll.rewrite.ir.defaults import fitted
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input
from reroll.runtime.functions.documents import Documents, documents_of
from reroll.runtime.lowering.assembly import Assembly, Default
from reroll.runtime.models.config import RerollConfig

F = TypeVar("F", bound=Callable[..., Any])

# arguments that callers pass to every model of transformers, and that change no output
_NO_EFFECT = frozenset(
    {
        "use_cache",
        "cache_position",
        "logits_to_keep",
        "return_loss",
        "num_items_in_batch",
        "interpolate_pos_encoding",
        # generate passes on what it looked for stop strings with
        "tokenizer",
    }
)

# packed documents for kernels, which repeat what `position_ids` say
_PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


def naming(*names: str, like: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Add inputs to a forward's signature that it takes as keyword arguments.

    A trainer keeps only the columns of a dataset that are in the signature. With these added, the
    columns are either read or refused. `like` is a forward whose signature is extended instead of
    the function's own.
    """

    def extended(forward: F) -> F:
        signature = inspect.signature(like or forward)
        *parameters, others = signature.parameters.values()
        added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
        whole = signature.replace(parameters=[*parameters, *added, others])
        forward.__signature__ = whole  # type: ignore[attr-defined]
        return forward

    return extended


class ProgramInputs:
    """Completes the inputs of a Program from the arguments of a `forward`, or refuses them."""

    config: RerollConfig
    training: bool
    main_input_name: str
    is_gradient_checkpointing: bool
    _assembly: Assembly
    _input_names: frozenset[str]
    # a token that stands for embeddings
    _ordinary: int

    @property
    def program(self) -> Program:
        """The Program that the model runs."""
        raise NotImplementedError

    def documents(
        self, inputs: Mapping[str, Tensor | None], use_cache: bool | None, past: Any
    ) -> Documents | None:
        """Find the documents of packed rows, where the original keeps them apart: without a cache.

        `use_cache` is what the caller requested.
        """
        caches = self.config.use_cache if use_cache is None else use_cache
        trains = self.training and self.is_gradient_checkpointing
        if past is not None or (caches and not trains):
            return None
        return documents_of(self.program.inputs, inputs, self._assembly.interface.mixing)

    def explained(
        self, error: Exception, inputs: Mapping[str, Tensor | None], layers: Any
    ) -> Exception:
        """Convert an error to one about the inputs if these caused it, else return it unchanged."""
        past = 0 if layers is None else int(layers[0].get_seq_length())
        known = out_of_reach(self.program, inputs, past)
        if known is not None:
            return known
        for item in self.program.inputs:
            value, tokens = inputs.get(item.name), self._data_beside(item, inputs)
            if item.role == "padding" and value is not None and value.dim() == 4:
                return UsageError(
                    "a mask with a row for each query does not fit this call",
                    where=item.name,
                    hint="give it as [batch, tokens], which recurrences and convolutions need, and "
                    "windows behind a cache",
                )
            if not item.counts or value is None or tokens is None:
                continue
            if value.shape[-1] != tokens.shape[1]:
                return UsageError(
                    f"there are {value.shape[-1]} positions for {tokens.shape[1]} tokens",
                    where=item.name,
                )
        return error

    def _arguments(self, inputs: Mapping[str, Tensor | None], layers: Any) -> list[Tensor | None]:
        """Return the Program's inputs in order, with the original's defaults for those left out."""
        values = {i.name: inputs.get(i.name) for i in self.program.inputs}
        past = 0 if layers is None else layers[0].get_seq_length()
        return self._completed(values, self.program.inputs, past)

    def _completed(
        self, values: dict[str, Tensor | None], items: Iterable[Input], past: Any
    ) -> list[Tensor | None]:
        """Return all values in order, computing those of `items` that were left out.

        Values with one row are expanded to the batch. Raises UsageError for floats in place of ids.
        """
        for item in items:
            value = values[item.name]
            if value is None:
                values[item.name] = self._default(item, values, past)
            elif item.role == "data" and value.is_floating_point():
                if not item.type.dtype.is_floating_point:
                    raise UsageError(
                        f"{item.name} are whole numbers, not {value.dtype}",
                        where=type(self).__name__,
                    )
                # processors return pixels and audio in fp32, which many originals convert first
                values[item.name] = value.to(item.type.dtype)
            elif item.role != "data" and value.shape[0] == 1:
                values[item.name] = fitted(item, value, self._sizes(item, values)[0])
            if item.role == "padding":
                values[item.name] = self._as_long(item, values, past)
        return list(values.values())

    def _as_long(self, item: Input, values: Mapping[str, Tensor | None], past: Any) -> Any:
        """Extend a padding mask [batch, tokens] to all tokens, with zeros, as in transformers.

        For attention that is not causal, a mask that hides nothing stays as it is. With a past, the
        columns behind the last token are cut off, but for a static cache, whose masks are as long
        as it is.
        """
        mask = values[item.name]
        if mask is None or mask.dim() != 2 or torch.compiler.is_compiling():
            return mask
        missing = int(past) + self._sizes(item, values)[1] - mask.shape[1]
        decoder = item.name.startswith("decoder_") or not self.config.is_encoder_decoder
        causal = self.program.has_past and decoder
        if missing < 0 and causal and isinstance(past, int):
            return mask[:, :missing]
        if missing <= 0 or (not causal and bool(mask.all())):
            return mask
        return nn.functional.pad(mask, (0, missing))

    def refuse_unread(self, inputs: Mapping[str, Any], read: Collection[str] = ()) -> None:
        """Raise UsageError for values that the Program has no input for.

        `read` are names that the caller uses itself. Token types that are all zero are accepted,
        unless the capture left that input out, and packed documents beside positions.
        """
        positions = inputs.get("position_ids") is not None and "position_ids" in self._input_names
        read = {*read, *_NO_EFFECT, *self._input_names, *self.program.origin.unread}
        read |= _PACKED if positions else frozenset()
        for name, value in inputs.items():
            if name in read or value is None or value is False:
                continue
            tensors = [t for t in _flat(value) if isinstance(t, Tensor)]
            types = name.endswith("token_type_ids") and self._left_out(name) is None
            if types and not any(t.any() for t in tensors):
                continue
            raise self.unread_input(name)

    def unread_input(self, name: str) -> UsageError:
        """Make the error for an input that the Program does not have."""
        captured = f"it was captured with {', '.join(sorted(self._input_names))}"
        return UsageError(
            f"the model has no input {name}",
            where=type(self).__name__,
            hint=self._left_out(name) or captured,
        )

    def _left_out(self, name: str) -> str | None:
        """Return the remark about an input that the capture left out, or None."""
        word = re.compile(rf"\b{re.escape(name)}\b")
        return next((r for r in self.program.origin.remarks if word.search(r)), None)

    def _default(
        self, item: Input, values: Mapping[str, Tensor | None], past: Any
    ) -> Tensor | None:
        """Return the default of an input that was left out; None if a missing value is allowed.

        Raises UsageError for an input that has no default.
        """
        default = self._assembly.defaults.get(item.name)
        # after a past, a mask computed from the new tokens is too short, and no mask hides nothing
        if default is not None and (item.role != "padding" or _is_zero(past)):
            return self._computed(item, default, values, past)
        if item.role == "data":
            raise UsageError(f"the input {item.name} is missing", where=type(self).__name__)
        if item.role == ROLE or (
            item.role == "padding" and item.name not in self._assembly.interface.masks
        ):
            return None
        return self._counted(item, values, past)

    def _computed(
        self, item: Input, default: Default, values: Mapping[str, Tensor | None], past: Any
    ) -> Tensor:
        """Compute a default that is a function of the inputs before it."""
        arguments = []
        for other in self.program.inputs:
            if other.name not in default.reads:
                continue
            value = values[other.name]
            unread = other.name not in default.looks_into
            if other.role == "padding" and (value is None or unread):
                value = self._counted(other, values, past)
            elif value is None or (other.role == "padding" and value.dim() != 2):
                raise UsageError(
                    f"{item.name} is missing, and follows from {other.name} [batch, tokens] only",
                    where=type(self).__name__,
                )
            arguments.append(value)
        value = default.function(self, *arguments)[0].to(item.type.dtype)
        batch = value.shape[0] if item.role == "data" else self._sizes(item, values)[0]
        return fitted(item, value, batch)

    def _counted(self, item: Input, values: Mapping[str, Tensor | None], past: Any) -> Tensor:
        """Compute a default that follows from sizes, according to the input's role."""
        batch, length, device = self._sizes(item, values)
        if item.counts:
            positions: Tensor = torch.arange(length, device=device) + past
            return positions.expand(batch, -1)
        if item.role == "padding":
            return torch.ones(batch, int(past) + length, dtype=item.type.dtype, device=device)
        return torch.zeros(batch, length, dtype=item.type.dtype, device=device)

    def _sizes(
        self, item: Input, values: Mapping[str, Tensor | None]
    ) -> tuple[int, int, torch.device]:
        """Return batch, length and device of the data that an input belongs to."""
        value = self._data_beside(item, values)
        if value is None:
            raise UsageError(f"the input {item.name} is missing", where=type(self).__name__)
        return value.shape[0], value.shape[1], value.device

    def _data_beside(self, item: Input, values: Mapping[str, Tensor | None]) -> Tensor | None:
        """Return the data of the encoder or decoder that an input belongs to, or None."""
        decoder = item.name.startswith("decoder_")
        return next(
            (
                values.get(other.name)
                for other in self.program.inputs
                if other.role == "data" and other.name.startswith("decoder_") == decoder
            ),
            None,
        )

    def _tokens(
        self, ids: Tensor | None, embeddings: Tensor | None, name: str | None = None
    ) -> Tensor | None:
        """Return the token ids; for embeddings, ids of the same size whose values are not read.

        `name` is that of the input, by default the main one.
        """
        if embeddings is None:
            return ids
        takes = self._assembly.interface.takes_embeddings
        if ids is not None or (name or self.main_input_name) not in takes:
            why = "both tokens and embeddings" if ids is not None else "embeddings for this model"
            raise UsageError(f"forward cannot take {why}", where=type(self).__name__)
        return torch.full(
            embeddings.shape[:2], self._ordinary, dtype=torch.long, device=embeddings.device
        )

    def _given(self, embeddings: Tensor | None, name: str | None = None) -> dict[str, Tensor]:
        """Return embeddings by the input in whose place they are given, by default the main one."""
        return {} if embeddings is None else {name or self.main_input_name: embeddings}

    def _refuse_derived(self, inputs: Mapping[str, Tensor | None]) -> None:
        """Raise UsageError for embeddings where another input is computed from the tokens."""
        for item in self.program.inputs:
            if item.role == "data" and item.default is not None and inputs.get(item.name) is None:
                raise UsageError(
                    f"the input {item.name} is missing, and does not follow from embeddings",
                    where=type(self).__name__,
                )


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_zero(past: Any) -> bool:
    # the length of a static cache is a tensor, whose value cannot be read while compiling
    return isinstance(past, int) and past == 0
