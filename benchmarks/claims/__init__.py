"""What is said of fine-tuning in general, measured on a model and rows of the user's own: `python -m benchmarks.claims`."""
