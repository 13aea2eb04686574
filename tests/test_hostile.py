"""Damaged and hostile files (`fuzz.py`), and that its checks would notice a fault."""

import json
import subprocess
import sys
import time

import fuzz
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file
from t5_vocabulary import VOCABULARY
from test_tokenizers import CLIP, MERGES

from latent_diffusion.convert.tokenizers import write_tokenizer
from latent_diffusion.data.tokenizers import ClipTokenizer, T5Tokenizer
from latent_diffusion.files.reading import read_json
from latent_diffusion.files.tensors import open_tensors


def test_whatever_is_wrong_with_a_file_one_error_names_it():
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", "PATH": ""}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--count=2000", "--few=3"],
        capture_output=True, text=True, env=environment, timeout=1200, check=False,
    )  # fmt: skip
    last = result.stderr.strip().splitlines()[-1:]
    assert result.stdout, f"it died of {last}"
    summary = json.loads(result.stdout)
    faults = summary["crafted"]["faults"] | summary["fuzzed"]["faults"]
    assert not faults
    assert len(summary["models"]) == 10
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


def test_settings_have_a_megabyte_at_most_vocabularies_and_indices_eight(tmp_path):
    def longer(path):
        path.write_text(path.read_text() + " " * (2 << 20))

    for name, tokenizer in (("clip", ClipTokenizer(CLIP, MERGES)), ("t5", T5Tokenizer(VOCABULARY))):
        folder = tmp_path / name
        write_tokenizer(tokenizer, folder)
        longer(folder / ("vocab.json" if name == "clip" else "tokenizer.json"))
        assert type(tokenizer).read(folder).vocab_size == tokenizer.vocab_size
    config = folder / "tokenizer_config.json"
    longer(config)
    with pytest.raises(ValueError, match=r"config.json: [\d,]+ bytes; .* have 1,048,576 at most"):
        read_json(config)
    save_file({"x": np.zeros(3)}, tmp_path / "a.safetensors")
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    longer(index)
    assert list(open_tensors(index).tensors) == ["x"]
