"""The base class of all lowered models: a `PreTrainedModel` that runs generated code."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reroll.errors import UsageError
from reroll.rewrite.analysis.dropout import dropout_remark
from reroll.rewrite.analysis.state_plan import stateful_nodes
from reroll.rewrite.capture.pictures import picture_inputs
from reroll.rewrite.ir.defaults import ordinary_token
from reroll.rewrite.ir.dtypes import retype
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs
from reroll.runtime.functions.loops import ForwardState
from reroll.runtime.functions.trips import set_trips
from reroll.runtime.lowering.assembly import Assembly, assemble, reassemble
from reroll.runtime.lowering.modules import Slot, share, shared_tensors, tied_names
from reroll.runtime.lowering.recapture import from_stored, kept_tensors, program_of
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.generation import generation_config
from reroll.runtime.models.inputs import ProgramInputs
from reroll.runtime.models.loading import program_beside
from reroll.runtime.state.caches import append_exactly, layers_of, update_function

log = logging.getLogger(__name__)


class RerollPreTrainedModel(ProgramInputs, PreTrainedModel):
    """A lowered Program with the interface of transformers' models.

    Its weights have the original's names, with one module per trip of a loop. It is made by
    `reroll.runtime.lowering.lower` or `from_pretrained`.
    """

    config_class = RerollConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # set for each model: see `decodes_in_one_graph`
    _can_compile_fullgraph = False
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config: RerollConfig, program: Program | None = None) -> None:
        super().__init__(config)
        given, program = program, program or program_beside(config, type(self).__name__)
        if self.can_generate() and (settings := generation_config(program)) is not None:
            self.generation_config = settings
        self._assembly: Assembly = assemble(self, program)
        self._input_names = frozenset(i.name for i in program.inputs)
        self._ordinary = ordinary_token(program)
        self.main_input_name = next(i.name for i in program.inputs if i.role == "data")
        self._tied_weights_keys = dict(tied_names(self))
        self._no_split_modules = sorted({type(t).__name__ for t in self.trip_modules()})
        self._can_compile_fullgraph = decodes_in_one_graph(self)
        self.post_init()
        self.all_tied_weights_keys = dict(self._tied_weights_keys)
        if given is None and torch.get_default_device().type != "meta":
            # as in a model of transformers, only parameters are without data
            self.load_weights(only=lambda slot: not slot.is_parameter)

    @property
    def program(self) -> Program:
        """The Program that this model runs, with the weights from which it was made."""
        return self._assembly.program

    @property
    def keeps_cache(self) -> bool:
        """Whether a cache holds all that new tokens need of earlier ones.

        New tokens are then computed alone. A model that was captured without a cache keeps none,
        even if a pass has inserted recurrences: its other operations that mix tokens have no state.
        """
        return bool(self._assembly.layers) and self.program.has_past

    # whether the weights of the Program are in the modules
    _has_weights = False

    @property
    def masks_keys_only(self) -> bool:
        """Whether the padding of tokens is read by attentions and recurrences alone."""
        names = {i.name for i in self.program.inputs if i.role == "padding"}
        return not names & self._assembly.interface.masks

    def load_weights(
        self,
        device: torch.device | str | None = None,
        *,
        put: Callable[[Slot, Tensor], None] | None = None,
        only: Callable[[Slot], bool] | None = None,
    ) -> None:
        """Compute the Program's weights and set them in the modules.

        `put` takes the holders of each weight and the weight, instead of setting it on a `device`.
        Weights of which `only` is false are left alone.
        """
        slots = self._assembly.tree.slots
        table = self.program.weights
        slot_of = {
            at: slots[key]
            for key, at in table.distinct().items()
            if key in slots and (only is None or only(slots[key]))
        }
        outputs = [Output(name, entry, table[name].entries[entry]) for name, entry in slot_of]
        for name, entry, tensor in evaluate_outputs(outputs, self.program.source):
            slot = slot_of[name, entry]
            if put is not None:
                put(slot, tensor)
            else:
                slot.fill(tensor.to(device) if device is not None else tensor)
        if only is None:
            self._has_weights = True

    def slot_names(self) -> dict[int, list[str]]:
        """Return the names of the tensors that each slot fills, by the identity of the slot."""
        paths = {module: name for name, module in self.named_modules()}
        return {
            id(slot): [f"{paths[m]}.{leaf}".lstrip(".") for m, leaf in slot.holders]
            for slot in self._assembly.tree.slots.values()
        }

    def code(self) -> Mapping[str, str]:
        """Return the generated Python source: "main", and one function per loop."""
        return dict(self._assembly.sources)

    def compile_trips(self, **options: Any) -> None:
        """Compile the body of each loop once for all its trips, by `torch.compile`.

        `options` are those of `torch.compile`.
        """
        for trip in self.trip_modules():
            trip.compile(**options)

    def set_trips(
        self, trips: int | None, *, backprop: int | None = None, loop: str | None = None
    ) -> None:
        """Set the number of trips for later forwards; None is the number of the Program.

        It applies to loops whose trips are all alike, as `loop_core` makes them: to the one that
        `loop` names, or to all with several trips. With `backprop`, gradients flow through that
        many last trips only. `reroll.sample_trips` draws numbers for training. Raises UsageError if
        the trips differ, or if a number is less than one.
        """
        set_trips(self.program, self._assembly.loops, trips, backprop, loop)

    def trip_modules(self) -> list[nn.Module]:
        """Return the trips of all loops, in the order in which they run."""
        return [t for trips in self._assembly.loops.values() for t in trips.modules]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a directory or hub repository that reroll saved: `reroll.runtime.models.loading`."""
        from reroll.runtime.models.loading import load_model

        del args
        return load_model(cls, pretrained_model_name_or_path, **kwargs)

    def to_program(self) -> Program:
        """Return the Program with the present weights of the model."""
        return program_of(self)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as `Program.save` does, with the present weights and configurations.

        See `reroll.runtime.models.saving`. In an existing directory, only files of the same names
        are replaced. Arguments that say how transformers lays out its own checkpoints have no
        effect.
        """
        from reroll.runtime.models.saving import save_model

        if push_to_hub:
            raise UsageError(
                "a lowered model is not pushed by save_pretrained",
                hint="save it, and upload the directory: hf upload REPOSITORY DIRECTORY",
            )
        if is_main_process:
            save_model(self, str(save_directory), state_dict, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict of this model, or the tensors of a file that it has saved.

        A file has one name for a weight that modules share. If it is not `strict`, the others count
        as missing, as in transformers.
        """
        shared = shared_tensors(self)
        state_dict = from_stored(self, state_dict, every=strict)
        result = super().load_state_dict(state_dict, strict, assign)
        share(shared)
        self._has_weights = True
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the model or change its dtype; `to`, `half` and others call this.

        Another dtype means another Program. Tensors that this Program keeps in fp32, such as the
        frequencies of rotary embeddings, stay in fp32. Raises UsageError if the Program does not
        run in the dtype.
        """
        if "_assembly" not in self.__dict__:
            return super()._apply(fn, recurse)
        shared = shared_tensors(self)
        dtype = fn(torch.empty(0, dtype=self.program.dtype)).dtype
        if dtype == self.program.dtype:
            super()._apply(fn, recurse)
        else:
            program = retype(self.program, dtype)
            kept = {id(t) for t in kept_tensors(self, program)}
            super()._apply(
                lambda t: t.to(fn(t.new_empty(0)).device) if id(t) in kept else fn(t), recurse
            )
            self._assembly = reassemble(program, self._assembly.loops, self._assembly.tree)
            self.config.dtype = dtype
        share(shared)
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> Any:
        """Give the weights memory on a device, without values; `init_weights` then sets them."""
        super().to_empty(device=device, recurse=recurse)
        self._has_weights = False
        return self

    # whether a call of `train` has said that nothing drops out
    _told_dropout = False

    def train(self, mode: bool = True) -> Any:
        """Set training mode; warn once if the original drops out in it: this model does not."""
        remark = dropout_remark(self.program.origin.config) if mode else None
        if remark is not None and not self._told_dropout:
            self._told_dropout = True
            log.warning("%s: %s", type(self).__name__, remark)
        return super().train(mode)

    # ---- running

    def run_program(
        self, inputs: Mapping[str, Tensor | None], past: Any = None, **wishes: Any
    ) -> tuple[dict[str, Tensor], ForwardState]:
        """Run the Program, and return its outputs by name and the final `ForwardState`.

        `past` is a transformers cache; see `ForwardState` for `wishes`.
        """
        outputs, state = self.run_function(self._assembly.main, inputs, past, **wishes)
        return self.named_outputs(outputs), state

    def returned(self, result: Any, return_dict: bool | None) -> Any:
        """Return a result as it is, or as a tuple where the caller or the configuration asks."""
        wanted = self.config.return_dict if return_dict is None else return_dict
        return result if wanted else result.to_tuple()

    def named_outputs(self, outputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """Return the Program's outputs by name, without those that a call does not have."""
        named = zip(self.program.outputs, outputs, strict=True)
        return {name: value for name, value in named if value is not None}

    def run_function(
        self,
        function: Callable[..., tuple[Any, ...]],
        inputs: Mapping[str, Tensor | None],
        past: Any = None,
        **wishes: Any,
    ) -> tuple[tuple[Any, ...], ForwardState]:
        """Run a function of the assembly over the Program's inputs, as `run_program` does."""
        if wishes.get("embeddings"):
            self._refuse_derived(inputs)
        layers = layers_of(past, self._assembly.layers)
        state = ForwardState(self._assembly.loops, layers, **wishes)
        try:
            return function(self, *self._arguments(inputs, layers), state), state
        except (IndexError, RuntimeError) as error:
            raise self.explained(error, inputs, layers) from error

    # ---- the interface of transformers' models

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Raise UsageError for arguments of `generate` that the Program does not read.

        transformers' own check runs afterwards, on the others.
        """
        named = inspect.signature(self.forward).parameters
        self.refuse_unread({k: v for k, v in model_kwargs.items() if k not in named})
        rest = {
            name: value
            for name, value in model_kwargs.items()
            if name not in self._input_names and not name.endswith("token_type_ids")
        }
        super()._validate_model_kwargs(rest)

    def get_input_embeddings(self) -> nn.Module:
        reading = self._embedding_path()
        if reading is None:
            raise NotImplementedError("the model has no input embeddings")
        module: nn.Module = self.get_submodule(reading)
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        reading = self._embedding_path()
        if reading is None:
            raise NotImplementedError("the model has no input embeddings")
        owner, _, leaf = reading.rpartition(".")
        setattr(self.get_submodule(owner), leaf, value)

    def get_output_embeddings(self) -> nn.Module | None:
        path = self._assembly.interface.head
        return None if path is None else self.get_submodule(path)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        path = self._assembly.interface.head
        if path is None:
            raise NotImplementedError("the model has no output embeddings")
        owner, _, leaf = path.rpartition(".")
        setattr(self.get_submodule(owner), leaf, new_embeddings)

    def _embedding_path(self) -> str | None:
        paths = self._assembly.interface.embeddings
        # where the encoder reads no tokens, those of the decoder
        return paths.get(self.main_input_name) or next(iter(paths.values()), None)

    def init_weights(self) -> None:
        """Set the weights of the Program where the model has none: after `to_empty`.

        A model on the meta device stays there.
        """
        tensors = [*self.parameters(), *self.buffers()]
        if not self._has_weights and all(t.device.type != "meta" for t in tensors):
            self.load_weights(tensors[0].device)

    def initialize_weights(self) -> None:
        """Set the weights of the Program where the model has none, as `init_weights` does."""
        self.init_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Set a module's weights: those of the Program, or random ones if it has none for it."""

        def holds(slot: Slot) -> bool:
            return any(m is module for m, _ in slot.holders)

        if not any(map(holds, self._assembly.tree.slots.values())):
            super()._init_weights(module)
        elif (tensor := next(chain(module.parameters(), module.buffers()))).device.type != "meta":
            self.load_weights(tensor.device, only=holds)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return False: a lowered model computes attention itself, however it is configured."""
        return False

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: tied weights are one Parameter from the start."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self._tied_weights_keys or {})

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the vocabulary as transformers does, with the Program: see `resizing`.

        Raises UsageError, before anything has changed, where the Program cannot have another size.
        """
        from reroll.runtime.models.resizing import resize

        return resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)


def decodes_in_one_graph(model: RerollPreTrainedModel) -> bool:
    """Whether `torch.compile` makes one graph of a forward, the same for every step of decoding.

    It does not where a model keeps no cache, reads pictures, computes with keys in another way than
    attention does, or with the padding, which grows with every token.
    """
    program = model.program
    if picture_inputs(program.inputs):
        return False
    if not model.keeps_cache:
        return not model.can_generate()
    updates = [
        update_function(node) for _, graph in program.graphs() for node in stateful_nodes(graph)
    ]
    return model.masks_keys_only and append_exactly not in updates
