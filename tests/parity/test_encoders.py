"""Text and image encoders against transformers': random weights, the same inputs, the same names.

Outputs agree to 1e-4 of their scale.
"""

import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from latent_diffusion.conditioners.clip_text import ClipText  # noqa: E402
from latent_diffusion.convert import clip_text  # noqa: E402
from latent_diffusion.convert.bundle import Part, as_params, flat  # noqa: E402
from latent_diffusion.convert.tables import below, prefixed, read_tensors, write_tensors  # noqa: E402
from latent_diffusion.convert.tensors import in_memory  # noqa: E402

NEVER = jnp.zeros(3, bool)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module.eval()


def tensors_of(module):
    return {name: in_memory(value.numpy()) for name, value in module.state_dict().items()}


def params_of(family, table, fields, tensors):
    shapes = {path: leaf.shape for path, leaf in flat(family.shapes(fields)).items()}
    ignored = family.unused(fields)
    return as_params(Part(fields, read_tensors(table(fields), shapes, tensors, "theirs", ignored)))


def close(got, want):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, atol=1e-4 * want.std(), rtol=0)


CLIP_TEXT = dict(
    vocab_size=60, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=7,
    bos_token_id=58, eos_token_id=59, pad_token_id=59,
)  # fmt: skip


def make_clip_text(**own):
    torch.manual_seed(0)
    return randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT, **own)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text(activation):
    theirs = make_clip_text(hidden_act=activation)
    fields = clip_text.fields_from_config(theirs.config.to_dict())
    tensors = below(tensors_of(theirs), "text_model.")
    params = params_of(clip_text, clip_text.transformers_table, fields, tensors)
    tokens = np.random.default_rng(0).integers(0, 58, (3, 7)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long(), output_hidden_states=True)
    got = ClipText(**fields).apply({"params": params}, {"tokens": tokens}, NEVER).context
    close(got, want.last_hidden_state)
    # The penultimate layer, as Stable Diffusion 2 takes it.
    fields = {**fields, "skip_last": 1}
    params = params_of(clip_text, clip_text.transformers_table, fields, tensors)
    got = ClipText(**fields).apply({"params": params}, {"tokens": tokens}, NEVER).context
    close(got, theirs.final_layer_norm(want.hidden_states[-2]))


def test_clip_text_is_written_so_that_transformers_reads_it(tmp_path):
    theirs = make_clip_text()
    fields = clip_text.fields_from_config(theirs.config.to_dict())
    params = params_of(clip_text, clip_text.transformers_table, fields, tensors_of(theirs))
    ours = {path: in_memory(leaf) for path, leaf in flat(params).items()}
    table = prefixed(clip_text.transformers_table(fields), "text_model.")
    written = {name: t.read() for name, t in write_tensors(table, ours).items()}
    written = {name: np.ascontiguousarray(array) for name, array in written.items()}
    safetensors.numpy.save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    config = transformers.CLIPTextConfig(**clip_text.config_from_fields(fields))
    config.save_pretrained(tmp_path)
    again = transformers.CLIPTextModel.from_pretrained(tmp_path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
