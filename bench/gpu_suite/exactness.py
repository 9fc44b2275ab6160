"""Whether the tokens are the model's own: in float32 to the token, in half precision up to rounding, which is counted.

    python -m bench.gpu_suite.exactness --device cuda --json exactness.json

Every text is compared with the model's greedy decoding of its prompt alone, by full forward passes without a cache, in
the same precision on the same device. In half precision a text may part from it where two tokens are as good as tied. A
first divergence is excused if the model's own logits put our token no further below its best than twice what rounding
does to its logits there: their largest difference from those of the same weights in float32. Nothing is excused in
float32.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from rich.table import Table
from torch import Tensor, nn

import emssd_compile
from bench import shapes
from bench.command import argument_parser, describe, hardware, make_console, parse, save, versions
from tests.exactness.models import build, prompt

_LENGTHS = (1, 61, 5, 33, 2, 48, 17, 70)
_TOY_TOKENS, _DEMO_TOKENS = 24, 48
_TOYS = ("llama", "opt", "gpt2", "mistral", "gemma", "bloom", "qwen3", "gpt_neox")
_HALF = (torch.bfloat16, torch.float16)
_TOYS_IN = {
    torch.float32: _TOYS,
    torch.bfloat16: ("llama", "mistral", "gemma", "bloom"),
    torch.float16: ("llama", "opt"),
}


@dataclass(frozen=True)
class Case:
    """One model in one precision, decoded in one way."""

    model: str
    dtype: torch.dtype
    drafter: str
    backend: str
    layout: str = "packed"


@dataclass
class Verdict:
    """What came out.

    Attributes:
        identical: rows that are the model's own to the last token.
        excused: rows that part from it at a tie, within rounding.
        wrong: rows that part from it otherwise.
        divergences: a line for each row that does.
        failure: why the case could not be run.
        missing: what it needs and is not there yet.
    """

    identical: int = 0
    excused: int = 0
    wrong: int = 0
    divergences: list[str] = field(default_factory=list)
    failure: str = ""
    missing: str = ""

    @property
    def good(self) -> bool:
        """No row is wrong."""
        return not self.wrong and not self.failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, save; returns 1 if a row is wrong."""
    options = parse_arguments(arguments)
    verdicts: dict[Case, Verdict] = {}
    for case in cases(smoke=options.smoke):
        try:
            verdicts[case] = examine(case, options.device)
        except NotImplementedError as error:
            verdicts[case] = Verdict(missing=str(error))
        except Exception as error:  # the other cases are still worth knowing
            verdicts[case] = Verdict(failure=f"{type(error).__name__}: {error}")
        if options.json:
            rows = [{**asdict(c), "dtype": str(c.dtype), **asdict(v)} for c, v in verdicts.items()]
            save(options.json, "bench.gpu_suite.exactness", [{"title": "exactness", "rows": rows}])
    make_console().print(table(verdicts))
    return int(not all(verdict.good for verdict in verdicts.values()))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="two toy models, not compiled")
    return parse(parser, arguments)


def cases(*, smoke: bool) -> Iterator[Case]:
    """Toy models op by op, for the breadth of architectures; the demo model compiled."""
    for dtype, toys in _TOYS_IN.items():
        for toy in toys[:2] if smoke else toys:
            yield Case(toy, dtype, "prompt-lookup", "eager")
    if not smoke:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case("demo", dtype, "prompt-lookup", "inductor")
        yield Case("demo", torch.float32, "none", "eager")
        for layout in ("padded", "auto"):
            yield Case("demo", torch.float32, "prompt-lookup", "eager", layout)


def examine(case: Case, device: torch.device) -> Verdict:
    """Decode a ragged batch and compare every row."""
    model, prompts, num_new = subject(case, device)
    fast = emssd_compile.optimize(
        model,
        case.drafter,
        max_batch=len(prompts),
        max_length=max(map(len, prompts)) + num_new,
        backend=case.backend,
        layout=case.layout,
    )
    rows = fast.generate(prompts, max_new_tokens=num_new, eos_token_id=None)
    single = copy.deepcopy(model).float() if case.dtype in _HALF else None
    verdict = Verdict()
    for row, ids in zip(rows, prompts, strict=True):
        judge(verdict, model, single, ids, list(row[len(ids) :]), greedy(model, ids, num_new))
    return verdict


def subject(case: Case, device: torch.device) -> tuple[nn.Module, list[list[int]], int]:
    """The model, ragged prompts, and how many tokens to add."""
    if case.model == "demo":
        prompts = sorted(shapes.demo_prompts(), key=len)[::4]
        return shapes.build("demo", device, case.dtype), prompts, _DEMO_TOKENS
    return build(case.model).to(device, case.dtype), [prompt(length) for length in _LENGTHS], _TOY_TOKENS


def greedy(model: nn.Module, ids: Sequence[int], num_new: int) -> list[int]:
    """One prompt alone, a full forward pass for every token."""
    text = list(ids)
    for _ in range(num_new):
        text.append(int(next_logits(model, text).argmax()))
    return text[len(ids) :]


@torch.inference_mode()
def next_logits(model: nn.Module, text: Sequence[int]) -> Tensor:
    """Logits `[V]` of the token after `text`, in float32."""
    device = next(model.parameters()).device
    logits: Tensor = model(torch.tensor([text], device=device)).logits[0, -1]
    return logits.detach().float()


def judge(
    verdict: Verdict,
    model: nn.Module,
    single: nn.Module | None,
    ids: Sequence[int],
    got: Sequence[int],
    expected: Sequence[int],
) -> None:
    """Add one row to the verdict.

    Args:
        verdict: is added to.
        model: the model.
        single: the same weights in float32; `None` if nothing is to be excused.
        ids: the prompt.
        got: our tokens.
        expected: the model's own.
    """
    if list(got) == list(expected):
        verdict.identical += 1
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
    )
    line = f"prompt of {len(ids)} tokens, token {place}"
    if single is None or len(got) != len(expected):
        verdict.wrong += 1
        verdict.divergences.append(f"{line}: {got[place : place + 1]} instead of {expected[place : place + 1]}")
        return
    text = [*ids, *expected[:place]]
    own = next_logits(model, text)
    rounding = float((own - next_logits(single, text)).abs().max())
    gap = float(own.max() - own[got[place]])
    excused = gap <= 2 * rounding
    verdict.excused += excused
    verdict.wrong += not excused
    verdict.divergences.append(f"{line}: {gap:.2e} below the best, rounding is {rounding:.2e}")


def table(verdicts: dict[Case, Verdict]) -> Table:
    """For `rich`."""
    shown = Table(title="tokens against the model's own", caption=f"{describe(hardware())}\n{describe(versions())}")
    for heading in ("model", "dtype", "drafter", "backend", "layout"):
        shown.add_column(heading)
    for heading in ("identical", "excused", "wrong"):
        shown.add_column(heading, justify="right")
    shown.add_column("first divergences")
    for case, verdict in verdicts.items():
        shown.add_row(
            case.model,
            str(case.dtype).removeprefix("torch."),
            case.drafter,
            case.backend,
            case.layout,
            *map(str, (verdict.identical, verdict.excused, verdict.wrong)),
            verdict.failure or verdict.missing or "\n".join(verdict.divergences),
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
