"""A start that is refused leaves a good run as it was; a run goes on with what it has."""

import contextlib
import re
import resource
import shutil

import pytest
from ml_collections import ConfigDict
from tiny import make_config

from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer, acquire_lock
from latent_diffusion.training import loop, settings
from latent_diffusion.training.start import resolve, start


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
    "optimiser": ({"optimizer.grad_clip": 0.0}, "another tree|holds another|opt_state"),
    "batch": ({"batch_size": 9, "parallel.mode": "pmap"}, "batch_size"),
    "mode": ({"parallel.mode": "ddp"}, "unknown parallel mode 'ddp'"),
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


def test_every_field_that_may_change_exists():
    names = settings.flat(few("denoising"))
    for pattern in settings.MAY_CHANGE:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
