"""Batches of P labels x K images, and how well embeddings find each other."""
