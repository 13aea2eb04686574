"""The OpenMoji demonstration: its judges, its numbers, and the gallery of trained tasks."""
