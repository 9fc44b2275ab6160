"""Ratios and equal rows, with runs by hand."""

from dataclasses import dataclass

from bench.peers.comparison import Contender, speeds, table
from bench.peers.worker import Answer, WorkerError

PROMPTS = [[1], [2]]


@dataclass
class Scripted:
    """Answers what it was told to, the warm-up first."""

    seconds: list[float]
    tokens: list[list[list[int]]]
    version: str = "1"
    ready_seconds: float = 1.0
    closed: int = 0
    asked: int = 0

    def decode(self, prompts, new_tokens):
        self.asked += 1
        if self.asked > len(self.seconds):
            raise WorkerError("no more")
        return Answer(self.tokens[self.asked - 1], self.seconds[self.asked - 1], peak=self.asked << 20)

    def close(self):
        self.closed += 1


def contender(name, seconds, *tokens):
    answers = list(tokens) or [[[5, 6], [7, 8]]] * len(seconds)
    return Contender(name, worker=Scripted(seconds, answers), version="1", ready_seconds=[2.0, 1.0])


def test_ratios_are_taken_within_a_repeat_over_ours_of_the_same_kind():
    ways = [
        contender("hf_generate", [9, 8, 4]),
        contender("ours_none", [9, 2, 1]),
        contender("ours_auto", [9, 1, 0.5]),
        contender("openvino", [9, 4, 2]),
        contender("openvino_lookup", [9, 2, 1]),
    ]
    figures = {each.way: each for each in speeds(ways, PROMPTS, 2, repeats=2, least_seconds=0)}
    assert {name: (each.over_reference, each.over_ours) for name, each in figures.items()} == {
        "hf_generate": (1, 0.25),
        "ours_none": (4, 1),
        "ours_auto": (8, 1),
        "openvino": (2, 0.5),
        "openvino_lookup": (4, 0.5),
    }
    assert figures["openvino"].seconds == [4, 2]
    assert figures["openvino"].tokens_per_second == 2 * 2 / 3
    assert figures["openvino"].peak == 3 << 20


def test_a_row_is_equal_if_every_run_gave_it_the_tokens_of_ours():
    same, other = [[5, 6], [7, 8]], [[5, 6], [7, 9]]
    ways = [
        contender("ours_none", [1, 1, 1]),
        contender("openvino", [1, 1, 1], same, same, other),
        contender("llama_cpp", [1, 1, 1], same, same, same),
    ]
    figures = speeds(ways, PROMPTS, 2, repeats=2, least_seconds=0)
    assert [each.equal_rows for each in figures] == [2, 1, 2]
    (alone,) = speeds([contender("openvino", [1, 1])], PROMPTS, 2, repeats=1, least_seconds=0)
    assert (alone.equal_rows, alone.over_reference, alone.over_ours) == (None, None, None)


def test_what_fails_in_a_run_has_no_figures_and_does_not_take_part_again():
    lost = contender("openvino", [1])
    short = contender("llama_cpp", [1, 1], [[5, 6], [7]])
    ways = [contender("ours_none", [1] * 6), lost, short]
    assert [each.way for each in speeds(ways, PROMPTS, 2, repeats=2, least_seconds=0)] == ["ours_none"]
    assert lost.failure == "batch 2: no more"
    assert short.failure == "batch 2: 2 rows of [1, 2] tokens, not 2 rows of 2"
    assert lost.worker is None
    assert [each.way for each in speeds(ways, PROMPTS, 2, repeats=2, least_seconds=0)] == ["ours_none"]


def test_a_start_is_made_twice_and_the_first_process_ends():
    made: list[Scripted] = []

    def make():
        worker = Scripted([], [], version="2", ready_seconds=3.0 + len(made))
        made.append(worker)
        return worker

    way = Contender("openvino")
    way.start(make)
    assert [worker.closed for worker in made] == [1, 0]
    assert (way.ready_seconds, way.version) == ([3.0, 4.0], "2")
    assert way.worker is made[1]


def test_a_table_says_what_was_measured_and_why_something_was_not():
    ways = [contender("ours_none", [1, 1]), contender("openvino", [1, 2]), Contender("llama_cpp", "not installed")]
    figures = speeds(ways, PROMPTS, 2, repeats=1, least_seconds=0)
    shown = [list(column.cells) for column in table("title", ways, figures, [2, 8]).columns]
    assert shown == [
        ["ours_none", "openvino", "llama_cpp"],
        ["4 (–, 1.00) 2/2", "2 (–, 0.50) 2/2", "–"],
        ["–", "–", "–"],
        ["2", "2", ""],
        ["2.0, 1.0", "2.0, 1.0", ""],
        ["1", "1", "not installed"],
    ]
