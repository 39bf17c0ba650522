"""What an optimizer needs to know of a network."""
