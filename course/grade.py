"""Grade a starter that a student has worked on: the tests of its exercises, in a process of their own.

    python -m course.grade ../starter                                  points, and for what is red the claim and a hint
    python -m course.grade ../starter --exercises 5-8 --json points.json
    python -m course.grade --run outputs/run-1                         a training run: is it what it says, is it good?
    python -m course.grade ../hunt-ada --bughunt ada                   which of the three mistakes are mended

Only the scripts are taken from the student. The tests come from here, so that an edited test changes nothing. An
exercise that is empty or wrong does not spoil another one, which is then tested with our solution in its place. A
starter has no solution: there a test may wait for another exercise, and says for which.
"""

import ast
import contextlib
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from dataclasses import asdict
from pathlib import Path

import data
import kernels
from course.assignment import ROOT, by_file, find, with_lines
from course.exercises import EXERCISES, chosen
from data import Mistake, Parser, run_main
from eval import evaluate, read_log
from retrieval import written_whole
from train import Config

THRESHOLDS = Path(__file__).with_name("thresholds.json")  # public: a student can read what a run must reach
NOISE = 0.02  # how far answers of the same checkpoint may be apart on two machines


def solved(folder, file, functions):
    """The student's source of a script, with our own text for these functions ("Class.function"). A script that they do
    not have is ours; so is one that does not parse, if `functions` are all its exercises. Mistake if it is no UTF-8."""
    student, ours = Path(folder) / file, (ROOT / file).read_text("utf-8")
    if not student.exists():
        return ours
    try:
        source = student.read_text("utf-8-sig")  # some editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise Mistake(f"{student} is not UTF-8 text: {error}") from None
    every = by_file(range(1, len(EXERCISES) + 1)).get(file, functions)
    if functions and does_not_parse(file, source) and set(every) <= set(functions):
        return ours
    for path in functions:
        try:
            theirs, own = find(ast.parse(source), path), find(ast.parse(ours), path)
        except (SyntaxError, ValueError):  # it does not parse, or they have removed it: the tests will say so
            return source
        lines = ours.splitlines()[own.lineno - 1 : own.end_lineno]
        source = with_lines(source, theirs.lineno, theirs.end_lineno, lines)
    return source


def does_not_parse(file, source):
    """Why the source of a script is no Python, with its line, or None."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError) as error:  # ValueError: it holds a null byte
        return f"{file} line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"


def unfinished(folder, number):
    """Does a function of this exercise begin, after its docstring, with what the starter has put there? Without Triton
    kernels cannot run, so their twins count alone."""
    for file, functions in by_file([number]).items():
        source = solved(folder, file, ())
        if does_not_parse(file, source):
            continue
        tree = ast.parse(source)
        for path in functions:
            with contextlib.suppress(Mistake):  # it has been removed: the tests will say so
                node = find(tree, path)
                first = ast.unparse(node.body[ast.get_docstring(node) is not None :][:1])
                left = first.startswith(f"raise NotImplementedError('exercise {number}: ")
                if left and (kernels.HAVE_TRITON or not path.endswith("_kernel")):
                    return True
    return False


def last_line(text):
    """The last line of what pytest printed, without its mark of an error."""
    return text.strip().splitlines()[-1].removeprefix("E  ").strip()


def run_tests(folder, tests, seconds, ours={}):
    """Run "file::test"s on the scripts in `folder`, which stays as it is, with our text for {file: "Class.function"s}
    -> {test: None if all its cases are green, else the first line of what went wrong}. The process is killed after so
    many seconds; then every test has failed."""
    with tempfile.TemporaryDirectory(prefix="grade-") as work:
        work = Path(work)
        for script in ROOT.glob("*.py"):
            source = solved(folder, script.name, ours.get(script.name, ()))
            if why := does_not_parse(script.name, source):  # all tests import nearly all scripts
                return dict.fromkeys(tests, why)
            (work / script.name).write_text(source, "utf-8")
        for part in ("tests", "course", "figures"):
            shutil.copytree(ROOT / part, work / part, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        report = work / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command += [str(work / "tests" / test) for test in tests]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        how = {"cwd": work, "env": environment, "capture_output": True, "text": True, "timeout": seconds}
        try:
            done = subprocess.run(command, **how)
        except subprocess.TimeoutExpired:
            return dict.fromkeys(tests, f"not done after {seconds} seconds")
        if not report.exists():
            return dict.fromkeys(tests, last_line(done.stdout + done.stderr or "the process died without a word"))
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    verdicts = {}
    for test in tests:
        name = test.partition("::")[2]
        own = [case for case in cases if case.get("name", "").partition("[")[0] == name]
        wrong = [bad.get("message", "").strip() for case in own for bad in (*case.iter("failure"), *case.iter("error"))]
        if not own:  # the file could not even be imported
            errors = [bad.text or "no such test" for case in cases for bad in case.iter("error")] or ["not run"]
            wrong = [last_line(errors[0])]
        verdicts[test] = (wrong[0] or "failed").splitlines()[0][:160] if wrong else None
    return verdicts


@functools.cache
def docstrings(file):
    """Name of a file of tests -> {test: its docstring}."""
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}


def claim_of(test):
    """"file::test" -> what its docstring claims, in one line."""
    file, _, name = test.partition("::")
    return " ".join(docstrings(file)[name].partition("Fails if")[0].removeprefix("Claim:").split())


def grade(folder, numbers, seconds):
    """-> a dict an exercise: number, functions, points, earned, red (list of {test, claim, error}). One process runs
    all the tests. What is red there is run again in a process of its own, where all other exercises are ours."""
    every, results = range(1, len(EXERCISES) + 1), []
    empty = [n for n in every if unfinished(folder, n)]
    tests = list(dict.fromkeys(test for n in numbers if n not in empty for test in EXERCISES[n - 1].tests))
    together = run_tests(folder, tests, seconds, by_file(empty)) if tests else {}
    for n in numbers:
        e = EXERCISES[n - 1]
        verdicts = dict.fromkeys(e.tests, "it is still empty") if n in empty else together
        if n not in empty and any(verdicts[test] for test in e.tests):
            verdicts = run_tests(folder, e.tests, seconds, by_file(other for other in every if other != n))
        red = [{"test": t, "claim": claim_of(t), "error": verdicts[t]} for t in e.tests if verdicts[t]]
        result = {"number": n, "functions": list(e.functions), "points": e.points, "earned": 0 if red else e.points}
        results.append(result | {"red": red})
    return results


def waits_for(bad, number):
    """A red test of this exercise -> the exercise whose empty function it ran into, like "9: kl_k3", or None. That
    happens in a starter only: the instructor's copy puts its own text there."""
    other = re.search(r"exercise (\d+: \w+)", bad["error"])
    return other[1] if other and int(other[1].partition(":")[0]) != number else None


def show(results):
    for r in results:
        mark = "red  " if r["red"] else "green"
        print(f"{r['number']:2}  {mark}  {r['earned']:2} of {r['points']:2}  {', '.join(r['functions'])}")
        for bad in sorted(r["red"], key=lambda bad: waits_for(bad, r["number"]) is not None)[:1]:
            if other := waits_for(bad, r["number"]):
                print(f"      no mistake found so far; {bad['test']} waits for exercise {other}")
                continue
            print(f"      claim: {bad['claim']}\n      {bad['test']}: {bad['error']}")
            print(f"      hint: {EXERCISES[r['number'] - 1].hints[0]}")
    print(f"{sum(r['earned'] for r in results)} of {sum(r['points'] for r in results)} points")


# ----- A training run -----


def grade_run(folder, world_seed=None):
    """OUTPUT_DIR of a run in a tiny world, maybe the number of the world that it should be in -> list of (what is
    checked, why it fails or None)."""
    folder = Path(folder)
    try:
        config = asdict(Config()) | json.loads((folder / "config.json").read_text("utf-8"))
        wanted = json.loads(THRESHOLDS.read_text()).get(f"{config['preset']}/{config['algo']}", {})
        records, samples = (list(read_log(folder / file)) for file in ("metrics.jsonl", "samples.jsonl"))
        whole = [r["step"] for r in records] == list(range(config["steps"] + 1))
        reached = {name: float(records[-1].get(name, 0.0)) for name in wanted}
        shown, limit = {sample["question"] for sample in samples}, int(config["eval_limit"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise Mistake(f"{folder} is not the folder of a run: {error!r:.200}") from None
    if not wanted:
        raise Mistake(f"{folder} is a run for which {THRESHOLDS.name} has no bar")
    checks = [("every step is in the log, once", None if whole else "steps are missing, or out of order")]
    numbers = [value for r in records for value in r.values() if isinstance(value, (int, float))]
    checks.append(("all numbers are finite", None if all(map(math.isfinite, numbers)) else "NaN or infinity"))
    for name, bar in wanted.items():
        checks.append((f"{name} is at least {bar}", None if reached[name] >= bar else f"it is {reached[name]:.3f}"))
    for name in ("no_search", "no_mask", "shuffle_rewards"):
        checks.append((f"without --{name.replace('_', '-')}", "it is set" if config[name] else None))
    other = None if limit == Config.eval_limit else f"it is {limit}"
    checks.append((f"evaluated with --eval-limit {Config.eval_limit}", other))
    # The checkpoint answers its world's questions again: edited metrics do not survive this.
    checkpoint = folder / f"checkpoint-{config['steps']}"
    checks.append(("its last checkpoint is there", None if checkpoint.exists() else f"there is no {checkpoint}"))
    if not checkpoint.exists():
        return checks
    settings, about = data.load_settings(checkpoint)
    world_seed = config["world_seed"] if world_seed is None else world_seed
    saved = {config["world_seed"], about["world_seed"]}
    checks.append((f"it is of world {world_seed}", None if saved == {world_seed} else f"it says {sorted(saved)}"))
    policy, tokenizer = data.load_checkpoint(str(checkpoint))
    questions, engine, _ = data.task(config["world_seed"])
    foreign = shown - {q.text for q in questions} or not shown
    checks.append(("samples.jsonl has questions of this world", "it has others, or none" if foreign else None))
    asked = data.fixed_sample(questions, limit)
    again, _ = evaluate(policy, tokenizer, asked, engine.search, settings, "search-r1")
    for name in wanted:
        found = again[name.removeprefix("eval/")]
        why = None if abs(found - reached[name]) <= NOISE else f"{found:.3f}, the log has {reached[name]:.3f}"
        checks.append((f"the checkpoint gives {name}", why))
    return checks


def main(argv=None):
    parser = Parser(description="Grade a starter that a student has worked on, or a training run.")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="what course.assignment wrote, and a student's work")
    parser.add_argument("--exercises", default="", help="like 1-6 or 3,7-9 (default: all)")
    parser.add_argument("--run", metavar="RUN", help="the folder of a training run in a tiny world, instead")
    parser.add_argument("--world-seed", type=int, metavar="N", help="RUN should be in this student's world")
    parser.add_argument("--bughunt", metavar="SEED", help="DIR is the bug hunt of this seed")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON, for an autograder")
    parser.add_argument("--seconds", type=int, default=300, help="time limit of the tests (default: 300)")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.run):
        raise Mistake("give DIR, or --run RUN")
    if args.run and (args.exercises or args.bughunt) or args.bughunt and args.exercises:
        raise Mistake("--run, --bughunt and --exercises do not go together")
    if args.world_seed is not None and not args.run:
        raise Mistake("--world-seed goes with --run")
    if args.run:
        checks = grade_run(args.run, args.world_seed)
        results = [{"check": what, "wrong": why} for what, why in checks]
        print("\n".join(f"{'wrong' if why else 'fine '}  {what}{f': {why}' if why else ''}" for what, why in checks))
    elif not (Path(args.folder) / "searchr1.py").exists():
        raise Mistake(f"{args.folder} has no searchr1.py: give the folder that course.assignment wrote")
    elif args.bughunt:
        try:
            from course.mutants import grade_bughunt  # here: that file imports this one
        except ModuleNotFoundError:
            raise Mistake("only the instructor's copy can grade a bug hunt") from None
        results = grade_bughunt(args.folder, args.bughunt, args.seconds)
        for r in results:
            print(f"{'NOT mended' if r['red'] else 'mended    '}  {r['file']}: {r['lesson']}")
            if r["red"]:
                print(f"             {r['red']}")
    else:
        results = grade(args.folder, chosen(args.exercises), args.seconds)
        show(results)
    if args.json:
        with written_whole(args.json) as file:
            file.write(json.dumps(results, indent=1) + "\n")
    return int(any(r.get("wrong") or r.get("red") for r in results))


if __name__ == "__main__":
    run_main(main)
