"""A worker whose model counts: each token is the one before it plus one. The option `way` says what it gets wrong."""

import os
import time

from bench.peers.workers.protocol import main


def convert(source, target, dtype):
    if dtype == "bfloat16":
        raise ValueError("it has no bfloat16")
    (target / "counted").write_text(str(sorted(path.name for path in source.iterdir())))


def load(folder, options):
    way = options["way"]
    assert (folder / "counted").exists()
    os.write(1, b"noise that is no answer\n")
    if way == "unready":
        raise RuntimeError("too small a machine")
    if way == "slow":
        time.sleep(60)

    def generate(prompts, new_tokens):
        if way == "dying":
            os.write(2, b"out of everything\n")
            os._exit(3)
        if way == "failing" and len(prompts) > 1:
            raise RuntimeError("one row only")
        rows = [[prompt[-1] + 1 + place for place in range(new_tokens)] for prompt in prompts]
        if way == "wrong":
            rows[0][-1] += 1
        if way == "short":
            rows[0].pop()
        return rows

    return "fake 1", generate


if __name__ == "__main__":
    main(convert, load)
