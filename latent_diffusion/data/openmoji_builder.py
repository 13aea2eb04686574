"""TFDS builders of OpenMoji and Twemoji, in a separate module since importing TFDS is slow.

`tfds.data_source("openmoji/32px")` works, too, after this module is imported.
"""

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from latent_diffusion.data.openmoji import GROUPS, catalogue, draw

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False, kw_only=True)
class OpenmojiConfig(tfds.core.BuilderConfig):
    """Pictures of size × size pixels."""

    size: int = 32


def config(size: int) -> OpenmojiConfig:
    """The builder configuration `{size}px`."""
    return OpenmojiConfig(name=f"{size}px", size=size, description=f"{size}×{size} pixels")


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """RGBA pictures, whose alpha channels determine layouts and segmentations."""

    VERSION = tfds.core.Version("1.0.0")  # increase it when pictures, captions or split change
    BUILDER_CONFIGS = [config(size) for size in (16, 32, 64, 96, 128, 256)]  # noqa: RUF012 (TFDS's way)
    title, homepage, license = "OpenMoji", "https://openmoji.org", "CC BY-SA 4.0"

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        features = {
            "image": tfds.features.Image(shape=(size, size, 4), encoding_format="png"),
            "caption": tfds.features.Text(),
            "class_label": tfds.features.ClassLabel(names=GROUPS),
            "hexcode": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.title} drawings with CLDR names; combinations are held out.",
            features=tfds.features.FeaturesDict(features),
            homepage=self.homepage,
            license=self.license,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for emoji in catalogue(self.name):
            if emoji.split == split:
                example = {
                    name: getattr(emoji, name) for name in ("caption", "class_label", "hexcode")
                }
                png = io.BytesIO()
                draw(emoji.hexcode, self.builder_config.size, self.name).save(png, "PNG")
                yield emoji.hexcode, {**example, "image": png.getvalue()}


class Twemoji(Openmoji):
    """The same things in another style, by Twitter and other contributors."""

    title, homepage, license = "Twemoji", "https://github.com/jdecked/twemoji", "CC BY 4.0"


BUILDERS = {builder.name: builder for builder in (Openmoji, Twemoji)}


def prepare(
    size: int, data_dir: str | None = None, style: str = "openmoji"
) -> tfds.core.DatasetBuilder:
    """Return the style's builder at `size` pixels; absent data are drawn first.

    TFDS writes into a temporary directory beside the final one and renames it when it is complete,
    so that a killed preparation does no harm. If two processes prepare at once, the second one
    can't rename its directory and uses that of the first.
    """

    def make_builder() -> tfds.core.DatasetBuilder:
        settings = Openmoji.builder_configs.get(f"{size}px") or config(size)
        return BUILDERS[style](config=settings, data_dir=data_dir, file_format="array_record")

    builder = make_builder()
    if builder.info.splits:
        return builder
    catalogue(style)  # raises for absent packages before anything is written
    logger.info("drawing %s at %d px into %s, once", style, size, builder.data_path)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides messages about downloads
            builder.download_and_prepare()
    except OSError:
        other = make_builder()  # another process may have prepared the same data
        if not other.info.splits:
            raise
        return other
    return builder
