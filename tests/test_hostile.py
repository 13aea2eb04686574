"""Damaged and hostile files (`fuzz.py`), and that its checks would notice a fault."""

import json
import subprocess
import sys
import time

import fuzz
import numpy as np
import pytest
from conftest import ROOT


def test_whatever_is_wrong_with_a_file_one_error_names_it():
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", "PATH": ""}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--count=2000"],
        capture_output=True, text=True, env=environment, timeout=1200, check=False,
    )  # fmt: skip
    last = result.stderr.strip().splitlines()[-1:]
    assert result.stdout, f"it died of {last}"
    summary = json.loads(result.stdout)
    faults = {name: wrong for part in summary.values() for name, wrong in part["faults"].items()}
    assert not faults
    assert summary["crafted"]["count"] >= 200 and summary["fuzzed"]["count"] >= 2000
    assert summary["crafted"]["refused"] >= 200 and summary["fuzzed"]["refused"] >= 500


def raised(error):
    def read(path):
        raise error(path)

    return read


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        (lambda path: None, None),
        (raised(lambda path: ValueError(f"{path}: no model")), None),
        (raised(lambda path: ValueError("no model")), "a message without the path"),
        (raised(lambda path: ValueError(f"{path}\n")), "a message of"),
        (raised(TypeError), "TypeError"),
        (lambda path: np.ones(400 << 20, np.uint8), "MB, allowed"),
    ],
)
def test_the_checks_notice_a_fault(read, wrong, tmp_path):
    got, _ = fuzz.fault(read, tmp_path)
    assert (got is None) if wrong is None else wrong in got


def test_the_checks_notice_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def hang(path):
        end = time.process_time() + 5
        while time.process_time() < end:
            pass

    assert "seconds" in fuzz.fault(hang, tmp_path)[0]
