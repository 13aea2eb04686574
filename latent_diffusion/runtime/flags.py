"""Flags that several commands share. Nothing here loads JAX before a run starts, so that --help is
quick.
"""

from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # --help lists a flag with the command that defines it


def cluster() -> Callable[[], None]:
    """Define the flags by which a process joins a cluster; returns the function that joins it."""
    holders = (
        flags.DEFINE_bool("distributed", False, "Join a cluster: docs/devices.md."),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; else it is looked up."),
        flags.DEFINE_integer("num_processes", None, "How many; else it is looked up."),
        flags.DEFINE_integer("process_id", None, "Of this process; else it is looked up."),
        flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for the other processes."),
    )

    def connect() -> None:
        from latent_diffusion.runtime import processes

        values: Any = [holder.value for holder in holders]
        processes.connect(*values)

    return connect


def define(options: Mapping[str, Any], fallback: str = "") -> Callable[[], dict[str, Any]]:
    """Define a flag for every option (`process.options.Option`); returns a reader of their values.

    fallback: words for help texts: whose values replace missing flags, before an option's default.
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
