"""Evaluation: the methods of the paper's Table 2 side by side, a conversation while it is held, the curves of a run.

Decoding is greedy unless asked otherwise. [The official script sets a flag for it, which never reaches the sampler.]
Every question counts. [The official loader drops the last, incomplete batch.] Hops are also reported separately.

    1. metrics            scores_of, mean_scores, bootstrap_interval
    2. METHODS            the rows of Table 2, a conversation each: a generator, as searchr1.converse
    3. evaluate           a method over a list of questions -> metrics
    4. the comparison     methods x sets, kept batch by batch: a killed comparison goes on where it was
    5. curves             metrics.jsonl of one or several runs -> one picture
    6. ask, chat          a conversation, in colour, while it is held

Departures from the paper (of its baselines, the official repository has R1 and a RAG prompt that asks for reasoning):
  [D15] The paper prints no prompt for these baselines; ours follow its style: the question in the official form, the
        answer in the official tags. The prompt ends with the first tag, and an end of sequence closes an answer, too.
  [D16] Search-o1: the call that reads the passages sees them and the query, not the thoughts so far.

    python eval.py --checkpoint outputs/run-1                                all held-out questions of its world
    python eval.py --checkpoint DIR --method rag ircot search-r1 --data all --corpus wiki18 --limit 500
    python eval.py --checkpoint outputs/run-1 --ask "who is the mayor of zidoton?"
    python eval.py --plot outputs/run-1 outputs/run-2
"""

import hashlib
import itertools
import json
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import engine
from data import Mistake, Parser, fixed_sample, load_checkpoint, load_settings, run_main, task
from retrieval import Passage, whole_characters, written_whole
from searchr1 import (HARMLESS, Rollout, Settings, begin, check_format, converse, f1_score, format_passages,
    holds_gold, make_prompt, normalize_answer, observation_ids, outcome_reward, paint, parts, policy_view, prompt_ids,
    transcript, turn_ended)  # fmt: skip

# ----- 1. Metrics -----

def sub_exact_match(prediction, gold_answers):
    """1.0 if any gold answer, normalised, is part of the normalised prediction, else 0.0; a metric, never a reward. As
    in the official code, a gold answer that normalises to nothing is part of everything."""
    return float(any(normalize_answer(gold) in normalize_answer(prediction) for gold in gold_answers))

def scores_of(r, method):
    """What is measured of one Rollout that carries its Question: numbers and truth values by name."""
    gold_answers = r.question.gold_answers
    scores = {
        "em": outcome_reward(r.answer, gold_answers), "f1": f1_score(r.answer or "", gold_answers),
        "sub_em": sub_exact_match(r.answer, gold_answers) if r.answer is not None else 0.0,
        "hit": holds_gold(r.found, gold_answers), "searches": r.num_searches, "turns": len(r.turns),
        "finished": r.finished, "response_tokens": sum(r.response_mask),
    }  # fmt: skip
    return scores | ({"valid_format": check_format(policy_view(r))[0]} if method in WITH_FORMAT else {})

def mean_scores(scores, hops):
    """Scores of questions (dicts: em, searches, what else scores_of gives) and the questions' hops -> metrics: em, f1,
    sub_em; hit (share for which a gold answer was among the passages found); searches (executed), turns (calls of the
    model), response_tokens (all that it wrote), each a question; finished (share); valid_format where the method writes
    Search-R1's format; with hops known also em_1hop, em_2hop, searches_1hop, searches_2hop."""
    mean = lambda name, chosen: sum(s[name] for s in chosen) / len(chosen)
    names = ("em", "f1", "sub_em", "hit", "searches", "turns", "finished", "valid_format", "response_tokens")
    metrics = {name: mean(name, scores) for name in names if name in scores[0]}
    for of in sorted(set(hops) - {0}):
        chosen = [s for s, h in zip(scores, hops) if h == of]
        metrics |= {f"em_{of}hop": mean("em", chosen), f"searches_{of}hop": mean("searches", chosen)}
    return metrics

def bootstrap_interval(values, samples=2000):
    """Numbers, one a question -> (low, high): the 95 % interval of their mean, from draws with replacement."""
    values_n, rng = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(len(values), (len(values),), generator=rng)
    means = torch.stack([values_n[draw()].mean() for _ in range(samples)])
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())

# ----- 2. The methods of the paper (Table 2, Sec. 4) -----
# A method is a generator as engine.Talk takes it, over an empty Rollout r that holds its question: method(r, tokenizer,
# settings, ends). In the end r records all calls of the model; prompts (ours [D15]) have mask False.

THE_ANSWER = ("the answer and nothing else inside <answer> and </answer>, for example <answer> Beijing </answer>. "
              "Question: {question}")  # fmt: skip
DIRECT = "Answer the given question from what you know. Write " + THE_ANSWER + "\n"
COT = ("Answer the given question from what you know. Think step by step inside <think> and </think>. "
       "Then write " + THE_ANSWER + "\n")  # fmt: skip
RAG = ("Answer the given question with the help of the given passages, which may or may not be useful. "
       "Write " + THE_ANSWER + " Context: {context}\n")  # fmt: skip
IRCOT = ("Answer the given question step by step with the help of the given passages, which may or may not be useful. "
         "Write one short thought at a time, each inside <think> and </think>; passages about it will be added. Once "
         "you know the answer, end your thought with it like this: So the answer is: Beijing. Question: {question} "
         "Context: {context}\n")  # fmt: skip
NOTES = ("Read the given passages and write down, inside <answer> and </answer>, what in them helps with the given "
         "question, as short as you can. If nothing does, write that there is no helpful information. "
         "Question: {question} Context: {context}\n")  # fmt: skip
NO_NOTES = "There is no helpful information."
SAYS_ANSWER = "So the answer is:"
PASSAGES = "@@passages@@"  # a placeholder in the prompt: here the ids of the passages go in

def reading_ids(question, tokenizer, template, start="", passages=(), settings=Settings(), searches=1):
    """A question in a template of {question} and maybe {context} -> ids of the prompt and of `start`, with which the
    model's message begins. Passages are encoded separately, so that a special token spelled in them stays text. They
    get at most max_obs_length tokens for each of `searches`, and leave room for an answer."""
    plain = not getattr(tokenizer, "chat_template", None)  # [D13]
    text = make_prompt(question, tokenizer, template=template, context=PASSAGES) + start
    head, _, tail = text.rpartition(PASSAGES)  # without passages all is tail
    head, tail = tokenizer(head, add_special_tokens=plain)["input_ids"], text_ids(tail, tokenizer)
    room = settings.max_length - settings.max_new_tokens - len(head) - len(tail)
    budget = max(0, min(searches * settings.max_obs_length, room))
    return head + observation_ids(tokenizer, format_passages(passages), budget) + tail

def text_ids(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def complete(r, ids, tag, tokenizer, settings, ends):
    """One call of the model on a prompt of its own: it writes until `tag`, an end of sequence, or the end of its budget
    -> the call, a Rollout. turns[0]: the text before the tag; finished: the budget did not end it; answer: turns[0]
    after its last "<answer>", which some models write once more although the prompt has ended with it."""
    call = begin(r.question, ids, settings)
    limit = min(len(ids) + settings.max_new_tokens, settings.max_length)
    while True:
        token, logprob = yield call
        call.append([token], [logprob])
        if turn_ended(call.ids, call.prompt_length, limit, tokenizer, ends, (tag,)):
            break
    text = tokenizer.decode([i for i in call.ids[call.prompt_length :] if i not in ends])
    call.turns, call.finished = [text.partition(tag)[0]], tag in text or call.ids[-1] in ends
    call.answer = call.turns[0].rpartition("<answer>")[2].strip()
    return call

def written_ids(call, tag, tokenizer, ends):
    """The ids that were sampled in a call, for a later call to continue: no end of sequence, and always with `tag`."""
    ids = [i for i in call.ids[call.prompt_length :] if i not in ends]
    return ids if tag in tokenizer.decode(ids) else ids + text_ids(tag, tokenizer)

def finish(r, calls, prompt, tokenizer, settings, ends):
    """The last call of the model writes the answer; if the budget ends it, there is none. All calls go into r."""
    call = yield from complete(r, prompt, "</answer>", tokenizer, settings, ends)
    r.answer, r.finished = call.answer if call.finished else None, call.finished
    join(r, [*calls, call])

def join(r, calls):
    """Append all calls of the model to their record r. One that goes on where the last one ended adds only the rest."""
    for last, call in zip(calls[:1] + calls, calls):  # the first is paired with itself: it starts at 0
        common = len(os.path.commonprefix([last.ids, call.ids[: call.prompt_length]]))  # it compares any two lists
        start = common if last.prompt_length <= common and last.prompt_length < call.prompt_length else 0
        r.prompt_length = r.prompt_length or call.prompt_length
        r.ids += call.ids[start:]
        r.response_mask += call.response_mask[start:]
        r.logprobs += call.logprobs[start:]
        r.turns += call.turns

def direct(r, tokenizer, settings, ends):
    """The answer at once, from what the weights know. SFT trains on this prompt."""
    yield from finish(r, [], reading_ids(r.question.text, tokenizer, DIRECT, "<answer>"), tokenizer, settings, ends)

def cot(r, tokenizer, settings, ends):
    """[Wei et al. 2022] Chain of thought: thinking, until its budget ends it, then the answer."""
    prompt = reading_ids(r.question.text, tokenizer, COT, "<think>")
    thought = yield from complete(r, prompt, "</think>", tokenizer, settings, ends)
    prompt = prompt + written_ids(thought, "</think>", tokenizer, ends) + text_ids("<answer>", tokenizer)
    if len(prompt) < settings.max_length:
        yield from finish(r, [thought], prompt, tokenizer, settings, ends)
    else:  # the thought took all the room
        join(r, [thought])

def ircot(r, tokenizer, settings, ends):
    """[Trivedi et al. 2023] Interleaved retrieval and chain of thought: each thought is the next query, and its
    passages join those found before. Questions still unanswered after max_turns thoughts go to the reader, the prompt
    of RAG over all passages, like the separate reader of the IRCoT paper."""
    query, shown = r.question.text, {}  # shown: the union of what was found, by id; top_k * (max_turns + 1) at most
    calls, thoughts, opened = [], [], text_ids("<think>", tokenizer)  # thoughts: ids of all so far, each in its tags
    for turn in range(settings.max_turns + 1):
        r.found.append((yield query))
        r.searches.append(query)
        shown |= {p.id: p for p in r.found[-1]}
        left = replace(settings, max_length=settings.max_length - len(thoughts) - len(opened))
        prompt = reading_ids(r.question.text, tokenizer, IRCOT, "", shown.values(), left, turn + 1)
        if turn == settings.max_turns or len(prompt) + settings.max_new_tokens > left.max_length:
            break  # no more thoughts, or no more room for one
        calls.append((yield from complete(r, prompt + thoughts + opened, "</think>", tokenizer, settings, ends)))
        thoughts += opened + written_ids(calls[-1], "</think>", tokenizer, ends)
        thought, said, answer = calls[-1].turns[0].partition(SAYS_ANSWER)
        if said and calls[-1].finished:
            r.answer, r.finished = answer.strip().removesuffix(".").strip(), True
            return join(r, calls)
        query = thought.strip()
    prompt = reading_ids(r.question.text, tokenizer, RAG, "<answer>", shown.values(), settings, len(r.searches))
    yield from finish(r, calls, prompt, tokenizer, settings, ends)

def search_o1(r, tokenizer, settings, ends):
    """[Li et al. 2025] Search-R1's conversation without its training, in which the model never reads a raw passage. A
    separate call reads what a query found and writes a note (its paper's Reason-in-Documents), which comes back as the
    only passage [D16]. `found` holds the raw passages; ids and turns of the notes follow those of the conversation."""
    talk, notes, raw = engine.Talk(0, r, search_r1(r, tokenizer, settings, ends)), [], []
    while not talk.done:
        given = yield talk.query
        if talk.query is not None:  # these are its passages
            raw.append(given)
            prompt, note = reading_ids(talk.query, tokenizer, NOTES, "<answer>", given, settings), ""
            if len(prompt) < settings.max_length:  # else the query alone leaves no room for notes
                notes.append((yield from complete(r, prompt, "</answer>", tokenizer, settings, ends)))
                note = notes[-1].answer.removesuffix(".")
            given = [Passage(str(len(raw)), "Notes", f"{talk.query}: {note}." if note else NO_NOTES)]
        talk.advance(given)
    r.found = [passages and raw.pop(0) for passages in r.found]
    join(r, notes)

def rag(r, tokenizer, settings, ends):
    """[Lewis et al. 2020] RAG, as FlashRAG's naive RAG: one search with the question, then the answer at once."""
    r.searches, r.found = [r.question.text], [(yield r.question.text)]
    prompt = reading_ids(r.question.text, tokenizer, RAG, "<answer>", r.found[0], settings)
    yield from finish(r, [], prompt, tokenizer, settings, ends)

def search_r1(r, tokenizer, settings, ends):
    """[Algorithm 1] The conversation as the policy was trained, from the official prompt on."""
    r.append(begin(r.question, prompt_ids(r.question, tokenizer, settings), settings).ids)
    r.prompt_length = len(r.ids)
    yield from converse(r, tokenizer, settings, ends)

def r1(r, tokenizer, settings, ends):
    """[DeepSeek-AI 2025] A policy of train.py --no-search: the official prompt without search, one turn."""
    yield from search_r1(r, tokenizer, replace(settings, do_search=False), ends)

METHODS = {  # in the order of the paper's table; sft, rejection: checkpoints of train.py --algo sft, --algo rejection
    "direct": direct, "cot": cot, "ircot": ircot, "search-o1": search_o1, "rag": rag,
    "sft": direct, "r1": r1, "rejection": search_r1, "search-r1": search_r1,
}  # fmt: skip
WITHOUT_SEARCH = ("direct", "cot", "sft", "r1")  # these need no passages
WITH_FORMAT = ("search-o1", "r1", "rejection", "search-r1")  # what they write is meant to be check_format's language

# ----- 3. A method over many questions -----

def answer(policy, tokenizer, questions, search, settings, method, temperature, generator, slots, bar):
    """Answer each question by a method of METHODS, all at once -> list of Rollouts in the order of the questions."""
    ends, rollouts = engine.end_ids(policy, tokenizer), [Rollout(question, [], [], [], 0) for question in questions]

    def conversation(r):
        yield from METHODS[method](r, tokenizer, settings, ends)
        bar.update()

    conversations = [(r, conversation(r)) for r in rollouts]
    find = lambda queries: search(queries, settings.top_k)
    engine.run(policy, conversations, find, settings.max_length, 1, temperature, generator, slots)
    return rollouts

def evaluate(policy, tokenizer, questions, search, settings, method, temperature=0.0, generator=None, slots=None):
    """Answer every Question once -> (metrics as in mean_scores, Rollouts in the order of the questions)."""
    with tqdm(total=len(questions), desc="evaluation", leave=False, delay=5) as bar:  # shown after 5 s
        rollouts = answer(policy, tokenizer, questions, search, settings, method, temperature, generator, slots, bar)
    return mean_scores([scores_of(r, method) for r in rollouts], [q.hops for q in questions]), rollouts

# ----- 4. The comparison: methods x sets, kept batch by batch -----

KEPT = 64  # questions that are answered, and then kept, together: what a killed comparison loses at most

def question_sets(specs):
    """--data -> ({name as given: list of Questions}, their files); "all" is the seven sets of the paper."""
    names = dict.fromkeys(name for spec in specs for name in (data.DATASETS if spec == "all" else [spec]))
    files = [file for name in names for file in data.question_files(name, "eval")]
    return {name: data.load_data(name, "eval") for name in names}, files

def kept(path, config):
    """FILE of --json -> the records that FILE has of this very comparison, or that FILE.part has (a batch a line). A
    half-written last line is cut off. Mistake for a file of another comparison."""
    file = Path(path) if Path(path).exists() else Path(f"{path}.part")
    if not file.exists():
        return []
    whole, end, _ = file.read_bytes().rpartition(b"\n")
    try:
        pieces = [json.loads(piece) for piece in ([whole] if file == Path(path) else whole.splitlines())]
        differ = {name for piece in pieces for name in config if piece["config"].get(name) != config[name]}
        records = [record for piece in pieces for record in piece["records"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Mistake(f"{file} is there and was not written by this script: give another --json") from None
    if differ:
        raise Mistake(f"{file} is of another comparison: {', '.join(sorted(differ))} differ; give another --json FILE")
    os.truncate(file, len(whole + end))
    return records

def make_record(r, tokenizer, method, name, position):
    """One answered question as --json and samples.jsonl keep it."""
    return {
        "method": method, "data": name, "position": position, "id": r.question.id, "question": r.question.text,
        "golden_answers": list(r.question.gold_answers), "hops": r.question.hops, "answer": r.answer,
        **scores_of(r, method), "queries": r.searches, "prompt": tokenizer.decode(r.ids[: r.prompt_length]),
        "transcript": transcript(r, tokenizer),
    }  # fmt: skip

def compare(args, methods, sets, settings, about, load):
    """The comparison that the command line asks for: every method on every set -> (metrics, intervals of em and f1),
    both {method: {set: {name: value}}}. With --json each batch of records is added to FILE.part, and a comparison that
    was killed asks only what has no record there. load() -> policy, tokenizer, search. At the end FILE has it all."""
    config = {
        "checkpoint": args.checkpoint, "methods": methods, "data": list(sets), "limit": args.limit,
        "temperature": args.temperature, "dtype": args.dtype, "settings": asdict(settings), "trained": about,
        "questions": {name: hashlib.sha256(repr(of).encode()).hexdigest()[:16] for name, of in sets.items()},
    }  # fmt: skip
    part = Path(f"{args.json}.part")
    records = kept(args.json, config) if args.json else []
    done = {(r["method"], r["data"], r["position"]) for r in records}
    batches = [(method, name, at) for method in methods for name in sets for at in range(0, len(sets[name]), KEPT)]
    if todo := [batch for batch in batches if batch not in done]:  # known by its first question
        policy, tokenizer, search = load()
        slots = engine.Slots(policy, engine.slots_for(policy, KEPT, settings.max_length), settings.max_length)
    with tqdm(initial=len(records), total=len(methods) * sum(map(len, sets.values())), unit=" questions") as bar:
        for method, name, at in todo:
            generator = torch.Generator(policy.device).manual_seed(at)  # a comparison that goes on draws the same
            asked, how = sets[name][at : at + KEPT], (settings, method, args.temperature, generator, slots, bar)
            rollouts = answer(policy, tokenizer, asked, search, *how)
            batch = [make_record(r, tokenizer, method, name, at + i) for i, r in enumerate(rollouts)]
            records += batch
            if args.json:
                with open(part, "a") as lines:
                    lines.write(json.dumps({"config": config, "records": batch}) + "\n")
    metrics, intervals = {}, {}
    for (method, name), of in itertools.groupby(records, lambda r: (r["method"], r["data"])):
        of = list(of)
        metrics.setdefault(method, {})[name] = mean_scores(of, [r["hops"] for r in of])
        intervals.setdefault(method, {})[name] = {k: list(bootstrap_interval([r[k] for r in of])) for k in ("em", "f1")}
    if args.json:
        content = {"metrics": metrics, "intervals": intervals, "config": config, "records": records}
        with written_whole(args.json) as file:
            file.write(json.dumps(content, indent=1) + "\n")
        part.unlink(missing_ok=True)
    return metrics, intervals

def aligned(rows):
    """Rows of cells -> lines: the first cell to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = lambda row: (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
    return "\n".join("  ".join(cells(row)).rstrip() for row in rows)

def comparison_table(metrics, intervals):
    """What compare() gives -> text. For several sets: exact match, a row a method, a column a set, and the plain mean.
    Then all metrics: a row for each method on each set; if there is only one, a row a metric. "-": it has none."""
    sets = list(next(iter(metrics.values())))
    matrix = [["EM", *sets, "average"]]
    for method, of in metrics.items():
        em = [of[name]["em"] for name in sets]
        matrix.append([method, *(f"{value:.3f}" for value in (*em, sum(em) / len(em)))])
    keys = list(dict.fromkeys(key for of in metrics.values() for m in of.values() for key in m))
    rows = [["", *(f"{key}, 95 %" if key in ("em", "f1") else key for key in keys)]]
    for method, name in itertools.product(metrics, sets):
        cells = [f"{metrics[method][name][key]:.3f}" if key in metrics[method][name] else "-" for key in keys]
        for key, (low, high) in intervals[method][name].items():
            cells[keys.index(key)] += f" ({low:.3f} to {high:.3f})"
        rows.append([f"{method}, {name}" if len(sets) > 1 else method, *cells])
    if len(rows) == 2:
        return aligned(list(zip(*rows)))
    return f"{aligned(matrix)}\n\n{aligned(rows)}" if len(sets) > 1 else aligned(rows)

# ----- 5. Curves -----

CURVES = [  # title, metric, unit; a panel each, if there are points
    ("held-out EM, one hop (greedy)", "eval/em_1hop", "share of questions"),
    ("held-out EM, two hops (greedy)", "eval/em_2hop", "share of questions"),
    ("held-out EM (greedy)", "eval/em", "share of questions"),
    ("training reward (sampled)", "reward/mean", "mean reward"),
    ("searches, one hop (greedy, held out)", "eval/searches_1hop", "searches a question"),
    ("searches, two hops (greedy, held out)", "eval/searches_2hop", "searches a question"),
    ("searches (greedy, held out)", "eval/searches", "searches a question"),
    ("response length (sampled)", "response_length/mean", "tokens, passages included"),
    ("KL to the base model", "kl", "nats a token"),
    ("entropy of the policy", "entropy", "nats a token"),
]
PICTURES = (".png", ".pdf", ".svg")
LOOKS = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]  # so that a print without colours tells runs apart

def read_runs(folders):
    """Folders of runs -> {name of the run (its path if the name is taken): its records, dicts with a step}."""
    runs = {}
    for folder in map(Path, folders):
        if not (folder / "metrics.jsonl").exists():
            raise Mistake(f"{folder} is not the folder of a run: it has no metrics.jsonl")
        name = folder.absolute().name
        runs[str(folder) if name in runs else name] = list(read_log(folder / "metrics.jsonl"))
    return runs

def read_log(file):
    """Yield the records of JSON lines. Half a line at the end is left out: the run is writing it, or was killed."""
    with open(file) as lines:  # one by one: the log of a long run takes megabytes
        try:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))
        except ValueError as error:
            raise Mistake(f"{file} has a line that is no JSON: {error}") from None

def curve(members, name):
    """Records of one or several runs -> list of (step, mean, lowest, highest) of a metric, at steps that all of them
    have; [] if it is also logged by hops, which have curves of their own. Six digits, as in course/points.py's CSV."""
    if any(f"{name}_1hop" in r for records in members for r in records):
        return []
    values = [{r["step"]: float(f"{r[name]:.6g}") for r in records if name in r} for records in members]
    shared = {step: [run[step] for run in values] for step in sorted(set.intersection(*map(set, values)))}
    return [(step, sum(here) / len(here), min(here), max(here)) for step, here in shared.items()]

def plot_runs(runs, path, curves=CURVES):
    """Draw {name: records}. Runs "x, seed 0", "x, seed 1" are one line: the mean, in a band from lowest to highest."""
    from matplotlib.figure import Figure

    groups = {}
    for name, records in runs.items():
        groups.setdefault(re.sub(r", seed \d+$", "", name), []).append(records)
    lines = {panel: [curve(members, panel[1]) for members in groups.values()] for panel in curves}
    panels = [panel for panel in curves if any(lines[panel])]
    if not panels:
        raise Mistake("these runs have no point of any curve; there is nothing to draw")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for at, (title, name, unit) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, at)
        for i, (points, (label, members)) in enumerate(zip(lines[title, name, unit], groups.items())):
            if points:
                steps, means, lows, highs = zip(*points)
                seeds = f" ({len(members)} seeds)" if len(members) > 1 else ""
                (line, marker), every = LOOKS[i % len(LOOKS)], max(1, len(steps) // 8)
                axis.plot(steps, means, line, marker=marker, markevery=every, color=f"C{i}", ms=4, label=label + seeds)
                axis.fill_between(steps, lows, highs, color=f"C{i}", alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="training step", ylabel=unit, ylim=(0, None))
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), columns + 1))
    figure.savefig(path, dpi=110)

# ----- 6. One conversation -----

UNSETTLED = re.compile(r"(<[a-z]{0,6}|\ufffd+)\Z")  # an end that may become a tag, or lacks bytes of a character

def live(tokenizer, colour):
    """-> show(rollout), which prints what is new in it: whenever it has grown, and once with over=True at the end.
    All that it prints is transcript(), in colours if wanted, control characters made visible."""
    done, shown = 0, 0  # parts that stand on the screen in full; characters of the next one

    def show(r, over=False):
        nonlocal done, shown
        pieces = parts(r, tokenizer)
        for i, (text, own, _) in enumerate(pieces[done:], done):
            growing = i == len(pieces) - 1 and not over
            text = (UNSETTLED.sub("", text) if growing else text).translate(HARMLESS)
            print(paint(text, own, shown) if colour else text[shown:], end="", flush=True)
            done, shown = (i, max(shown, len(text))) if growing else (i + 1, 0)

    return show

def ask(policy, tokenizer, question, search, settings, temperature=0.0, generator=None, slots=None):
    """Hold a conversation about one question and print it while it is held, then its searches and its answer."""
    colour, question = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), whole_characters(question)
    r = begin(question, prompt_ids(question, tokenizer, settings), settings)
    show, append = live(tokenizer, colour), r.append

    def append_and_show(*tokens):
        append(*tokens)
        show(r)

    r.append = append_and_show  # tokens enter a record there and nowhere else
    conversations = [(r, converse(r, tokenizer, settings, engine.end_ids(policy, tokenizer)))]
    find = lambda queries: search(queries, settings.top_k)
    try:
        engine.run(policy, conversations, find, settings.max_length, 1, temperature, generator, slots)
        show(r, over=True)
    finally:
        print()
    print(f"{r.num_searches} search{'es' * (r.num_searches != 1)}, answer: {r.answer!r}")

def chat(policy, tokenizer, search, settings, temperature=0.0, generator=None):
    """Ask for questions until an empty line, "exit", Ctrl-D or Ctrl-C. Each is a conversation of its own: the method
    has no history, so "he" in a question cannot refer to an earlier one."""
    slots = engine.Slots(policy, 1, settings.max_length)
    try:
        while (question := input("question> ").strip()) not in ("", "exit"):
            try:
                ask(policy, tokenizer, question, search, settings, temperature, generator, slots)
            except Mistake as error:  # a question too long for max_length is no reason to load the model again
                print(error)
    except (EOFError, KeyboardInterrupt):
        print()

# ----- 7. The command line -----

def parse(argv):
    """Command line -> its values. Mistake for flags that contradict each other."""
    parser = Parser(description="Evaluate a checkpoint of Search-R1, talk to it, or draw the curves of runs.")
    add, only = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=data.newest, help="folder of a run (its newest checkpoint), of a checkpoint, or a hub id")
    add("--method", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"any of {', '.join(METHODS)}; default: what it was trained for")  # fmt: skip
    sets = "question files (JSON lines: id, question, golden_answers) or names of sets, joined by + into one"
    add("--data", nargs="+", metavar="SET", help=f"{sets}; all: the paper's seven; default: the tiny world's")
    add("--corpus", help="passage file, index DIR, contexts, wiki18, bm25:..., http://... (default: as trained)")
    add("--encoder", help="of contexts and wiki18: hashed, or folder or hub id (default: as trained)")
    add("--world-seed", type=int, help="another tiny world than the checkpoint's")
    add("--limit", type=int, default=0, help="a fixed sample of N questions of each set (default: all)")
    add("--top-k", type=int, default=0, help="passages a search (default: as trained)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--dtype", choices=data.DTYPES, default="auto", help="of the weights, as in train.py (default: auto)")
    only("--ask", metavar="QUESTION", help="hold one conversation and watch it, instead")
    only("--chat", action="store_true", help="one conversation a question, until an empty line, exit or Ctrl-D")
    only("--json", metavar="FILE", help="keep metrics and a record a question; the same command goes on after a crash")
    only("--plot", nargs="+", metavar="RUN", help="draw the curves of runs (folders that train.py wrote)")
    add("--output", default="curves.png", help="the picture of --plot (default: curves.png)")
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.plot:
        raise Mistake("give --checkpoint DIR (a folder that train.py wrote) or --plot RUN")
    if args.plot and not args.output.endswith(PICTURES):
        raise Mistake(f"--output {args.output}: a picture ends in {', '.join(PICTURES)}")
    if (args.chat or args.ask is not None) and (args.method or args.limit):
        raise Mistake("--ask and --chat hold one conversation, as trained: leave out --method and --limit")
    if not min(args.temperature, args.limit, args.top_k) >= 0:  # NaN is not, either
        raise Mistake("--temperature, --limit and --top-k cannot be negative")
    if args.json and (Path(args.json).is_dir() or not os.access(Path(args.json).absolute().parent, os.W_OK)):
        raise Mistake(f"cannot write {args.json}: it is a folder, or there is no folder for it that can be written to")
    return args

def main(argv=None):
    args = parse(argv)
    if args.plot:
        plot_runs(read_runs(args.plot), args.output)
        return print(f"wrote {args.output}")
    settings, about = load_settings(args.checkpoint, real=bool(args.corpus or args.data))
    settings = replace(settings, top_k=args.top_k or settings.top_k)
    methods = list(dict.fromkeys(args.method or [about["method"]]))
    specs, talking = args.data, args.chat or args.ask is not None
    about |= {key: getattr(args, key) for key in ("corpus", "encoder", "world_seed") if getattr(args, key) is not None}
    if about["corpus"] and not (specs or talking):
        raise Mistake(f"this checkpoint searches {about['corpus']}; give --data, a FILE or the name of a set")
    if specs and not about["corpus"] and (talking or not set(methods) <= set(WITHOUT_SEARCH)):
        raise Mistake("--data needs --corpus FILE (or contexts, wiki18, ...), the passages to search")
    sets, files = question_sets(specs) if specs else ({}, [])

    def load():
        """-> policy, tokenizer, search; where bf16 is the default, the policy has the checkpoint's own precision."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = data.weights_dtype(args.dtype, device)
        own = args.dtype == "auto" and dtype == torch.bfloat16
        policy, tokenizer = load_checkpoint(args.checkpoint, device, "auto" if own else dtype)
        _, search_engine, _ = task(about["world_seed"], about["corpus"], encoder=about["encoder"], others=files)
        return policy, tokenizer, search_engine.search

    if talking:
        policy, tokenizer, search = load()
        how = search, settings, args.temperature, torch.Generator(policy.device).manual_seed(0)
        return chat(policy, tokenizer, *how) if args.chat else ask(policy, tokenizer, args.ask, *how)
    where = ", ".join(sets) or f"tiny world {about['world_seed']}, held out"
    sets = sets or {f"tiny world {about['world_seed']}": data.make_world(about["world_seed"]).test}
    sets = {name: fixed_sample(questions, args.limit) for name, questions in sets.items()}
    table = comparison_table(*compare(args, methods, sets, replace(settings, do_search=True), about, load))
    greedy = "greedy" if args.temperature == 0 else f"temperature {args.temperature}"
    print(f"{sum(map(len, sets.values()))} questions ({where}), {greedy}\n{table}")

if __name__ == "__main__":
    run_main(main)
