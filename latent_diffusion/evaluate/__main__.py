"""Score samples, folders and first stages.

    python -m latent_diffusion.evaluate --workdir=DIR --metrics=fid,is,pr --num_images=50000
    python -m latent_diffusion.evaluate --workdir=DIR --metrics=psnr,ssim,lpips,rfd
    python -m latent_diffusion.evaluate --samples=DIR|npz --reference=DIR|npz|tfds:NAME@SPLIT

The samples of a workdir are compared with its training data, or with --reference. Their features
are written to its folder evaluations/, from which an interrupted evaluation resumes; --save_images
also writes the samples. Results are printed and appended to evaluations.jsonl. On several hosts:
--distributed, see docs/devices.md.
"""

from typing import Any

from absl import flags

from latent_diffusion.evaluate import SAMPLING
from latent_diffusion.process.options import OPTIONS
from latent_diffusion.runtime import flags as shared_flags

_FLAGS: tuple[Any, ...] = (
    flags.DEFINE_string("workdir", None, "A workdir of either stage."),
    flags.DEFINE_string("samples", None, "Instead of a workdir: a folder, or an .npz with arr_0."),
    flags.DEFINE_string(
        "reference", None, "A folder, an .npz (arr_0, or mu and sigma), or tfds:NAME@SPLIT."
    ),
    flags.DEFINE_list("metrics", None, "fid kid is fd kd pr dc clip | psnr ssim lpips rfid rfd."),
    flags.DEFINE_integer("num_images", 0, "0 = as many as there are, or 50000 samples."),
    flags.DEFINE_string("features", "inception", "inception | alexnet | vgg16."),
    flags.DEFINE_string("features_path", None, "Weights of --features."),
    flags.DEFINE_string(
        "filter", "bicubic", "Resizing: bicubic (clean-fid) | bilinear (pytorch-fid) | tensorflow."
    ),
    flags.DEFINE_string("clip_path", None, "A CLIPModel's folder, for the metric clip."),
    flags.DEFINE_string("lpips", "alex", "Net of the metric lpips: alex | vgg."),
    flags.DEFINE_string(
        "split", None, "Split of a workdir's data; default: train, but test for first stages."
    ),
    flags.DEFINE_integer("image_size", 0, "Crop and resize --samples, --reference to this side."),
    flags.DEFINE_integer("seed", 0, "Seed of samples, subsets and the order of conditions."),
    flags.DEFINE_integer("batch_size", 64, "Images at once, over all devices."),
    flags.DEFINE_string("save_images", None, "Also write the samples to this folder."),
    flags.DEFINE_string("save_reference", None, "Write the reference's mu and sigma to this .npz."),
)
read_options = shared_flags.define({name: OPTIONS[name] for name in SAMPLING}, "the model's")
connect = shared_flags.cluster()


def evaluate(**options: Any) -> dict[str, Any]:
    """Score a workdir or pictures. options: values of the flags, by name; the rest are defaults.

    Returns the record that the command prints and logs. Raises ValueError, in one line, for an
    unknown name, and for input that can't be scored.
    """
    from latent_diffusion.core.types import lookup
    from latent_diffusion.evaluate import command

    defaults = {flag.name: flag.default for flag in _FLAGS} | dict.fromkeys(SAMPLING)
    for name in options:
        lookup(defaults, name, "option")
    return command.evaluate(defaults | options)


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    import jax

    from latent_diffusion.runtime import processes
    from latent_diffusion.runtime.checkpoint import CheckpointError
    from latent_diffusion.runtime.startup import quiet_and_cached

    quiet_and_cached()
    try:
        connect()
        record = evaluate(**{flag.name: flag.value for flag in _FLAGS}, **read_options())
    except (ValueError, OSError, ModuleNotFoundError, CheckpointError) as error:
        processes.exit_with(f"error: {error}")
    if jax.process_index() != 0:
        return
    print(f"{record['num_images']} images of {record['images']}, against {record['reference']}")
    for name, value in record["metrics"].items():
        print(f"{name:24s} {value:12.5g} ± {record['errors'][name]:.2g}")


def run() -> None:
    """The command."""
    shared_flags.run(main, config=False)


if __name__ == "__main__":
    run()
