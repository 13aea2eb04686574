"""A start that is refused leaves a good run as it was; a run goes on with what it has."""

import contextlib
import re
import resource
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_convert_round_trips import make_bundle
from tiny import make_config

from configs import sd_v1
from latent_diffusion import convert, data
from latent_diffusion.convert import frozen_parts
from latent_diffusion.data.tokenizers import WordTokenizer, load_tokenizer
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.runtime import processes, workdir
from latent_diffusion.runtime.checkpoint import Checkpointer, acquire_lock, load_tree, tree_hash
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.denoising import Constants
from latent_diffusion.training import encoding, frozen, init_from, loop, settings, stages
from latent_diffusion.training import start as starting
from latent_diffusion.training.batch_spec import batch_spec
from latent_diffusion.training.dry_run import dry_run
from latent_diffusion.training.start import resolve, start
from latent_diffusion.training.tokenizer import make_tokenizer

# On a full disk the cache of compiled programs warns, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")


def few(task, **fields):
    """A tiny run on one device."""
    config = make_config(task, **fields)
    config.parallel.mode = "single"
    return config


def begin(config, directory):
    """A run that has started and saved its state as that of step 1: no step is compiled."""
    resolved = resolve(config, directory)
    with acquire_lock(directory), Checkpointer(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, start(resolved, directory, checkpoints).state, {"seed": 0})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of both stages."""
    root = tmp_path_factory.mktemp("runs")
    first, denoiser = root / "first", root / "denoiser"
    begin(few("autoencoding"), first)
    begin(few("denoising", **{"first_stage.path": str(first)}), denoiser)
    return first, denoiser


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 100 bytes, which is less than any that a start writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


REFUSED = {
    "network": ({"unet.model_channels": 16}, r"unet\.model_channels=16, but the run in .* has 8"),
    "heads": ({"unet.num_heads": 3}, "unet.num_heads=3, but the run in"),
    "condition": (
        {"conditioners": {"class_label": {}}},
        r"conditioners=\['class_label'\], but the run in .* has \['text'\]",
    ),
    "condition's field": ({"conditioners.text.num_heads": 2}, "conditioners.text.num_heads=2, but"),
    "data": ({"data.name": "openmoji"}, "data.name='openmoji', but the run in .* has 'synthetic'"),
    "size": ({"data.image_size": 32}, "data.image_size=32, but the run in .* has 16"),
    "first stage": ({"first_stage.path": "other"}, "first_stage.path='other', but the run in"),
    "scale": ({"first_stage.normalization": "none"}, "first_stage.normalization='none', but"),
    "tokenizer": ({"tokenizer.max_length": 5}, "tokenizer.max_length=5, but the run in .* has 4"),
    "noise": ({"diffusion.prediction": "eps"}, "diffusion.prediction='eps', but the run in"),
    "optimiser": ({"optimizer.grad_clip": 0.0}, r"optimizer\.grad_clip=0\.0, but the run in"),
    "batch": ({"batch_size": 9, "parallel.mode": "pmap"}, "batch_size"),
    "parts": (
        {"grad_accumulation": 3},
        "batch_size=8 doesn't divide over 1 devices × 3 micro-batches",
    ),
    "seed": ({"seed": -1}, r"seed=-1 must lie in \[0, 2\^64\)"),
    "mode": ({"parallel.mode": "ddp"}, "unknown parallel mode 'ddp'"),
    "distance": (
        {"num_steps": 9, "log.distance": "alexnet", "log.distance_images": 19},
        "log.distance_images=19 of 120 test images: a distance needs at least 20",
    ),
    "mesh": ({"parallel.mode": "mesh", "parallel.mesh.data": 3}, "mesh"),
}


@pytest.mark.parametrize("name", [*REFUSED, "task", "stage", "disk"])
def test_a_refused_start_leaves_every_byte_of_a_run(runs, name):
    first, denoiser = runs
    directory, limit = denoiser, contextlib.nullcontext()
    config = few("denoising", **{"first_stage.path": str(first)})
    if name == "task":
        config, message = few("autoencoding"), "task='autoencoding', but the run in"
    elif name == "stage":
        directory, message = first, "task='denoising', but the run in .* has 'autoencoding'"
    elif name == "disk":
        config.num_steps, message, limit = 9, "File too large", full_disk()
    else:
        fields, message = REFUSED[name]
        if "conditioners" in fields:
            config.conditioners = ConfigDict()
        config.update_from_flattened_dict(fields)
    before = contents(directory)
    with pytest.raises(loop.USER_ERRORS, match=message) as refusal, limit:
        loop.train(config, directory)
    assert "\n" not in str(refusal.value)
    assert contents(directory) == before


def test_a_refused_beginning_leaves_nothing_that_the_next_start_could_take(runs, tmp_path):
    config = few("denoising", **{"first_stage.path": str(runs[0])})
    with pytest.raises(OSError, match="File too large"), full_disk():
        loop.train(config, tmp_path)
    assert set(contents(tmp_path)) <= {".lock"}
    assert workdir.load_run(tmp_path) is None


def test_a_run_goes_on_without_the_files_that_it_began_with(runs, tmp_path):
    """And differently where it may: the new fields are written, what files decided stays."""
    first, denoiser = runs
    directory = shutil.copytree(denoiser, tmp_path / "moved")
    config = few("denoising", **{"first_stage.path": str(tmp_path / "gone")})
    shutil.copytree(first, tmp_path / "gone")
    config.first_stage.path = str(tmp_path / "gone")
    run = workdir.load_config(directory)
    run.first_stage.path = str(tmp_path / "gone")
    workdir.save_config(run, directory)
    shutil.rmtree(tmp_path / "gone")
    config.optimizer.learning_rate, config.autoencoder.channels = 0.5, 4
    with pytest.raises(ValueError, match=r"autoencoder\.channels=4, but the run in"):
        resolve(config, directory)
    config.autoencoder.channels = run.autoencoder.channels
    resolved = resolve(config, directory)
    with Checkpointer(directory / "checkpoints") as checkpoints:
        again = start(resolved, directory, checkpoints)
    assert again.step == 1
    written = workdir.load_config(directory)
    assert written.optimizer.learning_rate == 0.5
    assert settings.flat(written) == settings.flat(resolved)
    for name in ("first_stage.safetensors", "tokenizer.json"):
        assert (directory / name).read_bytes() == (denoiser / name).read_bytes()


def test_a_field_that_files_decided_may_be_asked_for_as_before(runs, tmp_path):
    """A first stage has another architecture than the denoiser's config says."""
    config = few("denoising", **{"first_stage.path": str(runs[0])})
    config.autoencoder.channels, config.autoencoder.codebook_beta = 128, 0.5
    resolved = resolve(config, tmp_path)
    theirs = workdir.load_config(runs[0]).autoencoder
    assert settings.flat(resolved.autoencoder) == settings.flat(theirs)
    assert resolved.asked.autoencoder.channels == 128
    for asked in (config, resolved):  # the same question, or its answer
        went_on = settings.continued(asked, resolved, tmp_path)
        assert settings.flat(went_on) == settings.flat(resolved)
    config.autoencoder.channels = 64
    with pytest.raises(ValueError, match=r"autoencoder.channels=64, but the run in .* has 8"):
        settings.continued(config, resolved, tmp_path)


def test_a_classifier_takes_the_noise_and_the_latents_of_its_denoiser(tmp_path):
    theirs = few("denoising", **{"diffusion.schedule": "sqrt", "diffusion.num_timesteps": 50})
    workdir.save_config(theirs, tmp_path)
    config = few("classifying", **{"first_stage.path": str(tmp_path), "autoencoder.channels": 16})
    resolved = stages.resolve(config)
    for section in ("diffusion", "autoencoder"):
        assert settings.flat(resolved[section]) == settings.flat(theirs[section])


def test_a_classifier_encodes_by_the_first_stage_of_its_denoiser(runs):
    latents = encoding._Latents(few("classifying", **{"first_stage.path": str(runs[1])}), "float32")
    of_first_stage = frozen_parts.load_autoencoder_params(runs[0])
    assert latents.kind == "moments" and latents.hash == tree_hash(of_first_stage)


def test_a_missing_first_stage_is_named_with_its_command():
    """The command is that of the config; for one's own pictures, that of their recipe."""
    trained_by = {"first_stage.path": "runs/fine", "first_stage.trained_by": "openmoji_x.py:fine"}
    train = "train one with: python train.py --config=configs"

    def message(**fields):
        with pytest.raises(ValueError) as raised:
            stages.resolve(few(**{"task": "denoising", **trained_by, **fields}))
        return str(raised.value)

    assert message().endswith(f"; {train}/openmoji_x.py:fine --workdir=runs/fine")
    found = message(**{"first_stage.path": ""})
    name_one = "name the workdir of one by --config.first_stage.path"
    assert found.startswith(f"first_stage.path is empty, but denoising needs one; {name_one}, or ")
    assert found.endswith(f"{train}/openmoji_x.py:fine --workdir=runs/first_stage")
    found = message(**{"first_stage.trained_by": ""})
    assert found.endswith(f"it has no readable config.json; {name_one}")
    own = {"data.name": "image_folder", "data.dir": "mine"}
    assert message(**own).endswith(
        f"{train}/images_autoencoder.py --workdir=runs/fine --config.data.dir=mine"
    )
    assert message(**{**own, "data.name": "tars"}).endswith(
        "images_autoencoder.py --workdir=runs/fine --config.data.name=tars --config.data.dir=mine"
    )
    found = message(**{**own, "data.name": "tfds:flowers", "data.dir": ""})
    assert found.endswith(" --workdir=runs/fine --config.data.name=tfds:flowers")
    found = message(**own, **{"first_stage.trained_by": "vq_f4.py"})
    assert found.endswith(f"{train}/vq_f4.py --workdir=runs/fine --config.data.dir=mine")
    assert message(**own, task="prior").endswith(  # no recipe of one's own pictures has its codes
        "openmoji_x.py:fine --workdir=runs/fine --config.data.name=image_folder"
        " --config.data.dir=mine"
    )


@pytest.mark.parametrize("field", ["data.dir", "first_stage.path"])
def test_a_path_is_the_place_not_its_spelling_and_data_may_move(tmp_path, monkeypatch, field):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    run, config = (few("denoising", **{field: str(tmp_path / "old")}) for _ in range(2))
    config.update_from_flattened_dict({field: "old"})
    settings.continued(config, run, tmp_path)
    config.update_from_flattened_dict({field: "new"})
    with pytest.raises(ValueError, match=f"{field}='new', but the run in"):
        settings.continued(config, run, tmp_path)
    (tmp_path / "old").rmdir()
    if field == "data.dir":
        assert settings.continued(config, run, tmp_path).data.dir == "new"
    else:
        with pytest.raises(ValueError, match=f"{field}='new', but the run in"):
            settings.continued(config, run, tmp_path)


def test_a_run_with_a_field_of_another_version_is_refused_by_its_name(tmp_path):
    config, run = few("denoising"), few("denoising")
    run.data.mirror = True
    with pytest.raises(ValueError, match=r"has data\.mirror=True, an unknown field; another vers"):
        settings.continued(config, run, tmp_path)
    config.data.features, run.data.features = ConfigDict({"a": "x"}), ConfigDict({"b": "x"})
    with pytest.raises(ValueError, match=r"data\.features\.a='x', but the run in .* has None"):
        settings.continued(config, run, tmp_path)
    run = few("denoising")
    del run.data["flip"]  # of an older version
    run.sampling.eta_of_old = 1.0  # training doesn't read it
    assert settings.continued(few("denoising"), run, tmp_path).data.flip is False


def test_what_adds_arrays_to_the_state_stays_on_or_off(tmp_path):
    for task, field, on in (
        ("denoising", "optimizer.grad_clip", 1.0),
        ("autoencoding", "ema_decay", 0.9),
    ):
        run, config = few(task, **{field: on}), few(task, **{field: on / 2})
        assert settings.continued(config, run, tmp_path)
        for have, had in ((few(task, **{field: 0.0}), run), (config, few(task, **{field: 0.0}))):
            with pytest.raises(ValueError, match=f"{field}=.*leave the field as it was"):
                settings.continued(have, had, tmp_path)
    run, config = few("denoising", ema_decay=0.0), few("denoising", ema_decay=0.9)
    assert settings.continued(config, run, tmp_path).ema_decay == 0.9


@pytest.mark.parametrize("field", ["checkpoint.keep", "log.num_images", "first_stage.num_batches"])
def test_a_number_that_would_lose_everything_is_refused(field, tmp_path):
    with pytest.raises(ValueError, match=f"^{field}=0 must be at least 1$"):
        resolve(few("autoencoding", **{field: 0}), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.frozen", ("unet/", "(")),
        ("optimizer.no_decay", ("(",)),
        ("lora.targets", ("(",)),
        ("init_from_only", "("),
        ("parallel.rules", (("(", "replicate"),)),
    ],
)
def test_a_pattern_that_is_no_regular_expression_is_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{field}='\(' is no regular expression: missing \)"):
        resolve(few("denoising", **{field: value}), tmp_path)


def test_a_pattern_that_freezes_nothing_is_refused_where_a_run_begins(tmp_path, caplog):
    """It is misspelt, and what should stay as it is would be trained."""
    config = few("autoencoding", **{"optimizer.frozen": ("encoder/", "^conv_in/", "decodr/")})
    wanted = r"^optimizer\.frozen='decodr/' matches no parameter; they begin with autoencoder/de"
    with pytest.raises(ValueError, match=wanted):
        begin(config, tmp_path)
    assert workdir.load_run(tmp_path) is None and not (tmp_path / "config.json").exists()
    # What is frozen anyway may be named, too.
    config = few("denoising", **{"optimizer.frozen": ("unet/", "conditioner/bert/", "base_")})
    state = SimpleNamespace(params={"lora": {"unet": np.ones(1)}})
    base = {"unet": {"kernel": np.ones(1)}, "base_net": np.ones(1)}
    constants = SimpleNamespace(conditioner={"bert": {"kernel": np.ones(1)}}, base=base)
    starting._check_patterns(config, state, constants)
    assert not caplog.messages
    config.optimizer.no_decay = ("kernel", "bais")
    starting._check_patterns(config, state, constants)
    assert caplog.messages == ["optimizer.no_decay='bais' matches no parameter"]
    for targets, message in (
        (("unet", "base_net"), "='base_net' matches no parameter; they"),  # it has no kernel
        (("unet", "bert/"), "='bert/' matches only the encoder of pretrained.bert, which isn't"),
    ):
        config.lora.update({"rank": 1, "targets": targets})
        with pytest.raises(ValueError, match=rf"^lora\.targets{message}"):
            starting._check_patterns(config, state, constants)


def test_a_lora_also_adapts_the_text_encoder_of_stable_diffusion(tmp_path):
    convert.write(make_bundle("clip"), tmp_path / "SD", "diffusers")
    config = sd_v1.get_config("lora")
    config.init_from = str(tmp_path / "SD")
    config.data.image_size, config.tokenizer.max_length = 16, 5
    config.lora.targets = (*config.lora.targets, "conditioner/clip_text/.*self_attn/(qkv|out_proj)")
    config = starting.with_files(config)
    init = TASKS["denoising"](config).init
    state, constants = jax.eval_shape(init, jax.random.key(0), batch_spec(config))
    assert state.params["lora"].keys() == {"unet", "conditioner"} and not constants.conditioner
    starting._check_patterns(config, state, constants)


def test_guidance_without_a_condition_is_refused_before_a_step():
    config = few("denoising", conditioners={}, **{"sampling.guidance_scale": 2.0})
    with pytest.raises(ValueError, match=r"^sampling.guidance_scale=2.0 needs a condition, and"):
        starting.check_new(config)
    for off in (1.0, None):
        config.sampling.guidance_scale = off
        starting.check_new(config)


@pytest.mark.parametrize("name", ["word_map", "layout_map"])
def test_maps_of_one_size_are_refused_for_pictures_of_several(name):
    config = few("denoising", **{"data.bucket_step": 4})
    config.conditioners = ConfigDict({name: {}})
    message = rf"^data.bucket_step=4 gives latents .*, and conditioners.{name} has maps of one"
    with pytest.raises(ValueError, match=message):
        starting.check_new(config)


def test_pictures_without_texts_are_refused_before_they_are_encoded(runs, tmp_path):
    for i in range(8):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    config = few("denoising", **{"first_stage.path": str(runs[0])})
    config.tokenizer.name = "none"
    with pytest.raises(ValueError, match=r"^no tokens, .* \(tokenizer.name='none'\); the"):
        begin(config, tmp_path / "run")
    config.tokenizer.name = "word"
    config.data.update({"name": "image_folder", "dir": str(tmp_path)})
    config.data.update({"train_split": "all", "test_split": "all"})
    with pytest.raises(ValueError, match="no caption to tokenize; the example has: name, image"):
        begin(config, tmp_path / "run")
    assert set(contents(tmp_path / "run")) <= {".lock"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_from_only": "unet/"}, "init_from_only='unet/' needs a model: name it by init_from"),
        ({"init_from_changes": ("a",)}, r"init_from_changes=\('a',\) needs a model: name it by"),
        (
            {"data.layout.vocab_size": 1024},
            "conditioners.layout.vocab_size=8192, but data.layout.vocab_size=1024: the same token",
        ),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused_for_new_runs(fields, message):
    config = few("denoising", **fields)
    if "data.layout.vocab_size" in fields:
        config.conditioners = ConfigDict({"layout": {}})
    with pytest.raises(ValueError, match=f"^{message}"):
        starting.check_new(config)


def test_a_classifier_is_half_a_u_net(tmp_path):
    config = few("classifying", backbone="dit")
    with pytest.raises(ValueError, match=r"backbone='dit', but a classifier is half a U-Net"):
        starting.check_new(config)


@pytest.mark.parametrize("field", ["unet.dtype", "autoencoder.dtype", "conditioners.text.dtype"])
def test_an_unknown_dtype_is_named(field):
    config = few("denoising")
    with config.unlocked():
        config.update_from_flattened_dict({field: "bf16"})
    with pytest.raises(ValueError, match=r"^unknown dtype 'bf16'; known: bfloat16, float16, flo"):
        TASKS["denoising"](config)


def test_a_workdir_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match="workdir=gs://bucket/run: a workdir is a folder"):
        loop.train(few("autoencoding"), "gs://bucket/run")
    seen = []
    monkeypatch.setattr(loop, "resolve", lambda config, directory: seen.append(directory) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(few("autoencoding"), "~/run")
    assert seen == [tmp_path / "home" / "run"] and not any(tmp_path.iterdir())


def test_processes_compare_their_configs_and_their_workdirs(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(processes, "check_same", lambda given, what: seen.update({what: given}))
    config = few("autoencoding")
    resolve(config, tmp_path)
    assert seen == {"config": {**config.to_dict(), "workdir": str(tmp_path)}}


def test_a_classifier_goes_on_without_its_denoiser(tmp_path):
    config = few("classifying", **{"first_stage.path": str(tmp_path / "gone")})
    fresh = FirstStage({}, np.ones(()), np.zeros(()), Identity(3))
    frozen_parts.save_first_stage(tmp_path, fresh.replace(scale_factor=np.float32(0.25)), "gone")
    loaded = frozen.load_constants(config, Constants(fresh), None, tmp_path, None)
    assert loaded.first_stage.scale_factor == 0.25 and loaded.conditioner == {}


def test_the_description_of_a_run_has_the_fields_that_files_decide(runs):
    def last_lines(mode="single", **fields):
        config = few("denoising", **{"autoencoder.channels": 32, **fields})
        config.parallel.mode = mode
        return dry_run(config).splitlines()

    described = last_lines(**{"first_stage.path": str(runs[0])})
    own = few("autoencoding").autoencoder.channels
    assert own != 32 and f"autoencoder.channels = {own}" in described
    assert "GFLOP an image" in described[-1]
    absent = last_lines(init_from="/nowhere")
    assert absent[-1].endswith("that decide fields of the config: /nowhere does not exist")
    cut = last_lines("mesh", **{"parallel.mesh.fsdp": 8, "parallel.mesh.data": 1,
                                "parallel.rules": ((".*", "fsdp(min_mb=0)"),)})  # fmt: skip
    whole, part = (
        int(re.search(r"bytes a device: state ([\d,]+)", "\n".join(lines))[1].replace(",", ""))
        for lines in (described, cut)
    )
    assert whole / 8 <= part < whole / 4  # but for what doesn't divide
    assert "can't start here: batch_size=7 doesn't divide" in last_lines("pmap", batch_size=7)[-1]


def test_every_field_that_may_change_exists():
    names = settings.flat(few("denoising"))
    for pattern in settings.MAY_CHANGE:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_fields_of_networks_that_leave_the_parameters_alone_may_change():
    same = r"(?!conditioners).*\.(attention|dropout|dtype|remat|scan)"
    names = [name for name in settings.flat(few("denoising")) if re.fullmatch(same, name)]
    assert len(names) >= 15
    for name in names:
        assert any(re.fullmatch(pattern, name) for pattern in settings.MAY_CHANGE), name


WORDS = ["blue heart", "red heart", "red circle", "heart", "heart", "a tiny heart", "red", "red"]


@pytest.fixture
def own_pictures(monkeypatch):
    """Eight pictures with captions of known and new words."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    source = data.ArraySource({"image": images, "caption": WORDS})
    monkeypatch.setattr(data, "make_source", lambda config, split: source)


@pytest.fixture
def full(runs, tmp_path):
    """The denoiser's workdir, as if each row of its embedding had a word."""
    directory = shutil.copytree(runs[1], tmp_path / "full")
    old = load_tokenizer(directory / workdir.TOKENIZER)
    words = [*old.vocabulary, *(f"word{i}" for i in range(old.vocab_size))]
    words = WordTokenizer(words[: old.vocab_size - 2], old.vocab_size, old.max_length)
    words.save(directory / workdir.TOKENIZER)
    return directory


@pytest.mark.usefixtures("own_pictures")
def test_what_parameters_were_trained_with_comes_with_them(runs, full, tmp_path, caplog):
    """Words, noise, prediction, first stage and its scale, heads; and it is said."""
    before, directory = workdir.load_config(full), tmp_path / "new"
    config = few("denoising", init_from=str(full))
    config.diffusion.update({"prediction": "eps", "schedule": "linear", "num_timesteps": 500})
    config.diffusion.zero_terminal_snr = True
    config.update_from_flattened_dict({"unet.num_heads": 1, "conditioners.text.num_heads": 2})
    config.update_from_flattened_dict({"tokenizer.max_length": 9, "tokenizer.vocab_size": 4})
    config.first_stage.path = str(runs[0])
    with caplog.at_level("INFO"):
        begin(config, directory)
    assert "diffusion.prediction='v' (asked: 'eps')" in caplog.text
    written = workdir.load_config(directory)
    for section in ("unet", "diffusion", "autoencoder"):
        assert written[section] == before[section], section
    assert written.conditioners.text.num_heads == before.conditioners.text.num_heads
    for name in ("scale_factor", "shift"):
        trees = [load_tree(run / workdir.FIRST_STAGE)[0][name] for run in (directory, full)]
        np.testing.assert_array_equal(*trees)

    old, new = (load_tokenizer(run / workdir.TOKENIZER) for run in (full, directory))
    assert new.vocabulary == (*old.vocabulary, "heart", "a", "tiny")
    assert new.max_length == old.max_length
    assert new.vocab_size == written.conditioners.text.vocab_size == old.vocab_size + 3
    theirs, ours = (
        workdir.load_entry(run, "params")["conditioner"]["text"]["token_emb"]["embedding"]
        for run in (full, directory)
    )
    assert len(ours) == len(theirs) + 3
    np.testing.assert_array_equal(ours[: len(theirs)], theirs)
    assert np.std(ours[len(theirs) :], axis=1).min() > 0
    assert resolve(config, directory).tokenizer.vocab_size == new.vocab_size  # asked as before


@pytest.mark.usefixtures("own_pictures")
def test_new_words_take_free_rows_and_none_where_rows_are_not_trained(runs):
    config = few("denoising", init_from=str(runs[1]))
    bundle, source = init_from.read(config), data.make_source(config.data, "train")
    same, words = make_tokenizer(init_from.resolve(config), source, None, bundle)
    old = load_tokenizer(runs[1] / workdir.TOKENIZER)
    assert words.vocabulary == (*old.vocabulary, "heart", "a", "tiny")
    assert words.vocab_size == old.vocab_size == same.conditioners.text.vocab_size
    config.lora.rank = 2
    _, words = make_tokenizer(init_from.resolve(config), source, None, bundle)
    assert words.vocabulary == old.vocabulary


def test_a_field_may_depart_from_the_parameters_where_that_is_said(runs, tmp_path):
    config = few("denoising", init_from=str(runs[1]))
    config.diffusion.update({"prediction": "eps", "schedule": "linear"})
    config.init_from_changes = ("diffusion.prediction", "first_stage.path")
    config.first_stage.path = str(runs[0])
    resolved = resolve(config, tmp_path)
    assert resolved.diffusion.prediction == "eps" and resolved.diffusion.schedule == "cosine"
    config.init_from_changes = ("diffusion.predicton",)
    with pytest.raises(ValueError, match=r"init_from_changes='diffusion\.predicton' is none of"):
        resolve(config, tmp_path)


def test_files_that_a_killed_start_left_are_not_taken_for_those_of_the_next(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "old.json").write_text("{}")
    with workdir.together(tmp_path) as folder:
        (folder / "new.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_a_run_goes_on_with_what_was_asked_or_what_files_decided(tmp_path):
    first = {"task": "denoising", "unet": {"width": 4}, "data": {"flip": False}}
    run = settings.decided(ConfigDict(first), {"unet.width": 8}, "a file")
    run = settings.decided(run, {"unet.width": 9}, "another")
    assert run.unet.width == 9 and run.asked.unet.width == 4
    for width, flip in ((4, True), (9, False)):  # of flips, nothing remains in the state
        config = ConfigDict({**first, "unet": {"width": width}, "data": {"flip": flip}})
        resumed = settings.continued(config, run, tmp_path)
        assert resumed.unet.width == 9 and resumed.data.flip == flip
        assert resumed.asked == run.asked
    for width in (5, 8):
        with pytest.raises(ValueError, match=rf"unet.width={width}, but the run in .* has 9"):
            settings.continued(ConfigDict({**first, "unet": {"width": width}}), run, tmp_path)


def test_what_a_killed_start_wrote_is_no_part_of_the_next_run(runs, tmp_path):
    names = ("first_stage.safetensors", "conditioner_text.safetensors", "tokenizer.json")
    for name in (*names, "own.safetensors"):
        shutil.copy(runs[1] / "first_stage.safetensors", tmp_path / name)
    begin(few("autoencoding"), tmp_path)
    assert {path.name for path in tmp_path.glob("*.*[sn]")} == {"config.json", "own.safetensors"}


@pytest.mark.parametrize(
    "field", ["data.dir", "data.embedding_path", "init_from", "distillation.teacher"]
)
def test_the_data_of_a_run_may_move_but_are_not_exchanged(field, tmp_path):
    def resumed(before, now):
        run, config = (few("denoising", **{field: str(path)}) for path in (before, now))
        return settings.flat(settings.continued(config, run, tmp_path))[field]

    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    assert resumed(tmp_path / "gone", tmp_path / "here") == str(tmp_path / "here")
    (tmp_path / "link").symlink_to("here")
    assert resumed(tmp_path / "here", tmp_path / "link") == str(tmp_path / "link")
    with pytest.raises(ValueError, match=f"{field}=.*leave the field as it was"):
        resumed(tmp_path / "there", tmp_path / "here")


def test_a_first_stage_moves_with_its_model_and_texts_need_not_be_encoded_once(tmp_path):
    fields = {"init_from": str(tmp_path / "gone"), "first_stage.path": str(tmp_path / "gone")}
    run = few("denoising", **fields, **{"cache_texts": True})
    config = few("denoising", **dict.fromkeys(fields, str(tmp_path)), **{"data.workers": 2})
    assert settings.continued(config, run, tmp_path) == config
    config.first_stage.path = "another"
    with pytest.raises(ValueError, match=r"first_stage\.path='another', but the run in"):
        settings.continued(config, run, tmp_path)


def test_what_a_teacher_decided_moves_with_it(tmp_path):
    """An adaptation that is distilled reads its base again, from `init_from`."""
    old, new = str(tmp_path / "gone"), str(tmp_path)
    asked, run = (few("distillation", **{"distillation.teacher": path}) for path in (new, old))
    run = settings.decided(run, {"init_from": old, "pretrained.text": old, "unet.depth": 3}, old)
    resumed = settings.continued(asked, run, tmp_path)
    assert (resumed.init_from, resumed.pretrained.text) == (new, new) and resumed.unet.depth == 3
    named = [few("distillation", **{"distillation.teacher": p, "init_from": p}) for p in (new, old)]
    assert settings.continued(*named, tmp_path).init_from == new  # by the config itself, too


def test_a_denoiser_has_its_own_noise_and_the_architecture_of_its_first_stage(tmp_path):
    earlier = few("autoencoding", **{"autoencoder.channels": 12, "diffusion.schedule": "linear"})
    workdir.save_config(earlier, tmp_path)
    config = few("denoising", **{"first_stage.path": str(tmp_path)})
    assert config.diffusion.schedule != "linear" and config.autoencoder.channels != 12
    config.autoencoder.update({"dtype": "bfloat16", "remat": True})  # how it computes
    resolved = stages.resolve(config)
    assert resolved.autoencoder.channels == 12
    assert resolved.autoencoder.dtype == "bfloat16" and resolved.autoencoder.remat
    assert resolved.diffusion == config.diffusion


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (
            "prior",
            {"data.bucket_step": 8},
            "bucket_step=8: the task prior has pictures of one size",
        ),
        ("classifying", {"data.bucket_step": 8}, "the task classifying has pictures of one size"),
        ("denoising", {"data.layout.centres": True}, "layout_map fills boxes: it needs"),
    ],
)
def test_data_that_a_network_does_not_understand_are_refused(task, fields, message, tmp_path):
    config = make_config(task, **fields)
    if task == "denoising":
        config.conditioners = ConfigDict({"layout_map": {}})
    with pytest.raises(ValueError, match=message):
        resolve(config, tmp_path)


@pytest.mark.parametrize(("field", "value"), [("image_size", 15), ("bucket_step", 5)])
def test_a_side_that_the_autoencoder_does_not_divide_is_refused(field, value, tmp_path):
    """Reconstructions would have another size, in a bucket after some steps."""
    config = few("autoencoding", **{f"data.{field}": value})
    for refusing in (lambda: resolve(config, tmp_path), lambda: dry_run(config)):
        with pytest.raises(ValueError, match=f"^data.{field}={value} must be divisible by f=2, by"):
            refusing()
