"""How fast is the rollout? Ours (keys and values kept over turns) against generate() called turn by turn.

    python tests/bench_rollout.py [CHECKPOINT] [--questions 48] [--group-size 5] [--repeats 3]

Same model, same questions, same engine, same stopping rule, greedy, in one run, in turn. generate() gets the whole
conversation again at every turn, left-padded. Its stop is the cheapest there is, closing tags as end-of-sequence ids,
which only a tokenizer with one token a tag allows; `stop_strings` would cost it more.
Without a checkpoint the base model is used. Figures are tokens that the policy wrote, a second, medians over repeats.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import searchr1
from eval import INVALID_MESSAGES, fixed_sample, load_checkpoint
from retrieval import build_index


def with_generate(policy, tokenizer, questions, search, settings):
    """The same conversations through generate(): lists of the policy's token ids, one a question."""
    conversations = [tokenizer(searchr1.make_prompt(q, tokenizer), add_special_tokens=False)["input_ids"] for q in questions]
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(searchr1.STOP_TAGS))]
    own = [[] for _ in questions]
    running = list(range(len(questions)))
    for turn in range(settings["max_turns"] + 1):
        longest = max(len(conversations[i]) for i in running)
        ids = torch.tensor([[0] * (longest - len(conversations[i])) + conversations[i] for i in running])
        mask = torch.tensor([[0] * (longest - len(conversations[i])) + [1] * len(conversations[i]) for i in running])
        out = policy.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=settings["max_new_tokens"], do_sample=False, pad_token_id=0,
            eos_token_id=stops,
        )[:, longest:]  # fmt: skip
        asking, queries, still = [], [], []
        for i, row in zip(running, out.tolist()):
            end = next((n + 1 for n, token in enumerate(row) if token in stops), len(row))
            own[i] += row[:end]
            conversations[i] += row[:end]
            action = searchr1.parse_action(tokenizer.decode(row[:end]))
            if action.kind == "search":
                asking.append(i)
                queries.append(action.content)
            if action.kind != "answer":
                still.append(i)
        if turn == settings["max_turns"]:
            break
        found = dict(zip(asking, search(queries, settings["top_k"])))
        for i in still:
            text = searchr1.format_information(found[i]) if i in found else settings["invalid_message"]
            conversations[i] += searchr1.observation_ids(tokenizer, text, settings["max_obs_length"], "</information>\n\n")
        running = still
        if not running:
            break
    return own


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    policy, tokenizer = load_checkpoint(args.checkpoint) if args.checkpoint else data.base_model(data.BaseConfig(), "outputs")[:2]
    world = data.make_world(0)
    engine = build_index(world.passages)
    settings = data.TINY_SETTINGS | {"invalid_message": INVALID_MESSAGES["paper"]}
    questions = [q.question for q in fixed_sample([q for q in world.test if q.hops == 2], args.questions)]
    everyone = [q for q in questions for _ in range(args.group_size)]
    print(
        f"{torch.get_num_threads()} threads, {sum(p.numel() for p in policy.parameters()):,} parameters, {len(everyone)} rollouts of two-hop questions, {args.repeats} repeats"
    )
    rates = {"ours": [], "generate() turn by turn": []}
    for _ in range(args.repeats):
        began = time.perf_counter()
        ours = searchr1.rollout(policy, tokenizer, questions, engine.search, args.group_size, temperature=0, **settings)
        between = time.perf_counter()
        with torch.no_grad():
            theirs = with_generate(policy, tokenizer, everyone, engine.search, settings)
        ended = time.perf_counter()
        written = [[i for i, mine in zip(r.ids, r.response_mask) if mine] for r in ours]
        rates["ours"].append(sum(map(len, written)) / (between - began))
        rates["generate() turn by turn"].append(sum(map(len, theirs)) / (ended - between))
    same = sum(a == b for a, b in zip(written, theirs))
    print(
        f"{same} of {len(everyone)} conversations are token for token the same; {sum(map(len, written)) / len(written):.1f} tokens written, {sum(len(r.turns) for r in ours) / len(ours):.2f} turns"
    )
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["generate() turn by turn"]))
        print(f"{name:26} {statistics.median(values):8.0f} tokens/s   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
