"""Text and image encoders against transformers': random weights, the same inputs, the same names.

Outputs agree to 1e-4 of their scale.
"""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from latent_diffusion.convert import bert, clip_image, clip_text, text
from latent_diffusion.convert.bundle import Part, as_params, flat
from latent_diffusion.convert.clip import load_clip
from latent_diffusion.convert.tables import below, prefixed, read_tensors, write_tensors
from latent_diffusion.files.tensor import in_memory
from latent_diffusion.nets.clip import ClipLayer
from latent_diffusion.nets.conditioners.bert import Bert
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.nets.conditioners.clip_text import ClipText
from latent_diffusion.nets.conditioners.text import TextTransformer

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
    config = transformers.CLIPTextConfig(**{**CLIP_TEXT, **own})
    return randomised(transformers.CLIPTextModel(config))


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


def test_open_clips_layer_is_torchs():
    """The stacked map of OpenCLIP's files is that of torch's own attention."""
    torch.manual_seed(0)
    theirs = randomised(
        torch.nn.TransformerEncoderLayer(
            16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
    )
    names = {"self_attn": "attn", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"} | {
        f"norm{i}": f"ln_{i}" for i in (1, 2)
    }
    layer = {}
    for name, tensor in tensors_of(theirs).items():
        first, rest = name.split(".", 1)
        layer[f"transformer.resblocks.0.{names[first]}.{rest}"] = tensor
    fields = dict(vocab_size=9, max_length=5, width=16, depth=1, num_heads=4, activation="gelu")
    shapes = {path: leaf.shape for path, leaf in flat(clip_text.shapes(fields)).items()}
    shapes = {path: shape for path, shape in shapes.items() if path.startswith("layers_0")}
    got = read_tensors(clip_text.open_clip_table(fields), shapes, layer, "a layer")
    params = as_params(Part(fields, got))["layers_0"]
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        want = theirs(torch.from_numpy(x), src_mask=mask, is_causal=True)
    close(ClipLayer(4, None, "gelu", causal=True).apply({"params": params}, jnp.asarray(x)), want)


@pytest.mark.parametrize("size", [8, 11])
def test_clip_image(size):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=8, patch_size=4, projection_dim=12,
    )  # fmt: skip
    theirs = randomised(transformers.CLIPVisionModelWithProjection(config))
    fields = clip_image.fields_from_config(config.to_dict())
    params = params_of(clip_image, clip_image.transformers_table, fields, tensors_of(theirs))
    image = np.random.default_rng(0).uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
    pixels = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(0, 3, 1, 2), (8, 8), mode="bicubic", align_corners=True
    )
    processor = transformers.CLIPImageProcessor()
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std)
    )
    with torch.no_grad():
        want = theirs(((pixels + 1) / 2 - mean) / std).image_embeds
    got = ClipImage(**fields).apply({"params": params}, {"image": jnp.asarray(image)}, NEVER)
    close(got.context[:, 0], want)


def test_a_whole_clip(tmp_path):
    torch.manual_seed(0)
    text_config = {**CLIP_TEXT, "vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7}
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**text_config, "pad_token_id": 7}, vision_config=vision, projection_dim=12
    )
    theirs = randomised(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    words = ["a</w>", "b</w>", "c</w>", "a", "b", "c", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    clip, texts = load_clip(tmp_path), ["a b", "", "c a b a b a b a"]
    ids = torch.from_numpy(clip.tokenizer(texts)).long()
    image = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    processor = transformers.CLIPImageProcessor()
    pixels = ((image + 1) / 2 - processor.image_mean) / processor.image_std
    pixels = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels)
    ours = clip.of_images(clip.params, jnp.asarray(image)), clip.embed_texts(texts)
    for got, their in zip(ours, (want.image_embeds, want.text_embeds), strict=True):
        close(got / np.linalg.norm(got, axis=1, keepdims=True), their)


@pytest.mark.parametrize("mlp_width", [64, 128])
def test_bert(mlp_width):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=mlp_width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=9,
    )  # fmt: skip
    theirs = randomised(transformers.BertModel(config))
    fields = bert.fields_from_config(config.to_dict())
    params = params_of(bert, bert.transformers_table, fields, below(tensors_of(theirs), "bert."))
    tokens = np.random.default_rng(0).integers(1, 60, (3, 7)).astype(np.int32)
    tokens[0, 3:] = tokens[1, 6:] = 0
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        want = theirs(ids, attention_mask=(ids > 0).long()).last_hidden_state
    got = Bert(**fields).apply({"params": params}, {"tokens": jnp.asarray(tokens)}, NEVER).context
    close(got, want)


def test_the_papers_text_transformer():
    module = pytest.importorskip(
        "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion",
    )
    torch.manual_seed(0)
    config = module.LDMBertConfig(
        vocab_size=60, max_position_embeddings=7, d_model=24, encoder_layers=2,
        encoder_ffn_dim=96, encoder_attention_heads=4, head_dim=8, dropout=0.0,
    )  # fmt: skip
    theirs = randomised(module.LDMBertModel(config))
    fields = text.fields_from_config(config.to_dict())
    params = params_of(text, text.diffusers_table, fields, tensors_of(theirs))
    tokens = np.random.default_rng(0).integers(0, 60, (3, 7)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long())[0]
    got = TextTransformer(**fields).apply({"params": params}, {"tokens": tokens}, NEVER).context
    close(got, want)
