"""The settings of a module in the words of another library: one table, read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]  # of one of our modules, by name


@dataclass(frozen=True)
class Settings:
    """How one class of another library names the settings that are fields of our module.

    names: their name → the name of our field, where both have the same value.
    defaults: their value where a setting is absent; a setting without a default must be there.
    allowed: the only values of some settings that our module computes; the first is the default.
    checked: the same for settings that are not written, since not all classes have them.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    checked: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def read(self, config: Mapping[str, Any], owner: str) -> Fields:
        """Return our fields. owner: the class of the other library, for messages.

        Raises ValueError for a value that our module can't compute, and KeyError for a setting that
        is absent and has no default.
        """
        for name, allowed in {**self.allowed, **self.checked}.items():
            if (value := config.get(name, allowed[0])) not in allowed:
                supported = " or ".join(map(repr, allowed))
                raise ValueError(f"{owner}.{name}={value!r}; supported: {supported}")
        first = {name: allowed[0] for name, allowed in self.allowed.items()}
        values = {**first, **self.defaults, **config}
        fields = {ours: values[theirs] for theirs, ours in self.names.items()}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}

    def write(self, module: Any) -> dict[str, Any]:
        """Return their settings for one of our modules."""
        first = {name: allowed[0] for name, allowed in self.allowed.items()}
        values = {theirs: getattr(module, ours) for theirs, ours in self.names.items()}
        return first | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def encoder_settings(
    module: Callable[..., Any],
    architecture: str,
    model_type: str,
    names: Mapping[str, str],
    defaults: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...]],
) -> tuple[Callable[[Mapping[str, Any]], Fields], Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """Return the functions config.json → fields and fields → config.json of an encoder.

    They serve transformers' encoders (BERT and both of CLIP), which share four settings. Our
    `mlp_width` is None where it has its usual value, four times `width`.
    """
    shared = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_width",
    }
    settings = Settings({**shared, **names}, defaults, allowed)

    def read(config: Mapping[str, Any]) -> Fields:
        return usual_mlp(settings.read(config, architecture))

    def write(fields: Mapping[str, Any]) -> dict[str, Any]:
        encoder = module(**fields)
        config = {**settings.write(encoder), "architectures": [architecture]}
        inner = encoder.mlp_width or 4 * encoder.width
        return {**config, "model_type": model_type, "intermediate_size": inner}

    return read, write


def usual_mlp(fields: Fields) -> Fields:
    """The fields of an encoder with None for the usual `mlp_width`, which is four times `width`."""
    usual = fields["mlp_width"] == 4 * fields["width"]
    return {**fields, "mlp_width": None} if usual else fields


def check_groups(module: Any) -> None:
    """Raise ValueError for a network that has another number of groups than the original's code."""
    if module.num_groups != 32:
        raise ValueError(
            f"the original's code has 32 groups in every norm, this model {module.num_groups}; "
            "save it as diffusers"
        )
