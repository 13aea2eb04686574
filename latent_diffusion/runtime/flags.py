"""Flags that several commands share. JAX isn't imported before a run starts: --help is fast."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from absl import app, flags

flags.disclaim_key_flags()  # --help lists a flag with the command that defines it


def run(main: Callable[[list[str]], None], config: bool = True, positional: bool = False) -> None:
    """`app.run` of a command; --help shows the module of `main`, whichever file starts it.

    config: it has the flag --config. Then a fault in the flags is reported in one line, and
    configs/X.py is that of the package where the working directory has no such file. positional:
    it takes arguments without dashes, which are refused otherwise. In --FLAG=~/PATH, which shells
    leave alone, ~ is the user's home.
    """
    module = sys.modules[main.__module__]
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.modules["__main__"].__doc__ = module.__doc__

    def checked(argv: list[str]) -> None:
        if len(argv) > 1 and not positional:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
        main(argv)

    sys.argv = [sys.argv[0], *map(_at_home, sys.argv[1:])]
    options: dict[str, Any] = {}
    if config:
        folder = _configs()
        sys.argv = [sys.argv[0], *(_installed(argument, folder) for argument in sys.argv[1:])]
        options["flags_parser"] = _parse
    app.run(checked, **options)


def _configs() -> Path:
    """The folder of the experiments, which import each other from `configs`.

    This is a folder of the repository; in an installation it lies inside the package.
    """
    try:
        in_path = find_spec("configs.default") is not None
    except ModuleNotFoundError:
        in_path = False
    if not in_path:
        sys.modules["configs"] = import_module("latent_diffusion.configs")
    return Path(import_module("configs").__path__[0])


def _installed(argument: str, folder: Path) -> str:
    """The argument, in which configs/X.py is replaced by that in `folder` if it doesn't exist."""
    written = re.fullmatch(r"(--?config=)?configs/(\w+\.py)(:.*)?", argument)
    if not written or Path("configs", written[2]).exists() or not (folder / written[2]).exists():
        return argument
    return f"{written[1] or ''}{folder / written[2]}{written[3] or ''}"


def _at_home(argument: str) -> str:
    """The argument, in which ~ is the user's home if it is --FLAG=~/PATH."""
    flag, _, value = argument.partition("=")
    home = flag.startswith("-") and value.startswith("~/")
    return f"{flag}={os.path.expanduser(value)}" if home else argument


def _parse(argv: list[str]) -> list[str]:
    try:
        rest: list[str] = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        if config is not None:
            config.is_locked  # noqa: B018  # a file that can't be read fails on the first use
        return rest
    except (AttributeError, LookupError, TypeError) as error:
        reason = _unknown_field(argv) or str(error)
    except (ValueError, OSError, ModuleNotFoundError, flags.Error) as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        if isinstance(error, OSError):
            reason = f"--config: {reason}"
    sys.exit(f"error: {reason}")


def _unknown_field(argv: list[str]) -> str:
    """A message about the first --config.NAME that the config doesn't have; "" without one."""
    others = [argument for argument in argv[1:] if not _path_of_field(argument)]
    sys.argv = [argv[0], *others]  # the config's flag searches here for fields
    with contextlib.suppress(flags.Error):  # other flags may be wrong or missing, too
        flags.FLAGS(sys.argv)
    if flags.FLAGS["config"].value is None:
        return ""
    for path in filter(None, map(_path_of_field, argv[1:])):
        part: Any = flags.FLAGS["config"].value
        above = "the config"
        for name in path.split(".")[1:]:
            names = list(part) if hasattr(part, "keys") else []
            if name.partition("[")[0] not in names:
                return (
                    f"--{path}: {above} has no field {name!r}; known: {', '.join(names) or 'none'}"
                )
            part, above = part[name.partition("[")[0]], name
    return ""


def _path_of_field(argument: str) -> str:
    """config.NAME of --config.NAME, --config.NAME=VALUE or --noconfig.NAME; "" of other flags."""
    field = re.match(r"(?:--?(?:no)?)?(config\.[^=]*)", argument)
    return field[1] if field else ""


def cluster() -> Callable[[], None]:
    """Define the flags by which a process joins a cluster; returns the function that joins it."""
    holders = (
        flags.DEFINE_bool("distributed", False, "Join a cluster: docs/devices.md."),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; else it is looked up."),
        flags.DEFINE_integer("num_processes", None, "Their number; else it is looked up."),
        flags.DEFINE_integer("process_id", None, "This process's number; else it is looked up."),
        flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for the other processes."),
    )

    def connect() -> None:
        from latent_diffusion.runtime import processes

        values: Any = [holder.value for holder in holders]
        processes.connect(*values)

    return connect


def model() -> Callable[[], tuple[str, dict[str, Any]]]:
    """Define the flags by which a command loads a model.

    Returns a reader of the model's path and of further arguments of `load`, which raises UsageError
    unless exactly one path is given.
    """
    workdir = flags.DEFINE_string("workdir", None, "A workdir of latent denoising, or of a prior.")
    other = flags.DEFINE_string("model", None, "Any other path that latent_diffusion.load reads.")
    more = (
        flags.DEFINE_string("tokenizer", None, "A tokenizer's folder or file; see load."),
        flags.DEFINE_string("dtype", None, "bfloat16, float16 or int8, not for the first stage."),
        flags.DEFINE_bool(
            "scan", None, "Compile transformers as loops, which is faster; see load."
        ),
    )

    def read() -> tuple[str, dict[str, Any]]:
        if (workdir.value is None) == (other.value is None):
            raise app.UsageError("give either --workdir or --model")
        return str(workdir.value or other.value), {holder.name: holder.value for holder in more}

    return read


def define(options: Mapping[str, Any], fallback: str = "") -> Callable[[], dict[str, Any]]:
    """Define a flag for every option (`process.options.Option`); returns a reader of their values.

    fallback: for help texts, the source of an absent flag's value before the option's default.
    """
    holders = {name: _define(name, made, fallback) for name, made in options.items() if made.flag}

    def read() -> dict[str, Any]:
        return {
            name: _value(name, options[name], holder.value)
            for name, holder in holders.items()
            if holder.value is not None
        }

    return read


def _define(name: str, made: Any, fallback: str) -> Any:
    functions: dict[type, Callable[..., Any]] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    function = flags.DEFINE_list if made.count != 1 else functions[made.kind]
    allowed = f", in {made.range}" if made.range else ""
    defaults = [fallback, "" if made.default is None else str(made.default)]
    default = ", else ".join(text for text in defaults if text)
    return function(name, None, f"{made.help}{allowed}. Default: {default or 'none'}.")


def _value(name: str, made: Any, value: Any) -> Any:
    if made.count == 1:
        return value
    try:
        values = [made.kind(entry) for entry in value]
    except ValueError as error:
        raise ValueError(f"--{name}={','.join(value)}: write numbers with commas") from error
    return values[0] if made.count is None and len(values) == 1 else values
