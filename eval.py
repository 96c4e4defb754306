"""Evaluation: the methods of the paper's table side by side, what each answered and searched for, and the curves of a run.

Decoding is greedy unless asked otherwise [the official script asks for greedy and loses the flag on the way], every
question counts (the official loader drops the last, incomplete batch), one-hop and two-hop questions are told apart.

    evaluate                 a method over a list of questions -> exact match, F1, searches, ...
    METHODS                  the rows of Table 2, a function each, all of them calls of searchr1.rollout
    answer_all, kept         methods x sets, kept question by question: a killed comparison goes on where it was
    read_runs, plot_runs     metrics.jsonl of one or several runs -> one picture
    ask, chat                a conversation, in colour, while it is held
    page                     conversations before and after training, their masks, probabilities and advantages, as HTML

Departures from the paper (the official repository has no code for its baselines):
  [D15] What the paper prints no prompt for is in our words: the question in the official form, the answer in the official
        tags. The first tag is put into the model's mouth, so that the answers of all methods are read alike.
  [D16] Search-o1: the model that reads the passages sees them and the query, not the thoughts so far.

    python eval.py --checkpoint outputs/run-1/checkpoint-100                 all held-out questions of its world
    python eval.py --checkpoint Qwen/Qwen2.5-3B-Instruct --method rag ircot search-r1 --data all --corpus wiki18 --limit 500 --paper
    python eval.py --checkpoint outputs/run-1/checkpoint-100 --ask "who is the mayor of bodaton?"
    python eval.py --checkpoint outputs/run-1/checkpoint-100 --html page.html
    python eval.py --plot outputs/run-1 outputs/run-2
"""

import argparse
import csv
import hashlib
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
from retrieval import Passage, SearchFailed, build_index, engine_from
from searchr1 import (
    GPU_SLOTS, HARMLESS, Rollout, Slots, check_format, end_ids, f1_score, group_advantages, kinds, outcome_reward, paint, parts, policy_view,
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


def score(r, q, method="search-r1"):
    """What is measured of one question: numbers and truth values by name."""
    scores = {
        "em": em(r, q),
        "f1": f1(r, q),
        "sub_em": sub_exact_match(r.answer, q.golden_answers) if r.answer is not None else 0.0,
        "hit": retrieved_gold(r, q.golden_answers),
        "searches": r.num_searches,
        "turns": len(r.turns),
        "finished": r.finished,
        "response_tokens": sum(r.response_mask),
    }
    return scores | ({"valid_format": check_format(policy_view(r))[0]} if method in WITH_FORMAT else {})


def mean_scores(scores, hops):
    """Scores of questions (dicts that hold at least what `score` gives) and the questions' hops -> metrics, see evaluate."""

    def mean(name, of=None):
        chosen = [s[name] for s, h in zip(scores, hops) if of is None or h == of]
        return sum(chosen) / len(chosen)

    names = ("em", "f1", "sub_em", "hit", "searches", "turns", "finished", "valid_format", "response_tokens")
    metrics = {name: mean(name) for name in names if name in scores[0]}
    for of in sorted(set(hops) - {0}):
        metrics |= {f"em_{of}hop": mean("em", of), f"searches_{of}hop": mean("searches", of)}
    return metrics


def evaluate(
    policy, tokenizer, questions, search, settings, temperature=0.0, generator=None, batch_size=256, progress=False, cache=None, method="search-r1",
):  # fmt: skip
    """Answer every question once, by a method of METHODS -> (metrics, rollouts in the order of the questions).

    metrics: em, f1, sub_em (means over all questions), hit (share for which a gold answer was among the passages found),
    searches (executed), turns (calls of the model), response_tokens (all that it wrote), each a question; finished (shares);
    valid_format where the method writes Search-R1's format; with hops known also em_1hop, em_2hop, searches_1hop, searches_2hop.
    """
    settings = settings | {"invalid_message": INVALID_MESSAGES[settings["invalid_message"]]}
    on_gpu = policy.get_output_embeddings().weight.is_cuda
    cache = cache or Slots(policy, min(len(questions), GPU_SLOTS if on_gpu else batch_size), settings["max_length"])
    rollouts, scores = [], []
    bar = tqdm(range(0, len(questions), batch_size), desc="evaluate", disable=not progress)
    for at in bar:
        part = questions[at : at + batch_size]
        rollouts += METHODS[method](
            policy,
            tokenizer,
            [q.question for q in part],
            search,
            settings,
            temperature=temperature,
            generator=generator,
            cache=cache,
        )
        scores += [score(r, q, method) for r, q in zip(rollouts[at:], part)]
        bar.set_postfix_str(f"EM {sum(s['em'] for s in scores) / len(scores):.3f}")
    return mean_scores(scores, [q.hops for q in questions]), rollouts


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


# ----- 2. The methods of the paper's table (Sec. 4) -----
#
# Each is method(policy, tokenizer, questions, search, settings, **how) -> list[Rollout], one a question, in their order;
# how: temperature, generator and cache, as rollout() takes them. Whatever the number of calls a question takes, its record is
# one Rollout: ids and mask run over all calls, what was put before the model has mask False.

# What the paper prints no prompt for says the same in our words, in the official form: "Question: ", answer tags [D15].
DIRECT = (
    "Answer the given question from what you know. Write the answer and nothing else inside <answer> and </answer>, "
    "for example <answer> Beijing </answer>. Question: {question}\n"
)
COT = (
    "Answer the given question from what you know. Think step by step inside <think> and </think>. Then write the answer and nothing "
    "else inside <answer> and </answer>, for example <answer> Beijing </answer>. Question: {question}\n"
)
RAG = (
    "Answer the given question with the help of the given passages, which may or may not be useful. Write the answer and nothing else "
    "inside <answer> and </answer>, for example <answer> Beijing </answer>. Question: {question} Context: {context}\n"
)
IRCOT = (
    "Answer the given question step by step with the help of the given passages, which may or may not be useful. Write one short thought "
    "at a time, each inside <think> and </think>; passages about it will be added. Once you know the answer, end your thought with it like "
    "this: So the answer is: Beijing. Question: {question} Context: {context}\n"
)
NOTES = (
    "Read the given passages and write down, inside <answer> and </answer>, what in them helps with the given question, as short as you can. "
    "If nothing does, write that there is no helpful information. Question: {question} Context: {context}\n"
)
NO_NOTES = "There is no helpful information."
SAYS_ANSWER = "So the answer is:"
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


def tag_ids(tokenizer, tag):
    return tokenizer(tag, add_special_tokens=False)["input_ids"]


def reading_ids(tokenizer, question, template, start, passages, settings, retrievals=1):
    """prompt_ids with as many tokens of passages as rollout() would show after so many searches, and room for an answer."""
    room = settings["max_length"] - settings["max_new_tokens"] - len(prompt_ids(tokenizer, question, template, start))
    budget = max(0, min(retrievals * settings["max_obs_length"], room))
    return prompt_ids(tokenizer, question, template, start, passages, budget)


def write(policy, tokenizer, questions, prompts, tag, settings, **how):
    """One call of the model a prompt (list of ids): it writes until `tag`, end of sequence, or its budget -> list[Rollout].

    turns[0] is the text before the tag; finished says that it was not the budget that ended it.
    """
    own = {name: settings[name] for name in ("max_new_tokens", "max_length")}
    calls = rollout(policy, tokenizer, questions, None, prompts=prompts, stop_tags=(tag,), do_search=False, **own, **how)
    ends = end_ids(policy, tokenizer)
    for r in calls:
        text = tokenizer.decode([i for i in r.ids[r.prompt_length :] if i not in ends])
        r.finished, r.answer, r.num_valid_actions = tag in text or r.ids[-1] in ends, None, 0
        r.turns = [text.partition(tag)[0]]
    return calls


def written_ids(policy, tokenizer, r, tag):
    """What the model wrote in a call, as ids that a later call can go on from: the very ids that were sampled, without an end
    of sequence, with `tag` where it is missing."""
    ids = [i for i in r.ids[r.prompt_length :] if i not in end_ids(policy, tokenizer)]
    return ids if tag in tokenizer.decode(ids) else ids + tag_ids(tokenizer, tag)


def read_answer(r):
    """A call that began after "<answer>" -> its answer, or None if the budget ended it."""
    return r.turns[0].rpartition("<answer>")[2].strip() if r.finished else None  # some models open the tag once more


def one_record(calls, answer, finished, searches=(), found=None):
    """All calls of the model about one question -> one Rollout. A call that goes on where the last one ended adds what is new."""
    record = Rollout(calls[0].question, [], [], [], calls[0].prompt_length, answer, finished, searches=list(searches))
    record.found = found or [None for _ in calls]
    last, start = None, 0
    for r in calls:
        if last:  # the ids that its prompt has in common with all of the last call
            alike = [a == b for a, b in zip(last.ids, r.ids[: r.prompt_length])] + [False]
            goes_on = last.prompt_length <= alike.index(False) and last.prompt_length < r.prompt_length
            start = alike.index(False) if goes_on else 0
        record.ids += r.ids[start:]
        record.response_mask += r.response_mask[start:]
        record.logprobs += r.logprobs[start:]
        record.turns += r.turns
        last = r
    return record


def direct(policy, tokenizer, questions, search, settings, **how):
    """The answer at once, from what the weights know."""
    prompts = [direct_ids(tokenizer, question) for question in questions]
    calls = write(policy, tokenizer, questions, prompts, "</answer>", settings, **how)
    return [one_record([r], read_answer(r), r.finished) for r in calls]


def cot(policy, tokenizer, questions, search, settings, **how):
    """[Wei et al. 2022] Chain of thought: thinking, then the answer. Thinking that does not end is ended by its budget."""
    prompts = [prompt_ids(tokenizer, question, COT, "<think>") for question in questions]
    thoughts = write(policy, tokenizer, questions, prompts, "</think>", settings, **how)
    opened = tag_ids(tokenizer, "<answer>")
    prompts = [ids + written_ids(policy, tokenizer, r, "</think>") + opened for ids, r in zip(prompts, thoughts)]
    rows = [i for i, ids in enumerate(prompts) if len(ids) < settings["max_length"]]  # others have thought until the end
    answers = write(policy, tokenizer, [questions[i] for i in rows], [prompts[i] for i in rows], "</answer>", settings, **how)
    records = [one_record([r], None, False) for r in thoughts]
    for i, r in zip(rows, answers):
        records[i] = one_record([thoughts[i], r], read_answer(r), r.finished)
    return records


def ircot(policy, tokenizer, questions, search, settings, **how):
    """[Trivedi et al. 2023] Interleaved retrieval and chain of thought: every thought is the next query, its passages join
    those that were found before. Who has not said the answer after max_turns thoughts is answered by the reader, the prompt of
    RAG over all passages, as the paper's separate reader does it."""
    shown = [{} for _ in questions]  # the union of what was found, by the passages' ids: top_k * (max_turns + 1) at most
    calls, searches, found = ([[] for _ in questions] for _ in range(3))
    thoughts = [[] for _ in questions]  # ids of all thoughts so far, each in its tags
    answers = [None for _ in questions]
    opened = tag_ids(tokenizer, "<think>")
    asking, reading, queries = list(range(len(questions))), [], list(questions)
    for turn in range(settings["max_turns"] + 1):
        for i, query, passages in zip(asking, queries, search(queries, settings["top_k"]) if queries else [], strict=True):
            searches[i].append(query)
            found[i].append(passages)
            shown[i] |= {p.id: p for p in passages}
        prompts = {}
        for i in asking:
            left = settings | {"max_length": settings["max_length"] - len(thoughts[i]) - len(opened)}
            prompt = reading_ids(tokenizer, questions[i], IRCOT, "", shown[i].values(), left, turn + 1)
            if turn < settings["max_turns"] and len(prompt) + settings["max_new_tokens"] <= left["max_length"]:
                prompts[i] = prompt + thoughts[i] + opened
            else:  # no more thoughts, or no more room for one
                reading.append(i)
        asked = [questions[i] for i in prompts]
        written = write(policy, tokenizer, asked, list(prompts.values()), "</think>", settings, **how)
        asking, queries = [], []
        for i, r in zip(prompts, written):
            calls[i].append(r)
            thoughts[i] += opened + written_ids(policy, tokenizer, r, "</think>")
            thought, said, answer = r.turns[0].partition(SAYS_ANSWER)
            if said and r.finished:
                answers[i] = answer.strip().removesuffix(".").strip()
            else:
                asking.append(i)
                queries.append(thought.strip())
    asked = [questions[i] for i in reading]
    prompts = [
        reading_ids(tokenizer, questions[i], RAG, "<answer>", shown[i].values(), settings, len(searches[i])) for i in reading
    ]
    for i, r in zip(reading, write(policy, tokenizer, asked, prompts, "</answer>", settings, **how)):
        calls[i].append(r)
        answers[i] = read_answer(r)
    return [one_record(*row) for row in zip(calls, answers, [a is not None for a in answers], searches, found)]


def search_o1(policy, tokenizer, questions, search, settings, **how):
    """[Li et al. 2025] Search-R1's conversation without its training, and the model never reads a raw passage in it: for each
    query it is first shown the passages apart, and what it writes down about them (the paper's Reason-in-Documents) is the one
    passage that comes back.

    The record: `found` has the raw passages; ids and turns have the notes behind the conversation.
    """
    notes, raw = [], []
    # The conversations' own slots are in use while they wait for notes; a quarter of them waits at a time.
    aside = how | {"cache": Slots(policy, max(1, len(how["cache"].lengths) // 4), settings["max_length"])}

    def search_and_read(queries, top_k):
        found = search(queries, top_k)
        prompts = [reading_ids(tokenizer, query, NOTES, "<answer>", p, settings) for query, p in zip(queries, found, strict=True)]
        texts, first = [], len(notes)
        for query, r in zip(queries, write(policy, tokenizer, queries, prompts, "</answer>", settings, **aside)):
            note = r.turns[0].rpartition("<answer>")[2].strip().removesuffix(".")
            texts.append(f"{query}: {note}." if note else NO_NOTES)
            notes.append(r)
        raw.extend(found)
        return [[Passage(str(first + i), "Notes", text)] for i, text in enumerate(texts)]

    records = []
    for r in rollout(policy, tokenizer, questions, search_and_read, **settings | {"do_search": True}, **how):
        mine = [int(passages[0].id) for passages in r.found if passages]
        found = [raw[int(passages[0].id)] if passages else None for passages in r.found]
        records.append(one_record([r, *(notes[n] for n in mine)], r.answer, r.finished, r.searches, found))
    return records


def rag(policy, tokenizer, questions, search, settings, **how):
    """[Lewis et al. 2020] Retrieval-augmented generation: one search with the question, then the answer, without reasoning, as
    FlashRAG's naive RAG does it."""
    found = search(questions, settings["top_k"])
    prompts = [reading_ids(tokenizer, q, RAG, "<answer>", p, settings) for q, p in zip(questions, found, strict=True)]
    calls = write(policy, tokenizer, questions, prompts, "</answer>", settings, **how)
    return [one_record([r], read_answer(r), r.finished, [r.question], [p]) for r, p in zip(calls, found)]


def r1(policy, tokenizer, questions, search, settings, **how):
    """[DeepSeek-AI 2025] A policy of train.py --no-search: the official prompt without search, one turn."""
    return rollout(policy, tokenizer, questions, search, **settings | {"do_search": False}, **how)


def search_r1(policy, tokenizer, questions, search, settings, **how):
    """[Algorithm 1] The rollout, as the policy was trained."""
    return rollout(policy, tokenizer, questions, search, **settings, **how)


METHODS = {  # in the order of the paper's table
    "direct": direct,
    "cot": cot,
    "ircot": ircot,
    "search-o1": search_o1,
    "rag": rag,
    "sft": direct,  # on a checkpoint of train.py --algo sft
    "r1": r1,
    "rejection": search_r1,  # on a checkpoint of train.py --algo rejection
    "search-r1": search_r1,
}
WITHOUT_SEARCH = ("direct", "cot", "sft", "r1")  # these need no passages
WITH_FORMAT = ("search-o1", "r1", "rejection", "search-r1")  # what they write is meant to be check_format's language


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


def load_settings(checkpoint, real=None, top_k=None):
    """search_r1.json of a checkpoint -> dict; for a model without one the paper's values if questions or corpus are `real`,
    else the tiny world's."""
    file = Path(checkpoint) / "search_r1.json"
    default = (PAPER_SETTINGS if real else data.TINY_SETTINGS) | {"world_seed": 0, "corpus": None}
    return (json.loads(file.read_text()) if file.exists() else default) | ({"top_k": top_k} if top_k else {})


def read_file(load, path):
    """load(path), with a file that cannot be opened turned into a Mistake."""
    try:
        return load(path)
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from None


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


# ----- 4. The comparison: methods x sets, kept question by question -----

BATCH = 64  # questions that are answered, and then kept, together: what a killed comparison loses at most


def question_sets(specs):
    """--data -> ({name: list of Questions}, their files); "all" is the seven sets of the paper. A name is what was given."""
    names = dict.fromkeys(name for spec in specs for name in (data.DATASETS if spec == "all" else [spec]))
    files = [file for name in names for file in read_file(lambda spec: data.question_files(spec, "eval"), name)]
    return {name: read_file(lambda spec: data.load_data(spec, "eval"), name) for name in names}, files


def kept(path, config):
    """FILE of --json -> (the records that it or FILE.part has of this very comparison, is it complete). What a killed process
    left of a last line goes. Mistake for a file of another comparison."""
    part, records = Path(f"{path}.part"), []
    try:
        if Path(path).exists():
            content = json.loads(Path(path).read_text())
            begun, records, of = content["config"], content["records"], Path(path)
        elif part.exists():
            lines = part.read_bytes().split(b"\n")
            whole = b"\n".join(lines[:-1] + [b""])
            if whole != part.read_bytes():
                part.write_bytes(whole)
            begun, *records = [json.loads(line) for line in lines[:-1]] or [config]
            of = part
        else:
            return [], False
        for name in config | begun:
            if begun.get(name) != config.get(name):
                before, now = (json.dumps(c.get(name)) for c in (begun, config))
                raise Mistake(f"{of} is of another comparison: {name} was {before}, now {now}; give another --json, or remove it")
    except (ValueError, TypeError, KeyError):
        raise Mistake(f"{path} is there and was not written by this script: give another --json") from None
    return records, of == Path(path)


def make_record(r, q, scores, tokenizer, method, name, position):
    """One answered question as --json keeps it."""
    return {
        "method": method,
        "data": name,
        "position": position,
        "id": q.id,
        "question": q.question,
        "golden_answers": list(q.golden_answers),
        "hops": q.hops,
        "answer": r.answer,
        **scores,
        "queries": r.searches,
        "prompt": tokenizer.decode(r.ids[: r.prompt_length]),
        "transcript": transcript(r, tokenizer),
    }


def answer_all(policy, tokenizer, search, methods, sets, settings, temperature=0.0, records=(), part=None):
    """Every method on every set -> one record a method, set and question, in this order. Questions that have one among
    `records` are not asked again; new ones are written to the open file `part`, a batch at a time."""
    have = {(r["method"], r["data"], r["position"]): r for r in records}
    cache = Slots(policy, BATCH, settings["max_length"])
    generator = torch.Generator(policy.get_output_embeddings().weight.device)
    for method in methods:
        for name, questions in sets.items():
            of = [have[method, name, i] for i in range(len(questions)) if (method, name, i) in have]
            with tqdm(total=len(questions), initial=len(of), desc=f"{method}, {name}", disable=len(of) == len(questions)) as bar:
                for at in range(0, len(questions), BATCH):
                    rows = [i for i in range(at, min(at + BATCH, len(questions))) if (method, name, i) not in have]
                    if not rows:
                        continue
                    part_questions = [questions[i] for i in rows]
                    generator.manual_seed(at)  # a comparison that goes on draws what it would have drawn
                    _, rollouts = evaluate(
                        policy, tokenizer, part_questions, search, settings, temperature, generator, cache=cache, method=method
                    )
                    new = [
                        make_record(r, questions[i], score(r, questions[i], method), tokenizer, method, name, i)
                        for i, r in zip(rows, rollouts)
                    ]
                    have |= {(method, name, r["position"]): r for r in new}
                    if part:
                        part.write("".join(json.dumps(r) + "\n" for r in new))
                        part.flush()
                    of += new
                    bar.update(len(new))
                    bar.set_postfix_str(f"EM {sum(r['em'] for r in of) / len(of):.3f}")
    return [have[method, name, i] for method in methods for name in sets for i in range(len(sets[name]))]


def summary(records):
    """Records -> (metrics, intervals of em and f1), both {method: {set: {name: value}}}."""
    groups, metrics, intervals = {}, {}, {}
    for r in records:
        groups.setdefault((r["method"], r["data"]), []).append(r)
    for (method, name), of in groups.items():
        metrics.setdefault(method, {})[name] = mean_scores(of, [r["hops"] for r in of])
        intervals.setdefault(method, {})[name] = {key: list(bootstrap_interval([r[key] for r in of])) for key in ("em", "f1")}
    return metrics, intervals


def compare(args, methods, sets, settings, saved, corpus, encoder, load):
    """The comparison that the command line asks for -> its records: those that --json has already, and those of the questions
    that are left, for which load() gives policy, tokenizer and search engine. Then FILE is written, and FILE.part goes."""
    config = {"checkpoint": args.checkpoint, "methods": methods, "data": list(sets), "corpus": corpus, "encoder": encoder}
    config |= {"limit": args.limit, "temperature": args.temperature, "top_k": settings["top_k"], "settings": settings}
    config["trained"] = saved
    config["questions"] = {name: hashlib.sha256(repr(questions).encode()).hexdigest()[:16] for name, questions in sets.items()}
    if not args.json:
        policy, tokenizer, engine = load()
        return answer_all(policy, tokenizer, engine.search, methods, sets, settings, args.temperature)
    records, complete = kept(args.json, config)
    file, part = Path(args.json), Path(f"{args.json}.part")
    if not complete:
        policy, tokenizer, engine = load()
        with open(part, "a") as lines:
            if not lines.tell():
                lines.write(json.dumps(config) + "\n")
            try:
                records = answer_all(policy, tokenizer, engine.search, methods, sets, settings, args.temperature, records, lines)
            except SearchFailed as error:
                raise Mistake(f"{error}; what was answered is in {part}, and the same command goes on") from None
        metrics, intervals = summary(records)
        content = {"metrics": metrics, "intervals": intervals, "config": config, "records": records}
        write_whole(file, json.dumps(content, indent=1) + "\n")
    part.unlink(missing_ok=True)
    return records


# Quoted: exact match as the paper reports it, v5, Tables 2, 3 and 5, copied from public notes since the PDF was not at hand.
# The sets in the order of DATASETS, then their average as printed; a star: see PAPER_NOTE.
PAPER = """
7B direct                     .134 .408 .140 .183 .250 .031 .120 .181
7B cot                        .048 .185 .054 .092 .111 .022 .232 .106
7B ircot                      .224 .478 .301 .133 .149 .072 .224 .239*
7B search-o1                  .151 .443 .131 .187 .176 .058* .296 .206
7B rag                        .349 .585 .392 .299 .235 .058 .208 .304
7B sft                        .318 .354 .121 .217 .259 .066 .112 .207
7B r1, base                   .297 .539 .202* .242 .273 .083 .296* .276*
7B r1, instruct               .270 .537 .199 .237 .292 .072 .293 .271
7B rejection                  .360 .592 .380 .331 .296 .123 .355 .348
7B search-r1, base, PPO       .480 .638 .457 .433 .382 .196 .432 .431
7B search-r1, instruct, PPO   .393 .610 .397 .370 .414 .146 .368 .385
7B search-r1, base, GRPO      .395 .560 .388 .326 .297 .125 .360 .350
7B search-r1, instruct, GRPO  .429 .623 .427 .386 .346 .162 .400 .396
3B direct                     .106 .288 .108 .149 .244 .020 .024 .134
3B cot                        .023 .032 .005 .021 .021 .002 .000 .015
3B ircot                      .111 .312 .200 .164 .171 .067 .240 .181
3B search-o1                  .238 .472 .262 .221 .218 .054 .320 .255
3B rag                        .348 .544 .387 .255 .226 .047 .080 .270
3B sft                        .249 .292 .104 .186 .248 .044 .112 .176
3B r1, base                   .226 .455 .173 .201 .268 .055 .224 .229
3B r1, instruct               .210 .449 .171 .208 .275 .060 .192 .224
3B rejection                  .294 .488 .332 .240 .233 .059 .210 .265
3B search-r1, base, PPO       .406 .587 .435 .284 .273 .049 .088 .303
3B search-r1, instruct, PPO   .341 .545 .378 .324 .319 .103 .264 .325
3B search-r1, base, GRPO      .421 .583 .413 .297 .274 .066 .128 .312
3B search-r1, instruct, GRPO  .397 .565 .391 .331 .310 .124 .232 .336
14B direct                    .198 .531 .184 .217 .253 .045 .160 .227
14B cot                       .190 .495 .148 .269 .297 .054 .432 .269
14B ircot                     .114 .375 .166 .230 .248 .102 .312 .221
14B search-o1                 .347 .635 .241 .268 .161 .099 .416 .310
14B rag                       .327 .585 .376 .279 .160 .051 .192 .281
14B sft                       .361 .467 .150 .248 .278 .089 .160 .250
14B r1, base                  .369 .626 .270 .306 .326 .117 .488 .357
14B r1, instruct              .334 .628 .253 .294 .325 .108 .432 .339
14B search-r1, base, PPO      .486 .676 .480 .468 .470 .241 .528 .479
14B search-r1, instruct, PPO  .424 .660 .442 .436 .379 .210 .480 .433
"""
PAPER_NOTE = (
    "Quoted, not measured here: exact match of Qwen2.5 in the paper's tables (arXiv 2503.09516 v5, Tables 2, 3 and 5), as transcribed in public notes.\n"
    "* Transcriptions differ: 7B search-o1 on musique .062, 7B r1, base on popqa .199 and bamboogle .203 (average .262) in another one.\n  The cells of 7B ircot have an average of .226."
)


def paper_rows():
    """PAPER -> [(label, its eight cells as text)]."""
    return [(" ".join(line.split()[:-8]), line.split()[-8:]) for line in PAPER.strip().splitlines()]


def aligned(rows):
    """Rows of cells as lines: the first cell to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def paper_table(names=()):
    """The paper's rows for those of the sets `names` that it has (none: all), the average over these, and where they are from."""
    known = [next((n for n in (name, Path(name).parent.name, Path(name).stem) if n in data.DATASETS), None) for name in names]
    shown = [name for name in data.DATASETS if name in known] or list(data.DATASETS)
    columns = [list(data.DATASETS).index(name) for name in shown]
    rows = [["EM of the paper", *shown] + ["average"] * (len(shown) > 1)]
    for label, cells in paper_rows():
        row = [label, *(cells[c] for c in columns)]
        if len(shown) == len(data.DATASETS):
            row.append(cells[-1])
        elif len(shown) > 1:
            row.append(f"{sum(float(cells[c].rstrip('*')) for c in columns) / len(columns):.3f}".lstrip("0"))
        rows.append(row)
    return f"{aligned(rows)}\n{PAPER_NOTE}"


def comparison_table(metrics, intervals):
    """Exact match, a row a method and a column a set, and below all other metrics -> text. "-": the method has no such thing."""
    names = list(next(iter(metrics.values())))
    labels = {name: Path(name).stem if Path(name).suffix else name for name in names}
    first = next(iter(metrics.values()))[names[0]]
    hops = [key for key in first if key.startswith("em_")] if len(names) == 1 else []
    if hops:
        columns = [({"em_1hop": "one hop", "em_2hop": "two hops"}[key], lambda of, key=key: of[names[0]][key]) for key in hops]
        columns.append(("all", lambda of: of[names[0]]["em"]))
    else:
        columns = [(labels[name], lambda of, name=name: of[name]["em"]) for name in names]
        if len(names) > 1:
            columns.append(("average", lambda of: sum(of[name]["em"] for name in names) / len(names)))
    rows = [["EM", *(label for label, _ in columns)]]
    rows += [[method, *(f"{value(of):.3f}" for _, value in columns)] for method, of in metrics.items()]
    keys = list(dict.fromkeys(key for of in metrics.values() for m in of.values() for key in m if not key.endswith("hop")))
    more = [["", *(f"{key}, 95 %" if key in ("em", "f1") else key for key in keys)]]
    for method, of in metrics.items():
        for name, m in of.items():
            row = [f"{method}, {labels[name]}" if len(names) > 1 else method]
            for key in keys:
                row.append(f"{m[key]:.3f}" if key in m else "-")
                if key in intervals[method][name]:
                    row[-1] += " ({:.3f} to {:.3f})".format(*intervals[method][name][key])
            more.append(row)
    return f"{aligned(rows)}\n\n{aligned(more)}"


# ----- 5. Pictures -----

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


# ----- 6. One conversation -----

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


# ----- 7. A page: before and after -----

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


def write_page(path, before, after, load, questions, where, corpus, settings):
    """Roll out both checkpoints on the questions and write the page. load(checkpoint) -> policy, tokenizer, engine."""
    short = lambda checkpoint: "/".join(Path(checkpoint).parts[-2:])
    loaded = [(short(checkpoint), *load(checkpoint)) for checkpoint in (before, after)]
    sides = page_sides([side[:3] for side in loaded], questions, loaded[-1][3].search, settings)
    about = [
        f"Questions: {len(questions)} of {where}{f', searching {corpus}' if corpus else ''}.",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + "; sampled with seed 0.",
    ]
    write_whole(path, page(questions, sides, about))
    print(f"wrote {path}")


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
        "--method",
        nargs="+",
        metavar="METHOD",
        help=f"one or several of {', '.join(METHODS)}; default: what the checkpoint was trained for",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SET",
        help="one or several: a question file (JSON lines: id, question, golden_answers), a set's name, sets joined by + (nq+hotpotqa); "
        "all: the paper's seven; default: the tiny world's",
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
    parser.add_argument("--limit", type=int, default=0, help="a fixed sample of N questions of each set (default: all)")
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
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write metrics and one record a question to this file; the same command goes on after a crash",
    )
    parser.add_argument("--paper", action="store_true", help="print the paper's rows for these sets, too (alone: nothing else)")
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
    if args.paper and not args.checkpoint:
        print(paper_table(args.data or ()))
        return 0
    if not args.checkpoint:
        raise Mistake("give --checkpoint DIR (a folder that train.py wrote), --plot RUN or --paper")
    if args.temperature < 0 or args.limit < 0:
        raise Mistake("--temperature and --limit cannot be negative")
    if args.top_k is not None and args.top_k < 1:
        raise Mistake(f"--top-k {args.top_k}: must be at least 1")
    if args.json and (Path(args.json).is_dir() or not os.access(Path(args.json).absolute().parent, os.W_OK)):
        raise Mistake(f"cannot write {args.json}: it is a folder, or there is no folder for it that can be written to")
    before = before_of(args) if args.html is not None else None
    saved = load_settings(args.checkpoint, args.corpus or args.data, args.top_k)
    settings = {name: saved[name] for name in SETTINGS}
    methods = list(dict.fromkeys(args.method or [saved.get("method", "search-r1" if saved["do_search"] else "r1")]))
    if unknown := [method for method in methods if method not in METHODS]:
        raise Mistake(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
    corpus, specs = (args.corpus or saved["corpus"], args.data) if args.world_seed is None else (None, None)
    if corpus and not (specs or args.ask or args.chat):
        raise Mistake(f"this checkpoint searches {corpus}; give --data FILE or the name of a set, the questions to evaluate")
    if specs and not corpus and (args.ask or args.chat or args.html or not set(methods) <= set(WITHOUT_SEARCH)):
        raise Mistake("--data needs --corpus FILE (or contexts, wiki18, ...), the passages to search")
    world_seed = saved["world_seed"] if args.world_seed is None else args.world_seed
    encoder = args.encoder or saved.get("encoder", "hashed")
    sets, files = question_sets(specs) if specs else ({}, [])
    where = ", ".join(sets) or f"tiny world {world_seed}, held out"

    def load(checkpoint=args.checkpoint):
        on_gpu = torch.cuda.is_available()  # there in the checkpoint's own precision; a CPU is slow in bf16
        model = load_checkpoint(checkpoint, *(("cuda", "auto") if on_gpu else ()))
        return *model, task(world_seed, corpus, encoder=encoder, others=files)[1]

    if args.ask or args.chat:
        policy, tokenizer, engine = load()
        generator = torch.Generator(policy.device).manual_seed(0)
        how = (policy, tokenizer, *([args.ask] if args.ask else []), engine.search, settings, args.temperature, generator)
        (ask if args.ask else chat)(*how)
        return 0
    sets = sets or {f"tiny world {world_seed}": data.make_world(world_seed).test}
    sets = {name: fixed_sample(questions, args.limit or (PAGE_QUESTIONS if args.html else 0)) for name, questions in sets.items()}
    if args.html:
        write_page(
            args.html, before, args.checkpoint, load, [q for questions in sets.values() for q in questions], where, corpus, settings
        )
        return 0
    records = compare(args, methods, sets, settings | {"do_search": True}, saved, corpus, encoder, load)
    metrics, intervals = summary(records)
    greedy = "greedy" if args.temperature == 0 else f"temperature {args.temperature}"
    print(f"{sum(map(len, sets.values()))} questions ({where}), {greedy}")
    if len(methods) == len(sets) == 1:
        (m,), (i,) = (list(of[methods[0]].values()) for of in (metrics, intervals))
        for name, value in m.items():
            print(f"{name:18} {value:.3f}" + ("   95 %: {:.3f} to {:.3f}".format(*i[name]) if name in i else ""))
    else:
        print(comparison_table(metrics, intervals))
    if args.paper:
        print(paper_table(sets))
    return 0


if __name__ == "__main__":
    run_main(main)
