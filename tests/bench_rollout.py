"""How fast is a rollout? Ours against generate() turn by turn, which encodes all again or keeps its cache.

    python tests/bench_rollout.py [--models tiny 512] [--turns 1 2 4 8] [--repeats 3]      three engines, random weights
    python tests/bench_rollout.py --conversations [CHECKPOINT]                             real conversations, ragged

The table. Each turn is --new tokens (16), and three passages of 60 words follow it. The prompt is the official one, the
questions have different lengths, groups have 4 members, decoding is greedy. All three engines get the same model,
prompts and turns, and run in turn. Nobody stops early, so all do the same work; no case suits generate() better. The
tokens are compared, too.

Conversations. The tiny world's base model, or a checkpoint, answers two-hop questions as in training; rows stop when
they like. generate() stops in the cheapest way, at closing tags as end-of-sequence ids. That needs a tokenizer in which
a tag is one token.

The figures are tokens a second that the policy wrote, medians over the repeats. Ratios are to the first row.
"""

import argparse
import statistics
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import searchr1
from retrieval import Passage, build_index

SHAPES = {  # layers, width, heads, key-value heads, vocabulary
    "tiny": (2, 128, 8, 8, 674),
    "512": (4, 512, 8, 2, 16384),
}
PASSAGES = [Passage(str(i), f"Title {i}", " ".join(f"word{i}.{n}" for n in range(60))) for i in range(3)]


class WordTokenizer:
    """A token a word, its id a checksum; ids never decode to a tag, so every turn runs to its limit."""

    eos_token_id, chat_template = None, None

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def __len__(self):
        return self.vocabulary

    def __call__(self, text, **_):
        return {"input_ids": [zlib.crc32(word.encode()) % self.vocabulary for word in text.split()]}

    def decode(self, ids):
        return " ".join(map(str, ids))

    def convert_ids_to_tokens(self, ids):
        return [str(i) for i in ids]


def random_model(name):
    layers, width, heads, kv_heads, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=width // heads, intermediate_size=2 * width, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def written(rollouts):
    """What the policy wrote, a list of ids a rollout."""
    return [[i for i, own in zip(r.ids, r.response_mask) if own] for r in rollouts]


def left_padded(rows):
    """Lists of ids -> ids and mask, long [B, longest]."""
    longest = max(map(len, rows))
    ids_BL = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids_BL, mask_BL


# ----- The table: the same work for all -----


def ours(policy, tokenizer, questions, group_size, turns, new, block):
    # No turn holds a tag, so all are invalid: what they are told is the block of passages.
    settings = searchr1.Settings(turns - 1, max_new_tokens=new, max_obs_length=10**6, invalid_message=block)
    return written(searchr1.rollout(policy, tokenizer, questions, None, settings, group_size, temperature=0))


def with_generate(policy, tokenizer, questions, group_size, turns, new, block, keep_cache=False):
    """The same through generate(). It gets the whole conversation every turn and, if kept, its old cache."""
    prompts = [tokenizer(searchr1.make_prompt(q))["input_ids"] for q in questions for _ in range(group_size)]
    ids, mask = left_padded(prompts)
    own = [[] for _ in prompts]
    observation = torch.tensor([tokenizer(block)["input_ids"]]).expand(len(prompts), -1)
    cache = DynamicCache(config=policy.config) if keep_cache else None
    for turn in range(turns):
        if turn:
            ids = torch.cat([ids, observation], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        start = ids.shape[1]
        ids = policy.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            past_key_values=cache,
        )  # fmt: skip
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        own = [mine + row for mine, row in zip(own, ids[:, start:].tolist())]
    return own


def with_kept_cache(*args):
    return with_generate(*args, keep_cache=True)


def table(args):
    engines = {"generate(), all encoded again": with_generate, "generate(), cache kept": with_kept_cache, "ours": ours}
    first = next(iter(engines))
    questions = [f"question {'word ' * (5 * n % 17)}{n}?" for n in range(args.questions)]
    block = searchr1.format_information(PASSAGES)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {4 * args.questions} rollouts, ", end="")
    print(f"{args.new} tokens a turn, {len(block.split())} words of passages")
    for name in args.models:
        policy = random_model(name)
        tokenizer = WordTokenizer(policy.config.vocab_size)
        for turns in args.turns:
            seconds, wrote = {engine: [] for engine in engines}, {}
            for _ in range(args.repeats):
                for engine, run in engines.items():
                    began = time.perf_counter()
                    with torch.no_grad():
                        wrote[engine] = run(policy, tokenizer, questions, 4, turns, args.new, block)
                    seconds[engine].append(time.perf_counter() - began)
            tokens = sum(map(len, wrote[first]))
            for engine in engines:
                ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[engine]))
                same = sum(a == b for a, b in zip(wrote[engine], wrote[first]))
                rate = tokens / statistics.median(seconds[engine])
                print(f"{name:5} {turns} turns  {engine:30} {rate:8.0f} tokens/s   ratio {ratio:.2f}   ", end="")
                print(f"{same} of {len(wrote[first])} the same", flush=True)


# ----- Real conversations -----


def conversations_with_generate(policy, tokenizer, questions, search, settings):
    """Real conversations through generate(), all encoded again: lists of the policy's token ids, one a question."""
    contexts = [searchr1.prompt_ids(q, tokenizer, settings) for q in questions]
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(searchr1.STOP_TAGS))]
    own = [[] for _ in questions]
    running = list(range(len(questions)))
    for turn in range(settings.max_turns + 1):
        ids, mask = left_padded([contexts[i] for i in running])
        out = policy.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, do_sample=False, pad_token_id=0,
            eos_token_id=stops,
        )[:, ids.shape[1] :]  # fmt: skip
        asking, queries, still = [], [], []
        for i, row in zip(running, out.tolist()):
            end = next((n + 1 for n, token in enumerate(row) if token in stops), len(row))
            own[i] += row[:end]
            contexts[i] += row[:end]
            action = searchr1.parse_action(tokenizer.decode(row[:end]))
            if action.kind == "search":
                asking.append(i)
                queries.append(action.content)
            if action.kind != "answer":
                still.append(i)
        if turn == settings.max_turns or not still:
            break
        found = dict(zip(asking, search(queries, settings.top_k)))
        for i in still:
            text = searchr1.format_information(found[i]) if i in found else searchr1.RETHINK
            contexts[i] += searchr1.observation_ids(tokenizer, text, settings.max_obs_length, "</information>\n\n")
        running = still
    return own


def conversations(args):
    checkpoint = args.conversations
    made = data.load_checkpoint(checkpoint) if checkpoint else data.base_model(data.BaseConfig(), "outputs")
    policy, tokenizer = made[:2]
    world = data.make_world(0)
    engine = build_index(world.passages)
    settings = replace(data.TINY_SETTINGS, invalid_message="paper")
    questions = data.fixed_sample([q for q in world.test if q.hops == 2], 6 * args.questions)
    everyone = [q for q in questions for _ in range(5)]
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{torch.get_num_threads()} threads, {parameters:,} parameters, ", end="")
    print(f"{len(everyone)} rollouts of two-hop questions, {args.repeats} repeats")
    rates = {"generate() turn by turn": [], "ours": []}
    for _ in range(args.repeats):
        began = time.perf_counter()
        mine = searchr1.rollout(policy, tokenizer, questions, engine.search, settings, 5, temperature=0)
        between = time.perf_counter()
        with torch.no_grad():
            theirs = conversations_with_generate(policy, tokenizer, everyone, engine.search, settings)
        ended = time.perf_counter()
        rates["ours"].append(sum(map(len, written(mine))) / (between - began))
        rates["generate() turn by turn"].append(sum(map(len, theirs)) / (ended - between))
    same = sum(a == b for a, b in zip(written(mine), theirs))
    print(f"{same} of {len(everyone)} conversations are token for token the same; ", end="")
    tokens, turns = sum(map(len, written(mine))) / len(mine), sum(len(r.turns) for r in mine) / len(mine)
    print(f"{tokens:.1f} tokens written, {turns:.2f} turns")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["generate() turn by turn"]))
        print(f"{name:26} {statistics.median(values):8.0f} tokens/s   ratio {ratio:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoint = {"nargs": "?", "const": "", "metavar": "CHECKPOINT"}
    parser.add_argument("--conversations", **checkpoint, help="the tiny world's conversations instead")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    conversations(args) if args.conversations is not None else table(args)


if __name__ == "__main__":
    main()
