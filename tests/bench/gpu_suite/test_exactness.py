from types import SimpleNamespace

import pytest
import torch
from torch import nn

import emssd_compile
from bench.gpu_suite import exactness
from bench.gpu_suite.exactness import Case, Verdict, judge

CPU = torch.device("cpu")
IDS = [3, 1]


class Fixed(nn.Module):
    """The same logits after every text."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, ids):
        return SimpleNamespace(logits=self.logits.expand(1, ids.shape[1], -1))


def judged(own, single, got, expected=(0, 0, 0)):
    verdict = Verdict()
    judge(verdict, Fixed(own), single and Fixed(single), IDS, got, expected)
    return verdict.identical, verdict.excused, verdict.wrong


def test_a_row_that_parts_at_a_tie_is_excused_and_counted_and_otherwise_wrong():
    # Rounding moves the logits by up to 0.5: two of them may swap if they are no more than 1 apart.
    own, single = [4.0, 3.25, 1.0, 2.0], [3.5, 3.5, 1.0, 2.0]
    assert judged(own, single, [0, 0, 0]) == (1, 0, 0)
    assert judged(own, single, [0, 1, 2]) == (0, 1, 0)  # what follows the first divergence is another text
    assert judged(own, single, [0, 3, 0]) == (0, 0, 1)  # 2 below the best
    assert judged(own, own, [1, 0, 0]) == (0, 0, 1)  # no rounding at all


def test_nothing_is_excused_in_float32_nor_a_row_of_another_length():
    own = [4.0, 4.0]
    assert judged(own, None, [0, 1, 0]) == (0, 0, 1)
    assert judged(own, own, [0, 0]) == (0, 0, 1)
    assert judged(own, own, [0, 1, 0]) == (0, 1, 0)


def test_a_toy_model_is_exact_and_one_that_is_not_is_caught(monkeypatch):
    case = Case("opt", torch.float32, "prompt-lookup", "eager")
    assert exactness.examine(case, CPU).identical == 8
    optimize = emssd_compile.optimize

    def broken(*arguments, **options):
        fast = optimize(*arguments, **options)

        def spoilt(prompts, **named):
            first, *others = fast.generate(prompts, **named)
            return [[*first[:-1], first[-1] ^ 1], *others]

        return SimpleNamespace(generate=spoilt)

    monkeypatch.setattr(emssd_compile, "optimize", broken)
    verdict = exactness.examine(case, CPU)
    assert (verdict.identical, verdict.excused, verdict.wrong) == (7, 0, 1)
    assert "prompt of 1 tokens, token 23" in verdict.divergences[0]


def test_one_case_that_fails_fails_the_command_and_the_others_are_examined(monkeypatch, tmp_path, capsys):
    answers = iter([Verdict(identical=8), RuntimeError("boom"), NotImplementedError("no layout"), Verdict(excused=1)])

    def examine(case, device):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    chosen = [Case(name, torch.float32, "none", "eager") for name in "abcd"]
    monkeypatch.setattr(exactness, "examine", examine)
    monkeypatch.setattr(exactness, "cases", lambda smoke: iter(chosen))
    assert exactness.main(["--json", str(tmp_path / "exactness.json")]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: boom" in printed
    assert "no layout" in printed


@pytest.mark.parametrize(
    ("verdict", "good"),
    [
        (Verdict(identical=1, excused=1), True),
        (Verdict(missing="layout"), True),
        (Verdict(identical=5, wrong=1), False),
        (Verdict(failure="boom"), False),
    ],
)
def test_what_passes(verdict, good):
    assert verdict.good == good
