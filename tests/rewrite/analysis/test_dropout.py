"""Which rates of dropout a configuration sets."""

from __future__ import annotations

import transformers

from reroll.rewrite.analysis.dropout import dropout_of, dropout_remark


def test_rates_of_configurations() -> None:
    bert = dropout_of(transformers.BertConfig().to_dict())
    assert bert == {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    assert dropout_of(transformers.GPT2Config().to_dict())["resid_pdrop"] == 0.1
    assert dropout_of(transformers.T5Config().to_dict())["dropout_rate"] == 0.1
    assert dropout_of(transformers.LlamaConfig().to_dict()) == {}
    # a switch, and rates of nothing
    assert dropout_of({"token_dropout": True, "dropout": 0.0, "layerdrop": None}) == {}


def test_nested_configurations_have_names() -> None:
    assert dropout_of({"text_config": {"dropout": 0.2}}) == {"text_config.dropout": 0.2}


def test_the_remark_has_the_rates() -> None:
    assert dropout_remark({"dropout": 0}) is None
    assert "resid_pdrop=0.25" in str(dropout_remark({"resid_pdrop": 0.25}))
