"""Training: run.py tells the story of a run, step.py is what one of its steps does."""
