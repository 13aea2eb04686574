"""The notebook runs from top to bottom, and both of its networks learn."""

import json

import numpy as np
from conftest import ROOT

SHORTER = "autoencoder_steps, denoiser_steps, batch_size = 24, 24, 8"


def test_both_stages_of_the_notebook_learn():
    cells = json.loads((ROOT / "docs" / "two_stages.ipynb").read_text("utf-8"))["cells"]
    cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    for cell in cells:
        lines = [SHORTER if x.startswith("autoencoder_steps") else x for x in cell.splitlines()]
        exec("\n".join(lines), names)
    assert len(names["losses"]) == 24
    for losses in (names["first_losses"], names["losses"]):
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert abs(float(names["z"].std()) - 1) < 1e-3
    assert names["samples"].shape == (24, 32, 32, 3) and np.isfinite(names["samples"]).all()
    assert names["show"](names["samples"], columns=6).size == (6 * 64, 4 * 64)
