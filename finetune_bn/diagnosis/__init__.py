"""What a network, its batches and its training look like, and what to do about it."""
