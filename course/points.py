"""The points of a picture as CSV, and the picture from such a file. So figures/ can be drawn again without its runs.

    python -m course.points figures/mask.csv --output mask.png              a study's picture, from its points
    python -m course.points outputs/run-1 --output figures/curves.png       as eval.py --plot; the points go beside it
"""

import csv
from pathlib import Path

from data import Mistake, Parser, run_main
from eval import CURVES, PICTURES, plot_runs, read_runs

COLUMNS = ["run", "step", "metric", "value"]


def write_points(runs, path, curves=CURVES):
    """The points of plot_runs as CSV: run, step, metric, value."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for run, records in runs.items():
            points = [(r["step"], name, r[name]) for r in records for _, name, _ in curves if name in r]
            rows.writerows([run, step, name, f"{value:.6g}"] for step, name, value in points)


def read_points(path):
    """What write_points wrote -> {name of the run: its records, dicts with a step}, as read_runs gives them."""
    rows, runs = csv.DictReader(Path(path).read_text().splitlines()), {}
    if rows.fieldnames != COLUMNS:
        raise Mistake(f"{path} holds no points of runs: its columns are not {', '.join(COLUMNS)}")
    for row in rows:
        try:
            point = {"step": int(row["step"]), row["metric"]: float(row["value"])}
        except (ValueError, TypeError):  # TypeError: a row that is too short
            raise Mistake(f"{path} line {rows.line_num}: step and value must be numbers") from None
        runs.setdefault(row["run"], []).append(point)
    return runs


def main(argv=None):
    parser = Parser(description="Draw the curves of runs, and keep their points as CSV.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or CSV files that this script wrote")
    parser.add_argument("--output", default="curves.png", help="the picture; its points go beside it as CSV")
    args = parser.parse_args(argv)
    if not args.output.endswith(PICTURES):
        raise Mistake(f"--output {args.output}: a picture ends in {', '.join(PICTURES)}")
    points = Path(args.output).with_suffix(".csv")
    tables = [path for path in args.runs if path.endswith(".csv")]
    runs = read_runs([path for path in args.runs if path not in tables])
    for path in tables:
        runs |= read_points(path)
    plot_runs(runs, args.output)
    write_points(runs, points)
    print(f"wrote {args.output} and {points}")


if __name__ == "__main__":
    run_main(main)
