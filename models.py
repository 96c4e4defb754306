"""The paper's four models on one card: policy, reference and critic, and the copy of the policy that samples.

The paper spreads four copies of a model over eight 80 GB cards. Here the policy itself samples, so three networks are
left. There are two ways to fit them on one card of 24 GB:

    full fine-tuning   policy, frozen reference and critic are three models with all their weights (0.5B)
    LoRA roles [D14]   one base: policy = base + adapter, reference = base, critic = base + adapter + head (1.5B, 3B)

    1. PRESETS                                         what fits
    2. Adapted, adapt, role, trained, merged_state     adapters, and which role a model plays
    3. adam                                            fp32 masters of bf16 weights
    4. make_models, try_kernels, fuse_norms, recomputed    all networks of a run
    5. predict_memory                                  what a run will hold, told before it begins

Departure: [D14] P: with --lora-rank only adapters are trained. The paper trains all weights of policy and critic.

What each preset takes on a card of 24 GB: README.md, "A real model on one card"; tests/bench_gpu.py measures it. A
card without bf16 (a T4 of 15 GiB) takes fp32: 12.4 GiB for --preset qwen2.5-0.5b --lora-rank 32.
"""

import contextlib
import copy
import ctypes
import functools
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import FEED_TOKENS, Mistake, slot_bytes
from kernels import default_chunk, fused_logprob_kl
from searchr1 import Critic

# ----- 1. Presets: what fits on one card -----
# A preset is a dict of flags that differ from train.py's defaults, which are the tiny world's. `NAME/ALGO` is what
# `python train.py --preset NAME --algo ALGO` runs with.

# The paper's recipe [the official v0.2 scripts, the paper's appendix], with a batch for one card and one update a step:
# the official GRPO, with ten updates on 2560 rollouts, collapses (why is open). Warm-up: .285 of steps, critic's .015.
REAL = {
    "steps": 300, "batch_size": 16, "group_size": 5, "minibatches": 1, "micro_batch_tokens": 8192, "lr": 1e-6,
    "critic_lr": 1e-5, "warmup_steps": 86, "critic_lr_warmup_steps": 5, "critic_warmup_steps": 0, "cooldown": 0,
    "adam_beta2": 0.999, "weight_decay": 0.01, "max_turns": 4, "max_new_tokens": 500, "max_obs_length": 500,
    "max_length": 4096, "invalid_message": "official", "recompute_old_logprobs": True, "gradient_checkpointing": True,
    "slots": 64, "eval_every": 50, "eval_limit": 100, "save_every": 50,
}  # fmt: skip
# What each algorithm changes. Fine-tuning has no reward and no reference [Sec. 4]; rejection sampling draws five.
REAL_PPO = {"batch_size": 80, "group_size": 1, "kl_in": "reward"}
REAL_REINFORCE = {"batch_size": 80, "group_size": 1}
REAL_SFT = {"group_size": 1, "kl_coef": 0.0, "minibatches": 1, "recompute_old_logprobs": False, "lr": 1e-5}
REAL_REJECTION = REAL_SFT | {"group_size": 5}
# Adapters want some ten times the learning rate of the weights themselves. The paper does not give fine-tuning's rates.
LORA = {"lora_rank": 32, "lora_alpha": 64.0, "lr": 1e-5, "critic_lr": 1e-4}
LORA_SFT, LORA_REJECTION = REAL_SFT | {"lr": 1e-4}, REAL_REJECTION | {"lr": 1e-4}
# Without a Wikipedia dump: HotpotQA over its own paragraphs, found by the paper's encoder.
HOTPOTQA = REAL | {"train_data": "hotpotqa", "corpus": "contexts", "encoder": "intfloat/e5-base-v2"}
QWEN_05B = HOTPOTQA | {"model": "Qwen/Qwen2.5-0.5B", "steps": 400, "warmup_steps": 114, "critic_lr_warmup_steps": 6}
QWEN_15B = HOTPOTQA | LORA | {"model": "Qwen/Qwen2.5-1.5B"}
QWEN_3B = HOTPOTQA | LORA | {"model": "Qwen/Qwen2.5-3B"}
# Eight key-value heads instead of two: the keys and values of a rollout take three times as much.
LLAMA_3B = HOTPOTQA | LORA | {"model": "meta-llama/Llama-3.2-3B", "slots": 20, "micro_batch_tokens": 4096}
# The official v0.2 scripts (scripts/nq_hotpotqa/v0.2), for whoever has the hardware, 8 x 80 GB there.
PAPER = REAL | {
    "model": "Qwen/Qwen2.5-7B", "train_data": "nq+hotpotqa",  # Sec. 4; 169,615 questions; also Qwen2.5-3B, and instruct
    "corpus": "http://127.0.0.1:8000/retrieve",  # wiki-18 behind the official server, E5, top 3
    "steps": 1005, "warmup_steps": 286, "critic_lr_warmup_steps": 15,  # the paper reports step 500
    "batch_size": 512, "minibatches": 10,  # data.train_batch_size; 2560 rollouts in mini-batches of 256
    "entropy_coef": 0.001,  # the default of the official code, which no script changes
    "slots": 256, "eval_every": 100, "eval_limit": 1000, "save_every": 100,
}  # fmt: skip
PAPER_ONE = {"group_size": 1, "minibatches": 2}  # 512 rollouts in mini-batches of 256

# A small chat model on two CPU cores, or any GPU of 6 GB: one or two searches of one passage, few and short
# conversations, adapters, no reference. Cold start: --algo format, then --model with its checkpoint.
LAPTOP = {
    "model": "Qwen/Qwen2.5-0.5B-Instruct", "train_data": "hotpotqa", "corpus": "bm25:contexts", "lora_rank": 32,
    "lora_layers": 12, "lora_alpha": 64.0, "steps": 100, "batch_size": 5, "group_size": 8, "minibatches": 1,
    "micro_batch_tokens": 2048, "recompute_old_logprobs": True, "lr": 1e-4, "critic_lr": 5e-4, "cooldown": 0,
    "adam_beta2": 0.99, "clip_high": 0.28, "kl_coef": 0.0,
    "reward": "em+f1", "prompt": "short", "max_turns": 2, "max_new_tokens": 64, "max_obs_length": 120,
    "max_length": 448, "top_k": 1, "easy_first": True, "eval_every": 20, "eval_limit": 100, "save_every": 5,
}  # fmt: skip
LAPTOP_ONE = {"batch_size": 40, "group_size": 1}

# The tiny world. until_learned is off: the EM in the log is that of the imitated rollouts, not of the policy.
IMITATION = {"kl_coef": 0.0, "minibatches": 1, "until_learned": False}

PRESETS = {
    "tiny/grpo": {},
    "tiny/ppo": {"batch_size": 240, "group_size": 1, "kl_in": "reward"},
    "tiny/reinforce": {"batch_size": 240, "group_size": 1},
    "tiny/sft": IMITATION | {"batch_size": 240, "group_size": 1, "steps": 100},
    "tiny/rejection": IMITATION | {"batch_size": 96, "steps": 60},
    "real/grpo": REAL,  # any --model, --train-data, --corpus
    "real/ppo": REAL | REAL_PPO,
    "real/reinforce": REAL | REAL_REINFORCE,
    "real/sft": REAL | REAL_SFT,
    "real/rejection": REAL | REAL_REJECTION,
    "qwen2.5-0.5b/grpo": QWEN_05B,
    "qwen2.5-0.5b/ppo": QWEN_05B | REAL_PPO | {"slots": 24, "micro_batch_tokens": 4096},  # two full models
    "qwen2.5-0.5b/reinforce": QWEN_05B | REAL_REINFORCE,
    "qwen2.5-0.5b/sft": QWEN_05B | REAL_SFT,
    "qwen2.5-0.5b/rejection": QWEN_05B | REAL_REJECTION,
    "qwen2.5-1.5b/grpo": QWEN_15B,
    "qwen2.5-1.5b/ppo": QWEN_15B | REAL_PPO,
    "qwen2.5-1.5b/reinforce": QWEN_15B | REAL_REINFORCE,
    "qwen2.5-1.5b/sft": QWEN_15B | LORA_SFT,
    "qwen2.5-1.5b/rejection": QWEN_15B | LORA_REJECTION | {"slots": 32},  # two sets of slots: base model and policy
    "qwen2.5-3b/grpo": QWEN_3B,
    "qwen2.5-3b/ppo": QWEN_3B | REAL_PPO | {"slots": 56},
    "qwen2.5-3b/reinforce": QWEN_3B | REAL_REINFORCE,
    "qwen2.5-3b/sft": QWEN_3B | LORA_SFT,
    "qwen2.5-3b/rejection": QWEN_3B | LORA_REJECTION | {"slots": 24},
    "llama-3.2-3b/grpo": LLAMA_3B,
    "llama-3.2-3b/ppo": LLAMA_3B | REAL_PPO,
    "llama-3.2-3b/reinforce": LLAMA_3B | REAL_REINFORCE,
    "llama-3.2-3b/sft": LLAMA_3B | LORA_SFT,
    "llama-3.2-3b/rejection": LLAMA_3B | LORA_REJECTION | {"slots": 10},
    "laptop/grpo": LAPTOP,
    "laptop/ppo": LAPTOP | LAPTOP_ONE,
    "laptop/reinforce": LAPTOP | LAPTOP_ONE,
    "laptop/sft": LAPTOP | LAPTOP_ONE,
    "laptop/rejection": LAPTOP | {"reward": "em"},  # what is half right is not imitated
    "laptop/format": LAPTOP | {"batch_size": 8, "group_size": 1, "steps": 20, "warmup_steps": 4},
    "paper/grpo": PAPER,
    "paper/ppo": PAPER | PAPER_ONE | {"kl_in": "reward"},
    "paper/reinforce": PAPER | PAPER_ONE,
    "paper/sft": PAPER | REAL_SFT,
    "paper/rejection": PAPER | REAL_REJECTION,
}

# ----- 2. Adapters, and the role that a model plays -----

class Adapted(torch.nn.Module):
    """[D14] A frozen linear layer and a trained low-rank change per role [LoRA Eq. 3]: y = W x + b + alpha/r B A x.
    weight [out, in] and bias are the layer's own, under their old names. A [r, in] is uniform in +-1/sqrt(in), B [out,
    r] is 0, so that every role begins as the base model. `role` says whose change is on; None: nobody's."""

    role = "policy"

    def __init__(self, linear, roles, rank, alpha, generator):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.A = torch.nn.ParameterDict({name: linear.weight.new_zeros(rank, linear.in_features) for name in roles})
        self.B = torch.nn.ParameterDict({name: linear.weight.new_zeros(linear.out_features, rank) for name in roles})
        for A in self.A.values():
            A.data.copy_(torch.empty(A.shape).uniform_(-1, 1, generator=generator) * linear.in_features**-0.5)
        self.train(linear.training)

    def forward(self, x):
        x_nD = x.reshape(-1, x.shape[-1])
        y_nD = torch.nn.functional.linear(x_nD, self.weight, self.bias)
        if self.role:  # two thin products; the second is added onto y in place, since decoding pays for each kernel
            y_nD = y_nD.addmm_(x_nD @ self.A[self.role].T, self.B[self.role].T, alpha=self.scale)
        return y_nD.view(*x.shape[:-1], -1)

def decoder_layers(policy):
    """The layers of a causal LM or a critic, from the lowest to the highest. transformers marks them by their class."""
    return [layer for layer in policy.modules() if isinstance(layer, GradientCheckpointingLayer)]

def adapt(policy, roles, rank, alpha, upper=0, seed=0):
    """Freeze a causal LM and replace each linear layer in its `upper` highest decoder layers (0: in all of them) by an
    Adapted one, in place. Below the lowest adapter nothing is kept for the backward pass, which ends there."""
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in [block for layer in decoder_layers(policy)[-upper:] for block in layer.modules()]:
        for name, layer in list(block.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(block, name, Adapted(layer, roles, rank, alpha, generator))
    if not trained(policy, roles[0]):
        raise Mistake(f"--lora-rank {rank}: {type(policy).__name__} has no linear layers to adapt; leave it out")
    return policy

@contextlib.contextmanager
def role(model, name):
    """Inside, an adapted model plays `name`: "policy" (the default), "critic", or None, the base model. With full
    fine-tuning, `role` is a no-op. PITFALL: gradient checkpointing repeats the forward pass in backward(). Call that
    inside, too; otherwise the gradient belongs to the policy's activations, and nothing complains."""
    layers = [layer for layer in model.modules() if isinstance(layer, Adapted)]
    for layer in layers:
        layer.role = name
    try:
        yield
    finally:
        for layer in layers:
            layer.role = Adapted.role

def trained(model, name):
    """What role `name` trains, {key: parameter}: all of a full model, or the role's adapters and the critic's head."""
    other = {"policy": ".critic", "critic": ".policy"}[name]
    return {key: p for key, p in model.named_parameters() if p.requires_grad and not key.endswith(other)}

def merged_state(policy):
    """State dict of the plain model that answers as the policy does: each W + alpha/r B A is summed in fp32 and rounded
    once. On the CPU, since a card that ran out of memory has no room for it."""
    state = {key: t for key, t in policy.state_dict().items() if not key.endswith((".policy", ".critic"))}
    for key, layer in policy.named_modules():
        if isinstance(layer, Adapted):
            W, A, B = (t.detach().cpu().float() for t in (layer.weight, layer.A["policy"], layer.B["policy"]))
            state[f"{key}.weight"] = torch.addmm(W, B, A, alpha=layer.scale).to(layer.weight.dtype)
    return state

# ----- 3. The optimiser and its fp32 masters -----

def adam(parameters, lr, config):
    """{name: parameter} -> AdamW over their fp32 masters: an fp32 parameter itself, a copy of a bf16 one.

    PITFALL: bf16 has 8 significant bits: the next number after 0.02 is 1.2e-4 away. An Adam step at the paper's
    learning rate is 1e-6, which rounds back to where it was, every time: nothing is learned, and no log shows it. So
    gradients of micro-batches are added up in the fp32 master, the optimiser moves the master, and the parameter is the
    master, rounded. It is written in place, since the rollout's CUDA graphs read that very address."""
    masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in parameters.values()]
    copies = [(p, master) for p, master in zip(parameters.values(), masters) if p is not master]

    def hand_over(master, p):
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def write_back(*_):
        for p, master in copies:
            p.detach().copy_(master.detach())

    for p, master in copies:
        p.register_post_accumulate_grad_hook(functools.partial(hand_over, master))
    fused = masters[0].is_cuda or None  # the default on a GPU (foreach) holds a second copy of everything for a moment
    optimizer = torch.optim.AdamW(masters, lr, (0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=fused)
    optimizer.register_step_post_hook(write_back)
    return optimizer

# ----- 4. All networks of a run -----

@dataclass
class Models:
    """The networks of a run. With adapters, policy, reference and critic's body are one object, switched by `role`."""

    policy: torch.nn.Module  # also the engine that samples
    reference: torch.nn.Module  # pi_ref of Eq. 1: the policy as it was at the start, frozen
    critic: torch.nn.Module | None  # None except for PPO
    learners: list  # (role, network, its optimiser) of what is trained, the policy first
    updates: int = 0  # optimiser steps of the update in progress, counted as they begin
    broken: Counter = field(default_factory=Counter)  # role -> gradients in a row that were not finite

def make_models(policy, config):
    """A causal LM and the Config of train.py -> Models. The policy stays the object it is."""
    ppo = config.algo == "ppo"
    if policy.device.type == "cuda":
        try_kernels(policy.device)
        fuse_norms(policy)
    if config.lora_rank:
        roles = ("policy", "critic") if ppo else ("policy",)
        reference = adapt(policy, roles, config.lora_rank, config.lora_alpha, config.lora_layers, config.seed)
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
    critic = Critic(policy, policy.base_model if config.lora_rank else None).to(policy.device) if ppo else None
    if config.gradient_checkpointing:
        for layer in decoder_layers(policy) + (decoder_layers(critic) if ppo else []):
            layer.forward = types.MethodType(recomputed, layer)
    learners = [("policy", policy, adam(trained(policy, "policy"), config.lr, config))]
    if ppo:
        learners.append(("critic", critic, adam(trained(critic, "critic"), config.critic_lr, config)))
    return Models(policy, reference, critic, learners)

def try_kernels(device):
    """Launch the Triton kernels once, forward and back, before anything is trained. PITFALL: Triton builds its driver
    with a C compiler at the first launch. Without one, a run would end after its first rollouts."""
    x_1V = torch.zeros(1, 8, device=device, requires_grad=True)
    try:
        fused_logprob_kl(x_1V, torch.zeros(1, dtype=torch.long, device=device)).logp.sum().backward()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        why = str(error).strip().splitlines()[0]
        raise Mistake(f"Triton cannot build its kernels here: {why}; install gcc or clang, or set CC to one") from None

def fuse_norms(policy):
    """Compute each RMS norm of Llama, Qwen2 and Qwen3 in one kernel, in place. As transformers writes it, a norm is six
    kernels, and a decoding step spends more on starting such small kernels than on reading the weights of a layer."""
    fused = lambda layer, x: torch.nn.functional.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)
    for layer in policy.modules():
        if type(layer).__name__.endswith("RMSNorm") and hasattr(layer, "variance_epsilon"):
            layer.forward = types.MethodType(fused, layer)

def recomputed(layer, *args, **kwargs):
    """forward() of a decoder layer that keeps only its input; the backward pass computes the rest again. transformers
    has it for layers in training mode; ours stay in eval mode, as dropout would make old and new log-probs differ."""
    plain = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

# ----- 5. Memory, told in advance -----

MOMENTS = {  # temporary memory, grouped by the moment that holds it; everything else is held all the time
    "writing rollouts": ("a block", "sampling"),
    "log-probs in the update": ("gradients", "head's gradient", "activations", "log-probs"),
    "one layer in the update": ("gradients", "head's gradient", "activations", "one layer"),
}
# Not tensors; as others report them: CUDA's context; cuBLAS, 32 MiB a stream; a graph, 64 KB a kernel [vLLM PR 11349].
CONTEXT, WORKSPACES, GRAPH_NODE = 500 * 2**20, 3 * 32 * 2**20, 64 * 2**10
GRAPHS = 12  # at most, of one set of slots [engine.decode]
STEP_KERNELS, ADAPTER_KERNELS = 26, 14  # of a decoding step, a layer; counted in tests/test_gpu.py

def predict_memory(policy, config, search_bytes=0):
    """A causal LM as it was loaded, and the Config -> {what: bytes} that the run will hold with the longest rollouts.
    Weights, adapters, masters and Adam's means are exact. search_bytes: what encoder and index take on the card."""
    c, e = policy.config, policy.dtype.itemsize
    device = "cuda" if policy.device.type == "meta" else policy.device.type  # a model without memory: plan for a card
    on_card = device == "cuda"
    D, V, H, layers = c.hidden_size, c.vocab_size, c.num_attention_heads, c.num_hidden_layers
    I = getattr(c, "intermediate_size", None) or 4 * D  # GPT-2 does not say
    head_dim = getattr(c, "head_dim", None) or D // H
    q, kv = H * head_dim, (getattr(c, "num_key_value_heads", None) or H) * head_dim
    lora, critics, r = bool(config.lora_rank), config.algo == "ppo", config.lora_rank
    learning = decoder_layers(policy)[-config.lora_layers * lora :]
    linears = [m for layer in learning for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    head = critics * (D + 1)  # of the critic, always in fp32

    # Trained numbers: the adapters [r, in] and [out, r] of each role, or the policy and the critic's body.
    adapters = sum(r * (m.in_features + m.out_features) for m in linears)
    count = (1 + critics) * adapters if lora else policy.num_parameters() + critics * policy.base_model.num_parameters()

    # What autograd keeps of a layer, bytes a token. Each norm: its input in fp32 (4), the normalised value where its
    # weight is trained (e), the result (e). Attention: q, k, v as rotated and its output, one fp32 number a head. MLP:
    # gate, silu(gate), up, their product. Qwen3's norms of q and k. Adapters: A x of each linear layer.
    norm = 4 + e + e * (not lora)
    layer = 2 * D * norm + e * (2 * q + 2 * kv + 4 * I) + 4 * H + e * r * (len(linears) // len(learning))
    layer += (norm - e) * (q + kv) * any("q_norm" in name for name, _ in policy.base_model.named_modules())
    # Kept from the forward pass on: all layers in full, or with gradient checkpointing the input of each. In the
    # backward pass one layer is computed again, if it was not kept, and the gradients of the MLP's parts are added.
    kept = len(learning) * (e * D if config.gradient_checkpointing else layer) + D * norm  # the last norm's
    once = layer * config.gradient_checkpointing + e * (3 * I + 2 * D)
    tokens = max(config.micro_batch_tokens, config.max_length)  # of a micro-batch: at least one row
    # kernels.py with no row masked: one slice of logits in fp32 and its gradient in e (the twin holds four in fp32);
    # the hidden states in e, twice (all, and the active ones); their gradient, once in fp32 and once in e.
    one_slice = 4 * tokens * default_chunk(tokens, V, device)
    logits = one_slice * (1 + e / 4 if on_card else 4) + tokens * D * (4 + 3 * e)
    logits += tokens * D * e * (config.kl_in == "loss" and config.kl_coef > 0)  # the reference's hidden states

    slots = config.slots or config.batch_size * config.group_size
    sets = 1 + (config.algo in ("rejection", "format"))  # of slots: there the base model has a second one
    kernels = layers * STEP_KERNELS + len(learning) * ADAPTER_KERNELS * lora + 20  # of a decoding step
    return {
        "weights": e * policy.num_parameters(),
        "reference's weights": 0 if lora else e * policy.num_parameters(),
        "critic's weights": 0 if lora else critics * e * policy.base_model.num_parameters(),
        "critic's head": 4 * head,
        "adapters": lora * e * count,
        "fp32 masters": 4 * count if e != 4 else 0,
        "Adam": 8 * (count + head),  # two means
        "gradients": 4 * (count + head),
        "keys and values": slots * slot_bytes(policy, config.max_length) * sets,  # graphs point to them: always held
        "CUDA graphs": sets * GRAPHS * kernels * GRAPH_NODE * (on_card and not config.no_cuda_graphs),
        "context, workspaces": (CONTEXT + WORKSPACES) * on_card,
        "search engine": search_bytes,
        "lm_head in fp32": 4 * V * D * (device == "cpu" and e != 4),  # of the engine
        # A block of passages on its way through a layer [engine.feed]: keys and values of its rows, gathered and
        # repeated for all heads (FEED_TOKENS columns), and the MLP's parts (as many ids at most, if all are prompts).
        "a block": e * min(FEED_TOKENS, slots * config.max_length) * (2 * kv + 2 * q + 3 * I + 4 * D),
        "sampling": slots * V * (4 * 4 + 2 * 8),  # logits, scaled, log p, p in fp32; p and its sums in float64
        # Gradient of a trained lm_head, and of a tied embedding, too: held until the body's backward pass is over.
        "head's gradient": 0 if lora else e * V * D * (1 + bool(c.tie_word_embeddings)),
        "activations": tokens * kept,
        "log-probs": int(logits),
        "one layer": tokens * once,
    }

def predicted_peak(memory):
    """predict_memory's dict -> (bytes at the fullest moment, which moment)."""
    passing = set().union(*MOMENTS.values())
    always = sum(count for name, count in memory.items() if name not in passing)
    return max((always + sum(memory[name] for name in names), moment) for moment, names in MOMENTS.items())

def size(count):
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

def memory_table(memory):
    peak, moment = predicted_peak(memory)
    lines = [f"  {name:20}{size(count):>12}" for name, count in memory.items() if count]
    return "\n".join(["memory, predicted:", *lines, f"  {'at the most':20}{size(peak):>12}   ({moment})"])

class Costs:
    """What each phase of a step takes: seconds, and on a GPU GiB of memory: the peak of tensors in each phase, and the
    most of the card that was in use, by whatever program, at the end of a phase ("card")."""

    def __init__(self, device):
        self.device, self.metrics, self.seconds, self.began = device, {}, 0.0, time.perf_counter()

    def end(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.metrics[f"memory_gib/{phase}"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            free, total = torch.cuda.mem_get_info(self.device)  # context and graphs included
            self.metrics["memory_gib/card"] = max(self.metrics.get("memory_gib/card", 0), (total - free) / 2**30)
            torch.cuda.reset_peak_memory_stats(self.device)
        spent, self.began = time.perf_counter() - self.began, time.perf_counter()
        self.metrics[f"timing_s/{phase}"], self.seconds = spent, self.seconds + spent

def peak_bytes():
    """The most that this process has held so far, as resident memory (0 on Windows)."""
    if sys.platform == "win32":
        return 0
    import resource  # which Windows does not have
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def give_back():
    """Hand freed memory back to the system. PITFALL: glibc keeps freed blocks for later, and activations have another
    size in each micro-batch. Without this call a laptop run on a CPU grew to more than twice what it uses."""
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
