"""Export of a compiled step to other runtimes."""
