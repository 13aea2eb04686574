"""`python -m latent_diffusion.serve`: a page and an HTTP API for a loaded model.

A request becomes arguments of `Model.sample` (`requests`), waits with similar requests for a
program call (`jobs`), and is answered over HTTP (`handler`).
"""
