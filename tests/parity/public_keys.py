"""Where `tests/keys/` comes from: diffusers' own modules, and the original's naming rules.

    PYTHONPATH=tests python tests/parity/public_keys.py        writes the lists anew

The original's names are spelt out here a second time, from its code's structure and not from our
tables; its modules can't be built without its dependencies.
"""

import itertools

import diffusers
import torch
import transformers
from key_lists import FOLDER, format_key_list


class Keys(dict):
    """{name: shape}, filled module by module."""

    def add(self, name, *weight, bias=True):
        self[f"{name}.weight"] = weight
        if bias:
            self[f"{name}.bias"] = weight[:1]


# ------------------------------------------------------------------------ the original's U-Net


def unet(
    mc=320, mult=(1, 2, 4, 4), attend=(4, 2, 1), cin=4, cout=4, context=None, depth=1,
    linear=False, updown=False, scale_shift=False, cross_only=(), classes=None, vector=None,
    blocks=2,
):  # fmt: skip
    """openaimodel.UNetModel. depth: of all transformers, or of those on each level."""
    keys = Keys()
    depths = (depth,) * len(mult) if isinstance(depth, int) else depth
    keys.add("time_embed.0", 4 * mc, mc)
    keys.add("time_embed.2", 4 * mc, 4 * mc)
    if classes:
        keys["label_emb.weight"] = (classes, 4 * mc)
    if vector:
        keys.add("label_emb.0.0", 4 * mc, vector)
        keys.add("label_emb.0.2", 4 * mc, 4 * mc)

    def res(name, i, o):
        keys.add(f"{name}.in_layers.0", i)
        keys.add(f"{name}.in_layers.2", o, i, 3, 3)
        keys.add(f"{name}.emb_layers.1", (2 if scale_shift else 1) * o, 4 * mc)
        keys.add(f"{name}.out_layers.0", o)
        keys.add(f"{name}.out_layers.3", o, o, 3, 3)
        if i != o:
            keys.add(f"{name}.skip_connection", o, i, 1, 1)

    def attention(name, c, depth, crossed=False):
        keys.add(f"{name}.norm", c)
        if not context:
            keys.add(f"{name}.qkv", 3 * c, c, 1)
            keys.add(f"{name}.proj_out", c, c, 1)
            return
        for end in ("proj_in", "proj_out"):
            keys.add(f"{name}.{end}", c, c, *(() if linear else (1, 1)))
        for d in range(depth):
            block = f"{name}.transformer_blocks.{d}"
            for attn, width in (("attn1", context if crossed else c), ("attn2", context)):
                keys.add(f"{block}.{attn}.to_q", c, c, bias=False)
                keys.add(f"{block}.{attn}.to_k", c, width, bias=False)
                keys.add(f"{block}.{attn}.to_v", c, width, bias=False)
                keys.add(f"{block}.{attn}.to_out.0", c, c)
            keys.add(f"{block}.ff.net.0.proj", 8 * c, c)
            keys.add(f"{block}.ff.net.2", c, 4 * c)
            for n in (1, 2, 3):
                keys.add(f"{block}.norm{n}", c)

    keys.add("input_blocks.0.0", mc, cin, 3, 3)
    skips, c, index = [mc], mc, 0
    for level, m in enumerate(mult):
        crossed = level < len(cross_only) and cross_only[level]
        for _ in range(blocks):
            index += 1
            res(f"input_blocks.{index}.0", c, m * mc)
            c = m * mc
            if 2**level in attend:
                attention(f"input_blocks.{index}.1", c, depths[level], crossed)
            skips.append(c)
        if level < len(mult) - 1:
            index += 1
            if updown:
                res(f"input_blocks.{index}.0", c, c)
            else:
                keys.add(f"input_blocks.{index}.0.op", c, c, 3, 3)
            skips.append(c)
    res("middle_block.0", c, c)
    attention("middle_block.1", c, depths[-1])
    res("middle_block.2", c, c)
    index = -1
    for level, m in reversed(list(enumerate(mult))):
        crossed = level < len(cross_only) and cross_only[level]
        for i in range(blocks + 1):
            index += 1
            res(f"output_blocks.{index}.0", c + skips.pop(), m * mc)
            c, place = m * mc, 1
            if 2**level in attend:
                attention(f"output_blocks.{index}.1", c, depths[level], crossed)
                place = 2
            if level and i == blocks:
                if updown:
                    res(f"output_blocks.{index}.{place}", c, c)
                else:
                    keys.add(f"output_blocks.{index}.{place}.conv", c, c, 3, 3)
    keys.add("out.0", c)
    keys.add("out.2", cout, mc, 3, 3)
    return keys


VQ4 = {"cin": 3, "cout": 3, "mult": (1, 2, 3, 4), "attend": (8, 4, 2)}
UNETS = {
    "celeba256": dict(VQ4, mc=224),
    "lsun_churches256": dict(
        mc=192, mult=(1, 2, 2, 4, 4), attend=(1, 2, 4, 8), updown=True, scale_shift=True
    ),
    "cin256": dict(mc=256, mult=(1, 2, 4), context=512),
    "cin256-v2": dict(VQ4, mc=192, mult=(1, 2, 3, 5), context=512),
    "text2img256": dict(VQ4, mc=192, mult=(1, 2, 3, 5), context=640),
    "txt2img-1p4B": dict(context=1280),
    "layout2img": dict(VQ4, mc=128, context=512, depth=3),
    "semantic_synthesis256": dict(VQ4, mc=128, mult=(1, 4, 8), attend=(32, 16, 8), cin=6),
    "bsr_sr": dict(VQ4, mc=160, mult=(1, 2, 2, 4), attend=(16, 8), cin=6),
    "inpainting_big": dict(VQ4, mc=256, cin=7, updown=True),
    "retrieval768": dict(
        mc=448, mult=(1, 2, 3, 4), attend=(4, 2, 1), cin=16, cout=16, context=768
    ),
    "sd-v1": dict(context=768),
    "sd-v2": dict(context=1024, linear=True),
    "sd-v2-unclip-h": dict(context=1024, linear=True, vector=2048),
    "sdxl": dict(
        mult=(1, 2, 4), attend=(4, 2), context=2048, depth=(1, 2, 10), linear=True, vector=2816
    ),
    "sdxl-refiner": dict(
        mc=384, attend=(4, 2), context=1280, depth=4, linear=True, vector=2560
    ),
    "sd-x4-upscaler": dict(
        mc=256, mult=(1, 2, 2, 4), attend=(2, 4, 8), cin=7, context=1024, linear=True,
        cross_only=(True, True, True, False), classes=1000,
    ),
}  # fmt: skip


# ------------------------------------------------- the original's control nets and T2I-Adapters


def control(**fields):
    """cldm.ControlNet: the way down of a U-Net, hints, and the convolutions from zero."""
    parts = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
    keys = Keys({name: x for name, x in unet(**fields).items() if name.startswith(parts)})
    widths = (3, 16, 16, 32, 32, 96, 96, 256, keys["input_blocks.0.0.weight"][0])
    for i, (before, width) in enumerate(itertools.pairwise(widths)):
        keys.add(f"input_hint_block.{2 * i}", width, before, 3, 3)
    c = 0
    for i in range(len({name.split(".")[1] for name in keys if name.startswith("input_blocks.")})):
        ends = ("0.weight", "0.op.weight", "0.out_layers.3.weight")
        c = next(keys[n][0] for end in ends if (n := f"input_blocks.{i}.{end}") in keys)
        keys.add(f"zero_convs.{i}.0", c, c, 1, 1)
    keys.add("middle_block_out.0", c, c, 1, 1)
    return keys


CONTROLS = {name: UNETS[name] for name in ("sd-v1", "sd-v2")}


def t2i(light=False, channels=3, widths=(320, 640, 1280, 1280)):
    """ldm.modules.encoders.adapter.Adapter and Adapter_light, as they were released."""
    keys, c = Keys(), channels * 64
    if light:
        for i, width in enumerate(widths):
            inner = width // 4
            keys.add(f"body.{i}.in_conv", inner, c, 1, 1)
            for j in range(4):
                for block in ("block1", "block2"):
                    keys.add(f"body.{i}.body.{j}.{block}", inner, inner, 3, 3)
            keys.add(f"body.{i}.out_conv", width, inner, 1, 1)
            c = width
        return keys
    keys.add("conv_in", widths[0], c, 3, 3)
    c = widths[0]
    for i, width in enumerate(w for w in widths for _ in range(2)):
        if c != width:
            keys.add(f"body.{i}.in_conv", width, c, 1, 1)
        keys.add(f"body.{i}.block1", width, width, 3, 3)
        keys.add(f"body.{i}.block2", width, width, 1, 1)
        c = width
    return keys


T2IS = {"full": {}, "canny": {"channels": 1}, "light": {"light": True}}


# -------------------------------------------------------------------- the original's first stage


def first_stage(mult=(1, 2, 4), attend=(), z=3, embed=None, codes=None, middle=True, ch=128):
    """AutoencoderKL, or VQModel where there are codes; resolution 256, two blocks a level."""
    keys, embed = Keys(), embed or z

    def res(name, i, o):
        keys.add(f"{name}.norm1", i)
        keys.add(f"{name}.conv1", o, i, 3, 3)
        keys.add(f"{name}.norm2", o)
        keys.add(f"{name}.conv2", o, o, 3, 3)
        if i != o:
            keys.add(f"{name}.nin_shortcut", o, i, 1, 1)

    def attention(name, c):
        keys.add(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            keys.add(f"{name}.{part}", c, c, 1, 1)

    def mid(side, c):
        res(f"{side}.mid.block_1", c, c)
        if middle:
            attention(f"{side}.mid.attn_1", c)
        res(f"{side}.mid.block_2", c, c)

    keys.add("encoder.conv_in", ch, 3, 3, 3)
    c = ch
    for level, m in enumerate(mult):
        for i in range(2):
            res(f"encoder.down.{level}.block.{i}", c, m * ch)
            c = m * ch
            if 256 >> level in attend:
                attention(f"encoder.down.{level}.attn.{i}", c)
        if level < len(mult) - 1:
            keys.add(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
    mid("encoder", c)
    keys.add("encoder.norm_out", c)
    moments = z if codes else 2 * z
    keys.add("encoder.conv_out", moments, c, 3, 3)
    keys.add("decoder.conv_in", c, z, 3, 3)
    mid("decoder", c)
    for level, m in reversed(list(enumerate(mult))):
        for i in range(3):
            res(f"decoder.up.{level}.block.{i}", c, m * ch)
            c = m * ch
            if 256 >> level in attend:
                attention(f"decoder.up.{level}.attn.{i}", c)
        if level:
            keys.add(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    keys.add("decoder.norm_out", c)
    keys.add("decoder.conv_out", 3, c, 3, 3)
    keys.add("quant_conv", embed if codes else 2 * embed, moments, 1, 1)
    keys.add("post_quant_conv", z, embed, 1, 1)
    if codes:
        keys["quantize.embedding.weight"] = (codes, embed)
    return keys


FIRST_STAGES = {
    "kl-f4": {},
    "kl-f4-z4": dict(z=4),  # Stable Diffusion's upscaler
    "kl-f8": dict(mult=(1, 2, 4, 4), z=4),
    "kl-f16": dict(mult=(1, 1, 2, 2, 4), attend=(16,), z=16),
    "kl-f32": dict(mult=(1, 1, 2, 2, 4, 4), attend=(16, 8), z=64),
    "vq-f4": dict(codes=8192),
    "vq-f4-noattn": dict(codes=8192, middle=False),
    "vq-f8": dict(mult=(1, 2, 2, 4), attend=(32,), z=4, codes=16384),
    "vq-f8-n256": dict(mult=(1, 2, 2, 4), attend=(32,), z=4, codes=256),
    "vq-f16": dict(mult=(1, 1, 2, 2, 4), attend=(16,), z=8, codes=16384),
    "taming-f16": dict(mult=(1, 1, 2, 2, 4), attend=(16,), z=256, codes=1024),
}


# -------------------------------------------------------------------- the original's conditioners


def bert(width, depth, vocabulary=30522, length=77):
    """BERTEmbedder: an encoder of x-transformers', attention 8 × 64 wide."""
    keys = Keys()
    keys.add("transformer.token_emb", vocabulary, width, bias=False)
    keys.add("transformer.pos_emb.emb", length, width, bias=False)
    for i in range(depth):
        attend, feed = (f"transformer.attn_layers.layers.{2 * i + j}" for j in (0, 1))
        keys.add(f"{attend}.0", width)
        for part in ("to_q", "to_k", "to_v"):
            keys.add(f"{attend}.1.{part}", 512, width, bias=False)
        keys.add(f"{attend}.1.to_out", width, 512)
        keys.add(f"{feed}.0", width)
        keys.add(f"{feed}.1.net.0.0", 4 * width, width)
        keys.add(f"{feed}.1.net.2", width, 4 * width)
    keys.add("transformer.norm", width)
    keys.add("transformer.to_logits", vocabulary, width)
    return keys


def open_clip(width=1024, depth=24, projection=1024, vocabulary=49408):
    """The text half of OpenCLIP's ViT-H-14, as FrozenOpenCLIPEmbedder keeps it."""
    keys = Keys()
    keys["model.positional_embedding"] = (77, width)
    keys["model.text_projection"] = (width, projection)
    keys["model.logit_scale"] = ()
    keys.add("model.token_embedding", vocabulary, width, bias=False)
    keys.add("model.ln_final", width)
    add_layers(keys, "model.transformer", width, depth)
    return keys


def open_clip_image(width=1280, depth=32, projection=1024, patch=14, side=224):
    """Its other half, with what FrozenOpenCLIPImageEmbedder leaves of the text's."""
    keys = Keys()
    keys["visual.class_embedding"] = (width,)
    keys["visual.positional_embedding"] = (1 + (side // patch) ** 2, width)
    keys["visual.proj"] = (width, projection)
    keys.add("visual.conv1", width, 3, patch, patch, bias=False)
    keys.add("visual.ln_pre", width)
    keys.add("visual.ln_post", width)
    add_layers(keys, "visual.transformer", width, depth)
    text = open_clip(depth=0)
    return {**keys, **{name.removeprefix("model."): shape for name, shape in text.items()}}


def add_layers(keys, transformer, width, depth):
    """OpenCLIP's layers, which are torch's own attention and two linear maps."""
    for i in range(depth):
        block = f"{transformer}.resblocks.{i}"
        keys.add(f"{block}.ln_1", width)
        keys.add(f"{block}.ln_2", width)
        keys[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        keys[f"{block}.attn.in_proj_bias"] = (3 * width,)
        keys.add(f"{block}.attn.out_proj", width, width)
        keys.add(f"{block}.mlp.c_fc", 4 * width, width)
        keys.add(f"{block}.mlp.c_proj", width, 4 * width)


CONDITIONERS = {
    "bert-640": lambda: bert(640, 32),
    "bert-1280": lambda: bert(1280, 32),
    "bert-layout": lambda: bert(512, 16, 8192, 92),
    "open-clip-h": open_clip,
    "open-clip-g": lambda: open_clip(1280, 32, 1280),
    "open-clip-h-image": open_clip_image,
}


# ----------------------------------------------------------------------------------- diffusers'

SD_UNET = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
)
SD_VAE = dict(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)
VQ = dict(
    sample_size=256,
    block_out_channels=(128, 256, 512),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    latent_channels=3,
    num_vq_embeddings=8192,
)
CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    projection_dim=768,
)  # fmt: skip
CLIP_H = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu", projection_dim=512,
)  # fmt: skip


CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    hidden_act="gelu", projection_dim=1280,
)  # fmt: skip
SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REFINER = dict(
    SDXL,
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)


SD3 = dict(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
)  # fmt: skip
SD3S = {
    "sd3-medium": {},
    "sd35-medium": dict(
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
    ),
    "sd35-large": dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
}
T5_XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")


def ldm_bert(**fields):
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    return LDMBertModel(LDMBertConfig(**fields))


def clip_text(fields):
    """CLIPTextModel under the prefix that its files have had since the first."""
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))
    return model if hasattr(model, "text_model") else torch.nn.ModuleDict({"text_model": model})


DIFFUSERS = {
    "diffusers-sd-v1-unet": lambda: diffusers.UNet2DConditionModel(**SD_UNET),
    "diffusers-sd-v2-unet": lambda: diffusers.UNet2DConditionModel(
        **{
            **SD_UNET,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        }
    ),
    "diffusers-sd-v2-unclip-h-unet": lambda: diffusers.UNet2DConditionModel(
        **{
            **SD_UNET,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2048,
        }
    ),
    "diffusers-sd-x4-upscaler-unet": lambda: diffusers.UNet2DConditionModel(
        sample_size=128,
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        only_cross_attention=(True, True, True, False),
        attention_head_dim=8,
        cross_attention_dim=1024,
        use_linear_projection=True,
        num_class_embeds=1000,
    ),
    "diffusers-ldm-celebahq-unet": lambda: diffusers.UNet2DModel(
        sample_size=64,
        block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        layers_per_block=2,
        attention_head_dim=32,
    ),
    **{
        f"diffusers-control-{name}": (
            lambda name=name: diffusers.ControlNetModel.from_unet(
                DIFFUSERS[f"diffusers-{name}-unet"](), load_weights_from_unet=False
            )
        )
        for name in ("sd-v1", "sd-v2", "sdxl")
    },
    "diffusers-t2i-full": lambda: diffusers.T2IAdapter(),
    "diffusers-t2i-canny": lambda: diffusers.T2IAdapter(1),
    "diffusers-t2i-light": lambda: diffusers.T2IAdapter(
        channels=[320, 640, 1280], num_res_blocks=4, adapter_type="light_adapter"
    ),
    "diffusers-t2i-xl": lambda: diffusers.T2IAdapter(
        downscale_factor=16, adapter_type="full_adapter_xl"
    ),
    "diffusers-sd-vae": lambda: diffusers.AutoencoderKL(**SD_VAE),
    "diffusers-ldm-vqvae": lambda: diffusers.VQModel(**VQ),
    "diffusers-clip-l": lambda: clip_text(CLIP_L),
    "diffusers-clip-h": lambda: clip_text(CLIP_H),
    "diffusers-clip-g": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**CLIP_G)
    ),
    "diffusers-sdxl-unet": lambda: diffusers.UNet2DConditionModel(**SDXL),
    "diffusers-sdxl-refiner-unet": lambda: diffusers.UNet2DConditionModel(**REFINER),
    **{
        f"diffusers-{name}": (lambda f=fields: diffusers.SD3Transformer2DModel(**{**SD3, **f}))
        for name, fields in SD3S.items()
    },
    "diffusers-sd3-vae": lambda: diffusers.AutoencoderKL(
        **{**SD_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    ),
    "diffusers-t5-xxl": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5_XXL)),
    "diffusers-ldm-bert": lambda: ldm_bert(d_model=1280),
}


# ---------------------------------------------------------------- taming-transformers' own priors


def gpt(*sizes):
    """The released sizes: rows of tokens and positions, blocks, heads, width."""
    if not hasattr(transformers, "top_k_top_p_filtering"):  # today's versions have lost it
        transformers.top_k_top_p_filtering = None
    from taming.modules.transformer.mingpt import GPT

    return GPT(*sizes)


PRIORS = {
    "prior-faceshq": lambda: gpt(1024, 512, 24, 16, 1024),
    "prior-coco": lambda: gpt(8192, 348, 40, 16, 1408),
    "prior-openimages": lambda: gpt(8192, 348, 36, 16, 1536),
    "prior-cin": lambda: gpt(16384, 256, 48, 16, 1536),
}


def of_module(make):
    """{name: shape} of a module built without memory."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in make().state_dict().items()}


LISTS = {
    **{f"control-{name}": (lambda f=fields: control(**f)) for name, fields in CONTROLS.items()},
    **{f"t2i-{name}": (lambda f=fields: t2i(**f)) for name, fields in T2IS.items()},
    **{f"unet-{name}": (lambda f=fields: unet(**f)) for name, fields in UNETS.items()},
    **{f"first-stage-{name}": (lambda f=f: first_stage(**f)) for name, f in FIRST_STAGES.items()},
    **{f"conditioner-{name}": make for name, make in CONDITIONERS.items()},
    **{name: (lambda make=make: of_module(make)) for name, make in {**DIFFUSERS, **PRIORS}.items()},
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in LISTS.items():
        (FOLDER / f"{name}.txt").write_text(format_key_list(make()))
