"""What the rest leans on: batches, forward passes, processes, files."""
