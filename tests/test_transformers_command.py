"""`python -m reroll.cli.transformers` runs transformers' own commands on a converted directory."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

import reroll
from reroll.errors import UsageError
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

INSTALL = "pip install -c constraints.txt 'reroll[serving]'"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    tokenizer = tiny.tokenizer(suffix=True)
    tokenizer.pad_token, tokenizer.chat_template = "<s>", TEMPLATE
    path = tmp_path_factory.mktemp("original")
    tiny.save(tiny.llama(), path, tokenizer)
    return path


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "converted"
    reroll.capture(original).save(path)
    return path


@pytest.fixture
def server(converted, tmp_path):
    """The address of transformers' server, which answers with the converted model."""
    pytest.importorskip("uvicorn", reason=INSTALL)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "reroll.cli.transformers", "serve", str(converted)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], stdout=log, stderr=log
        )
    address = f"http://localhost:{port}"
    try:
        until = time.monotonic() + 240
        while not answers(f"{address}/health"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_a_client_of_openai_gets_the_original_s_text(server, original, converted):
    openai = pytest.importorskip("openai", reason=INSTALL)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original)
    model = AutoModelForCausalLM.from_pretrained(original)
    messages = [{"role": "user", "content": "a b c"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    wanted = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert wanted
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    request = {"model": str(converted), "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == wanted
    stream = client.chat.completions.create(**request, stream=True)
    parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert "".join(parts) == wanted


def test_continuous_batching_is_refused_at_once(converted):
    model = reroll.load(converted).to_module()
    with pytest.raises(UsageError, match="keep no pages of a cache"):
        model.generate_batch([[3, 4, 5], [6, 7]])
    prompt = torch.tensor([[3, 4, 5]])
    assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_generation_stops_at_strings(original, converted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original)
    prompt = torch.tensor([[3, 4, 5]])
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (original, converted)]
    free = models[0].generate(prompt, max_new_tokens=8, do_sample=False)
    stop = tokenizer.decode(free[0, 4:5])
    wanted, got = (
        m.generate(
            prompt, max_new_tokens=8, do_sample=False, stop_strings=stop, tokenizer=tokenizer
        )
        for m in models
    )
    assert wanted.shape[1] < free.shape[1]
    assert torch.equal(got, wanted)
