"""`make accelerator` measures every part, and outlives those that fail."""

import json

import jax
import pytest

from benchmarks import accelerator, accelerator_parts


def test_parts_that_fail_or_are_late_are_reported_and_the_others_go_on(tmp_path, monkeypatch):
    found = {"rows": [{"L": 64, "seconds": 0.12345}, {"L": 128, "failed": "no"}], "device": "X"}
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\n"
        "case $3 in\n"
        f"  --part=attention) echo noise; echo '{json.dumps(found)}';;\n"
        "  --part=parity) echo trace >&2; echo 'ValueError: why' >&2; exit 1;;\n"
        "  *) exec sleep 60;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(accelerator.sys, "executable", str(program))
    names = ("parity", "train_sdxl", "attention")
    parts = [accelerator.run_part(name, 2.0, tiny=True) for name in names]
    assert [part.get("failed") for part in parts] == ["ValueError: why", "not done in 2 s", None]
    accelerator.save(tmp_path, parts)
    page = (tmp_path / "accelerator.md").read_text()
    assert "**Failed**: not done in 2 s" in page and "| 64 | 0.1235 | – |" in page
    assert json.loads((tmp_path / "accelerator.json").read_text())[2]["rows"] == found["rows"]


@pytest.mark.parametrize("name", ["attention", "train_dit_xl_2", "sample_sd_v1", "parity"])
def test_a_part_runs_on_any_machine(name):
    rows = accelerator_parts.measure(name, tiny=True)["rows"]
    if name == "attention":
        by_name = {row["implementation"]: row for row in rows}
        assert by_name["xla"]["with_gradient_ms"] > 0 and by_name["blocks"]["forward_ms"] > 0
        assert [name for name, row in by_name.items() if row["auto"]] == ["xla"]
        assert "attention='splash' is for TPUs" in by_name["splash"]["failed"]
    elif name == "parity":
        worst = {(row["network"], row["dtype"]): row["worst_of_std"] for row in rows}
        assert len(worst) == 4 and worst["unet", "float32"] < 1e-3
        assert 1e-3 < worst["unet", "bfloat16"] < 0.5
    elif name == "sample_sd_v1":
        (row,) = rows
        assert 0 < row["seconds"] < row["first_seconds"] and row["steps"] == 2
    else:
        (row,) = rows
        assert row["images_per_second"] > 0 and row["cores_for_input"] > 0


def test_chips_are_known_by_the_names_that_jax_gives_them(monkeypatch):
    def peak(kind):
        device = type("Device", (), {"device_kind": kind})()
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        return accelerator_parts.peak_flops()

    assert peak("NVIDIA H100 80GB HBM3") == 989e12 and peak("TPU v5 lite") == 197e12
    assert peak("TPU v5") == 459e12 and peak("TPU v6 lite") == 918e12 and peak("cpu") is None
