"""What AutoModel and AutoModelForSequenceClassification make of a saved language model."""

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import reroll
from reroll.errors import UsageError
from tests import captured, tiny
from tests.runtime.models.test_backbone import KINDS, ids, lowered
from tests.slow import slow
from tests.tiny.types import build

pytestmark = pytest.mark.usefixtures("captured_once")


def left_padded(tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_is_the_layers_without_the_head(kind, tmp_path):
    lowered(kind).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert model.base_model is model
    assert not model.can_generate()
    # exits read the head, to find out how sure the model is
    assert ("lm_head.weight" in model.state_dict()) == kind.startswith("exits")
    mask = left_padded(ids())
    with torch.no_grad():
        got = model(ids(), attention_mask=mask)
        wanted = whole.base_model(ids(), attention_mask=mask).last_hidden_state
        assert torch.equal(got.last_hidden_state, wanted)
        more = torch.nn.functional.pad(mask, (0, 1), value=1)
        after = model(ids()[:, :1], attention_mask=more, past_key_values=got.past_key_values)
        again = torch.cat([ids(), ids()[:, :1]], 1)
        want = whole.base_model(again, attention_mask=more, use_cache=False).last_hidden_state
    torch.testing.assert_close(after.last_hidden_state, want[:, -1:])


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3_text", "bloom", *slow("opt", "phi", "cohere", "mixtral")]
)
def test_auto_model_gives_the_original_s_hidden_states(name, tmp_path):
    original = build(name).eval()
    reroll.capture(original).save(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    tokens = ids() % original.config.vocab_size
    with torch.no_grad():
        wanted = original.base_model(tokens)[0]
        torch.testing.assert_close(model(tokens)[0], wanted)


def test_auto_model_of_a_masked_language_model_is_its_encoder(tmp_path):
    config = transformers.BertConfig(**captured.TEXT, intermediate_size=64)
    original = transformers.BertForMaskedLM(config).eval()
    reroll.capture(original).save(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    tokens = ids() % config.vocab_size
    mask = left_padded(tokens)
    with torch.no_grad():
        wanted = original.bert(tokens, attention_mask=mask).last_hidden_state
        got = model(tokens, attention_mask=mask)
    torch.testing.assert_close(got.last_hidden_state, wanted)
    assert list(got) == ["last_hidden_state"]


def test_the_layers_alone_are_saved_and_loaded_in_their_dtype(tmp_path):
    lowered("relaxed").to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    model = AutoModel.from_pretrained(tmp_path / "whole", dtype="auto")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "layers")
    again = AutoModel.from_pretrained(tmp_path / "layers", dtype="auto")
    assert torch.equal(again(ids()).last_hidden_state, model(ids()).last_hidden_state)
    with pytest.raises(UsageError, match="RerollForCausalLM does not run this model"):
        reroll.runtime.models.causal_lm.RerollForCausalLM.from_pretrained(tmp_path / "layers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_reads_the_last_token_that_is_no_padding(kind, tmp_path, caplog):
    lowered(kind).save_pretrained(tmp_path / "whole")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    assert "score.weight is new" in caplog.text
    hidden = AutoModel.from_pretrained(tmp_path / "whole")
    mask = torch.ones_like(ids())
    mask[0, 6:] = 0
    with torch.no_grad():
        got = model(ids(), attention_mask=mask).logits
        states = hidden(ids(), attention_mask=mask).last_hidden_state
        wanted = torch.stack([states[0, 5], states[1, 8]]) @ model.score.weight.T
    torch.testing.assert_close(got, wanted)
    model(ids(), attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == ({"lm_head.weight"} if kind.startswith("exits") else set())
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert again.config.num_labels == 3
    assert torch.equal(again(ids(), attention_mask=mask).logits, got)


def test_a_classifier_is_what_transformers_makes_with_the_same_weights(tmp_path):
    original = transformers.LlamaForSequenceClassification(tiny.llama().config).eval()
    original.config.pad_token_id = 0
    language = tiny.llama()
    language.model.load_state_dict(original.model.state_dict())
    reroll.capture(language).save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        model.score.weight.copy_(original.score.weight)
    tokens = ids()
    mask = left_padded(tokens)
    tokens[0, :3] = 0
    with torch.no_grad():
        wanted = original(tokens, attention_mask=mask).logits
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits, wanted)


def test_other_heads_are_refused(tmp_path):
    reroll.capture(tiny.llama()).save(tmp_path)
    with pytest.raises(UsageError, match="does not run this model"):
        transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    config = transformers.ViTConfig(
        **captured.TEXT, intermediate_size=64, image_size=16, patch_size=8
    )
    reroll.capture(transformers.ViTForImageClassification(config)).save(tmp_path / "vit")
    with pytest.raises(
        UsageError, match="hidden states of ViTForImageClassification are not taken"
    ):
        AutoModel.from_pretrained(tmp_path / "vit")
