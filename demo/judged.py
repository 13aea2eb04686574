"""The judges of the demo, which are fitted on real pictures, and the prompts of their tests."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from demo import judge
from latent_diffusion.data import openmoji
from latent_diffusion.nets.losses.perceptual import LPIPS, load_lpips_params

PER_GROUP = 30
PER_COLOUR = 6
PER_SUBJECT = 4  # samples per prompt without style, for the measure of diversity
SUBJECTS = 36
_COLOURED = re.compile(
    r"(?:\w+moji )?(?:red|orange|yellow|green|blue|purple|brown|black|white|pink|grey) "
    r"(?:heart|circle|square)"
)


def first_caption(example: dict[str, Any]) -> str:
    """The caption, or of two captions the first, which names the style."""
    caption = example["caption"]
    return caption if isinstance(caption, str) else caption[0]


def training_captions(
    examples: list[dict[str, Any]], per_group: int
) -> tuple[list[str], list[int]]:
    """`per_group` training captions of each of the nine groups, evenly spaced over the split."""
    captions, labels = [], []
    for label in range(len(openmoji.GROUPS)):
        of_group = [first_caption(e) for e in examples if e["class_label"] == label]
        picked = np.linspace(0, len(of_group) - 1, per_group).round().astype(int)
        captions += [of_group[i] for i in picked]
        labels += [label] * per_group
    return captions, labels


class Judged:
    """Judges of skin tones and groups, the prompts of their tests, and the right answers.

    If the examples have two styles, the prompts name them in turn.
    """

    def __init__(self, examples: list[dict[str, Any]]):
        images = np.stack([example["image"] for example in examples])
        names = [first_caption(example) for example in examples]
        tones = np.array([openmoji.skin_tone(name) for name in names])
        self._tone = judge.fit(images[tones >= 0], tones[tones >= 0])
        self._group = judge.fit(images, np.array([e["class_label"] for e in examples]))
        self.styles = tuple(sorted({n.split()[0] for n in names})) if _two(examples) else ()
        held_out = openmoji.held_out_combinations()
        self._held_out = [
            f"{self.styles[i % 2]} {caption}" if self.styles else caption
            for i, caption in enumerate(held_out)
        ]
        captions, self._groups = training_captions(examples, PER_GROUP)
        self.prompts = [*self._held_out, *captions]
        if self.styles:
            self._style = judge.fit(images, self._styles_of(names))

    def _styles_of(self, captions: Sequence[str]) -> np.ndarray:
        return np.array([self.styles.index(caption.split()[0]) for caption in captions])

    def tone_accuracy(self, images: np.ndarray, captions: list[str]) -> float:
        """The accuracy of tones in pictures whose captions name a tone."""
        tones = np.array([openmoji.skin_tone(caption) for caption in captions])
        return judge.balanced_accuracy(self._tone, images[tones >= 0], tones[tones >= 0])

    def group_accuracy(self, images: np.ndarray, groups: list[int]) -> float:
        """The accuracy of groups in pictures of these groups."""
        return judge.balanced_accuracy(self._group, images, np.array(groups))

    def style_accuracy(self, images: np.ndarray, captions: list[str]) -> float:
        """The accuracy of styles in pictures whose captions name a style."""
        return judge.balanced_accuracy(self._style, images, self._styles_of(captions))

    def accuracies(self, samples: np.ndarray) -> tuple[float, float]:
        """Accuracies of samples for all prompts: tones of held-out combinations, other groups."""
        count = len(self._held_out)
        tone = self.tone_accuracy(samples[:count], self._held_out)
        return tone, self.group_accuracy(samples[count:], self._groups)


def _two(examples: list[dict[str, Any]]) -> bool:
    return not isinstance(examples[0]["caption"], str)


class Coloured:
    """The pictures of one-coloured hearts, circles and squares, and prompts for samples of them."""

    def __init__(self, examples: list[dict[str, Any]]):
        pictures = {first_caption(example): example["image"] for example in examples}
        self.real = {name: x for name, x in pictures.items() if _COLOURED.fullmatch(name)}
        self.prompts = [name for name in self.real for _ in range(PER_COLOUR)]

    def accuracy(self, samples: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str]) -> float:
        """The share of samples that have the colour of their caption."""
        return judge.colour_accuracy(samples, captions, self.real)


class Diverse:
    """Prompts without a style, and the diversity of their samples relative to two real styles."""

    def __init__(self, examples: list[dict[str, Any]]):
        pictures: dict[str, list[np.ndarray]] = {}
        for example in examples:
            pictures.setdefault(example["caption"][1], []).append(example["image"])
        both = [name for name, drawn in pictures.items() if len(drawn) == 2]
        picked = np.linspace(0, len(both) - 1, SUBJECTS).round().astype(int)
        self.prompts = [both[i] for i in picked]
        self._real = np.stack([np.stack(pictures[name]) for name in self.prompts])

    def diversity(self, samples: UInt8[np.ndarray, "N K H W 3"]) -> float:
        """Mean LPIPS of two samples of a prompt ÷ that of the real pictures of the two styles."""
        real = _distances(self._real[:, 0], self._real[:, 1])
        pairs = [(i, j) for i in range(samples.shape[1]) for j in range(i)]
        made = [_distances(samples[:, i], samples[:, j]) for i, j in pairs]
        return float(np.mean(made) / real.mean())


def _distances(
    a: UInt8[np.ndarray, "N H W 3"], b: UInt8[np.ndarray, "N H W 3"]
) -> Float[np.ndarray, " N"]:
    """LPIPS (AlexNet) of each pair."""
    params = {"params": load_lpips_params("alex")}
    x, y = (jnp.asarray(images / np.float32(127.5) - 1, jnp.float32) for images in (a, b))
    return np.asarray(jax.jit(LPIPS("alex").apply)(params, x, y))
