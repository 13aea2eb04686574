"""Devices, processes, checkpoints, workdirs and logs; nothing here depends on diffusion."""
