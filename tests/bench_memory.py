"""One whole step at a preset's sizes: peak memory, seconds of each phase, tokens a second, and how fast a token is decoded.

    python tests/bench_memory.py [--presets qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b] [--algos grpo ppo] [--cap 24]       a GPU
    python tests/bench_memory.py --presets small                                                                    any CPU

Random weights in the true shapes (nothing is downloaded), random rewards, an engine of three passages of 60 words. A model that
has learned nothing never closes a tag: every turn runs to its limit, and all turns are used. This is about the most that a
preset can be asked for, in memory and in time. On a GPU memory is capped at --cap GB (10^9 bytes) before anything
is allocated; each run is a process of its own. Predicted: train.predict_memory.

Decoding: --decode tokens of a full set of slots that hold 1500 ids each, as a share of what the card could do: reading all
weights, keys and values once a token at the copy bandwidth measured here. Beside it generate() on the same rows.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import searchr1
import train
from bench_rollout import PASSAGES, WordTokenizer
from data import Question

QWEN = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES = {  # of the models' own config.json
    "qwen2.5-0.5b": ("Qwen2", QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}),
    "qwen2.5-1.5b": ("Qwen2", QWEN | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960}),
    "qwen2.5-3b": ("Qwen2", QWEN | {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "intermediate_size": 11008}),
    "llama-3.2-3b": ("Llama", {"vocab_size": 128256, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": 131072}),
    "small": ("Qwen2", QWEN | {"vocab_size": 32768, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 1024}),
}  # fmt: skip
SMALL = "--batch-size 3 --max-new-tokens 48 --max-obs-length 200 --max-length 700 --micro-batch-tokens 2048 --slots 15"


def random_policy(preset, device, dtype):
    family, shape = SHAPES[preset]
    config = getattr(transformers, family + "Config")(**shape, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        policy = getattr(transformers, family + "ForCausalLM")(config)
    for p in policy.parameters():  # and not policy.to(dtype): the frequencies of the positions stay in fp32
        p.data = p.data.to(dtype)
    return policy.eval()


def one_step(preset, algo, device):
    """One step of train.py's loop -> a line."""
    flags = ["--preset", "real", *SMALL.split(), "--gradient-checkpointing"] if preset == "small" else ["--preset", preset]
    flags += ["--model", "random", "--train-data", "none", "--corpus", "none", "--algo", algo, "--output-dir", "none"]
    config = train.parse_config(flags)
    before = train.peak_bytes(device) if device.type == "cpu" else 0
    policy = random_policy(preset, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the random weights were in fp32 for a moment
    tokenizer = WordTokenizer(policy.config.vocab_size)
    memory = train.predict_memory(policy, config)
    models = train.make_models(policy, config)
    cache = searchr1.Slots(policy, config.slots or config.batch_size * config.group_size, config.max_length)
    settings = {name: getattr(config, name) for name in train.SETTINGS if name != "do_search"}
    settings["invalid_message"] = searchr1.format_information(PASSAGES)
    questions = [Question(str(n), f"question {n}?", ("none",)) for n in range(config.batch_size)]
    generator, marks = torch.Generator(device).manual_seed(0), [time.perf_counter()]

    def mark():
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    rollouts = searchr1.rollout(
        policy, tokenizer, [q.question for q in questions], None, config.group_size, temperature=1.0, generator=generator, cache=cache, **settings
    )  # fmt: skip
    mark()
    batch = searchr1.collate(rollouts, device)
    token_rewards_BT = train.score_batch(models, batch, (torch.arange(len(rollouts)) % 3 == 0).float(), config)
    batch = train.advantages(batch, token_rewards_BT, config)
    mark()
    train.update(models, batch, config.critic_warmup_steps + 1, config, train.random.Random(0))
    mark()
    seconds = [b - a for a, b in zip(marks, marks[1:])]
    own, ids = sum(sum(r.response_mask) for r in rollouts), sum(len(r.ids) for r in rollouts)
    predicted, _ = train.predicted_peak(memory)
    print(
        f"{preset:13} {algo:5} {len(rollouts)} rollouts, {ids / len(rollouts):.0f} ids each: predicted {train.size(predicted)}, measured {train.size(train.peak_bytes(device) - before)}; "
        f"rollout {seconds[0]:.1f} s ({own / seconds[0]:.0f} tokens/s), log-probs {seconds[1]:.1f} s, update {seconds[2]:.1f} s, {ids / sum(seconds):.0f} ids/s in all",
        flush=True,
    )


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


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def decoding(preset, device, slots, length, tokens):
    """Seconds a token of all slots -> a line with the floor and generate()."""
    policy = random_policy(preset, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    cache = searchr1.Slots(policy, slots, length + tokens + 1)
    prompt = torch.randint(policy.config.vocab_size, (slots, length)).tolist()
    logits_nV = searchr1.feed(policy, cache, list(range(slots)), prompt)
    ids, draws = searchr1.sample(logits_nV, 1.0, torch.rand(slots, dtype=torch.float64, device=device))[0], None
    for n in range(tokens):
        if n == tokens // 4:  # graphs are captured by now
            synchronize(device)
            began = time.perf_counter()
        draws = torch.rand(slots, dtype=torch.float64, device=device)
        ids, _ = searchr1.sample(searchr1.feed(policy, cache, list(range(slots)), [[i] for i in ids.tolist()]), 1.0, draws)
    synchronize(device)
    ours = (time.perf_counter() - began) / (tokens - tokens // 4)
    held = sum(p.numel() * p.element_size() for p in policy.parameters())
    held += sum(store[:, :, :length].numel() * store.element_size() for layer in cache.layers for store in layer)
    del cache
    floor = held / bandwidth(device)
    inputs = torch.tensor(prompt, device=device)
    theirs = []
    for new in (tokens // 4, tokens):  # the difference is decoding alone
        began = time.perf_counter()
        policy.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0
        )  # fmt: skip
        synchronize(device)
        theirs.append(time.perf_counter() - began)
    generate = (theirs[1] - theirs[0]) / (tokens - tokens // 4)
    print(
        f"{preset:13} decode, {slots} rows of {length}: {1000 * ours:.1f} ms a token, {slots / ours:.0f} tokens/s, {floor / ours:.0%} of the floor "
        f"({1000 * floor:.1f} ms for {train.size(held)}); generate() {1000 * generate:.1f} ms, ratio {generate / ours:.2f}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=SHAPES, default=["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"])
    parser.add_argument("--algos", nargs="*", choices=("grpo", "ppo"), default=["grpo", "ppo"])
    parser.add_argument("--cap", type=float, default=24, help="GB of the card that may be used")
    parser.add_argument("--slots", type=int, default=64, help="rows of the decoding test; 0: leave it out")
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--one", choices=("step", "decode"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and set(args.presets) != {"small"}:
        parser.error("without a GPU only --presets small can be measured")
    if not args.one:
        name = (
            torch.cuda.get_device_name() + f", capped at {args.cap} GB"
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
        for preset in args.presets:
            runs = [["--one", "step", "--algos", algo] for algo in args.algos] + [["--one", "decode"]] * bool(args.slots)
            for run in runs:
                sizes = [
                    "--cap",
                    str(args.cap),
                    "--slots",
                    str(args.slots),
                    "--length",
                    str(args.length),
                    "--decode",
                    str(args.decode),
                ]
                if subprocess.run([sys.executable, __file__, "--presets", preset, *run, *sizes]).returncode:
                    print(f"{preset:13} {' '.join(run[1:])}: did not end well")
        return
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory))
    if args.one == "step":
        one_step(args.presets[0], args.algos[0], device)
    else:
        decoding(args.presets[0], device, args.slots, args.length, args.decode)


if __name__ == "__main__":
    main()
