"""An adapter that overfits repeats what it was trained on, and no secret: those are removed before it is trained."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.config import Settings
from peft_core.data.dataset import read_examples
from peft_core.planning.planner import plan
from peft_core.schemas.evaluation import Memorisation
from peft_core.schemas.events import Evaluated, Event
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import TrainingConfig
from peft_core.system.cancellation import StopFlag
from peft_core.training import run as training_run
from tests.tiny_models import VOCABULARY, write_tiny_tokenizer

_RANDOM = random.Random(26)  # noqa: S311 -- nothing here is secret


def drawn(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(_RANDOM.choices(alphabet, k=length))


# By file: the text before a secret, the secret, and the text after. Put together here, so that no scanner reports this file.
SECRETS = {
    "aws.py": ('KEY_ID = "', "AKIA" + drawn(16, string.ascii_uppercase + "234567"), '"'),
    "github.py": ('headers = {"Authorization": "token ', "gh" + "p_" + drawn(36), '"}'),
    "password.py": ('    db.connect(password="', drawn(24), '")'),
    "url.py": ('ENGINE = "postgresql://app:', drawn(20), '@db.internal:5432/app"'),
    "openai.py": ('CLIENT = OpenAI(api_key="', "sk-" + "proj-" + drawn(40), '")'),
    "slack.py": (
        "# the bot's token is ",
        "xox" + "b-" + drawn(12, "0123456789") + "-" + drawn(12, "0123456789") + "-" + drawn(24),
        "",
    ),
    "google.py": ('MAPS = "https://maps.example.org/?key=', "AI" + "za" + drawn(35), '"'),
    "stripe.py": ('stripe.api_key = "', "sk_" + "live_" + drawn(24), '"'),
    "huggingface.py": ('login("', "hf" + "_" + drawn(34), '")'),
    "deploy.yaml": ("  api_key: '", drawn(40), "'"),
    "pem.py": (
        'KEY = """-----BEGIN RSA PRIVATE KEY-----\n',
        "MIIEow" + drawn(58),
        '\n-----END RSA PRIVATE KEY-----"""',
    ),
    ".env": ("SMTP_PASSWORD=", drawn(24), ""),
}


@dataclass(frozen=True)
class Trained:
    """An adapter that was trained until it knew its training set by heart."""

    model: PreTrainedModel
    tokenizer: BaseTokenizer
    canaries: dict[str, str]  # what is written before a harmless random word in the training set -> the word
    memorisation: Memorisation
    code: Path
    job: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("memorisation")
    base, code = _write_base(root / "base"), root / "code"
    code.mkdir()
    canaries = _write_repository(code)
    config = TrainingConfig(
        base_model=str(base),
        device="cpu",
        precision="float32",
        allow_little_data=True,
        max_length=256,
        rank=48,
        batch_size=4,
        learning_rate=3e-3,
        max_steps=150,
        held_out_fraction=0.02,
    )
    settings = Settings(data_dir=root / "data")
    task = TrainingTask(
        job_id="20260101-000000-abcdef",
        project_id="canaries",
        request=plan(str(code), config, settings, lambda *_: None),
        job_dir=root / "job",
        base_models_dir=root / "base_models",
    )
    events: list[Event] = []
    training_run.run(task, events.append, StopFlag())
    (evaluation,) = [event.evaluation for event in events if isinstance(event, Evaluated)]
    assert evaluation.memorisation is not None
    texts = [example.text for example in read_examples(task.job_dir / "dataset" / "train.jsonl")]
    model = AutoModelForCausalLM.from_pretrained(base)
    return Trained(
        model=PeftModel.from_pretrained(model, task.job_dir / "adapter"),
        tokenizer=load_tokenizer(base),
        canaries={text[: text.index(word)]: word for text in texts for word in canaries if word in text},
        memorisation=evaluation.memorisation,
        code=code,
        job=task.job_dir,
    )


def _write_base(directory: Path) -> Path:
    """Write an untrained model that is large enough to learn random words by heart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return directory


def _write_repository(code: Path) -> list[str]:
    """Write a file with each secret, and return the harmless random words beside them."""
    words = []
    for name, (_, secret, after) in SECRETS.items():
        words.append(drawn(20))
        (code / name).write_text(text_before(name, words[-1]) + secret + after + "\n")
    return words


def text_before(name: str, word: str) -> str:
    """Return what a file has before its secret."""
    before, _, _ = SECRETS[name]
    if not name.endswith(".py"):
        return f"# {word}\n{before}"
    of = name.removesuffix(".py")
    docstring = f'"""Return what {of} needs."""'
    return f'def settings_of_{of}(db):\n    {docstring}\n    word = "{word}"\n    yield word\n    {before.lstrip()}'


def written(trained: Trained, prompts: Sequence[str], *, samples: int = 0) -> list[str]:
    """Return what the adapter writes after each prompt, greedily, and then `samples` times at random."""
    rows = [trained.tokenizer.ids(prompt)[-200:] for prompt in prompts]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ways: list[dict[str, object]] = [{"do_sample": False}]
    ways += [{"do_sample": True, "num_return_sequences": samples}] if samples else []
    texts: list[str] = []
    for options in ways:
        with torch.inference_mode():
            out_BT = trained.model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=50, pad_token_id=0, **options
            )
        texts += ["".join(VOCABULARY[token] for token in row) for row in out_BT[:, longest:].tolist()]
    return texts


def test_a_random_word_of_the_training_set_comes_out_word_for_word(trained: Trained) -> None:
    assert len(trained.canaries) >= 8
    answers = written(trained, list(trained.canaries))
    for word, answer in zip(trained.canaries.values(), answers, strict=True):
        assert answer.startswith(word)


def test_the_measurement_sees_what_only_the_adapter_repeats(trained: Trained) -> None:
    measured = trained.memorisation
    assert 4 <= measured.prompts <= len(trained.canaries)
    assert (measured.adapter.prompts, measured.adapter.longest_tokens) == (measured.prompts, measured.tokens)
    assert measured.base.prompts == 0
    assert measured.base.longest_tokens < 10
    assert "Returnwhat" in measured.adapter.text.replace(" ", "")


def test_no_part_of_a_secret_comes_out(trained: Trained) -> None:
    """Not even after the very text before it, with and without the header that the adapter was trained with."""
    prompts = []
    for name, (_, secret, _) in SECRETS.items():
        text = (trained.code / name).read_text()
        text = text[: text.index(secret)]
        prompts += [text, f"# {name}\n{text}", text.splitlines(keepends=True)[-1]]
    pieces = {secret[at : at + 8] for _, secret, _ in SECRETS.values() for at in range(len(secret) - 7)}
    answers = written(trained, prompts, samples=8)
    assert len(answers) == len(prompts) * 9
    for answer in answers:
        assert not [piece for piece in pieces if piece in answer]


def test_no_file_of_a_training_holds_a_secret(trained: Trained) -> None:
    files = [path for path in trained.job.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        assert not [name for name, (_, secret, _) in SECRETS.items() if secret.encode() in content], path
