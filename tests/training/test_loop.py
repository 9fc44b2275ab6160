from dataclasses import replace

import pytest
import torch

from emssd_compile.errors import DrafterError
from emssd_compile.training import loop
from emssd_compile.training.data import Windows, encode
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loop import Trainer, learning_rate
from emssd_compile.training.work import Progress
from tests.training.toys import BATCH, DEPTH, TEXT, WINDOW, Characters, toy_target, trainer


class Killed(Exception):
    pass


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.head.state_dict().items()}


def run_until(step: int, trainer: Trainer) -> None:
    def told(progress: Progress) -> None:
        if progress.steps == step:
            raise Killed

    with pytest.raises(Killed):
        trainer.run(told)


def test_a_rise_then_half_a_cosine():
    rates = [learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5 + 95 // 2] == pytest.approx(1.0, abs=0.05)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert learning_rate(0, 1, 2.0) == 2.0


@pytest.mark.parametrize("loss", ["tokens", "distribution", "acceptance"])
def test_a_head_learns(loss, target, tmp_path):
    """Untrained it is no better than chance, afterwards far better."""
    torch.manual_seed(0)
    made = trainer(target, tmp_path, epochs=6, loss=loss)
    before = made.evaluate(made.texts[1])
    progress = made.run()
    after = progress.held_out[made.steps]
    assert len(progress.curve) == made.steps == -(-6 * len(made.texts[0]) // 3)
    assert after[0] < (0.6 if loss == "tokens" else 0.9) * before[0]
    assert progress.curve[-1][0] < progress.curve[0][0]
    if loss == "tokens":
        assert all(accuracy < 0.2 for accuracy in before[1 : 1 + DEPTH])
        assert all(accuracy > 0.5 for accuracy in after[1 : 1 + DEPTH])
    assert not made.head.training


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(accumulate, target, tmp_path):
    """Twice, behind checkpoints and between them; the head's dropout draws, so the noise has to be the same, too."""
    given = {"epochs": 3, "accumulate": accumulate}

    def made(name: str, seed: int) -> Trainer:
        torch.manual_seed(seed)
        return trainer(target, tmp_path / name, **given)

    whole = made("whole", 0)
    expected = whole.run()
    assert expected.steps >= 12
    run_until(4, made("cut", 0))  # one step behind a checkpoint
    run_until(9, made("cut", 1))  # right behind one; fresh weights are of no account
    torch.rand(7)
    last = made("cut", 2)
    progress = last.run()
    assert progress.curve == expected.curve
    assert progress.held_out == expected.held_out
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(last).items())
    again = made("cut", 3)
    assert again.run().curve == expected.curve  # nothing is left to do


def test_what_the_target_goes_on_with_is_learnt_after_the_text(target, tmp_path):
    """At a tenth of the rate, and looked at by itself; killed in either stage, the run ends as if it had not been."""
    both = Windows.cut(encode([TEXT], Characters(), None), WINDOW).split(0.1, 5)
    seen: list[torch.Tensor] = []

    def made(name: str) -> Trainer:
        torch.manual_seed(0)
        of = replace(trainer(target, tmp_path / name, epochs=2, continued_epochs=1), continued=both)
        of.read = lambda windows: (seen.append(windows.tokens), Trainer.read(of, windows))[1]  # type: ignore[method-assign, func-returns-value]
        return of

    whole = made("whole")
    first, second = (stage.steps for stage in whole.stages)
    assert (first, second) == (-(-2 * len(whole.texts[0]) // BATCH), -(-len(both[0]) // BATCH))
    rates = [whole.rate(step) for step in range(whole.steps)]
    assert max(rates[first:]) == pytest.approx(0.1 * max(rates[:first]))
    assert whole.rate(first) == learning_rate(0, second, 0.1 * whole.options.learning_rate)
    expected = whole.run()
    assert len(expected.curve) == first + second
    learnt = {tuple(row.tolist()) for tokens in seen for row in tokens}
    assert {tuple(row.tolist()) for row in both[0].tokens} <= learnt
    assert expected.held_out[whole.steps] == whole.evaluate(both[1])
    run_until(first - 2, made("cut"))
    run_until(first + 2, made("cut"))
    assert made("cut").run() == expected


def test_the_curve_depends_on_the_seed(target, tmp_path):
    curves = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(0)
        curves.append(trainer(target, tmp_path / str(number), epochs=1, seed=seed).run().curve)
    assert curves[0] == curves[1] != curves[2]


def test_accumulated_batches_give_the_gradient_of_a_larger_one(target, tmp_path, monkeypatch):
    """Without dropout, and before it is cut."""
    monkeypatch.setattr(loop, "LONGEST_GRADIENT", 1e9)
    rows: list[dict[str, torch.Tensor]] = []
    for batch, accumulate in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        made = trainer(target, tmp_path / str(batch), batch=batch, accumulate=accumulate)
        made.head.dropout.p = 0.0  # type: ignore[union-attr]
        run_until(1, made)
        rows.append({name: torch.as_tensor(each.grad) for name, each in made.head.named_parameters()})
    for name, gradient in rows[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, rows[1][name], rtol=1e-3, atol=1e-6)


def test_later_drafts_count_as_the_recipe_says(target, tmp_path, monkeypatch):
    torch.manual_seed(0)
    made = trainer(target, tmp_path)
    even = made.evaluate(made.texts[1])[0]
    monkeypatch.setattr(type(made.head), "recipe", replace(made.head.recipe, decay=0.0))
    first_only = made.evaluate(made.texts[1])[0]
    monkeypatch.setattr(type(made.head), "recipe", replace(made.head.recipe, decay=0.5))
    assert made.evaluate(made.texts[1])[0] == pytest.approx(first_only + 0.5 * (even - first_only))


def test_the_target_stays_as_it_is(target, model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(target, tmp_path, epochs=1).run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_target_in_half_precision(tmp_path):
    """The head computes in that, too; its own weights and the loss are float32."""
    half = FrozenTarget(toy_target().bfloat16(), BATCH, WINDOW)
    torch.manual_seed(0)
    made = replace(trainer(half, tmp_path, epochs=4), autocast=torch.bfloat16)
    drafts: list[torch.dtype] = []
    made.head.up[0].register_forward_hook(  # type: ignore[union-attr, index]
        lambda module, given, made: drafts.append(made.dtype)
    )
    progress = made.run()
    assert {*drafts} == {torch.bfloat16}
    assert {value.dtype for value in weights(made).values()} == {torch.float32}
    assert progress.held_out[made.steps][0] < 0.7 * progress.curve[0][0]


def test_what_diverges_is_said(target, tmp_path):
    made = trainer(target, tmp_path)
    with torch.no_grad():
        next(made.head.parameters()).fill_(torch.nan)
    with pytest.raises(DrafterError, match="the loss of step 1 is nan"):
        made.run()
