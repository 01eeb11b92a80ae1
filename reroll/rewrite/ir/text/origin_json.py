"""Convert an Origin to JSON values and back, with all values checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, get_args

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.records import Loss, Origin, Step
from reroll.rewrite.ir.weights.checked_json import member, typed

MAX_DEPTH = 64


def origin_to_json(origin: Origin) -> dict[str, Any]:
    """Convert an Origin to a JSON object; ProgramError if JSON cannot express a value."""
    return {
        "model": origin.model,
        "revision": origin.revision,
        "architecture": origin.architecture,
        "auto_class": origin.auto_class,
        "config": _plain(origin.config, "config"),
        "files": dict(origin.files),
        "steps": [
            {
                "text": step.text,
                "seconds": step.seconds,
                "remarks": list(step.remarks),
                "measured": _plain(step.measured, f"steps[{i}]: measured"),
            }
            for i, step in enumerate(origin.steps)
        ],
        **({"remarks": list(origin.remarks)} if origin.remarks else {}),
        **({} if origin.rereads_at is None else {"rereads_at": origin.rereads_at}),
        **({} if origin.loss == "shifted" else {"loss": origin.loss}),
        **({} if origin.cache_span is None else {"cache_span": origin.cache_span}),
        **({"adds_tokens": True} if origin.adds_tokens else {}),
        **({"wraps_labels": True} if origin.wraps_labels else {}),
        **({"scales_embeddings": True} if origin.scales_embeddings else {}),
        **({"unread": list(origin.unread)} if origin.unread else {}),
    }


def origin_from_json(data: object) -> Origin:
    """Read an Origin from a JSON object; ProgramError with the position of an error."""
    wanted = "model revision architecture auto_class config files steps"
    optional: dict[str, Any] = {
        "remarks": [],
        "rereads_at": None,
        "loss": "shifted",
        "cache_span": None,
        "adds_tokens": False,
        "wraps_labels": False,
        "scales_embeddings": False,
        "unread": [],
    }
    fields = _object(data, wanted.split(), optional)
    revision, rereads_at, span = (fields[k] for k in ("revision", "rereads_at", "cache_span"))
    with located("files"):
        files = typed(fields["files"], dict)
        for name, path in files.items():
            _check_file(name)
            typed(path, str)
    return Origin(
        model=member(fields, "model", str),
        revision=None if revision is None else member(fields, "revision", str),
        architecture=member(fields, "architecture", str),
        auto_class=_auto_class(member(fields, "auto_class", str)),
        config=_plain(member(fields, "config", dict), "config"),
        files=files,
        steps=tuple(_step(i, s) for i, s in enumerate(member(fields, "steps", list))),
        remarks=_texts(member(fields, "remarks", list)),
        rereads_at=None if rereads_at is None else member(fields, "rereads_at", int),
        loss=_loss(fields["loss"]),
        cache_span=None if span is None else member(fields, "cache_span", int),
        adds_tokens=member(fields, "adds_tokens", bool),
        wraps_labels=member(fields, "wraps_labels", bool),
        scales_embeddings=member(fields, "scales_embeddings", bool),
        unread=_texts(member(fields, "unread", list), "unread"),
    )


def _step(number: int, data: object) -> Step:
    with located(f"steps[{number}]"):
        fields = _object(data, ["text", "seconds", "remarks", "measured"])
        return Step(
            text=member(fields, "text", str),
            seconds=member(fields, "seconds", int, float),
            remarks=_texts(member(fields, "remarks", list)),
            measured=_plain(member(fields, "measured", dict), "measured"),
        )


def _texts(values: list[object], where: str = "remarks") -> tuple[str, ...]:
    with located(where):
        return tuple(typed(value, str) for value in values)


def _check_file(name: str) -> None:
    # side files are written to the output directory, so a name must not point outside of it
    path = PurePosixPath(name)
    parts = (*path.parts, *name.split("/"))
    if not name or path.is_absolute() or {"..", "."} & set(parts) or re.search(r'[\\:\0"]', name):
        raise ProgramError(f"{name!r:.80} is not a file inside the model's directory")


def _auto_class(name: str) -> str:
    # the name is later looked up in transformers to load the model
    if not re.fullmatch(r"Auto\w+", name, re.ASCII):
        raise ProgramError(f"{name!r:.80} is not an auto class of transformers", where="auto_class")
    return name


def _loss(name: object) -> Loss | None:
    if name not in (*get_args(Loss), None):
        raise ProgramError(f"{name!r:.80} is not a loss", where="loss")
    return name  # type: ignore[return-value]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Convert data to plain dicts, lists and scalars; ProgramError for anything else."""
    if depth > MAX_DEPTH:
        raise ProgramError(f"the data nest deeper than {MAX_DEPTH}", where=where)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where, depth + 1) for v in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ProgramError(f"a {type(value).__name__} is not JSON data", where=where)


def _object(
    data: object, keys: list[str], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check a JSON object for these keys, and fill in the defaults of optional ones."""
    fields = {**(optional or {}), **typed(data, dict)}
    for key in keys:
        if key not in fields:
            raise ProgramError(f"{key!r} is missing")
    keys = [*keys, *(optional or {})]
    unknown = [key for key in fields if key not in keys]
    if unknown:
        raise ProgramError(f"unknown key {unknown[0]!r:.80}", hint=f"known: {', '.join(keys)}")
    return fields
