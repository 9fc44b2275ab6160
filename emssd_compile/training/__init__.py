"""Train a draft head for a frozen target: what the command `train-drafter` does.

`train.py` has the order of things. A step depends on nothing but the command, its number and the checkpoint before
it: so a run that was killed and started again gives the curve of one that was not.
"""
