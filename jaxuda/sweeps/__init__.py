"""Forward-only walks over a dataset: evaluation, predictions, statistics, rankings, pseudo-labels."""
