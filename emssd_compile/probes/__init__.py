"""Probes: what `generate` can tell of each token beside the token.

To add one: one file with a `Probe`, one line in `PROBES`.
"""

from collections.abc import Callable, Sequence

from emssd_compile.errors import ProbeError
from emssd_compile.probes.logprobs import LogProbs, TopLogProbs
from emssd_compile.probes.output_logits import OutputLogits
from emssd_compile.probes.output_scores import OutputScores
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import check_given, merge_options
from emssd_compile.step.probe import Probe, ProbeContext, Probed, ReadingSpec

PROBES: tuple[Callable[[], Probe], ...] = (OutputScores, OutputLogits, LogProbs, TopLogProbs)

__all__ = [
    "PROBES",
    "LogProbs",
    "OutputLogits",
    "OutputScores",
    "Probe",
    "ProbeContext",
    "Probed",
    "ReadingSpec",
    "RowOption",
    "TopLogProbs",
    "make_probes",
]


def make_probes(given: Sequence[Probe]) -> tuple[Probe, ...]:
    """Those of the package, and those given behind them.

    Raises:
        OptionError: what is given is no sequence of probes.
        ProbeError: one of them has no `forward`, or its options make no sense or mean something else in another.
    """
    check_given("probes", given, Probe, {"forward": "it", "readings": "it"}, ProbeError)
    every = (*(make() for make in PROBES), *given)
    merge_options(every, ProbeError)
    return every
