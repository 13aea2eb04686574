"""Eight CPU devices for every test, before JAX starts; compiled programs are kept in the clone."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"  # tests compile far longer than they run
).strip()
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"
