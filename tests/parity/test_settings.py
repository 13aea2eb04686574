"""Every setting of diffusers' and transformers' classes is used, harmless, or refused by its name.

The classes are the installed ones, so that a setting of a later version shows up here.
"""

import inspect
import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig

from latent_diffusion.convert import bert, clip_image, clip_text, components, t5, text
from latent_diffusion.convert.adapters import control, t2i_adapter
from latent_diffusion.convert.adapters.peft_settings import PeftSettings

TWO = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, sample_size=8)
CROSSED = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
)
ENDS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
# Bases from which one setting is changed: some settings matter only beside others.
CLASSES = {
    "UNet2DConditionModel": [
        {**TWO, **CROSSED},
        {**TWO, **CROSSED, "class_embed_type": "projection",
         "projection_class_embeddings_input_dim": 6},
    ],
    "UNet2DModel": [
        {**TWO, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16},
        {**TWO, "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "AttnUpBlock2D"), "attention_head_dim": 16},
    ],
    "AutoencoderKL": [{**TWO, **ENDS}],
    "VQModel": [{**TWO, **ENDS}],
    "SD3Transformer2DModel": [{}],
    "DiTTransformer2DModel": [{}],
    "AutoencoderTiny": [{}],
    "ControlNetModel": [{}, {"class_embed_type": "projection",
                             "projection_class_embeddings_input_dim": 6}],
    "T2IAdapter": [{}],
}  # fmt: skip
MEANINGS = {
    **dict.fromkeys(("UNet2DConditionModel", "UNet2DModel"), components.MEANINGS["unet"]),
    **dict.fromkeys(("AutoencoderKL", "VQModel", "AutoencoderTiny"),
                    components.MEANINGS["autoencoder"]),
    "SD3Transformer2DModel": components.MEANINGS["mmdit"],
    "DiTTransformer2DModel": components.MEANINGS["dit"],
    "ControlNetModel": control.from_diffusers,
    "T2IAdapter": t2i_adapter.fields_from_diffusers,
}  # fmt: skip
# Those that change no output; `test_harmless_settings_of_diffusers` asks diffusers.
HARMLESS = {
    "UNet2DConditionModel": {"upcast_attention", "addition_embed_type_num_heads"},
    "UNet2DModel": {"num_train_timesteps"},
    "AutoencoderKL": {"force_upcast", "sample_size"},
    "VQModel": {"force_upcast", "sample_size"},
    "SD3Transformer2DModel": set(),
    "DiTTransformer2DModel": set(),
    "AutoencoderTiny": {"latent_magnitude", "latent_shift", "force_upcast"},
    "ControlNetModel": {"upcast_attention", "addition_embed_type_num_heads"},
    "T2IAdapter": set(),
}
GATED = {"feed_forward_proj": "gated-gelu"}  # of all released models that use a T5
ENCODERS = {
    "CLIPTextConfig": (transformers.CLIPTextConfig, clip_text, {}),
    "CLIPVisionConfig": (transformers.CLIPVisionConfig, clip_image, {}),
    "BertConfig": (transformers.BertConfig, bert, {}),
    "LDMBertConfig": (LDMBertConfig, text, {}),
    "T5Config": (transformers.T5Config, t5, GATED),
}


def others(value):
    """Some values of another meaning."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1, value + 1]
    if isinstance(value, float):
        return [value + 0.5]
    if isinstance(value, str):
        return ["other"]
    if isinstance(value, tuple | list):
        return [value[::-1], value[:-1], ("Other", *value[1:])]
    return [7, "other", True]


def outcome(meaning, base, setting, value):
    """How a setting is taken: "refused" (by its name), "used" or "silent"."""
    try:
        return "silent" if meaning({**base, setting: value}) == meaning(base) else "used"
    except ValueError as error:
        assert setting in str(error), (setting, str(error))
        return "refused"


@pytest.mark.parametrize("name", CLASSES)
def test_settings_of_diffusers(name):
    meaning, silent = MEANINGS[name], set()
    settings = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert len(settings) > (5 if name == "T2IAdapter" else 12)
    for setting, parameter in settings.items():
        if setting in ("self", "args", "kwargs"):
            continue
        taken = set()
        for base in CLASSES[name]:
            base = {"_class_name": name, **base}
            value = base.get(setting, parameter.default)
            taken |= {outcome(meaning, base, setting, other) for other in others(value)}
        if not taken & {"used", "refused"}:
            silent.add(setting)
    assert silent == HARMLESS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_settings_that_diffusers_leaves_out_have_its_defaults(name):
    """A config.json that says nothing is one that says every default."""
    settings = inspect.signature(getattr(diffusers, name).__init__).parameters.items()
    said = {k: p.default for k, p in settings if k not in ("self", "args", "kwargs")}
    if name == "VQModel":  # the released models leave it out, and mean 1
        said["scaling_factor"] = 1.0
    said.pop("sample_size", None)
    if name == "DiTTransformer2DModel":  # harmless ones, which have no defaults
        del said["dropout"], said["norm_num_groups"]
    config = {"_class_name": name}
    assert MEANINGS[name](config) == MEANINGS[name]({**config, **said})


@pytest.mark.parametrize("name", ENCODERS)
def test_settings_of_text_and_image_encoders(name):
    make, module, chosen = ENCODERS[name]
    base = {k: v for k, v in make(**chosen).to_dict().items() if not isinstance(v, dict)}
    base["architectures"] = ["X"]
    meaning = module.fields_from_config
    assert meaning(base) == meaning(chosen)  # the defaults are theirs
    silent = {
        setting
        for setting, value in base.items()
        if {outcome(meaning, base, setting, other) for other in others(value)} == {"silent"}
    }
    # One is about memory, the other repeats `encoder_layers`.
    silent -= {"chunk_size_feed_forward", "num_hidden_layers" if module is text else ""}
    silent -= {"num_decoder_layers", "dropout_rate"}  # T5's other half; training
    used = ("size", "hidden_act", "_layers", "heads", "head_dim", "layer_norm_eps", "d_model")
    used += ("d_kv", "d_ff", "gated", "_act", "feed_forward", "relative")
    assert not [s for s in silent if any(word in s for word in used)], silent
    with pytest.raises(ValueError, match="no_such_setting"):
        meaning({**base, "no_such_setting": 1})


KINDS = {"LoraConfig": "LoRA", "LoHaConfig": "LoHa", "LoKrConfig": "LoKr"}
# Which modules were adapted and how training began and went; the tensors say the rest.
OF_TRAINING = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "loftq_config", "eva_config", "decompose_both",
    "decompose_factor", "use_effective_conv2d", "runtime_config",
}  # fmt: skip


@pytest.mark.parametrize("part", ["", "unet.", "transformer.", "text_encoder.", "text_encoder_2."])
@pytest.mark.parametrize("name", KINDS)
def test_settings_of_peft(name, part):
    """In an adapter_config.json, and in the header of diffusers' files, where a part is named."""
    peft = pytest.importorskip("peft")
    base = json.loads(json.dumps(getattr(peft, name)(r=4).to_dict()))

    def meaning(settings):
        read = PeftSettings("file", {part + key: value for key, value in settings.items()})
        own = read.of(f"{part}block")  # the reader of tensors asks for these two
        scale = read.scale(f"{part}block.to_q", KINDS[name], 4)
        return scale, own.get("use_dora"), own.get("lora_bias")

    assert meaning(base)[0] == 8 / 4
    silent = set()
    for setting, value in base.items():
        changed = [{"to_q": 3}] if setting.endswith("_pattern") else others(value)
        changed += ["pissa"] if "init_" in setting else []
        if {outcome(meaning, base, setting, other) for other in changed} == {"silent"}:
            silent.add(setting)
    assert silent <= OF_TRAINING
    with pytest.raises(ValueError, match="no_such_setting"):
        meaning({**base, "no_such_setting": 1})


def output(name, settings):
    torch.manual_seed(0)
    module = getattr(diffusers, name)(**settings).eval()
    x = torch.randn(1, 3 if name != "UNet2DConditionModel" else 4, 16, 16)
    with torch.no_grad():
        if name == "UNet2DConditionModel":
            return module(x, 3, torch.ones(1, 2, 24)).sample
        return (module(x, 3) if name == "UNet2DModel" else module(x)).sample


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, s)
        for name, settings in HARMLESS.items()
        for s in sorted(settings)
        if name not in ("AutoencoderTiny", "ControlNetModel")  # bytes of latents; as of the U-Net
    ],
)
def test_harmless_settings_of_diffusers(name, setting):
    default = inspect.signature(getattr(diffusers, name).__init__).parameters[setting].default
    base = CLASSES[name][0]
    changed = {**base, setting: others(base.get(setting, default))[0]}
    torch.testing.assert_close(output(name, changed), output(name, base), rtol=0, atol=0)
