"""Lines of a batch: each with an id of its own, and bad ones are named by their numbers before any work."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from emssd_compile.batch.lines import read_lines, survey
from emssd_compile.errors import InvalidInputError, OptionError


def _read(entry: object, where: str) -> tuple[object, list[int]]:
    if entry == "bad":
        raise InvalidInputError(f"{where}: bad")
    return entry, [1] * len(str(entry))


def _write(folder: Path, lines: Sequence[str | bytes]) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_ids_are_those_given_or_the_number_of_the_line(tmp_path):
    lines = ['"a"', "", '{"id": "x"}', '{"custom_id": "y", "id": null}', '{"id": 7}', '{"id": "7"}', '"b"']
    found = list(read_lines(_write(tmp_path, lines), _read))
    assert [line.id for line in found] == [1, "x", "y", 7, "7", 7]
    assert [line.index for line in found] == [*range(6)]
    with pytest.raises(InvalidInputError, match="line 7 has the id 7, as line 5 has"):
        survey(_write(tmp_path, lines), _read, skips_errors=True)
    assert len({line.key for line in found[:5]}) == 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 3: Expecting property name"),
        (b'"\xff"', "line 3: 'utf-8' codec"),
        ("[" * 100_000, "line 3: it is nested too deeply"),
        ('{"text": "x", "score": NaN}', "line 3: JSON has no NaN"),
        ('"bad"', "line 3: bad"),
        ('{"id": 1.5}', "line 3: its id is 1.5"),
        ('{"id": true}', "line 3: its id is true"),
    ],
)
def test_a_bad_line_is_named_or_gets_its_error_as_its_result(tmp_path, line, said):
    path = _write(tmp_path, ['"a"', "", line, '"bc"'])
    with pytest.raises(InvalidInputError, match=f"in.jsonl, {said}") as raised:
        survey(path, _read, skips_errors=False)
    assert "--skip-errors" in str(raised.value)
    found = survey(path, _read, skips_errors=True)
    assert (found.count, found.longest) == (3, 2)
    assert [bool(each.error) for each in read_lines(path, _read)] == [False, True, False]


def test_a_bad_line_keeps_its_id(tmp_path):
    def refuse(entry: object, where: str) -> tuple[object, list[int]]:
        raise InvalidInputError(where)

    (found,) = read_lines(_write(tmp_path, ['{"id": "x", "n": 1}']), refuse)
    assert (found.id, found.entry, found.error) == ("x", {"id": "x", "n": 1}, "line 1")


def test_no_prompt_and_no_file(tmp_path):
    with pytest.raises(InvalidInputError, match="holds no prompt"):
        survey(_write(tmp_path, ["", " "]), _read, skips_errors=False)
    with pytest.raises(OptionError, match=r"--input .* cannot be read"):
        survey(tmp_path, _read, skips_errors=False)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = _write(tmp_path, [f'{{"id": "number {n}", "text": "{n}"}}' for n in range(30_000)])
    tracemalloc.start()
    found = survey(path, _read, skips_errors=False)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 300_000, "bytes at most; a kept line would be 60 at the very least, so 1,800,000"
    assert found.index.finish('"number 29999"')
    assert not found.index.finish('"number 29999"')
