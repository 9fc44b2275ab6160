import pytest

from emssd_compile.drafters import MLPSpeculator, RecurrentDrafter
from emssd_compile.drafters.head import Recipe
from emssd_compile.errors import OptionError
from emssd_compile.training.options import TrainingOptions
from tests.training.toys import options


def test_the_recipe_says_what_is_not_given():
    recipe = Recipe(learning_rate=0.5, distils=True, continues=True, epochs=7)
    prescribed = TrainingOptions.of(recipe, batch=None, epochs=None)
    assert (prescribed.learning_rate, prescribed.loss, prescribed.distil) == (0.5, "distribution", True)
    assert (prescribed.epochs, prescribed.batch) == (7, 4)
    own = TrainingOptions.of(recipe, learning_rate=0.1, loss="tokens", distil=False, epochs=1)
    assert (own.learning_rate, own.loss, own.distil, own.epochs) == (0.1, "tokens", False, 1)


def test_a_recurrent_head_learns_what_its_target_goes_on_with():
    """As ReDrafter's does: cross-entropy with tokens that the target has chosen itself."""
    prescribed = TrainingOptions.of(RecurrentDrafter.recipe)
    assert (prescribed.distil, prescribed.loss, prescribed.learning_rate, prescribed.epochs) == (
        True,
        "tokens",
        1e-3,
        2,
    )
    assert not TrainingOptions.of(RecurrentDrafter.recipe, distil=False).distil


def test_an_mlp_speculator_learns_the_text_and_then_what_its_target_goes_on_with():
    """IBM's two stages; who says which of them is to be learnt from gets that one."""
    prescribed = TrainingOptions.of(MLPSpeculator.recipe)
    assert (prescribed.distil, prescribed.epochs, prescribed.continued_epochs) == (False, 2, 1)
    for distil in (True, False):
        one = TrainingOptions.of(MLPSpeculator.recipe, distil=distil)
        assert (one.distil, one.continued_epochs) == (distil, 0)
    assert TrainingOptions.of(MLPSpeculator.recipe, distil=False, continued_epochs=3).continued_epochs == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"continued_epochs": -1}, "continued_epochs=-1 is out of range"),
        ({"continued_epochs": 1, "distil": True}, "with distil, all are on continuations"),
        ({"epochs": 0}, "epochs=0 is out of range; pass at least 1"),
        ({"window": 3}, "window=3 is out of range"),
        ({"tokens": 10}, "tokens=10 is out of range; pass at least 24"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is out of range"),
        ({"temperature": -1.0, "distil": True}, "temperature=-1.0 is out of range"),
        ({"temperature": 1.0}, "temperature is that of continuations"),
        ({"held_out_share": 1.0}, "held_out_share=1.0 is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"backend": "gcc"}, "unknown backend 'gcc'"),
        ({"prompt_tokens": 24}, "prompt_tokens=24 leaves nothing of a window of 24"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given, said):
    with pytest.raises(OptionError, match=said):
        options(**given)
