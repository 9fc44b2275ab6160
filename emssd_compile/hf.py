"""The compiled model behind transformers' own `generate`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emssd_compile import keywords
from emssd_compile.errors import OptionError
from emssd_compile.numeric import shown
from emssd_compile.optimized_model import OptimizedModel, optimize

_CACHES = ("past_key_values", "cache")  # the one name and, since transformers 5.24, the other
_OF_ITS_OWN_DECODING = (*_CACHES, "use_cache", "logits_to_keep", "position_ids", "cache_position")


def generate(fast: OptimizedModel) -> Callable[..., Any]:
    """What to pass as `custom_generate` to the `generate` of the model that `fast` was compiled from.

        model.generate(**inputs, max_new_tokens=64, custom_generate=emssd_compile.hf.generate(fast))

    transformers reads the options, and `fast` decodes with them; so pipelines and other code that calls
    `model.generate` can have it decode. `seed`, `grammar` and `logits_hook` may be passed as well, as to
    `fast.generate`. transformers drops what it does not hand to functions, which cannot see that it was there: a
    `streamer` gets the prompt and no token, so that whoever reads a `TextIteratorStreamer` without a timeout waits for
    ever, `assistant_model` is without effect, which changes no token, and `stop_strings` lack their `tokenizer`, which
    transformers itself refuses. For these, call `fast.generate`, or write a folder with `save_custom_generate`.

    Args:
        fast: made by `emssd_compile.optimize`.

    Raises:
        OptionError: in `model.generate`: the model is another one, a KV cache was passed that is not empty, or a
            processor was passed beside an option that asks for the same kind of processor; and what `fast.generate`
            raises.
    """

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Iterable[Any] = (),
        stopping_criteria: Iterable[Any] = (),
        generation_config: Any = None,
        *,
        seed: int | None = None,
        grammar: Any = None,
        logits_hook: Any = None,
        **others: Any,
    ) -> Any:
        if model is not fast.model:
            raise OptionError(
                f"custom_generate: this {type(model).__name__} is not the model that was compiled; call generate of "
                "that one, or compile this one"
            )
        others = {name: value for name, value in others.items() if not _is_of_its_own_decoding(name, value)}
        others |= _of_assistants(model, generation_config)
        config = copy.deepcopy(generation_config)
        config.num_return_sequences = 1  # the prompts came expanded
        config.max_new_tokens = None  # it went into max_length
        return fast.generate(
            input_ids,
            config,
            seed=seed,
            grammar=grammar,
            logits_hook=logits_hook,
            logits_processor=_of_the_user(
                model, logits_processor, generation_config, input_ids, others.get("attention_mask")
            ),
            stopping_criteria=_criteria_of_the_user(model, stopping_criteria, generation_config),
            **others,
        )

    return decode


def save_custom_generate(folder: str | Path, **options: Any) -> None:
    """Write a folder with which transformers has any of its models compiled and decode.

        emssd_compile.hf.save_custom_generate("fast", max_batch=4, max_length=1024)
        model.generate(**inputs, max_new_tokens=64, custom_generate="fast", trust_remote_code=True)

    A model is compiled when it first generates so, and its compiled form lasts as long as the model. Arguments of
    `generate` are read by `fast.generate`: streamers, `assistant_model` and stop strings work, too. The file is
    `custom_generate/generate.py`; the folder may be that of a model's checkpoint.

    Args:
        folder: where; it may exist.
        **options: of `emssd_compile.optimize`, each a text, a number or a bool.

    Raises:
        OptionError: an option is none of them, or cannot be written down; or the folder has such a file already.
    """
    known = inspect.signature(optimize).parameters.keys() - {"model", "processors", "probes"}
    for name, value in options.items():
        if name not in known or not isinstance(value, (str, int, bool, type(None))):
            raise OptionError(
                f"save_custom_generate: {name}={shown(value)} cannot be written down; it takes a text, number or bool "
                f"for each of {', '.join(sorted(known))}"
            )
    place = Path(folder) / "custom_generate" / "generate.py"
    if place.exists():
        raise OptionError(f"save_custom_generate: {place} exists; remove it, or choose another folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(_CUSTOM_GENERATE.format(options=options))


def compiled(model: Any, options: Mapping[str, Any]) -> OptimizedModel:
    """The model, compiled with these options of `optimize`; once, as long as they are the same."""
    kept = vars(model).setdefault("_emssd_compiled", _Compiled())
    if kept.fast is None or kept.options != options:
        kept.fast, kept.options = None, {**options}  # the KV caches of the last one make room
        kept.fast = optimize(model, **options)
    fast: OptimizedModel = kept.fast
    return fast


class _Compiled:
    """What was compiled of a model, kept with it; a copy of the model has nothing of its own yet."""

    def __init__(self) -> None:
        self.fast: OptimizedModel | None = None
        self.options: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[_Compiled], tuple[()]]:
        return _Compiled, ()


_CUSTOM_GENERATE = '''"""Decodes by emssd_compile: generate(..., custom_generate=FOLDER, trust_remote_code=True)."""

from emssd_compile import hf

OPTIONS = {options!r}


def generate(model, inputs=None, generation_config=None, **arguments):
    return hf.compiled(model, OPTIONS).generate(inputs, generation_config, **arguments)
'''


def _of_assistants(model: Any, config: Any) -> dict[str, Any]:
    """What the call says of assisted decoding: what is neither the model's own nor transformers' default."""
    defaults = config._get_default_generation_params()
    given = {name: getattr(config, name, None) for name in keywords.OF_ASSISTANTS}
    own = {name: getattr(model.generation_config, name, None) for name in keywords.OF_ASSISTANTS}
    return {name: value for name, value in given.items() if value not in (None, own[name], defaults.get(name))}


def _is_of_its_own_decoding(name: str, value: Any) -> bool:
    """Whether transformers passes it to every way of decoding, and it says nothing."""
    if name in _CACHES and value is not None and value.get_seq_length() > 0:
        raise OptionError(f"{name} holds tokens; the compiled step keeps its own KV cache: pass the whole text")
    return name in _OF_ITS_OWN_DECODING


def _of_the_user(
    model: Any, prepared: Iterable[Any], config: Any, input_ids: Tensor, attention_mask: Tensor | None
) -> list[Any]:
    """The processors that do not come from options, which the compiled step carries out itself.

    Raises:
        OptionError: one stands in for that of an option.
    """
    of_options = model._get_logits_processor(
        config, input_ids_seq_length=input_ids.shape[1], model_kwargs={"attention_mask": attention_mask}
    )
    made = {type(each): each for each in of_options}
    found = []
    for each in prepared:
        if type(each) not in made:
            found.append(each)
        elif not _same(vars(each), vars(made[type(each)])):
            raise OptionError(
                f"logits_processor holds a {type(each).__name__}, which an option asks for, too, with other values; "
                "leave one of them out"
            )
    return found


def _criteria_of_the_user(model: Any, prepared: Iterable[Any], config: Any) -> list[Any]:
    """The criteria that do not say what options say, which the compiled step carries out itself."""
    made = {type(each): each for each in model._get_stopping_criteria(config, [])}
    timed = "max_time" if config.max_time is not None else None  # the start of another clock does not matter
    return [
        each
        for each in prepared
        if not (type(each) in made and (_same(vars(each), vars(made[type(each)])) or _says(each, timed, config)))
    ]


def _says(criterion: Any, name: str | None, config: Any) -> bool:
    """Whether it holds the option of that name."""
    return name is not None and getattr(criterion, name, None) == getattr(config, name)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)
    return bool(first == second)
