"""Short fine-tunes under several treatments of BatchNorm, from the same weights, seeds and order of images."""
