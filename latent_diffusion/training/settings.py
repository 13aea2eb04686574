"""Fields of a config that files decide, and fields that may change when a run is resumed.

For a new run, files decide some fields: for example, a first stage determines its architecture. The
section `asked` of config.json has the values that the user's config had before. To resume the run,
a config may have these values or those of the files, which are never read again.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

log = logging.getLogger(__name__)

# Fields that may change when a run is resumed, and why. Its parameters depend on all others.
MAY_CHANGE = {
    "num_steps": "the run may be longer or shorter",
    "seed": "it only affects later steps",
    "batch_size|grad_accumulation": "the state has no trace of the batch",
    "ema_decay": "the average may follow faster or slower",
    r"(log|checkpoint|sampling)\..*": "training doesn't read them",
    r"parallel\..*": "checkpoints don't depend on devices",
    r"optimizer\.(?!name|frozen|averages).*": "the optimiser's state serves any rates",
    r"(unet|dit|mmdit|autoencoder|transformer)\.(attention|dropout|dtype|remat|scan)": (
        "the parameters are the same"
    ),
    r"autoencoding\.(\w+_weight|\w+_start|adversarial_ramp|disc_learning_rate|disc_loss|"
    r"gumbel_temperature|learn_logvar|perceptual_path|reduction)": "the objective may change",
    r"diffusion\.(loss|huber_c|loss_weight|elbo_weight|drop_rate|max_noise|offset_noise|"
    r"input_perturbation|variance_weight)": "the objective may change",
    r"prior\..*": "the objective may change, and sampling is no part of it",
    r"first_stage\.cache|cache_texts": "what is encoded once is the same",
    r"first_stage\.trained_by": "messages alone name it",
    r"data\.(flip|search|workers)": "the pictures are the same",
}
_TEACHER = "distillation.teacher"
_PATHS = rf"init_from|{_TEACHER}|pretrained\..*|.*(path|\.dir)"
# The same files may be in another folder.
_MAY_MOVE = rf"init_from|{_TEACHER}|data\.(dir|embedding_path)"
_FREE = r"(conditioners|pretrained|data\.features)\..*"  # sections without default entries


def flat(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Values as in JSON, by dotted names; `conditioners` is the list of their names."""
    tree = config.to_dict() if isinstance(config, ConfigDict) else config
    tree = json.loads(json.dumps(tree, default=str))
    names = {"conditioners": list(tree["conditioners"])} if "conditioners" in tree else {}
    return {**flatten_dict(tree, sep="."), **names}


def decided(config: ConfigDict, fields: Mapping[str, Any], source: str) -> ConfigDict:
    """The config with the values of `fields`, by dotted name, which a file decides.

    source: the file. The log lists every field for which the config had another value.
    """
    tree, now = config.to_dict(), flat(config)
    asked = flatten_dict(tree.get("asked", {}), sep=".")
    changed = {name: value for name, value in fields.items() if now.get(name) != _as_json(value)}
    for name, value in changed.items():
        asked.setdefault(name, now.get(name))
        _set(tree, name, value)
    if changed:
        texts = (f"{k}={v!r} (asked: {now.get(k)!r})" for k, v in changed.items())
        log.info("%s decides: %s", source, ", ".join(texts))
        tree["asked"] = unflatten_dict(asked, sep=".")
    return ConfigDict(tree)


def continued(config: ConfigDict, run: ConfigDict, directory: Path) -> ConfigDict:
    """The config with which the run in `directory` is resumed. run: its config so far.

    Raises ValueError for the first field that differs from the run's and isn't in `MAY_CHANGE`, or
    that is in the run's config but unknown to this version.
    """
    asked = flatten_dict(run.get("asked", ConfigDict()).to_dict(), sep=".")
    asked = {name: _as_json(value) for name, value in asked.items()}
    tree, now, before = config.to_dict(), flat(config), flat(run)
    teacher, old_teacher = now.get(_TEACHER), before.get(_TEACHER)
    moved = now.get("init_from"), before.get("init_from")
    for name in dict.fromkeys(["task", *now, *before]):
        have, had = now.get(name), before.get(name)
        if old_teacher and had == old_teacher and name != _TEACHER:
            had = teacher  # another path that leads to the teacher, which may have moved
        if have == had or name.startswith("asked."):
            continue
        if name == "first_stage.path" and (have, had) == moved:
            continue  # with the rest of the model
        if name in asked and have == asked[name]:
            _set(tree, name, had)
        elif name not in before and not re.fullmatch(_FREE, name):
            continue  # an older version didn't have the field
        elif not _is_free(name, have, had) or _adds_arrays(name, have, had, config.task):
            if name not in now and not re.fullmatch(_FREE, name):
                raise ValueError(
                    f"the run in {directory} has {name}={had!r}, an unknown field; another version "
                    "may have written it"
                )
            raise ValueError(
                f"{name}={have!r}, but the run in {directory} has {had!r}: leave the field as it "
                "was, or start in another workdir"
            )
    if asked:
        tree["asked"] = run.asked.to_dict()
    return ConfigDict(tree)


def _is_free(name: str, have: Any, had: Any) -> bool:
    """Whether a run may be resumed with a field's value `have` instead of `had`."""
    if any(re.fullmatch(pattern, name) for pattern in MAY_CHANGE):
        return True
    if not (re.fullmatch(_PATHS, name) and have and had):
        return False
    moved = re.fullmatch(_MAY_MOVE, name) and not Path(had).exists()
    return bool(moved) or os.path.realpath(have) == os.path.realpath(had)


def _adds_arrays(name: str, have: Any, had: Any, task: str) -> bool:
    """Whether a field is turned on or off that has arrays in the state only when it is on."""
    names = ("optimizer.grad_clip", *(["ema_decay"] if task == "autoencoding" else []))
    return name in names and bool(have) != bool(had)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
