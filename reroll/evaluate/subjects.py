"""Open models to evaluate: originals that transformers runs, and Programs as lowered modules."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reroll.errors import CheckpointError, RerollError, UsageError
from reroll.evaluate.tokenizing import open_tokenizer, tokenizer_of
from reroll.rewrite.analysis.costs import flops_per_token, keeps_state, state_bytes
from reroll.rewrite.analysis.reach import out_of_reach
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.models import class_of
from reroll.rewrite.capture.signature import is_decoder
from reroll.rewrite.checkpoint.hub import file_of
from reroll.rewrite.ir.program import Program

log = logging.getLogger(__name__)

Attention = Literal["eager", "sdpa"]


@dataclass(frozen=True)
class Opening:
    """Options for opening models: dtype, attention, revision, and whether their code is trusted.

    A model without SDPA attention runs with eager attention instead.
    """

    dtype: torch.dtype | str | None = None
    attention: Attention = "eager"
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def code(self) -> dict[str, Any]:
        """Options that say which files of a repository are read, and whether their code may run."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class Subject:
    """A model to evaluate, with its Program, tokenizer and costs.

    `program` is None for a model that cannot be captured; it still runs. `path` is the hub id or
    path that it was opened by, if it was not given as an object.
    """

    name: str
    model: Any
    program: Program | None
    converted: bool
    path: str | None = None
    opening: Opening = field(default_factory=Opening)

    @cached_property
    def tokenizer(self) -> Any | None:
        """Tokenizer of the model, if it has one."""
        tokenizer = None if self.program is None else tokenizer_of(self.program)
        if tokenizer is None and self.path is not None and not self.converted:
            tokenizer = open_tokenizer(self.path, **self.opening.code)
        return tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model computes in."""
        return getattr(self.model, "dtype", torch.float32)

    @property
    def generates(self) -> bool:
        """Whether this is a decoder that predicts the next token of a text."""
        if self.program is None:
            return is_decoder(self.model)
        data = [i.name for i in self.program.inputs if i.role == "data"]
        return data == ["input_ids"] and self.keeps_state

    @property
    def keeps_state(self) -> bool:
        """Whether any of the Program's ops keeps state between tokens."""
        return self.program is not None and keeps_state(self.program)

    def parameters(self) -> int:
        """Count the parameters; a shared one counts once."""
        return sum(p.numel() for p in self.model.parameters())

    def bytes(self) -> int:
        """Count the bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def state_bytes(self, context: int) -> int | None:
        """Count the bytes of state of a sequence of `context` tokens; None if there is no state."""
        if self.program is None or not self.keeps_state:
            return None
        return state_bytes(self.program, context)

    def flops_per_token(self) -> int | None:
        """Count the operations for one more token after 1,024; None if nothing was captured."""
        return None if self.program is None else flops_per_token(self.program)

    @cached_property
    def accepts(self) -> set[str]:
        """Names of the arguments of the model's forward."""
        return set(inspect.signature(self.model.forward).parameters)

    def run(self, inputs: Mapping[str, Tensor], output: str, keep: Tensor | None = None) -> Tensor:
        """Compute one output for some inputs; with `keep`, logits at those positions only."""
        options: dict[str, Any] = {}
        if "use_cache" in self.accepts:
            options["use_cache"] = False
        if keep is not None:
            options["logits_to_keep"] = keep
        try:
            with torch.no_grad():
                outputs = self.model(**self._in_own_dtype(inputs), **options)
        except (IndexError, RuntimeError) as error:
            raise self.unreachable(inputs) or error from error
        value = outputs.get(output)
        if not isinstance(value, Tensor):
            raise UsageError(f"the model gives no {output!r}", where=self.name)
        return value

    def unreachable(self, inputs: Mapping[str, Tensor]) -> UsageError | None:
        """Return an error that names the token or position that a table of the model does not have.

        None if the Program does not tell.
        """
        return None if self.program is None else out_of_reach(self.program, inputs)

    def _in_own_dtype(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: t.to(self.dtype) if t.is_floating_point() else t for name, t in inputs.items()
        }


def open_subject(item: Any, opening: Opening | None = None) -> Subject:
    """Open a hub id, a path, a Program or a module; raises UsageError for anything else."""
    opening = opening or Opening()
    if isinstance(item, Subject):
        return item
    if isinstance(item, Program):
        return _converted(_name(item), item, opening)
    if isinstance(item, nn.Module):
        return _module(item, opening)
    if isinstance(item, str | Path):
        return _named(str(item), opening)
    raise UsageError(
        f"{type(item).__name__} is not a model",
        hint="give a hub id, a path, a Program or a transformers model",
    )


def is_converted(name: str, revision: str | None = None) -> bool:
    """Whether a path or hub id is that of a model that reroll wrote."""
    # an unreachable name is reported when it is opened
    try:
        config = json.loads(file_of(name, "config.json", revision).read_text(encoding="utf-8"))
    except Exception:
        return False
    return isinstance(config, dict) and config.get("model_type") == "reroll"


def _name(program: Program) -> str:
    steps = ", ".join(step.text for step in program.origin.steps)
    return f"{program.origin.model} after {steps}" if steps else program.origin.model


def _converted(name: str, program: Program, opening: Opening) -> Subject:
    options = {} if opening.dtype is None else {"dtype": opening.dtype}
    return Subject(name, program.to_module(**options), program, True, opening=opening)


def _module(model: nn.Module, opening: Opening) -> Subject:
    program = getattr(model, "program", None)
    converted = isinstance(program, Program)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    if not converted:
        program = _captured(model)
    return Subject(name, model, program, converted, opening=opening)


def _named(name: str, opening: Opening) -> Subject:
    if is_converted(name, opening.revision):
        converted = capture(name, dtype=opening.dtype, revision=opening.revision)
        return _converted(name, converted, opening)
    program = _captured(name, dtype=opening.dtype, **opening.code)
    architecture = None if program is None else program.origin.architecture
    model = open_original(name, opening, architecture)
    return Subject(name, model, program, False, name, opening)


def _captured(model: Any, **options: Any) -> Program | None:
    """Capture a model; return None and log the reason if it cannot be captured.

    Errors that also prevent the model itself from being opened are raised.
    """
    try:
        return capture(model, **options)
    except (UsageError, CheckpointError):
        raise
    except RerollError as error:
        log.info("not captured, so it has no state or operations to count: %s", error)
        return None


def open_original(name: str, opening: Opening, class_name: str | None = None) -> Any:
    """Load a model with transformers itself, in eval mode.

    `class_name` is the class or auto class that loads it, if that is known. Raises CheckpointError
    if transformers cannot load it.
    """
    import transformers

    path = Path(name)
    options: dict[str, Any] = {
        "dtype": opening.dtype or "auto",
        "attn_implementation": opening.attention,
        "trust_remote_code": opening.trust_remote_code,
    }
    where = name
    if path.suffix == ".gguf":
        where, options["gguf_file"] = str(path.parent), path.name
    elif not path.exists():
        options["revision"] = opening.revision
    with _quiet():
        cls = getattr(transformers, str(class_name), None)
        # trusted code may have a class of the same name
        custom = opening.trust_remote_code and not str(class_name).startswith("Auto")
        if cls is None or custom:
            cls = _class_of(where, options)
        try:
            model = _load(cls, where, options)
        except RerollError:
            raise
        # damaged files raise errors of many types in transformers
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"transformers cannot load the model: {type(error).__name__}: {reason}", where=name
            ) from error
    return model.eval()


def _load(cls: Any, where: str, options: dict[str, Any]) -> Any:
    try:
        return cls.from_pretrained(where, **options)
    except ValueError:
        if options["attn_implementation"] == "eager":
            raise
        # not every class supports the requested attention
        return cls.from_pretrained(where, **{**options, "attn_implementation": "eager"})


def _class_of(name: str, options: Mapping[str, Any]) -> Any:
    import transformers

    keys = ("trust_remote_code", "gguf_file", "revision")
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, **{k: options[k] for k in keys if k in options}
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"cannot read the configuration: {reason}", where=name) from error
    return class_of(config, bool(options.get("trust_remote_code")))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings while it loads a model."""
    from transformers.utils import logging as notes

    level, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()
