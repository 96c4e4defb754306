"""Claims about the exercises: the starter, its grader, the grading of a run."""

import ast
import json
import re
from pathlib import Path

import pytest

import data
import train
from conftest import random_model
from course import assignment, exercises, grade, mutants, paper_map, transfer
from course.assignment import ROOT, emptied, find

SOURCE = '''
def outer(x, y=1):
    """What it does."""
    # a comment that tells the answer
    return x + y  # another


class A:
    def method(self):
        return 1


def last():
    """Stays."""
    return 3
'''


def refused(main, argv):
    with pytest.raises(data.Mistake) as error:
        main(argv)
    return str(error.value)


def test_every_exercise_has_a_function_a_test_and_three_hints():
    """Claim: what the table names exists: functions in the scripts, tests with a claim in tests/; no function twice.
    Fails if: a function or a test of an exercise is renamed.
    """
    assert len(exercises.EXERCISES) >= 12
    functions = [f for e in exercises.EXERCISES for f in e.functions]
    assert len(set(functions)) == len(functions)
    for e in exercises.EXERCISES:
        assert len(e.hints) == 3 and all(e.hints) and e.tests and e.points and e.minutes and e.read
        for function in e.functions:
            module, _, path = function.partition(".")
            assert find(ast.parse((ROOT / f"{module}.py").read_text()), path).body
        assert all(len(grade.claim_of(test)) > 20 for test in e.tests)


def test_an_emptied_function_keeps_its_signature_and_docstring_and_nothing_else():
    """Claim: body and comments go, in a method and without a docstring, too; the rest of the file stays as it is.
    Fails if: emptied begins at the first statement after the docstring, or leaves the last line of the body.
    """
    assert emptied(SOURCE, {"outer": 4, "A.method": 5}) == '''
def outer(x, y=1):
    """What it does."""
    raise NotImplementedError("exercise 4: outer")


class A:
    def method(self):
        raise NotImplementedError("exercise 5: method")


def last():
    """Stays."""
    return 3
'''
    with pytest.raises(data.Mistake, match="there is no A.other"):
        emptied(SOURCE, {"A.other": 1})


def test_a_starter_has_no_answers(tmp_path, monkeypatch):
    """Claim: every function of the chosen exercises raises, no other function does, all files compile; neither LOG.md
    nor the history is there, nor a test of what is left out. A folder that exists is left alone.
    Fails if: PARTS has LOG.md, or write_starter empties all exercises whatever is chosen, or keeps test_exercises.py.
    """
    monkeypatch.chdir(tmp_path)
    assignment.main(["s", "--exercises", "3,14"])
    empty = []
    for file in Path("s").glob("*.py"):
        compile(file.read_text(), str(file), "exec")
        empty += re.findall(r'raise NotImplementedError\("(exercise .*)"\)', file.read_text())
    assert sorted(empty) == ["exercise 14: gradient_kernel", "exercise 14: gradient_twin", "exercise 3: append"]
    assert not Path("s/LOG.md").exists() and not Path("s/.git").exists() and Path("s/AGENTS.md").exists()
    assert Path("s/tests/test_searchr1.py").exists() and not Path("s/tests/test_exercises.py").exists()
    assert "exists already" in refused(assignment.main, ["s"])
    assert "there is no 99, only 1 to 16" in refused(assignment.main, ["t", "--exercises", "1,99"])
    assert "give numbers" in refused(assignment.main, ["t", "--exercises", "x"])


def test_the_tests_run_on_the_students_functions_and_leave_nothing_behind(tmp_path, monkeypatch):
    """Claim: a right solution is green; a plausible wrong one (a mean over rows first, the trap of [D7]) is red, and so
    is what depends on it; an empty exercise that is not asked about is ours. The student's own tests do not count,
    their folder stays as it is.
    Fails if: run_tests copies the student's tests, or solved() keeps the student's text of the other exercises.
    """
    monkeypatch.chdir(tmp_path)
    assignment.main(["s", "--exercises", "1,5,6,8"])
    script, solution = Path("s/searchr1.py"), (ROOT / "searchr1.py").read_text()
    body = solution.partition("def whiten(x, mask):")[2].partition("\n\ndef ")[0]
    text = re.sub(r"(?s)(def whiten\(x, mask\):).*?(?=\n\ndef )", lambda m: m[1] + body, script.read_text())
    wrong = "return (x * mask).sum(-1).div(mask.sum(-1)).mean()"
    script.write_text(text.replace('raise NotImplementedError("exercise 5: token_mean")', wrong))
    for test in Path("s/tests").glob("test_*.py"):
        test.write_text("def test_the_first_complete_tag_pair_is_the_action(): pass\n")
    before = {file: file.read_bytes() for file in Path("s").rglob("*") if file.is_file()}
    assert [n for n in range(1, 17) if grade.unfinished("s", n)] == [1, 8]
    tests = [test for n in (1, 5, 6, 8, 11) for test in exercises.EXERCISES[n - 1].tests]
    verdicts = grade.run_tests("s", tests, 100, assignment.by_file([8, 11]))
    assert {test.partition("::")[2] for test, error in verdicts.items() if error} == {
        "test_the_first_complete_tag_pair_is_the_action",
        "test_the_policy_loss_is_a_mean_over_tokens_not_over_rollouts",
        "test_without_the_mask_retrieved_tokens_are_trained_and_the_prompt_is_not",
        "test_a_batch_or_an_episode_without_a_token_to_train_is_zero_and_not_nan",
    }
    assert "exercise 1: parse_action" in verdicts[tests[0]]
    assert {file: file.read_bytes() for file in Path("s").rglob("*") if file.is_file()} == before


def test_a_script_that_python_cannot_read_is_named_with_its_line(tmp_path, monkeypatch):
    """Claim: an exercise counts as empty while the starter's raise is its first statement; a solution written above the
    raise is tried. A script that does not parse is named with its line, without a test being run, and spoils no
    exercise of another script. A file that is no UTF-8 is one line; one that begins with Windows' mark is read. Of a
    function that is defined twice the last one counts.
    Fails if: unfinished takes any raise in the body, solved() keeps a broken script that holds none of the exercises
    that are graded, or looks one up that has no exercises (`.get(file, functions)`), run_tests does not look at
    does_not_parse, or find takes the first definition.
    """
    monkeypatch.chdir(tmp_path)
    assignment.main(["s", "--exercises", "1,5,13"])
    script, mean = Path("s/searchr1.py"), "torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp_min(1)"
    left = 'raise NotImplementedError("exercise 5: token_mean")'
    script.write_text(script.read_text().replace(left, f"return {mean}\n    {left}"))
    assert [n for n in range(1, 17) if grade.unfinished("s", n)] == [1, 13]
    broken = script.read_text().replace('raise NotImplementedError("exercise 1: parse_action")', "return Action(")
    script.write_text(broken)
    assert [n for n in range(1, 17) if grade.unfinished("s", n)] == [13]
    line = broken[: broken.index("return Action(\n")].count("\n") + 1
    verdicts = grade.run_tests("s", exercises.EXERCISES[0].tests, 0.01, assignment.by_file(range(2, 17)))
    assert list(verdicts.values()) == [f"searchr1.py line {line}: '(' was never closed"]
    functions = assignment.by_file(n for n in range(1, 17) if n != 13)["searchr1.py"]
    assert grade.solved("s", "searchr1.py", functions) == (ROOT / "searchr1.py").read_text()
    assert grade.solved("s", "searchr1.py", ["gae"]) == broken
    Path("s/train.py").write_text("def train(:\n")
    assert grade.solved("s", "train.py", ["update"]) == (ROOT / "train.py").read_text()
    twice = (ROOT / "searchr1.py").read_text() + "\n\ndef whiten(x, mask):\n    return x\n\x0c\n"
    script.write_bytes(b"\xef\xbb\xbf" + twice.replace("return x\n", f"{left}\n").replace("5", "6").encode())
    assert grade.unfinished("s", 6)
    assert grade.solved("s", "searchr1.py", ["whiten"]).endswith("rsqrt(variance + 1e-8)\n\x0c\n")
    script.write_bytes(b"# caf\xe9\n")
    assert "searchr1.py is not UTF-8 text" in refused(grade.main, ["s"])


def test_in_a_starter_a_test_waits_for_an_exercise_that_is_empty(capsys):
    """Claim: where the only red tests meet another exercise's empty function, that one is named, and neither claim nor
    hint blames the student; a mistake of their own comes first.
    Fails if: waits_for does not compare the numbers, or show takes the first red test whatever it says.
    """
    waiting = {"test": "test_x.py::test_a", "claim": "one", "error": "NotImplementedError: exercise 9: kl_k3"}
    own = {"test": "test_x.py::test_b", "claim": "two", "error": "assert 1 == 2"}
    result = {"number": 3, "functions": ["f"], "points": 4, "earned": 0}
    grade.show([result | {"red": [waiting]}])
    out = capsys.readouterr().out
    assert "test_x.py::test_a waits for exercise 9: kl_k3" in out and "claim" not in out and "hint" not in out
    grade.show([result | {"red": [waiting, own]}])
    assert "claim: two" in capsys.readouterr().out
    grade.show([result | {"number": 9, "red": [waiting]}])
    assert "claim: one" in capsys.readouterr().out


def test_one_wrong_exercise_does_not_spoil_another(tmp_path, monkeypatch, capsys):
    """Claim: what is red among the student's own functions is run again with all the others ours, and that counts. What
    is empty earns nothing and runs nothing. The claim and the first hint are printed for what is red.
    Fails if: grade keeps the verdict of the common run, or runs an empty exercise.
    """
    monkeypatch.chdir(tmp_path)
    assignment.main(["s", "--exercises", "1"])
    runs, wrong = [], exercises.EXERCISES[4].tests[0]  # of exercise 5, which exercise 10 needs, too

    def fake(folder, tests, seconds, ours):
        others = sorted({number for functions in ours.values() for number in functions.values()})
        runs.append((len(tests), others))
        return {test: "wrong" if test == wrong and 5 not in others else None for test in tests}

    monkeypatch.setattr(grade, "run_tests", fake)
    assert grade.main(["s", "--exercises", "1,5,6,10", "--json", "points.json"]) == 1
    results = json.loads(Path("points.json").read_text())
    assert [(r["number"], r["earned"]) for r in results] == [(1, 0), (5, 0), (6, 4), (10, 6)]
    everything = range(1, 17)
    assert runs == [(6, [1]), (3, [n for n in everything if n != 5]), (3, [n for n in everything if n != 10])]
    out = capsys.readouterr().out
    assert "it is still empty" in out and "10 of 15 points" in out
    assert f"claim: {grade.claim_of(wrong)}" in out and "hint: A long rollout has more to say" in out


def test_an_import_that_fails_is_shown_with_its_name(tmp_path):
    """Claim: where a student's script cannot be imported, the verdict on a test is the last line of the error.
    Fails if: run_tests takes pytest's message, "collection failure", for every such error.
    """
    for file, number in (("retrieval.py", 13), ("models.py", 12)):  # conftest.py imports the first, the tests both
        (tmp_path / file).write_text("import nump\n" + (ROOT / file).read_text())
        verdicts = grade.run_tests(tmp_path, exercises.EXERCISES[number - 1].tests, 100)
        assert set(verdicts.values()) == {"ModuleNotFoundError: No module named 'nump'"}
        (tmp_path / file).unlink()


def test_a_hanging_solution_is_killed(tmp_path, monkeypatch):
    """Claim: tests that are not done in time have failed, and the message says so.
    Fails if: the process gets no time limit.
    """
    verdicts = grade.run_tests(ROOT, [grade.EXERCISES[0].tests[0]], seconds=0.05)
    assert list(verdicts.values()) == ["not done after 0.05 seconds"]


def test_every_mutant_changes_a_line_that_exists_and_has_a_test():
    """Claim: at least 25; each changes one place, in a function, of a file that compiles afterwards, with and without
    the comments on that line, and names a test that exists. No comment is part of the change.
    Fails if: a line that a mutant changes is written in another way, or with_mistake leaves half of a comment.
    """
    assert len(mutants.MUTANTS) >= 25
    for mutant in mutants.MUTANTS:
        compile(mutants.mutated(mutant), mutant.file, "exec")
        text = (ROOT / mutant.file).read_text()
        compile(mutants.with_mistake(mutant, text), mutant.file, "exec")
        assert "#" not in mutant.old + mutant.new
        assert mutant.old in ast.get_source_segment(text, find(ast.parse(text), mutants.place(mutant)[1]))
        assert grade.claim_of(mutant.test) and mutant.lesson
    assert "there is no 99" in refused(mutants.main, ["--only", "99"])


def test_a_bug_hunt_plants_three_mistakes_and_hides_what_knows_them(tmp_path, monkeypatch, capsys):
    """Claim: the three belong to three tests and two files, show in a run, and depend on the seed; the folder has all
    three and a handout, but neither tests, nor the list of mutants, nor a comment that tells. The check says which are
    mended, each with our functions in place of the other two, and refuses another seed.
    Fails if: planted draws from all mutants at once, write_bughunt leaves a test or a comment above in place, or
    grade_bughunt tests all three together (`!= own` -> `== own`), or does not look at the mark.
    """
    monkeypatch.chdir(tmp_path)
    assert len({tuple(mutants.planted(i)) for i in range(20)}) > 15 and mutants.planted(3) == mutants.planted(3)
    assert all(len({bug.test for bug in mutants.planted(i)}) == 3 for i in range(20))
    assert all(len({bug.file for bug in mutants.planted(i)}) == 2 for i in range(20))
    assert not {bug.old for i in range(99) for bug in mutants.planted(i)} & set(mutants.QUIET)
    assignment.main(["bughunt", "hunt", "--seed", "ada"])
    bugs = mutants.planted("ada")
    for bug in bugs:
        before, new, after = Path("hunt", bug.file).read_text().rpartition(bug.new)
        assert new and bug.old not in before + after and "#" not in before.split("\n")[-2] + after.split("\n")[0]
    assert "tests/test_hunt.py" in Path("hunt/HUNT.md").read_text()
    mutants.write_bughunt("other", "karl")  # among his: the KL with a minus, under a comment that says PLUS
    told = Path("other/train.py").read_text()
    assert "loss = loss - config.kl_coef" in told and "PLUS in a loss" not in told
    assert [file.name for file in Path("hunt/tests").glob("*test*.py")] == ["conftest.py"]
    assert not Path("hunt/course/mutants.py").exists() and not Path("hunt/LOG.md").exists()
    ours = []

    def red(folder, tests, seconds, functions):
        ours.append((tests, sorted((file, f) for file in functions for f in functions[file])))
        return {t: "red" if t == bugs[1].test else None for t in tests}

    monkeypatch.setattr(mutants, "run_tests", red)
    assert grade.main(["hunt", "--bughunt", "ada"]) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.startswith("NOT mended") for line in lines] == [False, True, False, False]
    assert lines[2].endswith(" red")
    assert "do not go together" in refused(grade.main, ["hunt", "--bughunt", "ada", "--exercises", "1"])
    others = lambda i: sorted(mutants.place(bug) for k, bug in enumerate(bugs) if k != i)
    assert ours == [([bug.test], others(i)) for i, bug in enumerate(bugs)]
    assert "is not of the bug hunt with the seed Ada" in refused(grade.main, ["hunt", "--bughunt", "Ada"])


def test_a_copied_or_edited_run_is_recognised(tmp_path, monkeypatch, tokenizer, world, engine):
    """Claim: a run passes whose log is whole, reaches the bar on as many questions as by default, and whose checkpoint
    answers its world's questions as the log says. Better numbers in the log, a missing step, a run that ended early,
    one judged on few questions, another world's checkpoint or whole run, and conversations about another world's
    questions are named. Files that hold something else are one line.
    Fails if: grade_run compares the log with itself, or does not look at eval_limit, at samples.jsonl, or at one of the
    three worlds, or catches no TypeError.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "task", lambda seed: (world.test, engine, world))
    monkeypatch.setattr(grade, "THRESHOLDS", Path("bar.json"))
    Path("bar.json").write_text('{"tiny/grpo": {"eval/em_1hop": 0.0, "eval/em_2hop": 0.0}}')
    monkeypatch.setattr(train.Config, "eval_limit", 8)
    config = train.parse_config(["--steps", "2", "--eval-limit", "8", "--output-dir", "run"])
    model, ck = random_model(tokenizer), Path("run/checkpoint-2")
    model.save_pretrained(ck), tokenizer.save_pretrained(ck)
    settings = {"world_seed": 0, "method": "search-r1"} | vars(data.TINY_SETTINGS)
    Path(ck, "search_r1.json").write_text(json.dumps(settings))
    Path("run/config.json").write_text(json.dumps(vars(config)))
    sample = json.dumps({"step": 0, "question": world.test[0].text}) + "\n"
    Path("run/samples.jsonl").write_text(sample)

    def graded(em=0.0, steps=(0, 1, 2)):
        lines = [{"step": s, "eval/em_1hop": em, "eval/em_2hop": 0.0} for s in steps]
        Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [what for what, why in grade.grade_run("run", world_seed) if why]

    world_seed = None
    assert graded() == []
    world_seed = 4711
    assert graded() == ["it is of world 4711"]
    world_seed = 0
    assert graded() == []
    assert graded(em=1.0) == ["the checkpoint gives eval/em_1hop"]
    assert graded(em="nan") == ["eval/em_1hop is at least 0.0", "the checkpoint gives eval/em_1hop"]
    assert graded(steps=(0, 2)) == ["every step is in the log, once"]
    Path("run/samples.jsonl").write_text(sample.replace(world.test[0].text, world.train[0].text))
    assert graded() == ["samples.jsonl has questions of this world"]
    Path("run/samples.jsonl").write_text(sample)
    Path("bar.json").write_text('{"tiny/grpo": {"eval/em_1hop": 0.95}}')
    assert graded() == ["eval/em_1hop is at least 0.95"]
    Path(ck, "search_r1.json").write_text(json.dumps(settings | {"world_seed": 5}))
    assert "it is of world 0" in graded()
    Path("run/config.json").write_text(json.dumps(vars(config) | {"eval_limit": 2, "steps": 9}))
    assert {"evaluated with --eval-limit 8", "its last checkpoint is there"} < set(graded())
    for text in ("[]", "{", '{"steps": "9"}'):
        Path("run/config.json").write_text(text)
        assert "is not the folder of a run" in refused(grade.main, ["--run", "run"])
    assert "is not the folder of a run" in refused(grade.main, ["--run", "nowhere"])
    assert "do not go together" in refused(grade.main, ["--run", "nowhere", "--bughunt", "ada"])


# ----- The map -----


def test_every_equation_line_and_departure_is_cited_where_it_happens(capsys):
    """Claim: no tag is unknown. Each equation, each line of Algorithm 1 and each departure has a tag at its place,
    apart from the list of departures at the top of a file, and each departure is defined once.
    Fails if: the last tag of an equation, line or departure goes, one is misspelled, or a departure is only listed.
    """
    tags = paper_map.tags()
    assert {tag for tag, *_ in tags} <= set(paper_map.KNOWN)
    cited = {tag for tag, *_, defines in tags if not defines}
    assert cited >= {tag for tag in paper_map.KNOWN if tag[:3] in ("Eq.", "Alg") or tag[0] == "D"}
    assert sorted(tag for tag, *_, defines in tags if defines) == sorted(f"D{n}" for n in range(1, 19))
    paper_map.main(["Eq. 4", "D14"])
    out = capsys.readouterr().out
    assert re.search(r"^Eq\. 4 +searchr1\.py:\d+ +outcome_reward$", out, re.MULTILINE)
    assert re.search(r"^D14 +models\.py:\d+ +Adapted$", out, re.MULTILINE)
    assert "'Eq. 9' is none of" in refused(paper_map.main, ["Eq. 9"])


# ----- What was learned -----


def test_questions_far_from_training_have_the_right_answers(tokenizer, world, capsys, tmp_path, monkeypatch):
    """Claim: reworded questions are training facts in other words; a three-hop answer is where three facts lead, and no
    entity of the question; the table has five rows, the last without columns for two hops.
    Fails if: reworded keeps a training question's text, or three_hops looks the third fact up under another entity.
    """
    trained = {q.path: q for q in world.train}
    other = transfer.reworded(world)
    assert len(other) > 1000
    assert all(trained[q.path].gold_answers == q.gold_answers and trained[q.path].text != q.text for q in other)
    chains = transfer.three_hops(world)
    assert len(chains) > 1000
    for q in chains:
        entity = q.path[0]
        for relation in q.path[1:]:
            entity = world.facts[relation, entity]
        assert (entity,) == q.gold_answers and q.hops == 3 and entity not in q.text.split()
    monkeypatch.chdir(tmp_path)
    random_model(tokenizer).save_pretrained("ck"), tokenizer.save_pretrained("ck")
    transfer.main(["ck", "--limit", "4"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows[1:6]] == [
        "training questions", "reworded", "held out", "another world", "three hops"
    ]  # fmt: skip
    assert len(rows[5].split()) == 5 and len(rows[4].split()) == 7
    assert "cannot be negative" in refused(transfer.main, ["ck", "--limit", "-1"])
