"""`python -m emssd_compile`: see `emssd_compile.cli`."""

from emssd_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
