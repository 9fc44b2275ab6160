"""Measurements: what `emssd_compile` gains over what people run today."""
