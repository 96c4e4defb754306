"""A page that shows a policy before and after training: conversations about the same questions with their masks, the
probabilities of their tokens, the advantages of a group. One HTML file that needs nothing else; the same command writes
the same bytes.

    python -m course.page outputs/run-1 page.html
    python -m course.page DIR page.html --before Qwen/Qwen2.5-3B --data hotpotqa --corpus contexts --limit 12
"""

import html
import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

import data
from data import Mistake, fixed_sample, load_checkpoint, load_settings, newest
from eval import question_sets
from retrieval import written_whole
from searchr1 import HARMLESS, group_advantages, kinds, outcome_reward, parts, rollout

QUESTIONS, MOST_QUESTIONS = 6, 24  # without --limit, and the most that it may ask for
GROUP = 5  # sampled rollouts a question
CERTAIN = (0.95, 0.7, 0.4, 0.15)  # the probabilities between five shades

# ----- 1. The page -----

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --card: #f7f7f5; --line: #d4d4d0; --dim: #6f6f6f;
  --think: #005f78; --search: #6d4f00; --answer: #0b6425; --rare: 255 122 0; --plus: 0 160 70; --minus: 220 50 50; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e2; --paper: #131417; --card: #1c1e22; --line: #3a3d43;
  --dim: #9498a0; --think: #6accdf; --search: #e8c765; --answer: #7bd899; --rare: 255 110 0; --plus: 0 190 90;
  --minus: 240 60 60; } }
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
.u1 { background: rgb(var(--rare) / .14); } .u2 { background: rgb(var(--rare) / .28); }
.u3 { background: rgb(var(--rare) / .42); } .u4 { background: rgb(var(--rare) / .58); text-decoration: underline; }
details { margin-top: .6rem; border-top: 1px dashed var(--line); padding-top: .4rem; } summary { cursor: pointer; }
.sample { margin-top: .6rem; padding-left: .6rem; border-left: .25rem solid var(--line); }
.plus { border-left-color: rgb(var(--plus)); } .plus .own { background: rgb(var(--plus) / var(--much)); }
.minus { border-left: .25rem dashed rgb(var(--minus)); } .minus .own { background: rgb(var(--minus) / var(--much)); }
@media screen and (max-width: 48rem) { .pair { grid-template-columns: minmax(0, 1fr); } body { padding: .6rem; } }
@media print { body { font-size: 11px; max-width: none; } .talk { font-size: 9px; }
  .sample, .legend, h2, .head { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; } }
"""


def tokens_of(text, ids, tokenizer):
    """Text of a part and its ids -> a str a token; joined, they are the text. A character of several tokens belongs to
    the last of them."""
    gap = len(text) - len(tokenizer.decode(ids))  # the space that parts() put before it
    ends = [gap + len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(1, len(ids))]
    ends = [0, *itertools.accumulate((min(end, len(text)) for end in ends), max), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:])]


def talk_html(r, tokenizer, shade):
    """A rollout -> HTML of its transcript: tags in colour, retrieved text dimmed, a token's probability in its title.

    shade: every token of the policy is shaded by how unlikely it was. Otherwise what the policy wrote is a box of
    the class "own", which one colour can shade as a whole.
    """
    out = []
    for text, own, at in parts(r, tokenizer):
        text = text.translate(HARMLESS)
        if not own or not text:
            out.append(f'<span class="information">{html.escape(text)}</span>')
            continue
        names, pieces, end = kinds(text, own), [], 0
        tokens, logprobs = tokens_of(text, r.ids[at.start : at.stop], tokenizer), r.logprobs[at.start : at.stop]
        for token, logprob in zip(tokens, logprobs):
            end += len(token)
            word = token.lstrip() or token  # the white space before a word is not shaded
            if word:
                unlikely = sum(math.exp(logprob) < bound for bound in CERTAIN) if shade else 0
                look = f"{names[end - len(word)]} u{unlikely}".strip()
                title = html.escape(f"{word.strip() or repr(word)}  p {math.exp(logprob):.2g}")
                span = f'<span class="{look}" title="{title}">{html.escape(word)}</span>'
                pieces += [token[: len(token) - len(word)], span]
        out.append("".join(pieces) if shade else f'{pieces[0]}<span class="own">{"".join(pieces[1:])}</span>')
    return f'<div class="talk">{"".join(out)}</div>'


def reward_of(r):
    return outcome_reward(r.answer, r.question.gold_answers)


def facts_html(r):
    answer = "no answer" if r.answer is None else html.escape(f"answer: {r.answer}".translate(HARMLESS))
    searches = f"{r.num_searches} search{'es' * (r.num_searches != 1)}"
    return f"<span>reward {reward_of(r):g}</span> <span>{searches}</span> <span>{answer}</span>"


def side_html(name, tokenizer, greedy, group):
    """One question on one side: the greedy rollout, and folded below it a group with its advantages under GRPO."""
    rewards = [reward_of(r) for r in group]
    samples = []
    for r, advantage in zip(group, group_advantages(torch.tensor(rewards), len(group)).tolist()):
        sign = "plus" if advantage > 0 else "minus" if advantage < 0 else "none"
        number = f"{advantage:+.2f}" if advantage else 0
        samples.append(
            f'<div class="sample {sign}" style="--much: {min(0.5, abs(advantage) / 4):.2f}"><div class="head">'
            f"<span>advantage {number}</span> {facts_html(r)}</div>{talk_html(r, tokenizer, shade=False)}</div>"
        )
    equal = "; all rewards are equal: advantage 0, nothing to learn from this group" if len(set(rewards)) == 1 else ""
    return (
        f'<div class="side"><div class="head"><h3>{name}</h3> {facts_html(greedy)}</div>'
        f"{talk_html(greedy, tokenizer, shade=True)}<details><summary>{len(group)} sampled rollouts: rewards "
        f"{', '.join(f'{reward:g}' for reward in rewards)}{equal}</summary>{''.join(samples)}</details></div>"
    )


def question_html(number, question, sides):
    texts = question.text, " or ".join(question.gold_answers)
    asked, gold = (html.escape(text.translate(HARMLESS)) for text in texts)
    hops = {1: "one hop; ", 2: "two hops; "}.get(question.hops, "")
    columns = [
        side_html(when, tokenizer, greedy[number - 1], groups[number - 1])
        for when, (_, tokenizer, greedy, groups) in zip(("before", "after"), sides)
    ]
    return (
        f'<section><h2>{number}. {asked}</h2><p class="note">{hops}right answer: {gold}</p>'
        f'<div class="pair">{"".join(columns)}</div></section>'
    )


def page(questions, sides, about):
    """Questions, two sides as `side` makes them, and lines about the settings -> one HTML page that needs nothing else.
    The same rollouts give the same bytes."""
    means = []
    for (name, _, greedy, _), when in zip(sides, ("before", "after")):
        reward, searches = (sum(map(of, greedy)) / len(greedy) for of in (reward_of, lambda r: r.num_searches))
        on = f"on these questions, greedy: reward {reward:.2f}, {searches:.2f} searches"
        means.append(f"<p><b>{when}</b>: {html.escape(name)} \u2014 {on}</p>")
    notes = [f'<p class="note">{html.escape(line)}</p>' for line in about]
    sections = [question_html(i, question, sides) for i, question in enumerate(questions, 1)]
    bounds = list(itertools.pairwise([1.0, *CERTAIN, 0.0]))
    words = [f"{high:.0%} to {low:.0%}" for high, low in bounds[:-1]] + [f"below {bounds[-1][0]:.0%}"]
    shades = " ".join(f'<span class="u{i}">{word}</span>' for i, word in enumerate(words))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Before and after: {html.escape(sides[-1][0])}</title><style>{STYLE}</style></head><body>
<h1>A policy before and after training</h1>
{"".join(means)}
{"".join(notes)}
<div class="legend">
<p><span class="think">&lt;think&gt;</span>, <span class="search">&lt;search&gt;</span>,
<span class="answer">&lt;answer&gt;</span>: what the policy wrote. Mask 1: it is trained.</p>
<p><span class="information">&lt;information&gt;, and what the environment says of an invalid turn</span>: mask 0, never
trained, and so never shaded.</p>
<p>Greedy rollouts, how likely the policy held the token it chose: {shades}. Point at a token for its probability.</p>
<p>Reward: exact match. Groups are sampled at temperature 1; GRPO would train all tokens of a rollout by one advantage,
(reward \u2212 mean) / standard deviation of its group:
<span class="plus" style="--much: .4"><span class="own">more of this</span></span>,
<span class="minus" style="--much: .4; border: 0"><span class="own">less of this</span></span>; where all rewards are
equal there is none.</p>
</div>
{"".join(sections)}
</body></html>
"""


# ----- 2. What it shows -----


def side(name, policy, tokenizer, questions, search, settings):
    """One checkpoint's side of the page: (name, tokenizer, a greedy rollout a question, a group a question). Groups are
    sampled at temperature 1 with seed 0."""
    generator = torch.Generator(policy.device).manual_seed(0)
    greedy = rollout(policy, tokenizer, questions, search, settings, temperature=0)
    sampled = rollout(policy, tokenizer, questions, search, settings, GROUP, 1.0, generator)
    return name, tokenizer, greedy, [sampled[at : at + GROUP] for at in range(0, len(sampled), GROUP)]


def base_of(args):
    """Folder or hub id of the checkpoint to show before training: --before, or what CHECKPOINT was trained from."""
    base = args.before or load_settings(args.checkpoint)[1]["base"]
    if not base:
        says = "does not say" if Path(args.checkpoint).exists() else "is no folder here, so nothing says"
        raise Mistake(f"{args.checkpoint} {says} what it was trained from; give --before DIR")
    if not base.endswith(".gguf"):
        data.fetch(base, "config.json", Path(base) / "config.json", "model")
    return base


def parse(argv):
    """Command line -> its values. Mistake, before any work, for what cannot be done."""
    parser = data.Parser(description="Write a page that shows a policy before and after training.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=newest, help="after training: a run, a checkpoint or a hub id")
    add("file", metavar="FILE", help="the page to write")
    add("--before", metavar="DIR", type=newest, help="before training (default: what CHECKPOINT was trained from)")
    add("--limit", type=int, default=QUESTIONS, help=f"questions (default: {QUESTIONS}; at most {MOST_QUESTIONS})")
    add("--data", nargs="+", metavar="SET", help="question files or names of sets (default: the tiny world)")
    add("--corpus", help="as eval.py takes it (default: what CHECKPOINT was trained with)")
    add("--encoder", help="of contexts and wiki18: hashed, or folder or hub id (default: as CHECKPOINT was trained)")
    add("--world-seed", type=int, help="another tiny world than CHECKPOINT's")
    add("--top-k", type=int, help="passages a search (default: as trained)")
    args = parser.parse_args(argv)
    if not Path(args.file).parent.is_dir() or Path(args.file).is_dir():
        raise Mistake(f"cannot write {args.file}: {'a folder' if Path(args.file).is_dir() else 'no such folder'}")
    if not 1 <= args.limit <= MOST_QUESTIONS:
        raise Mistake(f"--limit {args.limit}: from 1 to {MOST_QUESTIONS} questions")
    if args.top_k is not None and args.top_k < 1:
        raise Mistake(f"--top-k {args.top_k}: must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    before = base_of(args)
    settings, about = load_settings(args.checkpoint, real=bool(args.corpus or args.data))
    settings, specs = replace(settings, top_k=args.top_k or settings.top_k), args.data
    about |= {name: getattr(args, name) for name in ("corpus", "encoder") if getattr(args, name)}
    if args.world_seed is not None:
        specs, about = None, about | {"world_seed": args.world_seed, "corpus": None}
    corpus = about["corpus"]
    if corpus and not specs:
        raise Mistake(f"this checkpoint searches {corpus}; give --data FILE or the name of a set")
    if specs and not corpus:
        raise Mistake("--data needs --corpus FILE (or contexts, wiki18, ...), the passages to search")
    sets, files = question_sets(specs) if specs else ({}, [])
    held_out, engine, _ = data.task(about["world_seed"], corpus, encoder=about["encoder"], others=files)
    where = ", ".join(sets) or f"tiny world {about['world_seed']}, held out"
    questions = [q for of in sets.values() or [held_out] for q in fixed_sample(of, args.limit)]
    device = ("cuda", "auto") if torch.cuda.is_available() else ()
    sides = []
    for checkpoint in (before, args.checkpoint):
        policy, tokenizer = load_checkpoint(checkpoint, *device)
        name = "/".join(Path(checkpoint).parts[-2:])
        sides.append(side(name, policy, tokenizer, questions, engine.search, settings))
    values = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    lines = [f"Questions: {len(questions)} of {where}{f', searching {corpus}' if corpus else ''}."]
    lines.append(f"Settings: {values}; sampled with seed 0.")
    with written_whole(args.file) as file:
        file.write(page(questions, sides, lines))
    print(f"wrote {args.file}")


if __name__ == "__main__":
    data.run_main(main)
