"""Prompts of a file, continued into another: each exactly once, however often the run is broken off in between.

`lines` reads the prompts, `output` keeps what is done, `local` decodes here and `emssd_compile.ray` on a cluster.
"""
