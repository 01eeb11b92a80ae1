from __future__ import annotations

import json
import logging
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from reroll.errors import CaptureError, CheckpointError, UsageError
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.capture.export import capture
from reroll.rewrite.checkpoint import GgufSource, SafetensorsSource
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.text.parser import parse
from tests.captured import SPECIAL, TEXT, flat, llama, model
from tests.conftest import MODELS
from tests.tiny import types as tiny_types

TEXTS = ["llama", "gpt2", "gemma3", "gpt_neox", "bloom", "bert"]
NAMES = [*TEXTS, "vit", "dinov2", "t5", "whisper"]


def eager(made, inputs):
    made.set_attn_implementation("eager")
    # an encoder that has no cache warns of the keyword
    options = {"use_cache": False} if made.can_generate() else {}
    with torch.no_grad():
        return made(**inputs, **options)


def targets(program):
    return {str(node.target) for _, graph in program.graphs() for node in graph.nodes}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "length"), [(2, 16), (1, 5), (3, 1)])
def test_a_flat_program_is_bit_identical_to_the_model(name, rows, length):
    program = flat(name)
    inputs = random_inputs(program, rows=rows, length=length, padded=length > 1)
    assert length == 1 or name in ("vit", "dinov2", "whisper") or "attention_mask" in inputs
    actual, expected = run(program, inputs), eager(model(name), inputs)
    assert actual
    for output, tensor in actual.items():
        assert torch.equal(tensor, expected[output]), output


def test_left_padding_changes_what_is_computed():
    program = flat("llama")
    inputs = random_inputs(program, padded=True)
    padded = run(program, inputs)["logits"]
    whole = run(program, {"input_ids": inputs["input_ids"]})["logits"]
    assert torch.equal(padded[0], whole[0])
    assert not torch.allclose(padded[1], whole[1])


def test_a_model_that_generates_is_captured_with_a_past():
    program = flat("llama")
    shapes = {i.name: (i.type.shape, i.role) for i in program.inputs}
    assert shapes["input_ids"] == (("b", "s"), "data")
    assert shapes["attention_mask"] == (("b", "t"), "padding")
    assert shapes["position_ids"] == (("b", "s"), "positions")
    assert sum("reroll.cache" in str(n.target) for n in program.graph.nodes) == 4
    assert "reroll.cache.default" not in targets(flat("bert"))


def test_tied_weights_are_one_weight():
    program = flat("llama")
    made = model("llama")
    assert program.parameters() == sum(p.numel() for p in made.parameters())
    assert "lm_head.weight" not in program.weights
    untied = capture(llama(tie_word_embeddings=False, num_hidden_layers=1), roll=False)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(untied.weights)


# ---- from a directory


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def directory(request, tmp_path) -> Path:
    llama(num_hidden_layers=2).to(request.param).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "dtype", [None, "float32", pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_directory_computes_what_transformers_loads_from_it(directory, dtype):
    program = capture(str(directory), dtype=dtype, roll=False)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    made = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=wanted or "auto")
    assert program.dtype == made.dtype
    inputs = random_inputs(program, padded=True)
    logits = run(program, inputs)["logits"]
    assert logits.dtype == made.dtype
    assert torch.equal(logits, eager(made, inputs).logits)
    assert program.origin.architecture == "LlamaForCausalLM"
    assert program.origin.auto_class == "AutoModelForCausalLM"


@pytest.mark.parametrize("roll", [False, True])
def test_capture_from_a_directory_reads_no_tensor(tmp_path, monkeypatch, roll):
    llama(num_hidden_layers=2).save_pretrained(tmp_path)

    def load(*_):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsSource, "load", load)
        program = capture(str(tmp_path), roll=roll)
        assert program.parameters() > 0
        with pytest.raises(AssertionError):
            run(program, random_inputs(program))
    assert run(program, random_inputs(program))["logits"].isfinite().all()


def mixtral():
    config = transformers.MixtralConfig(
        **{**TEXT, "num_hidden_layers": 1}, **SPECIAL, intermediate_size=24, num_key_value_heads=2,
        num_local_experts=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def gpt_neo():
    config = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=8, **SPECIAL,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


# which ask for the device of their tensors, or make tensors in their forward
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (mixtral, torch.float32),
        pytest.param(mixtral, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(gpt_neo, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_directory_gives_the_graph_of_its_model(tmp_path, make, dtype):
    make().to(dtype).save_pretrained(tmp_path)
    # not what was saved: `to` narrows the rotary frequencies as well, and loading does not
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    from_object, from_directory = capture(made, roll=False), capture(str(tmp_path), roll=False)
    assert str(replace(from_directory, origin=from_object.origin)) == str(from_object)
    for name in from_object.weights:
        stored = from_directory.source.load(name)
        assert torch.equal(stored, from_object.source.load(name)), name
    inputs = random_inputs(from_directory, padded=True)
    logits = run(from_directory, inputs)["logits"]
    assert torch.equal(logits, run(from_object, inputs)["logits"])
    assert torch.equal(logits, eager(made, inputs).logits)


@pytest.mark.parametrize("of", ["everything", "a part"])
def test_the_device_of_a_model_is_no_matter(of):
    made = mixtral().eval()
    expected = str(capture(made, roll=False))
    part = made if of == "everything" else made.model.layers[0].mlp
    part.to("meta")
    program = capture(made, roll=False)
    assert str(program) == expected
    assert all(p.device.type == "meta" for p in part.parameters())


def write_without_data(directory: Path, made: transformers.PreTrainedModel) -> int:
    """A checkpoint whose numbers are a hole in the file; returns its size."""
    made.config.architectures = [type(made).__name__]
    made.config.save_pretrained(directory)
    header, offset = {}, 0
    for name, tensor in made.state_dict().items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


def peak() -> int:
    """The most bytes that this process has held in memory since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not tell the peak of a stretch of time")


def test_capture_takes_little_memory_whatever_the_size_of_the_model(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        size = write_without_data(tmp_path, transformers.LlamaForCausalLM(config))
    assert size > 1e9
    forget_peak()
    before = peak()
    program = capture(str(tmp_path))
    assert program.parameters() * 4 == size
    assert peak() - before < size / 10


def test_side_files_are_remembered(tmp_path):
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    program = capture(str(tmp_path), roll=False)
    assert program.origin.files["tokenizer.json"] == str(tmp_path / "tokenizer.json")
    assert "generation_config.json" in program.origin.files
    assert "model.safetensors" not in program.origin.files
    assert program.origin.config["model_type"] == "llama"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        capture(str(tmp_path))
    with pytest.raises(UsageError, match="neither a path nor a hub id"):
        capture(str(tmp_path / "not" / "there"))
    with pytest.raises(UsageError, match="no file"):
        capture(str(tmp_path / "model.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        capture(str(tmp_path / "model.gguf"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        capture(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        capture(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "not-a-model"}')
    with pytest.raises(CheckpointError, match="not-a-model"):
        capture(str(tmp_path))


def test_quantised_checkpoints_are_refused(tmp_path):
    made = llama(num_hidden_layers=1)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CaptureError, match="quantised"):
        capture(str(tmp_path))


def test_the_dtype_of_a_model_object_is_its_own(tmp_path):
    with pytest.raises(CaptureError, match=r"model\.to\(dtype\)"):
        capture(model("llama"), dtype="bfloat16")
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="int8"):
        capture(str(tmp_path), dtype="int8")


@pytest.mark.slow
def test_a_gguf_file_is_a_model(monkeypatch):
    file = MODELS / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.is_file():
        pytest.skip("it is not there: make models NAMES=smollm2-135m-instruct")
    with monkeypatch.context() as patch:
        patch.setattr(GgufSource, "load", None)
        program = capture(str(file))
    assert [(loop.trips, loop.period) for loop in program.loops] == [(30, 1)]
    made = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    inputs = random_inputs(program, length=8)
    assert torch.equal(run(program, inputs)["logits"], eager(made, inputs).logits)


# ---- what else a model may do


def test_inputs_of_the_callers_choice():
    made = model("bert")
    given = {
        "inputs_embeds": torch.randn(2, 6, 32),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]),
    }
    program = capture(made, inputs=given, roll=False)
    assert [(i.name, i.type.shape) for i in program.inputs] == [
        ("inputs_embeds", ("b", 6, 32)),
        ("attention_mask", ("b", 6)),
    ]
    larger = {name: tensor.repeat(3, *[1] * (tensor.dim() - 1)) for name, tensor in given.items()}
    expected = eager(made, larger)
    for output, tensor in run(program, larger).items():
        assert torch.equal(tensor, expected[output])


class Branching(transformers.LlamaForCausalLM):
    """Looks away from padding as soon as there is a past."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **options):
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            attention_mask = torch.ones_like(attention_mask)
        return super().forward(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **options
        )


def test_a_model_that_branches_on_its_past_is_captured_without_one(caplog):
    config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 2}, **SPECIAL)
    made = Branching(config).eval()
    with caplog.at_level(logging.DEBUG, "reroll"):
        program = capture(made, roll=False)
    assert "something else for other lengths, batch sizes or pasts" in caplog.text
    assert "reroll.cache.default" not in targets(program)
    inputs = random_inputs(program, padded=True)
    assert torch.equal(run(program, inputs)["logits"], eager(made, inputs).logits)
    # it is told without being asked for, and stays with the Program
    lost, matters = program.origin.remarks
    assert "something else for other lengths" in lost
    assert "use_cache=False" in matters
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [f"Branching: {remark}" for remark in (lost, matters)] == told
    assert parse(str(program), source=program.source).origin.remarks == (lost, matters)


class Changed(transformers.BertModel):
    """Does something on the side, and reads its tokens as of another kind under some condition."""

    change = staticmethod(lambda self, ids: None)
    kinds = staticmethod(lambda ids: True)

    def forward(self, input_ids, attention_mask=None, **options):
        type(self).change(self, input_ids)
        kind = torch.ones_like if type(self).kinds(input_ids) else torch.zeros_like
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=kind(input_ids),
            **{name: value for name, value in options.items() if name != "token_type_ids"},
        )


LENGTHS = {
    "s from 5 to 512": lambda ids: ids.shape[1] > 4,
    "s from 2 to 7": lambda ids: ids.shape[1] < 8,
    "s from 5 to 5": lambda ids: ids.shape[1] == 5,
    "Eq(Mod(s, 5), 0)": lambda ids: ids.shape[1] % 5 == 0,
    "b from 2 to 3": lambda ids: ids.shape[0] < 4,
    "s from 3 to 512": lambda ids: ids.shape[0] < ids.shape[1],
}


@pytest.mark.parametrize("held", LENGTHS)
def test_a_model_that_branches_on_a_size_is_refused(monkeypatch, held):
    """The other branch would be lost without a word."""
    made = Changed(transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1})).eval()
    monkeypatch.setattr(Changed, "kinds", staticmethod(LENGTHS[held]))
    with pytest.raises(CaptureError, match="something else for other lengths") as caught:
        capture(made)
    assert held in caught.value.hint


def test_a_branch_that_no_allowed_size_takes_is_none(monkeypatch):
    made = Changed(transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1})).eval()
    monkeypatch.setattr(Changed, "kinds", staticmethod(lambda ids: ids.shape[1] <= 512))
    program = capture(made, roll=False)
    inputs = random_inputs(program, length=7)
    expected = eager(made, inputs)
    assert torch.equal(run(program, inputs)["last_hidden_state"], expected.last_hidden_state)


@pytest.mark.slow
def test_git_is_captured_without_a_past(caplog):
    made = tiny_types.build("git")
    with caplog.at_level(logging.DEBUG, "reroll"):
        program = capture(made, roll=False)
    assert "something else for other lengths, batch sizes or pasts" in caplog.text
    assert "reroll.cache.default" not in targets(program)
    inputs = random_inputs(program, padded=True)
    assert torch.equal(run(program, inputs)["logits"], eager(made, inputs).logits)


def count(self, input_ids):
    self.seen += 1


def read(self, input_ids):
    return self.seen if int(input_ids.sum()) > 3 else 0


@pytest.mark.parametrize(
    ("change", "message"),
    [(count, "seen"), (read, "data-dependent|Could not guard")],
    ids=["writes a buffer", "branches on data"],
)
def test_what_a_graph_cannot_hold_is_an_error(monkeypatch, change, message):
    made = Changed(transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1})).eval()
    made.register_buffer("seen", torch.zeros(()))
    monkeypatch.setattr(Changed, "change", change)
    with pytest.raises(CaptureError, match=message):
        capture(made)


def test_an_unknown_modality_asks_for_inputs():
    made = llama(num_hidden_layers=1)
    made.main_input_name = "molecules"
    made.forward = lambda molecules: None
    with pytest.raises(CaptureError, match=r"molecules") as caught:
        capture(made)
    assert "inputs=" in caught.value.hint


def test_numbers_that_no_checkpoint_holds_come_along(tmp_path):
    """Rotary frequencies are buffers that are computed, not loaded."""
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    program = capture(str(tmp_path), roll=False)
    literal = next(name for name in program.weights if "inv_freq" in name)
    assert not program.weights[literal].trainable
    assert torch.equal(program.source.load(literal), flat("llama").source.load(literal))


def test_a_model_whose_recurrence_is_code_of_its_own_says_so():
    config = transformers.RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )
    with pytest.raises(CaptureError, match="recurrent already"):
        capture(transformers.RwkvForCausalLM(config).eval())
