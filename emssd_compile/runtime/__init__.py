"""What runs around the step graph: prompts in, rows scheduled, tokens out."""
