"""PEFT's settings of an adapter: in its adapter_config.json, and in the header of diffusers' files.

A setting is either used (`_USED`), or without effect on a trained adapter (`_HARMLESS`), or checked
against the values in `_SUPPORTED`, of which the first three settings are used as well. Any other
setting is refused by its name unless it has its default: None, False or empty.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

METADATA = "lora_adapter_metadata"
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_USED = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern")
# These say which modules were adapted and how they were trained; the tensors show the result.
_HARMLESS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "inference_mode"),
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
    *("use_effective_conv2d", "decompose_both", "decompose_factor", "loftq_config", "eva_config"),
)
_SUPPORTED = {
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), (True, False, None)),
    "peft_type": ("LORA", "LOHA", "LOKR", None),
    "bias": ("none",),
    # Other initialisations change the base model as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "init_weights": (True, False, "lycoris"),
}


class PeftSettings:
    """Settings by part ("unet", "text_encoder", "" for all) and name; ValueError for unknown ones.

    where: the file that has them, for messages.
    """

    def __init__(self, where: str, settings: Mapping[str, Any]) -> None:
        self.where = where
        self.values: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            part, dot, name = key.partition(".")
            part, name = (part, name) if dot and part in _PARTS else ("", key)
            _check(where, key, name, value)
            self.values.setdefault(part, {})[name] = value

    def scale(self, module: str, kind: str, rank: int | None) -> np.float32:
        """The scale of a module: α/r, or α/√r if rank-stabilised (Kalajdzievski 2023)."""
        settings, name = self.of(module), re.sub(rf"^({'|'.join(_PARTS)})\.", "", module)
        key, r = self._number("r", settings, "rank_pattern", name)
        if kind != "LoKr" and r != rank:
            raise ValueError(f"its rank is {rank}, but {self.where} says {key}={r:g}")
        key = "alpha" if "alpha" in settings else "lora_alpha"
        _, alpha = self._number(key, settings, "alpha_pattern", name)
        return np.float32(alpha / (r**0.5 if settings.get("use_rslora") else r))

    def of(self, module: str) -> dict[str, Any]:
        """The settings of the part to which a module belongs."""
        part = next((part for part in _PARTS if module.startswith(f"{part}.")), "")
        return self.values.get(part, self.values.get("", {}))

    def _number(
        self, key: str, settings: Mapping[str, Any], patterns: str, module: str
    ) -> tuple[str, float | int]:
        """The setting that decides a module's number, and this number.

        It is that of a pattern with which the module's name ends, else the setting `key`.
        """
        value = settings.get(key, 8)  # PEFT's default of r and of lora_alpha
        for pattern, exception in (settings.get(patterns) or {}).items():
            end = pattern.removeprefix("^")
            if module == end or (end == pattern and module.endswith(f".{end}")):
                key, value = f"{patterns}[{pattern!r}]", exception
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise ValueError(f"{self.where} says {key}={str(value)[:80]!r}, not a positive number")
        return key, value


def _check(where: str, key: str, name: str, value: Any) -> None:
    """Raise ValueError for a setting whose effect isn't implemented here."""
    if name in _SUPPORTED:
        allowed = _SUPPORTED[name]
        if not any(value is x or (isinstance(x, str) and value == x) for x in allowed):
            raise ValueError(
                f"{where}: {key}={str(value)[:80]!r} isn't supported; "
                f"supported: {' or '.join(map(repr, allowed))}"
            )
    elif name.endswith("_pattern") and name in _USED:
        keys = value if isinstance(value, dict) else {} if value is None else None
        if keys is None or not all(re.fullmatch(r"\^?[\w.]+", key) for key in keys):
            raise ValueError(f"{where}: {key}={str(value)[:80]!r} isn't by names of modules")
    elif name not in (*_USED, *_HARMLESS) and value not in (None, False, [], {}):
        raise ValueError(f"{where}: {key}={str(value)[:80]!r} isn't supported")
