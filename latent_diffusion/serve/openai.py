"""Requests and answers as in OpenAI's API for pictures, so that its clients work.

Further fields are those of the project's JSON (`requests`): seed, num_steps, and so on.
"""

import base64
import email.parser
import email.policy
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Fields of OpenAI's clients that have no meaning here.
_IGNORED = ("model", "user", "quality", "style", "moderation")
# Fields for which not all of OpenAI's values can be answered -> those that can.
_ALLOWED = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "background": ("auto", "opaque"),
}
_INTEGERS = ("n", "seed", "num_steps")
_FLOATS = ("guidance_scale", "strength")
_TEXTS = ("prompt", "prompts", "negative_prompts", "sampler", "spacing", "size")
BY_ALPHA = "data:alpha,"  # begins the base64 of a mask whose holes are its transparent parts


def request_of(fields: Any) -> dict[str, Any]:
    """The project's JSON from the fields of a request. Raises ValueError, in one line."""
    if not isinstance(fields, dict):
        raise ValueError(f"a request is a JSON object, not {type(fields).__name__}")
    data = {name: value for name, value in fields.items() if name not in _IGNORED}
    for name, allowed in _ALLOWED.items():
        value = data.pop(name, None)
        if value not in (None, *allowed):
            wanted = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}={str(value)[:40]!r} must be {wanted}")
    size = data.pop("size", None)
    if size not in (None, "auto"):
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(size))
        if match is None:
            raise ValueError(f"size={str(size)[:40]!r} must be WIDTHxHEIGHT")
        data["image_size"] = [int(match[2]), int(match[1])]
    for name, field in (("prompt", "prompts"), ("n", "num_images")):
        if name in data:
            data[field] = data.pop(name)
    return data


def read_form(content_type: str, body: bytes) -> dict[str, Any]:
    """The fields of a form with files (multipart/form-data); files become base64.

    A mask's transparent parts are its holes, as in OpenAI's API.
    """
    if not content_type.lower().startswith("multipart/form-data"):
        raise ValueError(f"Content-Type is {content_type[:80]!r}, not multipart/form-data")
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    fields: dict[str, Any] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if not isinstance(name, str) or not isinstance(content, bytes):
            raise ValueError("a part of the form has no name")
        if part.get_filename() is not None or name in ("image", "mask"):
            kind, name = BY_ALPHA if name == "mask" else "", name.removesuffix("[]")
            if name in fields:
                raise ValueError(f"{name}: the form has several, but one picture is taken")
            fields[name] = kind + base64.b64encode(content).decode()
        else:
            fields[name] = _value(name, content.decode("utf-8", "replace"))
    if not fields:
        raise ValueError("the form has no fields")
    return fields


def _value(name: str, text: str) -> Any:
    try:
        if name in _INTEGERS:
            return int(text)
        if name in _FLOATS:
            return float(text)
    except ValueError:
        raise ValueError(f"{name}={text[:40]!r} must be a number") from None
    if name in (*_TEXTS, *_ALLOWED, *_IGNORED):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def answer(pictures: Sequence[bytes]) -> Mapping[str, Any]:
    """The JSON of pictures (PNG bytes)."""
    data = [{"b64_json": base64.b64encode(content).decode()} for content in pictures]
    return {"created": int(time.time()), "data": data}
