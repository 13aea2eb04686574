"""`python -m latent_diffusion.serve`: a page and an HTTP API before one loaded model.

A request becomes arguments of `Model.sample` (`requests`), waits with its equals for one program
call (`jobs`), and is answered over HTTP (`handler`). No sampling happens here.
"""
