"""Break one line at a time and see that the tests notice: `make mutants`.

    python tests/mutants.py [WORD ...]

tests/mutants.toml lists the mutants: a file, a text that occurs there once, the text that replaces
it, and the tests of which at least one has to fail. Two copies of the repository are changed in a
temporary folder, never this one. WORD selects the mutants whose file or reason has it. The exit
code is 1 where a mutant survives.
"""

import functools
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
LIMIT = 600  # seconds for the tests of one mutant
NO_FAILURE, FAILURE = 0, 1  # exit codes of pytest; the others are errors of ours
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Mutant:
    """One changed line, and the tests that have to notice it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def applied(self, text: str) -> str:
        """The text with the change. Raises ValueError where `old` doesn't occur exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


@functools.cache
def read_mutants() -> list[Mutant]:
    """The mutants of tests/mutants.toml."""
    listed = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
    return [
        Mutant(**{**entry, "tests": tuple(f"tests/{test}" for test in entry["tests"])})
        for entry in listed["mutant"]
    ]


def copy_repository(target: Path) -> None:
    """Copy every file that git knows, and link the folder of compiled programs."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    if not (target / ".cache").exists():
        (ROOT / ".cache").mkdir(exist_ok=True)
        (target / ".cache").symlink_to((ROOT / ".cache").resolve())


def run_tests(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run these tests in a copy until one fails. Raises TimeoutExpired after LIMIT seconds."""
    return subprocess.run(
        [*PYTEST, "-x", *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def judge(folder: Path, mutant: Mutant) -> str:
    """ "killed", "SURVIVED", or what went wrong."""
    path = folder / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(before), encoding="utf-8")
    try:
        done = run_tests(folder, mutant.tests)
    except subprocess.TimeoutExpired:
        return f"ERROR: no end after {LIMIT} s"
    finally:
        path.write_text(before, encoding="utf-8")
    if done.returncode == FAILURE or done.returncode < 0:  # a signal may end the tests themselves
        return "killed"
    if done.returncode == NO_FAILURE:
        return "SURVIVED"
    return f"ERROR {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]}"


def check_whole(folder: Path, mutants: Sequence[Mutant]) -> None:
    """Exit unless every named test passes where nothing is changed."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    command = [*PYTEST, "-n", str(AT_ONCE), "--dist", "loadfile", *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != NO_FAILURE:
        sys.exit(f"{done.stdout[-4000:]}\nthe tests fail without any mutant")


def main(words: Sequence[str]) -> None:
    """Judge the mutants that have one of the words, or all of them."""
    mutants = [
        m for m in read_mutants() if not words or any(word in m.file + m.why for word in words)
    ]
    start, survived = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        folders: queue.Queue[Path] = queue.Queue()
        for i in range(AT_ONCE):
            folders.put(Path(scratch) / str(i))
            copy_repository(Path(scratch) / str(i))
        check_whole(Path(scratch) / "0", mutants)
        print(f"all named tests pass unchanged ({time.monotonic() - start:.0f} s)", flush=True)

        def one(mutant: Mutant) -> tuple[str, float]:
            folder, begun = folders.get(), time.monotonic()
            try:
                return judge(folder, mutant), time.monotonic() - begun
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for mutant, (verdict, seconds) in zip(mutants, pool.map(one, mutants), strict=True):
                survived += verdict != "killed"
                print(f"{verdict:9s} {seconds:5.0f} s  {mutant.file}: {mutant.why}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(mutants) - survived} of {len(mutants)} mutants killed in {seconds:.0f} s")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
