"""Weight files with headers but without weights: holes on the disk, read as zeros."""

import json
import math
import os


def write_sparse(path, keys, dtype="F16", width=2):
    """A safetensors file that says it has `keys`, {name: shape}, and takes a few kB."""
    header, offset = {}, 0
    for name, shape in keys.items():
        stop = offset + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)
    return path
