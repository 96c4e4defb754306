"""From the paper to the code: every tag in the scripts, with file, line and function.

    python -m course.paper_map                 all of it
    python -m course.paper_map "Eq. 3" D2      these

Tags are written in brackets, or in the title of a section in parentheses: equations, sections and tables of the paper,
Algorithm 1 and the lines of it (`l. 4`), and departures D1 to D18. Tags of other papers bring a name along.
"""

import ast
import re

from course.assignment import ROOT
from data import Mistake, Parser, run_main

FILES = ("searchr1.py", "train.py", "engine.py", "models.py", "kernels.py", "data.py", "eval.py", "retrieval.py")
KNOWN = [f"Eq. {n}" for n in range(1, 5)] + ["Sec. 3.1", "Sec. 3.2", "Sec. 3.4", "Sec. 4"]
KNOWN += [f"Table {n}" for n in (1, 2, 4, 8)] + ["Algorithm 1"] + [f"Alg. 1 l. {n}" for n in range(1, 12)]
KNOWN += [f"D{n}" for n in range(1, 19)]
GROUP = re.compile(r"\[([^][\n]*)\]|^# -----.*\((.*)\) -----$", re.MULTILINE)
TAG = re.compile(r"Eq\.|Sec\.|Table|Alg|D\d")  # a tag of another paper begins with its name: "PPO Eq. 7"
DEFINITION = re.compile(r"^(?:  |Departure: )(?=\[D\d+\] )", re.MULTILINE)  # in the list at the top of a file


def functions(tree):
    """-> list of (first line, last line, name) of functions and classes, outer ones first."""
    kinds = ast.FunctionDef, ast.ClassDef
    return [(node.lineno, node.end_lineno, node.name) for node in ast.walk(tree) if isinstance(node, kinds)]


def tags():
    """All tags -> list of (tag, file, line, function or "", True where it defines a departure)."""
    found = []
    for file in FILES:
        text = (ROOT / file).read_text()
        spans = functions(ast.parse(text))

        def add(tag, position, defines=False):
            line = text.count("\n", 0, position) + 1
            inside = [name for first, last, name in spans if first <= line <= last]
            found.append((tag, file, line, ".".join(inside), defines))

        defined = {match.end() for match in DEFINITION.finditer(text)}
        for group in GROUP.finditer(text):
            for piece in re.split("[,;:]| and ", group[1] or group[2] or ""):
                tag = piece.strip()
                if TAG.match(tag):
                    add("Algorithm 1" if tag == "Alg. 1" else tag, group.start(), group.start() in defined)
        if file == "searchr1.py":  # `converse` has the lines of Algorithm 1 as comments
            begin = text.index("\ndef converse")
            for match in re.finditer(r"\bl\. (\d+)", text[begin : text.index("\ndef ", begin + 1)]):
                add(f"Alg. 1 l. {match[1]}", begin + match.start())
    return found


def main(argv=None):
    parser = Parser(description="Print where the code cites the paper.")
    parser.add_argument("tags", nargs="*", metavar="TAG", help='like "Eq. 3", "Alg. 1 l. 7" or D2 (default: all)')
    wanted = parser.parse_args(argv).tags
    if unknown := [tag for tag in wanted if tag not in KNOWN]:
        raise Mistake(f"{unknown[0]!r} is none of {', '.join(KNOWN)}")
    places = [t for t in tags() if not t[4] and (not wanted or t[0] in wanted)]
    for tag, file, line, name, _ in sorted(places, key=order):
        print(f"{tag:14}{f'{file}:{line}':18}{name}".rstrip())


def order(place):
    return KNOWN.index(place[0]) if place[0] in KNOWN else len(KNOWN), FILES.index(place[1]), place[2]


if __name__ == "__main__":
    run_main(main)
