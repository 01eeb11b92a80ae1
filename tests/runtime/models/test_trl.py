"""trl trains converted models as it trains their originals: by texts, preferences and rewards."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import reroll
from tests import tiny
from tests.runtime.models.test_backbone import KINDS, lowered
from tests.slow import slow

trl = pytest.importorskip("trl", reason="pip install -c constraints.txt 'reroll[trl]'")
from datasets import Dataset  # noqa: E402  (it comes with trl)

pytestmark = pytest.mark.usefixtures("captured_once")

TEXTS = Dataset.from_dict({"text": ["a b c d e f a b c d", "c d", "d e f a b", "b"] * 2})
PAIRS = Dataset.from_dict(
    {
        "prompt": ["a b", "c d e"] * 4,
        "chosen": [" c d e f a"] * 4 + [" f"] * 4,
        "rejected": [" b"] * 8,
    }
)
PROMPTS = Dataset.from_dict({"prompt": ["a b", "c d e"] * 4})


def settings(kind, folder, **options):
    return kind(
        output_dir=str(folder),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        logging_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        **options,
    )


def sft(folder, **options):
    args = settings(trl.SFTConfig, folder, **{"max_length": 16, **options})
    return trl.SFTTrainer, {"args": args, "train_dataset": TEXTS}


def packed(folder):
    return sft(folder, packing=True)


def padding_free(folder):
    return sft(folder, padding_free=True, max_length=None)


def dpo(folder):
    return trl.DPOTrainer, {"args": settings(trl.DPOConfig, folder), "train_dataset": PAIRS}


def grpo(folder):
    def reward(completions, **_):
        return [float(number % 2) for number in range(len(completions))]

    args = settings(trl.GRPOConfig, folder, num_generations=2, max_completion_length=4)
    return trl.GRPOTrainer, {"args": args, "train_dataset": PROMPTS, "reward_funcs": reward}


def rewards(folder):
    args = settings(trl.RewardConfig, folder)
    pairs = PAIRS.map(
        lambda row: {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        },
        remove_columns=["prompt"],
    )
    return trl.RewardTrainer, {"args": args, "train_dataset": pairs}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a kind of converted model, or of "the original"."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer(suffix=True)
    tokenizer.pad_token = "<s>"

    def path(kind):
        if not (folder / kind).exists():
            if kind == "the original":
                tiny.save(tiny.llama(), folder / kind, tokenizer)
            else:
                lowered(kind).save_pretrained(folder / kind)
        return folder / kind

    return path


def train(path, method, folder, lora=False):
    """Train a saved model for two steps; return the losses and norms of gradients."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer(suffix=True)
    tokenizer.pad_token = "<s>"
    trainer_class, arguments = method(folder)
    # without an adapter, DPO loads its reference from the same path
    by_path = method is rewards or (method is dpo and not lora)
    trainer = trainer_class(
        model=str(path) if by_path else AutoModelForCausalLM.from_pretrained(path),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
        **arguments,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not lora or all("lora_" in name for name in moved)
    return [h[k] for h in trainer.state.log_history for k in ("loss", "grad_norm") if k in h]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("method", [sft, packed, grpo, *slow(padding_free, dpo)])
def test_an_exact_conversion_trains_as_the_original(method, lora, saved, tmp_path):
    wanted = train(saved("the original"), method, tmp_path, lora)
    got = train(saved("rolled"), method, tmp_path, lora)
    assert len(got) == 4
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)


OTHERS = [kind for kind in KINDS if kind not in ("rolled", "delta")]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["delta", *slow(*OTHERS)])
def test_every_kind_trains_by_every_method(kind, lora, saved, tmp_path):
    for method in (packed, dpo, grpo):
        values = train(saved(kind), method, tmp_path, lora)
        assert all(torch.tensor(values).isfinite())
    # texts in one row are kept apart
    rows = train(saved(kind), sft, tmp_path, lora)
    assert train(saved(kind), padding_free, tmp_path, lora) == pytest.approx(rows, rel=1e-4)


@pytest.mark.parametrize("kind", ["rolled", "delta"])
def test_a_reward_is_learnt_on_the_layers(kind, saved, tmp_path):
    assert len(train(saved(kind), rewards, tmp_path)) == 4


def test_a_model_in_memory_trains(tmp_path):
    model = reroll.capture(tiny.llama()).to_module()
    tokenizer = tiny.tokenizer(suffix=True)
    tokenizer.pad_token = "<s>"
    _, arguments = sft(tmp_path)
    trainer = trl.SFTTrainer(model=model, processing_class=tokenizer, **arguments)
    assert trainer.train().global_step == 2
