"""One decoding step as tensor functions: what is fed (`pack`), what is kept (`commit`), and the state between steps.

These functions hold no host read and no shape that depends on data; the passes trace them into the step graph.
"""
