"""One whole step at a preset's sizes: peak memory, seconds of each phase, tokens a second, seconds a decoded token.

    python tests/bench_memory.py [--presets qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b] [--algos grpo ppo] [--cap 24]   a GPU
    python tests/bench_memory.py --presets small                                                                any CPU

The weights are random, in the models' true shapes; nothing is downloaded. Rewards are random, and the search engine has
three passages of 60 words. A model that has learned nothing never closes a tag, so every turn runs to its limit, and
all turns are used: about the most that a preset can need, in memory and in time. On a GPU memory is capped at --cap GB
(10^9 bytes) before anything is allocated. Each run is a process of its own. Predicted: models.predict_memory.

Decoding: --decode tokens of a full set of slots that hold 1500 ids each. The floor is what the card could do: reading
all weights, keys and values once a token, at the copy bandwidth measured here. Beside it generate() on the same rows.
"""

import argparse
import dataclasses
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
import searchr1
import train
from bench_rollout import PASSAGES, WordTokenizer
from models import make_models, peak_bytes, predict_memory, predicted_peak, size

QWEN = {
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
SHAPES = {  # of the models' own config.json
    "qwen2.5-0.5b": ("Qwen2", QWEN | {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864,
    }),
    "qwen2.5-1.5b": ("Qwen2", QWEN | {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960,
    }),
    "qwen2.5-3b": ("Qwen2", QWEN | {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "intermediate_size": 11008,
    }),
    "llama-3.2-3b": ("Llama", {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    }),
    "small": ("Qwen2", QWEN | {
        "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 1024,
        "vocab_size": 32768,
    }),
}  # fmt: skip
SMALL = "--batch-size 3 --max-new-tokens 48 --max-obs-length 200 --max-length 700 --micro-batch-tokens 2048 --slots 15"


def random_policy(preset, device):
    """A model of the preset's shape with random weights: bf16 on a GPU, fp32 on a CPU."""
    family, shape = SHAPES[preset]
    config = getattr(transformers, family + "Config")(**shape, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        policy = getattr(transformers, family + "ForCausalLM")(config)
    if device.type == "cuda":
        for p in policy.parameters():  # and not policy.bfloat16(): the frequencies of the positions stay in fp32
            p.data = p.data.bfloat16()
        torch.cuda.reset_peak_memory_stats()  # the random weights were in fp32 for a moment
    return policy.eval()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ----- 1. One step of train.py's loop -----


def one_step(preset, algo, device):
    """Phases 2 to 6 once; prints a line."""
    small = ["--preset", "real", *SMALL.split(), "--gradient-checkpointing"]
    flags = small if preset == "small" else ["--preset", preset]
    flags += ["--model", "random", "--train-data", "none", "--corpus", "none", "--algo", algo, "--output-dir", "none"]
    config = train.parse_config(flags)
    before = peak_bytes(device) if device.type == "cpu" else 0
    policy = random_policy(preset, device)
    tokenizer = WordTokenizer(policy.config.vocab_size)
    predicted, _ = predicted_peak(predict_memory(policy, config))
    networks = make_models(policy, config)
    slots = engine.Slots(policy, config.slots or config.batch_size * config.group_size, config.max_length)
    # No turn of such a model is valid: passages come as what an invalid turn is told.
    settings = dataclasses.replace(config.settings, invalid_message=searchr1.format_information(PASSAGES))
    questions = [searchr1.Question(str(n), f"question {n}?", ("none",)) for n in range(config.batch_size)]
    generator, marks = torch.Generator(device).manual_seed(0), [time.perf_counter()]

    def mark():
        synchronize(device)
        marks.append(time.perf_counter())

    group = config.group_size
    rollouts = searchr1.rollout(policy, tokenizer, questions, None, settings, group, 1.0, generator, slots)
    mark()
    batch = searchr1.collate(rollouts, device)
    rewards_B = (torch.arange(len(rollouts)) % 3 == 0).float()
    token_rewards_BT = train.token_rewards(networks, batch, rewards_B, config)
    if config.algo == "ppo":
        advantages_BT, batch.returns_BT = searchr1.gae(token_rewards_BT, batch.values_BT, batch.mask_BT)
        batch.advantages_BT = searchr1.whiten(advantages_BT, batch.mask_BT)
    else:
        batch = train.outcome_advantages(batch, token_rewards_BT.sum(1), config)
    mark()
    train.update(networks, batch, config.critic_warmup_steps + 1, config, random.Random(0))
    mark()
    seconds = [b - a for a, b in zip(marks, marks[1:])]
    own, ids = sum(sum(r.response_mask) for r in rollouts), sum(len(r.ids) for r in rollouts)
    measured = size(peak_bytes(device) - before)
    print(
        f"{preset:13} {algo:5} {len(rollouts)} rollouts, {ids / len(rollouts):.0f} ids each: "
        f"predicted {size(predicted)}, measured {measured}; "
        f"rollout {seconds[0]:.1f} s ({own / seconds[0]:.0f} tokens/s), log-probs {seconds[1]:.1f} s, "
        f"update {seconds[2]:.1f} s, {ids / sum(seconds):.0f} ids/s in all",
        flush=True,
    )


# ----- 2. Decoding -----


def bandwidth(device, count=2**30):
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(count if device.type == "cuda" else count // 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * len(source) / (time.perf_counter() - began))
    return best


@torch.no_grad()
def our_seconds(policy, prompts, tokens):
    """-> (seconds a token of all rows, bytes of the keys and values that they held at first)."""
    device, rows = policy.device, list(range(len(prompts)))
    length = len(prompts[0])
    slots = engine.Slots(policy, len(rows), length + tokens + 1)
    draw = lambda: torch.rand(len(rows), dtype=torch.float64, device=device)
    ids, _ = engine.sample(engine.feed(policy, slots, rows, prompts), 1.0, draw())
    for n in range(tokens):
        if n == tokens // 4:  # graphs are captured by now
            synchronize(device)
            began = time.perf_counter()
        ids, _ = engine.sample(engine.feed(policy, slots, rows, [[i] for i in ids.tolist()]), 1.0, draw())
    synchronize(device)
    seconds = (time.perf_counter() - began) / (tokens - tokens // 4)
    held = [store[:, :, :length] for layer in slots.layers for store in layer]
    return seconds, sum(store.numel() * store.element_size() for store in held)


def generate_seconds(policy, prompts, tokens):
    """Seconds a token of all rows with generate(): the difference of a long and a short call is decoding alone."""
    inputs, times = torch.tensor(prompts, device=policy.device), []
    for new in (tokens // 4, tokens):
        began = time.perf_counter()
        policy.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new,
            do_sample=True, top_k=0, pad_token_id=0,
        )  # fmt: skip
        synchronize(policy.device)
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / (tokens - tokens // 4)


def decoding(preset, device, rows, length, tokens):
    """Seconds a token of all rows, beside the floor and generate(); prints a line."""
    policy = random_policy(preset, device)
    prompts = torch.randint(policy.config.vocab_size, (rows, length)).tolist()
    ours, keys_and_values = our_seconds(policy, prompts, tokens)
    read = sum(p.numel() * p.element_size() for p in policy.parameters()) + keys_and_values
    floor, generate = read / bandwidth(device), generate_seconds(policy, prompts, tokens)
    print(
        f"{preset:13} decode, {rows} rows of {length}: {1000 * ours:.1f} ms a token, {rows / ours:.0f} tokens/s, "
        f"{floor / ours:.0%} of the floor ({1000 * floor:.1f} ms for {size(read)}); "
        f"generate() {1000 * generate:.1f} ms, ratio {generate / ours:.2f}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"]
    parser.add_argument("--presets", nargs="+", choices=SHAPES, default=default)
    parser.add_argument("--algos", nargs="*", choices=("grpo", "ppo"), default=["grpo", "ppo"])
    parser.add_argument("--cap", type=float, default=24, help="GB of the card that may be used")
    parser.add_argument("--slots", type=int, default=64, help="rows of the decoding test; 0: leave it out")
    parser.add_argument("--length", type=int, default=1500, help="ids that each of these rows holds")
    parser.add_argument("--decode", type=int, default=64, help="tokens that each of them decodes")
    parser.add_argument("--one", choices=("step", "decode"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and set(args.presets) != {"small"}:
        parser.error("without a GPU only --presets small can be measured")
    if args.one:  # in a process of its own
        if device.type == "cuda":
            share = args.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        if args.one == "step":
            return one_step(args.presets[0], args.algos[0], device)
        return decoding(args.presets[0], device, args.slots, args.length, args.decode)
    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}, capped at {args.cap} GB"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    sizes = [f"--{name}={getattr(args, name)}" for name in ("cap", "slots", "length", "decode")]
    for preset in args.presets:
        runs = [["--one", "step", "--algos", algo] for algo in args.algos]
        for run in runs + [["--one", "decode"]] * bool(args.slots):
            if subprocess.run([sys.executable, __file__, "--presets", preset, *run, *sizes]).returncode:
                print(f"{preset:13} {' '.join(run[1:])}: did not end well")


if __name__ == "__main__":
    main()
