"""Image-space losses of perceptual compression."""
