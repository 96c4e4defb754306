"""What a GPU really does: claims, kernels, decoding, and one step of each preset, predicted beside measured.

    python tests/bench_gpu.py                      on a GPU, ten minutes at the most; no network, no weights
    python tests/bench_gpu.py --presets small      the same code on any CPU, in seconds

Prints Markdown with device, versions and date. Weights are random, in the models' true shapes. The card is cut to --cap
GB (10^9 bytes) before anything is allocated, so that a larger one shows what one of 24 GB would do. Every part is a
process of its own; what --minutes leave no time for is named, not measured.

A step: 80 conversations of the lengths that bench_slots.py draws, sampled by the engine, with random ids for passages
and random rewards; then phases 4 to 6 of train.train. Memory: of tensors, the most in rollout, log-probs and update
apart, and the most that the card has lent after one of them, context and graphs included. Predicted:
models.predict_memory, which allows for the longest rollouts, and bench_slots.seconds, for a card of 1 TB/s and 80
Tflop/s.

Decoding: 64 rows that hold 1500 ids each. The floor is what the card could do: read all weights, keys and values once a
token, at the copy bandwidth that is measured here. Beside it transformers' generate() on the same rows.
"""

import argparse
import datetime
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_slots
import engine
import searchr1
import train
from models import Costs, fuse_norms, make_models, peak_bytes, predict_memory, predicted_peak

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
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
        "vocab_size": 4096,
    }),
}  # fmt: skip
SMALL = "--preset real --batch-size 2 --max-new-tokens 48 --max-length 4096 --micro-batch-tokens 4096 --slots 10"


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
        torch.cuda.empty_cache()  # the random weights were in fp32 for a moment
    return policy.eval()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def gib(count):
    return f"{count / 2**30:.1f}"


# ----- 1. One step of train.py's loop -----


def conversation(r, rng, vocabulary):
    """bench_slots.conversation with the ids of the model, which are what is trained."""
    talk, answer = bench_slots.conversation(r, rng), None
    while True:
        try:
            wish = talk.send(answer)
        except StopIteration:
            return
        answer = yield wish
        if wish is not None:
            answer = [rng.randrange(vocabulary) for _ in answer]


def one_step(preset, algo, device):
    """Phases 2 to 6 once -> a row of the table."""
    flags = SMALL.split() if preset == "small" else ["--preset", preset]
    flags += ["--model", "random", "--train-data", "none", "--corpus", "none", "--algo", algo, "--output-dir", "none"]
    config = train.parse_config(flags)
    policy = random_policy(preset, device)
    predicted = predicted_peak(predict_memory(policy, config))[0]
    networks, rng = make_models(policy, config), random.Random(0)
    slots = engine.Slots(policy, config.slots, config.max_length)
    vocabulary, B = policy.config.vocab_size, config.batch_size * config.group_size
    prompts = [[rng.randrange(vocabulary) for _ in range(190)] for _ in range(config.batch_size)]
    question = searchr1.Question("0", "?", ("x",))
    records = [searchr1.begin(question, prompts[i // config.group_size], config.settings) for i in range(B)]
    talks = [(r, conversation(r, rng, vocabulary)) for r in records]
    search = lambda queries: bench_slots.passages(queries, rng)
    generator, costs = torch.Generator(device).manual_seed(0), Costs(device)
    engine.run(policy, talks, search, config.max_length, config.group_size, 1.0, generator, slots)
    costs.end("rollout")
    batch = searchr1.collate(records, device)
    token_rewards_BT = train.token_rewards(networks, batch, (torch.arange(B) % 3 == 0).float(), config)
    if algo == "ppo":
        advantages_BT, batch.returns_BT = searchr1.gae(token_rewards_BT, batch.values_BT, batch.mask_BT)
        batch.advantages_BT = searchr1.whiten(advantages_BT, batch.mask_BT)
    else:
        batch = train.outcome_advantages(batch, token_rewards_BT.sum(1), config)
    costs.end("logprobs")
    train.update(networks, batch, config.critic_warmup_steps + 1, config, rng)
    costs.end("update")
    cells, phases = "-", ("rollout", "logprobs", "update")
    took = [costs.metrics[f"timing_s/{phase}"] for phase in phases]
    if preset in bench_slots.MODELS:
        simulated = bench_slots.simulate(B, config.group_size, config.slots, config.max_length)
        rollout, rest = bench_slots.seconds(preset, algo, simulated)
        cells = f"{rollout:.0f} + {rest:.0f}"
    own = sum(sum(r.response_mask) for r in records)
    tensors, card = f"{gib(peak_bytes())}, resident", "-"
    if device.type == "cuda":
        tensors = " / ".join(f"{costs.metrics[f'memory_gib/{phase}']:.1f}" for phase in phases)
        card = f"{costs.metrics['memory_gib/card']:.1f}"
    graphs = len(slots.steps) if slots.graphs else "off"
    return (
        f"| {preset}, {algo} | {gib(predicted)} | {tensors} | {card} | {graphs} | {cells} | "
        f"{' + '.join(f'{s:.1f}' for s in took)} | {own / took[0]:,.0f} |"
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
        if n == tokens // 4:  # the graph was captured at n = 0; all rows are within one width
            synchronize(device)
            began, graphs = time.perf_counter(), len(slots.steps)
        ids, _ = engine.sample(engine.feed(policy, slots, rows, [[i] for i in ids.tolist()]), 1.0, draw())
    synchronize(device)
    seconds = (time.perf_counter() - began) / (tokens - tokens // 4)
    if len(slots.steps) != graphs:
        raise RuntimeError("a graph was captured while the clock ran: take other --length and --decode")
    held = [store[:, :, :length] for layer in slots.layers for store in layer]
    return seconds, sum(store.numel() * store.element_size() for store in held)


def generate_seconds(policy, prompts, tokens):
    """Seconds a token of all rows with generate(): the difference of a long and a short call is decoding alone."""
    inputs, times = torch.tensor(prompts, device=policy.device), []
    for new in (tokens // 4, tokens // 4, tokens):  # the first call only warms up
        began = time.perf_counter()
        policy.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new,
            do_sample=True, top_k=0, pad_token_id=0,
        )  # fmt: skip
        synchronize(policy.device)
        times.append(time.perf_counter() - began)
    return (times[2] - times[1]) / (tokens - tokens // 4)


def decoding(preset, device, rows, length, tokens):
    """Seconds a token of all rows, beside the floor and generate() -> a row of the table."""
    policy = random_policy(preset, device)
    prompts = torch.randint(policy.config.vocab_size, (rows, length)).tolist()
    generate = generate_seconds(policy, prompts, tokens)
    config = train.Config(lora_rank=32 if preset in ("qwen2.5-1.5b", "qwen2.5-3b", "llama-3.2-3b") else 0)
    if config.lora_rank:
        policy = make_models(policy, config).policy
    elif device.type == "cuda":
        fuse_norms(policy)
    ours, keys_and_values = our_seconds(policy, prompts, tokens)
    floor = (sum(p.numel() * p.element_size() for p in policy.parameters()) + keys_and_values) / bandwidth(device)
    cells = f"{1000 * floor:.1f} | {1000 * ours:.1f} | {floor / ours:.0%} | {1000 * generate:.1f}"
    return f"| {preset}{', adapters' * bool(config.lora_rank)} | {rows} x {length} | {cells} | {generate / ours:.2f} |"


# ----- 3. All of it -----

STEPS = ("preset", "predicted GiB", "GiB of tensors: rollout / log-probs / update", "of the card", "graphs",
         "predicted s: rollout + the rest", "s: rollout + log-probs + update", "written tokens/s")  # fmt: skip
DECODING = ("decoding", "rows", "floor, ms", "ours, ms", "of the floor", "generate(), ms", "ratio")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "small"])
    parser.add_argument("--algos", nargs="*", choices=("grpo", "ppo"), default=["grpo", "ppo"])
    parser.add_argument("--cap", type=float, default=24, help="GB of the card that may be used")
    parser.add_argument("--minutes", type=float, default=10, help="what begins later is left out")
    parser.add_argument("--rows", type=int, default=64, help="rows of the decoding test; 0: leave it out")
    parser.add_argument("--length", type=int, default=1500, help="ids that each of these rows holds")
    parser.add_argument("--decode", type=int, default=64, help="tokens that each of them decodes")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a part, in a process of its own
    args = parser.parse_args(argv)
    device, began = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()
    if device.type == "cpu" and set(args.presets) != {"small"}:
        parser.error("without a GPU only --presets small can be measured")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py
    if args.one:
        if device.type == "cuda":
            share = args.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        preset = args.presets[0]
        how = preset, device, args.rows, args.length, args.decode
        print(decoding(*how) if args.one == "decode" else one_step(preset, args.one, device))
        return

    failed = []

    def ran(*command):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        failed.extend([command] * (done.returncode != 0))
        return done

    def part(*command):
        """Run a part -> the last line that it printed, or why there is none."""
        if time.perf_counter() - began > 60 * args.minutes:
            return f"left out: {args.minutes:g} minutes were over"
        done = ran(*command)
        lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
        return (lines or ["printed nothing"])[-1] if done.returncode == 0 else f"FAILED: {(lines or ['?'])[-1]}"

    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}, cut to {args.cap:g} GB"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}; {versions}; {datetime.date.today()}\n", flush=True)
    if device.type == "cuda":
        claims = ("tests/test_kernels.py", "tests/test_gpu.py", "tests/test_engine.py")
        print(f"claims: {part('-m', 'pytest', '-q', *claims)}\n", flush=True)
        done = ran("tests/bench_kernels.py")
        print(done.stdout if done.returncode == 0 else f"FAILED: {done.stderr}")
    sizes = [f"--{name}={getattr(args, name)}" for name in ("cap", "rows", "length", "decode")]
    tables = [(DECODING, ["decode"] * bool(args.rows)), (STEPS, args.algos)]
    for head, parts in tables:
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
        for preset in args.presets:
            for one in parts:
                line = part("tests/bench_gpu.py", "--presets", preset, "--one", one, *sizes)
                print(line if line.startswith("|") else f"| {preset}, {one} | {line} |", flush=True)
        print()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
