"""The OpenMoji demonstration: its judge, its numbers, and the gallery of trained tasks."""
