"""Every flag of a command reaches the call that does the work, and has a test in the table."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import wiring
from absl import app
from conftest import ROOT
from PIL import Image
from test_mutants import names_of_tests

from latent_diffusion.runtime import flags as shared_flags
from latent_diffusion.runtime import processes, programs, startup


def python(code, *arguments):
    """What a program prints, as JSON."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


PACKAGE = ROOT / "latent_diffusion"
FLAGS = """
import importlib, json, sys
from absl import flags
found = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    own = [f for module, fs in flags.FLAGS.flags_by_module_dict().items()
           if module == name or module.startswith("latent_diffusion") for f in fs]
    found[name] = sorted(f.name for f in own)
    flags.FLAGS.remove_flag_values([f.name for f in own])
print(json.dumps(found))
"""


def test_every_flag_of_a_command_has_one_entry_and_its_test_exists():
    found = python(FLAGS, *wiring.FLAGS)
    assert found == {command: sorted(flags) for command, flags in wiring.FLAGS.items()}
    for command, flags in wiring.FLAGS.items():
        for flag, test in flags.items():
            file, _, name = test.partition("::")
            assert name in names_of_tests(f"tests/{file}"), f"{command} --{flag}: {test}"


SAMPLE = """
import json
import latent_diffusion.generation.__main__ as command
from absl import app
from latent_diffusion.generation import sampling
def told(path, out, **given):
    values = {k: v.tolist() if hasattr(v, "tolist") else "function" if callable(v) else v
              for k, v in given.items()}
    print(json.dumps({"path": path, "out": str(out), **values}, default=str))
sampling.sample_to_disk = told
app.run(command.main)
"""


def test_what_is_written_behind_sample_reaches_the_call(tmp_path):
    Image.new("RGB", (2, 2), "white").save(tmp_path / "picture.png")
    Image.new("L", (2, 2), "white").save(tmp_path / "grey.png")
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "layout.json").write_text("[[3, [0, 0, 1, 1]]]")
    (tmp_path / "prompts.txt").write_text("c\nd\n")
    white = [[[[1.0] * 3] * 2] * 2]
    expected = {  # flag: (what is written, the argument, its value)
        "out": ("there", "out", "there"),
        "prompts": ("a;b", "prompts", ["a", "b"]),
        "class_labels": ("1,2", "class_labels", [1, 2]),
        "num_images": (3, "num_images", 3),
        "seed": (9, "seed", 9),
        "tokenizer": ("words", "tokenizer", "words"),
        "lora": ("style:0.5", "lora", {"style": 0.5}),
        "adapter": ("style:0.5", "adapters", [["style", 0.5]]),
        "control": ("net:a.png:0.5", "controls", [["net", "a.png", 0.5]]),
        "dtype": ("bfloat16", "dtype", "bfloat16"),
        "scan": ("true", "scan", True),
        "refiner": ("other:0.25", "refiner", ["other", 0.25]),
        "image_prompt": ("ip:a.png:0.5", "image_prompts", [["ip", "a.png", 0.5]]),
        "image_encoder": ("vit", "image_encoder", "vit"),
        "batch_size": (7, "batch_size", 7),
        "sampler": ("euler", "sampler", "euler"),
        "num_steps": (5, "num_steps", 5),
        "spacing": ("karras", "spacing", "karras"),
        "eta": (0.5, "eta", 0.5),
        "guidance_scale": (2.5, "guidance_scale", 2.5),
        "guidance_interval": ("100,900", "guidance_interval", [100, 900]),
        "guidance_rescale": (0.5, "guidance_rescale", 0.5),
        "dynamic_threshold": (0.9, "dynamic_threshold", 0.9),
        "quantize_x0": ("true", "quantize_x0", True),
        "cfg_pp": ("true", "cfg_pp", True),
        "perpendicular": (0.7, "perpendicular", 0.7),
        "strength": (0.5, "strength", 0.5),
        "tile_size": (16, "tile_size", 16),
        "tile_overlap": (8, "tile_overlap", 8),
        "last": (0, "last", 0),
        "offset": (1, "offset", 1),
        "rho": (5.0, "rho", 5.0),
        "distilled_steps": (40, "distilled_steps", 40),
        "timesteps": ("900,500", "timesteps", [900.0, 500.0]),
        "clip_x0": (0.5, "clip_x0", 0.5),
        "temperature": (0.5, "temperature", 0.5),
        "top_k": (20, "top_k", 20),
        "top_p": (0.9, "top_p", 0.9),
        "choice_temperature": (2.0, "choice_temperature", 2.0),
        "noise_dropout": (0.5, "noise_dropout", 0.5),
        "guidance_channels": (3, "guidance_channels", 3),
        "learned_variance": ("true", "learned_variance", True),
        "large_variance": (0.5, "large_variance", 0.5),
        "timestep_scaling": (9.0, "timestep_scaling", 9.0),
        "sigma_data": (0.6, "sigma_data", 0.6),
        "order": (2, "order", 2),
        "solver_type": ("heun", "solver_type", "heun"),
        "negative_prompts": ("e;f", "negative_prompts", ["e", "f"]),
        "more_prompts": ("g:0.5", "more_prompts", [["g", 0.5]]),
        "image": (tmp_path / "picture.png", "image", white),
        "mask": (tmp_path / "grey.png", "mask", [[[[1.0]] * 2] * 2]),
        "low_res": (tmp_path / "picture.png", "low_res", white),
        "noise_level": (4, "noise_level", 4),
        "original_size": ("512,768", "original_size", [512, 768]),
        "crop_top_left": ("8,0", "crop_top_left", [8, 0]),
        "target_size": ("256,256", "target_size", [256, 256]),
        "aesthetic_score": (7.5, "aesthetic_score", 7.5),
        "negative_original_size": ("32,48", "negative_original_size", [32, 48]),
        "negative_crop_top_left": ("0,9", "negative_crop_top_left", [0, 9]),
        "negative_target_size": ("64,16", "negative_target_size", [64, 16]),
        "negative_aesthetic_score": (2.0, "negative_aesthetic_score", 2.0),
        "segmentation": (tmp_path / "grey.png", "segmentation", [[[255] * 2] * 2]),
        "layout": (tmp_path / "layout.json", "layout", [[3, [0, 0, 1, 1]]]),
        "neighbours": (tmp_path / "array.npy", "neighbours", [1.0] * 3),
        "image_embedding": (tmp_path / "array.npy", "image_embedding", [1.0] * 3),
        "progress": ("true", "progress", "function"),
        "height": (24, "height", 24),
        "width": (40, "width", 40),
        "prompt_weights": ("true", "prompt_weights", True),
        "workdir": ("run", "path", "run"),
    }
    told = python(SAMPLE, *(f"--{flag}={text}" for flag, (text, *_) in expected.items()))
    for flag, (_, argument, value) in expected.items():
        assert told[argument] == value, flag
    more = {"depth": tmp_path / "grey.png", "prompts_file": tmp_path / "prompts.txt"}
    more |= {"model": "file", "out": "there"}
    told = python(SAMPLE, *(f"--{flag}={text}" for flag, text in more.items()))
    assert told["path"] == "file" and told["prompts"] == ["c", "d"]
    assert np.shape(told["depth"]) == (1, 2, 2, 1) and np.min(told["depth"]) > 0


EVALUATE = """
import json
import latent_diffusion.evaluate.__main__ as command
from absl import app
def told(**given):
    print(json.dumps(given))
    raise SystemExit
command.evaluate = told
app.run(command.main)
"""


def test_what_is_written_behind_evaluate_reaches_the_call():
    given = {
        "workdir": "run", "samples": "pictures", "reference": "others", "metrics": "fd,pr",
        "num_images": 5, "features": "vgg16", "features_path": "weights", "filter": "bilinear",
        "clip_path": "clip", "lpips": "vgg", "split": "train", "image_size": 8, "seed": 3,
        "batch_size": 16, "sampler": "heun", "num_steps": 7, "guidance_scale": 2.5,
        "save_images": "kept", "save_reference": "statistics",
    }  # fmt: skip
    told = python(EVALUATE, *(f"--{flag}={value}" for flag, value in given.items()))
    assert {flag: told[flag] for flag in given} == {**given, "metrics": ["fd", "pr"]}


CONVERT = """
import json
from absl import app
import latent_diffusion.convert as package
import latent_diffusion.convert.__main__ as command
from latent_diffusion.convert import describe
seen = {}
bundle = package.Bundle()
def read(source, **given):
    seen.update(given, source=str(source))
    return bundle
def with_loras(bundle, files):
    seen["lora"] = list(files)
    return bundle
def write(bundle, target, to, dtype, progress):
    seen.update(target=str(target), to=to, dtype=dtype)
package.read, package.with_loras, package.write = read, with_loras, write
describe.describe = lambda bundle: "described"
try:
    app.run(command.main)
finally:
    print(json.dumps(seen))
"""


def test_what_is_written_behind_convert_reaches_the_call(tmp_path):
    given = {"config": "yaml", "ema": "false", "variant": "fp16", "tokenizer": "words"}
    more = {"to": "compvis", "dtype": "float16", "lora": "style:0.5"}
    flags = [f"--{flag}={value}" for flag, value in {**given, **more}.items()]
    told = python(CONVERT, "here", tmp_path / "there", *flags)
    expected = {**given, "ema": False, "to": "compvis", "dtype": "float16"}
    expected |= {"source": "here", "target": str(tmp_path / "there"), "lora": [["style", 0.5]]}
    assert told == expected
    assert "target" not in python(CONVERT, "here", "--dry_run")


@pytest.mark.parametrize("format", ["lora", "kohya", "textual_inversion", "a1111"])
def test_nothing_is_merged_into_a_file_without_a_model(format, tmp_path):
    with pytest.raises(AssertionError, match=f"merged into a model, and --to={format} writes none"):
        python(CONVERT, "here", tmp_path / "there", f"--to={format}", "--lora=style")


SERVE = """
import dataclasses, json
from absl import app
import latent_diffusion.serve.__main__ as command
from latent_diffusion.generation import adapters, loading
from latent_diffusion.serve import handler
loading.load = lambda path, **given: [path, given]
adapters.load_adapter = lambda file, image_encoder: [file, image_encoder]
def told(model, name, address, limits, **more):
    print(json.dumps([model, name, address, dataclasses.asdict(limits), more]))
    raise ValueError("seen")
handler.make_server = told
try:
    app.run(command.main)
except SystemExit:
    pass
"""


def test_what_is_written_behind_serve_reaches_the_call():
    limits = {"max_images": 3, "max_pixels": 99, "max_steps": 7, "max_waiting": 2}
    more = {"batch_size": 5, "token": "secret"}
    loaded = {"tokenizer": "words", "dtype": "bfloat16", "scan": True}
    given = {**loaded, "host": "0.0.0.0", "port": 81, **limits, **more}
    flags = [f"--{flag}={value}" for flag, value in given.items()]
    for kind in ("workdir", "model"):
        adapter = ("--adapter=style=file", "--image_encoder=vit")
        told = python(SERVE, f"--{kind}=here", *adapter, *flags)
        more["adapters"] = {"style": ["file", "vit"]}
        assert told == [["here", loaded], "here", ["0.0.0.0", 81], limits, more]


CHECK = """
import json, sys
from absl import app, flags
import latent_diffusion.compile_check as command
def check(config, topology, programs, compile, quick, params):
    seen.append([config.num_steps, topology, programs, compile, quick, params])
    return []
seen = []
command.check, command.report = check, lambda *given: json.dumps(seen[0])
command.write_json = lambda path, _, name, *rest: print(json.dumps([path, name, rest[-1]]))
app.run(command.main)
"""


@pytest.mark.parametrize("written", [True, False])
def test_what_is_written_behind_compile_check_reaches_the_call(written):
    config = ["--config=configs/kl_f4.py", "--config.num_steps=7", "--topology=v5e:2x2"]
    flags = ["--programs=train", "--nocompile", "--quick", "--params=bfloat16"]
    told = python(CHECK, *config, *flags, *(["--json=file"] if written else []))
    given = [7, "v5e:2x2", ["train"], False, True, "bfloat16"]
    assert told == (["file", "kl_f4", "bfloat16"] if written else given)


ENCODE = """
import json
from absl import app
import latent_diffusion.encode as command
from latent_diffusion.training import encoding
encoding.encode = lambda config, *given: print(json.dumps([config.num_steps, *given]))
app.run(command.main)
"""


def test_what_is_written_behind_encode_reaches_the_call():
    flags = ["--out=there", "--dtype=bfloat16", "--crops=3", "--shard_size=5", "--splits=train"]
    told = python(ENCODE, "--config=configs/kl_f4.py", "--config.num_steps=7", *flags)
    assert told == [7, "there", "bfloat16", 3, 5, ["train"]]


def test_an_argument_without_dashes_is_refused_unless_the_command_takes_it(monkeypatch):
    seen = []

    def main(argv):
        seen.append(argv)

    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    monkeypatch.setattr(app, "run", lambda main, **_: main(["command", "word"]))
    with pytest.raises(app.UsageError, match="unexpected argument 'word'; options start with --"):
        shared_flags.run(main, config=False)
    assert not seen
    shared_flags.run(main, config=False, positional=True)
    assert seen == [["command", "word"]]


def test_a_path_in_the_users_home_may_be_written_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    others = ["--prompts=~5 cats", "--config.name=a~/b", "~/model"]  # shells expand the last
    monkeypatch.setattr(sys, "argv", ["command", "--workdir=~/run", "--config.dir=~/a=b", *others])
    monkeypatch.setattr(app, "run", lambda main: None)
    shared_flags.run(print, config=False)
    assert sys.argv[1:] == ["--workdir=/home/me/run", "--config.dir=/home/me/a=b", *others]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"workdir": "a"}, "a"),
        ({"model": "b"}, "b"),
        ({}, None),
        ({"workdir": "a", "model": "b"}, None),
    ],
)
def test_a_model_has_one_path(given, path, monkeypatch):
    def define(name, *_):
        return SimpleNamespace(name=name, value=given.get(name))

    defined = SimpleNamespace(DEFINE_string=define, DEFINE_bool=define)
    monkeypatch.setattr(shared_flags, "flags", defined)
    read = shared_flags.model()
    if path:
        assert read() == (path, {"tokenizer": None, "dtype": None, "scan": None})
    else:
        with pytest.raises(app.UsageError, match="give either --workdir or --model"):
            read()


@pytest.mark.parametrize(
    "others",
    [("--out=x", "--config.data.dri=x"), ("--wrkdir=x", "--config.data.dri=x"),
     ("--noconfig.data.dri",)],
)  # fmt: skip
def test_a_misspelt_field_is_named_by_commands_that_need_other_flags_too(others):
    command = [sys.executable, "-m", "latent_diffusion.encode", "--config=configs/kl_f4.py"]
    command += others
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --config.data.dri: data has no field 'dri'; known: ")
    assert done.stderr.count("\n") == 1


def test_all_commands_of_the_package_start_alike():
    """So that each finds installed configs, and refuses wrong flags in one line."""
    starts = [path for path in PACKAGE.rglob("*.py") if "app.run(" in path.read_text("utf-8")]
    assert [path.name for path in starts] == ["flags.py"]


def test_every_command_that_reads_a_config_requires_it():
    sources = {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    readers = [path for path, text in sources.items() if "DEFINE_config_file(" in text]
    assert len(readers) >= 5
    for path in readers:
        assert re.search(r'mark_flags?_as_required\(\[?"config"', sources[path]), path


def test_a_config_of_the_working_directory_comes_before_the_installed_one(tmp_path, monkeypatch):
    installed = tmp_path / "installed"
    installed.mkdir()
    for name in ("mine.py", "other.py"):
        (installed / name).write_text("")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for written, runs in (
        ("--config=configs/mine.py:smoke", "--config=configs/mine.py:smoke"),
        ("--config=configs/other.py:smoke", f"--config={installed}/other.py:smoke"),
        ("configs/none.py", "configs/none.py"),
    ):
        assert shared_flags._installed(written, installed) == runs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, 2), "process_id=2 is not below 2 processes"),
        (("host:1", 2, -1), "process_id=-1 is not below"),
        (("host", 2, 0), "coordinator=host must be HOST:PORT"),
        (("host:port", 2, 0), "coordinator=host:port must be HOST:PORT"),
        ((None, 2, 0), "go together"),
    ],
)
def test_a_process_that_cannot_join_says_why_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        processes.connect(False, *given)


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    """By another program."""

    def taken(*given, **options):
        raise RuntimeError("UNKNOWN: Failed to start RPC server\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", taken)
    monkeypatch.setattr(processes.partners, "watch", lambda: None)
    wanted = "^can't join the processes of host:1: UNKNOWN: Failed to start RPC server$"
    with pytest.raises(ValueError, match=wanted):
        processes.connect(False, "host:1", 2, 0)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, "all"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, "all"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, "0"),
        ({"SLURM_STEP_TASKS_PER_NODE": "16"}, "0"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2(x3)"}, "0"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_LOCAL_DEVICE_IDS": "0"}, "0"),
        ({}, "0"),
    ],
)
def test_a_process_alone_on_its_host_has_all_gpus(variables, devices, monkeypatch):
    """In a cluster JAX gives each process the GPU of its number on the host."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def joined(*given, **options):
        jax.config.update("jax_cuda_visible_devices", "0")

    monkeypatch.setattr(jax.distributed, "initialize", joined)
    monkeypatch.setattr(processes.partners, "watch", lambda: None)
    try:
        processes.connect(True)
        assert jax.config.values["jax_cuda_visible_devices"] == devices
    finally:
        jax.config.update("jax_cuda_visible_devices", "all")


def test_the_cache_of_compiled_programs_that_the_user_named_stays():
    level, before = logging.getLogger("jax").level, jax.config.jax_compilation_cache_dir
    startup.quiet_and_cached()
    logging.getLogger("jax").setLevel(level)
    assert jax.config.jax_compilation_cache_dir == before == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert programs.folder == Path(before) / "programs"


PLAN = """
import json, sys
from absl import app, flags
import latent_diffusion.training.plan as command
from latent_diffusion.training import planning
def plan(facts, topology, **given):
    seen.append([facts, topology, given])
def known_facts(config, name, path):
    return planning.Facts(1, 2, 3, 4, 5, [config.num_steps, name, path])
seen = []
planning.plan, planning.known_facts = plan, known_facts
planning.key = lambda name, config: name
planning.report = lambda *given: json.dumps(seen[0])
app.run(command.main)
"""


@pytest.mark.parametrize("rate", [None, 7.5])
def test_what_is_written_behind_plan_reaches_the_call(rate):
    flags = ["--config=configs/kl_f4.py", "--topology=v5e:2x2", "--images=9", "--facts=file"]
    flags += ["--picture_kb=3", "--storage_rate=0.5", "--config.num_steps=7"]
    flags += ["--config.parallel.mode=mesh", "--config.parallel.mesh.fsdp=4"]
    facts, topology, given = python(PLAN, *flags, *([f"--images_per_core={rate}"] if rate else []))
    assert facts == [1, 2, 3, 4, 5, rate or [7, "kl_f4", "file"]] and topology == "v5e:2x2"
    asked = {"batch_size": 10, "num_steps": 7, "images": 9, "parts": 4, "shares": 4}
    assert given == {**asked, "checkpoint_steps": 5000, "picture": 3e3, "storage_rate": 5e8}


def test_a_port_that_no_machine_has_is_refused():
    command = [sys.executable, "-m", "latent_diffusion.serve", "--model=x", "--port=65536"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "flag --port=65536: 65536 is not an integer in the range [0, 65535]" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--token=wörd"], "--token has letters, digits and signs"),
        (["--adapter=a=x", "--adapter=a=y"], "--adapter=a=…: two adapters have this name"),
    ],
)
def test_what_no_server_can_have_is_refused(flags, message):
    command = [sys.executable, "-m", "latent_diffusion.serve", "--model=x", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"error: {message}" in done.stderr


BOUNDS = """
import json, sys
from absl import flags
import latent_diffusion.serve.__main__
refused = []
for name in ("max_images", "max_waiting", "max_pixels", "max_steps", "batch_size"):
    try:
        flags.FLAGS(["serve", f"--{name}=0"])
    except flags.IllegalFlagValueError as error:
        refused.append(name)
print(json.dumps(refused))
"""


def test_a_server_has_room_for_something():
    limits = ["max_images", "max_waiting", "max_pixels", "max_steps", "batch_size"]
    assert python(BOUNDS) == limits
