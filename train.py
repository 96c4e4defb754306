"""Training: the outer loop of Search-R1, with PPO, GRPO or REINFORCE, on one GPU or none; and many runs of it.

With no flags a tiny language model learns to search in a tiny world (data.py) in about three minutes on two CPU cores;
with --model, --train-data and --corpus the same loop trains a real one. The loop is `train`, eight numbered phases:

    1 draw questions    2 roll out [Alg. 1]    3 reward [Eq. 4]    4 log-probs of reference, values of critic
    5 advantages [Eq. 2: GAE, Eq. 3: group]    6 update [Eq. 2, Eq. 3]    7 log    8 evaluate and save

PPO and GRPO differ in phase 5 and in where the KL penalty stands (PPO: k1 in the reward, GRPO: k3 in the loss).
The paper's tuned baselines go through the same phases: --algo sft takes gold answers for rollouts, --algo rejection the
base model's right ones, and both imitate them; R1 is --no-search. Section 10 makes the paper's table and its studies.

Shapes as in searchr1.py: B = Q*G rollouts, L ids, T = L-1 predictions.

Departures, besides those of searchr1.py:
  [D9]  Old log-probs are the sampler's own. In fp32 they equal the trainer's within 2e-5 (a test says so), and a
        forward pass is saved. In bf16 they differ by 0.01 a token; there, as in the official code, the trainer is asked
        again (--recompute-old-logprobs).
  [D10] GRPO: groups whose rewards are all equal have advantage 0 and are left out of the update, and so is the KL
        term of their tokens; if all groups are like that, all stay and only KL acts. Logged as frac_reward_zero_std.
  [D11] The learning rate warms up from lr/warmup_steps, not from 0: the official schedule wastes the first step. On
        the tiny world it also decays over the second half.
  [D12] No entropy bonus unless asked for; the official default is 0.001.
  [D14] With --lora-rank policy, reference and critic are one frozen base with adapters; the paper trains every weight.
  [D17] Rejection sampling draws its five samples a question step by step, always from the frozen base model, and not
        all of them beforehand: no file of rollouts, exact resuming; in one pass over the questions it is the same.

    python train.py                 last line: "... as expected.", about 3 minutes on two cores
"""

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import random
import shutil
import signal
import sys
import time
import types
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    import resource
except ImportError:  # Windows
    resource = None

import data
from eval import (
    INVALID_MESSAGES,
    SETTINGS,
    Mistake,
    Parser,
    direct_ids,
    evaluate,
    fixed_sample,
    load_checkpoint,
    plot_runs,
    read_file,
    read_runs,
    run_main,
    task,
    write_points,
)
from kernels import default_chunk
from retrieval import BM25, SearchEngine, SearchFailed
from searchr1 import (
    FEED_TOKENS, HARMLESS, Critic, Rollout, Slots, collate, format_reward, gae, group_advantages, head_inputs, kl_k1, kl_k3, outcome_reward, policy_loss, rewards_at_end,
    rollout, token_logprobs, token_mean, transcript, value_loss, whiten,
)  # fmt: skip

# ----- 1. Configuration: one field a flag -----


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every value of a run. Defaults are the tiny world's with GRPO; PRESETS override them; flags override those."""

    preset: str = flag("", "tiny (default), real (default with --model), or a model and what it is trained on")
    algo: str = flag("grpo", "ppo, grpo or reinforce; sft (on gold answers) or rejection (on the base model's right rollouts)")
    seed: int = flag(0, "of everything but the world: base model, questions, sampling")
    world_seed: int = flag(0, "which tiny world")
    model: str = flag("", "folder or hub id of a causal LM; empty: the tiny base model")
    train_data: str = flag(
        "",
        "question file (JSON lines: id, question, golden_answers), or sets by name: hotpotqa, nq+hotpotqa; empty: the tiny world",
    )
    eval_data: str = flag("", "the same, held out; empty: the sets' evaluation splits, or a file's last tenth, 100 at most")
    corpus: str = flag(
        "",
        "what is searched: passage file (JSON lines: id, contents), DIR of an index, contexts (the paragraphs that come with the questions), wiki18, "
        "bm25: and any of these, http://host:port/retrieve",
    )
    encoder: str = flag(
        "hashed", "what contexts and wiki18 are indexed with: hashed, or folder or hub id (the paper: intfloat/e5-base-v2)"
    )
    output_dir: str = flag("", "folder of the run; empty: outputs/run-<next number>")
    resume: str = flag("", "folder of a run to continue; alone: --output-dir's, or the newest; its config.json is used")
    device: str = flag("auto", "auto (cuda, else cpu), cpu, cuda or mps")
    dtype: str = flag(
        "auto", "weights and activations: bf16, fp32, or auto (bf16 with --model on cuda); official code: bf16 on fp32 masters"
    )
    lora_rank: int = flag(0, "rank of the adapters on one frozen base; 0: full fine-tuning, as in the paper")
    lora_alpha: float = flag(32.0, "an adapter's change counts alpha / rank times")
    gradient_checkpointing: bool = flag(False, "run each layer's forward pass again in the backward pass; official code: yes")
    slots: int = flag(0, "rollouts in flight at once; bounds memory; 0: all of a step")

    steps: int = flag(100, "RL steps; the paper: 500")
    batch_size: int = flag(48, "questions a step, Q; the paper: 512")
    group_size: int = flag(5, "rollouts a question, G; the paper: 5 (GRPO), 1 (PPO)")
    minibatches: int = flag(4, "optimiser updates a step; the paper: 2 (PPO), 10 (GRPO)")
    micro_batch_tokens: int = flag(4096, "tokens in one forward and backward pass; bounds memory, never changes the result")
    lr: float = flag(5e-4, "learning rate of the policy; the paper: 1e-6")
    critic_lr: float = flag(1e-3, "learning rate of the critic; the paper: 1e-5")
    warmup_steps: int = flag(5, "linear warm-up of the learning rate, in RL steps; the paper: 0.285 of all")
    critic_lr_warmup_steps: int = flag(5, "the same for the critic; the paper: 0.015 of all")
    critic_warmup_steps: int = flag(3, "first steps in which only the critic learns (PPO)")
    lr_decay: bool = flag(True, "second half: linear decay to a tenth")
    adam_beta2: float = flag(0.95, "decay of Adam's mean square; official code: 0.999")
    weight_decay: float = flag(0.0, "pull of the weights towards 0, and so away from the reference; official code: 0.01")
    max_grad_norm: float = flag(1.0, "gradient clipping; the paper: 1.0")
    clip_eps: float = flag(0.2, "epsilon of the clipped ratio; the paper: 0.2")
    value_clip: float = flag(0.5, "range of the clipped value loss; official code: 0.5")
    gamma: float = flag(1.0, "discount; the paper: 1")
    lam: float = flag(1.0, "lambda of GAE; the paper: 1")
    kl_coef: float = flag(0.001, "beta; the paper: 0.001")
    kl_in: str = flag("loss", "where the KL penalty stands: reward (k1) or loss (k3)")
    entropy_coef: float = flag(0.0, "weight of an entropy bonus; official code: 0.001")
    reward: str = flag("em", "em [Eq. 4] or format (the second paper's shaped reward)")

    temperature: float = flag(1.0, "of sampling; the paper: 1.0")
    retriever: str = flag(
        "exact",
        "tiny world: exact (vectors), lexical (BM25), random (passages drawn by lot) or empty (none); for --study retriever",
    )
    format_steps: int = flag(480, "tiny base model: steps in which it is shown the format, 480 or fewer; for --study base-instruct")
    max_turns: int = flag(3, "turns that may search, the paper's B (4); then one more that cannot")
    max_new_tokens: int = flag(14, "tokens a turn; the paper: 500")
    max_obs_length: int = flag(64, "tokens of a block of passages; the paper: 500")
    max_length: int = flag(256, "tokens of prompt and conversation together; the paper: 4096")
    top_k: int = flag(3, "passages a search; the paper: 3")
    invalid_message: str = flag("paper", "what an invalid turn is told: paper (Algorithm 1) or official (the code's longer text)")
    two_hop_share: float = flag(0.8, "tiny world: share of two-hop questions up to step 15")
    two_hop_share_end: float = flag(0.35, "tiny world: the same from step 40 on, linear in between")

    no_search: bool = flag(False, "the paper's R1: no search engine")
    no_mask: bool = flag(False, "the paper's ablation: train on retrieved tokens, too")
    shuffle_rewards: bool = flag(False, "a control: rewards dealt out at random within the batch")
    recompute_old_logprobs: bool = flag(False, "old log-probs from the trainer instead of the sampler")
    eval_every: int = flag(10, "steps between evaluations on held-out questions")
    eval_limit: int = flag(400, "questions of an evaluation, a fixed sample")
    save_every: int = flag(0, "steps between checkpoints; 0: only at the end (and when interrupted)")
    save_hidden: str = flag(
        "", "file for the hidden states of the first step's first micro-batch, for tests/bench_kernels.py --cases"
    )


# The paper's recipe [facts of the official v0.2 scripts, appendix of the paper], with a batch for one card and one update a
# step: ten updates on 2560 rollouts are where the official GRPO collapses. The warm-ups are 0.285 and 0.015 of the steps.
REAL = {
    "steps": 300, "batch_size": 16, "group_size": 5, "minibatches": 1, "micro_batch_tokens": 8192, "lr": 1e-6, "critic_lr": 1e-5, "warmup_steps": 86,
    "critic_lr_warmup_steps": 5, "critic_warmup_steps": 0, "lr_decay": False, "adam_beta2": 0.999, "weight_decay": 0.01, "max_turns": 4,
    "max_new_tokens": 500, "max_obs_length": 500, "max_length": 4096, "invalid_message": "official", "recompute_old_logprobs": True,
    "gradient_checkpointing": True, "slots": 64, "eval_every": 50, "eval_limit": 100, "save_every": 50,
}  # fmt: skip
# Without a Wikipedia dump: HotpotQA over its own paragraphs, found by the paper's encoder.
HOTPOTQA = {"train_data": "hotpotqa", "corpus": "contexts", "encoder": "intfloat/e5-base-v2"}
# Adapters want some ten times the learning rate of the weights themselves.
LORA = {"lora_rank": 32, "lora_alpha": 64.0, "lr": 1e-5, "critic_lr": 1e-4}

# One card of 24 GB (22.3 GiB). Peak: predict_memory, printed at the start of a run. Time: arithmetic for 1 TB/s of memory, of
# which decoding gets 60 %, and 80 Tflop/s (about an RTX 4090), with 80 rollouts a step of 1200 ids, 400 of them written:
#     decoding        80 * 400 / slots steps, each (weights + slots * 800 * bytes of a key and value) / 0.6 TB/s
#     all the rest    96,000 ids * weights * flop: 2 each for reading, old and reference log-probs; 8 for the update (6 with
#                     frozen weights: no gradient of their own), one layer's repetition among them; PPO: 2 more for values, and the update again
# The encoder of the passages takes 0.3 GiB more. Nothing of this has been measured on a GPU yet; tests/bench_memory.py does it.
#
#                     predicted peak, GiB    seconds a step    a whole run
#                        GRPO     PPO          GRPO   PPO       GRPO    PPO
#     qwen2.5-0.5b       13.3    19.8            10    16       1.1 h   1.8 h
#     qwen2.5-1.5b       12.4    13.0            26    41       2.2 h   3.4 h
#     qwen2.5-3b         18.5    19.5            51    81       4.3 h   6.8 h
#     llama-3.2-3b       17.0    17.8            68    99       5.7 h   8.3 h
PRESETS = {
    "tiny": {},  # the defaults above
    "real": REAL,  # any --model, --train-data, --corpus
    "qwen2.5-0.5b": REAL | HOTPOTQA | {"model": "Qwen/Qwen2.5-0.5B", "steps": 400, "warmup_steps": 114, "critic_lr_warmup_steps": 6},
    "qwen2.5-1.5b": REAL | HOTPOTQA | LORA | {"model": "Qwen/Qwen2.5-1.5B"},
    "qwen2.5-3b": REAL | HOTPOTQA | LORA | {"model": "Qwen/Qwen2.5-3B"},
    # Eight key-value heads instead of two: a rollout's keys and values take three times as much.
    "llama-3.2-3b": REAL | HOTPOTQA | LORA | {"model": "meta-llama/Llama-3.2-3B", "slots": 20, "micro_batch_tokens": 4096},
    # The official v0.2 script (scripts/nq_hotpotqa/v0.2/train_grpo.sh, train_ppo.sh), for whoever has the hardware: 8 x 80 GB there.
    "paper": REAL | {
        "model": "Qwen/Qwen2.5-7B",  # its default; the paper: also Qwen2.5-3B, and the instruct models
        "train_data": "nq+hotpotqa",  # Sec. 4; 169,615 questions
        "corpus": "http://127.0.0.1:8000/retrieve",  # wiki-18 behind the official server, E5, top 3
        "steps": 1005, "warmup_steps": 286, "critic_lr_warmup_steps": 15,  # 0.285 and 0.015 of 1005 steps; the paper reports step 500
        "batch_size": 512, "group_size": 5,  # data.train_batch_size, n_agent
        "minibatches": 10,  # 2560 rollouts in mini-batches of 256
        "lr": 1e-6, "critic_lr": 1e-5,  # actor.optim.lr, critic.optim.lr
        "entropy_coef": 0.001,  # the default of the official code, which no script changes
        "kl_coef": 0.001, "clip_eps": 0.2, "value_clip": 0.5, "gamma": 1.0, "lam": 1.0, "max_grad_norm": 1.0, "temperature": 1.0,
        "max_turns": 4, "max_new_tokens": 500, "max_obs_length": 500, "max_length": 4096, "top_k": 3,
        "slots": 256, "eval_every": 100, "eval_limit": 1000, "save_every": 100,
    },
}  # fmt: skip
PRESETS |= {f"{name}/reinforce": {"batch_size": 80, "group_size": 1} for name in PRESETS}
# Fine-tuning has no reward and no reference [Sec. 4]; five samples a question are the paper's. Its learning rates are not known.
PRESETS |= {
    f"{name}/{algo}": {
        "group_size": {"sft": 1, "rejection": 5}[algo],
        "kl_coef": 0.0,
        "minibatches": 1,
        "recompute_old_logprobs": False,
    }
    | ({"lr": 1e-4 if "lora_rank" in PRESETS[name] else 1e-5} if name != "tiny" else {})
    for name in list(PRESETS)
    if "/" not in name
    for algo in ("sft", "rejection")
}
PRESETS |= {f"{name}/ppo": {"batch_size": 80, "group_size": 1, "kl_in": "reward"} for name in PRESETS if "/" not in name}
PRESETS |= {
    "tiny/ppo": {"batch_size": 240, "group_size": 1, "kl_in": "reward", "steps": 80},
    "tiny/reinforce": {"batch_size": 240, "group_size": 1},
    "tiny/sft": PRESETS["tiny/sft"] | {"batch_size": 240},
    "tiny/rejection": PRESETS["tiny/rejection"] | {"batch_size": 96, "steps": 60},
    # Two full models with their masters and Adam: what is left is for half the slots.
    "qwen2.5-0.5b/ppo": PRESETS["qwen2.5-0.5b/ppo"] | {"slots": 32, "micro_batch_tokens": 4096},
    "paper/ppo": {"batch_size": 512, "group_size": 1, "minibatches": 2, "kl_in": "reward"},
    "paper/reinforce": {"batch_size": 512, "group_size": 1, "minibatches": 2},
}
CHOICES = {
    "preset": tuple(name for name in PRESETS if "/" not in name),
    "algo": ("ppo", "grpo", "reinforce", "sft", "rejection"),
    "retriever": ("exact", "lexical", "random", "empty"),
    "kl_in": ("reward", "loss"),
    "reward": ("em", "format"),
    "dtype": ("auto", "bf16", "fp32"),
    "invalid_message": tuple(INVALID_MESSAGES),
}
POSITIVE = (
    "steps",
    "batch_size",
    "group_size",
    "minibatches",
    "micro_batch_tokens",
    "lr",
    "critic_lr",
    "lora_alpha",
    "max_grad_norm",
    "temperature",
    "max_new_tokens",
    "max_obs_length",
    "max_length",
    "top_k",
    "eval_every",
)


def parse_flags(argv):
    """Command line -> {name: value} of the flags that were given: the fields of Config, and what is many runs [10]."""
    parser = Parser(allow_abbrev=False, description="Train a language model to search, from the reward of its final answer alone.")
    for f in fields(Config):
        name, help = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if f.name == "resume":
            parser.add_argument(name, nargs="?", const="auto", help=help)
        elif isinstance(f.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction if f.default else "store_true", default=None, help=help)
        else:
            parser.add_argument(name, type=type(f.default), choices=CHOICES.get(f.name), default=None, help=help)
    many = parser.add_argument_group("many runs on the tiny world; other flags go to each of them")
    many.add_argument(
        "--table", action="store_true", default=None, help="train what must be trained and compare the paper's nine methods"
    )
    many.add_argument("--quick", action="store_true", default=None, help="of --table: one seed, fewer steps and questions")
    many.add_argument("--study", choices=STUDIES, help="one finding of the paper, redrawn: figures/STUDY.png and .csv")
    many.add_argument("--seeds", type=int, help="seeds of each run (default: 3)")
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def parse_config(given):
    """{name: value} of flags, or a command line -> Config. Unknown flags and impossible values are errors."""
    given = given if isinstance(given, dict) else parse_flags(given)
    if "resume" in given:
        return resumed_config(given)
    preset = given.get("preset") or ("real" if given.get("model") else "tiny")
    config = Config(**(PRESETS[preset] | PRESETS.get(f"{preset}/{given.get('algo', 'grpo')}", {}) | given | {"preset": preset}))
    check_config(config)
    if not config.output_dir:
        taken = [int(d.name[4:]) for d in Path("outputs").glob("run-*") if d.name[4:].isdigit()]
        config.output_dir = f"outputs/run-{max(taken, default=0) + 1}"
    if (Path(config.output_dir) / "metrics.jsonl").exists():
        raise Mistake(
            f"--output-dir {config.output_dir} holds a run already: --resume {config.output_dir} continues it, another folder starts anew"
        )
    return config


def check_config(config):
    """Mistake, with the flag and the remedy, for values that cannot work."""
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            raise Mistake(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")
    for name in ("max_turns", "kl_coef", "warmup_steps", "critic_lr_warmup_steps", "lora_rank", "slots", "weight_decay"):
        if getattr(config, name) < 0:
            raise Mistake(f"--{name.replace('_', '-')} {getattr(config, name)}: cannot be negative")
    if not 0 <= config.adam_beta2 < 1:
        raise Mistake(f"--adam-beta2 {config.adam_beta2}: must be at least 0 and below 1")
    if bool(config.train_data) != bool(config.corpus):
        raise Mistake("--train-data and --corpus belong together: questions, and the passages that answer them")
    if config.model and not config.train_data:
        raise Mistake(
            "--model needs --train-data and --corpus, say hotpotqa and contexts: the tiny world's words mean nothing to a real model"
        )
    if config.algo == "sft" and config.group_size != 1:
        raise Mistake(f"--group-size {config.group_size}: --algo sft has one example a question, its gold answer")
    if config.train_data and (config.retriever, config.format_steps) != (Config.retriever, Config.format_steps):
        raise Mistake("--retriever and --format-steps are the tiny world's; for real passages see --corpus, --encoder and --model")
    if not 0 <= config.format_steps <= Config.format_steps:
        raise Mistake(f"--format-steps {config.format_steps}: from 0 to {Config.format_steps}")
    if config.eval_data and not config.train_data:
        raise Mistake("--eval-data needs --train-data: the tiny world brings its own held-out questions")
    if config.preset == "real" and not config.model:
        raise Mistake("--preset real needs --model, --train-data and --corpus; the presets named after a model bring theirs")
    if 0 < config.slots < config.group_size:
        raise Mistake(f"--slots {config.slots}: a group of {config.group_size} rollouts is in flight together")
    if config.train_data and not config.model:
        raise Mistake("--train-data needs --model: the tiny base model knows the words of the tiny world only")
    if config.save_hidden and not Path(config.save_hidden).parent.is_dir():
        raise Mistake(f"--save-hidden {config.save_hidden}: there is no folder {Path(config.save_hidden).parent}")


# What a resumed run may change: how long it is, what it keeps, and what bounds its memory without changing its result.
RESUME_MAY_CHANGE = {"steps", "save_every", "save_hidden", "slots", "micro_batch_tokens", "gradient_checkpointing"}


def resumed_config(given):
    """--resume [DIR] -> the run's saved Config, with what RESUME_MAY_CHANGE from the command line."""
    runs = sorted(Path("outputs").glob("run-*/config.json"), key=lambda file: file.stat().st_mtime)
    newest = str(runs[-1].parent) if runs else "outputs/run-*"
    folder = given["resume"] if given["resume"] != "auto" else given.get("output_dir", newest)
    if not list(Path(folder).glob("checkpoint-*/trainer_state.pt")):
        raise Mistake(f"--resume: no checkpoint to continue from in {folder}")
    saved = asdict(Config()) | json.loads((Path(folder) / "config.json").read_text())  # a flag may be younger than the run
    for name in set(given) - {"resume", "output_dir"} - RESUME_MAY_CHANGE:
        if given[name] != saved[name]:
            raise Mistake(
                f"--resume continues a run as it was, with --{name.replace('_', '-')} {saved[name]}; {given[name]} cannot take its place on the way"
            )
    return Config(**(saved | {"save_hidden": ""} | given | {"resume": folder, "output_dir": folder}))


# ----- 2. What is trained on what -----


def load_run(config):
    """Config -> (policy, tokenizer, search, draw(step) -> questions, train sample, held-out sample)."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if config.model:
        bf16 = config.dtype == "bf16" or (config.dtype == "auto" and device.startswith("cuda"))
        policy, tokenizer = load_checkpoint(config.model, device, torch.bfloat16 if bf16 else torch.float32)
        # Sets by name have an evaluation split of their own; of a file the last tenth is held out.
        held_data = config.eval_data or ("" if Path(config.train_data).is_file() else config.train_data)
        others = data.question_files(held_data, "eval") if held_data else []
        questions, engine, _ = task(0, config.corpus, config.train_data, "train", config.encoder, others)
        search = engine.search
        if held_data:
            held = read_file(lambda spec: data.load_data(spec, "eval"), held_data)
        else:
            count = min(100, max(1, len(questions) // 10))
            questions, held = questions[:-count], questions[-count:]
        if len(questions) < config.batch_size:
            raise Mistake(
                f"{config.train_data} leaves {len(questions)} questions to train on and --batch-size is {config.batch_size}"
            )

        @functools.lru_cache(maxsize=2)
        def order(epoch):
            return random.Random(f"{config.seed} epoch {epoch}").sample(range(len(questions)), len(questions))

        def draw(step):  # every epoch its own order; a function of the step alone, so that a resumed run goes on as planned
            positions = range((step - 1) * config.batch_size, step * config.batch_size)
            return [questions[order(i // len(questions))[i % len(questions)]] for i in positions]
    else:
        questions, engine, world = task(config.world_seed)
        held, questions = questions, world.train
        search = searching(config.retriever, world.passages, engine.search)
        oracle = data.oracle_exact_match(world, fixed_sample(held, 1000), search, config.top_k)
        print(
            f"tiny world {config.world_seed}: {len(world.passages)} passages, {len(questions)} questions to train on, {len(held)} held out; a perfect policy would score {oracle:.2f}"
        )
        began = time.perf_counter()
        # Made for this K: blocks of a length that it never read would be another world.
        base = data.BaseConfig(seed=config.seed, top_k=config.top_k, policy_steps=config.format_steps)
        policy, tokenizer, folder = data.base_model(base, "outputs")
        policy = policy.to(device)
        if config.dtype == "bf16":  # PITFALL: policy.to(bfloat16) would round the frequencies of the positions, too
            for p in policy.parameters():
                p.data = p.data.bfloat16()
        print(
            f"base model: {sum(p.numel() for p in policy.parameters()):,} parameters, in {folder} ({time.perf_counter() - began:.0f} s)"
        )

        def draw(step):  # two-hop questions are many at first, or the policy settles for one search
            share = config.two_hop_share + (config.two_hop_share_end - config.two_hop_share) * min(1.0, max(0.0, (step - 15) / 25))
            return data.draw_questions(questions, config.batch_size, share, random.Random(f"{config.seed} questions {step}"))

    return policy, tokenizer, search, draw, fixed_sample(questions, config.eval_limit), fixed_sample(held, config.eval_limit)


def searching(kind, passages, exact):
    """What the tiny world is searched with -> search(queries, top_k). Of worse engines the policy may learn to make less use."""
    if kind == "lexical":
        return SearchEngine(passages, BM25(passages)).search
    if kind == "random":  # the same query finds the same passages, as with any engine
        return lambda queries, top_k: [random.Random(query).sample(passages, top_k) for query in queries]
    return (lambda queries, top_k: [[] for _ in queries]) if kind == "empty" else exact


# ----- 3. Four networks on one card -----
#
# The paper moves four copies of a model: the policy, once more in the engine that samples, the reference, the critic.
# Ours samples with the policy itself. Full fine-tuning keeps three; with --lora-rank they are roles of one frozen
# base [D14]:
#
#     policy = base + its adapter        reference = base, adapters off        critic = base + a second adapter + head
#
# The loop names the role wherever it is not the policy's; for a full model that says nothing new and does nothing.


class Adapted(torch.nn.Module):
    """A frozen linear layer and, for each role, a trained change of low rank [LoRA Eq. 3]: y = W x + b + alpha/r B A x.

    weight [out, in] and bias are the layer's own, under their old names; A [r, in] is uniform in +-1/sqrt(in) and B
    [out, r] is 0, so that at first every role is the base model. `role` is whose change is on, None is nobody's.
    """

    role = "policy"

    def __init__(self, linear, roles, rank, alpha, generator):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        new = lambda *shape: linear.weight.new_zeros(shape)
        self.A = torch.nn.ParameterDict({name: new(rank, linear.in_features) for name in roles})
        self.B = torch.nn.ParameterDict({name: new(linear.out_features, rank) for name in roles})
        for A in self.A.values():
            A.data.copy_(torch.empty(A.shape).uniform_(-1, 1, generator=generator) * linear.in_features**-0.5)
        self.train(linear.training)

    def forward(self, x):
        x_nD = x.reshape(-1, x.shape[-1])
        y_nD = torch.nn.functional.linear(x_nD, self.weight, self.bias)
        if self.role:  # two thin products; the second adds onto y where it lies: decoding counts its kernels
            y_nD = y_nD.addmm_(x_nD @ self.A[self.role].T, self.B[self.role].T, alpha=self.scale)
        return y_nD.view(*x.shape[:-1], -1)


def adapt(policy, roles, rank, alpha, seed=0):
    """Freeze a causal LM and turn, in place, every linear layer of its body (never the lm_head) into an Adapted one."""
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in list(policy.base_model.modules()):
        for name, layer in list(block.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(block, name, Adapted(layer, roles, rank, alpha, generator))
    return policy


@contextlib.contextmanager
def role(model, name):
    """In here an adapted model plays `name`: "policy" as everywhere else, "critic", or None, the base model. A full
    model has one role only. PITFALL: with gradient checkpointing backward() runs the forward pass again. Call it in
    here as well, or the gradient is that of the policy's activations, and nothing complains."""
    layers = [layer for layer in model.modules() if isinstance(layer, Adapted)]
    for layer in layers:
        layer.role = name
    try:
        yield
    finally:
        for layer in layers:
            layer.role = Adapted.role


def trained(model, name):
    """What the role `name` trains in `model`, {parameter's name: parameter}: everything in a full model; in an adapted
    one its own adapters, and the critic's head."""
    other = {"policy": ".critic", "critic": ".policy"}[name]
    return {key: p for key, p in model.named_parameters() if p.requires_grad and not key.endswith(other)}


def merged_state(policy):
    """The state dict of the unadapted model that answers as the policy does. Each sum W + alpha/r B A is made in fp32
    and rounded once; on the CPU, since a card that ran out of memory has no room for it."""
    state = {key: t for key, t in policy.state_dict().items() if not key.endswith((".policy", ".critic"))}
    for key, layer in policy.named_modules():
        if isinstance(layer, Adapted):
            W, A, B = (t.detach().cpu().float() for t in (layer.weight, layer.A["policy"], layer.B["policy"]))
            state[f"{key}.weight"] = torch.addmm(W, B, A, alpha=layer.scale).to(layer.weight.dtype)
    return state


def adam(parameters, lr, config):
    """{name: parameter} -> AdamW over their fp32 masters: a parameter in fp32 itself, of one in bf16 a copy.

    PITFALL: bf16 has 8 significant bits: from 0.02 the next number is 1.2e-4 away. An Adam step at the paper's learning
    rate is 1e-6, which rounds back to where it was, every step: nothing is learned, and no log shows it. So the sums
    are kept in fp32: gradients of micro-batches go to the master as they appear, the optimiser moves the master, and
    the parameter is the master, rounded. It is written in place: CUDA graphs of the rollout read that very address.
    """
    masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in parameters.values()]
    copies = [(p, master) for p, master in zip(parameters.values(), masters) if p is not master]

    def hand_over(master, p):
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    for p, master in copies:
        p.register_post_accumulate_grad_hook(functools.partial(hand_over, master))
    # No weight decay by default: it would pull the weights to 0, and so away from the reference.
    optimizer = torch.optim.AdamW(
        masters, lr=lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=masters[0].is_cuda or None
    )  # fused: the other variants hold a second copy of everything for a moment
    optimizer.register_step_post_hook(lambda *_: [p.detach().copy_(master.detach()) for p, master in copies])
    return optimizer


def recomputed(layer, *args, **kwargs):
    """forward() of a decoder layer that keeps its input only; what the backward pass needs is computed again there.

    transformers has this built in, for layers in training mode. Ours stay in eval mode: dropout would make old and new
    log-probs differ. Without gradients (rollouts, phase 4) there is nothing to keep, and it is the plain forward().
    """
    plain = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@dataclass
class Models:
    """The four networks of the paper and what moves them; critic and its optimiser are None but for PPO. The policy is
    also the engine that samples; with adapters it is the reference and the critic's body, too."""

    policy: torch.nn.Module
    reference: torch.nn.Module  # pi_ref of Eq. 1: the policy as it was, frozen
    critic: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    updates: int = 0  # optimiser steps since the program started, counted as they begin

    def learners(self):
        """(role, network, its optimiser) of what is trained."""
        critic = [("critic", self.critic, self.critic_optimizer)] if self.critic else []
        return [("policy", self.policy, self.optimizer)] + critic


def make_models(policy, config):
    """A causal LM and the Config -> Models. The policy stays the object it is."""
    ppo = config.algo == "ppo"
    if config.lora_rank:
        reference = adapt(policy, ("policy", "critic") if ppo else ("policy",), config.lora_rank, config.lora_alpha, config.seed)
        critic = Critic(policy, policy.base_model).to(policy.device) if ppo else None
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
        critic = Critic(policy).to(policy.device) if ppo else None
    if config.gradient_checkpointing:
        for network in (policy, critic) if ppo else (policy,):
            for layer in network.modules():
                if isinstance(layer, GradientCheckpointingLayer):  # transformers' mark of a decoder layer
                    layer.forward = types.MethodType(recomputed, layer)
    critic_optimizer = adam(trained(critic, "critic"), config.critic_lr, config) if ppo else None
    return Models(policy, reference, critic, adam(trained(policy, "policy"), config.lr, config), critic_optimizer)


# ----- 4. Memory, told in advance -----

# What is held for a while only, by the moment at which it is. Everything else is held all the time.
MOMENTS = {
    "writing rollouts": ("a block", "sampling"),
    "log-probs in the update": ("gradients", "activations", "log-probs"),
    "one layer in the update": ("gradients", "activations", "one layer"),
}


def predict_memory(policy, config):
    """A causal LM as it was loaded, and the Config -> {what: bytes} that the run will hold. Weights, adapters, masters
    and Adam are exact; keys and values, and activations are those of the longest rollouts that max_length allows."""
    c, e = policy.config, policy.dtype.itemsize
    device = "cuda" if policy.device.type == "meta" else policy.device.type  # a model without memory: planned for a card
    D, I, V, H, layers = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_attention_heads, c.num_hidden_layers
    head_dim = getattr(c, "head_dim", None) or D // H
    q, kv = H * head_dim, (getattr(c, "num_key_value_heads", None) or H) * head_dim
    lora, critics, r = bool(config.lora_rank), config.algo == "ppo", config.lora_rank
    numbers = lambda module: sum(p.numel() for p in module.parameters())
    linears = [m for m in policy.base_model.modules() if isinstance(m, torch.nn.Linear)]
    head = critics * (D + 1)  # of the critic, always in fp32

    # Trained numbers, and tensors: of each role its adapters [r, in] and [out, r], or the policy and the critic's body.
    adapters = sum(r * (m.in_features + m.out_features) for m in linears)
    bodies = numbers(policy) + critics * numbers(policy.base_model)
    count = (1 + critics) * adapters if lora else bodies
    tensors = (1 + critics) * 2 * len(linears) if lora else sum(1 for _ in policy.parameters())
    tensors += critics * (2 + (0 if lora else sum(1 for _ in policy.base_model.parameters())))

    # What autograd keeps of a layer, bytes a token. Each norm: its input in fp32 (4), the normalised value where its
    # weight is trained (e), the result (e). Attention: q, k, v as rotated and its output, one fp32 a head. MLP: gate,
    # silu(gate), up, their product. Qwen3's norms of q and k, too. Adapters: A x, of 7 layers.
    norm = 4 + e + e * (not lora)
    layer = 2 * D * norm + e * (2 * q + 2 * kv + 4 * I) + 4 * H + e * r * (len(linears) // layers)
    layer += (norm - e) * (q + kv) * any("q_norm" in name for name, _ in policy.base_model.named_modules())
    # Kept from the forward pass on: all layers in full, or with gradient checkpointing the input of each. In the
    # backward pass one layer is made again, if it was not kept, and the gradients of the MLP's parts come to it.
    kept = layers * (e * D if config.gradient_checkpointing else layer) + D * norm  # the last norm is always kept
    once = layer * config.gradient_checkpointing + e * (3 * I + 2 * D)
    tokens = max(config.micro_batch_tokens, config.max_length)  # of a micro-batch: one row at least
    # kernels.py, all rows active: a slice of fp32 logits and its gradient in e (the PyTorch twin: four slices), the rows
    # in e, their gradient in fp32 and in e; where the lm_head is trained its gradient, and tied, the embedding's.
    one_slice = 4 * tokens * default_chunk(tokens, V, device)
    logits = one_slice * (1 + e / 4 if device == "cuda" else 4) + tokens * D * (4 + 3 * e)
    logits += 0 if lora else e * V * D * (1 + bool(c.tie_word_embeddings))

    rollouts = config.batch_size * config.group_size
    slots = config.slots or rollouts
    # A block of passages on its way through a layer [searchr1.feed]: the keys and values of its rows, gathered and repeated for all
    # heads (of FEED_TOKENS columns), and the MLP's parts (of as many ids at the most, if all are prompts).
    block = e * min(FEED_TOKENS, slots * config.max_length) * (2 * kv + 2 * q + 3 * I + 4 * D)
    return {
        "weights": e * numbers(policy),
        "reference's weights": 0 if lora else e * numbers(policy),
        "critic's weights": 0 if lora else critics * e * numbers(policy.base_model),
        "critic's head": 4 * head,
        "adapters": lora * e * count,
        "fp32 masters": 4 * count if e != 4 else 0,
        "Adam": 8 * (count + head) + 4 * tensors,  # two means, and the number of steps
        "gradients": 4 * (count + head),
        # Kept through the update: graphs point to them. Rejection sampling has a second set, of the frozen base.
        "keys and values": slots * (config.max_length + 1) * layers * 2 * kv * e * (1 + (config.algo == "rejection")),
        "a block": block,
        "sampling": slots * V * (3 * 4 + 8),  # logits, log-probs, probabilities; their sums in float64
        "activations": tokens * kept,
        "log-probs": int(logits),
        "one layer": tokens * once,
    }


def predicted_peak(memory):
    """What predict_memory says -> (bytes at the fullest moment, which moment)."""
    passing = set().union(*MOMENTS.values())
    always = sum(count for name, count in memory.items() if name not in passing)
    return max((always + sum(memory[name] for name in names), moment) for moment, names in MOMENTS.items())


def size(count):
    """Bytes -> text."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def memory_table(memory):
    peak, moment = predicted_peak(memory)
    lines = [f"  {name:20}{size(count):>12}" for name, count in memory.items() if count]
    return "\n".join(["memory, predicted:", *lines, f"  {'at the most':20}{size(peak):>12}   ({moment})"])


def peak_bytes(device):
    """The most that this process has held so far: on CUDA in tensors, elsewhere all of its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# What to do when memory ran out, by what the run was doing. A resumed run may change all but --max-length.
REMEDIES = {
    "the rollouts": "lower --slots (now {slots}), or in a new run --max-length",
    "the log-probs": "lower --micro-batch-tokens (now {micro_batch_tokens})",
    "the update": "lower --micro-batch-tokens (now {micro_batch_tokens}), then add --gradient-checkpointing",
    "the evaluation": "lower --slots (now {slots}), or in a new run --max-length",
    "loading": "take --lora-rank 16 (now {lora_rank}), so that one base serves all roles, or a smaller --preset",
}


def ending(error, doing, config):
    """An exception of a run -> the one line that it ends with, as an exception; raised as it is if no user can help it."""
    if isinstance(error, SearchFailed):
        return error.with_traceback(None)
    # CUDA has a class of its own for it; the CPU's and cuBLAS's errors are known by their words.
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(w in str(error) for w in words):
        raise error
    now = asdict(config) | {"slots": config.slots or f"all {config.batch_size * config.group_size}"}
    return Mistake(f"out of memory in {doing}; {REMEDIES[doing].format(**now)}")


# ----- 5. The update (phase 6) -----

FINE_TUNING = ("sft", "rejection")  # the paper's baselines that imitate; everything else learns from a reward


def micro_batches(batch, index, budget):
    """Row numbers `index` -> pieces of at most `budget` padded tokens (one row at least), rows of like length together."""
    lengths = batch.lengths_B.tolist()
    piece, pieces = [], []
    for i in sorted(index, key=lambda i: -lengths[i]):
        if piece and (len(piece) + 1) * lengths[piece[0]] > budget:
            pieces.append(piece)
            piece = []
        piece.append(i)
    return pieces + [piece] if piece else pieces


@torch.no_grad()
def score(values_of, batch, budget):
    """Run values_of(Batch) -> [b, t] over micro-batches of all rows -> [B, T], 0 where nothing was computed."""
    out_BT = torch.zeros_like(batch.old_logprobs_BT)
    for piece in micro_batches(batch, range(len(batch.ids_BL)), budget):
        part = batch.rows(torch.tensor(piece))
        out_BT[torch.tensor(piece), : part.mask_BT.shape[1]] = values_of(part)
    return out_BT


@torch.no_grad()
def save_hidden(policy, batch, config):
    """Write what fused_linear_logprob_kl gets for the first micro-batch (the longest rows): the data on which
    tests/bench_kernels.py --cases then measures, since the shape of a trained policy's logits decides what tau can skip."""
    part = batch.rows(torch.tensor(micro_batches(batch, range(len(batch.ids_BL)), config.micro_batch_tokens)[0]))
    hidden_BTD, weight_VD, target_BT = head_inputs(policy, part.ids_BL)
    case = {"hidden": hidden_BTD.flatten(0, 1), "weight": weight_VD, "target": target_BT.flatten(), "mask": part.mask_BT.flatten()}
    torch.save(
        {name: t.detach().cpu().clone() for name, t in case.items()} | {"temperature": config.temperature}, config.save_hidden
    )


def logprobs_under(model, batch, config):
    """log-probs [B, T] of the batch's own tokens under `model`, without gradient."""
    own = lambda part: token_logprobs(model, part.ids_BL, part.mask_BT, config.temperature)[0]
    return score(own, batch, config.micro_batch_tokens)


def update(models, batch, step, config, rng):
    """Phase 6: one pass over the batch in config.minibatches optimiser steps -> metrics averaged over them.

    Micro-batches only bound memory: each one's token mean is weighted by its share of the minibatch's tokens, so the
    accumulated gradient is the gradient of the whole minibatch's token mean.
    """
    policy, critic = models.policy, models.critic
    if batch.ref_logprobs_BT is None:  # KL in the loss: only now, and only for the rows that are trained
        with role(models.reference, None):
            batch.ref_logprobs_BT = logprobs_under(models.reference, batch, config)
    train_policy = not critic or step > config.critic_warmup_steps  # a critic that knows nothing yet would only add noise
    learners = models.learners() if train_policy else models.learners()[1:]
    warmups = {"policy": (config.lr, config.warmup_steps), "critic": (config.critic_lr, config.critic_lr_warmup_steps)}
    rows = list(range(len(batch.ids_BL)))
    rng.shuffle(rows)
    count = min(config.minibatches, len(rows))
    sums = Counter()
    for m in range(count):
        index = rows[m::count]
        tokens = batch.mask_BT[torch.tensor(index)].sum()  # the denominator, known before micro-batching
        for piece in micro_batches(batch, index, config.micro_batch_tokens):
            part = batch.rows(torch.tensor(piece))
            mask_BT, share = part.mask_BT, part.mask_BT.sum() / tokens
            if train_policy:
                logprobs_BT, entropy_BT = token_logprobs(policy, part.ids_BL, mask_BT, config.temperature)
                pg_loss, clipped = policy_loss(logprobs_BT, part.old_logprobs_BT, part.advantages_BT, mask_BT, config.clip_eps)
                if config.algo in FINE_TUNING:  # no ratio, no advantage: - log p(y | x)
                    pg_loss, clipped = -token_mean(logprobs_BT, mask_BT), torch.zeros(())
                entropy, kl = token_mean(entropy_BT, mask_BT), token_mean(kl_k3(logprobs_BT, part.ref_logprobs_BT), mask_BT)
                # [Eq. 3] + beta KL(pi || pi_ref): PLUS in a loss. With the wrong sign the policy is paid for running away.
                loss = pg_loss + config.kl_coef * (config.kl_in == "loss") * kl - config.entropy_coef * entropy
                (loss * share).backward()
                for name, value in {"kl": kl, "entropy": entropy, "clip_ratio": clipped, "policy_loss": pg_loss}.items():
                    sums[name] += (value * share).item() / count
            if critic:
                with role(critic, "critic"):
                    v_loss = value_loss(critic(part.ids_BL), part.values_BT, part.returns_BT, mask_BT, config.value_clip)
                    (v_loss * share).backward()  # in here, too: it may run the forward pass again
                sums["value_loss"] += (v_loss * share).item() / count
        models.updates += 1
        for name, _, optimizer in learners:
            (group,), (lr, warmup_steps) = optimizer.param_groups, warmups[name]
            norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm).item()  # of the masters, in fp32
            sums["grad_norm" if name == "policy" else "critic_grad_norm"] += norm / count
            group["lr"] = lr * learning_rate_factor(step, warmup_steps, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return dict(sums)


def learning_rate_factor(step, warmup_steps, config):
    """Linear warm-up [D11]; with lr_decay constant to half-way, then linear to a tenth at the last step."""
    warm = min(1.0, step / max(1, warmup_steps))
    late = max(0.0, (step / config.steps - 0.5) / 0.5)
    return warm * (1 - 0.9 * late if config.lr_decay else 1.0)


# ----- 6. The phases that are more than one call -----


def gold_example(question, tokenizer):
    """[SFT] A Rollout that nobody rolled out: the prompt of direct inference and the gold answer, as if the policy had written it."""
    ids, gold = direct_ids(tokenizer, question.question), question.golden_answers[0]
    r = Rollout(question.question, ids, [False] * len(ids), [0.0] * len(ids), len(ids), answer=gold, finished=True, found=[None])
    r.turns.append(f"<answer> {gold} </answer>")
    written = tokenizer(f" {gold} </answer>", add_special_tokens=False)["input_ids"]
    r.append(written, [0.0] * len(written))
    return r


def rewards(rollouts, golds, config, rng):
    """Phase 3 [Eq. 4]: (rewards [B], exact match [B]), both fp32 on the CPU."""
    em_B = torch.tensor([outcome_reward(r.answer, gold) for r, gold in zip(rollouts, golds)])
    rewards_B = em_B if config.reward == "em" else torch.tensor([format_reward(r, gold) for r, gold in zip(rollouts, golds)])
    if config.shuffle_rewards:
        rewards_B = rewards_B[torch.tensor(rng.sample(range(len(rewards_B)), len(rewards_B)))]
    return rewards_B, em_B


def score_batch(models, batch, rewards_B, config):
    """Phase 4: put old and reference log-probs and values into the batch; returns token rewards [B, T]."""
    if config.no_mask or config.recompute_old_logprobs:  # [D9]; and nobody sampled the retrieved tokens
        batch.old_logprobs_BT = logprobs_under(models.policy, batch, config)
    token_rewards_BT = rewards_at_end(rewards_B.to(batch.ids_BL.device), batch.mask_BT)
    if config.kl_in == "reward":  # [Eq. 1]  r - beta log(pi / pi_ref): k1, a token at a time, under the old policy
        with role(models.reference, None):
            batch.ref_logprobs_BT = logprobs_under(models.reference, batch, config)
        token_rewards_BT = token_rewards_BT - config.kl_coef * kl_k1(batch.old_logprobs_BT, batch.ref_logprobs_BT)  # 0 where masked
    if models.critic:
        with role(models.critic, "critic"):
            batch.values_BT = score(lambda part: models.critic(part.ids_BL), batch, config.micro_batch_tokens)
    return token_rewards_BT


def advantages(batch, token_rewards_BT, config):
    """Phase 5: the one place where the algorithms differ. Returns the Batch to train on."""
    if config.algo == "ppo":  # [Eq. 2]
        advantages_BT, batch.returns_BT = gae(token_rewards_BT, batch.values_BT, batch.mask_BT, config.gamma, config.lam)
        batch.advantages_BT = whiten(advantages_BT, batch.mask_BT)
        return batch
    scores_B = token_rewards_BT.sum(1)
    if config.algo in FINE_TUNING:  # what was right is imitated, the rest thrown away
        advantages_B = scores_B
    elif config.algo == "grpo":  # [Eq. 3] the group's mean is the baseline, its spread the unit
        advantages_B = group_advantages(scores_B, config.group_size)
    else:  # REINFORCE [Williams 1992]: the batch's mean is the baseline
        advantages_B = scores_B - scores_B.mean()
    batch.advantages_BT = advantages_B[:, None] * batch.mask_BT
    kept = advantages_B.nonzero()[:, 0]  # [D10]
    return batch.rows(kept) if len(kept) else batch


def measure(questions, rollouts, rewards_B, em_B, losses, config):
    """Phase 7: the metrics of a step. Counts are means over all B rollouts; kl, entropy, clip_ratio over trained tokens."""
    mean = lambda values: sum(values) / len(rollouts)
    em_Q = em_B.view(-1, config.group_size).mean(1).tolist()
    kinds = {hops: [em for em, q in zip(em_Q, questions) if q.hops == hops] for hops in {q.hops for q in questions} - {0}}
    own, response = [sum(r.response_mask) for r in rollouts], [len(r.ids) - r.prompt_length for r in rollouts]
    return {
        "reward/mean": rewards_B.mean().item(),
        "reward/std": rewards_B.std(correction=0).item(),
        "reward/em": em_B.mean().item(),
        "frac_reward_zero_std": (rewards_B.view(-1, config.group_size).std(1, correction=0) == 0).float().mean().item(),
        **{f"reward/em_{hops}hop": sum(ems) / len(ems) for hops, ems in sorted(kinds.items())},
        **losses,
        "response_length/mean": mean(response),
        "env/number_of_actions": mean([len(r.turns) for r in rollouts]),
        "env/ratio_of_valid_action": mean([r.num_valid_actions / len(r.turns) for r in rollouts]),
        "env/number_of_valid_search": mean([r.num_searches for r in rollouts]),
        "env/finish_ratio": mean([r.finished for r in rollouts]),
        "state_tokens/coverage": sum(own) / sum(response),
    }


# ----- 7. What is kept -----


def append_line(file, record):
    with open(file, "a") as f:
        f.write(json.dumps(record) + "\n")


def sample_record(step, question, r, tokenizer):
    """One rollout for a person to read."""
    return {
        "step": step, "question": question.question, "golden_answers": list(question.golden_answers), "answer": r.answer,
        "reward": outcome_reward(r.answer, question.golden_answers), "searches": r.searches,
        "prompt": tokenizer.decode(r.ids[: r.prompt_length]), "transcript": transcript(r, tokenizer),
    }  # fmt: skip


def method_of(config):
    """The row of the paper's Table 2 that a run makes, as eval.py calls it."""
    return config.algo if config.algo in FINE_TUNING else "r1" if config.no_search else "search-r1"


def save_checkpoint(out, step, models, tokenizer, config, settings):
    """OUTPUT_DIR/checkpoint-<step>: an ordinary Hugging Face folder, adapters merged, how its conversations run
    (search_r1.json), and what resuming needs (trainer_state.pt). It appears whole or not at all."""
    unfinished = out / f"unfinished-{step}"
    models.policy.save_pretrained(unfinished, state_dict=merged_state(models.policy))
    tokenizer.save_pretrained(unfinished)
    (unfinished / "search_r1.json").write_text(
        json.dumps(
            settings
            | {
                "world_seed": config.world_seed,
                "corpus": config.corpus or None,
                "encoder": config.encoder,
                "method": method_of(config),
                "base": models.policy.name_or_path,
            },
            indent=2,
        )
        + "\n"
    )
    state = {"step": step}
    for name, network, optimizer in models.learners():
        masters = optimizer.param_groups[0]["params"]
        state[f"{name}_optimizer"] = optimizer.state_dict()
        if not saved_whole(name, models):
            state[name] = {key: master.detach() for key, master in zip(trained(network, name), masters)}
    torch.save(state, unfinished / "trainer_state.pt")
    shutil.rmtree(out / f"checkpoint-{step}", ignore_errors=True)
    unfinished.rename(out / f"checkpoint-{step}")


def saved_whole(name, models):
    """True if the folder's weights are what is trained, bit for bit: a full policy in fp32. Merged or rounded ones are not."""
    return name == "policy" and models.policy.dtype == torch.float32 and models.reference is not models.policy


def restore(out, models):
    """The newest checkpoint of a run -> its step; the logs are cut back to it, since what came after will be done again."""
    newest = max(out.glob("checkpoint-*/trainer_state.pt"), key=lambda file: step_of(file.parent))
    state = torch.load(newest, map_location="cpu", weights_only=True)  # a second copy of it all might not fit on the card
    for name, network, optimizer in models.learners():
        values = load_checkpoint(newest.parent)[0].state_dict() if saved_whole(name, models) else state[name]
        optimizer.load_state_dict(state[f"{name}_optimizer"])
        for (key, p), master in zip(trained(network, name).items(), optimizer.param_groups[0]["params"]):
            master.detach().copy_(values[key])
            p.detach().copy_(master)
    for file in (out / "metrics.jsonl", out / "samples.jsonl"):
        lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= state["step"]]
        file.write_text("".join(line + "\n" for line in lines))
    return state["step"]


# ----- 8. The loop -----


def train(config, policy, tokenizer, search, draw, train_sample, held_out, bytes_before=0):
    """The outer loop; everything it learns is in OUTPUT_DIR afterwards. bytes_before: peak_bytes() before the model."""
    out, device = Path(config.output_dir), policy.device
    settings = {name: getattr(config, name) for name in SETTINGS if name != "do_search"} | {"do_search": not config.no_search}
    memory = predict_memory(policy, config)
    print(memory_table(memory))
    try:
        models = make_models(policy.eval(), config)  # eval mode throughout: dropout would make old and new log-probs differ
    except (RuntimeError, MemoryError) as error:
        raise ending(error, "loading", config) from None
    cache = Slots(policy, config.slots or config.batch_size * config.group_size, config.max_length)
    # Who writes the rollouts: the policy; for rejection sampling the base model, at every step as it was [D17]. Its slots are
    # its own: a captured decoding step knows one role.
    writer, part, writers_cache = policy, "policy", cache
    if config.algo == "rejection":
        writer, part, writers_cache = models.reference, None, Slots(models.reference, len(cache.lengths), config.max_length)

    def evaluation(step):
        """Greedy on the held-out sample; in the tiny world the first and last also sampled, and on training questions."""
        began = time.perf_counter()
        metrics, rollouts = evaluate(policy, tokenizer, held_out, search, settings, cache=cache, method=method_of(config))
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        if step in (0, config.steps) and not config.model:
            generator = torch.Generator(device).manual_seed(step)
            for name, questions in (("eval", held_out), ("train", train_sample)):
                sampled, _ = evaluate(
                    policy,
                    tokenizer,
                    questions,
                    search,
                    settings,
                    config.temperature,
                    generator,
                    cache=cache,
                    method=method_of(config),
                )
                metrics |= {f"{name}/sampled_{key}": value for key, value in sampled.items() if key.startswith("em")}
        return metrics | {"timing_s/eval": time.perf_counter() - began}, rollouts

    if config.resume:
        start = restore(out, models)
        if start >= config.steps:
            raise Mistake(f"{out} has all its {config.steps} steps; --steps N with a larger N goes on")
    else:
        start = 0
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        try:
            metrics, after = evaluation(0)
        except (SearchFailed, RuntimeError, MemoryError) as error:
            raise ending(error, "the evaluation", config) from None
        append_line(out / "metrics.jsonl", {"step": 0} | metrics)
        append_line(out / "samples.jsonl", sample_record(0, held_out[-1], after[-1], tokenizer))
        print("before training: " + describe(metrics))
    held_out_em = "-"

    with stop_at_step_end() as stop:
        for step in (bar := tqdm(range(start + 1, config.steps + 1), initial=start, total=config.steps, desc=config.algo)):
            # All randomness of a step comes from the seed and its number: a resumed run repeats nothing and skips nothing.
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
            rng = random.Random(f"{config.seed} step {step}")
            began, updates = time.perf_counter(), models.updates
            try:
                # Phase 1. Questions.
                questions = draw(step)

                # Phase 2. Rollouts [Alg. 1], the group_size of a question in a row: group ids are positions in the batch.
                doing = "the rollouts"
                with role(writer, part):
                    rollouts = [gold_example(q, tokenizer) for q in questions] if config.algo == "sft" else rollout(
                        writer, tokenizer, [q.question for q in questions], search, config.group_size, temperature=config.temperature,
                        generator=generator, cache=writers_cache, **settings | {"invalid_message": INVALID_MESSAGES[config.invalid_message]},
                    )  # fmt: skip
                rolled_out = time.perf_counter()

                # Phase 3. Rewards [Eq. 4].
                doing = "the log-probs"
                rewards_B, em_B = rewards(
                    rollouts, [q.golden_answers for q in questions for _ in range(config.group_size)], config, rng
                )

                # Phase 4. The batch, log-probs of the reference, values of the critic.
                batch = collate(rollouts, device, mask_retrieved=not config.no_mask)
                token_rewards_BT = score_batch(models, batch, rewards_B, config)

                # Phase 5. Advantages [Eq. 2: GAE, Eq. 3: group].
                batch = advantages(batch, token_rewards_BT, config)

                if config.save_hidden and step == start + 1:
                    save_hidden(policy, batch, config)

                # Phase 6. Update [Eq. 2, Eq. 3].
                doing = "the update"
                nothing_right = config.algo in FINE_TUNING and not rewards_B.any()
                losses = {} if nothing_right else update(models, batch, step, config, rng)
            except (SearchFailed, RuntimeError, MemoryError) as error:  # this step is not done; those before it are kept
                ended, kept = ending(error, doing, config), "no step was done"
                if step > 1:
                    new, kept = not (out / f"checkpoint-{step - 1}").exists(), f"saved after step {step - 1}"
                    if new:
                        save_checkpoint(out, step - 1, models, tokenizer, config, settings)
                    if new and models.updates > updates:  # to undo them a copy of all that is trained would be needed, every step
                        half = f"{models.updates - updates} of the {config.minibatches} updates of step {step}"
                        kept += f" with {half} (which is done anew: not quite the uninterrupted run)"
                    kept += f", continue with: python train.py --resume {out}"
                bar.close()
                raise type(ended)(f"{ended}; {kept}") from None

            # Phase 7. Log.
            seconds = time.perf_counter() - began
            record = {"step": step} | measure(questions, rollouts, rewards_B, em_B, losses, config)
            record |= {
                "lr": config.lr * learning_rate_factor(step, config.warmup_steps, config),
                "timing_s/rollout": rolled_out - began,
                "timing_s/update": began + seconds - rolled_out,
            }
            record["tokens_per_s"] = sum(len(r.ids) for r in rollouts) / seconds
            if step == start + 1:
                what = "tensors on the card" if device.type == "cuda" else "resident memory, the search index included"
                measured, predicted = size(peak_bytes(device) - bytes_before), size(predicted_peak(memory)[0])
                tqdm.write(f"memory, measured: {measured} at the most ({what}); predicted: {predicted}")

            # Phase 8. Evaluate and save.
            gone = None
            if step % config.eval_every == 0 or step == config.steps:
                try:
                    metrics, after = evaluation(step)
                except (SearchFailed, RuntimeError, MemoryError) as error:
                    # The step itself is done: it is logged and saved, without its evaluation.
                    gone, metrics = ending(error, "the evaluation", config), {}
                record |= metrics
                names = ("eval/em_1hop", "eval/em_2hop") if "eval/em_1hop" in metrics else ("eval/em",)
                held_out_em = " / ".join(f"{metrics[name]:.2f}" for name in names if name in metrics) or "-"
            append_line(out / "metrics.jsonl", record)
            append_line(out / "samples.jsonl", sample_record(step, questions[0], rollouts[0], tokenizer))
            bar.set_postfix_str(
                f"reward {record['reward/mean']:.2f}, searches {record['env/number_of_valid_search']:.2f}, held-out EM {held_out_em}"
            )
            if step == config.steps or stop or gone or (config.save_every and step % config.save_every == 0):
                save_checkpoint(out, step, models, tokenizer, config, settings)
            if gone:
                bar.close()
                raise type(gone)(
                    f"{gone}; saved after step {step}, which was not evaluated; python train.py --resume {out} goes on"
                )
            if stop and step < config.steps:
                bar.close()
                print(f"stopped after step {step} and saved; continue with: python train.py --resume {out}")
                sys.exit(130)
    append_line(out / "samples.jsonl", sample_record(config.steps, held_out[-1], after[-1], tokenizer))


@contextlib.contextmanager
def stop_at_step_end():
    """Yields a list that is empty until the first Ctrl-C (or SIGTERM): the step in progress is finished and saved. The
    second one ends the run at once."""
    stop = []

    def ask(number, frame):
        stop.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----- 9. What came out -----


def describe(metrics):
    """An evaluation's metrics -> one line."""
    if "eval/em_1hop" not in metrics:
        return (
            f"held-out EM {metrics['eval/em']:.3f}, F1 {metrics['eval/f1']:.3f} (greedy), {metrics['eval/searches']:.2f} searches"
        )
    pair = lambda name: f"{metrics[name + '_1hop']:.3f} / {metrics[name + '_2hop']:.3f}"
    return f"held-out EM, one hop / two hops: {pair('eval/em')} greedy, {pair('eval/sampled_em')} sampled, {metrics['eval/sampled_em']:.3f} sampled in all; searches {pair('eval/searches')}"


# Nineteen of the twenty runs of LOG.md, 7 and 19, ended above these (PPO at seed 2 did not); one that ends lower is worth a look.
EXPECTED = {"eval/em_1hop": 0.95, "eval/em_2hop": 0.90}


def report(config):
    """Print one transcript before and one after, and in a sentence what changed and whether it was to be expected."""
    out = Path(config.output_dir)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    for title, sample in (("before training", samples[0]), (f"after {config.steps} steps", samples[-1])):
        print(
            f"\n--- {title} (greedy, a held-out question; gold answer: {' or '.join(sample['golden_answers'])}; reward {sample['reward']:.0f})"
        )
        print((sample["question"] + "\n" + sample["transcript"]).translate(HARMLESS))
    print(f"\nbefore: {describe(first)}\nafter:  {describe(last)}")
    if "train/sampled_em_1hop" in last:
        print(f"        on training questions, sampled: {last['train/sampled_em_1hop']:.3f} / {last['train/sampled_em_2hop']:.3f}")
    spent = {name: sum(r.get(f"timing_s/{name}", 0) for r in records) for name in ("rollout", "update", "eval")}
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in spent.items()) + f"; all in {out}")
    plain = method_of(config) == "search-r1" and config.retriever == "exact" and not (config.no_mask or config.shuffle_rewards)
    if config.preset == "tiny" and plain and config.steps >= PRESETS.get(f"tiny/{config.algo}", {}).get("steps", Config.steps):
        missed = [f"{name} {last[name]:.2f} (expected {bar:.2f} or more)" for name, bar in EXPECTED.items() if last[name] < bar]
        now = f"It now searches {last['eval/searches_1hop']:.2f} / {last['eval/searches_2hop']:.2f} times for one-hop / two-hop questions and is right in {last['eval/em_1hop']:.0%} / {last['eval/em_2hop']:.0%}"
        print(now + (f", BELOW what is expected: {', '.join(missed)}." if missed else ", as expected."))


# ----- 10. Many runs: the studies and the table -----

# Study -> {label: flags}. Runs of equal flags are made once, whichever study wants them.
STUDIES = {
    # Table 4: without the mask training is less stable and ends lower.
    "mask": {"with the mask": {}, "without": {"no_mask": True}},
    # Sec. 5: GRPO is faster at first, PPO more stable, both end alike. REINFORCE: successors found that it does as well.
    "algo": {"PPO": {"algo": "ppo"}, "GRPO": {}, "REINFORCE": {"algo": "reinforce"}},
    # Sec. 5: the instruct model starts higher and learns faster, the base model catches up.
    "base-instruct": {f"{n} steps of format": {"format_steps": n} for n in (80, 160, 480)},
    # Appendix, Table 7: three passages a search are best, one is worse, five learn fast and end below three.
    "topk": {f"{k} a search": {"top_k": k} for k in (1, 3, 5)},
    # Appendix, Table 8: larger groups learn faster and are less stable; a group of one ends best. Always 240 rollouts a step.
    "group-size": {f"groups of {g}": {"group_size": g, "batch_size": 240 // g} for g in (1, 3, 5, 8)},
    # Sec. 5: the response first gets shorter (filler goes), then longer (it searches), and the reward rises with it.
    "dynamics": {"PPO": {"algo": "ppo"}, "GRPO": {}},
    # A later re-examination: with a random engine it stops searching, with an empty one it searches more.
    "retriever": {kind: {"retriever": kind} for kind in CHOICES["retriever"]},
    # The budget B of Algorithm 1: what cannot be asked in one search needs two.
    "turns": {f"B = {b}": {"max_turns": b} for b in (1, 2, 3)},
}


def finished_run(given):
    """Flags of a run on the tiny world -> the folder in which it is finished, outputs/studies/<flags>. One that is there is
    taken as it is, half a one is continued."""
    name = "-".join(f"{key}-{value}".replace("_", "-") for key, value in sorted(given.items()))
    folder = Path("outputs/studies") / name
    steps = parse_config(given).steps
    if (folder / f"checkpoint-{steps}").exists():
        return folder
    half = list(folder.glob("checkpoint-*/trainer_state.pt"))
    if not half:
        shutil.rmtree(folder, ignore_errors=True)
    config = parse_config({"resume": str(folder)} if half else given | {"output_dir": str(folder)})
    print(f"{'continuing' if half else 'run'} {name}")
    with contextlib.redirect_stdout(io.StringIO()):  # the bar stays
        train(config, *load_run(config))
    return folder


def spread(values):
    """Numbers, one a seed -> "mean (lowest to highest)"."""
    text = f"{sum(values) / len(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def study(name, seeds, given):
    """Make the runs of a study, draw them into figures/<name>.png with bands over the seeds, print where they end."""
    variants, runs = STUDIES[name], {}
    for seed in range(seeds):
        for label, flags in variants.items():
            flags = {flag: value for flag, value in flags.items() if value != getattr(Config, flag)}  # one folder for one run
            folder = finished_run(flags | given | {"seed": seed})
            runs |= {f"{label}, seed {seed}": records for records in read_runs([folder]).values()}
    Path("figures").mkdir(exist_ok=True)
    plot_runs(runs, f"figures/{name}.png")
    write_points(runs, f"figures/{name}.csv")
    print(f"\n| {name} | EM, one hop | EM, two hops | searches, one hop | searches, two hops |\n|---|---|---|---|---|")
    for label in variants:
        last = [runs[f"{label}, seed {seed}"][-1] for seed in range(seeds)]
        ends = ("eval/em_1hop", "eval/em_2hop", "eval/searches_1hop", "eval/searches_2hop")
        print(f"| {label} | " + " | ".join(spread([r[metric] for r in last]) for metric in ends) + " |")
    print(f"\nwrote figures/{name}.png and .csv; mean of {seeds} seeds (lowest to highest), greedy, held-out questions")


# What `--table --quick` trains less of: one seed, enough for the order.
QUICK = {"grpo": 50, "ppo": 40, "sft": 40, "rejection": 25, "r1": 10}


def trained_rows(seed, quick, given):
    """The runs behind the rows of the table that are trained -> {(row, method): folder}."""
    steps = lambda kind: {"steps": QUICK[kind]} if quick else {}
    make = lambda kind, flags: finished_run(steps(kind) | flags | given | {"seed": seed})
    return {
        ("SFT", "sft"): make("sft", {"algo": "sft"}),
        ("R1", "r1"): make("r1", {"no_search": True}),
        ("Rejection sampling", "rejection"): make("rejection", {"algo": "rejection"}),
        ("Search-R1 (PPO)", "search-r1"): make("ppo", {"algo": "ppo"}),
        ("Search-R1 (GRPO)", "search-r1"): make("grpo", {}),
    }


def table(seeds, quick, given):
    """The paper's Table 2 on the tiny world: nine methods, one base model a seed, greedy on held-out questions."""
    columns = ("em_1hop", "em_2hop", "em", "f1", "sub_em", "hit", "searches", "turns", "response_tokens", "finished")
    names = {"direct": "Direct inference", "cot": "CoT", "ircot": "IRCoT", "search-o1": "Search-o1", "rag": "RAG"}
    scores = {}
    for seed in range(seeds):
        trained_from = trained_rows(seed, quick, given)
        config = parse_config(given | {"seed": seed})
        with contextlib.redirect_stdout(io.StringIO()):
            base, tokenizer, search, _, _, held_out = load_run(config)
        held_out = fixed_sample(held_out, 200 if quick else 0)
        settings = {name: getattr(config, name) for name in SETTINGS if name != "do_search"} | {"do_search": True}
        rows = {(names[method], method): base for method in names}
        rows |= {
            row: load_checkpoint(max(folder.glob("checkpoint-*"), key=step_of), base.device)[0]
            for row, folder in trained_from.items()
        }
        for (row, method), policy in tqdm(rows.items(), desc=f"evaluating, seed {seed}"):
            metrics, _ = evaluate(policy, tokenizer, held_out, search, settings, method=method)
            scores.setdefault(row, []).append({name: metrics.get(name) for name in columns})
    Path("figures").mkdir(exist_ok=True)
    with open("figures/table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *columns])
        writer.writerows(
            [row, seed, *(f"{s[c]:.4f}" for c in columns)] for row, each in scores.items() for seed, s in enumerate(each)
        )
    print("\n| method | EM, one hop | EM, two hops | both | hit | searches | calls | tokens |\n|---|---|---|---|---|---|---|---|")
    for row, each in scores.items():
        cells = [spread([s[name] for s in each]) for name in ("em_1hop", "em_2hop", "em")]
        cells += [f"{sum(s[name] for s in each) / len(each):.2f}" for name in ("hit", "searches", "turns", "response_tokens")]
        print(f"| {row} | " + " | ".join(cells) + " |")
    guess = sum(1 / data.PART[data.KIND_OF[q.golden_answers[0]]] for q in held_out) / len(held_out)
    print(f"\nguessing an entity of the right kind would score {guess:.3f}")
    print(f"wrote figures/table.csv; {len(held_out)} held-out questions, greedy, mean of {seeds} seeds (lowest to highest)")


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1])


def many_runs(wants, given):
    seeds = wants["seeds"] if wants["seeds"] is not None else 1 if wants["quick"] else 3
    if seeds < 1:
        raise Mistake(f"--seeds {seeds}: must be at least 1")
    if wants["table"] and wants["study"] or wants["quick"] and not wants["table"]:
        raise Mistake("--table or --study, one at a time; --quick goes with --table")
    if {"seed", "resume", "output_dir", "model", "preset"} & set(given):
        raise Mistake(
            "--table and --study make runs of their own on the tiny world: no --seed, --resume, --output-dir, --model or --preset"
        )
    if wants["table"]:
        table(seeds, wants["quick"], given)
    else:
        study(wants["study"], seeds, given)


def main(argv=None):
    given = parse_flags(sys.argv[1:] if argv is None else argv)
    wants = {name: given.pop(name, None) for name in ("table", "quick", "study", "seeds")}
    if wants["table"] or wants["study"]:
        return many_runs(wants, given)
    if wants["quick"] or wants["seeds"] is not None:
        raise Mistake("--seeds goes with --table or --study, --quick with --table")
    config = parse_config(given)
    print("config: " + ", ".join(f"{k}={v}" for k, v in asdict(config).items() if v != ""))
    bytes_before = 0 if torch.cuda.is_available() else peak_bytes(torch.device("cpu"))  # Python, torch and what they import
    try:
        run = load_run(config)
    except (RuntimeError, MemoryError) as error:
        raise ending(error, "loading", config) from None
    train(config, *run, bytes_before)
    plot_runs(read_runs([config.output_dir]), Path(config.output_dir) / "curves.png")
    report(config)


if __name__ == "__main__":
    run_main(main)
