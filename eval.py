"""Evaluation: what a checkpoint answers, what it searched for, and the curves of a run.

Decoding is greedy unless asked otherwise [the official script asks for greedy and loses the flag on the way], every
question counts (the official loader drops the last, incomplete batch), one-hop and two-hop questions are told apart.

    evaluate                 rollouts over a list of questions -> exact match, F1, searches, ...
    read_runs, plot_runs     metrics.jsonl of one or several runs -> one picture
    ask, chat                a conversation, in colour, while it is held
    page                     conversations before and after training, their masks, probabilities and advantages, as HTML

    python eval.py --checkpoint outputs/run-1/checkpoint-100                 all held-out questions of its world
    python eval.py --checkpoint outputs/run-1/checkpoint-100 --ask "who is the mayor of bodaton?"
    python eval.py --checkpoint outputs/run-1/checkpoint-100 --html page.html
    python eval.py --plot outputs/run-1 outputs/run-2
"""

import argparse
import csv
import html
import itertools
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HTTPError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import data
import searchr1
from retrieval import SearchFailed, build_index, engine_from
from searchr1 import (
    GPU_SLOTS, HARMLESS, Slots, check_format, f1_score, group_advantages, kinds, outcome_reward, paint, parts, policy_view,
    retrieved_gold, rollout, sub_exact_match, transcript,
)  # fmt: skip

transformers_logging.disable_progress_bar()

# How a conversation runs; saved with every checkpoint (search_r1.json), since a policy trained on blocks of three
# passages and fourteen tokens a turn is another policy with five and forty.
SETTINGS = ("max_turns", "max_new_tokens", "max_obs_length", "max_length", "top_k", "do_search", "invalid_message")
PAPER_SETTINGS = {
    "max_turns": 4,
    "max_new_tokens": 500,
    "max_obs_length": 500,
    "max_length": 4096,
    "top_k": 3,
    "do_search": True,
    "invalid_message": "official",
}
INVALID_MESSAGES = {"official": searchr1.INVALID_ACTION, "paper": searchr1.RETHINK}


class Mistake(Exception):
    """A user's mistake: one line on stderr and exit code 2, no traceback."""


class Parser(argparse.ArgumentParser):
    """argparse prints a page of usage before its error; the error is what helps."""

    def error(self, message):
        raise Mistake(f"{message} (--help lists the flags)")


def run_main(main):
    """Call a script's main(); a Mistake, a bad line in a data file, a search engine that is gone: one line, exit code 2."""
    try:
        sys.exit(main())
    except (Mistake, ValueError, SearchFailed) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


# ----- 1. Metrics -----


def em(r, q):
    """Exact match of a rollout's answer to its question [Eq. 4]."""
    return outcome_reward(r.answer, q.golden_answers)


def f1(r, q):
    return f1_score(r.answer or "", q.golden_answers)


def evaluate(
    policy,
    tokenizer,
    questions,
    search,
    settings,
    temperature=0.0,
    generator=None,
    batch_size=256,
    progress=False,
    cache=None,
    method="search-r1",
):
    """Answer every question once -> (metrics, rollouts in the order of the questions).

    metrics: em, f1, sub_em (means over all questions), hit (share for which a gold answer was among the passages shown),
    searches (executed), turns, response_tokens (the policy's own), each a question; finished, valid_format (shares); with
    hops known also em_1hop, em_2hop, searches_1hop, searches_2hop.
    """
    settings = settings | {"invalid_message": INVALID_MESSAGES[settings["invalid_message"]]}
    on_gpu = policy.get_output_embeddings().weight.is_cuda
    cache = cache or Slots(policy, min(len(questions), GPU_SLOTS if on_gpu else batch_size), settings["max_length"])
    rollouts, right = [], 0.0
    bar = tqdm(range(0, len(questions), batch_size), desc="evaluate", disable=not progress)
    for at in bar:
        part = questions[at : at + batch_size]
        rollouts += rollout(
            policy,
            tokenizer,
            [q.question for q in part],
            search,
            temperature=temperature,
            generator=generator,
            cache=cache,
            **settings,
        )
        right += sum(map(em, rollouts[at:], part))
        bar.set_postfix_str(f"EM {right / len(rollouts):.3f}")

    def mean(value, hops=None):
        chosen = [value(r, q) for r, q in zip(rollouts, questions) if hops is None or q.hops == hops]
        return sum(chosen) / len(chosen)

    searches = lambda r, q: r.num_searches
    metrics = {
        "em": mean(em),
        "f1": mean(f1),
        "sub_em": mean(lambda r, q: sub_exact_match(r.answer, q.golden_answers) if r.answer is not None else 0.0),
        "hit": mean(lambda r, q: retrieved_gold(r, q.golden_answers)),
        "searches": mean(searches),
        "turns": mean(lambda r, q: len(r.turns)),
        "finished": mean(lambda r, q: r.finished),
        "valid_format": mean(lambda r, q: check_format(policy_view(r))[0]),
        "response_tokens": mean(lambda r, q: sum(r.response_mask)),
    }
    for hops in sorted({q.hops for q in questions} - {0}):
        metrics |= {f"em_{hops}hop": mean(em, hops), f"searches_{hops}hop": mean(searches, hops)}
    return metrics, rollouts


def bootstrap_interval(values, samples=2000, seed=0):
    """Numbers, one a question -> (low, high): the 95 % interval of their mean, from `samples` draws with replacement."""
    values_n, rng = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    means = torch.stack([values_n[torch.randint(len(values), (len(values),), generator=rng)].mean() for _ in range(samples)])
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def fixed_sample(questions, limit, seed=0):
    """The same `limit` questions at every call; of questions with known hops, equally many of each number."""
    if not limit or limit >= len(questions):
        return list(questions)
    kinds = sorted({q.hops for q in questions})
    share = [limit // len(kinds) + (i < limit % len(kinds)) for i in range(len(kinds))]
    rng = random.Random(f"sample {seed}")
    picked = []
    for hops, count in zip(kinds, share):
        of_kind = [q for q in questions if q.hops == hops]
        picked += rng.sample(of_kind, min(count, len(of_kind)))
    return picked


# ----- 2. The methods of the paper's table -----

# What the paper prints no prompt for says the same in our words, in the official form: "Question: ", answer tags.
DIRECT = (
    "Answer the given question from what you know. Write the answer and nothing else inside <answer> and </answer>, "
    "for example <answer> Beijing </answer>. Question: {question}\n"
)
PASSAGES = "@@passages@@"  # stands in a prompt where passages will


def prompt_ids(tokenizer, question, template, start="", passages=(), budget=500):
    """A question in a template of {question} and {context} -> ids of the prompt, and of `start`, the first words of the
    model's own message, put into its mouth.

    Passages are encoded apart, as the rollout does it, to at most `budget` ids: what they say stays text, even
    where it spells a special token.
    """
    plain = not getattr(tokenizer, "chat_template", None)  # [D13]
    text = searchr1.make_prompt(question, tokenizer, template=template, context=PASSAGES) + start
    head, _, tail = text.rpartition(PASSAGES) if "{context}" in template else ("", "", text)
    ids = tokenizer(head, add_special_tokens=plain)["input_ids"] if head else []
    if head:
        ids = ids + searchr1.observation_ids(tokenizer, searchr1.format_passages(passages), budget)
    return ids + tokenizer(tail, add_special_tokens=plain and not head)["input_ids"]


def direct_ids(tokenizer, question):
    """The prompt of direct inference, up to the first word of the answer; SFT trains on it."""
    return prompt_ids(tokenizer, question, DIRECT, "<answer>")


# ----- 3. Loading -----


def reach_hub(model):
    """Mistake if a hub id is neither in the hub's cache nor to be had. Asked once, since transformers would try for half a
    minute, with a warning each time."""
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str):
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(model, "config.json"))
    except (OSError, ValueError, HTTPError) as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise Mistake(
            f"no causal LM could be loaded from {model}: no folder of that name, nor in the hub's cache, and the hub does not give it ({why}); "
            "put the model's files into a folder and give that"
        ) from None


def load_checkpoint(path, device="cpu", dtype=torch.float32):
    """Folder or hub id of a causal LM -> (policy, tokenizer). Mistake if there is none, or its head is not plain."""
    if not Path(path).exists():
        reach_hub(path)
    elif not (Path(path) / "config.json").exists():
        raise Mistake(f"{path} holds no model (no config.json); a checkpoint is a folder like outputs/run-1/checkpoint-100")
    try:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise Mistake(f"no causal LM could be loaded from {path}: {str(error).strip().splitlines()[0]}") from None
    # Rollout and training read the logits as head(hidden). Models that scale or cap their logits would be another policy.
    ids = torch.arange(4, device=device)[None]
    with torch.no_grad():
        head = policy.get_output_embeddings()
        plain = head(policy.base_model(input_ids=ids).last_hidden_state)
        if not torch.allclose(plain, policy(input_ids=ids).logits, atol=1e-3, rtol=1e-2) or head.bias is not None:
            raise Mistake(f"{path}: its logits are not one linear map of the hidden states; such a head is not supported")
    return policy, tokenizer


def load_settings(checkpoint, corpus=None, top_k=None):
    """search_r1.json of a checkpoint -> dict; for a model without one the paper's values with a corpus, else the tiny
    world's."""
    file = Path(checkpoint) / "search_r1.json"
    default = (PAPER_SETTINGS if corpus else data.TINY_SETTINGS) | {"world_seed": 0, "corpus": None}
    return (json.loads(file.read_text()) if file.exists() else default) | ({"top_k": top_k} if top_k else {})


def read_file(load, path):
    """load(path), with a file that cannot be opened turned into a Mistake."""
    try:
        return load(path)
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from None


def task(world_seed, corpus=None, questions=None, split="eval", encoder="hashed", others=()):
    """-> (questions, search engine, World or None): the held-out questions of the tiny world, or real questions (a file, or
    sets by name, of which `split`) and a corpus as --corpus has it. others: more question files for the corpus `contexts`.
    """
    if corpus:
        asked = read_file(lambda spec: data.load_data(spec, split), questions) if questions else []
        files = [*data.question_files(questions, split), *others] if questions else others
        return asked, read_file(engine_from, data.resolve_corpus(corpus, files, encoder)), None
    world = data.make_world(world_seed)
    return world.test, build_index(world.passages), world


# ----- 4. Pictures -----

CURVES = [
    ("held-out exact match (greedy)", ["eval/em_1hop", "eval/em_2hop", "eval/em"], "share of questions"),
    ("training reward (sampled)", ["reward/mean"], "mean reward"),
    ("searches (greedy, held out)", ["eval/searches_1hop", "eval/searches_2hop", "eval/searches"], "searches a question"),
    ("response length (sampled)", ["response_length/mean"], "tokens, passages included"),
    ("KL to the base model", ["kl"], "nats a token"),
    ("entropy of the policy", ["entropy"], "nats a token"),
]


def read_runs(paths):
    """Folders of runs, or CSV files that --plot wrote -> {name of the run: its records, dicts with a step}."""
    runs = {}
    for path in map(Path, paths):
        if path.suffix == ".csv" and path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    runs.setdefault(row["run"], []).append({"step": int(row["step"]), row["metric"]: float(row["value"])})
        elif (path / "metrics.jsonl").exists():
            runs[path.name] = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        else:
            raise Mistake(f"{path} is not the folder of a run: it has no metrics.jsonl")
    return runs


def groups_of(runs):
    """{run: records} -> {key of the legend: list of records, one a run}: runs named "with mask, seed 0" and "with mask, seed 1"
    are the group "with mask (2 seeds)"; a run of another name is a group of its own."""
    groups = {}
    for run, records in runs.items():
        groups.setdefault(re.sub(r", seed \d+$", ", seeds", run), []).append(records)
    label = lambda name, members: f"{name.removesuffix(', seeds')} ({len(members)} seed{'s' * (len(members) > 1)})"
    return {name if name in runs else label(name, members): members for name, members in groups.items()}


def digits(value):
    """Six significant digits: what a CSV holds is what is drawn, so that it draws the very same picture again."""
    return f"{value:.6g}"


def curve(members, name):
    """Records of one or several runs -> list of (step, mean, lowest, highest) of a metric, at the steps that all of them have."""
    values = [{r["step"]: float(digits(r[name])) for r in records if name in r} for records in members]
    steps = sorted(set.intersection(*map(set, values)))
    at = [[run[step] for run in values] for step in steps]
    return [(step, sum(here) / len(here), min(here), max(here)) for step, here in zip(steps, at)]


HOPS = {"_1hop": "one hop", "_2hop": "two hops"}
LOOKS = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]  # of the groups: a print without colours tells them apart, too


def panels_of(groups, curves):
    """-> list of (title, unit, {group: names of its metrics}): what is drawn where. Hops replace the mean over both kinds. One
    group has them side by side; several would be a tangle, so that hops get panels of their own. No points, no panel."""
    panels = []
    for title, names, unit in curves:
        drawn = {}
        for group, members in groups.items():
            present = [name for name in names if curve(members, name)]
            drawn[group] = [name for name in present if name[-5:] in HOPS] or present
        if len(groups) > 1:
            for name in names:
                having = {group: [name] for group in groups if name in drawn[group]}
                panels += [(f"{title}, {HOPS[name[-5:]]}" if name[-5:] in HOPS else title, unit, having)] if having else []
        elif any(drawn.values()):
            panels.append((title, unit, drawn))
    return panels


def plot_runs(runs, path, curves=CURVES):
    """Draw the curves of one or several runs into one PNG or PDF. Seeds of one setting are one line, their mean, in a band
    from the lowest to the highest; the group's colour, line style and marker are the same in every panel.

    curves: list of (title, metrics, unit), a panel each; metrics that end in _1hop and _2hop replace their mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    groups = groups_of(runs)
    panels = panels_of(groups, curves)
    if not panels:
        raise Mistake("these runs have no point of any curve; there is nothing to draw")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    looks = {group: (f"C{i % 10}", *LOOKS[i % len(LOOKS)]) for i, group in enumerate(groups)}
    for (title, unit, drawn), axis in zip(panels, axes.flat):
        for group, names in drawn.items():
            colour, line, marker = looks[group]
            for style, name in zip([line, "--"], names):
                steps, means, lows, highs = zip(*curve(groups[group], name))
                every = max(1, len(steps) // 8)  # a marker now and then; at the points themselves where they are few
                axis.plot(steps, means, style, color=colour, marker=marker, markersize=4, markevery=every)
                if len(groups[group]) > 1:
                    axis.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="training step", ylabel=unit)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    keys = []
    for group, (colour, line, marker) in looks.items():
        keys.append(Line2D([], [], color=colour, linestyle=line, marker=marker, markersize=4, label=group))
    if any(len(names) > 1 for _, _, drawn in panels for names in drawn.values()):
        keys += [Line2D([], [], color="0.3", linestyle=style, label=label) for style, label in zip(("-", "--"), HOPS.values())]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 4))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_points(runs, path, curves=CURVES):
    """The points of plot_runs as CSV: run, step, metric, value. --plot draws such a file again."""
    names = [name for _, group, _ in curves for name in group]
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "step", "metric", "value"])
        rows.writerows(
            [run, r["step"], name, digits(r[name])] for run, records in runs.items() for r in records for name in names if name in r
        )


# ----- 5. One conversation -----

UNSETTLED = re.compile(r"(<[a-z]{0,6}|\ufffd+)\Z")  # an end that may become a tag, or a character of which bytes are missing


def live(tokenizer, colour):
    """-> show(rollout), which prints what is new in it: for rollout()'s `watch`, and once with over=True when it has ended.

    All that it prints is transcript(), in colours if wanted, control characters made visible.
    """
    done, shown = 0, 0  # parts that stand on the screen in full; characters of the next one

    def show(r, over=False):
        nonlocal done, shown
        pieces = parts(r, tokenizer)
        for i in range(done, len(pieces)):
            text, own, _ = pieces[i]
            growing = i == len(pieces) - 1 and not over
            text = (UNSETTLED.sub("", text) if growing else text).translate(HARMLESS)
            print(paint(text, own, shown) if colour else text[shown:], end="", flush=True)
            done, shown = (i, max(shown, len(text))) if growing else (i + 1, 0)

    return show


def ask(policy, tokenizer, question, search, settings, temperature=0.0, generator=None, cache=None):
    """Hold a conversation about one question and print it while it is held, then how many searches it took."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show = live(tokenizer, colour)
    settings = settings | {"invalid_message": INVALID_MESSAGES[settings["invalid_message"]]}
    try:
        (r,) = rollout(
            policy, tokenizer, [question], search, temperature=temperature, generator=generator, cache=cache, watch=show, **settings
        )
        show(r, over=True)
    finally:
        print()
    summary = f"{r.num_searches} search{'es' * (r.num_searches != 1)}, answer: {r.answer!r}"
    print(f"\033[2m{summary}\033[0m" if colour else summary)


def chat(policy, tokenizer, search, settings, temperature=0.0, generator=None):
    """Ask for questions until an empty line, "exit", Ctrl-D or Ctrl-C. Each is a conversation of its own: the method has no
    history, a question that says "he" is about nobody."""
    cache = Slots(policy, 1, settings["max_length"])
    try:
        while (question := input("question> ").strip()) not in ("", "exit"):
            try:
                ask(policy, tokenizer, question, search, settings, temperature, generator, cache)
            except ValueError as error:  # a question too long for max_length is no reason to load the model again
                print(error)
    except (EOFError, KeyboardInterrupt):
        print()


# ----- 6. A page: before and after -----

PAGE_QUESTIONS, PAGE_GROUP = 6, 5  # questions if --limit says nothing, at most 24; rollouts a group
CERTAIN = (0.95, 0.7, 0.4, 0.15)  # probabilities between the five shades
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --card: #f7f7f5; --line: #d4d4d0; --dim: #6f6f6f;
  --think: #005f78; --search: #6d4f00; --answer: #0b6425; --rare: 255 122 0; --plus: 0 160 70; --minus: 220 50 50; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e2; --paper: #131417; --card: #1c1e22; --line: #3a3d43; --dim: #9498a0;
  --think: #6accdf; --search: #e8c765; --answer: #7bd899; --rare: 255 110 0; --plus: 0 190 90; --minus: 240 60 60; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
h1 { font-size: 1.5rem; margin: .3rem 0; } h2 { font-size: 1.1rem; margin: 0; } h3 { font-size: .95rem; margin: 0; }
p { margin: .3rem 0; } .note, .head, .legend, summary { font-size: .875rem; } .note { color: var(--dim); }
section { border-top: 1px solid var(--line); margin-top: 1.6rem; padding-top: .8rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; margin-top: .6rem; }
.side, .legend { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
.legend p { margin: .15rem 0; } .head { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline; }
.talk { font: .875rem/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
.think { color: var(--think); } .search { color: var(--search); } .answer { color: var(--answer); font-weight: 600; }
.information { color: var(--dim); font-style: italic; }
.u1, .u2, .u3, .u4, .own { border-radius: .15rem; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.u1 { background: rgb(var(--rare) / .14); } .u2 { background: rgb(var(--rare) / .28); } .u3 { background: rgb(var(--rare) / .42); }
.u4 { background: rgb(var(--rare) / .58); text-decoration: underline; }
details { margin-top: .6rem; border-top: 1px dashed var(--line); padding-top: .4rem; } summary { cursor: pointer; }
.sample { margin-top: .6rem; padding-left: .6rem; border-left: .25rem solid var(--line); }
.plus { border-left-color: rgb(var(--plus)); } .plus .own { background: rgb(var(--plus) / var(--much)); }
.minus { border-left: .25rem dashed rgb(var(--minus)); } .minus .own { background: rgb(var(--minus) / var(--much)); }
@media screen and (max-width: 48rem) { .pair { grid-template-columns: minmax(0, 1fr); } body { padding: .6rem; } }
@media print { body { font-size: 11px; max-width: none; } .talk { font-size: 9px; } .sample, .legend, h2, .head { break-inside: avoid; } details::details-content { content-visibility: visible; height: auto; } }
"""


def tokens_of(text, ids, tokenizer):
    """Text of a part and its ids -> one str a token, which together are the text. A character of several tokens is the last one's."""
    gap = len(text) - len(tokenizer.decode(ids))  # the space that parts() put before it
    ends = [gap + len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(1, len(ids))]
    ends = [0, *itertools.accumulate((min(end, len(text)) for end in ends), max), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:])]


def talk_html(r, tokenizer, shade):
    """A rollout -> HTML of its transcript: tags in colour, retrieved text dimmed; a token's title says its probability.

    shade: the policy's tokens by how unlikely they were; else its parts are boxes of the class "own", for a shade of the whole.
    """
    out = []
    for text, own, at in parts(r, tokenizer):
        text = text.translate(HARMLESS)
        if not own or not text:
            out.append(f'<span class="information">{html.escape(text)}</span>')
            continue
        names, pieces, end = kinds(text, own), [], 0
        for token, logprob in zip(tokens_of(text, r.ids[at.start : at.stop], tokenizer), r.logprobs[at.start : at.stop]):
            end += len(token)
            word = token.lstrip() or token  # white space before a word is left without its shade
            if word:
                unlikely = sum(math.exp(logprob) < bound for bound in CERTAIN) if shade else 0
                look = f"{names[end - len(word)]} u{unlikely}".strip()
                title = html.escape(f"{word.strip() or repr(word)}  p {math.exp(logprob):.2g}")
                pieces += [token[: len(token) - len(word)], f'<span class="{look}" title="{title}">{html.escape(word)}</span>']
        out.append("".join(pieces) if shade else f'{pieces[0]}<span class="own">{"".join(pieces[1:])}</span>')
    return f'<div class="talk">{"".join(out)}</div>'


def facts_html(r, reward):
    answer = "no answer" if r.answer is None else html.escape(f"answer: {r.answer}".translate(HARMLESS))
    searches = f"{r.num_searches} search{'es' * (r.num_searches != 1)}"
    return f"<span>reward {reward:g}</span> <span>{searches}</span> <span>{answer}</span>"


def side_html(name, tokenizer, question, greedy, group):
    """One question on one side: the greedy rollout, and below it, folded, a group with the advantages it would be trained by."""
    rewards = [em(r, question) for r in group]
    samples = []
    for r, reward, advantage in zip(group, rewards, group_advantages(torch.tensor(rewards), len(group)).tolist()):
        sign = "plus" if advantage > 0 else "minus" if advantage < 0 else "none"
        samples.append(
            f'<div class="sample {sign}" style="--much: {min(0.5, abs(advantage) / 4):.2f}"><div class="head"><span>advantage '
            f"{f'{advantage:+.2f}' if advantage else 0}</span> {facts_html(r, reward)}</div>{talk_html(r, tokenizer, shade=False)}</div>"
        )
    spread = "" if len(set(rewards)) > 1 else "; all rewards are equal: advantage 0, nothing to learn from this group"
    return (
        f'<div class="side"><div class="head"><h3>{name}</h3> {facts_html(greedy, em(greedy, question))}</div>'
        f"{talk_html(greedy, tokenizer, shade=True)}<details><summary>{len(group)} sampled rollouts: rewards "
        f"{', '.join(f'{reward:g}' for reward in rewards)}{spread}</summary>{''.join(samples)}</details></div>"
    )


def page(questions, sides, about):
    """Questions; sides: two of (name of the checkpoint, tokenizer, a greedy rollout a question, a group a question); lines about
    the settings -> one HTML page that needs nothing else. The same rollouts give the same bytes."""
    escape, means = html.escape, []
    for (name, _, greedy, _), when in zip(sides, ("before", "after")):
        reward = sum(map(em, greedy, questions)) / len(questions)
        searches = sum(r.num_searches for r in greedy) / len(questions)
        means.append(
            f"<p><b>{when}</b>: {escape(name)} \u2014 on these questions, greedy: reward {reward:.2f}, {searches:.2f} searches</p>"
        )
    sections = []
    for i, q in enumerate(questions):
        asked, gold = (escape(text.translate(HARMLESS)) for text in (q.question, " or ".join(q.golden_answers)))
        hops = {1: "one hop; ", 2: "two hops; "}.get(q.hops, "")
        columns = [
            side_html(when, tokenizer, q, greedy[i], groups[i])
            for (_, tokenizer, greedy, groups), when in zip(sides, ("before", "after"))
        ]
        sections.append(
            f'<section><h2>{i + 1}. {asked}</h2><p class="note">{hops}right answer: {gold}</p><div class="pair">{"".join(columns)}</div></section>'
        )
    bounds = [1.0, *CERTAIN, 0.0]
    shades = " ".join(
        f'<span class="u{i}">{f"below {high:.0%}" if i == len(CERTAIN) else f"{high:.0%} to {low:.0%}"}</span>'
        for i, (high, low) in enumerate(zip(bounds, bounds[1:]))
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Before and after: {escape(sides[-1][0])}</title><style>{STYLE}</style></head><body>
<h1>A policy before and after training</h1>
{"".join(means)}
{"".join(f'<p class="note">{escape(line)}</p>' for line in about)}
<div class="legend">
<p><span class="think">&lt;think&gt;</span>, <span class="search">&lt;search&gt;</span>, <span class="answer">&lt;answer&gt;</span>:
what the policy wrote. Mask 1: it is trained.</p>
<p><span class="information">&lt;information&gt;, and what the environment says of an invalid turn</span>: mask 0, never trained, and so never shaded.</p>
<p>Greedy rollouts, how likely the policy held the token it chose: {shades}. Point at a token for its probability.</p>
<p>Reward: exact match. Groups are sampled at temperature 1; GRPO would train all tokens of a rollout by one advantage, (reward \u2212 mean) /
standard deviation of its group:
<span class="plus" style="--much: .4"><span class="own">more of this</span></span>,
<span class="minus" style="--much: .4; border: 0"><span class="own">less of this</span></span>; where all rewards are equal there is none.</p>
</div>
{"".join(sections)}
</body></html>
"""


def page_sides(checkpoints, questions, search, settings):
    """[(name, policy, tokenizer), ...] -> what page() takes: greedy rollouts and groups at temperature 1, seed 0."""
    settings = settings | {"invalid_message": INVALID_MESSAGES[settings["invalid_message"]]}
    asked, sides = [q.question for q in questions], []
    for name, policy, tokenizer in checkpoints:
        generator = torch.Generator(policy.device).manual_seed(0)
        greedy = rollout(policy, tokenizer, asked, search, temperature=0, **settings)
        sampled = rollout(policy, tokenizer, asked, search, PAGE_GROUP, temperature=1, generator=generator, **settings)
        groups = [sampled[at : at + PAGE_GROUP] for at in range(0, len(sampled), PAGE_GROUP)]
        sides.append((name, tokenizer, greedy, groups))
    return sides


def write_whole(path, text):
    """Write a file whole or not at all. Mistake if it cannot be written."""
    unfinished = Path(f"{path}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise Mistake(f"cannot write {path}: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def before_of(args):
    """Folder or hub id of the checkpoint that --html shows before training. Mistake, before any work, if there is none, or the
    page could not be written."""
    if not Path(args.html).parent.is_dir() or Path(args.html).is_dir():
        raise Mistake(f"cannot write {args.html}: {'a folder' if Path(args.html).is_dir() else 'no such folder'}")
    if args.limit > 24:
        raise Mistake(f"--limit {args.limit}: --html shows at most 24 questions")
    if args.temperature:
        raise Mistake("--html shows greedy rollouts and groups at temperature 1; leave --temperature out")
    before = args.before or load_settings(args.checkpoint, "").get("base")
    if not before or not (args.before or Path(before).is_dir()):
        raise Mistake(
            f"{args.checkpoint} does not say what it was trained from{f' ({before} is gone)' if before else ''}; give --before DIR"
        )
    if args.before and not Path(before).exists():
        reach_hub(before)
    return before


def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of Search-R1, talk to it, or draw the curves of runs.")
    parser.add_argument("--checkpoint", help="folder of a checkpoint (or a hub id)")
    parser.add_argument(
        "--data",
        help="question file (JSON lines: id, question, golden_answers), or sets joined by + (nq+hotpotqa); default: the tiny world's",
    )
    parser.add_argument(
        "--corpus",
        help="passage file, DIR of an index, contexts (what came with --data), wiki18, bm25: and any of these, http://...; "
        "default: what the checkpoint was trained with",
    )
    parser.add_argument(
        "--encoder", help="of contexts and wiki18: hashed, or folder or hub id (default: as the checkpoint was trained)"
    )
    parser.add_argument("--world-seed", type=int, help="another tiny world than the checkpoint's")
    parser.add_argument("--limit", type=int, default=0, help="a fixed sample of N questions (default: all)")
    parser.add_argument("--top-k", type=int, help="passages a search (default: as trained)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--ask", metavar="QUESTION", help="hold one conversation and watch it, instead")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask for questions, a conversation each, without memory of the last; ends with an empty line, exit or Ctrl-D",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a page of conversations before and after training (6 questions; --limit up to 24)"
    )
    parser.add_argument(
        "--before", metavar="DIR", help="of --html: the checkpoint before training (default: what --checkpoint was trained from)"
    )
    parser.add_argument("--json", help="write metrics and one record a question to this file")
    parser.add_argument(
        "--plot",
        nargs="+",
        metavar="RUN",
        help="draw the curves of these runs (folders, or CSV files of an earlier --plot) into one picture",
    )
    parser.add_argument(
        "--output",
        default="curves.png",
        help="the picture that --plot writes, with its points as CSV beside it (default: curves.png)",
    )
    args = parser.parse_args(argv)
    wanted = [f"--{name}" for name in ("plot", "ask", "chat", "html", "json") if getattr(args, name) not in (None, False)]
    if len(wanted) > 1:
        raise Mistake(f"{' and '.join(wanted)} are different things to do; give one of them")
    if args.before and not args.html:
        raise Mistake("--before says what --html compares with; give --html FILE, too")
    if args.ask is not None and not args.ask.strip():
        raise Mistake("--ask wants a question")
    if args.plot:
        runs, points = read_runs(args.plot), Path(args.output).with_suffix(".csv")
        plot_runs(runs, args.output)
        write_points(runs, points)
        print(f"wrote {args.output} and {points}")
        return 0
    if not args.checkpoint:
        raise Mistake("give --checkpoint DIR (a folder that train.py wrote) or --plot RUN")
    if args.temperature < 0 or args.limit < 0:
        raise Mistake("--temperature and --limit cannot be negative")
    if args.top_k is not None and args.top_k < 1:
        raise Mistake(f"--top-k {args.top_k}: must be at least 1")
    before = before_of(args) if args.html is not None else None
    on_gpu = torch.cuda.is_available()  # there in the checkpoint's own precision; a CPU is slow in bf16
    policy, tokenizer = load_checkpoint(args.checkpoint, *(("cuda", "auto") if on_gpu else ()))
    base = load_checkpoint(before, *(("cuda", "auto") if on_gpu else ())) if before else None
    saved = load_settings(args.checkpoint, args.corpus, args.top_k)
    settings = {name: saved[name] for name in SETTINGS}
    talking = args.ask or args.chat
    corpus, file = (args.corpus or saved["corpus"], args.data) if args.world_seed is None else (None, None)
    if corpus and not (file or talking):
        raise Mistake(f"this checkpoint searches {corpus}; give --data FILE or the name of a set, the questions to evaluate")
    if file and not corpus:
        raise Mistake("--data needs --corpus FILE (or contexts, wiki18, ...), the passages to search")
    world_seed = saved["world_seed"] if args.world_seed is None else args.world_seed
    questions, engine, _ = task(world_seed, corpus, file, encoder=args.encoder or saved.get("encoder", "hashed"))
    generator = torch.Generator(policy.device).manual_seed(0)
    if args.ask:
        ask(policy, tokenizer, args.ask, engine.search, settings, args.temperature, generator)
        return 0
    if args.chat:
        chat(policy, tokenizer, engine.search, settings, args.temperature, generator)
        return 0
    questions = fixed_sample(questions, args.limit or (PAGE_QUESTIONS if args.html else 0))
    if args.html:
        short = lambda path: "/".join(Path(path).parts[-2:])
        sides = page_sides(
            [(short(before), *base), (short(args.checkpoint), policy, tokenizer)], questions, engine.search, settings
        )
        source = f"{file}, searching {corpus}" if file else f"tiny world {world_seed}, held out"
        about = [
            f"Questions: {len(questions)} of {source}.",
            "Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + "; sampled with seed 0.",
        ]
        write_whole(args.html, page(questions, sides, about))
        print(f"wrote {args.html}")
        return 0
    metrics, rollouts = evaluate(policy, tokenizer, questions, engine.search, settings, args.temperature, generator, progress=True)
    where = file or f"tiny world {world_seed}, held out"
    print(f"{len(questions)} questions ({where}), {'greedy' if args.temperature == 0 else f'temperature {args.temperature}'}")
    intervals = {score.__name__: bootstrap_interval([score(r, q) for r, q in zip(rollouts, questions)]) for score in (em, f1)}
    for name, value in metrics.items():
        print(f"{name:18} {value:.3f}" + ("   95 %: {:.3f} to {:.3f}".format(*intervals[name]) if name in intervals else ""))
    if args.json:
        records = [
            {"id": q.id, "question": q.question, "golden_answers": q.golden_answers, "answer": r.answer, "em": em(r, q),
             "searches": r.searches, "transcript": transcript(r, tokenizer)} for q, r in zip(questions, rollouts)
        ]  # fmt: skip
        Path(args.json).write_text(
            json.dumps({"metrics": metrics, "intervals": intervals, "settings": saved, "records": records}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
