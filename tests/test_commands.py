"""What a user types, as a user types it: both stages, resuming, sampling, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import FAST_COMPILATION, ROOT
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file
from test_convert_round_trips import WIDTH, make_bundle, random
from test_image_prompts import random_adapter
from test_parallel import compilations

import latent_diffusion as ldm
from configs import openmoji_autoencoder
from demo import first_stages
from latent_diffusion import convert
from latent_diffusion.convert import adapters
from latent_diffusion.convert.adapters import control
from latent_diffusion.convert.bundle import as_part
from latent_diffusion.runtime import metrics, parallel
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.training import loop

AUTOENCODER = "--config=configs/openmoji_autoencoder.py:smoke"
TEXT = "--config=configs/openmoji_text.py:smoke"
ENV = {**os.environ, "XLA_FLAGS": FAST_COMPILATION}  # one device


def _command(script, *flags):
    return [sys.executable, str(ROOT / script), *flags]


def _run(script, *flags, fails=False):
    done = subprocess.run(
        _command(script, *flags), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=400
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def _last_line(done):
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both stages, trained by the commands: (first stage's workdir, denoiser's workdir)."""
    root = tmp_path_factory.mktemp("runs")
    first, denoiser = root / "first_stage", root / "denoiser"
    _run("train.py", AUTOENCODER, f"--workdir={first}")
    done = _run("train.py", TEXT, f"--workdir={denoiser}", f"--config.first_stage.path={first}")
    assert "scale_factor" in done.stderr and f"first stage: {first}" in done.stderr
    return first, denoiser


def test_a_workdir_holds_what_the_readme_says(trained):
    for workdir in trained:
        assert json.loads((workdir / "config.json").read_text())["num_steps"] == 4
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(np.isfinite(line["loss"]) for line in lines)
        assert all(line["peak_memory_gib"] > 0 for line in lines)
        assert any(name.startswith("eval_") for name in lines[-1])
        assert (workdir / "checkpoints" / "4").is_dir()
        assert list((workdir / "images").glob("*_00000004.png"))
        assert list((workdir / "tensorboard").iterdir())


def test_sample_writes_prompt_major_images_that_depend_on_seed_and_index_only(trained, tmp_path):
    flags = (f"--workdir={trained[1]}", "--prompts=red circle;blue zebra", "--num_images=2")
    done = _run("sample.py", *flags, f"--out={tmp_path / 'a'}")
    assert "zebra" in done.stderr  # an unknown word is named, and sampling goes on
    usual = ("--sampler=ddim", "--spacing=trailing", "--eta=0", "--progress")
    done = _run("sample.py", *flags, f"--out={tmp_path / 'b'}", "--batch_size=3", *usual)
    assert " evaluations" in done.stderr
    prompts = (tmp_path / "a" / "prompts.txt").read_text().splitlines()
    assert prompts == ["red circle", "red circle", "blue zebra", "blue zebra"]
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert a.dtype == np.uint8
    assert a.shape == (4, 32, 32, 3)
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1  # sums in another order
    for i in range(4):
        image = np.asarray(Image.open(tmp_path / "a" / f"{i:05d}.png"))
        np.testing.assert_array_equal(image, a[i])
    assert (tmp_path / "a" / "grid.png").exists()


def _write_adapters(folder, unet):
    """A LoRA, a word, a control net and an IP-Adapter of a U-Net, and the picture that two see."""
    rng, width = np.random.default_rng(0), WIDTH
    kernel = "middle_block_1/transformer_blocks_0/attn2/to_v/kernel"
    rows, columns = unet.params[kernel].shape
    factors = {"down": rng.normal(size=(rows, 2)), "up": rng.normal(size=(2, columns))}
    factors = {k: x.astype(np.float32) for k, x in factors.items()} | {"alpha": np.float32(2)}
    adapted = replace(make_bundle("text"), lora={"unet": {kernel: factors}})
    convert.write(adapted, folder / "style.safetensors", "kohya")
    save_file({"<it>": random((2, width))}, folder / "word.safetensors")
    fields = {**unet.fields, "hint_channels": (16, 32), "global_pooling": False}
    shapes = flatten_dict(control.shapes(fields, 4, width, None), sep="/")
    params = {name: 0.3 * random(x.shape) for name, x in shapes.items()}
    net = adapters.ControlWeights(path="net", params=params, fields=control.frozen(fields))
    adapters.write_control(net, folder / "net", "diffusers")
    like = random_adapter(width=width, inner=32)
    adapters.write_image_prompt(like, folder / "like.safetensors")
    vit = {"clip_image": as_part(dict(like.encoder_fields), like.encoder)}
    convert.write(convert.Bundle(conditioners=vit), folder / "vit", "diffusers")
    picture = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(picture).save(folder / "picture.png")
    return picture[None] / np.float32(255)


def test_a_single_file_is_sampled_with_its_tokenizer_and_adapters_of_all_kinds(tmp_path):
    bundle, model = make_bundle("text"), tmp_path / "model.safetensors"
    convert.write(bundle, model, "compvis")
    hint = _write_adapters(tmp_path, bundle.unet)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "two", "dog"]
    vocabulary = tmp_path / "words" / "vocab.txt"
    vocabulary.parent.mkdir()
    vocabulary.write_text("\n".join(words))
    style, word, net, like, vit = (
        tmp_path / name
        for name in ("style.safetensors", "word.safetensors", "net", "like.safetensors", "vit")
    )
    _run(
        "sample.py",
        f"--model={model}",
        f"--tokenizer={vocabulary}",
        f"--adapter={style}:50",
        f"--adapter={word}:2",
        f"--control={net}:{tmp_path / 'picture.png'}:0.5",
        f"--image_prompt={like}:{tmp_path / 'picture.png'}:20",
        f"--image_encoder={vit}",
        "--prompts=a <it>",
        "--negative_prompts=cat <it>",
        "--guidance_scale=3",
        "--num_images=2",
        "--num_steps=2",
        f"--out={tmp_path}",
    )
    got = np.load(tmp_path / "samples.npz")["arr_0"].astype(int)
    loaded, read = ldm.load(model, tokenizer=vocabulary), ldm.load_adapter
    style, word, net, like = read(style), read(word), read(net), read(like, image_encoder=vit)

    def sampled(a, b, c, d, prompt="a <it>", negative="cat <it>"):
        options = {"num_images": 2, "num_steps": 2, "mode": "single", "controls": [(net, hint, c)]}
        options |= {"image_prompts": [(like, 2 * hint - 1, d)], "negative_prompts": [negative]}
        options |= {"adapters": [(style, a), (word, b)], "guidance_scale": 3.0}
        return metrics.to_uint8(loaded.sample(jax.random.key(0), [prompt], **options))

    whole = 50, 2, 0.5, 20
    assert np.abs(got - sampled(*whole)).max() <= 1 and got.std() > 4  # sums in another order
    for i in range(4):
        without = sampled(*(0 if i == j else weight for j, weight in enumerate(whole)))
        assert np.abs(got - without).max() > 4, i
    for texts in ({"prompt": "a"}, {"negative": "cat"}):
        assert np.abs(got - sampled(*whole, **texts)).max() > 4, texts


def test_first_stages_are_compared_in_a_table_and_a_picture(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "small")
    scores = {"psnr": 20.123, "ssim": 0.5, "lpips_alex": 0.25}
    (tmp_path / "small" / "evaluations.jsonl").write_text(json.dumps({"metrics": scores}))
    heading, _, line = first_stages.compare(tmp_path).splitlines()
    assert heading.startswith("| first stage | PSNR | SSIM | LPIPS | latent std | codes in use |")
    cells = line.split(" | ")
    assert cells[:4] == ["| small", "20.12", "0.500", "0.2500"] and float(cells[4]) > 0
    assert cells[5] == "–" and float(cells[6]) > 0 and cells[7].endswith(" M |")
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.width > 12 * 32 and picture.height >= 2 * 32


def test_load_gives_a_model_that_encodes_decodes_and_samples(trained):
    autoencoder, model = (ldm.load(workdir) for workdir in trained)
    images = np.zeros((2, 32, 32, 3), np.float32)
    z = model.encode(jax.numpy.asarray(images))
    assert z.shape == (2, 8, 8, 4)
    assert model.decode(z).shape == images.shape
    # The stage-2 workdir carries the same first stage, behind its latent scale.
    plain = autoencoder.encode(jax.numpy.asarray(images))
    first_stage = model.first_stage
    expected = (plain - first_stage.shift) * first_stage.scale_factor
    np.testing.assert_allclose(z, expected, atol=1e-5)
    conditioning = model.condition(prompts=["red circle", ""])
    assert conditioning.context.shape == (2, 4, 16)
    assert model.denoise(z, jax.numpy.zeros(2), conditioning).shape == z.shape
    rng = jax.random.key(3)
    few = model.sample(rng, ["red circle"], num_images=3, mode="single")
    many = model.sample(rng, ["red circle"], num_images=11, mode="pmap")  # padded over 8 devices
    np.testing.assert_allclose(many[:3], few, atol=1e-4)


def test_model_names_what_it_lacks_or_was_not_given(trained):
    autoencoder, model = (ldm.load(workdir) for workdir in trained)
    rng = jax.random.key(0)
    with pytest.raises(ValueError, match="this model has no denoiser, only a first stage"):
        autoencoder.sample(rng)
    with pytest.raises(ValueError, match="conditioned on tokens: give prompts"):
        model.sample(rng)
    with pytest.raises(ValueError, match="class_labels given, but this model takes prompts"):
        model.sample(rng, ["a"], class_labels=[1])
    with pytest.raises(ValueError, match="image_size 30×32 must be divisible by f=4"):
        model.sample(rng, ["a"], image_size=(30, 32))
    with pytest.raises(ValueError, match="num_steps must lie in 1 … 1000"):
        model.sample(rng, ["a"], num_steps=0)
    with pytest.raises(ValueError, match="unknown sampler 'dimm'; known: "):
        model.sample(rng, ["a"], sampler="dimm", mode="single")
    with pytest.raises(ValueError, match=r"z_T has shape \(2, 8, 8, 4\), expected \(1, 8, 8, 4\)"):
        model.sample(rng, ["a"], z_T=np.zeros((2, 8, 8, 4), np.float32))


def _few(num_steps):
    """The smoke autoencoder on one device, for so many steps and without pictures."""
    config = openmoji_autoencoder.get_config("smoke")
    config.num_steps = num_steps
    config.parallel.mode = "single"
    config.log.images_every_steps = 0
    return config


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir in which two steps were taken."""
    workdir = tmp_path_factory.mktemp("two") / "steps"
    loop.train(_few(2), workdir)
    return workdir


@pytest.fixture
def compiled(monkeypatch):
    """How many programs were compiled in each training step, of all runs in turn."""
    counts, compile_step = [], parallel.compile_step

    def counting(*args, **options):
        step = compile_step(*args, **options)

        def run(*args):
            with compilations() as seen:
                out = step(*args)
            counts.append(len(seen))
            return out

        return run

    monkeypatch.setattr(parallel, "compile_step", counting)
    return counts


def test_two_steps_and_two_more_are_bitwise_four_and_the_first_alone_compiles(
    two_steps, tmp_path, compiled
):
    whole = loop.train(_few(4), tmp_path / "whole")
    assert compiled[0] > 0 and compiled[1:] == [0, 0, 0]
    shutil.copytree(two_steps, tmp_path / "parts")
    parts = loop.train(_few(4), tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_nan_stops_the_run_by_name_and_leaves_the_last_good_checkpoint(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    config = _few(6)
    config.optimizer.learning_rate = 1e38
    with pytest.raises(metrics.NonFiniteError, match=r"step \d+: .*loss = "):
        loop.train(config, workdir)
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore().state
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))


def test_sigterm_saves_and_says_so_by_its_exit_code(tmp_path):
    flags = (AUTOENCODER, f"--workdir={tmp_path}", "--config.num_steps=1000000")
    process = subprocess.Popen(
        _command("train.py", *flags), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    # The lock refuses a second run while this one lives.
    refused = _run("train.py", *flags, fails=True)
    assert f"in use by process {process.pid}" in _last_line(refused)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in stderr
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (AUTOENCODER, "--config.data.nmae=x"),
            "error: --config.data.nmae: data has no field 'nmae'; known: ",
        ),
        (("--config=configs/nowhere.py",), "error: --config: [Errno 2] No such file"),
        ((AUTOENCODER, "--config.num_steps=x"), "error: flag --config.num_steps=x: invalid"),
        ((TEXT, "--dry_run", "--config.data.image_size=64"), "conditioners.word_map.height=16"),
        (
            ("--config=configs/openmoji_text.py:smok",),
            "unknown variant 'smok'; known: smoke, style_base, two_styles, v",
        ),
        ((AUTOENCODER, "--config.task=segmenting"), "unknown task 'segmenting'; known: "),
        ((AUTOENCODER, "--config.data.name=mnist"), "unknown data.name 'mnist'; known: "),
        ((TEXT, "--config.first_stage.path=nowhere"), "train one with: python train.py"),
        ((AUTOENCODER, "--config.parallel.mode=ddp"), "unknown parallel mode 'ddp'; known: "),
    ],
    ids=["field", "file", "value", "size", "variant", "task", "data", "first stage", "mode"],
)
def test_bad_input_is_one_line_that_names_it(flags, message, tmp_path):
    done = _run("train.py", *flags, f"--workdir={tmp_path}", fails=True)
    assert message in _last_line(done)


def test_dry_run_counts_parameters_without_data_or_workdir():
    unset = {"data.dir": "elsewhere", "unet.dtype": "bfloat16", "autoencoder.dtype": "bfloat16"}
    unset |= {"unet.num_head_channels": 16, "sampling.eta": 0.5}
    flags = [f"--config.{field}={value}" for field, value in unset.items()]
    done = _run("train.py", "--config=configs/openmoji_text.py", "--dry_run", *flags)
    lines = done.stdout.splitlines()
    assert 'data.dir = "elsewhere"' in lines and done.stdout.count("bfloat16") == 2
    assert "unet.channel_mult = [1, 2]" in lines and len(lines) < 250
    assert "denoiser" in done.stdout
    assert "first stage (frozen)" in done.stdout
