"""What real models score, as one table: files of `eval.py --json` -> CSV, a row a model, method and number of hops.

    python eval.py --checkpoint outputs/run-2 --data dev.jsonl --json grpo.json
    python -m course.real figures/real.csv format.json grpo.json
    python -m course.real --paired format.json grpo.json         EM of the second minus the first, question by question
"""

import csv
import json
from pathlib import Path

from data import Mistake, Parser, run_main
from eval import aligned, bootstrap_interval, read_log
from retrieval import written_whole

COLUMNS = "model method hops n em em_low em_high f1 searches tokens steps hours".split()


def origin(checkpoint):
    """OUTPUT_DIR/checkpoint-N -> (first model, what was last done to it, its steps, hours of all runs so far). A run
    that began at a checkpoint of another run has that one's origin. A model that no run made: no method, 0 steps."""
    run, steps = Path(checkpoint).parent, Path(checkpoint).name.removeprefix("checkpoint-")
    if not (run / "metrics.jsonl").exists():
        return Path(checkpoint).name, None, 0, 0.0
    config = json.loads((run / "config.json").read_text())
    records = list(read_log(run / "metrics.jsonl"))
    timed = [r[key] for r in records if r["step"] <= int(steps) for key in r if key.startswith("timing_s/")]
    model, _, _, before = origin(config["model"]) if config["model"] else ("tiny", None, 0, 0.0)
    method = ("r1" if config["no_search"] else config["algo"]) + " no mask" * config["no_mask"]
    return model, method, int(steps), before + sum(timed) / 3600


def read(file):
    """A file of eval.py --json -> (its configuration, its records)."""
    try:
        content = json.loads(Path(file).read_text())
        return content["config"], content["records"]
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"{file} was not written by eval.py --json, or not to its end") from None


def rows_of(file):
    """A file of eval.py --json -> its rows, dicts of COLUMNS. The method of a trained checkpoint is how it was trained;
    "rag after grpo" if it was asked otherwise."""
    config, records = read(file)
    model, trained_by, steps, hours = origin(config["checkpoint"])
    groups = {}
    for r in records:
        method = f"{r['method']} after {trained_by}" if trained_by else r["method"]
        method = trained_by if trained_by and r["method"] == config["trained"]["method"] else method
        groups.setdefault((method, r["hops"]), []).append(r)
    rows = []
    for (method, hops), of in groups.items():
        mean = lambda key: sum(r[key] for r in of) / len(of)
        numbers = mean("em"), *bootstrap_interval([r["em"] for r in of]), mean("f1"), mean("searches")
        cells = [model, method, hops, len(of), *(f"{x:.3f}" for x in numbers), f"{mean('response_tokens'):.1f}"]
        rows.append(dict(zip(COLUMNS, [*cells, steps, f"{hours:.2f}"])))
    return rows


def paired(first, second):
    """Two files of eval.py --json -> a line: on the questions of both, how much more are right in the second, with the
    95 % interval of that difference, and how many are gained and lost. On the same questions it is much narrower than
    two intervals side by side."""
    before, after = ({(r["position"], r["question"]): r["em"] for r in read(file)[1]} for file in (first, second))
    change = [after[k] - before[k] for k in before if k in after]
    if not change:
        raise Mistake(f"{first} and {second} have no question in common")
    low, high = bootstrap_interval(change)
    mean, gained, lost = sum(change) / len(change), sum(c > 0 for c in change), sum(c < 0 for c in change)
    return f"{mean:+.3f} (95 %: {low:+.3f} to {high:+.3f}), {len(change)} questions: {gained} gained, {lost} lost"


def main(argv=None):
    parser = Parser(description="Collect what real models score in one table.")
    parser.add_argument("output", metavar="TABLE.csv", help="rows for other models, methods and steps stay")
    parser.add_argument("files", nargs="+", metavar="FILE.json", help="files that eval.py --json wrote")
    parser.add_argument("--paired", action="store_true", help="compare two such files: give them instead of TABLE.csv")
    args = parser.parse_args(argv)
    if args.paired:
        for file in args.files:
            print(f"{file} - {args.output}: {paired(args.output, file)}")
        return
    known = lambda row: (row["model"], row["method"], *(str(row[name]) for name in ("hops", "steps")))
    old = csv.DictReader(Path(args.output).read_text().splitlines() if Path(args.output).exists() else [])
    if old.fieldnames not in (None, COLUMNS):
        raise Mistake(f"{args.output} is another table: its columns are not {', '.join(COLUMNS)}")
    table = {known(row): row for row in old} | {known(row): row for file in args.files for row in rows_of(file)}
    with written_whole(args.output) as file:
        lines = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        lines.writeheader()
        lines.writerows(table.values())
    print(aligned([COLUMNS, *([str(row[name]) for name in COLUMNS] for row in table.values())]))


if __name__ == "__main__":
    run_main(main)
