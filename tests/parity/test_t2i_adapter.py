"""T2I-Adapters against diffusers: features, and pictures of its pipeline, to 1e-4."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from test_control import HINTS, close
from test_pipelines import (
    ABSENT,
    PROMPTS,
    SIDE,
    F,
    draw,
    make_unet,
    randomised,
    sample,
    stable,
    to_torch,
)  # fmt: skip

import latent_diffusion as ldm
from latent_diffusion.convert.adapters import write_t2i

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
CHANNELS = {"full_adapter": [16, 32], "full_adapter_xl": [16, 32, 32], "light_adapter": [16, 32]}


@pytest.mark.parametrize("kind", CHANNELS)
def test_features(kind, tmp_path):
    net = diffusers.T2IAdapter(3, CHANNELS[kind], 2, 2, kind)
    net = randomised(net, 1, 0.1)
    net.save_pretrained(tmp_path / "net")
    adapter = ldm.load_adapter(tmp_path / "net")
    with torch.no_grad():
        want = net(to_torch(HINTS[0]))
    got = adapter.module.apply({"params": adapter.tree()}, HINTS[0])
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        close(f"features {i}", np.moveaxis(np.asarray(ours), 3, 1), theirs.numpy(), 1e-5)
    write_t2i(adapter, tmp_path / "again", "diffusers")
    again = diffusers.T2IAdapter.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(again[name].numpy(), tensor.numpy())


def test_pictures_of_the_pipeline(tmp_path):
    net = randomised(diffusers.T2IAdapter(3, [16, 32], 2, F, "full_adapter"), 1, 0.1)
    net.save_pretrained(tmp_path / "net")
    pipeline, model = stable(
        diffusers.StableDiffusionAdapterPipeline, tmp_path, make_unet(), adapter=net, **ABSENT
    )
    z_T = draw(0, 2, SIDE, SIDE, 4)
    want = pipeline(
        PROMPTS, list(to_torch(HINTS[0])), latents=to_torch(z_T), num_inference_steps=10,
        adapter_conditioning_scale=0.7, output_type="np",
    ).images  # fmt: skip
    controls = [(ldm.load_adapter(tmp_path / "net"), HINTS[0], 0.7)]
    got = (sample(model, z_T=z_T, num_steps=10, controls=controls) + 1) / 2
    close("pictures", got, want)
    assert np.abs((sample(model, z_T=z_T, num_steps=10) + 1) / 2 - want).max() > 1e-2
