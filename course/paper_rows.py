"""The paper's own table, quoted: exact match of Qwen2.5, three sizes, on seven sets (figures/paper.csv).

    python -m course.paper_rows                    all seven sets
    python -m course.paper_rows nq hotpotqa        these two, and the average over them
"""

import csv
from pathlib import Path

import data
from eval import aligned

TABLE = Path(__file__).resolve().parent.parent / "figures" / "paper.csv"
NOTE = (
    "Quoted, not measured here: exact match of Qwen2.5 in the paper (arXiv 2503.09516 v5, Tables 2, 3 and 5), as\n"
    "transcribed in public notes, since the PDF was not at hand.\n"
    "* Transcriptions differ. Another one has 7B search-o1 on musique .062; 7B r1, base on popqa .199, on bamboogle\n"
    "  .203, average .262. The seven cells of 7B ircot have an average of .226, not the printed .239."
)


def paper_rows():
    """figures/paper.csv -> a dict a row: size, method, a cell a set, the average as printed; all text."""
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def paper_table(names=()):
    """The rows for the sets `names` (none: all seven) in the paper's order, the average over these, and the note."""
    shown = [name for name in data.DATASETS if name in names or not names]
    lines = [["EM of the paper", *shown] + ["average"] * (len(shown) > 1)]
    for row in paper_rows():
        average = sum(float(row[name].rstrip("*")) for name in shown) / len(shown)
        printed = row["average"] if len(shown) == len(data.DATASETS) else f"{average:.3f}".lstrip("0")
        cells = [row[name] for name in shown] + [printed] * (len(shown) > 1)
        lines.append([f"{row['size']} {row['method']}", *cells])
    return f"{aligned(lines)}\n{NOTE}"


def main(argv=None):
    parser = data.Parser(description="Print exact match as the paper reports it.")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"some of {', '.join(data.DATASETS)} (default: all)")
    names = parser.parse_args(argv).sets
    if unknown := [name for name in names if name not in data.DATASETS]:
        raise data.Mistake(f"{unknown[0]!r} is none of the sets {', '.join(data.DATASETS)}")
    print(paper_table(names))


if __name__ == "__main__":
    data.run_main(main)
