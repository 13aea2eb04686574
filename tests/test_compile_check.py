"""What a compilation for absent machines is asked, and how its answer reads."""

import pytest

from latent_diffusion import compile_check
from latent_diffusion.compile_check import Checked


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
        compile_check.parse_topology(text)


def test_report_compares_memory_and_finds_what_limits():
    network = {"all-reduce": 10**9, "all-gather": 2 * 10**9}
    fits = Checked("train", 60.0, 8 * 10**9, 10**9, 1.97e12, network)
    large = Checked("sample", 60.0, flops=1.97e12, problem="needs 134.00G, has 15.75G")
    lines = compile_check.report([fits, large], "v5e:4x4", 256).splitlines()
    assert "8 of 16 GB a chip (50 %), arguments 1 GB" in lines[1]
    assert "1,970.0 GFLOP a chip, 10.00 ms" in lines[2]
    assert "1000.00 MB a chip, 10.00 ms" in lines[3] and "2000.00 MB a chip, 10.00 ms" in lines[4]
    assert "20.00 ms at published peaks: 12800 images/s" in lines[5]
    assert "DOES NOT FIT: needs 134.00G, has 15.75G" in lines[8]
    assert "10.00 ms at published peaks" in lines[10]


def test_a_gpu_is_described_by_its_published_limits():
    target = compile_check._gpu_target("h100", compile_check.CHIPS["h100"])
    assert "core_count: 132" in target and "major: 9" in target
