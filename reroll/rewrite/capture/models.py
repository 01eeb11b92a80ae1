"""Open a model by name: its class on the meta device, and its checkpoint as lazy tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from reroll.errors import CaptureError, CheckpointError, UntrustedCodeError, UsageError
from reroll.rewrite.capture.rotary import rereading_length
from reroll.rewrite.capture.side_files import (
    GENERATION_FILE,
    MODULES_FILE,
    generation_file,
    module_folders,
    side_files,
    side_names,
    weight_names,
)
from reroll.rewrite.capture.signature import adds_tokens, scales_embeddings, wraps_labels
from reroll.rewrite.checkpoint import TensorSource
from reroll.rewrite.checkpoint.hub import directory_of, file_of
from reroll.rewrite.checkpoint.saved import DRAFT_FOLDER, PROGRAM_FILE, load_program
from reroll.rewrite.ir.dtypes import DTYPES, dtype_of
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Origin
from reroll.writing import temporary_folder

log = logging.getLogger(__name__)

# the auto classes, the most specific first, with the name of their table in transformers
_AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


@dataclass(frozen=True)
class OpenModel:
    """Model with parameters on the meta device and real buffers, and the source of its tensors."""

    model: Any
    source: TensorSource
    origin: Origin


def open_model(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> OpenModel | Program:
    """Open a hub id, a local directory or a `.gguf` file without loading its weights.

    For a directory that reroll saved, the result is its Program. Raises UsageError if there is no
    such model, CheckpointError if its files are damaged, and CaptureError for adapters and
    quantised checkpoints.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        return _open_gguf(path, dtype_of(dtype))
    if not path.exists():
        wanted = partial(_files_to_download, name, revision, trust_remote_code)
        path = directory_of(name, wanted, revision=revision)
    if not (path / "config.json").is_file():
        raise _no_model(path, name)
    if (path / "adapter_config.json").is_file():
        raise CaptureError(
            "there is an adapter (adapter_config.json) beside the model, which is not captured",
            where=name,
            hint="merge it with peft (merge_and_unload) and save the result, or delete its files",
        )
    if _read_json(path / "config.json").get("model_type") == "reroll":
        return load_program(path)
    return _open_directory(path, name, dtype_of(dtype), revision, trust_remote_code)


def _no_model(path: Path, name: str) -> UsageError:
    """Return the error for a path that is no model, with a hint at what may have been meant."""
    hint = "name a hub id, a directory written by save_pretrained, or a .gguf file"
    if not path.is_dir():
        return UsageError("this is a file, and no .gguf file", where=name, hint=hint)
    files = sorted(path.glob("*.gguf"))
    if (path / "adapter_config.json").is_file():
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
        hint = f"merge it into its model, {base}, with peft (merge_and_unload), and save that"
        return UsageError("this is an adapter without its model", where=name, hint=hint)
    if files:
        hint = f"name the file itself: {' or '.join(map(str, files))}"
    return UsageError("there is no config.json", where=name, hint=hint)


def describe(model: Any, name: str | None = None, path: Path | None = None) -> Origin:
    """Describe a model object, or one opened from `path`, as an Origin.

    Its auto class is the one whose table lists the model's class; "AutoModel" if none does.
    """
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    files = {} if path is None else side_files(path)
    if path is None and (settings := _generation_settings(model)) is not None:
        files[GENERATION_FILE] = generation_file(settings)
    return Origin(
        model=name or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        architecture=type(model).__name__,
        auto_class=_auto_class(type(model).__name__, model.config),
        config=config,
        files=files,
        rereads_at=rereading_length(model),
        adds_tokens=adds_tokens(model),
        wraps_labels=wraps_labels(model),
        scales_embeddings=scales_embeddings(model),
    )


def _generation_settings(model: Any) -> Any:
    """Return a model object's generation settings, which transformers saves with it."""
    return getattr(model, "generation_config", None) if model.can_generate() else None


def _auto_class(architecture: str, config: Any) -> str:
    from transformers.models.auto import modeling_auto

    custom = _custom_classes(config)
    for auto, table in _AUTO_CLASSES.items():
        if custom.get(auto) == architecture:
            return auto
        for known in getattr(modeling_auto, table).values():
            if architecture in ((known,) if isinstance(known, str) else known):
                return auto
    return "AutoModel"


def class_of(config: Any, trust_remote_code: bool) -> Any:
    """Return the transformers class of a checkpoint: the one that it names, or an auto class.

    With `trust_remote_code`, Python code that comes with the checkpoint is preferred, as in
    transformers.
    """
    import transformers

    architecture = (getattr(config, "architectures", None) or [None])[0]
    custom = _custom_classes(config) if trust_remote_code else {}
    for auto, name in custom.items():
        if name == architecture or architecture is None:
            return getattr(transformers, auto)
    library_class = getattr(transformers, str(architecture), None)
    # a class for another model type is a wrong entry, which transformers ignores too
    if (
        not custom
        and library_class is not None
        and isinstance(config, getattr(library_class, "config_class", None) or ())
    ):
        return library_class
    causal = transformers.AutoModelForCausalLM
    known = type(config) in causal._model_mapping or causal.__name__ in custom
    return causal if known else transformers.AutoModel


def _custom_classes(config: Any) -> dict[str, str]:
    """Map auto classes, the most specific first, to classes in the checkpoint's own code."""
    references = getattr(config, "auto_map", None) or {}
    return {
        auto: str(references[auto]).rpartition(".")[2]
        for auto in (*_AUTO_CLASSES, "AutoModel")
        if auto in references
    }


def _open_directory(
    path: Path, name: str, dtype: torch.dtype | None, revision: str | None, trust: bool
) -> OpenModel:
    import transformers

    from reroll.rewrite.checkpoint import fit_to_checkpoint, hf_source
    from reroll.rewrite.checkpoint.hf_source import UNQUANTISED, quantisation

    if not trust:
        _refuse_code(path, name)
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trust)
    # the model's own code may raise any exception
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers cannot read the configuration: {reason}",
            where=str(path / "config.json"),
            hint="take the model's own configuration, or a transformers that knows the model",
        ) from error
    if (method := quantisation(config)) is not None:
        raise CaptureError(
            f"the checkpoint is quantised by {method}, as its config.json says", name, UNQUANTISED
        )
    model_class = class_of(config, trust)
    if hasattr(model_class, "_from_config"):
        make = partial(model_class._from_config, config, **_eager())
    else:
        make = partial(model_class.from_config, config, trust_remote_code=trust, **_eager())
    try:
        model = _build(make, config, dtype or _stored_dtype(path, config))
    # with an unsuitable configuration, a class may raise any exception
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot make the model: {type(error).__name__}: {error}",
            where=str(path / "config.json"),
            hint="take the model's own configuration",
        ) from error
    source = hf_source(path, model)
    remarks = (*_untrusted(config, model, trust), *fit_to_checkpoint(model, source))
    origin = replace(describe(model, name, path), revision=revision, remarks=remarks)
    return OpenModel(model, source, origin)


def _untrusted(config: Any, model: Any, trust: bool) -> tuple[str, ...]:
    """Remark that a model's own code is not run, because transformers has a class for it."""
    architectures = set(getattr(config, "architectures", None) or ())
    class_name = type(model).__name__
    custom = architectures & set(_custom_classes(config).values()) - {class_name}
    if trust or not custom:
        return ()
    return (
        f"the code of {min(custom)} that comes with the model is not run: "
        f"{class_name} stands for it",
    )


def _refuse_code(path: Path, name: str) -> None:
    """Raise UntrustedCodeError for a model that needs its own Python code."""
    import transformers

    config = _read_json(path / "config.json")
    architectures = config.get("architectures") or [""]
    known = config.get("model_type") in transformers.CONFIG_MAPPING
    if config.get("auto_map") and not (known or hasattr(transformers, str(architectures[0]))):
        raise UntrustedCodeError(
            "the model is Python code that comes with it, and that is not run unasked",
            where=name,
            hint="read the code; if you trust it, give --trust-remote-code "
            "(in Python: trust_remote_code=True)",
        )


def _open_gguf(path: Path, dtype: torch.dtype | None) -> OpenModel:
    import transformers

    from reroll.rewrite.checkpoint import GgufSource, fit_to_checkpoint
    from reroll.rewrite.checkpoint.gguf_file import GgufFile
    from reroll.rewrite.checkpoint.gguf_metadata import check_metadata, check_tensors

    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    file = GgufFile(path)  # raises if the header is damaged, before transformers reads it
    try:
        config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise CheckpointError(f"cannot read the GGUF header: {error}", where=str(path)) from error
    check_metadata(file, config)
    auto = transformers.AutoModelForCausalLM
    model = _build(lambda: auto.from_config(config, **_eager()), config, dtype or torch.float32)
    source = GgufSource(path, model)
    check_tensors(file, [name for name in source.unread if name not in source.beyond])
    remarks = fit_to_checkpoint(model, source)
    origin = replace(describe(model, str(path)), files=_gguf_tokenizer(path), remarks=remarks)
    return OpenModel(model, source, origin)


def _gguf_tokenizer(path: Path) -> dict[str, str]:
    """Write the tokenizer inside a GGUF file as files of a Hugging Face directory.

    The files stay in a temporary folder until the process ends. Return their paths by name; where
    transformers cannot read the tokenizer, log a warning and return none.
    """
    import transformers

    folder = temporary_folder("tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name
        )
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        log.warning("%s: transformers cannot read its tokenizer: %s", path, error)
    return {file.name: str(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _eager() -> dict[str, str]:
    return {"attn_implementation": "eager"}


def _stored_dtype(path: Path, config: Any) -> torch.dtype | None:
    """Return the dtype of a checkpoint's first floating tensor if its configuration names none.

    transformers decides in the same way. Return None if the configuration names a dtype.
    """
    from reroll.rewrite.checkpoint.safetensors_files import SafetensorsSource

    if getattr(config, "dtype", None) is not None:
        return None
    source = SafetensorsSource(path)
    dtypes = (source.meta(name).dtype for name in source.names())
    return next((dtype for dtype in dtypes if dtype in DTYPES.values()), None)


def _build(make: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """Build a model whose parameters are on the meta device and whose buffers are real."""
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    config.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with _meta_parameters(), torch.no_grad():
            model = make()
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model.eval()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Move every parameter to the meta device when a module registers it."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _files_to_download(name: str, revision: str | None, trust: bool) -> list[str] | None:
    """List the weights and side files of a repository, and its Python code if trusted.

    Return None, which means all files, if the repository cannot be listed.
    """
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(name, revision=revision)
    # offline, files downloaded earlier are used; other errors are raised again by the download
    except Exception:
        return None
    modules: set[str] = set()
    if MODULES_FILE in names:
        modules = module_folders(file_of(name, MODULES_FILE, revision))
    code = [n for n in names if trust and n.endswith(".py")]
    drafts = [n for n in names if PROGRAM_FILE in names and n.startswith(f"{DRAFT_FOLDER}/")]
    return ["config.json", *code, *weight_names(names), *side_names(names, modules), *drafts]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        hint = "download it again, or save it as JSON in UTF-8 without a byte order mark"
        raise CheckpointError(f"cannot be read: {error}", str(path), hint) from error
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", str(path), "download it again")
    return data
