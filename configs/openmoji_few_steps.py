"""Text to OpenMoji in one to four steps: the student of a trained denoiser.

Command   python train.py --config=configs/openmoji_few_steps.py --workdir=runs/demo/few_steps
          after configs/openmoji_text.py in runs/demo/denoiser
Cost      7 minutes on two CPU cores
Expected  a Fréchet distance of 1.18 times the teacher's in one step, and 1.17 in two or four
Variants  :scales (the guidance scale, from 1 to 4, is an input of the network)
          :phased (exactly four steps: 1.06 times the teacher's distance)
          :guidance (one evaluation a step instead of two, at equal steps; the scale is an input)
          :lora (a low-rank adaptation of the teacher)
          :smoke (synthetic shapes, a few steps)
"""

from ml_collections import ConfigDict

from configs import default, openmoji_text


def get_config(variant: str = "") -> ConfigDict:
    c = openmoji_text.get_config("smoke" if variant == "smoke" else "")
    c.task = "distillation"
    c.distillation.teacher = "runs/demo/denoiser"
    c.distillation.guidance_scales = (3.0, 3.0)
    c.first_stage.path = c.first_stage.trained_by = ""  # the teacher has a first stage
    c.num_steps = 2000
    c.distillation.distilled_steps = 20

    c.diffusion.loss = "pseudo_huber"
    c.diffusion.drop_rate = 0.0
    c.diffusion.timestep_sampling = "uniform"  # over the steps of the teacher
    c.sampling.update({"sampler": "lcm", "spacing": "lcm", "num_steps": 4, "guidance_scale": 1.0})

    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 50
    return default.apply_variant(
        c,
        variant,
        {"scales": scales, "phased": phased, "guidance": guidance, "lora": lora, "smoke": smoke},
    )


def scales(c: ConfigDict) -> None:
    """The guidance scale is an input; sampling uses the teacher's."""
    c.unet.guidance_dim = 64
    c.distillation.guidance_scales = (1.0, 4.0)
    c.sampling.guidance_scale = 3.0


def phased(c: ConfigDict) -> None:
    """Four deterministic steps, each of which jumps along a quarter of the teacher's path."""
    c.distillation.phases = 4
    c.sampling.update({"sampler": "ddim", "spacing": "trailing", "num_steps": 4})


def guidance(c: ConfigDict) -> None:
    """As many steps as the teacher takes, each with one evaluation."""
    scales(c)
    c.distillation.method = "guidance"
    c.diffusion.loss = "l2"
    teacher = openmoji_text.get_config()
    c.sampling = teacher.sampling
    c.diffusion.timestep_sampling = teacher.diffusion.timestep_sampling


def lora(c: ConfigDict) -> None:
    """The student is the teacher with an adaptation of a few hundred kilobytes."""
    c.lora.rank = 16
    c.lora.alpha = 16.0
    c.lora.targets = (r"unet/.*kernel",)


def smoke(c: ConfigDict) -> None:
    """All parts of the full run, on synthetic shapes, in seconds."""
    c.num_steps = 4
    c.optimizer.warmup_steps = 0
    c.sampling.num_steps = 2
