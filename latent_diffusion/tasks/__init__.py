"""The trainings of latent diffusion, each a frozen dataclass of static parts.

A task has `init(rng, batch_spec) -> (state, constants)` and the steps `train_step`, `eval_step`
and `show`, all called as `step(state, constants, batch, rng, *, axis_name=None)`. It doesn't depend
on devices, disks or loggers.
"""

from latent_diffusion.tasks.autoencoding import make_autoencoding
from latent_diffusion.tasks.classifying import make_classifying
from latent_diffusion.tasks.denoising import make_denoising
from latent_diffusion.tasks.distillation import make_distillation
from latent_diffusion.tasks.prior import make_prior_training

TASKS = {
    "autoencoding": make_autoencoding,
    "denoising": make_denoising,
    "classifying": make_classifying,
    "prior": make_prior_training,
    "distillation": make_distillation,
}
DENOISERS = ("denoising", "distillation")  # the tasks that train a denoiser
