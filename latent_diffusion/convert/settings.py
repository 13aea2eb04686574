"""The settings of a module in another library's config: one table, for reading and writing."""

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Fields = dict[str, Any]  # the fields of one of our modules, by name
_LARGEST = 1 << 20  # bound of whole numbers: no released model has a width or a length near it
_short = reprlib.repr  # the full repr of a value from a file could fill the memory


@dataclass(frozen=True)
class Settings:
    """All settings of one class of another library, and their meaning here.

    names: the library's name → the name of our field, where both have the same value.
    defaults: the values of used settings where they are absent. required: settings without a
    default; optional: settings whose default is None; both with an example of another value.
    per_level: settings that may also be a list of such values.
    allowed: the values that our module supports, for some settings; the first is the default.
    checked: the same for settings that are not written, since not all classes have them.
    harmless: settings that change no output: those of training, those of speed, names.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    per_level: Collection[str] = ()
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    checked: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: Collection[str] = ()

    def complete(self, config: Mapping[str, Any], owner: str) -> dict[str, Any]:
        """Return the config with all defaults. owner: the library's class, for messages.

        Names that begin with "_" are notes of diffusers. Raises a ValueError that names a setting
        that is absent, unknown, of another type, or has a value that our module doesn't support.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"{owner} is {_short(config)}; expected settings by their names")
        fixed = {**self.allowed, **self.checked}
        first = {name: allowed[0] for name, allowed in fixed.items()}
        values = {**dict.fromkeys(self.optional), **first, **self.defaults, **config}
        examples = {**self.defaults, **self.required, **self.optional}
        if absent := [name for name in self.required if name not in values]:
            raise ValueError(f"{owner} does not say {', '.join(absent)}")
        for name, value in values.items():
            said = f"{owner}.{name}={_short(value)}"
            if name in fixed:
                if value not in fixed[name]:
                    supported = " or ".join(map(repr, fixed[name]))
                    raise ValueError(f"{said}; supported: {supported}")
            elif name in examples:
                listed = name in self.per_level and isinstance(value, list | tuple)
                unset = value is None and name in self.optional
                if not unset and not all(
                    _is_like(item, examples[name]) for item in (value if listed else [value])
                ):
                    raise ValueError(f"{said}; expected a value such as {_short(examples[name])}")
            elif value is not None and name not in self.harmless and not name.startswith("_"):
                raise ValueError(
                    f"{said}: this setting is unknown here, and could change the model"
                )
        return values

    def read(self, config: Mapping[str, Any], owner: str) -> Fields:
        """Return our fields; see `complete`."""
        values = self.complete(config, owner)
        fields = {ours: values[theirs] for theirs, ours in self.names.items()}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}

    def write(self, module: Any) -> dict[str, Any]:
        """Return the library's settings for one of our modules."""
        first = {name: allowed[0] for name, allowed in self.allowed.items()}
        values = {theirs: getattr(module, ours) for theirs, ours in self.names.items()}
        return first | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _is_like(value: Any, example: Any) -> bool:
    """Whether a value has the type of an example; a positive whole number needs a positive value.

    In a list, whole numbers may be zero, for a level without blocks.
    """
    match example:
        case bool() | str():
            return isinstance(value, type(example))
        case int():
            return type(value) is int and min(1, example) <= value < _LARGEST
        case float():
            return type(value) in (int, float) and math.isfinite(value)
        case tuple():
            first = 0 if type(example[0]) is int else example[0]
            return isinstance(value, list | tuple) and all(_is_like(item, first) for item in value)
        case _:
            return isinstance(value, Mapping)


def check_class(config: Mapping[str, Any], classes: Collection[str], owner: str) -> None:
    """Raise ValueError for a module of a yaml whose class, its `target`, isn't in `classes`.

    A module without a `target` passes.
    """
    target = config.get("target") or ""
    if target and str(target).rpartition(".")[2] not in classes:
        raise ValueError(f"{owner}.target={_short(target)}; supported: {', '.join(classes)}")


def single(values: Mapping[str, Any], name: str, owner: str) -> Any:
    """The value of a setting that may be a list of equal values, one per level."""
    value = values[name]
    items = value if isinstance(value, list | tuple) else [value]
    if len(items) == 0 or any(item != items[0] for item in items):
        raise ValueError(f"{owner}.{name}={_short(value)}; supported: one for all levels")
    return items[0]


def remembered(
    written: dict[str, Any],
    source: Mapping[str, Any] | None,
    meaning: Callable[[Mapping[str, Any]], Any],
) -> dict[str, Any]:
    """The config for a file to write, with settings of the file that was read.

    source: the config of the file that was read, if any. Where both configs mean the same model,
    the source's values win; else the source only adds settings that `written` doesn't have.
    """
    if not source:
        return written
    alike = meaning(source) == meaning(written)
    return {**written, **source} if alike else {**source, **written}


def decimal(value: Any) -> float:
    """The shortest decimal number that is `value` in float32: 0.18215, not 0.1821500062942505."""
    return float(str(np.float32(value)))


# Settings in every config of transformers: of training, of outputs and of generating texts.
_WORDS = """
    architectures model_type transformers_version torch_dtype dtype name_or_path return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    tie_word_embeddings is_encoder_decoder cross_attention_hidden_size tie_encoder_decoder
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences chunk_size_feed_forward
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    finetuning_task id2label label2id tokenizer_class prefix bos_token_id eos_token_id
    sep_token_id decoder_start_token_id task_specific_params problem_type use_cache
    gradient_checkpointing initializer_range initializer_factor attention_dropout dropout
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout activation_dropout
"""
GENERAL = frozenset(_WORDS.split())


def encoder_settings(
    module: Callable[..., Any],
    architecture: str,
    model_type: str,
    names: Mapping[str, str],
    defaults: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...]],
    harmless: Collection[str] = (),
) -> tuple[Callable[[Mapping[str, Any]], Fields], Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """Return the functions config.json → fields and fields → config.json of an encoder.

    They are for transformers' encoders (BERT and both of CLIP), which share four settings. Our
    `mlp_width` is None where it has its usual value, four times `width`. defaults: those of all
    used settings in the transformers class.
    """
    shared = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_width",
    }
    settings = Settings(
        names={**shared, **names},
        defaults=defaults,
        allowed=allowed,
        checked={"pruned_heads": ({}, None)},
        harmless=GENERAL.union(harmless),
    )

    def read(config: Mapping[str, Any]) -> Fields:
        return usual_mlp(settings.read(config, architecture))

    def write(fields: Mapping[str, Any]) -> dict[str, Any]:
        encoder = module(**fields)
        config = {**settings.write(encoder), "architectures": [architecture]}
        inner = encoder.mlp_width or 4 * encoder.width
        return {**config, "model_type": model_type, "intermediate_size": inner}

    return read, write


def usual_mlp(fields: Fields) -> Fields:
    """The encoder's fields with None for an `mlp_width` of the usual value, four times `width`."""
    usual = fields["mlp_width"] == 4 * fields["width"]
    return {**fields, "mlp_width": None} if usual else fields


def check_groups(module: Any) -> None:
    """Raise ValueError for a network whose number of groups differs from the original's."""
    if module.num_groups != 32:
        raise ValueError(
            f"the original's code has 32 groups in every norm, this model {module.num_groups}; "
            "save it as orbax"
        )
