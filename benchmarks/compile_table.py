"""Which machines the large experiments fit, in which mode: the table of docs/devices.md.

    python -m benchmarks.compile_table              # prints the table
    python -m benchmarks.compile_table --missing    # prints the commands of missing cells
    python -m benchmarks.compile_table --missing | sh

Every cell is one run of `latent_diffusion.compile_check --quick`, a minute or three on two cores;
docs/compile_table.json keeps its numbers.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latent_diffusion.compile_check import GIB, Checked, least_seconds
from latent_diffusion.runtime.parallel.chips import num_chips, parse_topology

RESULTS = "docs/compile_table.json"
TOPOLOGIES = {
    "v5e-16": "v5e:4x4",
    "v5p-8": "v5p:2x2x1",  # named after cores, of which a chip has two
    "v6e-8": "v6e:2x4",
    "8 × H100": "h100:8",
}
FSDP = "data 1 × fsdp {} × tensor 1"


class Experiment(NamedTuple):
    """A config and its global batches, small enough that a chip gets a few images at once.

    sample: 0 for none. a_chip: batches of samples on each chip, in place of `sample`.
    """

    config: str
    train: int
    sample: int = 0
    a_chip: tuple[int, ...] = ()

    def batches(self, topology: str) -> list[tuple[str, int]]:
        """The programs with their global batches."""
        samples = [n * num_chips(topology) for n in self.a_chip] or [self.sample]
        return [("train", self.train), *(("sample", batch) for batch in samples if batch)]


EXPERIMENTS = {
    "cin256-v2": Experiment("cin256_v2", 256, 64),
    "txt2img-1p4B": Experiment("txt2img_1p4b", 256, 64),
    "SD v1": Experiment("sd_v1", 64, 64),
    "SDXL": Experiment("sdxl", 16, a_chip=(1, 4)),
    "DiT-XL/2": Experiment("dit_xl_2", 256),
    "SD 3 medium": Experiment("sd3", 16, a_chip=(1,)),
}
BACKBONES = {"dit_xl_2": "dit", "sd3": "mmdit"}  # of others: "unet"
FULL_FIRST_STAGES = ("sdxl", "sd3")  # which decode in float32, whatever the network's dtype
HALF_PARAMS = ("sdxl", "sd3")  # which are sampled with parameters in bfloat16


class Cell(NamedTuple):
    """One program on one machine in one mode."""

    config: str
    program: str
    topology: str
    batch_size: int
    fsdp: bool

    def command(self) -> str:
        """The command that computes the cell."""
        words = ["python -m latent_diffusion.compile_check", f"--config=configs/{self.config}.py"]
        words += [f"--topology={self.topology}", f"--programs={self.program}", f"--json={RESULTS}"]
        backbone = BACKBONES.get(self.config, "unet")
        words += [f"--config.batch_size={self.batch_size}", f"--config.{backbone}.dtype=bfloat16"]
        words += ["--quick"]
        if self.config not in FULL_FIRST_STAGES:
            words += ["--config.autoencoder.dtype=bfloat16"]
        if self.params() != "float32":
            words += [f"--params={self.params()}"]
        if self.fsdp:
            words += ["--config.parallel.mode=mesh", "--config.parallel.mesh.data=1"]
            words += ["--config.parallel.mesh.fsdp=-1"]
        return " ".join(words)

    def key(self) -> dict[str, Any]:
        """The fields that identify the record of the cell."""
        mode = FSDP.format(num_chips(self.topology)) if self.fsdp else "pmap"
        fields = {k: v for k, v in self._asdict().items() if k != "fsdp"}
        same = {"mode": mode, "dtype": "bfloat16", "params": self.params(), "micro_batches": 1}
        return {**fields, **same}

    def params(self) -> str:
        """The dtype of the parameters."""
        half = self.program == "sample" and self.config in HALF_PARAMS
        return "bfloat16" if half else "float32"


def cells() -> Iterator[Cell]:
    """All cells. A sampler's state is small and needs no FSDP."""
    for topology in TOPOLOGIES.values():
        for one in EXPERIMENTS.values():
            for program, batch in one.batches(topology):
                for fsdp in (True, False) if program == "train" else (False,):
                    yield Cell(one.config, program, topology, batch, fsdp)


def find(records: list[dict[str, Any]], cell: Cell) -> Checked | None:
    """The numbers of a cell, if they are computed."""
    for record in records:
        if {k: record[k] for k in cell.key()} == cell.key():
            return Checked(**{k: record[k] for k in Checked._fields})
    return None


def decided(checked: Checked | None) -> bool:
    """Whether the record says if the program fits."""
    return checked is not None and bool(checked.peak or checked.problem)


def table(records: list[dict[str, Any]]) -> str:
    """The table in Markdown: a row for every program and machine with a record."""
    lines = [
        "| | machine | images a chip | pmap, GiB a chip | FSDP, GiB a chip | saved | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in EXPERIMENTS.items():
        rows = [
            (program, machine, topology, batch)
            for machine, topology in TOPOLOGIES.items()
            for program, batch in one.batches(topology)
        ]
        for program, machine, topology, batch in sorted(rows, key=lambda row: row[0] != "train"):
            both = [
                find(records, Cell(one.config, program, topology, batch, fsdp))
                for fsdp in (False, True)
            ]
            if both == [None, None]:
                continue
            cells = [f"{name}, {program}", machine, f"{batch / num_chips(topology):g}"]
            cells += [memory(both[0], topology)]
            cells += [memory(both[1], topology) if program == "train" else "–"]
            cells += [saved(*both), rate(both, topology, batch)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory(checked: Checked | None, topology: str) -> str:
    """The peak against what the chip has."""
    have = parse_topology(topology)[1].memory
    if checked is None:
        return "not yet computed"
    if checked.problem:
        return f"**no**: {checked.problem}"
    if not checked.peak:
        return f"{checked.arguments / GIB:.1f} of {have:g}, and activations (not yet computed)"
    return f"{checked.peak / GIB:.1f} of {have:g}"


def saved(pmap: Checked | None, fsdp: Checked | None) -> str:
    """The memory for state and constants that FSDP saves on a chip."""
    if pmap is None or fsdp is None:
        return "–"
    return f"{(pmap.arguments - fsdp.arguments) / GIB:.1f} GiB"


def rate(both: list[Checked | None], topology: str, batch: int) -> str:
    """The most images a second at published peaks, in the faster mode that fits."""
    rates = [
        (batch / max(least.values()), max(least, key=lambda k: least[k]))
        for one in both
        if one is not None and not one.problem
        for least in [least_seconds(one, topology)]
    ]
    if not rates:
        return "–"
    best, limit = max(rates)
    return f"{float(f'{best:.3g}'):,g} images/s ({limit})"


def main() -> None:
    """Print the table, or the commands of the missing cells."""
    path = Path(RESULTS)
    records = json.loads(path.read_text()) if path.exists() else []
    if "--missing" in sys.argv[1:]:
        print("\n".join(cell.command() for cell in cells() if not decided(find(records, cell))))
    else:
        print(table(records))


if __name__ == "__main__":
    main()
