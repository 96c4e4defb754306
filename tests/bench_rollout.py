"""How fast is the rollout? Ours against generate() turn by turn, encoding everything again or with its cache kept.

    python tests/bench_rollout.py [--models tiny 512] [--turns 1 2 4 8] [--repeats 3]      three engines, random weights
    python tests/bench_rollout.py --conversations [CHECKPOINT]                             real conversations, ragged

The table: every turn is --new tokens (16), then three passages of 60 words come in; the official prompt, questions of different
lengths, groups of 4; greedy; same model, same prompts, same turns, in one run, in turn. Nobody stops early, so that all
three do the same work: the case that suits generate() best. The tokens are compared, too.

Conversations: the tiny world's base model (or a checkpoint) on two-hop questions, as in training; rows stop when they
like. generate()'s stop is the cheapest there is, closing tags as end-of-sequence ids, which only a tokenizer with one
token a tag allows.

Figures are tokens that the policy wrote, a second, medians over repeats; the ratio is to the first row.
"""

import argparse
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import searchr1
from eval import INVALID_MESSAGES, fixed_sample, load_checkpoint
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


def ours(policy, tokenizer, questions, group_size, turns, new, block):
    rollouts = searchr1.rollout(
        policy, tokenizer, questions, None, group_size, max_turns=turns - 1, max_new_tokens=new, max_obs_length=10**6, temperature=0,
        invalid_message=block,
    )  # fmt: skip
    return [[i for i, own in zip(r.ids, r.response_mask) if own] for r in rollouts]


def with_generate(policy, tokenizer, questions, group_size, turns, new, block, keep_cache=False):
    """The same through generate(), left-padded; it gets the whole conversation every turn and, if kept, its old cache."""
    prompts = [tokenizer(searchr1.make_prompt(q))["input_ids"] for q in questions for _ in range(group_size)]
    longest, own = max(map(len, prompts)), [[] for _ in prompts]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    observation = torch.tensor([tokenizer(block)["input_ids"]]).expand(len(prompts), -1)
    cache = DynamicCache(config=policy.config)
    for turn in range(turns):
        if turn:
            ids = torch.cat([ids, observation], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        start = ids.shape[1]
        ids = policy.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            past_key_values=cache if keep_cache else None,
        )  # fmt: skip
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        own = [mine + row for mine, row in zip(own, ids[:, start:].tolist())]
    return own


def table(args):
    engines = {
        "generate(), all encoded again": with_generate,
        "generate(), cache kept": lambda *a: with_generate(*a, keep_cache=True),
        "ours": ours,
    }
    questions = [f"question {'word ' * (5 * n % 17)}{n}?" for n in range(args.questions)]
    block = searchr1.format_information(PASSAGES)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {4 * args.questions} rollouts, {args.new} tokens a turn, {len(block.split())} words of passages"
    )
    for name in args.models:
        layers, width, heads, kv_heads, vocabulary = SHAPES[name]
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=width // heads, intermediate_size=2 * width, initializer_range=0.05, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        policy, tokenizer = Qwen3ForCausalLM(config).eval(), WordTokenizer(vocabulary)
        for turns in args.turns:
            seconds, written = {engine: [] for engine in engines}, {}
            for _ in range(args.repeats):
                for engine, run in engines.items():
                    began = time.perf_counter()
                    with torch.no_grad():
                        written[engine] = run(policy, tokenizer, questions, 4, turns, args.new, block)
                    seconds[engine].append(time.perf_counter() - began)
            first, *_ = engines
            tokens = sum(map(len, written[first]))
            for engine in engines:
                ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[engine]))
                same = sum(a == b for a, b in zip(written[engine], written[first]))
                rate = tokens / statistics.median(seconds[engine])
                print(
                    f"{name:5} {turns} turns  {engine:30} {rate:8.0f} tokens/s   ratio {ratio:.2f}   {same} of {len(written[first])} the same",
                    flush=True,
                )


def conversations_with_generate(policy, tokenizer, questions, search, settings):
    """Real conversations through generate(), all encoded again: lists of the policy's token ids, one a question."""
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


def conversations(args):
    checkpoint = args.conversations
    policy, tokenizer = load_checkpoint(checkpoint) if checkpoint else data.base_model(data.BaseConfig(), "outputs")[:2]
    world = data.make_world(0)
    engine = build_index(world.passages)
    settings = data.TINY_SETTINGS | {"invalid_message": INVALID_MESSAGES["paper"]}
    questions = [q.question for q in fixed_sample([q for q in world.test if q.hops == 2], 6 * args.questions)]
    everyone = [q for q in questions for _ in range(5)]
    print(
        f"{torch.get_num_threads()} threads, {sum(p.numel() for p in policy.parameters()):,} parameters, {len(everyone)} rollouts of two-hop questions, {args.repeats} repeats"
    )
    rates = {"generate() turn by turn": [], "ours": []}
    for _ in range(args.repeats):
        began = time.perf_counter()
        mine = searchr1.rollout(policy, tokenizer, questions, engine.search, 5, temperature=0, **settings)
        between = time.perf_counter()
        with torch.no_grad():
            theirs = conversations_with_generate(policy, tokenizer, everyone, engine.search, settings)
        ended = time.perf_counter()
        written = [[i for i, own in zip(r.ids, r.response_mask) if own] for r in mine]
        rates["ours"].append(sum(map(len, written)) / (between - began))
        rates["generate() turn by turn"].append(sum(map(len, theirs)) / (ended - between))
    same = sum(a == b for a, b in zip(written, theirs))
    print(
        f"{same} of {len(everyone)} conversations are token for token the same; {sum(map(len, written)) / len(written):.1f} tokens written, {sum(len(r.turns) for r in mine) / len(mine):.2f} turns"
    )
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["generate() turn by turn"]))
        print(f"{name:26} {statistics.median(values):8.0f} tokens/s   ratio {ratio:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", nargs="?", const="", metavar="CHECKPOINT", help="the tiny world's conversations instead")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    conversations(args) if args.conversations is not None else table(args)


if __name__ == "__main__":
    main()
