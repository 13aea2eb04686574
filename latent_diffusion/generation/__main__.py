"""Sample from a trained model.

    python sample.py --workdir=DIR|--model=PATH --out=DIR --prompts="a;b"

Writes 00000.png … in prompt-major order, grid.png, samples.npz and prompts.txt.
"""

from pathlib import Path

from absl import flags

from latent_diffusion.process.options import ALL_OPTIONS
from latent_diffusion.runtime import flags as shared_flags

read_model = shared_flags.model()
LORA = flags.DEFINE_multi_string("lora", [], "A LoRA to merge: FILE or FILE:WEIGHT; repeatable.")
ADAPTER = flags.DEFINE_multi_string("adapter", [], "An adapter: FILE:WEIGHT; repeatable.")
CONTROL = flags.DEFINE_multi_string(
    "control", [], "A control net, its hint, a weight: FILE:PICTURE:WEIGHT; repeatable."
)
REFINER = flags.DEFINE_string(
    "refiner", None, "A model that continues at a share of the noise: PATH:0.2."
)
IMAGE_PROMPT = flags.DEFINE_multi_string(
    "image_prompt", [], "An IP-Adapter, its picture, a weight: FILE:PICTURE:WEIGHT; repeatable."
)
IMAGE_ENCODER = flags.DEFINE_string(
    "image_encoder", None, "IP-Adapters' encoder; by default the folder image_encoder beside them."
)
OUT = flags.DEFINE_string("out", None, "Where the images go.", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "Prompts, separated by semicolons.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line.")
CLASS_LABELS = flags.DEFINE_list("class_labels", None, "Class ids, separated by commas.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Images per prompt or class.")
SEED = flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i only; below 2^64.")
NEGATIVE_PROMPTS = flags.DEFINE_string(
    "negative_prompts", None, "One text for all prompts, or one for each: a;b"
)
MORE_PROMPTS = flags.DEFINE_string("more_prompts", None, "Texts and weights: a:0.5;b:-0.3")
HEIGHT = flags.DEFINE_integer(
    "height", None, "Height of the images in pixels. Default: as in training.", lower_bound=1
)
WIDTH = flags.DEFINE_integer(
    "width", None, "Width of the images in pixels. Default: as in training.", lower_bound=1
)
PROMPT_WEIGHTS = flags.DEFINE_bool(
    "prompt_weights", False, "Prompts may have weights, (word:1.3), [word], BREAK, and any length."
)
IMAGE = flags.DEFINE_string(
    "image",
    None,
    "Start from the middle of this picture, resized to --height and --width; needs --strength or "
    "--mask.",
)
MASK = flags.DEFINE_string("mask", None, "A picture, white or transparent where --image is filled.")
LAYOUT = flags.DEFINE_string("layout", None, "JSON: [[class, [left, top, right, bottom]], ...].")
SEGMENTATION = flags.DEFINE_string("segmentation", None, "A picture whose levels are classes.")
LOW_RES = flags.DEFINE_string("low_res", None, "A small picture, to be enlarged.")
NOISE_LEVEL = flags.DEFINE_integer("noise_level", None, "How much noise --low_res gets.")
DEPTH = flags.DEFINE_string("depth", None, "A picture, light where things are near.")
NEIGHBOURS = flags.DEFINE_string("neighbours", None, "NumPy file of embeddings [N k D] or [k D].")
IMAGE_EMBEDDING = flags.DEFINE_string("image_embedding", None, "NumPy file [N D] or [D].")
SIZES = [
    flags.DEFINE_list("original_size", None, "Height,width of the picture before resizing (SDXL)."),
    flags.DEFINE_list("crop_top_left", None, "Top,left of its crop (SDXL)."),
    flags.DEFINE_list("target_size", None, "Height,width of the picture in training (SDXL)."),
    flags.DEFINE_list("negative_original_size", None, "The same for the unconditional (SDXL)."),
    flags.DEFINE_list("negative_crop_top_left", None, "The same for the unconditional (SDXL)."),
    flags.DEFINE_list("negative_target_size", None, "The same for the unconditional (SDXL)."),
]
SCORES = [
    flags.DEFINE_float("aesthetic_score", None, "Intended aesthetic rating (SDXL's refiner)."),
    flags.DEFINE_float("negative_aesthetic_score", None, "The same for the unconditional."),
]
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images sampled at once, at most.")
PROGRESS = flags.DEFINE_bool("progress", False, "Show a bar that counts network evaluations.")
read_options = shared_flags.define(ALL_OPTIONS, fallback="the model's")
connect = shared_flags.cluster()


def main(argv: list[str]) -> None:
    """Read the flags; the work is `latent_diffusion.generation.sampling`."""
    from latent_diffusion.convert.adapters import read_pictured, read_weights
    from latent_diffusion.generation import sampling
    from latent_diffusion.runtime import processes
    from latent_diffusion.runtime.startup import quiet_and_cached

    quiet_and_cached()

    path, loading = read_model()
    try:
        connect()
        options = {
            "negative_prompts": sampling.read_prompts(NEGATIVE_PROMPTS.value, None),
            "more_prompts": sampling.read_weighted(MORE_PROMPTS.value),
            "image": sampling.read_picture(IMAGE.value),
            "mask": sampling.read_map(MASK.value, "mask"),
            "layout": sampling.read_json(LAYOUT.value),
            "segmentation": sampling.read_map(SEGMENTATION.value, "levels"),
            "low_res": sampling.read_picture(LOW_RES.value),
            "noise_level": NOISE_LEVEL.value,
            "depth": sampling.read_map(DEPTH.value, "depth"),
            "neighbours": sampling.read_array(NEIGHBOURS.value),
            "image_embedding": sampling.read_array(IMAGE_EMBEDDING.value),
            **{flag.name: sampling.read_integers(flag.name, flag.value) for flag in SIZES},
            **{flag.name: flag.value for flag in SCORES},
            "progress": sampling.ProgressBar() if PROGRESS.value else None,
            "prompt_weights": PROMPT_WEIGHTS.value,
            "height": HEIGHT.value,
            "width": WIDTH.value,
            **read_options(),
        }
        sampling.sample_to_disk(
            path,
            Path(OUT.value),
            prompts=sampling.read_prompts(PROMPTS.value, PROMPTS_FILE.value),
            class_labels=sampling.read_integers("class_labels", CLASS_LABELS.value),
            num_images=NUM_IMAGES.value,
            seed=SEED.value,
            lora=dict(read_weights(LORA.value)),
            adapters=read_weights(ADAPTER.value, "adapter"),
            controls=[read_pictured(entry, "control") for entry in CONTROL.value],
            refiner=sampling.read_refiner(REFINER.value),
            image_prompts=[read_pictured(entry, "image_prompt") for entry in IMAGE_PROMPT.value],
            image_encoder=IMAGE_ENCODER.value,
            **loading,
            batch_size=BATCH_SIZE.value,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ValueError, OSError) as error:
        processes.exit_with(f"error: {error}")


def run() -> None:
    """The command."""
    shared_flags.run(main, config=False)


if __name__ == "__main__":
    run()
