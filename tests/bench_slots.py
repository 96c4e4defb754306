"""How long is a rollout? The scheduler of engine.run over conversations of made-up lengths, without a model.

    python tests/bench_slots.py [--seed 0]      two seconds on any machine

A step of the presets: 80 rollouts. What is made up: the turns and their lengths, so that a rollout has 1200 ids on
average and the policy wrote 370 of them. What is real: engine.run, which decides who is fed and when. Time is
arithmetic for a card of 1 TB/s and 80 Tflop/s (about an RTX 4090):

    a decoding step    (weights + rows * columns * bytes of a key and value) / 0.85 TB/s, rows and columns as padded for
                       the graph, and 3 microseconds a kernel
    all else           2 flop a weight and id to read; 2 for old log-probs (PPO) and 2 for the reference's; 8 for the
                       update (6 with frozen weights), its repeated forward pass included; PPO: 2 for values, 8 more
                       for the critic's update (6)

The tail decides: once the queue is empty, rows leave and nobody takes their slots, but every step still reads all
weights. The table shows it: the mean number of rows in flight, and the steps with less than a quarter of the rows.
"""

import argparse
import random
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from models import ADAPTER_KERNELS, PRESETS, STEP_KERNELS
from searchr1 import Rollout

MODELS = {  # weights [1e9], layers, key-value heads, size of a head
    "qwen2.5-0.5b": (0.494, 24, 2, 64),
    "qwen2.5-1.5b": (1.544, 28, 2, 128),
    "qwen2.5-3b": (3.086, 36, 2, 128),
    "llama-3.2-3b": (3.213, 28, 8, 128),
}


def conversation(r, rng):
    """A generator as searchr1.converse, with lengths drawn at random and nothing written."""
    searches = rng.choices([0, 1, 2, 3, 4], [5, 30, 35, 20, 10])[0]
    for turn in range(searches + 1):
        for _ in range(min(500, int(rng.lognormvariate(4.55, 0.75)))):
            token, logprob = yield
            r.append([token], [logprob])
        if turn < searches:
            passages = yield "query"
            r.append(passages)


def passages(queries, rng):
    """What a search finds, by its length alone: 100 to 500 ids, 310 on average."""
    return [[0] * max(100, min(500, int(rng.gauss(310, 60)))) for _ in queries]


def simulate(rollouts=80, group_size=5, slots=64, max_length=4096, seed=0):
    """Run the scheduler over made-up conversations -> (list of decoding steps (rows, padded rows, columns), ids read in
    blocks, ids a rollout, written ids a rollout)."""
    rng = random.Random(seed)
    head = SimpleNamespace(weight=torch.zeros(1, 1))
    policy = SimpleNamespace(get_output_embeddings=lambda: head, config=None)  # no network: `feed` is made up below
    records = [Rollout("", [0] * 190, [False] * 190, [0.0] * 190, 190) for _ in range(rollouts)]
    steps, read, held = [], Counter(), engine.Slots(policy, slots, max_length, static=True)

    def feed(policy, slots, rows, blocks):
        width = max(slots.lengths[row] + len(block) for row, block in zip(rows, blocks))
        if max(map(len, blocks)) == 1:
            steps.append((sum(map(len, blocks)), *engine.graph_shape(slots, len(rows), width)))
        else:
            read["ids"] += sum(map(len, blocks))
        for row, block in zip(rows, blocks):
            slots.lengths[row] += len(block)
        return torch.zeros(len(rows), 1)

    plain, engine.feed = engine.feed, feed
    try:
        talks = [(r, conversation(r, rng)) for r in records]
        engine.run(policy, talks, lambda queries: passages(queries, rng), max_length, group_size, 0.0, None, held)
    finally:
        engine.feed = plain
    own = statistics.mean(sum(r.response_mask) for r in records)
    return steps, read["ids"], statistics.mean(len(r.ids) for r in records), own


def seconds(model, algo, simulated):
    """Predicted seconds of (the rollout, all else) of a step."""
    (billions, layers, kv_heads, head_dim), frozen = MODELS[model], bool(PRESETS[f"{model}/{algo}"].get("lora_rank"))
    steps, read, length, _ = simulated
    kernels = layers * (STEP_KERNELS + ADAPTER_KERNELS * frozen) + 20
    kv = 2 * layers * kv_heads * head_dim * 2
    rollout = sum((2e9 * billions + rows * columns * kv) / 0.85e12 + kernels * 3e-6 for _, rows, columns in steps)
    flop = 2 * read + 80 * length * (2 + (6 if frozen else 8))  # blocks; the reference, the update
    if algo == "ppo":
        flop += 80 * length * (2 + 2 + (6 if frozen else 8))  # old log-probs, values, the critic's update
    return rollout, flop * billions * 1e9 / 80e12


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args(argv).seed
    print("| preset, algorithm | decoding | rows in flight | under a quarter | graphs | rollout | a step |")
    print("|---" * 7 + "|")
    for model in MODELS:
        for algo, group_size in (("grpo", 5), ("ppo", 1)):
            slots = PRESETS[f"{model}/{algo}"]["slots"]
            simulated = simulate(80, group_size, slots, 4096, seed)
            steps, _, length, own = simulated
            rows = statistics.mean(n for n, _, _ in steps)
            few, shapes = sum(n < slots / 4 for n, _, _ in steps) / len(steps), len({s[1:] for s in steps})
            rollout, rest = seconds(model, algo, simulated)
            cells = f"{len(steps)} steps | {rows:.0f} of {slots} | {few:.0%} | {shapes} | {rollout:.0f} s"
            print(f"| {model}, {algo} | {cells} | {rollout + rest:.0f} s |")
    print(f"\n{length:.0f} ids a rollout, {own:.0f} of them written by the policy; seed {seed}")


if __name__ == "__main__":
    main()
