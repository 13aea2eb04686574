"""Devices, processes, checkpoints, workdirs and logs; nothing here knows what diffusion is."""
