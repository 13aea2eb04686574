"""The diffusion process as mathematics: schedules, noising, guidance, steering, samplers."""
