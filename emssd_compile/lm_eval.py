"""A model of lm-evaluation-harness whose texts are decoded by a compiled model.

python -m emssd_compile.lm_eval --model emssd --model_args pretrained=DIR --tasks TASK --batch_size 8
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval.__main__
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm

from emssd_compile.errors import OptionError
from emssd_compile.optimized_model import OptimizedModel, optimize


@register_model("emssd")
class CompiledLM(HFLM):
    """`HFLM` with `generate_until` of a compiled model; log-likelihoods are those of the model's own forward.

    Each request starts as soon as one before it has ended. Its text is what `HFLM` gives with `batch_size=1`, whatever
    the batch size is here.

    Args:
        pretrained: as of `HFLM`; or what `optimize` made, which then decides all options but those of the harness.
        drafter, layout: as of `optimize`.
        compile_backend: `backend` of `optimize`, a word that `HFLM` uses for something else.
        **options: of `HFLM`. `batch_size` is how many rows are decoded together; "auto" means `max_batch_size`. The
            model is compiled when texts are first asked for, for the longest of them; `max_length` limits that.

    Raises:
        OptionError: the model is no decoder-only one; and what `optimize` raises, when texts are asked for.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        drafter: Any = "prompt-lookup",
        layout: str = "auto",
        compile_backend: str = "inductor",
        **options: Any,
    ) -> None:
        fast = pretrained if isinstance(pretrained, OptimizedModel) else None
        super().__init__(pretrained=pretrained if fast is None else fast.model, **options)
        if self.backend != "causal":
            raise OptionError("pretrained: emssd decodes decoder-only models; use --model hf for an encoder-decoder")
        self._fast, self._is_own = fast, fast is None
        self._how: dict[str, Any] = {"drafter": drafter, "layout": layout, "backend": compile_backend}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each request's context, up to the first of its stop sequences."""
        prompts = [self._read(*request.args) for request in requests]
        if not prompts:
            return []
        fast, texts = self._compiled(max(len(ids) + most for ids, most, _, _ in prompts)), []
        bar = tqdm(total=len(prompts), disable=disable_tqdm or self.rank != 0, desc="Running generate_until requests")
        with bar, fast.session(max_queue=len(prompts)) as session:
            streams = [
                session.submit(
                    ids,
                    max_new_tokens=most,
                    pad_token_id=self.tokenizer.pad_token_id,
                    stopping_criteria=stop_sequences_criteria(self.tokenizer, until, len(ids), 1),
                    **self._effective(fast, options),
                )
                for ids, most, until, options in prompts
            ]
            for request, stream, (_, _, until, _) in zip(requests, streams, prompts, strict=True):
                stream.result()
                texts.append(self._text(stream.tokens, until))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                bar.update()
        return texts

    def _read(self, context: str, given: dict[str, Any]) -> tuple[list[int], int, list[str], dict[str, Any]]:
        """Ids of the context, most new tokens, stop sequences, and the other options."""
        options: dict[str, Any] = {**normalize_gen_kwargs(given, self.max_gen_toks)}
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until, most = handle_stop_sequences(options.pop("until"), eos=eos), options.pop("max_gen_toks")
        limit: int = self.max_length if self._is_own or self._fast is None else self._fast.options.max_length
        if most >= limit:
            raise OptionError(
                f"max_gen_toks={most}, and a text may have {limit} tokens, its context included; ask for fewer, or "
                "pass a larger max_length"
            )
        ids, _ = self.tok_batch_encode([context], left_truncate_len=limit - most, truncation=self.truncation)
        found = ids[0].tolist()
        if "max_length" in options:
            most = options.pop("max_length") - len(found)
        return found, most, until, options

    def _compiled(self, length: int) -> OptimizedModel:
        """The model with rows of at least so many tokens."""
        if self._fast is None or (self._is_own and self._fast.options.max_length < length):
            rows = self.max_batch_size if self.batch_size == "auto" else self.batch_size
            self._fast = None  # its KV caches make room for those of the next
            self._fast = optimize(self.model, max_batch=rows, max_length=length, **self._how)
        return self._fast

    def _effective(self, fast: OptimizedModel, options: dict[str, Any]) -> dict[str, Any]:
        """Without what tasks say about sampling where they ask for none, as for `temperature: 0`."""
        if options["do_sample"]:
            return options
        known = fast.row_options
        return {name: value for name, value in options.items() if name not in known or known[name].needs != "do_sample"}

    def _text(self, ids: list[int], until: list[str]) -> str:
        """What a task is given of the new tokens."""
        end = self.think_end_token
        if isinstance(end, int):
            answer = ids[len(ids) - ids[::-1].index(end) :] if end in ids else ids
            text, end = self.tok_decode(answer).lstrip(), None
        else:
            text = self.tok_decode(ids)
        found: str = postprocess_generated_text(text, until, end)
        return found


if __name__ == "__main__":
    lm_eval.__main__.cli_evaluate()
