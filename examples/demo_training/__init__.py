"""Parts of `train_demo.py`: the text the demo models learn from, and the training loop."""
