"""Models that other libraries load in less common forms, and what a file may not be made of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convert_round_trips as models
import yaml
from safetensors.numpy import load_file, save_file
from test_tokenizers import CLIP, MERGES, write_clip

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert import autoencoder, compvis, unet
from latent_diffusion.convert.bundle import conditioner_shapes, with_folded_scale
from latent_diffusion.convert.components import as_component
from latent_diffusion.convert.describe import describe
from latent_diffusion.convert.diffusers import _with_scheduler
from latent_diffusion.core.rng import example_keys, sampling_keys
from latent_diffusion.data.tokenizers import ClipTokenizer, with_words
from latent_diffusion.files.tensor import TensorFile, in_memory
from latent_diffusion.models import sampling
from latent_diffusion.nets.layers import guidance_embedding
from latent_diffusion.process.plan import plan

RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A Stable Diffusion with holes, in diffusers' folders."""
    path = tmp_path_factory.mktemp("pipeline") / "model"
    convert.write(models.make_bundle("clip"), path, "diffusers")
    return path


def config_of(path):
    return json.loads((path / "config.json").read_text())


def changed(path, **settings):
    (path / "config.json").write_text(json.dumps({**config_of(path), **settings}))


def copied(source, target):
    shutil.copytree(source, target)
    return target


def test_a_model_is_saved_as_it_is_now(pipeline, tmp_path):
    """Facts of the file that was read don't win over the model."""
    path = copied(pipeline, tmp_path / "read")
    changed(path / "vae", act_fn="swish", sample_size=99)
    model = ldm.load(path)
    first_stage = model.first_stage.replace(scale_factor=jnp.float32(0.5))
    denoiser = model.denoiser.replace(prediction="v")
    model.replace(first_stage=first_stage, denoiser=denoiser).save(tmp_path / "b", "diffusers")
    vae, scheduler = config_of(tmp_path / "b" / "vae"), tmp_path / "b" / "scheduler"
    assert vae["scaling_factor"] == 0.5 and vae["sample_size"] == 16
    said = json.loads((scheduler / "scheduler_config.json").read_text())
    assert said["prediction_type"] == "v_prediction"
    again = ldm.load(tmp_path / "b")
    assert again.first_stage.scale_factor == 0.5 and again.denoiser.prediction == "v"
    model.save(tmp_path / "c", "diffusers")  # unchanged: in the words of the file
    assert config_of(tmp_path / "c" / "vae") == config_of(path / "vae")


def test_a_scheduler_is_saved_as_the_model_samples_now(pipeline, tmp_path, caplog):
    """Pipelines have the scale of guidance and the number of steps: they change no scheduler."""
    path = copied(pipeline, tmp_path / "read")
    file = path / "scheduler" / "scheduler_config.json"
    read = {**json.loads(file.read_text()), "timestep_spacing": "leading", "steps_offset": 0}
    file.write_text(json.dumps(read))
    model = ldm.load(path)
    assert model.defaults["spacing"] != "trailing"
    trailing = {**read, "timestep_spacing": "trailing"}
    for number, (options, written, unsaid) in enumerate(
        [
            (
                {"guidance_scale": 2.0, "num_steps": 7},
                read,
                "guidance_scale=2.0 is read as 7.5, num_steps=7 is read as 50",
            ),
            ({"spacing": "trailing", "offset": None}, trailing, None),
            (
                {"sampler": "heun"},
                trailing,
                "offset=0 is read as None, sampler=heun is read as ddim",
            ),
        ]
    ):
        caplog.clear()
        folder = tmp_path / str(number)
        bundle = convert.bundle_of(model.replace(defaults={**model.defaults, **options}))
        bundle.diffusion["loss"] = "l2"  # as that of a run, which has its objective beside
        convert.write(bundle, folder, "diffusers")
        saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert saved["timestep_spacing"] == written["timestep_spacing"]
        assert len(caplog.messages) == (unsaid is not None)
        assert f"doesn't say all of the model: {unsaid}" in caplog.text or not unsaid


def test_a_model_that_no_file_gave_is_warned_about_as_well(tmp_path, caplog):
    made = models.make_bundle("clip")
    usual = {"sampler": "ddim", "spacing": "trailing", "guidance_scale": 7.5, "eta": None}
    convert.write(replace(made, sampling=usual), tmp_path / "a", "diffusers")
    assert not caplog.records
    karras = {**usual, "spacing": "karras", "guidance_scale": 3.0}
    convert.write(replace(made, sampling=karras), tmp_path / "b", "diffusers")
    assert "guidance_scale=3.0 is read as 7.5, spacing=karras is read as trailing" in caplog.text


def test_diffusers_has_no_pipeline_for_pixels(tmp_path):
    pixels = convert.Part({"regularization": "identity", "image_channels": 4}, {})
    made = replace(models.make_bundle("clip"), autoencoder=pixels, scale_factor=1.0)
    with pytest.raises(ValueError, match="no pipeline here for models of pixels; save it as orbax"):
        convert.write(made, tmp_path / "model", "diffusers")


@pytest.mark.parametrize("format", ["diffusers", "compvis"])
def test_a_text_encoder_without_layers_is_refused(format, tmp_path):
    fields = {**models.TEXT, "depth": 0}
    text = models.part(fields, models.text.shapes(fields))
    made = models.make_bundle("text").with_part("text", text)
    with pytest.raises(
        ValueError, match=r"text transformer has layers \(depth=0\); save it as orb"
    ):
        convert.write(made, tmp_path / "model.safetensors", format)


@pytest.mark.parametrize(
    ("component", "settings"), [("vae", {"scaling_factor": 0.18215}), ("unet", {"sample_size": 12})]
)
def test_a_component_alone_is_saved_in_the_words_of_its_file(
    component, settings, pipeline, tmp_path
):
    path = copied(pipeline, tmp_path / "read") / component
    changed(path, **settings)
    ldm.load(path).save(tmp_path / "written", "diffusers")
    assert config_of(tmp_path / "written") == config_of(path)


def test_a_model_that_is_refused_leaves_the_folder_as_it_is(pipeline, tmp_path):
    """Half of it would be another model's."""
    path = copied(pipeline, tmp_path / "saved")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    bundle = models.make_bundle("clip")
    words = with_words(ClipTokenizer(CLIP, MERGES, 5), {"<it>": [len(CLIP)]})
    unet_fields = {**bundle.unet.fields, "num_codes": 3}
    for other, reason in (
        ({"tokenizer": words}, "no place for the added words <it>"),
        ({"diffusion": {**bundle.diffusion, "schedule": "sqrt"}}, "unknown schedule of diffusers"),
        ({"unet": replace(bundle.unet, fields=unet_fields)}, "no U-Net that predicts codes"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert.write(replace(bundle, **other), path, "diffusers")
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_float16_overflow_is_refused_with_the_name_of_the_array(tmp_path):
    bundle = models.make_bundle("text")
    params = dict(bundle.unet.params)
    kernel = np.full(params["out_2/kernel"].shape, 7e4, np.float32)
    params["out_2/kernel"] = convert.as_part({}, {"k": kernel}).params["k"]
    bundle = replace(bundle, unet=replace(bundle.unet, params=params))
    with pytest.raises(ValueError, match="unet/out_2/kernel has 70000, which is beyond the range"):
        convert.write(bundle, tmp_path / "a.safetensors", "compvis", "float16")
    assert not (tmp_path / "a.safetensors").exists()
    with pytest.raises(ValueError, match="unet/out_2/kernel has 70000"):
        convert.write(bundle, tmp_path / "a", "diffusers", "float16")
    assert not (tmp_path / "a").exists()
    convert.write(bundle, tmp_path / "b.safetensors", "compvis", "bfloat16")


def test_heads_that_a_format_cannot_say_are_refused(tmp_path):
    bundle = models.make_bundle("clip")
    text = bundle.conditioners["clip_text"]
    other = replace(text, fields={**text.fields, "num_heads": 2})
    bundle = bundle.with_part("clip_text", other)
    with pytest.raises(ValueError, match="heads of 64 channels, this model 2 in 64 channels"):
        convert.write(bundle, tmp_path / "a.safetensors", "compvis")


@pytest.mark.parametrize(
    ("field", "value"),
    [("pad_id", 3), ("final_norm", False), ("projection_dim", 7), ("zero_null", True)],
)
@pytest.mark.parametrize("name", ["clip", "open-clip"])
def test_other_fields_that_a_format_cannot_say_are_refused(name, field, value, tmp_path):
    bundle = models.make_bundle(name)
    fields = {**bundle.conditioners["clip_text"].fields, field: value}
    part = models.part(fields, conditioner_shapes("clip_text", fields))
    with pytest.raises(ValueError, match=f"the original's CLIP has {field}=.*, this model"):
        convert.write(bundle.with_part("clip_text", part), tmp_path / "a.safetensors", "compvis")
    if field == "pad_id":  # which diffusers' tokenizer says
        return
    with pytest.raises(ValueError, match=f"diffusers' Stable.* has clip_text.{field}=.*, this mod"):
        convert.write(bundle.with_part("clip_text", part), tmp_path / "a", "diffusers")


@pytest.mark.parametrize("name", ["xl", "refiner"])
def test_both_text_encoders_drop_a_text_alike_in_diffusers(name, tmp_path):
    bundle = models.make_bundle(name)
    for encoder in bundle.conditioners.keys() & {"clip_text", "clip_text_2"}:
        part = bundle.conditioners[encoder]
        for field in ("zero_null", "final_norm"):
            other = replace(part, fields={**part.fields, field: not part.fields[field]})
            alone = (encoder, field) == ("clip_text_2", "zero_null") and name == "refiner"
            if alone:  # the index of the pipeline says it
                convert.write(bundle.with_part(encoder, other), tmp_path / "b", "diffusers")
                again = convert.read(tmp_path / "b").conditioners[encoder].fields
                assert again["zero_null"] == other.fields["zero_null"]
                continue
            with pytest.raises(ValueError, match=r"diffusers' StableDiffusionXL\S+ has clip_text"):
                convert.write(bundle.with_part(encoder, other), tmp_path / "a", "diffusers")


def test_sizes_that_are_not_square(pipeline, tmp_path):
    path = copied(pipeline, tmp_path / "read")
    changed(path / "unet", sample_size=[8, 12])
    model = ldm.load(path)
    assert model.image_size == (16, 24)
    model.save(tmp_path / "orbax")
    assert ldm.load(tmp_path / "orbax").image_size == (16, 24)
    model.save(tmp_path / "diffusers", "diffusers")
    assert config_of(tmp_path / "diffusers" / "unet")["sample_size"] == [8, 12]
    larger = replace(convert.read(path), image_size=(32, 64))
    convert.write(larger, tmp_path / "larger", "diffusers")
    assert convert.read(tmp_path / "larger").image_size == (32, 64)
    with pytest.raises(ValueError, match="square pictures"):
        model.save(tmp_path / "a.safetensors", "compvis")
    assert "8 × 12 × 4" in describe(convert.read(path))


def test_a_part_without_the_variant_gives_its_usual_weights(pipeline, tmp_path, caplog):
    path = copied(pipeline, tmp_path / "read")
    (weights,) = (path / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    model = ldm.load(path, variant="fp16")
    assert model.denoiser is not None and model.first_stage is not None
    assert "vae: no weights of variant fp16; the usual ones are read" in caplog.text
    with pytest.raises(ValueError, match="none of its folders holds weights of variant 'non_ema'"):
        convert.read(path, variant="non_ema")


def test_a_text_encoder_with_projection(pipeline, tmp_path):
    path = copied(pipeline / "text_encoder", tmp_path / "read")
    changed(path, architectures=["CLIPTextModelWithProjection"], projection_dim=7)
    (file,) = path.glob("*.safetensors")
    tensors = {**load_file(file), "text_projection.weight": models.random((7, models.WIDTH))}
    save_file(tensors, file)
    convert.write(convert.read(path), tmp_path / "written", "diffusers")
    models.equal(load_file(tmp_path / "written" / file.name), tensors)
    assert config_of(tmp_path / "written") == {**config_of(path)}


GUMBEL = {**models.AUTOENCODER, "regularization": "gumbel", "num_codes": 6}


@pytest.mark.parametrize(
    ("regularization", "reason"),
    [
        ("vq", "codes can't be rescaled"),
        ("gumbel", "codes can't be rescaled"),
        ("tiny", "all channels of a tiny autoencoder"),
        ("identity", "all channels of pixels"),
    ],
)
def test_what_has_no_convolutions_is_not_rescaled_for_a_format_with_one_scale(
    regularization, reason
):
    fields = {**GUMBEL, "regularization": regularization}
    stage = convert.Bundle(autoencoder=convert.Part(fields, {}), scale_factor=np.ones(4))
    for shifts in (False, True):
        with pytest.raises(ValueError, match=f"this format has one scale for .*{reason}"):
            with_folded_scale(stage, shifts)


def test_a_run_in_pixels_has_latents_of_the_size_of_its_pictures():
    """Whatever its config says of the autoencoder that it doesn't have."""
    fields = {**models.AUTOENCODER, "regularization": "identity"}
    bundle = replace(models.make_bundle("text"), autoencoder=convert.Part(fields, {}))
    assert bundle.latent_size == bundle.image_size == bundle.in_pixels(16) == 16
    assert as_component(bundle, "unet")[0]["sample_size"] == 16


def test_gumbel_files_of_taming(tmp_path):
    part = models.part(GUMBEL, autoencoder.shapes(GUMBEL))
    path = tmp_path / "vqgan.safetensors"
    convert.write(convert.Bundle(autoencoder=part), path, "compvis")
    tensors = load_file(path)
    assert tensors["quantize.proj.weight"].shape == (6, 4, 1, 1)
    assert tensors["quantize.embed.weight"].shape == (6, 4)
    target = yaml.safe_load(path.with_suffix(".yaml").read_text())["model"]["target"]
    assert target == "taming.models.vqgan.GumbelVQ"
    for config in (True, False):  # with its yaml, and by the shapes alone
        if not config:
            path.with_suffix(".yaml").unlink()
        read = convert.read(path).autoencoder
        assert read.fields["regularization"] == "gumbel" and read.fields["num_codes"] == 6
        for name, tensor in part.params.items():
            np.testing.assert_array_equal(read.params[name].read(), tensor.read())


def test_files_of_models_that_predict_codes(tmp_path):
    """The original's file keeps the output that its class has, but doesn't use."""
    bundle = models.make_bundle("text")
    fields = {**models.UNET, "num_codes": 5}
    part = models.part(fields, unet.shapes(fields, 4, models.WIDTH, None))
    path = tmp_path / "model.safetensors"
    convert.write(replace(bundle, unet=part), path, "compvis")
    unused = {
        f"model.diffusion_model.out.{name}": models.random(shape)
        for name, shape in (("0.weight", 32), ("0.bias", 32), ("2.weight", (4, 32, 3, 3)),
                            ("2.bias", 4))
    }  # fmt: skip
    theirs = {**load_file(path), **unused}
    save_file(theirs, path)
    read = convert.read(path)
    assert read.unet.fields["num_codes"] == 5
    convert.write(read, tmp_path / "again.safetensors", "compvis")
    models.equal(load_file(tmp_path / "again.safetensors"), theirs)


def test_files_say_what_was_assumed(tmp_path, caplog):
    part = models.make_bundle("text").autoencoder
    convert.write(convert.Bundle(autoencoder=part), tmp_path / "vae.safetensors", "compvis")
    convert.read(tmp_path / "vae.safetensors")
    assert "the scale of its latents, which is taken as 1" in caplog.text
    released = compvis.RELEASED[320, 1024, 4]  # Stable Diffusion 2
    for steps, prediction in ((None, "v"), (875_000, "eps")):
        caplog.clear()
        opened = TensorFile({}, {"global_step": steps})
        said = compvis._diffusion(tmp_path / "sd.ckpt", opened, {}, released)
        assert said["prediction"] == prediction
        assert f"sd.ckpt: taken for a model that predicts {prediction}, as" in caplog.text
        assert "a yaml beside it with parameterization: eps or v says otherwise" in caplog.text
    for channels, prediction in ((4, "v"), (5, "eps"), (9, "eps")):  # 5: depth, 9: inpainting
        caplog.clear()
        first = in_memory(np.zeros((320, channels, 3, 3), np.float32))
        name = "model.diffusion_model.input_blocks.0.0.weight"
        opened = TensorFile({name: first}, {})
        said = compvis._diffusion(tmp_path / "sd.ckpt", opened, {}, released)
        assert said["prediction"] == prediction
        assert ("taken for" in caplog.text) == (channels == 4)


def test_a_file_without_yaml_has_the_schedule_of_its_betas():
    released = compvis.RELEASED[320, 768, 4]
    for betas, (schedule, zero) in (
        (np.linspace(1e-4, 0.02, 100), ("sqrt_linear", False)),
        (np.linspace(0.001**0.5, 0.02**0.5, 100) ** 2, ("linear", False)),
        (zero_snr(np.linspace(0.001**0.5, 0.02**0.5, 100) ** 2), ("linear", True)),
    ):
        opened = TensorFile({"betas": in_memory(betas.astype(np.float32))}, {})
        said = compvis._diffusion(Path("sd.ckpt"), opened, {}, released)
        assert (said["schedule"], said["zero_terminal_snr"]) == (schedule, zero)
        assert (said["num_timesteps"], said["beta_end"]) == (100, 0.02)


def zero_snr(betas):
    """The betas of which the last timestep is pure noise (Lin et al. 2023, Alg. 1)."""
    roots = np.cumprod(1 - betas) ** 0.5
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return 1 - np.concatenate([roots[:1] ** 2, roots[1:] ** 2 / roots[:-1] ** 2])


def test_an_autoencoder_of_an_older_diffusers_has_other_names(pipeline, tmp_path):
    path = copied(pipeline / "vae", tmp_path / "read")
    (file,) = path.glob("*.safetensors")
    today = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    before = {}
    for name, tensor in today.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        before[name] = tensor
    assert len(before.keys() - today.keys()) == 16
    save_file(before, file)
    convert.write(convert.read(path), tmp_path / "written", "diffusers")
    models.equal(load_file(tmp_path / "written" / file.name), today)


def test_convolutions_beside_the_latent_may_be_absent(pipeline, tmp_path):
    path = copied(pipeline / "vae", tmp_path / "read")
    changed(path, use_quant_conv=False, use_post_quant_conv=False)
    (file,) = path.glob("*.safetensors")
    tensors = {n: t for n, t in load_file(file).items() if "quant_conv" not in n}
    save_file(tensors, file)
    model = ldm.load(path)
    kernel = model.first_stage.params["quant_conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 0], np.eye(8))
    model.save(tmp_path / "again", "diffusers")
    models.equal(load_file(tmp_path / "again" / file.name), tensors)
    assert config_of(tmp_path / "again") == config_of(path)
    params = jax.tree.map(lambda x: 2 * x, model.first_stage.params)
    changed_model = model.replace(first_stage=model.first_stage.replace(params=params))
    changed_model.save(tmp_path / "other", "diffusers")
    assert config_of(tmp_path / "other")["use_quant_conv"]


@pytest.fixture(scope="module")
def distilled():
    """A model whose guidance is an input, as latent consistency models have it."""
    bundle = models.make_bundle("clip")
    fields = {**models.UNET, "guidance_dim": 6, "use_scale_shift_norm": True}
    part = models.part(fields, unet.shapes(fields, 4, models.WIDTH, None))
    conditioners = {"clip_text": bundle.conditioners["clip_text"]}
    return replace(bundle, unet=part, conditioners=conditioners)


def test_guidance_may_be_an_input_of_the_network(distilled, tmp_path):
    convert.write(distilled, tmp_path / "a", "diffusers")
    assert config_of(tmp_path / "a" / "unet")["time_cond_proj_dim"] == 6
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    model = ldm.load(tmp_path / "a")
    z, t = jax.random.normal(RNG, (2, 8, 8, 4)), jnp.array([3, 700])
    context = jnp.ones((2, 5, models.WIDTH))
    scales = [model.denoise(z, t, ldm.Conditioning(context=context, guidance=jnp.full(2, w)))
              for w in (0.0, 6.5)]  # fmt: skip
    assert np.abs(scales[0] - scales[1]).max() > 1e-3
    null = ldm.Conditioning(context=jnp.full((1, 5, models.WIDTH), jnp.nan))  # nothing reads it
    keys, told = sampling_keys(example_keys(RNG, 1)), ldm.Conditioning(context=context[:1])

    def sample(**options):
        planned = plan(model.denoiser.schedule, "eps", {}, {"num_steps": 2, **options})
        return np.asarray(
            sampling.sample(model.denoiser, keys, told, null, planned[0], (8, 8, 4), planned[1])
        )

    images = [sample(guidance_scale=scale) for scale in (1.0, 7.5)]
    assert np.isfinite(images).all() and np.abs(images[0] - images[1]).max() > 1e-3
    with pytest.raises(ValueError, match="rules out guidance_rescale"):
        sample(guidance_scale=2.0, guidance_rescale=0.5)
    with pytest.raises(ValueError, match="the original has no U-Net with guidance_dim"):
        model.save(tmp_path / "a.safetensors", "compvis")
    more = {**distilled.conditioners, "word_map": convert.Part({}, {})}
    with pytest.raises(ValueError, match=r"by clip_text alone, not by clip_text \+ word_map"):
        convert.write(replace(distilled, conditioners=more), tmp_path / "b", "diffusers")


def test_a_student_of_one_scale_is_not_guided_again(tmp_path):
    lcm = {"sampler": "lcm", "spacing": "lcm", "distilled_steps": 50, "num_steps": 4}
    bundle = replace(models.make_bundle("clip"), sampling={**lcm, "guidance_scale": 1.0})
    convert.write(bundle, tmp_path / "a", "diffusers")
    again = ldm.load(tmp_path / "a").defaults
    assert again["sampler"] == "lcm" and again["guidance_scale"] == 1.0


@pytest.mark.parametrize(
    ("name", "embedded", "wanted"),
    [
        ("StableDiffusionPipeline", False, 1.0),
        ("StableDiffusionXLPipeline", False, 1.0),
        ("StableDiffusionXLPipeline", True, 5.0),
        ("LatentConsistencyModelPipeline", True, 8.5),
    ],
)
def test_guidance_is_on_where_a_distilled_network_takes_its_scale(name, embedded, wanted):
    unet = convert.Part({"guidance_dim": 256 if embedded else None}, {})
    bundle = convert.Bundle(unet=unet, notes={"pipeline": name})
    config = {"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear"}
    assert _with_scheduler(bundle, config, None).sampling["guidance_scale"] == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("StableDiffusionInpaintPipeline", 7.5),
        ("StableDiffusionXLPipeline", 5.0),
        ("StableDiffusionXLImg2ImgPipeline", 5.0),
        ("StableDiffusionXLInpaintPipeline", 7.5),
        ("DiTPipeline", 4.0),
        ("LDMTextToImagePipeline", 1.0),
    ],
)
def test_the_scale_of_guidance_is_the_default_of_the_pipeline(name, wanted):
    config = {"_class_name": "DDIMScheduler", "clip_sample": False}
    bundle = convert.Bundle(notes={"pipeline": name})
    assert _with_scheduler(bundle, config, None).sampling["guidance_scale"] == wanted


def test_the_embedding_of_guidance_by_hand():
    got = guidance_embedding(jnp.array([0.001]), 4)
    want = [np.sin(1.0), np.sin(1e-4), np.cos(1.0), np.cos(1e-4)]
    np.testing.assert_allclose(got[0], want, rtol=1e-5)


def test_a_folded_scale_is_the_scale_of_the_latents():
    """The convolutions beside the latent then do what scale and shift did."""
    rng = np.random.default_rng(0)
    scale, shift = np.array([2.0, 0.5], np.float32), np.array([0.3, -1.0], np.float32)
    shapes = {"quant_conv": (3, 4), "post_quant_conv": (2, 3)}
    params = {f"{name}/kernel": rng.normal(size=(1, 1, *shape)) for name, shape in shapes.items()}
    params |= {f"{name}/bias": rng.normal(size=shape[1]) for name, shape in shapes.items()}
    params = {path: in_memory(x.astype(np.float32)) for path, x in params.items()}
    part = convert.Part({"regularization": "kl", "embed_dim": 2}, params)
    bundle = convert.Bundle(autoencoder=part, scale_factor=scale, shift=shift)
    folded = with_folded_scale(bundle)
    assert folded.scale_factor == 1.0 and folded.shift == 0.0

    def apply(bundle, name, x):
        kernel, bias = (bundle.autoencoder.params[f"{name}/{k}"].read() for k in ("kernel", "bias"))
        return x @ kernel[0, 0] + bias

    x = rng.normal(size=(5, 3)).astype(np.float32)
    mean, logvar = np.split(apply(bundle, "quant_conv", x), 2, -1)
    latents, spread = np.split(apply(folded, "quant_conv", x), 2, -1)
    np.testing.assert_allclose(latents, (mean - shift) * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(spread / 2), np.exp(logvar / 2) * scale, rtol=1e-4)
    decoded = apply(folded, "post_quant_conv", latents)
    np.testing.assert_allclose(
        decoded, apply(bundle, "post_quant_conv", mean), rtol=1e-4, atol=1e-4
    )
    half = with_folded_scale(bundle.astype("float16")).autoencoder.params.values()
    assert {tensor.read().dtype for tensor in half} == {np.dtype("float16")}


def test_arguments_for_another_kind_of_path_are_refused(pipeline, tmp_path):
    convert.write(models.make_bundle("clip"), tmp_path / "run", "orbax")
    convert.write(convert.Bundle(autoencoder=models.make_bundle("text").autoencoder),
                  tmp_path / "vae.safetensors", "compvis")  # fmt: skip
    for path, argument, kind in (
        (pipeline, {"config": "x.yaml"}, "single files"),
        (pipeline, {"ema": False}, "single files"),
        (tmp_path / "run", {"ema": True}, "single files"),
        (tmp_path / "run", {"variant": "fp16"}, "folders of diffusers"),
        (tmp_path / "vae.safetensors", {"variant": "fp16"}, "folders of diffusers"),
        (tmp_path / "vae.safetensors", {"ema": False}, "files with a U-Net"),
    ):
        ((name, value),) = argument.items()
        with pytest.raises(ValueError, match=f"{name}={value} is for {kind}"):
            convert.read(path, **argument)


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(tmp_path):
    bare = models.make_bundle("clip")
    write_clip(tmp_path / "words")
    for name, format in (("run", "orbax"), ("folder", "diffusers")):
        convert.write(bare, tmp_path / name, format)
        assert convert.read(tmp_path / name).tokenizer is None
        read = convert.read(tmp_path / name, tokenizer=tmp_path / "words").tokenizer
        assert read.to_dict() == ClipTokenizer.read(tmp_path / "words", 5).to_dict()
    file = tmp_path / "model.safetensors"
    convert.write(bare, file, "compvis")
    assert convert.read(file).tokenizer is None
    (tmp_path / "words").rename(tmp_path / "tokenizer")  # is found beside a single file
    assert convert.read(file).tokenizer.to_dict() == read.to_dict()
    write_clip(tmp_path / "named", pad_token="!")
    named = convert.read(file, tokenizer=tmp_path / "named").tokenizer
    assert named.to_dict() == ClipTokenizer.read(tmp_path / "named", 5).to_dict() != read.to_dict()


def test_a_refiner_has_the_tokenizer_of_its_only_encoder(tmp_path):
    convert.write(models.make_bundle("refiner"), tmp_path / "folder", "diffusers")
    write_clip(tmp_path / "folder" / "tokenizer_2", pad_token="!")
    read = convert.read(tmp_path / "folder")
    assert read.tokenizer.pad_id == read.conditioners["clip_text_2"].fields["pad_id"] == 0
    assert read.conditioners["clip_text_2"].fields["empty"] == read.tokenizer.empty


def test_the_users_home_is_where_a_model_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    words = models.make_bundle("text")
    convert.write(words, "~/model.safetensors", "compvis")
    assert not (tmp_path / "~").exists()
    read = convert.read("~/model.safetensors", config="~/model.yaml")
    assert read.unet.fields == convert.read(tmp_path / "home" / "model.safetensors").unet.fields
    with pytest.raises(ValueError, match=f": {tmp_path}/home/words is no BERT tokenizer"):
        convert.read("~/model.safetensors", tokenizer="~/words")
    with pytest.raises(ValueError, match=f"^{tmp_path}/home/lora.safetensors does not exist"):
        ldm.load_adapter("~/lora.safetensors")
