"""Generate text with a model, converted or not, through transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from reroll.bounds import COUNT, POSITIVE, SEED, TOP_P, check_number
from reroll.errors import UsageError
from reroll.evaluate.speculating import drafts_of, own_ends, stop_criteria
from reroll.evaluate.speculating import generate as speculated
from reroll.evaluate.subjects import Opening, open_original
from reroll.evaluate.tokenizing import check_utf8, open_tokenizer, tokenizer_of
from reroll.rewrite.analysis.reach import position_limits
from reroll.rewrite.capture.models import open_model
from reroll.rewrite.ir.program import Program
from reroll.runtime.state.files import load_state as read_state
from reroll.runtime.state.files import save_state as write_state
from reroll.writing import check_file


def open_generator(model: Any, opening: Opening | None = None) -> tuple[Any, Any]:
    """Open a model that generates, and its tokenizer; `model` is a hub id, a path, or a Program.

    Raises UsageError if it does not generate text, or has no tokenizer.
    """
    opening = opening or Opening()
    if isinstance(model, Program):
        name = model.origin.model
        options = {} if opening.dtype is None else {"dtype": opening.dtype}
        module, tokenizer = model.to_module(**options), tokenizer_of(model)
    else:
        name = str(model)
        module = open_original(name, opening, _class_name(name, opening))
        tokenizer = open_tokenizer(name, **opening.code)
    if not (hasattr(module, "can_generate") and module.can_generate()):
        raise UsageError("the model does not generate text", where=name)
    if module.main_input_name != "input_ids":
        raise UsageError(f"the model takes {module.main_input_name}, not text", where=name)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer", where=name)
    return module, tokenizer


def _class_name(name: str, opening: Opening) -> str:
    """Return the class or auto class that loads a model.

    Its error for a missing model is plainer than that of transformers.
    """
    opened = open_model(name, dtype=opening.dtype, **opening.code)
    if isinstance(opened, Program):
        return opened.origin.auto_class
    return opened.origin.architecture


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    seed: int = 0,
    chat: bool = False,
    read_twice: bool = False,
    stop: Sequence[str] = (),
    speculate: str | None = None,
    exact: bool = False,
    load_state: str | Path | None = None,
    save_state: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Continue some prompts in one batch, as JSON data.

    Greedy unless `temperature`, `top_k` or `top_p` is given. `chat` puts each prompt into the
    tokenizer's chat template as a user's message. `read_twice` repeats each prompt, so that a state
    of constant size has read the question before it reads the context: JRT-Prompt (arXiv
    2407.05483), section 3.2. A text of `stop` ends an answer. `speculate` is the draft of
    `reroll.generate`, and `exact` its option; "exact" as a draft is that with "auto". `load_state`
    is a file of `reroll.runtime.state.files`: the prompt continues its tokens, which are not read
    again. `save_state` writes such a file afterwards, in the place of another with `overwrite`.

    Raises UsageError if there is no prompt, no chat template, or an option is out of range.
    """
    check_options(prompts, max_new_tokens, temperature, top_k, top_p, beams, seed)
    read = [f"{prompt}\n\n{prompt}" if read_twice else prompt for prompt in prompts]
    texts = [as_chat(tokenizer, prompt) if chat else prompt for prompt in read]
    # the template's text has special tokens already
    batch = _padded(tokenizer, texts, special=not chat)
    if batch["input_ids"].shape[1] == 0:
        raise UsageError("a prompt has no tokens", hint="give a longer prompt")
    options: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
    }
    if any(value is not None for value in (temperature, top_k, top_p)):
        options = {
            "do_sample": True,
            "temperature": 1.0 if temperature is None else temperature,
            "top_k": top_k or 0,
            "top_p": 1.0 if top_p is None else top_p,
        }
    if speculate is not None and beams > 1:
        raise UsageError(
            "speculation has no beams", where="speculate", hint="leave out the option of beams"
        )
    if exact and speculate is None:
        raise UsageError(
            "without a draft, every choice is that of a step of one token",
            where="exact",
            hint="give a draft, such as --speculate auto, or leave --exact out",
        )
    if speculate == "exact":
        speculate, exact = "auto", True
    if not all(stop):
        raise UsageError("a text to stop at is empty", where="stop")
    cache = None
    if load_state is not None or save_state is not None:
        cache, batch = _begun(model, batch, beams, load_state)
    if save_state is not None:
        check_file(save_state, overwrite=overwrite)
    check_room(model, batch["input_ids"].shape[1], max_new_tokens)
    criteria = stop_criteria(stop, tokenizer)
    if speculate is not None:
        # it is kept, so that its making is not timed
        drafts_of(model, speculate)
    torch.manual_seed(seed)
    start = time.perf_counter()
    speculation = {}
    try:
        if speculate is not None:
            sampled = options.pop("do_sample")
            generated = speculated(
                model,
                batch["input_ids"],
                speculate,
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                exact=exact,
                stop_strings=stop,
                tokenizer=tokenizer,
                cache=cache,
                **(options if sampled else {}),
            )
            speculation = {"speculation": model.speculation_report.as_data()}
        else:
            with torch.no_grad():
                generated = model.generate(
                    **batch,
                    **options,
                    num_beams=beams,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    **({} if cache is None else {"past_key_values": cache}),
                    stopping_criteria=None if criteria is None else [criteria],
                )
    except IndexError as error:
        raise _out_of_range(model, batch["input_ids"]) from error
    seconds = time.perf_counter() - start
    if save_state is not None:
        write_state(save_state, model, generated, cache, overwrite=overwrite)
    # an encoder-decoder's output starts with one start token
    prompt_length = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    new = generated[:, prompt_length:]
    ends = _ends(model, tokenizer)
    outputs = []
    for prompt, row in zip(prompts, new.tolist(), strict=True):
        # up to the end-of-text token, which is left out
        ids = next((row[:i] for i, token in enumerate(row) if token in ends), row)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        outputs.append({"prompt": prompt, "text": text, "tokens": len(ids)})
    report = getattr(model, "depth_report", None)
    depth = {} if report is None else {"depth": report.as_data()}
    return {
        **depth,
        **speculation,
        "outputs": outputs,
        "steps": new.shape[1],
        "seconds": seconds,
        "tokens_per_second": sum(o["tokens"] for o in outputs) / seconds,
    }


def _begun(
    model: Any, batch: dict[str, torch.Tensor], beams: int, path: str | Path | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the cache to go on with, and the tokens it has read with the prompt behind them."""
    if len(batch["input_ids"]) > 1 or beams > 1:
        raise UsageError(
            "a state is that of one prompt, without beams", where="load_state or save_state"
        )
    if not getattr(model, "keeps_cache", False):
        raise UsageError("the model keeps no state between calls", where=type(model).__name__)
    if path is None:
        return DynamicCache(config=model.config), batch
    tokens, cache = read_state(path, model)
    ids = torch.cat([tokens, batch["input_ids"]], 1)
    return cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_options(
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int,
    seed: int,
) -> None:
    """Raise UsageError if there is no prompt, or an option is out of range."""
    for prompt in prompts:
        check_utf8(prompt, "--prompt")
    if not prompts or not all(prompts):
        raise UsageError("a prompt is empty" if prompts else "there is no prompt", where="generate")
    check_number("max_new_tokens", max_new_tokens, COUNT, "generate")
    check_number("beams", beams, COUNT, "generate")
    check_number("seed", seed, SEED, "generate")
    if temperature is not None:
        check_number("temperature", temperature, POSITIVE, "generate", integer=False)
    if top_k is not None:
        check_number("top_k", top_k, COUNT, "generate")
    if top_p is not None:
        check_number("top_p", top_p, TOP_P, "generate", integer=False)


def check_room(model: Any, prompt_length: int, new: int) -> None:
    """Raise UsageError if a model has no positions for `new` tokens after the prompt.

    Does nothing for a model that reroll has not lowered, and for one without a table of positions.
    """
    program = getattr(model, "program", None)
    if not isinstance(program, Program):
        return
    limits, reads = position_limits(program), model.main_input_name
    writes = "decoder_input_ids" if model.config.is_encoder_decoder else reads
    # the last new token is not an input
    counts = {reads: prompt_length, writes: new if writes != reads else prompt_length + new - 1}
    for name, count in counts.items():
        if count > limits.get(name, count):
            raise UsageError(
                f"{prompt_length} tokens of the prompt and {new} new ones are more than the model "
                f"has positions for, {limits[name]}",
                where="generate",
                hint="give a shorter prompt, or a lower --max-new-tokens",
            )


def _out_of_range(model: Any, ids: torch.Tensor) -> UsageError:
    """Explain an IndexError of an original: a token or a position that its tables do not have."""
    config = model.config.get_text_config()
    size, top = getattr(config, "vocab_size", None), int(ids.max())
    if isinstance(size, int) and top >= size:
        return UsageError(
            f"there is no token {top} in a vocabulary of {size}",
            where="generate",
            hint="the tokenizer is not that of the model",
        )
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limit = next((n for name in names if (n := getattr(config, name, None))), "its")
    return UsageError(
        f"the {ids.shape[1]} tokens of the prompt with the new ones are more than the model has "
        f"positions for, {limit}",
        where="generate",
        hint="give a shorter prompt, or a lower --max-new-tokens",
    )


def as_chat(tokenizer: Any, prompt: str) -> str:
    """Put a prompt into a tokenizer's chat template; UsageError if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template", hint="leave --chat out")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text)


def _padded(tokenizer: Any, texts: Sequence[str], special: bool) -> dict[str, torch.Tensor]:
    """Return token ids and padding mask of a batch, padded on the left, as generation needs it."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "left"
    encoded = tokenizer(
        list(texts), return_tensors="pt", padding=len(texts) > 1, add_special_tokens=special
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _ends(model: Any, tokenizer: Any) -> set[int]:
    return {int(i) for i in [*own_ends(model), tokenizer.eos_token_id] if i is not None}
