"""What a compilation for absent machines is asked, what it finds, and how its answer reads."""

import importlib.util
import json
from types import SimpleNamespace

import jax
import pytest
import several
from conftest import ROOT
from slices import Chip
from tiny import make_config

from benchmarks import compile_table
from latent_diffusion import compile_check
from latent_diffusion.compile_check import GIB, Checked
from latent_diffusion.runtime import parallel
from latent_diffusion.runtime.parallel import chips
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import loop
from latent_diffusion.training.batch_spec import batch_spec


@pytest.fixture
def here(monkeypatch):
    """Eight chips that are there: this machine's devices."""
    monkeypatch.setattr(chips, "topology_devices", lambda topology: jax.devices())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", "unknown chip 'v9'; known: a100, h100"),
        ("v5e:4", "--topology=v5e:4 must look like v5e:2x2"),
        ("h100:2x4", "--topology=h100:2x4 must look like h100:8"),
    ],
)
def test_bad_topologies_are_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        chips.parse_topology(text)


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="its compiler is here")
def test_a_missing_compiler_is_one_line():
    message = r"^can't compile for v5e:2x2: [^\n]*; needs latent_diffusion\[aot\]$"
    with pytest.raises(ValueError, match=message):
        compile_check.check(several.make_config(), "v5e:2x2", ["train"])


def test_other_bad_input_is_one_line(here):
    with pytest.raises(ValueError, match="unknown program 'eval'; known: sample, train"):
        compile_check.check(several.make_config(), "v5e:2x4", ["eval"])
    with pytest.raises(ValueError, match="batch_size=12 doesn't divide over 8 devices"):
        compile_check.check(several.make_config(batch_size=12), "v5e:2x4", ["train"])
    with pytest.raises(ValueError, match="is for denoising and distillation, not for task 'autoen"):
        compile_check.check(several.make_config(task="autoencoding"), "v5e:2x4", ["sample"])


def test_a_sampler_in_half_precision_decodes_in_float32():
    config = make_config("denoising")
    init = TASKS["denoising"](config).init
    shapes = jax.eval_shape(init, jax.random.key(0), batch_spec(config))
    state, constants = compile_check._in_dtype("bfloat16", *shapes)
    assert {str(x.dtype) for x in jax.tree.leaves(state.ema_params)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(constants.first_stage)} == {"float32"}


def test_the_devices_are_those_of_the_topology(monkeypatch):
    monkeypatch.setattr(chips, "topology_devices", lambda text: jax.devices()[:4])
    with pytest.raises(ValueError, match="batch_size=6 doesn't divide over 4 devices"):
        compile_check.check(several.make_config(batch_size=6), "v5e:2x2", ["train"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "unett"}, "unknown backbone 'unett'; known: dit"),
        ({"parallel.mode": "ddp"}, "unknown parallel mode 'ddp'"),
        ({"parallel.mesh": {"data": 3}}, "mesh data 3 × fsdp 1 × tensor 1 needs 3 devices"),
        ({"parallel.mesh": {"data": 4, "tensor": 2}, "batch_size": 6}, "over 4 devices"),
        ({"grad_accumulation": 0}, "grad_accumulation=0 must be at least 1"),
        ({"grad_accumulation": 2}, "batch_size=8 doesn't divide over 8 devices × 2 micro-batches"),
        ({"parallel.mode": "auto", "batch_size": 12}, "batch_size=12 doesn't divide over 8 dev"),
        ({"parallel.rules": (("lora", "replicate"), (".*", "replicate"))}, "matches nothing"),
    ],
)
def test_it_refuses_what_training_refuses_in_the_same_words(fields, message, here, tmp_path):
    config = several.make_config(**{"parallel.mode": "mesh", **fields})
    with pytest.raises(ValueError, match=message) as refused:
        compile_check.check(config, "v5e:2x4", ["train"])
    with pytest.raises(ValueError) as not_trained:
        loop.train(config, tmp_path)
    assert str(refused.value) == str(not_trained.value)


def test_one_process_can_not_have_several_hosts_chips(monkeypatch):
    chips_of_two_hosts = [Chip(i, i // 4) for i in range(8)]
    monkeypatch.setattr(chips, "topology_devices", lambda topology: chips_of_two_hosts)
    config = several.make_config(**{"parallel.mode": "single"})
    with pytest.raises(ValueError, match="mode 'single' can't span 2 processes; use pmap or mesh"):
        compile_check.check(config, "v6e:2x4", ["train"])


def test_both_programs_are_compiled_and_what_they_need_is_found(here, tmp_path, monkeypatch):
    fields = {"parallel.mesh": {"data": 1, "fsdp": -1, "tensor": 1}, "parallel.mode": "mesh"}
    fields["parallel.rules"] = ((".*", "fsdp(min_mb=0.004)"),)
    config = several.make_config(**fields)
    train, sample = compile_check.check(config, "v5e:2x4", ["train", "sample"])
    assert train.mode == "data 1 × fsdp 8 × tensor 1" and not train.problem
    assert 0 < sample.arguments < train.arguments < train.peak  # no moments, one set of parameters
    assert train.network["all-gather"] > 0 and train.network["all-reduce"] > 0
    assert train.flops > 0 and sample.flops > 0

    (quick,) = compile_check.check(config, "v5e:2x4", ["train"], quick=True)
    assert quick._replace(seconds=0, peak=0) == train._replace(seconds=0, peak=0)
    assert quick.peak == pytest.approx(train.peak, rel=0.1)

    file = tmp_path / "results.json"
    for _ in range(2):  # the second replaces the first
        compile_check.write_json(file, config, "tiny", "v5e:2x4", [train, sample])
    counts = [row._replace(peak=0, network=None) for row in (train, sample)]
    compile_check.write_json(file, config, "tiny", "v5e:2x4", counts)  # they replace nothing
    rows = json.loads(file.read_text())
    assert [(row["config"], row["program"]) for row in rows] == [
        ("tiny", "sample"),
        ("tiny", "train"),
    ]
    assert [row["peak"] for row in rows] == [sample.peak, train.peak]

    # Sampling in bfloat16 is another row; training is in float32 whatever sampling is in.
    compile_check.write_json(file, config, "tiny", "v5e:2x4", [train, sample], "bfloat16")
    rows = [(row["program"], row["params"]) for row in json.loads(file.read_text())]
    assert sorted(rows) == [("sample", "bfloat16"), ("sample", "float32"), ("train", "float32")]

    (counted,) = compile_check.check(config, "v5e:2x4", ["train"], compile=False)
    assert counted.flops == train.flops and counted.peak == 0
    alone = several.make_config(**{"parallel.mode": "single"})
    (single,) = compile_check.check(alone, "v5e:2x4", ["train"], compile=False)
    assert single.mode == "pmap" and single.flops == 8 * counted.flops  # per chip
    assert train.arguments - counted.arguments < 2**20  # the batch

    given = {"compile": False, "params": "bfloat16"}
    (half,) = compile_check.check(config, "v5e:2x4", ["sample"], **given)
    (full,) = compile_check.check(config, "v5e:2x4", ["sample"], compile=False)
    both = compile_check.check(
        config, "v5e:2x4", ["sample", "train"], compile=False, params="bfloat16"
    )
    assert both == [half, counted]  # training reads its own
    task = TASKS[config.task](config)
    _, constants = jax.eval_shape(task.init, jax.random.key(0), batch_spec(config))
    stage = parallel.num_bytes(constants)
    # Rules leave more of the smaller arrays whole.
    assert half.arguments - stage == pytest.approx((full.arguments - stage) / 2, rel=0.1)
    given["params"] = "int8"
    (eighth,) = compile_check.check(config, "v5e:2x4", ["sample"], **given)
    assert (half.arguments - stage) / 4 < eighth.arguments - stage < half.arguments - stage

    small = chips.CHIPS["v5e"]._replace(memory=train.arguments / 3 / GIB)
    monkeypatch.setitem(chips.CHIPS, "v5e", small)
    config.parallel.mode = "pmap"
    (known,) = compile_check.check(config, "v5e:2x4", ["train"])
    assert known.problem.startswith("state and constants alone take") and known.seconds == 0


def test_a_plan_beyond_the_memory_of_a_gpu_is_a_problem():
    """Its compiler doesn't refuse it."""
    planned = SimpleNamespace(peak_memory_in_bytes=3 * GIB, argument_size_in_bytes=GIB)
    compiled = SimpleNamespace(memory_analysis=lambda: planned, as_text=lambda: "")
    lowered = SimpleNamespace(compile=lambda options: compiled)
    row = Checked("train", "pmap", 0, 1.0)
    fits, small = (compile_check._compile(lowered, row, n * GIB, {}) for n in (3, 2))
    assert fits == row._replace(arguments=GIB, peak=3 * GIB, network={})
    assert small == fits._replace(problem="needs 3.0 GiB")


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 17.14G of 15.75G hbm. Exceeded by 1.39G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (17.14G) exceeds"
        " available HBM (15.75G).",
    ],
)
def test_how_much_is_missing_is_read_from_what_the_compiler_says(message):
    told = compile_check._needed_memory(f"RESOURCE_EXHAUSTED: XLA:TPU compile: {message}\nmore")
    assert told == "needs 17.14GiB of 15.75GiB"


def test_report_compares_memory_and_finds_what_limits():
    network = {"all-reduce": 10**9, "all-gather": 2 * 10**9}
    fits = Checked("train", "pmap", GIB, 1.97e12, 60.0, 8 * GIB, network)
    large = Checked("sample", "pmap", 819 * 10**9, 1.97e12, problem="needs 134 of 15.75G")
    lines = compile_check.report([fits, large], "v5e:4x4", 256).splitlines()
    assert "8 of 16 GiB a chip (50 %), arguments 1" in lines[1]
    assert "2,000.00 MB a chip" in lines[2] and "1,000.00 MB a chip" in lines[3]
    assert "1,970.0 GFLOP a chip" in lines[4] and "10.00 ms" in lines[5]
    assert "network takes" in lines[7] and "20.00 ms" in lines[7]
    assert "1.28e+04 images/s, bound by network" in lines[8]
    assert "DOES NOT FIT: needs 134 of 15.75G" in lines[11]
    assert "256 images/s, bound by memory" in lines[16]


def test_a_gpu_is_described_by_its_published_limits():
    target = chips._gpu_target("h100", chips.CHIPS["h100"])
    assert "core_count: 132" in target and "major: 9" in target


def test_the_table_shows_what_is_known_and_what_is_not():
    fits = Checked("train", "", 4 * GIB, 1.97e12, peak=8 * GIB, network={})
    cells = list(compile_table.cells())
    fsdp, pmap = (cell.key() | fits._asdict() | {"mode": cell.key()["mode"]} for cell in cells[:2])
    pmap |= {"arguments": 12 * GIB, "peak": 0, "problem": "needs 20.0 GiB"}
    assert compile_table.find([pmap, fsdp], cells[0]).peak == 8 * GIB
    assert compile_table.find([pmap, fsdp], cells[2]) is None
    *_, row = compile_table.table([pmap, fsdp]).splitlines()
    words = "cin256-v2, train | v5e-16 | 16 | **no**: needs 20.0 GiB | 8.0 of 16 | 8.0 GiB | 25,600"
    assert row.startswith(f"| {words} images/s (compute)")
    *_, row = compile_table.table([fsdp]).splitlines()
    assert "| not yet computed | 8.0 of 16 | – |" in row


def test_the_documented_table_is_what_was_computed():
    records = json.loads((ROOT / compile_table.RESULTS).read_text())
    documented = (ROOT / "docs" / "devices.md").read_text()
    shown = compile_table.table(records) if records else "none of them is computed yet"
    assert shown in documented
