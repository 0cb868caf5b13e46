"""From a model and an image to a mask on the grid of the image."""
