"""Select what a stage trains: all weights, the new ones, adapters, or weights by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from reroll.errors import UsageError
from reroll.recover.stage import Stage


@contextmanager
def training(module: Any, stage: Stage, new: frozenset[str]) -> Iterator[nn.Module]:
    """Yield the module to train, with gradients for the weights that the stage names and no others.

    With `lora` in `train` it has adapters, which are merged into its weights at the end. Raises
    UsageError if no weight matches.
    """
    patterns = [stage.train] if isinstance(stage.train, str) else stage.train
    chosen = {
        name
        for name, _ in module.named_parameters(remove_duplicate=False)
        if "all" in patterns
        or ("new" in patterns and name in new)
        or any(fnmatchcase(name, f"*{p}*") for p in patterns if p not in ("new", "lora"))
    }
    if not chosen and "lora" not in patterns:
        raise UsageError(
            "the model has no weights that the original does not have"
            if patterns == ["new"]
            else f"no weight is called {' or '.join(patterns)}",
            where=f"stage {stage.name}, option train",
            hint="train=all trains all weights",
        )
    ids = {id(module.get_parameter(name)) for name in chosen}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    if "lora" in patterns:
        with _adapted(module, stage) as adapted:
            yield adapted
    else:
        yield module


@contextmanager
def _adapted(module: Any, stage: Stage) -> Iterator[nn.Module]:
    """Yield the module with a LoRA adapter (Hu et al., 2021, arXiv 2106.09685) on linear layers."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("adapters need peft", hint="pip install 'reroll[lora]'") from error
    names = [
        name
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in stage.lora_on
    ]
    if not names:
        raise UsageError(
            f"no linear layer is called {' or '.join(stage.lora_on)}",
            where=f"stage {stage.name}, option lora_on",
        )
    shared = _shared(module, names)
    if shared is not None:
        raise UsageError(
            f"{shared} is one weight for several depths, which a merged adapter would untie",
            where=f"stage {stage.name}, option train",
            hint="add factors for each depth with the pass relax, and train new",
        )
    config = LoraConfig(
        r=stage.lora_rank, lora_alpha=stage.lora_alpha, target_modules=names, lora_dropout=0.0
    )
    learning = [p for p in module.parameters() if p.requires_grad]
    adapted = get_peft_model(module, config)
    for parameter in learning:
        # peft has turned these off
        parameter.requires_grad_(True)
    yield adapted
    adapted.merge_and_unload()


def _shared(module: nn.Module, names: list[str]) -> str | None:
    """Return the first linear layer whose weight an earlier one shares; None if there is none."""
    counted: set[int] = set()
    for name in names:
        weight = module.get_submodule(name).weight
        if id(weight) in counted:
            return name
        counted.add(id(weight))
    return None


def new_names(module: nn.Module, teacher: nn.Module | None) -> frozenset[str]:
    """Return the names of parameters that the original does not have, such as gates and factors."""
    if teacher is None:
        return frozenset()
    student_names, teacher_names = (
        {name for name, _ in m.named_parameters(remove_duplicate=False)} for m in (module, teacher)
    )
    return frozenset(student_names - teacher_names)
