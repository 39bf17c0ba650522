"""What may happen to a BatchNorm layer, the plan, and the doing and undoing of it."""
