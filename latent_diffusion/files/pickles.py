"""A safe interpreter of pickles, for the few instructions that torch uses in its files.

A pickle is a program. This interpreter builds containers, numbers and strings, refers to and calls
only names that the reader allows, and its time and memory are bounded by the program's length.
"""

import pickletools
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np

MAX_OPERATIONS = 1_000_000  # instructions of a program; a model with 10⁴ tensors has half as many

short = reprlib.repr  # the full repr of an object from a file could fill the memory


class Name(NamedTuple):
    """A global to which a pickle may refer, but which can't be called: a dtype, a storage type …"""

    name: str


class Call(NamedTuple):
    """A function that a pickle may call."""

    function: Callable[..., Any]


_KEYS = (str, int, float, bool, type(None), bytes, Name)  # types that are fast to hash
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def run(
    program: bytes, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Return the object that a pickle describes.

    allowed: a `Name` or a `Call` for each allowed global. persistent: resolves references to data
    outside the pickle. Raises UnpicklingError, or any other exception for a damaged program.
    """
    machine = _Machine(allowed, persistent)
    for count, (operation, argument, _) in enumerate(pickletools.genops(program)):
        if count + machine.spent > MAX_OPERATIONS:
            raise UnpicklingError(f"more than {MAX_OPERATIONS:,} instructions")
        if operation.name == "STOP":
            return machine.stack.pop()
        machine.step(operation.name, argument)
    raise UnpicklingError("no end")


class _Machine:
    """The stack and the memory of a running program."""

    def __init__(self, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.spent = 0  # elements that calls have copied
        self._allowed, self._persistent = allowed, persistent

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise UnpicklingError(f"a number of {argument.bit_length():,} bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif action := _ACTIONS.get(name):
            action(self, argument)
        else:
            raise UnpicklingError(f"refused the instruction {name}")

    def since_mark(self) -> list[Any]:
        """Take the last mark and the values above it off the stack; returns the values."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise UnpicklingError("no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def take(self, count: int) -> list[Any]:
        """Take `count` values off the stack."""
        if len(self.stack) < count:
            raise UnpicklingError("an empty stack")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def set_items(self, values: list[Any]) -> None:
        """Add alternating keys and values to the dictionary on the stack."""
        target = self.stack[-1]
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in _KEYS:
                raise UnpicklingError(f"a key of a dictionary that is a {type(key).__name__}")
            if not isinstance(target, dict):
                raise UnpicklingError(f"items of a {type(target).__name__}")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        """Add values to the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise UnpicklingError(f"elements of a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def find(self, qualified: str) -> None:
        """Push a global, by its qualified name, on the stack."""
        if qualified not in self._allowed:
            raise UnpicklingError(
                f"refused to load {qualified!r}; allowed: {', '.join(sorted(self._allowed))}"
            )
        self.stack.append(self._allowed[qualified])

    def call(self) -> None:
        """Call the function below its arguments on the stack."""
        function, arguments = self.take(2)
        if not isinstance(function, Call) or not isinstance(arguments, tuple):
            raise UnpicklingError(f"{short(function)} is not callable")
        self.spent += sum(len(a) for a in arguments if hasattr(a, "__len__"))
        if self.spent > MAX_OPERATIONS:
            raise UnpicklingError(f"more than {MAX_OPERATIONS:,} instructions")
        self.stack.append(function.function(*arguments))

    def build(self) -> None:
        """Check and ignore the state for the object on the stack; no object needs it here."""
        (state,) = self.take(1)
        target = self.stack[-1]
        if isinstance(target, np.dtype):
            if not isinstance(state, tuple) or state[1] not in ("<", "|"):
                raise UnpicklingError(f"a dtype of state {short(state)}")
        elif not isinstance(target, OrderedDict):
            raise UnpicklingError(f"refused to set attributes of a {type(target).__name__}")

    def refer(self, identity: Any) -> None:
        """Resolve a reference to data outside the pickle."""
        if self._persistent is None:
            raise UnpicklingError(f"refused to load external data {short(identity)}")
        self.stack.append(self._persistent(identity))


def _global_on_stack(machine: _Machine, _: Any) -> None:
    module, name = machine.take(2)
    machine.find(f"{module}.{name}")


def _dictionary(machine: _Machine, _: Any) -> None:
    values = machine.since_mark()
    machine.stack.append({})
    machine.set_items(values)


def _put(machine: _Machine, place: Any) -> None:
    machine.memo[len(machine.memo) if place is None else int(place)] = machine.stack[-1]


_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.take(1),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": _dictionary,
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.take(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.take(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.take(3))),
    "APPEND": lambda m, _: m.extend(m.take(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(m.take(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _put,
    "GET": lambda m, place: m.stack.append(m.memo[int(place)]),
    "BINGET": lambda m, place: m.stack.append(m.memo[place]),
    "LONG_BINGET": lambda m, place: m.stack.append(m.memo[place]),
    "GLOBAL": lambda m, name: m.find(".".join(name.split(" ", 1))),
    "STACK_GLOBAL": _global_on_stack,
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, name: m.refer(name),
    "BINPERSID": lambda m, _: m.refer(*m.take(1)),
}
