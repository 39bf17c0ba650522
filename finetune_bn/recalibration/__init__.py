"""Statistics of the target data."""
