"""Lowered encoder-decoder models beside transformers; the encoder runs once per generation."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationMixin

from reroll.errors import ProgramError, UsageError
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.signature import wraps_labels
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.text.printer import to_text
from reroll.runtime.lowering.lower import lower
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")

NAMES = ["t5", "whisper"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return captured.model(request.param), lower(captured.captured(request.param))


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        bins = model.config.num_mel_bins
        return {"input_features": torch.randn(3, bins, frames, generator=generator)}
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 8:] = 0
    ids = torch.randint(3, 64, (3, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def decoder_ids() -> torch.Tensor:
    return torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def generate(model: Any, **options: Any) -> torch.Tensor:
    # Whisper has a generate of its own around the common one
    wishes = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    return GenerationMixin.generate(model, **inputs_of(model), **wishes)  # type: ignore[no-any-return]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to 1e-4 of the largest value, a third of what rounding does to the original itself.

    T5 does not scale its scores, so rounding grows: the original's own gradients differ by 3.4e-4
    of their largest value between single and double precision.
    """
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-8
    )


def test_outputs(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    inputs = {**inputs_of(original), "decoder_input_ids": decoder_ids()}
    expected, actual = original(**inputs), lowered(**inputs)
    assert_close(actual.logits, expected.logits)
    assert_close(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "no cache", "static cache"],
)
def test_generation(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    original, lowered = pair
    assert torch.equal(generate(original, **options), generate(lowered, **options))


def test_a_prompt_with_padding(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"decoder_input_ids": decoder_ids(), "decoder_attention_mask": mask}
    assert torch.equal(generate(original, **options), generate(lowered, **options))


def test_the_encoder_runs_once(pair: tuple[Any, Any]) -> None:
    _, lowered = pair

    def counted(name: str) -> Any:
        # what follows from the encoder's output alone is another function of the decoder's trips
        def hook(_: Any, __: Any, options: dict[str, Any], ___: Any) -> None:
            calls[name] += options.get("function") != "static"

        return hook

    encoder, decoder = (lowered._assembly.loops[n].modules[0] for n in _loops(lowered))
    calls = {"encoder": 0, "decoder": 0, "cross": 0}
    handles = [
        encoder.register_forward_hook(counted("encoder"), with_kwargs=True),
        decoder.register_forward_hook(counted("decoder"), with_kwargs=True),
    ]
    for name, module in decoder.named_modules():
        if name.lower().endswith(("encoder_attn.k_proj", "encdecattention.k")):
            handles.append(
                module.register_forward_hook(lambda *_: calls.update(cross=calls["cross"] + 1))
            )
    generate(lowered)
    for handle in handles:
        handle.remove()
    assert calls == {"encoder": 1, "decoder": 12, "cross": 1}


def _loops(model: Any) -> list[str]:
    names = list(model._assembly.loops)
    return sorted(names, key=lambda n: "decoder" in n)


def test_encoder_outputs_of_any_kind(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    inputs = inputs_of(original)
    expected = lowered(**inputs, decoder_input_ids=decoder_ids()).logits
    mask = {k: v for k, v in inputs.items() if k == "attention_mask"}
    for outputs in (
        lowered.get_encoder()(**inputs),
        original.get_encoder()(**inputs),
        (original.get_encoder()(**inputs)[0],),
    ):
        actual = lowered(encoder_outputs=outputs, decoder_input_ids=decoder_ids(), **mask).logits
        assert_close(actual, expected)


def test_loss_and_gradients(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    labels = decoder_ids()
    labels[0, 5:] = -100
    losses, grads = [], []
    for model in pair:
        model.zero_grad()
        loss = model(**inputs_of(original), labels=labels).loss
        loss.backward()
        losses.append(loss)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(losses[1], losses[0])
    shared = grads[0].keys() & grads[1].keys()
    assert len(shared) > 20
    for name in shared:
        assert_close(grads[1][name], grads[0][name])
    lowered.zero_grad()
    original.zero_grad()


SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["MBart", "PLBart", "Bart"])
def test_labels_alone_are_moved_as_the_original_moves_them(name: str) -> None:
    # mBART begins with the last label, the language; BART with the token of its configuration
    config = getattr(transformers, f"{name}Config")(**SEQ2SEQ)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=2)
    program = capture(model)
    assert parse(to_text(program)).origin == program.origin
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = decoder_ids()
    labels[1, 4:] = -100
    with torch.no_grad():
        expected, actual = (m(input_ids=ids, labels=labels) for m in (model, lower(program)))
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)


@cache
def bart(**changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.BartConfig(**{**SEQ2SEQ, **changes})
    model = transformers.BartForConditionalGeneration(config).eval()
    return model, capture(model).to_module()


def both(name: str) -> tuple[Any, Any]:
    """An original and its lowered model."""
    return bart() if name == "bart" else (captured.model(name), captured.captured(name).to_module())


@pytest.mark.parametrize("name", ["t5", "bart", "scaled bart"])
def test_embeddings_in_the_place_of_tokens(name: str) -> None:
    original, lowered = bart(scale_embedding=True) if name == "scaled bart" else both(name)
    inputs = inputs_of(original)
    ids, tokens = inputs.pop("input_ids"), decoder_ids()
    inputs["inputs_embeds"] = original.get_input_embeddings()(ids)
    for decoder in (
        {"decoder_inputs_embeds": original.get_decoder().get_input_embeddings()(tokens)},
        {"decoder_input_ids": tokens},
        {"labels": tokens},
    ):
        expected, actual = (m(**inputs, **decoder).logits for m in (original, lowered))
        assert_close(actual, expected)
    wishes = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(original.generate(**inputs, **wishes), lowered.generate(**inputs, **wishes))
    with pytest.raises(UsageError, match="both tokens and embeddings"):
        lowered(**inputs, **decoder, input_ids=ids)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_are_moved_by_a_method_of_the_original_s_name(name: str) -> None:
    original, lowered = both(name)
    labels = decoder_ids()
    labels[0, 5:] = -100
    prepare = "prepare_decoder_input_ids_from_labels"
    assert torch.equal(*(getattr(m, prepare)(labels) for m in (original, lowered)))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_hidden_states_of_both_parts(name: str) -> None:
    original, lowered = both(name)
    inputs = {**inputs_of(original), "decoder_input_ids": decoder_ids()}
    expected, actual = (m(**inputs, output_hidden_states=True) for m in (original, lowered))
    for part in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(actual[part]) == len(expected[part])
        for got, want in zip(actual[part], expected[part], strict=True):
            assert_close(got, want)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    steps = [generate(m, **options).decoder_hidden_states for m in (original, lowered)]
    assert [[h.shape for h in step] for step in steps[1]] == [
        [h.shape for h in step] for step in steps[0]
    ]


def test_logits_of_the_last_position_alone_where_a_bias_is_added() -> None:
    _, lowered = bart()
    inputs = {**inputs_of(lowered), "decoder_input_ids": decoder_ids()}
    assert lowered._assembly.interface.keeps_positions
    assert lowered.get_output_embeddings() is lowered.lm_head
    kept = lowered(**inputs, logits_to_keep=1).logits
    assert_close(kept, lowered(**inputs).logits[:, -1:])


@pytest.mark.parametrize("start", [2, 4, 7])
def test_a_first_token_is_not_taken_for_the_last_label(start: int) -> None:
    # whichever of the labels that capture tries it may be
    config = transformers.BartConfig(**{**SEQ2SEQ, "decoder_start_token_id": start})
    assert not wraps_labels(transformers.BartForConditionalGeneration(config))


def test_states_that_are_not_in_rows_are_refused() -> None:
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=64, tgt_vocab_size=64, **SEQ2SEQ
    )
    program = capture(transformers.FSMTForConditionalGeneration(config).eval())
    with pytest.raises(ProgramError, match="whose rows are not those of the batch"):
        lower(program)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_mask_that_is_longer_than_the_tokens_is_cut(name: str) -> None:
    # as `generate` passes it with `prefill_chunk_size`
    original, lowered = both(name)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 1:3] = 0
    inputs = {**inputs_of(original), "decoder_attention_mask": mask}
    tokens = decoder_ids()
    outputs = []
    for each in (original, lowered):
        first = each(**inputs, decoder_input_ids=tokens[:, :4])
        rest = {**inputs, "past_key_values": first.past_key_values}
        outputs.append((first.logits, each(**rest, decoder_input_ids=tokens[:, 4:]).logits))
    for expected, actual in zip(*outputs, strict=True):
        assert_close(actual, expected)
