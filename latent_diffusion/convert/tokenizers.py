"""Read tokenizers from other libraries' files beside weights, and write such files."""

import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_diffusion.convert import text
from latent_diffusion.convert.bundle import Bundle
from latent_diffusion.data.tokenizers import (
    BertTokenizer,
    ClipT5Tokenizer,
    ClipTokenizer,
    T5Tokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    of_encoder,
)
from latent_diffusion.data.tokenizers.t5 import EOS, PAD, SPACE, UNK

_LENGTH = 77  # default number of tokens of a text encoder
OURS = "word_tokenizer.json"
# Names of files and folders beside a single file that may have a text encoder's tokenizer.
_BESIDE = {
    "clip_text": ("tokenizer", "bpe_simple_vocab_16e6.txt.gz", "vocab.json"),
    "clip_text_2": ("tokenizer_2", "tokenizer", "bpe_simple_vocab_16e6.txt.gz", "vocab.json"),
    "text": ("tokenizer", "vocab.txt"),
}


def beside(path: Path, conditioners: Container[str]) -> Path | None:
    """The path of the text encoder's tokenizer in the folder of the file `path`, or None."""
    for name, files in _BESIDE.items():
        for file in files if name in conditioners else ():
            if (path.parent / file).exists():
                return path.parent if file == "vocab.json" else path.parent / file
    return None


def with_tokenizer(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with the tokenizer at `path`, whose empty prompt becomes the null condition.

    path: a tokenizer's folder or vocabulary, or the JSON of a word tokenizer. Raises ValueError for
    a model without a text encoder.
    """
    names = ("clip_text", "clip_text_2", "text")
    name = next((name for name in names if name in bundle.conditioners), None)
    if name is None:
        raise ValueError(f"tokenizer={path}: this model has no text encoder")
    part = bundle.conditioners[name]
    length = part.fields.get("max_length", _LENGTH)
    words = path / OURS if path.is_dir() else path
    tokenizer: Tokenizer
    if words.name == OURS and words.is_file():
        tokenizer = load_tokenizer(words)
    elif name == "text":
        tokenizer = BertTokenizer.read(path, length)
    else:
        # Stable Diffusion 2 pads with "!", which a bare vocabulary doesn't show.
        pad = "!" if part.fields.get("pad_id") == 0 else None
        tokenizer = ClipTokenizer.read(path, length, pad)
    readers = ("clip_text", "clip_text_2") if name == "clip_text" else (name,)
    for reader in (bundle.conditioners[key] for key in readers if key in bundle.conditioners):
        rows = reader.fields.get("vocab_size", tokenizer.vocab_size)
        _check_rows(path, tokenizer, rows)
        for word, ids in tokenizer.added.items():
            if max(ids) >= rows:
                raise ValueError(
                    f"{path}: the added word {word!r} has the id {max(ids)}, but a text encoder's "
                    f"table has {rows} rows"
                )
    own = {"pad_id": part.fields["pad_id"]} if part.fields.get("repad") else {}
    part = replace(part, fields={**text.with_tokenizer(part.fields, tokenizer), **own})
    bundle = replace(bundle.with_part(name, part), tokenizer=tokenizer)
    if name == "clip_text" and "clip_text_2" in bundle.conditioners:
        part = bundle.conditioners["clip_text_2"]  # keeps its padding
        fields = {**part.fields, "empty": tokenizer.empty}
        bundle = bundle.with_part("clip_text_2", replace(part, fields=fields))
    return _with_t5(bundle, path) if has_t5(bundle) else bundle


def _check_rows(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raise ValueError for a tokenizer whose tokens have no rows in a text encoder's table."""
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{path}: a tokenizer of {tokenizer.vocab_size} tokens, but a text encoder's table has "
            f"{rows} rows: it is another model's"
        )


def has_t5(bundle: Bundle) -> bool:
    """Whether the model has a T5, which reads tokens behind those of CLIP."""
    part = bundle.conditioners.get("t5_text")
    return part is not None and not part.fields.get("absent")


def with_second(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with the padding of the second text encoder's tokenizer, which lies at `path`.

    In a model without a first encoder it becomes the model's tokenizer. Raises ValueError if its
    vocabulary or its added words differ from the first tokenizer's: both encoders read the same row
    of tokens.
    """
    if "clip_text" not in bundle.conditioners:
        return with_tokenizer(bundle, path)
    first = of_encoder(bundle.tokenizer, "clip_text")
    part = bundle.conditioners["clip_text_2"]
    second = ClipTokenizer.read(path, part.fields.get("max_length", _LENGTH))
    if not isinstance(first, ClipTokenizer) or first.vocabulary != second.vocabulary:
        raise ValueError(f"{path} has another vocabulary than the first tokenizer")
    if first.added != second.added:
        word, _ = min(first.added.items() ^ second.added.items(), key=str)
        raise ValueError(f"{path}: the added word {word!r} isn't the same in both tokenizers")
    fields = {**part.fields, "pad_id": second.pad_id}
    return bundle.with_part("clip_text_2", replace(part, fields=fields))


def _with_t5(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with T5's tokenizer behind CLIP's. path: CLIP's tokenizer, or a pipeline."""
    folders = [folder / "tokenizer_3" for folder in (path, path.parent)]
    third = next((folder for folder in folders if folder.is_dir()), None)
    if third is None or not isinstance(bundle.tokenizer, ClipTokenizer):
        raise ValueError(
            f"{path}: this model needs CLIP's tokenizer and T5's, in a folder tokenizer_3 beside it"
        )
    part = bundle.conditioners["t5_text"]
    t5 = T5Tokenizer.read(third, part.fields.get("max_length"))
    _check_rows(third, t5, part.fields.get("vocab_size", t5.vocab_size))
    part = replace(part, fields=text.with_tokenizer(part.fields, t5))
    return replace(
        bundle.with_part("t5_text", part), tokenizer=ClipT5Tokenizer(bundle.tokenizer, t5)
    )


def padded(tokenizer: Tokenizer, pad_id: int) -> Tokenizer:
    """The same tokenizer with another padding."""
    if not isinstance(tokenizer, ClipTokenizer) or tokenizer.pad_id == pad_id:
        return tokenizer
    words, length = tokenizer.vocabulary, tokenizer.max_length
    other = ClipTokenizer(words, tokenizer.merges, length, words[pad_id], tokenizer.any_case)
    other.added = tokenizer.added
    return other


def check_words(tokenizer: Tokenizer | None) -> None:
    """Raise ValueError for a tokenizer with added words, which transformers' files can't hold."""
    if tokenizer is not None and tokenizer.added:
        raise ValueError(
            f"these files have no place for the added words {', '.join(tokenizer.added)}; save the "
            "model as orbax, or the words alone as textual_inversion"
        )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Write the files that transformers reads; returns the name of the class that reads them."""
    check_words(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, ClipTokenizer):
        return _write_clip(tokenizer, folder)
    if isinstance(tokenizer, T5Tokenizer):
        return _write_t5(tokenizer, folder)
    if isinstance(tokenizer, BertTokenizer):
        (folder / "vocab.txt").write_text("\n".join(tokenizer.vocabulary) + "\n", encoding="utf-8")
        return _save_config(folder, "BertTokenizer", tokenizer, do_lower_case=True)
    assert isinstance(tokenizer, WordTokenizer)  # combined ones are written one by one
    return _write_words(tokenizer, folder)


def _write_t5(tokenizer: T5Tokenizer, folder: Path) -> str:
    split: list[Mapping[str, Any]] = [
        {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
    ]
    ids = {piece: i for i, (piece, _) in enumerate(tokenizer.vocabulary)}
    special = [
        {
            **_special(token),
            "id": ids[token],
            "lstrip": token in tokenizer.before,
            "rstrip": token in tokenizer.behind,
        }
        for token in sorted(tokenizer.special, key=lambda token: ids[token])
    ]
    end = {"id": EOS, "ids": list(tokenizer.empty), "tokens": [EOS]}
    single: list[Mapping[str, Any]] = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": EOS, "type_id": 0}},
    ]
    second = [{kind: {**part, "id": "B"}} for kind, part in single[0].items()]
    content = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *second, single[1]],
            "special_tokens": {EOS: end},
        },
        "decoder": split[1],
        "model": {
            "type": "Unigram",
            "unk_id": ids[UNK],
            "vocab": [list(entry) for entry in tokenizer.vocabulary],
            "byte_fallback": False,
        },
    }
    if tokenizer.charsmap:
        content["normalizer"] = {
            "type": "Precompiled",
            "precompiled_charsmap": tokenizer.charsmap,
        }
    _save(folder, "tokenizer.json", content)
    extra = sum(token.startswith("<extra_id_") for token in tokenizer.special)
    tokens = {"eos_token": EOS, "unk_token": UNK, "pad_token": PAD, "extra_ids": extra}
    return _save_config(folder, "T5TokenizerFast", tokenizer, **tokens)


def _write_clip(tokenizer: ClipTokenizer, folder: Path) -> str:
    _save(folder, "vocab.json", {token: i for i, token in enumerate(tokenizer.vocabulary)})
    lines = ["#version: 0.2", *tokenizer.merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": tokenizer.pad}
    _save(folder, "special_tokens_map.json", tokens)
    special = {
        str(tokenizer.vocabulary.index(token)): _special(token, token in tokenizer.any_case)
        for token in sorted({start, end, tokenizer.pad})
    }
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    settings |= {"added_tokens_decoder": special}
    return _save_config(folder, "CLIPTokenizer", tokenizer, **settings, **tokens)


def _special(token: str, normalized: bool = False) -> dict[str, Any]:
    """A special token as an entry of the tokenizers library."""
    where = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"content": token, "special": True, "normalized": normalized, **where}


def _write_words(tokenizer: WordTokenizer, folder: Path) -> str:
    """Write a word tokenizer for the tokenizers library, which then makes the same tokens.

    Its JSON in our format is written beside it, for `with_tokenizer`.
    """
    tokenizer.save(folder / OURS)
    pad, unknown = "[PAD]", "[UNK]"
    vocabulary = {word: i for i, word in enumerate((pad, unknown, *tokenizer.vocabulary))}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"[\p{L}\p{N}]+(?:-[\p{L}\p{N}]+)*|[#*]"},
        "behavior": "Removed",
        "invert": True,
    }
    normalizers: list[Mapping[str, Any]] = [
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Replace", "pattern": {"Regex": "['’`]"}, "content": ""},
        {"type": "Lowercase"},
    ]
    special = [{"id": i, **_special(token)} for i, token in enumerate((pad, unknown))]
    content = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "post_processor", "decoder")),
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": split,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown},
    }
    _save(folder, "tokenizer.json", content)
    return _save_config(
        folder, "PreTrainedTokenizerFast", tokenizer, pad_token=pad, unk_token=unknown
    )


def _save_config(folder: Path, name: str, tokenizer: Tokenizer, **settings: Any) -> str:
    """Write tokenizer_config.json for the class `name`; returns the name."""
    config = {"tokenizer_class": name, "model_max_length": tokenizer.max_length, **settings}
    _save(folder, "tokenizer_config.json", config)
    return name


def _save(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")
