"""The plan of a large run is arithmetic, and no published run beats its bounds."""

import json

import jax
import jax.numpy as jnp
import pytest
import several
from conftest import ROOT
from ml_collections import ConfigDict

from configs import openmoji_layout, openmoji_preview, openmoji_prior
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.runtime.parallel import chips
from latent_diffusion.training import planning
from latent_diffusion.training.planning import Facts, plan, report

FACTS = Facts(
    flops=197e9, state=16 * 2**30, gradients=2**30, constants=0, latent=8192, images_per_core=100.0
)
RUN = {"batch_size": 1600, "num_steps": 86_400, "images": 1_000_000, "checkpoint_steps": 100}


def test_every_part_of_a_step_is_its_work_at_its_rate():
    one = plan(FACTS, "v5e:4x4", **RUN, picture=1e5, storage_rate=1e9)
    assert one.chips == 16 and one.hosts == 4
    assert one.seconds["compute"] == pytest.approx(0.1)  # 100 images of 197 GFLOP at 197 TFLOP/s
    assert one.seconds["memory"] == pytest.approx(32 * 2**30 / 819e9)
    assert one.seconds["network"] == pytest.approx(2 * 2**30 * 15 / 16 / 200e9)
    assert one.seconds["input"] == pytest.approx(1600 / (4 * 56 * 100))
    assert one.seconds["storage"] == pytest.approx(1600 * 1e5 / 4e9)
    assert one.binds == "compute" and one.days == pytest.approx(0.1)
    assert one.cores == pytest.approx(160)  # 16,000 images a second
    assert one.epochs == pytest.approx(138.24)
    assert one.memory == 17 * 2**30 and one.checkpoint == 16 * 2**30
    assert one.written == pytest.approx(16 * 2**30 / 10)
    assert one.pictures == 1e11 and one.latents == 8.192e9
    cut = plan(FACTS, "v5e:4x4", **RUN, shares=16)
    assert cut.memory == 17 * 2**26 and cut.seconds["memory"] == one.seconds["memory"] / 16


def test_what_binds_is_what_takes_longest():
    fields = {"slow decoding": {"images_per_core": 10.0}, "many parameters": {"state": 2**40}}
    binds = {
        name: plan(FACTS._replace(**field), "v5e:4x4", **RUN).binds
        for name, field in fields.items()
    }
    assert binds == {"slow decoding": "input", "many parameters": "memory"}
    assert plan(FACTS, "v5e:4x4", **RUN, storage_rate=1e8).binds == "storage"
    assert plan(FACTS._replace(gradients=2**40), "v5e:4x4", **RUN).binds == "network"


def test_a_report_says_what_binds_and_whether_it_fits():
    text = report(plan(FACTS, "v5e:4x4", **RUN), "v5e:4x4", 1600)
    assert "17.0 of 16 GiB a chip, and activations DOES NOT FIT" in text
    assert "160 of 224 cores" in text and "0.1 days at least" in text
    fits = report(plan(FACTS, "v6e:2x4", **RUN), "v6e:2x4", 1600)
    assert "DOES NOT FIT" not in fits
    with pytest.raises(ValueError, match="unknown chip 'v9'; known: a100"):
        plan(FACTS, "v9:4x4", **RUN)
    with pytest.raises(ValueError, match="batch_size 8 isn't a multiple of its 16 parts"):
        plan(FACTS, "v5e:4x4", **{**RUN, "batch_size": 8})
    assert set(planning.HOSTS) == set(chips.CHIPS)


@pytest.mark.parametrize(
    ("mode", "mesh", "cuts"),
    [
        ("pmap", {"data": -1, "fsdp": 1, "tensor": 1}, (16, 1)),
        ("mesh", {"data": -1, "fsdp": 1, "tensor": 1}, (16, 1)),
        ("mesh", {"data": 1, "fsdp": -1, "tensor": 1}, (16, 16)),
        ("mesh", {"data": 2, "fsdp": -1, "tensor": 2}, (8, 8)),
        ("mesh", {"data": -1, "fsdp": 4}, (16, 4)),
    ],
)
def test_the_batch_is_cut_over_data_and_fsdp_and_the_state_over_fsdp_and_tensor(mode, mesh, cuts):
    settings = ConfigDict({"mode": mode, "mesh": mesh})
    assert planning.cuts(settings, "v5e:4x4") == cuts


def test_a_plan_takes_the_batches_and_meshes_that_training_takes():
    eight = plan(FACTS, "v5e:4x4", **{**RUN, "batch_size": 8}, parts=8, shares=2)
    assert eight.seconds["compute"] == pytest.approx(8 / 16 / 1000)  # 16 chips share the work
    with pytest.raises(ValueError, match="batch_size 12 isn't a multiple of its 8 parts"):
        plan(FACTS, "v5e:4x4", **{**RUN, "batch_size": 12}, parts=8)
    for mesh in ({"data": 64, "fsdp": 4}, {"data": 64, "fsdp": -1}):
        with pytest.raises(ValueError, match=r"mesh data 64 × .* but there are 16"):
            planning.cuts(ConfigDict({"mode": "mesh", "mesh": mesh}), "v5e:4x4")


@pytest.mark.parametrize("regularization", ["kl", "vq", "identity"])
def test_latents_of_a_picture_and_its_mirror_image_are_counted_in_bfloat16(regularization):
    config = several.make_config(**{"autoencoder.regularization": regularization})
    side = config.data.image_size
    picture = jnp.zeros((1, side, side, 3))
    stage = jax.eval_shape(
        lambda: init_first_stage(make_autoencoder(config.autoencoder), jax.random.key(0), picture)
    )
    moments = jax.eval_shape(lambda stage: stage.moments(picture), stage)
    stored = 0 if regularization == "identity" else 2 * 2 * moments.size  # pictures aren't encoded
    assert planning._latent_bytes(config) == stored


def test_latents_of_a_prior_are_codes():
    config = openmoji_prior.get_config("smoke")
    side = config.data.image_size // make_autoencoder(config.autoencoder).downsampling
    assert planning._latent_bytes(config) == 2 * 4 * side**2


def test_pictures_of_layouts_are_measured_without_their_boxes():
    assert planning.measure(openmoji_layout.get_config("smoke")) > 10


def test_a_backbone_that_is_none_is_one_line():
    with pytest.raises(ValueError, match="unknown backbone 'unett'; known: dit"):
        planning.count(several.make_config(backbone="unett"))


def test_facts_are_counted_once_and_remembered(tmp_path):
    config = several.make_config(**{"batch_size": 8})
    facts = planning.known_facts(config, "tiny", str(tmp_path / "facts.json"))
    assert facts.flops > 0 and facts.images_per_core > 10
    assert facts.state > 3 * facts.gradients > 0  # parameters, average, two moments
    (tmp_path / "facts.json").write_text(json.dumps({"tiny": FACTS._asdict()}))
    assert planning.known_facts(config, "tiny", str(tmp_path / "facts.json")) == FACTS
    more = {"batch_size": 16, "grad_accumulation": 2, "unet.remat": "full"}
    other = planning.known_facts(several.make_config(**more), "other", None)
    assert other.flops == facts.flops  # of a picture, without recomputation


def test_the_recomputation_of_a_prior_is_not_counted():
    config = openmoji_prior.get_config("smoke")
    flops = planning.count(config).flops
    config.transformer.remat = True
    assert planning.count(config).flops == flops


def test_the_key_of_facts_is_of_the_experiment():
    """Another variant of a file or another field is another experiment, another batch isn't."""

    def key(**fields):
        return planning.key("tiny", several.make_config(**fields))

    assert key() == key(**{"batch_size": 64, "num_steps": 7, "parallel.mode": "mesh"})
    assert len({key(), key(**{"data.image_size": 16}), key(**{"unet.model_channels": 16})}) == 3


def test_a_tiny_first_stage_is_planned_and_checked():
    config = openmoji_preview.get_config()
    facts = planning.count(config)
    assert facts.flops > 0 and facts.latent == 2 * 2 * 8 * 8 * 4


def test_published_runs_do_not_beat_the_bounds():
    """Of 20.3 TFLOP that SDXL's U-Net takes for a picture in training, an evaluation is a third."""
    training, evaluation = 20.3e12, 20.3e12 / 3  # test_sdxl_configs.py counts them
    lora = FACTS._replace(flops=20 * 2 * evaluation, state=0, gradients=0)
    run = {"num_steps": 1, "images": 4, "batch_size": 4}
    least = plan(lora, "v5e:2x2", **run, picture=0.0).seconds["compute"]
    assert least == pytest.approx(1.37, abs=0.01)
    assert least < 2.3  # seconds for four pictures in 20 guided steps (docs/scale.md)
    eight = {"num_steps": 1, "images": 32, "batch_size": 32}
    step = plan(FACTS._replace(flops=training), "v5p:2x2x1", **eight).seconds["compute"]
    assert step == pytest.approx(0.354, abs=1e-3)  # of 162.27 TFLOP a chip
    page = (ROOT / "docs" / "scale.md").read_text()
    assert f"at least {least:.2f} s" in page and f"{least / 2.3:.0%} to {least / 3.23:.0%}" in page
