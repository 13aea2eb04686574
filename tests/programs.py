"""What compiled programs must not contain."""

import re

_HOST = re.compile(
    r"= \S+ (infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*callback[^\"]*\""
)


def host_transfers(text):
    """Instructions that talk to the host while the program runs."""
    return [line.strip() for line in text.splitlines() if _HOST.search(line)]
