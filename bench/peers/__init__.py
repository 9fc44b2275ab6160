"""Decoding with C++ runtimes that install from PyPI, each in an environment of its own."""
