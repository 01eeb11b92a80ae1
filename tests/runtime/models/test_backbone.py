"""The part of a lowered model below its head, copies and pickles of the whole."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import reroll
from tests import captured, tiny
from tests.runtime.models.test_seq2seq import assert_close
from tests.slow import slow
from tests.tiny.types import build

pytestmark = pytest.mark.usefixtures("captured_once")

KINDS = {
    "rolled": None,
    "relaxed": "tie(blocks=2), relax(rank=2)",
    "window": "window(size=4, sinks=1)",
    "delta": "linearize(mixer=gated_deltanet, window=4)",
    "slots": "linearize(mixer=gsa, window=4)",
    "exits": "insert_exits(at=[1])",
    # the test of an exit reads weights outside of the trip
    "exits open": "insert_exits(at=[1], threshold=0.05)",
}


def lowered(kind):
    program = reroll.capture(tiny.llama())
    if KINDS[kind]:
        program = reroll.run_passes(program, KINDS[kind], measure="off")
    return program.to_module().eval()


def ids():
    return torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_gives_what_the_head_reads(kind):
    model = lowered(kind)
    backbone = model.base_model
    assert backbone is model.model
    assert model.get_decoder() is backbone
    with torch.no_grad():
        output = backbone(input_ids=ids(), use_cache=True)
        logits = model.lm_head(output.last_hidden_state)
        assert torch.equal(logits, model(ids()).logits)
        # the cache that it returns is continued
        more = backbone(input_ids=ids()[:, :1], past_key_values=output.past_key_values)
        whole = backbone(input_ids=torch.cat([ids(), ids()[:, :1]], 1), use_cache=False)
    torch.testing.assert_close(more.last_hidden_state, whole.last_hidden_state[:, -1:])
    assert whole.past_key_values is None


@pytest.mark.parametrize("name", ["llama", "gpt2", *slow("gemma3_text", "bloom")])
def test_last_hidden_state_is_the_original_s(name):
    original = build(name).eval()
    model = reroll.capture(original).to_module().eval()
    tokens = ids() % original.config.vocab_size
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        want = original.base_model(tokens, attention_mask=mask, output_hidden_states=True)
        got = model.base_model(tokens, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(got.last_hidden_state[mask > 0], want.last_hidden_state[mask > 0])
    assert len(got.hidden_states) == len(want.hidden_states)


def test_a_directory_in_a_fresh_process_gives_the_same_last_hidden_state(tmp_path):
    tiny.save(tiny.llama().to(torch.bfloat16), tmp_path / "original", tiny.tokenizer())
    model = reroll.capture(tmp_path / "original").to_module().eval()
    assert model.dtype == torch.bfloat16
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    with torch.no_grad():
        here = model.base_model(ids(), attention_mask=mask).last_hidden_state
    model.save_pretrained(tmp_path / "saved")
    torch.save({"ids": ids(), "mask": mask, "here": here}, tmp_path / "values.pt")
    code = f"""
import reroll, torch
from transformers import AutoModelForCausalLM
values = torch.load({str(tmp_path / "values.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r})
with torch.no_grad():
    there = model.base_model(values["ids"], attention_mask=values["mask"]).last_hidden_state
assert there.dtype == torch.bfloat16
assert torch.equal(there, values["here"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_change_of_dtype_reaches_the_backbone():
    model = lowered("relaxed")
    model.base_model(ids())
    half = model.to(torch.bfloat16)
    wanted = half(ids(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(half.base_model(ids()).last_hidden_state, wanted)


def test_a_classifier_of_tokens_is_its_own_base_model():
    config = transformers.BertConfig(**captured.TEXT, intermediate_size=64)
    original = transformers.BertForTokenClassification(config).eval()
    model = reroll.capture(original).to_module()
    assert model.base_model is model


def test_layers_are_a_list_as_in_the_original():
    layers = lowered("relaxed").model.layers
    assert isinstance(layers, torch.nn.ModuleList)
    assert len(layers) == 4
    assert layers[-1] is list(layers)[3]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_compute_the_same_on_weights_of_their_own(kind):
    model = lowered(kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {
        "pickle": pickle.loads(pickle.dumps(model)),
        "deepcopy": copy.deepcopy(model),
        "torch.save": torch.load(file, weights_only=False),
    }
    wanted = model.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    for each in copies.values():
        assert each.base_model.owner is each
        assert [n for n, _ in each.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert not {id(p) for p in each.parameters()} & {id(p) for p in model.parameters()}
        assert torch.equal(each(ids()).logits, model(ids()).logits)
        generated = each.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, wanted)


def test_an_encoder_is_pickled_with_the_class_of_its_outputs():
    model = captured.captured("bert").to_module()
    for each in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(each(ids() % 60)[0], model(ids() % 60)[0])


@pytest.mark.parametrize("kind", ["rolled", "relaxed", "exits open"])
def test_models_are_exported_as_graphs(kind):
    model = lowered(kind)
    inputs = {"input_ids": ids(), "use_cache": False}
    with torch.no_grad():
        graph = torch.export.export(model, (), inputs, strict=False).module()
        assert torch.equal(graph(**inputs).logits, model(**inputs).logits)


def test_the_configuration_asks_for_tuples():
    for model in (lowered("rolled"), captured.captured("bert").to_module()):
        model.config.return_dict = False
        assert isinstance(model(ids() % 60), tuple)
        assert not isinstance(model(ids() % 60, return_dict=True), tuple)


def test_a_pickled_model_has_its_present_weights_and_can_be_saved(tmp_path):
    model = lowered("relaxed")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    again = pickle.loads(pickle.dumps(model))
    again.save_pretrained(tmp_path / "out")
    opened = reroll.load(tmp_path / "out").to_module().eval()
    assert torch.equal(opened(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("kind", ["rolled", "relaxed"])
def test_a_pickled_program_is_the_same_program(kind):
    program = lowered(kind).program
    again = pickle.loads(pickle.dumps(program))
    assert str(again) == str(program)
    assert torch.equal(again.to_module()(ids()).logits, program.to_module()(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
@pytest.mark.parametrize("name", ["llama", "bert", *slow("gemma3_text")])
def test_a_program_of_a_directory_is_pickled_with_its_names_not_its_tensors(name, dtype, tmp_path):
    build(name).to(dtype).save_pretrained(tmp_path)
    program = reroll.capture(tmp_path)
    data = pickle.dumps(program)
    assert len(data) < (tmp_path / "model.safetensors").stat().st_size
    again = pickle.loads(data)
    assert str(again) == str(program)
    model, other = (p.to_module().eval() for p in (program, again))
    tokens = ids() % program.origin.config["vocab_size"]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        assert torch.equal(other(tokens, **inputs)[0], model(tokens, **inputs)[0])
    assert torch.equal(pickle.loads(pickle.dumps(other))(tokens)[0], model(tokens)[0])


def pair(name):
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=64, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    bart = transformers.BartForConditionalGeneration(config).eval()
    return bart if name == "bart" else captured.model(name)


@pytest.mark.parametrize("name", ["bart", *slow("t5", "whisper")])
def test_encoder_and_decoder_are_the_original_s(name):
    original = pair(name)
    model = reroll.capture(original).to_module()
    kind = {"output_hidden_states": True}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    inputs = {"input_ids": ids() % 64, "attention_mask": mask}
    if name == "whisper":
        frames = 2 * original.config.max_source_positions
        inputs = {"input_features": torch.randn(2, original.config.num_mel_bins, frames)}
    parts = [(m.get_encoder(), m.get_decoder(), m.base_model) for m in (original, model)]
    models = zip((original, model), parts, strict=True)
    names = [[n for n, m in each.named_modules() if m in part] for each, part in models]
    assert names[0] == names[1]
    with torch.no_grad():
        encoded = [encoder(**inputs, **kind) for encoder, _, _ in parts]
        assert_close(encoded[1][0], encoded[0][0])
        assert len(encoded[1].hidden_states) == len(encoded[0].hidden_states)
        given = {"input_ids": ids()[:, :5] % 64, "encoder_hidden_states": encoded[0][0], **kind}
        if name != "whisper":
            given["encoder_attention_mask"] = mask
        decoded = [decoder(**given) for _, decoder, _ in parts]
        assert_close(decoded[1][0], decoded[0][0])
        for states in zip(decoded[1].hidden_states, decoded[0].hidden_states, strict=True):
            assert_close(*states)
        # the cache that it returns is continued
        more = {**given, "input_ids": ids()[:, :1] % 64}
        further = [
            decoder(**more, past_key_values=made.past_key_values)
            for (_, decoder, _), made in zip(parts, decoded, strict=True)
        ]
        assert_close(further[1][0], further[0][0])
        whole = [base(**inputs, decoder_input_ids=ids()[:, :5] % 64) for _, _, base in parts]
        assert_close(whole[1][0], whole[0][0])
        assert type(whole[1]) is type(whole[0])


def test_a_part_of_a_copy_belongs_to_the_copy():
    model = captured.captured("t5").to_module()
    again = copy.deepcopy(model)
    assert again.get_encoder() is again.encoder
    assert again.get_encoder().owner is again
    read = pickle.loads(pickle.dumps(model))
    assert read.get_decoder() is read.decoder


def _logits(file, results):
    values = torch.load(file, weights_only=False)
    results.put(values["model"](values["ids"]).logits.detach().numpy())


def test_a_spawned_process_gets_the_model(tmp_path):
    model = lowered("relaxed")
    torch.save({"model": model, "ids": ids()}, tmp_path / "values.pt")
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_logits, args=(tmp_path / "values.pt", results))
    process.start()
    there = torch.from_numpy(results.get())
    process.join()
    assert torch.equal(there, model(ids()).logits)


class Tokens(torch.utils.data.Dataset):
    """Data that a converted model computes, in the workers of a loader."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.model(ids()[number : number + 1]).logits.detach()


def test_spawned_workers_of_a_loader_compute_with_the_model():
    model = lowered("exits")
    loader = torch.utils.data.DataLoader(
        Tokens(model), num_workers=1, multiprocessing_context="spawn", timeout=300
    )
    for number, value in enumerate(loader):
        torch.testing.assert_close(value[0], model(ids()[number : number + 1]).logits)


def test_a_pickle_of_another_process_can_be_saved(tmp_path):
    code = f"""
import torch
from tests.runtime.models.test_backbone import lowered
torch.save(lowered("rolled"), {str(tmp_path / "model.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").is_file()
    model.program.save(tmp_path / "program")
    assert reroll.load(tmp_path / "program").origin.files.keys() == {"generation_config.json"}
