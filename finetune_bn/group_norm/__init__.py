"""What is done to layers that were converted to GroupNorm."""
