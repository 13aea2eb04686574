"""Models for one to four steps: diffusers' pipelines read here, and ours run by diffusers.

Random weights, tiny; diffusers' draws of noise are ours.
"""

import jax
import pytest
import test_pipelines as pipelines
from test_pipelines import ABSENT, BETAS, PROMPTS, RNG, SIDE, modes  # noqa: F401 (a fixture)

from latent_diffusion.core.rng import normal_per_example, sampling_keys

diffusers, torch = pipelines.diffusers, pipelines.torch
pytestmark = pipelines.pytestmark
SHAPE = (SIDE, SIDE, 4)


def step_noise(row, shape):
    """The noise that a sampler here adds after a row."""
    keys = sampling_keys(pipelines.image_keys(2)).steps
    return normal_per_example(jax.vmap(jax.random.fold_in, (0, None))(keys, row), shape)


def with_our_noise(monkeypatch, pipeline, count, shape=SHAPE):
    module = __import__(type(pipeline.scheduler).__module__, fromlist=["randn_tensor"])
    left = [pipelines.to_torch(step_noise(row, shape)) for row in range(count)]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: left.pop(0))


def distilled(tmp_path):
    return pipelines.stable(
        diffusers.LatentConsistencyModelPipeline,
        tmp_path,
        pipelines.make_unet(time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(**BETAS),
        **ABSENT,
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency_read_and_written(steps, tmp_path, monkeypatch):
    pipeline, model = distilled(tmp_path)
    z_T, options = pipelines.draw(0, 2, *SHAPE), {"guidance_scale": 3.0}
    ours = pipelines.sample(model, z_T=z_T, num_steps=steps, **options)
    # A model without the notes of its file, as one that was trained here.
    model.replace(origin={}).save(tmp_path / "ours", format="diffusers")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipeline) and type(again.scheduler) is diffusers.LCMScheduler
    for each in (pipeline, again):
        with_our_noise(monkeypatch, each, steps)
        theirs = each(
            PROMPTS, latents=pipelines.to_torch(z_T), num_inference_steps=steps,
            height=2 * SIDE, width=2 * SIDE, output_type="np", **options,
        )  # fmt: skip
        pipelines.check(ours, theirs.images)


EULER = {**BETAS, "timestep_spacing": "trailing", "steps_offset": 1}
FEW = {  # name -> scheduler, steps
    "turbo": (lambda: diffusers.EulerDiscreteScheduler(**EULER), 1),
    "turbo with noise": (lambda: diffusers.EulerAncestralDiscreteScheduler(**EULER), 2),
    "lightning": (lambda: diffusers.EulerDiscreteScheduler(**EULER), 4),
    "lightning in one step": (
        *(lambda: diffusers.EulerDiscreteScheduler(**EULER, prediction_type="sample"), 1),
    ),
    "hyper": (lambda: diffusers.TCDScheduler(**BETAS, steps_offset=1), 4),
}


@pytest.mark.parametrize("name", FEW)
def test_turbo_lightning_and_hyper_without_guidance(name, tmp_path, monkeypatch):
    scheduler, steps = FEW[name][0](), FEW[name][1]
    unet = pipelines.make_unet()
    pipeline, model = pipelines.stable(
        diffusers.StableDiffusionPipeline, tmp_path, unet, scheduler=scheduler, **ABSENT
    )
    with_our_noise(monkeypatch, pipeline, steps)
    z_T = pipelines.draw(0, 2, *SHAPE)
    eta = {"eta": 0.3} if name == "hyper" else {}
    theirs = pipeline(
        PROMPTS, latents=pipelines.to_torch(z_T), num_inference_steps=steps, guidance_scale=0.0,
        output_type="np", **eta,
    )  # fmt: skip
    ours = pipelines.sample(model, z_T=z_T, num_steps=steps, guidance_scale=1.0, **eta)
    pipelines.check(ours, theirs.images)
