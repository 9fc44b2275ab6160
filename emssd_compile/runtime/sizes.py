"""Sizes of a step come in few values, so that it is compiled and captured few times."""


def bucket(size: int) -> int:
    """The least of 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`: at most a third of a bucket is tail.

    1 is left out: compilers specialise on it.
    """
    power = 1 << max(1, (size - 1).bit_length())
    three_quarters = power * 3 // 4
    return three_quarters if size <= three_quarters and three_quarters > 1 else power
