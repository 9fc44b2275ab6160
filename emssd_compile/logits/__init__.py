"""Logits processors: what is done to the target's logits before a rule reads them.

To add one: one file with a `LogitsProcessor`, one line in `PROCESSORS`, in the order in which they are applied.
"""

from collections.abc import Callable, Sequence

from emssd_compile.errors import ProcessorError
from emssd_compile.logits.bad_words import BadWords
from emssd_compile.logits.begin_suppress_tokens import BeginSuppressTokens
from emssd_compile.logits.epsilon_cutoff import EpsilonCutoff
from emssd_compile.logits.eta_cutoff import EtaCutoff
from emssd_compile.logits.exponential_decay_length_penalty import ExponentialDecayLengthPenalty
from emssd_compile.logits.forced_bos_token import ForcedBOSToken
from emssd_compile.logits.forced_eos_token import ForcedEOSToken
from emssd_compile.logits.logit_bias import LogitBias
from emssd_compile.logits.min_new_tokens import MinNewTokens
from emssd_compile.logits.min_p import MinP
from emssd_compile.logits.no_repeat_ngram import NoRepeatNGram
from emssd_compile.logits.presence_frequency_penalty import PresenceFrequencyPenalty
from emssd_compile.logits.remove_invalid_values import RemoveInvalidValues
from emssd_compile.logits.renormalize import Renormalize
from emssd_compile.logits.repetition_penalty import RepetitionPenalty
from emssd_compile.logits.sequence_bias import SequenceBias
from emssd_compile.logits.suppress_tokens import SuppressTokens
from emssd_compile.logits.temperature import Temperature, tempered
from emssd_compile.logits.top_h import TopH
from emssd_compile.logits.top_k_top_p import TopKTopP, filtered
from emssd_compile.logits.typical_p import TypicalP
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import check_given, merge_options

# What shapes the distribution to sample from, in transformers' order: behind all that bars or favours tokens.
FILTERS: tuple[Callable[[], LogitsProcessor], ...] = (
    Temperature,
    TopH,
    TopKTopP,
    MinP,
    TypicalP,
    EpsilonCutoff,
    EtaCutoff,
    Renormalize,
)
PROCESSORS: tuple[Callable[[], LogitsProcessor], ...] = (
    SequenceBias,
    LogitBias,
    RepetitionPenalty,
    PresenceFrequencyPenalty,
    NoRepeatNGram,
    BadWords,
    MinNewTokens,
    ForcedBOSToken,
    ForcedEOSToken,
    RemoveInvalidValues,
    ExponentialDecayLengthPenalty,
    SuppressTokens,
    BeginSuppressTokens,
    *FILTERS,
)
"""In the order in which transformers applies them; what it has not stands beside its like."""

__all__ = [
    "FILTERS",
    "PROCESSORS",
    "BadWords",
    "BeginSuppressTokens",
    "EpsilonCutoff",
    "EtaCutoff",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSToken",
    "ForcedEOSToken",
    "LogitBias",
    "LogitContext",
    "LogitsProcessor",
    "MinNewTokens",
    "MinP",
    "NoRepeatNGram",
    "PresenceFrequencyPenalty",
    "Processed",
    "RemoveInvalidValues",
    "Renormalize",
    "RepetitionPenalty",
    "RowOption",
    "SequenceBias",
    "SuppressTokens",
    "Temperature",
    "TopH",
    "TopKTopP",
    "TypicalP",
    "filtered",
    "make_processors",
    "tempered",
]


def make_processors(given: Sequence[LogitsProcessor]) -> tuple[LogitsProcessor, ...]:
    """Those of the package, and those given behind them; filters come behind all others.

    Raises:
        OptionError: what is given is no sequence of logits processors.
        ProcessorError: one of them has no `forward`, or its options make no sense or mean something else in another.
    """
    methods = {"forward": "forward(context) -> Processed"}
    check_given("processors", given, LogitsProcessor, methods, ProcessorError)
    every = (*(make() for make in PROCESSORS), *given)
    merge_options(every, ProcessorError)
    return tuple(sorted(every, key=lambda processor: processor.is_filter))
