"""Baselines that `emssd_compile` is measured against; each module has one `run` that gives a `BaselineResult`."""
