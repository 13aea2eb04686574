r"""Prompts with weights, in the syntax of Stable Diffusion's user interfaces.

`(words)` multiplies the weight of the enclosed words by 1.1 and `[words]` divides it by 1.1;
`(words:1.3)` multiplies it by 1.3. Brackets nest; a bracket that isn't closed reaches to the end.
`\(`, `\)`, `\[`, `\]` and `\\` are literal. `BREAK` ends a section of the prompt.
"""

import re

STEP = 1.1
_SIGNS = re.compile(
    r"(?P<literal>\\[()\[\]\\])|(?P<weight>:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\))|(?P<sign>[()\[\]])"
    r"|(?P<section>\s*\bBREAK\b\s*)"
)
Fragment = tuple[str, float]  # a text and its weight
Spans = dict[int, tuple[int, float]]  # first fragment in a bracket → its end, its factor


def parse(prompt: str) -> list[list[Fragment]]:
    """The sections of a prompt, each as texts with their weights."""
    texts = [""]  # the fragments; BREAK is a fragment, too
    add = texts.append
    opened: dict[str, list[int]] = {"(": [], "[": []}  # first fragments of open brackets
    closed: dict[str, Spans] = {"(": {}, "[": {}}

    def close(kind: str, factor: float) -> None:
        closed[kind][opened[kind].pop()] = len(texts), factor

    end = 0
    for sign in _SIGNS.finditer(prompt):
        add(prompt[end : sign.start()])
        kind, text, end = sign.lastgroup, sign.group(), sign.end()
        if kind == "weight" and opened["("]:
            close("(", float(text[1:-1]))
        elif kind == "weight":
            add(text)
        elif kind == "literal":
            add(text[1:])
        elif kind == "section":
            add("BREAK")
        elif text in opened:
            opened[text].append(len(texts))
        elif opened["(" if text == ")" else "["]:
            close(*(("(", STEP) if text == ")" else ("[", 1 / STEP)))
        else:
            add(text)
    add(prompt[end:])
    for kind, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[kind]:
            close(kind, factor)
    weights = (_products(spans, len(texts)) for spans in closed.values())
    return _joined(texts, [round_ * square for round_, square in zip(*weights, strict=True)])


def _products(spans: Spans, count: int) -> list[float]:
    """For each of `count` fragments, the product of the factors of the brackets around it."""
    around, products = [(count, 1.0)], []
    for i in range(count):
        while around[-1][0] <= i:
            around.pop()
        if i in spans:
            end, factor = spans[i]
            around.append((end, around[-1][1] * factor))
        products.append(around[-1][1])
    return products


def _joined(texts: list[str], weights: list[float]) -> list[list[Fragment]]:
    """The sections, in which neighbouring texts of the same weight are joined."""
    sections: list[list[Fragment]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text == "BREAK":
            sections.append([])
        elif section and section[-1][1] == weight:
            section[-1] = (section[-1][0] + text, weight)
        elif text:
            section.append((text, weight))
    return sections
