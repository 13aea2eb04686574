"""Eight CPU devices for every test, before JAX starts; compiled programs are kept in the clone."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Tests compile far longer than they run. Flags go by version: one that XLA doesn't know is fatal.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if version("jax").startswith(("0.10.", "0.12.")):
    FAST_COMPILATION += " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
    FAST_COMPILATION += " --xla_cpu_parallel_codegen_split_count=1"  # two workers share two cores
if version("jax").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
).strip()
# A thread that waits in a collective serves no other device. With one for each, as XLA would have
# it, a program with independent collectives can wait for ever.
os.environ["NPROC"] = "32"
os.environ.setdefault("TQDM_DISABLE", "1")
# Programs needn't name the lines that made them.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
# The few hundred large programs take most of the time; a second run of the suite reads them.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# The files that take longest come first, so that no worker waits at the end for another's.
SLOWEST = (
    "processes", "commands", "wiring", "hostile", "samplers", "devices", "answers", "model",
)  # fmt: skip


gc.set_threshold(50_000, 20, 20)  # tracing makes millions of objects, few of them garbage
MANY_MAPS = 15_000  # of a process's memory; Linux allows 65,530, and XLA crashes beyond


@pytest.fixture(autouse=True)
def no_stored_programs(monkeypatch):
    """A test that replaces a function must not get a program that another test has stored."""
    monkeypatch.setattr("latent_diffusion.runtime.programs.folder", None)


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs after a file: each keeps several maps of memory."""
    maps = Path("/proc/self/maps")
    ends = nextitem is None or nextitem.path != item.path
    if ends and maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOWEST)))
