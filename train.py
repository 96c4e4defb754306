"""Training: the outer loop of Search-R1, with PPO, GRPO or REINFORCE, on one GPU or none.

Without flags a tiny language model learns to search in a tiny world (data.py), in a few minutes on two CPU cores; its
last line ends "as expected." With --model, --train-data and --corpus the same loop trains a real model:

    1 questions    2 rollouts [Alg. 1]    3 rewards [Eq. 4]    4 values of the critic, KL penalty if in the reward
    5 advantages [Eq. 2: GAE, Eq. 3: group]    6 update [Eq. 2, Eq. 3]    7 log    8 evaluate and save

PPO and GRPO differ in phase 5, and in where the KL penalty goes: k1 in the reward (PPO), k3 in the loss (GRPO). The
paper's tuned baselines use the same phases: --algo sft takes gold answers for rollouts, --algo rejection the
starting model's right ones, and both imitate them; R1 is --no-search. Shapes are those of searchr1.py.

Departures, besides those of searchr1.py and models.py (P: from the paper, C: from the official code):
  [D9]  C  Old log-probs are the sampler's own. In fp32 they equal the trainer's within 2e-5 (tested), and a forward
           pass is saved. In bf16 they are 0.01 a token apart: use --recompute-old-logprobs, as the official code does.
           With one update a step and the KL in the loss, recomputing is free: the update's own log-probs are used.
  [D10] P,C Rollouts of advantage 0 (GRPO: groups of equal rewards) stay out of the update, and so do their KL term and
           their tokens in the mean. If all are 0, all stay; only KL acts. PPO keeps all. Logged: frac_reward_zero_std.
  [D11] C  The learning rate warms up from lr/warmup_steps, not from 0, which would waste the first step. In the tiny
           world a run ends with a cooldown, in which the rate falls to a tenth. It begins when nearly all answers are
           right, since some seeds need twice as many steps as others (LOG.md, 33).
  [D12] C  No entropy bonus unless asked for; the official default is 0.001. And no top-p, as in the paper; the official
           GRPO scripts leave it at 0.95, so that they train on other probabilities than they sample from.
  [D17] P  Rejection sampling draws the samples of a question (the paper: five) in the step that trains on them, always
           from the frozen --model. The paper draws all of them beforehand, from the instruct model.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

import data
from data import Mistake, Parser, fixed_sample, load_checkpoint, run_main, step_of
from engine import Slots, Talk, end_ids, run
from eval import DIRECT, complete, evaluate, make_record, mean_scores, plot_runs, read_log, reading_ids, text_ids
from models import (PRESETS, Costs, give_back, make_models, memory_table, merged_state, peak_bytes, predict_memory,
    predicted_peak, role, size, trained)  # fmt: skip
from retrieval import SearchFailed, written_whole
from searchr1 import (HARMLESS, INVALID_MESSAGES, PROMPTS, Rollout, Settings, begin, collate, converse, f1_score,
    format_reward, gae, group_advantages, head_inputs, holds_gold, kl_k1, kl_k3, outcome_reward, policy_loss,
    prompt_ids, rewards_at_end, rollout, token_logprobs, token_mean, value_loss, whiten)  # fmt: skip

# ----- 1. Configuration: one field a flag -----

flag = lambda default, help: field(default=default, metadata={"help": help})
FINE_TUNING = ("sft", "rejection", "format")  # these imitate; all other algorithms learn from a reward

@dataclass
class Config:
    """Every value of a run. The defaults are the tiny world's with GRPO; PRESETS override them, flags the PRESETS."""

    preset: str = flag("", "tiny (default), real (default with --model), or a model and what it is trained on")
    algo: str = flag("grpo", "ppo, grpo, reinforce; sft and rejection imitate what is right, format a poor policy")
    seed: int = flag(0, "of everything but the world: base model, questions, sampling")
    world_seed: int = flag(0, "which tiny world")
    model: str = flag("", "folder or hub id of a causal LM; empty: the tiny base model")
    train_data: str = flag("", "question file (JSON lines: id, question, golden_answers), or sets: nq+hotpotqa")
    eval_data: str = flag("", "held out; empty: the sets' evaluation splits, or a file's last tenth (at most 100)")
    corpus: str = flag("", "passage file (JSON lines: id, contents), index DIR, contexts, wiki18, bm25:..., http://...")
    encoder: str = flag("hashed", "indexes contexts and wiki18: hashed, or an encoder (the paper: intfloat/e5-base-v2)")
    search_patience: int = flag(300, "seconds that a server may be silent before the run saves itself and ends")
    output_dir: str = flag("", "folder of the run; empty: outputs/run-<next number>")
    resume: str = flag("", "folder of a run to continue")
    device: str = flag("auto", "auto (cuda, else cpu), cpu, cuda or mps")
    dtype: str = flag("auto", "of weights and activations: bf16, fp32, or auto (bf16 with --model on cuda)")
    lora_rank: int = flag(0, "rank of the adapters on one frozen base; 0: full fine-tuning, as in the paper")
    lora_layers: int = flag(0, "only this many layers, the highest, get adapters, which is faster; 0: all")
    lora_alpha: float = flag(32.0, "an adapter's output is scaled by alpha / rank")
    gradient_checkpointing: bool = flag(False, "repeat a layer's forward pass in the backward pass; official code: yes")
    slots: int = flag(0, "rollouts in flight at once; bounds memory; 0: all of a step")
    no_cuda_graphs: bool = flag(False, "launch the kernels of a decoding step one by one, if graphs cause trouble")
    steps: int = flag(160, "RL steps; the paper: 500")
    until_learned: bool = flag(True, "end early: the cooldown begins when 95% / 85% are right at one hop / two hops")
    batch_size: int = flag(48, "questions a step, Q; the paper: 512")
    group_size: int = flag(5, "rollouts a question, G; the paper: 5 (GRPO), 1 (PPO)")
    minibatches: int = flag(4, "optimiser updates a step; official code: 2 (PPO), 10 (GRPO)")
    micro_batch_tokens: int = flag(4096, "tokens of a forward and backward pass; bounds memory, keeps the result")
    lr: float = flag(5e-4, "learning rate of the policy; the paper: 1e-6")
    critic_lr: float = flag(1e-3, "learning rate of the critic; the paper: 1e-5")
    warmup_steps: int = flag(5, "linear warm-up of the learning rate, in RL steps; the paper: 0.285 of all")
    critic_lr_warmup_steps: int = flag(5, "the same for the critic; the paper: 0.015 of all")
    critic_warmup_steps: int = flag(3, "first steps in which only the critic learns (PPO); official code: 0")
    cooldown: int = flag(15, "last steps (at most half the run) in which the learning rate falls to a tenth")
    adam_beta2: float = flag(0.95, "decay of Adam's mean square; official code: 0.999")
    weight_decay: float = flag(0.0, "pulls the weights towards 0, away from the reference; official code: 0.01")
    max_grad_norm: float = flag(1.0, "gradient clipping; the paper: 1.0")
    clip_eps: float = flag(0.2, "epsilon of the clipped ratio; the paper: 0.2")
    clip_high: float = flag(0.0, "epsilon of its upper side, if different; 0: clip_eps; DAPO: 0.28")
    value_clip: float = flag(0.5, "range of the clipped value loss; official code: 0.5")
    gamma: float = flag(1.0, "discount; the paper: 1")
    lam: float = flag(1.0, "lambda of GAE; the paper: 1")
    kl_coef: float = flag(0.001, "beta; the paper: 0.001")
    kl_in: str = flag("loss", "where the KL penalty goes: reward (k1) or loss (--kl)")
    kl: str = flag("k3", "KL in the loss: k3, as in the official code, or exact, over the whole vocabulary")
    entropy_coef: float = flag(0.0, "weight of an entropy bonus; official code: 0.001")  # [D12]
    reward: str = flag("em", "em [Eq. 4], f1, em+f1 (their mean), or format (the second paper's shaped reward)")
    prompt: str = flag("official", "official (as Table 1), or short, for models too small to use its instructions")
    temperature: float = flag(1.0, "of sampling; the paper: 1.0")
    max_turns: int = flag(3, "turns that may search, the paper's budget (4); then one more that cannot")
    max_new_tokens: int = flag(14, "tokens a turn; the paper: 500")
    max_obs_length: int = flag(64, "tokens of a block of passages; the paper: 500")
    max_length: int = flag(256, "tokens of prompt and conversation together; the paper: 4096")
    top_k: int = flag(3, "passages a search; the paper: 3")
    invalid_message: str = flag("paper", "what follows an invalid turn: paper (Algorithm 1), or official (longer)")
    no_search: bool = flag(False, "the paper's R1: no search engine")
    no_mask: bool = flag(False, "the paper's ablation: train on retrieved tokens, too")
    redraws: int = flag(0, "rounds in which groups of equal rewards make way for new questions [DAPO]")
    easy_first: bool = flag(False, "first epoch: fewest hops first; ties by how well a question works as a query")
    shuffle_rewards: bool = flag(False, "a control: rewards dealt out at random within the batch")
    recompute_old_logprobs: bool = flag(False, "old log-probs from the trainer instead of the sampler")
    eval_every: int = flag(20, "steps between evaluations on held-out questions")
    eval_limit: int = flag(400, "questions of an evaluation, a fixed sample")
    save_every: int = flag(0, "steps between checkpoints; 0: only at the end (and when interrupted)")
    keep: int = flag(2, "newest checkpoints that stay, besides the one with the best evaluation; 0: all")
    stop_on_collapse: bool = flag(False, "save and end the run at the first warning")
    wandb: str = flag("", "project of Weights & Biases that gets the lines of metrics.jsonl, too")

    @property
    def settings(self):  # how conversations go
        values = {f.name: getattr(self, f.name) for f in fields(Settings) if f.name != "do_search"}
        return Settings(do_search=not self.no_search, **values)

    @property
    def old_is_new(self):  # [D9] one update a step: its own log-probs serve where old ones would have to be recomputed
        return self.minibatches == 1 and self.kl_in == "loss" and (self.recompute_old_logprobs or self.no_mask)

    @property
    def method(self):  # the row of the paper's Table 2, as eval.py calls it
        return self.algo if self.algo in ("sft", "rejection") else "r1" if self.no_search else "search-r1"

# ----- 2. The loop -----

def train(config, policy, task):
    """The outer loop of the paper's training. Everything it writes is in config.output_dir."""
    out, device = Path(config.output_dir), policy.device
    models = make_models(policy.eval(), config)  # eval mode: dropout would make old and new log-probs differ
    slots, write = writer(models, task, config)  # keys and values of the policy; phase 2 as a function
    step = restore(models, task, slots, config)  # how far the run has come
    base, *records = read_log(out / "metrics.jsonl")
    record, told = (records or [base])[-1], set()  # metrics of the last step; warnings already printed

    bar = tqdm(initial=step, total=config.steps, desc=config.algo)
    with orderly_end(models, task, config) as stop, bar:  # stop: a list, empty until Ctrl-C
        while step < config.steps:  # which `learned` may make fewer
            step += 1
            # All randomness of a step comes from the seed and the step's number, so resuming repeats and skips nothing.
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
            rng = random.Random(f"{config.seed} step {step}")
            costs = Costs(device)

            # Phase 1. Questions; --redraws: spare ones for groups of equal rewards [D10], from steps no run reaches.
            questions, *others = [task.draw(step + k * 10**6, record) for k in range(1 + config.redraws)]

            # Phase 2. Rollouts [Alg. 1]. A group's members stand side by side: a rollout's place tells its group.
            rollouts, redrawn = write(questions, others, generator, rng)
            costs.end("rollout")

            # Phase 3. Rewards [Eq. 4].
            rewards_B, em_B = rewards(rollouts, config, rng)

            # Phase 4. The batch; where needed, old and reference log-probs [D9], values; then rewards token by token.
            batch = collate(rollouts, device, mask_retrieved=not config.no_mask)
            token_rewards_BT = token_rewards(models, batch, rewards_B, config)

            # Phase 5. Advantages: the one place where the loop differs between algorithms.
            if config.algo == "ppo":  # [Eq. 2]
                A_BT, batch.returns_BT = gae(token_rewards_BT, batch.values_BT, batch.mask_BT, config.gamma, config.lam)
                batch.advantages_BT = whiten(A_BT, batch.mask_BT)
            else:  # [Eq. 3], and the baselines: one score a rollout, the sum of its token rewards
                batch = outcome_advantages(batch, token_rewards_BT.sum(1), config)
            costs.end("logprobs")

            # Phase 6. Update [Eq. 2, Eq. 3].
            losses = update(models, batch, step, config, rng)
            costs.end("update")

            # Phase 7. Log.
            record = measure(step, rollouts, redrawn, rewards_B, em_B, losses, costs, config)
            records.append(record)
            bar.set_postfix(reward=record["reward/mean"], em=record["reward/em"],
                            searches=record["env/number_of_valid_search"], refresh=False)  # fmt: skip
            for sign in set(health(records, config)) - told:
                tqdm.write(f"step {step}: {sign}")
                told.add(sign)
            if told and config.stop_on_collapse:
                stop.append("collapse")
            if learned(records, config) and step + config.cooldown < config.steps:
                config.steps = bar.total = step + config.cooldown
                write_config(config)
                tqdm.write(f"step {step}: nearly learned; the run ends at step {config.steps}, at a falling rate")

            # Phase 8. Evaluate and save.
            try:
                if step % config.eval_every == 0 or step == config.steps:
                    record |= evaluation(step, policy, task, slots, config)
            finally:  # a step is done, even if its evaluation fails
                log(record, config)
                bar.update()
            if step == config.steps or stop or (config.save_every and step % config.save_every == 0):
                save_checkpoint(step, models, task.tokenizer, config)
            if stop and step < config.steps:
                tqdm.write(f"stopped after step {step} and saved; continue with: python train.py --resume {out}")
                sys.exit(130)

# ----- 3. Phases 2 to 5: who writes, rewards, log-probs and values, advantages without a critic -----

def writer(models, task, config):
    """-> (Slots of the policy; phase 2 as a function: Rollouts, number of redrawn groups). The policy writes; only for
    rejection and format the frozen base model does [D17], in its own slots: a captured decoding step serves one role.
    others: lists of questions for --redraws; each in turn replaces groups of equal rewards [DAPO: dynamic sampling]."""
    count = config.slots or config.batch_size * config.group_size
    new_slots = lambda: Slots(models.policy, count, config.max_length, graphs=not config.no_cuda_graphs)
    slots = new_slots()
    by_base = config.algo in ("rejection", "format")
    model, name, own_slots = (models.reference, None, new_slots()) if by_base else (models.policy, "policy", slots)

    def once(questions, generator, rng):
        if config.algo == "sft":
            return [gold_example(question, task.tokenizer) for question in questions]
        with role(model, name):
            if config.algo == "format":
                return format_examples(model, task, questions, config.settings, rng, own_slots)
            return rollout(model, task.tokenizer, questions, task.search, config.settings, config.group_size,
                           config.temperature, generator, own_slots)  # fmt: skip

    def write(questions, others, generator, rng):
        rollouts, redrawn, G = once(questions, generator, rng), 0, config.group_size
        for more in others:
            dull = equal_groups(rewards(rollouts, config, rng)[0], config)
            new = once(more[: len(dull)], generator, rng)
            for i, group in enumerate(dull):
                rollouts[group * G : (group + 1) * G] = new[i * G : (i + 1) * G]
            redrawn += len(dull)
        return rollouts, redrawn

    return slots, write

def gold_example(question, tokenizer):
    """[SFT] Question -> Rollout as if the policy had answered the prompt of direct inference with the gold answer."""
    ids, gold = reading_ids(question.text, tokenizer, DIRECT, "<answer>"), question.gold_answers[0]
    r = Rollout(question, [], [], [], len(ids), gold, True, [f"<answer> {gold} </answer>"], [], [None], 1)
    r.append(ids)
    written = text_ids(f" {gold} </answer>", tokenizer)  # the prompt has "<answer>"
    r.append(written, [0.0] * len(written))
    return r

# [ours] A model too small for the official prompt is first shown the FORMAT; only then can it learn from a reward.
SEARCHING = ("I need to search for this.", "I do not know this yet.", "Let me look it up.")
ANSWERING = ("Now I can answer.", "The passage helps.", "The question was: {question}", "I was asked: {question}")
READ = "{context}\nQuestion: {question}\n"

def format_examples(reader, task, questions, settings, rng, slots):
    """[ours] Questions -> Rollouts of a poor policy, which knows the tags and nothing else: it searches once or twice
    for the question, a part of it, or some of its words, and answers what `reader`, the untrained model, reads in the
    last passages. No gold answer is used, and nothing says which query is right."""
    tokenizer, ends = task.tokenizer, end_ids(reader, task.tokenizer)
    rollouts = [begin(q, prompt_ids(q, tokenizer, settings), settings) for q in questions]
    conversations = [(r, poor_policy(r, tokenizer, settings, ends, random.Random(rng.random()))) for r in rollouts]
    find = lambda queries: task.search(queries, settings.top_k)
    run(reader, conversations, find, settings.max_length, temperature=0.0, slots=slots)
    whole = [r for r in rollouts if r.finished and r.num_valid_actions == len(r.turns)]  # no turn was cut
    if not whole:
        raise Mistake("--algo format: no conversation reaches its answer; raise --max-length or --max-new-tokens")
    return whole

def poor_policy(r, tokenizer, settings, ends, rng):
    """Drive `converse` with turns from a script. Each conversation has an rng of its own, because the number of slots
    decides the order in which conversations begin."""
    talk, words = Talk(0, r, converse(r, tokenizer, settings, ends)), r.question.text.split()

    def say(text):
        for token in text_ids(text, tokenizer):
            if talk.query is None:  # else a closing tag in the text began a search; the rest must not answer it
                talk.advance((token, 0.0))

    for _ in range(min(settings.max_turns, rng.choice((1, 1, 2)))):
        start, end = sorted(rng.sample(range(len(words) + 1), 2))
        some = rng.sample(words, rng.randint(1, len(words)))
        query = " ".join(rng.choice((words, words[start:end], some)))
        say(f"<think> {rng.choice(SEARCHING)} </think>\n<search> {query} </search>")
        if talk.query is None:  # too long for a turn
            return
        passages = yield talk.query
        talk.advance(passages)
    prompt = reading_ids(r.question.text, tokenizer, READ, "Short answer:", passages, settings)
    reading = yield from complete(r, prompt, "\n", tokenizer, replace(settings, max_new_tokens=24), ends)
    thought = rng.choice(ANSWERING).format(question=r.question.text)
    say(f"<think> {thought} </think>\n<answer> {reading.turns[0].strip()} </answer>")

REWARDS = {
    "em": lambda r, gold_answers: outcome_reward(r.answer, gold_answers),  # [Eq. 4]
    "f1": lambda r, gold_answers: f1_score(r.answer or "", gold_answers),  # partial credit, also in a long answer
    "em+f1": lambda r, gold_answers: (REWARDS["em"](r, gold_answers) + REWARDS["f1"](r, gold_answers)) / 2,
    "format": format_reward,  # the second paper's
}

def rewards(rollouts, config, rng):
    """Phase 3 [Eq. 4]: (rewards [B], exact match [B]), both fp32 on the CPU."""
    em_B = torch.tensor([outcome_reward(r.answer, r.question.gold_answers) for r in rollouts])
    rewards_B = torch.tensor([REWARDS[config.reward](r, r.question.gold_answers) for r in rollouts])
    if config.shuffle_rewards:
        rewards_B = rewards_B[torch.tensor(rng.sample(range(len(rewards_B)), len(rewards_B)))]
    return rewards_B, em_B

def equal_groups(rewards_B, config):
    """Rewards [B] -> numbers of the groups in which all are equal."""
    return (rewards_B.view(-1, config.group_size).diff() == 0).all(1).nonzero()[:, 0].tolist()

def micro_batches(batch, index, budget):
    """Row numbers `index` -> pieces of at most `budget` padded tokens (at least one row), like lengths together."""
    lengths, pieces = batch.lengths_B.tolist(), []
    for i in sorted(index, key=lambda i: -lengths[i]):
        if not pieces or (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] > budget:  # its first row is its longest
            pieces.append([])
        pieces[-1].append(i)
    return pieces

@torch.no_grad()
def in_micro_batches(values_of, batch, config):
    """Run values_of(Batch) -> [b, t] over micro-batches of all rows -> [B, T], 0 where nothing was computed."""
    out_BT = torch.zeros_like(batch.old_logprobs_BT)
    for piece in micro_batches(batch, range(len(batch.ids_BL)), config.micro_batch_tokens):
        part = batch.rows(piece)
        out_BT[piece, : part.mask_BT.shape[1]] = values_of(part)
    return out_BT

def logprobs_under(model, batch, config):
    """log-probs [B, T] of the batch's own tokens under `model`, without gradient."""
    logp_of = lambda part: token_logprobs(model, part.ids_BL, part.mask_BT, config.temperature).logp
    return in_micro_batches(logp_of, batch, config)

def token_rewards(models, batch, rewards_B, config):
    """Phase 4: put old and reference log-probs and values into the batch -> token rewards [B, T]."""
    if (config.no_mask or config.recompute_old_logprobs) and not config.old_is_new:  # [D9]; no_mask: passages need them
        batch.old_logprobs_BT = logprobs_under(models.policy, batch, config)
    token_rewards_BT = rewards_at_end(rewards_B.to(batch.ids_BL.device), batch.mask_BT)
    if config.kl_in == "reward" and config.kl_coef:
        # [Eq. 1]  r - beta log(pi / pi_ref): k1, token by token, under the old policy
        with role(models.reference, None):
            batch.ref_logprobs_BT = logprobs_under(models.reference, batch, config)
        token_rewards_BT -= config.kl_coef * kl_k1(batch.old_logprobs_BT, batch.ref_logprobs_BT)  # 0 where masked
    if models.critic:
        with role(models.critic, "critic"):
            batch.values_BT = in_micro_batches(lambda part: models.critic(part.ids_BL), batch, config)
    return token_rewards_BT

def outcome_advantages(batch, scores_B, config):
    """One score a rollout, for all of its tokens -> the Batch to train on, without rows of advantage 0 [D10]."""
    if config.algo == "format":  # all is imitated, right or wrong
        advantages_B = torch.ones_like(scores_B)
    elif config.algo in FINE_TUNING:  # what earned a reward is imitated, the rest is thrown away
        advantages_B = scores_B
    elif config.algo == "grpo":  # [Eq. 3] the group's mean is the baseline, its spread the unit
        advantages_B = group_advantages(scores_B.cpu(), config.group_size).to(scores_B.device)  # Apple: no float64
    else:  # REINFORCE [Williams 1992]: the batch's mean is the baseline
        advantages_B = scores_B - scores_B.mean()
    batch.advantages_BT = advantages_B[:, None] * batch.mask_BT
    kept = advantages_B.nonzero()[:, 0]
    return batch.rows(kept) if len(kept) else batch

# ----- 4. Phase 6: the update -----

def update(models, batch, step, config, rng):
    """Phase 6: one pass over the batch in config.minibatches optimiser steps -> metrics averaged over them.
    Micro-batches only bound memory. Each one's token mean is weighted by its share of the minibatch's tokens, so that
    the accumulated gradient is the gradient of the whole minibatch's token mean."""
    only_advantages = config.algo in FINE_TUNING or not (models.critic or config.kl_coef or config.entropy_coef)
    if only_advantages and not batch.advantages_BT.any():
        return {}  # no right answer to imitate; or all advantages are 0, and neither KL nor bonus acts
    policy_loss_of = fine_tuning_loss if config.algo in FINE_TUNING else reinforcement_loss
    train_policy = not models.critic or step > config.critic_warmup_steps  # a critic that knows nothing would add noise
    learners = models.learners if train_policy else models.learners[1:]
    warmups = {"policy": (config.lr, config.warmup_steps), "critic": (config.critic_lr, config.critic_lr_warmup_steps)}
    rows = list(range(len(batch.ids_BL)))
    rng.shuffle(rows)
    count, sums = min(config.minibatches, len(rows)), Counter()
    for m in range(count):
        index = rows[m::count]
        tokens = batch.mask_BT[index].sum()  # the denominator, known before micro-batching
        for piece in micro_batches(batch, index, config.micro_batch_tokens):
            part = batch.rows(piece)
            share = part.mask_BT.sum() / tokens
            if train_policy:
                loss, metrics = policy_loss_of(models, part, config)
                (loss * share).backward()
                for name, value in metrics.items():
                    sums[name] += (value * share).item() / count
            if models.critic:
                with role(models.critic, "critic"):  # backward() in here, too: it may repeat the forward pass
                    values_BT = models.critic(part.ids_BL)
                    loss = value_loss(values_BT, part.values_BT, part.returns_BT, part.mask_BT, config.value_clip)
                    (loss * share).backward()
                sums["value_loss"] += (loss * share).item() / count
        models.updates += 1
        for name, _, optimizer in learners:
            group, (lr, warmup_steps) = optimizer.param_groups[0], warmups[name]
            norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm).item()  # of the fp32 masters
            if math.isfinite(norm):
                models.broken[name] = 0
                sums["grad_norm" if name == "policy" else "critic_grad_norm"] += norm / count
                group["lr"] = lr * learning_rate_factor(step, warmup_steps, config)
                optimizer.step()
            else:  # such a step would make every weight NaN, for good
                models.broken[name] += 1
                sums["skipped_updates"] += 1
                tqdm.write(f"step {step}: the gradient of the {name} is not finite; this update is skipped")
                if models.broken[name] == 3:
                    raise Mistake(f"three gradients of the {name} in a row are not finite: lower --lr, or --dtype fp32")
            optimizer.zero_grad(set_to_none=True)
    models.updates = 0  # the step is whole: if the run is saved from here on, no update is half done
    if models.policy.device.type == "cpu":  # freed memory goes back to the system; a GPU has an allocator of its own
        give_back()
    return {name: value for name, value in sums.items() if math.isfinite(value)}  # JSON has no NaN

def reinforcement_loss(models, part, config):
    """[Eq. 2, Eq. 3] Clipped surrogate, KL penalty if it stands in the loss, entropy bonus -> (loss, metrics)."""
    new, kl_metrics = new_logprobs(models, part, config)
    old_logprobs_BT = new.logp.detach() if config.old_is_new else part.old_logprobs_BT  # [D9] rho is 1
    clip = config.clip_eps, config.clip_high
    surrogate, clipped = policy_loss(new.logp, old_logprobs_BT, part.advantages_BT, part.mask_BT, *clip)
    entropy = token_mean(new.entropy, part.mask_BT)
    loss = surrogate - config.entropy_coef * entropy
    if config.kl_in == "loss" and config.kl_coef:
        # + beta KL(pi || pi_ref): PLUS in a loss. With a minus the policy is paid to run away.
        loss = loss + config.kl_coef * kl_metrics["kl_exact" if config.kl == "exact" else "kl"]
    return loss, kl_metrics | {"entropy": entropy, "clip_ratio": clipped, "policy_loss": surrogate}

def fine_tuning_loss(models, part, config):
    """[Sec. 4] The baselines' loss: - log pi(y_t | x, y_<t), token mean, over the rows that outcome_advantages kept."""
    new = token_logprobs(models.policy, part.ids_BL, part.mask_BT, config.temperature)
    loss = -token_mean(new.logp, part.mask_BT)
    return loss, {"entropy": token_mean(new.entropy, part.mask_BT), "policy_loss": loss}

def new_logprobs(models, part, config):
    """Log-probs and entropy under the policy as it is now, and its KL to the reference -> (LogprobKL, {name: number}).
    With the KL in the reward, part has the reference's log-probs. Otherwise one pass of the kernel over the vocabulary
    serves policy and reference, and also gives the exact KL of each position; k3 knows the sampled token only."""
    reference = ()
    if config.kl_in == "loss" and config.kl_coef:
        with torch.no_grad(), role(models.reference, None):
            reference = head_inputs(models.reference, part.ids_BL)[:2]
    new = token_logprobs(models.policy, part.ids_BL, part.mask_BT, config.temperature, *reference)
    if not config.kl_coef:  # the reference's forward pass would only serve the log
        return new, {}
    kl = token_mean(kl_k3(new.logp, new.ref_logp if reference else part.ref_logprobs_BT), part.mask_BT)
    return new, {"kl": kl} | ({"kl_exact": token_mean(new.kl, part.mask_BT)} if reference else {})

def learning_rate_factor(step, warmup_steps, config):
    """Linear warm-up [D11], then constant; in the cooldown linear to a tenth at the last step."""
    cooldown = min(config.cooldown, config.steps // 2)
    left = (config.steps - step) / cooldown if cooldown else 1.0  # share of the cooldown that is still to come
    return min(1.0, step / max(1, warmup_steps), 0.1 + 0.9 * left)

# ----- 5. Phases 7 and 8: logging, evaluating, saving, ending -----

def measure(step, rollouts, redrawn, rewards_B, em_B, losses, costs, config):
    """The metrics of a step. Counts are means over all B rollouts; kl, entropy, clip_ratio over trained tokens."""
    mean = lambda values: sum(values) / len(rollouts)
    equal = len(equal_groups(rewards_B, config))
    empty = sum(passages == [] for r in rollouts for passages in r.found)
    own, response = [sum(r.response_mask) for r in rollouts], [len(r.ids) - r.prompt_length for r in rollouts]
    return {
        "step": step, "reward/mean": rewards_B.mean().item(), "reward/std": rewards_B.std(correction=0).item(),
        "reward/em": em_B.mean().item(), "frac_reward_zero_std": equal * config.group_size / len(rollouts),
        **({"redrawn_groups": redrawn} if config.redraws else {}), **losses,
        "response_length/mean": mean(response), "env/number_of_actions": mean([len(r.turns) for r in rollouts]),
        "response_length/at_limit": mean([len(r.ids) >= config.max_length - 1 for r in rollouts]),
        "env/repeated_search": mean([len(set(r.searches)) < len(r.searches) for r in rollouts]),
        "env/empty_search": empty / max(1, sum(r.num_searches for r in rollouts)),
        "env/ratio_of_valid_action": mean([r.num_valid_actions / len(r.turns) for r in rollouts]),
        "env/number_of_valid_search": mean([r.num_searches for r in rollouts]), **by_hops(rollouts, em_B.tolist()),
        "env/finish_ratio": mean([r.finished for r in rollouts]), "state_tokens/coverage": sum(own) / sum(response),
        "tokens_per_s": sum(len(r.ids) for r in rollouts) / costs.seconds, **costs.metrics,
        "lr": config.lr * learning_rate_factor(step, config.warmup_steps, config),
    }  # fmt: skip

def learned(records, config):
    """Metrics of the steps so far -> whether the last five answered 95% of the one-hop and 85% of the two-hop questions
    right, so that the cooldown may begin: the errors that remain are mostly noise of the large learning rate."""
    mean = lambda name: sum(r.get(name, 0.0) for r in records[-5:]) / 5
    return config.until_learned and config.cooldown and mean("env/em_1hop") >= 0.95 and mean("env/em_2hop") >= 0.85

def health(records, config):
    """Metrics of the steps so far -> what looks wrong in the last five compared with the first five, and what helps."""
    if len(records) < 10:
        return []
    mean = lambda part, name: sum(r.get(name, 0.0) for r in part) / max(1, sum(name in r for r in part))
    now, then = (functools.partial(mean, part) for part in (records[-5:], records[:5]))
    grew = lambda name, least, times: now(name) > max(least, times * then(name))
    dull = config.group_size > 1 and now("frac_reward_zero_std") > 0.9 and now("reward/mean") < 0.5
    lost = [name for name in ("env/ratio_of_valid_action", "env/finish_ratio") if now(name) < 0.8 * then(name)]
    centred = config.algo not in FINE_TUNING and (config.algo != "grpo" or config.group_size > 1)
    sure = 0 < now("entropy") < 0.15 * then("entropy") and now("reward/mean") < 0.7
    signs = {
        "it writes more and more at random (entropy): lower --lr, raise --kl-coef": grew("entropy", 1.0, 2),
        "it is sure of itself too early (entropy): lower --lr, larger batches, --entropy-coef 0.001": sure,
        "advantages are not centred (policy_loss): check their baseline": centred and abs(now("policy_loss")) > 0.5,
        "most searches find nothing (empty_search): check the search engine": now("env/empty_search") > 0.5,
        "it is far from where it began (kl): lower --lr, raise --kl-coef": grew("kl", 1.0, 2),
        "gradients grow (grad_norm): larger batches, or a lower --lr": grew("grad_norm", 2 * config.max_grad_norm, 3),
        "turns or conversations fall apart (" + ", ".join(lost) + "): lower --lr, or --reward format": lost,
        "hardly a group teaches anything: --redraws 2, --reward em+f1, easier questions": dull,
        "conversations end for want of room: raise --max-length": grew("response_length/at_limit", 0.2, 2),
        "it searches for the same again and again: lower --lr": grew("env/repeated_search", 0.3, 2),
    }
    return [sign for sign, seen in signs.items() if seen]

def by_hops(rollouts, em):
    """Rollouts and the exact match of each -> means of exact match and searches by known hops, named as in the log."""
    scores = [{"em": right, "searches": r.num_searches} for r, right in zip(rollouts, em)]
    means = mean_scores(scores, [r.question.hops for r in rollouts])
    return {f"env/{name}": mean for name, mean in means.items() if name.endswith("hop")}

def evaluation(step, policy, task, slots, config):
    """Greedy on the held-out sample -> metrics, printed in a line; one conversation is kept in samples.jsonl. In the
    tiny world the first and the last evaluation also sample, on held-out and on training questions."""
    began, how = time.perf_counter(), (task.search, config.settings, config.method)
    greedy, rollouts = evaluate(policy, task.tokenizer, task.held_out, *how, slots=slots)
    metrics = {f"eval/{name}": value for name, value in greedy.items()}
    if step in (0, config.steps) and not config.model:
        generator = torch.Generator(policy.device).manual_seed(step)
        for name, questions in (("eval", task.held_out), ("train", task.train_sample)):
            sampled, _ = evaluate(policy, task.tokenizer, questions, *how, config.temperature, generator, slots)
            metrics |= {f"{name}/sampled_{key}": sampled[key] for key in sampled if key.startswith("em")}
    sample = make_record(rollouts[-1], task.tokenizer, config.method, "held out", len(rollouts) - 1)
    append(Path(config.output_dir) / "samples.jsonl", {"step": step} | sample)
    earlier = [r for r in read_log(Path(config.output_dir) / "metrics.jsonl") if "eval/em" in r] if step else [metrics]
    tqdm.write(f"step {step}: {in_words(metrics, earlier[-1])}")
    return metrics | {"timing_s/eval": time.perf_counter() - began}

def in_words(now, before):
    """Metrics of an evaluation, and of the one before -> what they say, and what is new about the searches."""
    kinds = {"_1hop": "one-hop ", "_2hop": "two-hop "} if "eval/em_2hop" in now else {"": ""}
    said = [f"{now['eval/em' + k]:.0%} of {name}questions right, {now['eval/searches' + k]:.1f} searches"
            for k, name in kinds.items()]  # fmt: skip
    for k, name in kinds.items():
        searches, once = (round(metrics["eval/searches" + k]) for metrics in (now, before))
        if searches != once:
            said.append(f"{name}questions now take {searches} search{'es' * (searches != 1)} instead of {once}")
    return "; ".join(said)

def write_config(config):
    with written_whole(Path(config.output_dir) / "config.json") as file:
        file.write(json.dumps(asdict(config), indent=2) + "\n")

def log(record, config):
    """A line of metrics.jsonl, and with --wandb the same numbers to a tracker."""
    if config.wandb:  # first, so that a missing package is reported before the log has a line
        tracker(config.wandb, config.output_dir).log(record, step=record["step"])
    append(Path(config.output_dir) / "metrics.jsonl", record)

@functools.cache
def tracker(project, output_dir):
    """A run of Weights & Biases, begun at the first line. A resumed run goes on under its name."""
    try:
        import wandb
    except ImportError:
        raise Mistake("--wandb needs its package: pip install wandb, or leave the flag out") from None
    name = Path(output_dir).name
    return wandb.init(project=project, name=name, id=name, dir=output_dir, resume="allow")

def append(path, record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")

def save_checkpoint(step, models, tokenizer, config):
    """OUTPUT_DIR/checkpoint-<step>, whole or not at all: an ordinary Hugging Face folder with merged adapters, how its
    conversations run (search_r1.json), what resuming needs (trainer_state.pt). Mistake if the disk is full."""
    out = Path(config.output_dir)
    unfinished = out / f"unfinished-{step}"
    about = {"world_seed": config.world_seed, "corpus": config.corpus or None, "encoder": config.encoder}
    about |= {"method": config.method, "base": config.model or models.policy.name_or_path}
    state = {"step": step}
    for name, network, optimizer in models.learners:  # the model's own file has merged or rounded weights
        state[f"{name}_optimizer"] = optimizer.state_dict()
        state[name] = {key: p.detach() for key, p in zip(trained(network, name), optimizer.param_groups[0]["params"])}
    try:
        models.policy.save_pretrained(unfinished, state_dict=merged_state(models.policy))
        tokenizer.save_pretrained(unfinished)
        (unfinished / "search_r1.json").write_text(json.dumps(asdict(config.settings) | about, indent=2) + "\n")
        torch.save(state, unfinished / "trainer_state.pt")
        for path in filter(Path.is_file, unfinished.rglob("*")):  # PITFALL: else a power cut may leave empty files
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as Python, torch and safetensors report it
        shutil.rmtree(unfinished, ignore_errors=True)
        why = f"{str(error).strip().splitlines()[0]}; older checkpoints are whole"
        raise Mistake(f"checkpoint-{step} cannot be written to {out}: {why}; make room, then --resume {out}") from None
    unfinished.rename(out / f"checkpoint-{step}")
    tidy(out, config.keep)

def tidy(out, keep):
    """Remove what a run's folder no longer needs: all trainer states but the newest, what a kill left unfinished and,
    unless `keep` is 0, all checkpoints except the newest `keep` and the one with the best evaluation."""
    checkpoints = data.checkpoints(out)
    for older in checkpoints[:-1]:  # a trainer state is several times the model
        (older / "trainer_state.pt").unlink(missing_ok=True)
    em = {record["step"]: record.get("eval/em", -1.0) for record in read_log(out / "metrics.jsonl")}
    best = max(checkpoints, key=lambda checkpoint: (em.get(step_of(checkpoint), -1.0), step_of(checkpoint)))
    for older in set(checkpoints[:-keep] if keep else ()) - {best}:
        older.rename(out / older.name.replace("checkpoint", "unfinished"))  # no checkpoint-N is half deleted
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished, ignore_errors=True)

def restore(models, task, slots, config):
    """Load the newest checkpoint of a run -> its step. Cut the logs back to it: what came after is done again. A run
    without one begins, with an evaluation of the untrained policy. Only tensors and plain values are unpickled."""
    out = Path(config.output_dir)
    checkpoints, logs = data.checkpoints(out, "trainer_state.pt"), (out / "metrics.jsonl", out / "samples.jsonl")
    if not checkpoints:
        for file in logs:  # of a run that was killed before its first checkpoint
            file.unlink(missing_ok=True)
        write_config(config)
        log({"step": 0} | evaluation(0, models.policy, task, slots, config), config)
        return 0
    saved = checkpoints[-1] / "trainer_state.pt"
    try:
        state = torch.load(saved, map_location="cpu", weights_only=True)  # a second copy might not fit on the card
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise Mistake(f"{saved} cannot be read: {error!r:.99}; a new run: --model {saved.parent}") from None
    for name, network, optimizer in models.learners:
        adam = state[f"{name}_optimizer"]
        adam["param_groups"][0]["fused"] = optimizer.defaults["fused"]  # as this device wants it, not the saved run's
        optimizer.load_state_dict(adam)
        for (key, p), master in zip(trained(network, name).items(), optimizer.param_groups[0]["params"]):
            master.detach().copy_(state[name][key])
            p.detach().copy_(master)
    if state["step"] >= config.steps:
        raise Mistake(f"{out} has all its {config.steps} steps; --steps N with a larger N goes on")
    for file in logs:
        kept = [record for record in read_log(file) if record["step"] <= state["step"]]
        with written_whole(file) as lines:
            lines.write("".join(json.dumps(record) + "\n" for record in kept))
    write_config(config)  # with what --resume has changed
    return state["step"]

def alone_in(folder):
    """Keep other processes out of a run's folder: two would write into one log. The lock ends with the process."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(Path(folder) / ".lock").acquire(timeout=0)
    except Timeout:
        raise Mistake(f"another process trains in {folder}: wait for it, or take another --output-dir") from None

@contextlib.contextmanager
def shortage_named(config):
    """Turn a shortage of memory in here, and no other error, into one line that names the flags against it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
            raise
        slots = config.slots or f"all {config.batch_size * config.group_size}"
        learning = f"--micro-batch-tokens (now {config.micro_batch_tokens}) or add --gradient-checkpointing"
        remedy = f"in rollouts or an evaluation lower --slots (now {slots}), in updates {learning}"
        raise Mistake(f"out of memory; {remedy}, in loading take --lora-rank 16 or a smaller --preset") from None

@contextlib.contextmanager
def orderly_end(models, task, config):
    """Yield a list that is empty until the first Ctrl-C (or SIGTERM), after which the step in progress is finished and
    saved. The second one ends the run at once. If the search engine goes away, memory runs out or another Mistake is
    raised in here, save what the steps in the log have learned (only whole steps are logged); say how to go on."""
    stop, out = [], Path(config.output_dir)

    def ask(number, frame):
        os.write(2, b"\nfinishing and saving this step first; a second Ctrl-C ends at once\n")  # print may be at work
        stop.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with shortage_named(config):
            yield stop
    except (SearchFailed, Mistake) as error:
        step = [record["step"] for record in read_log(out / "metrics.jsonl")][-1]
        kept = f"saved after step {step}"
        if not (out / f"checkpoint-{step}").exists():
            save_checkpoint(step, models, task.tokenizer, config)
            if models.updates:  # undoing them would need a copy of all that is trained, at every step
                kept += f" with {models.updates} of the {config.minibatches} updates of step {step + 1} (done anew)"
        go_on = "continue with: python train.py --resume" if step < config.steps else "see: python eval.py --checkpoint"
        raise type(error)(f"{error}; {kept}, {go_on} {out}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# ----- 6. What a policy is trained on -----

# search: (queries, top_k) -> lists of Passages; draw: (step, metrics of the step before) -> list of Q Questions;
# held_out: questions of every evaluation; train_sample: training questions, to compare; bytes_on_card: search engine's.
Task = namedtuple("Task", "tokenizer search draw train_sample held_out bytes_on_card", defaults=[0])

def load_run(config, format_steps=data.BaseConfig.policy_steps):
    """Config -> (policy, Task). Without --model: the tiny world, its base model after format_steps steps of format."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not config.model:
        return load_tiny(config, device, format_steps)
    policy, tokenizer = load_checkpoint(config.model, device, data.weights_dtype(config.dtype, device))
    eval_data = config.eval_data or ("" if Path(config.train_data).is_file() else config.train_data)
    others = data.question_files(eval_data, "eval") if eval_data else []
    questions, engine, _ = data.task(0, config.corpus, config.train_data, "train", config.encoder, others, device)
    engine.patience = config.search_patience  # of a server
    held_out = data.load_data(eval_data, "eval") if eval_data else []
    if not held_out:  # a file: its last tenth
        count = min(100, max(1, len(questions) // 10))
        questions, held_out = questions[:-count], questions[-count:]
    if len(questions) < config.batch_size:
        raise Mistake(f"{config.train_data} leaves {len(questions)} questions, and --batch-size is {config.batch_size}")

    longest = max(questions + held_out, key=lambda q: len(q.text))  # tried now; else it stops the run and each --resume
    begin(longest, prompt_ids(longest, tokenizer, config.settings), config.settings)
    ranked = random.Random(config.seed).sample(questions, min(len(questions), 10_000)) if config.easy_first else []
    rank = first_ranks(ranked, engine.search)  # BM25 takes .03 s a question; those that are not ranked count as hard

    @functools.lru_cache(maxsize=2 * (1 + config.redraws))
    def order(epoch):  # sorting and shuffling once an epoch, not at every step
        shuffled = random.Random(f"{config.seed} epoch {epoch}").sample(questions, len(questions))
        return sorted(shuffled, key=lambda q: (q.hops, rank.get(q, 9))) if rank and epoch == 0 else shuffled

    def draw(step, _):  # a function of the step alone, so that a resumed run goes on as planned
        epoch, first = divmod((step - 1) * config.batch_size, len(questions))
        return (order(epoch) + order(epoch + 1))[first : first + config.batch_size]

    samples = fixed_sample(questions, config.eval_limit), fixed_sample(held_out, config.eval_limit)
    return policy, Task(tokenizer, engine.search, draw, *samples, engine.bytes_on_card)

def first_ranks(questions, search, most=3):
    """Questions -> {Question: place, from 0, of the first passage with a gold answer, if it is the query, or most}."""
    bar = tqdm(range(0, len(questions), 512), desc="easy first", delay=2)
    found = [passages for at in bar for passages in search([q.text for q in questions[at : at + 512]], most)]
    place = lambda q, passages: next((i for i, p in enumerate(passages) if holds_gold([[p]], q.gold_answers)), most)
    return {q: place(q, passages) for q, passages in zip(questions, found)}

def load_tiny(config, device, format_steps):
    """The tiny world and its base model, made on the spot at the first run -> (policy, Task)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its texts are short: a thread costs more than it saves
    held_out, engine, world = data.task(config.world_seed)
    base = data.BaseConfig(seed=config.seed, top_k=config.top_k, policy_steps=format_steps)
    policy, tokenizer, folder = data.base_model(base, "outputs")
    policy = policy.to(device)
    if config.dtype == "bf16":  # PITFALL: policy.to(bfloat16) would round the frequencies of the positions, too
        for p in policy.parameters():
            p.data = p.data.bfloat16()
    print(f"tiny world {config.world_seed}; base model of {policy.num_parameters():,} parameters, in {folder}")

    def draw(step, record):  # of what is in the log, so that a resumed run goes on as planned
        rng = random.Random(f"{config.seed} questions {step}")
        return data.draw_questions(world.train, config.batch_size, data.two_hop_share(record), rng)

    samples = fixed_sample(world.train, config.eval_limit), fixed_sample(held_out, config.eval_limit)
    return policy, Task(tokenizer, engine.search, draw, *samples)

# ----- 7. The command line, and what came out -----

CHOICES = {
    "preset": tuple(dict.fromkeys(name.split("/")[0] for name in PRESETS)), "dtype": data.DTYPES,
    "algo": ("ppo", "grpo", "reinforce", *FINE_TUNING), "kl_in": ("reward", "loss"), "kl": ("k3", "exact"),
    "reward": tuple(REWARDS), "prompt": tuple(PROMPTS), "invalid_message": tuple(INVALID_MESSAGES),
    "device": ("auto", "cpu", "cuda", "mps"),
}  # fmt: skip
POSITIVE = ("steps batch_size group_size minibatches micro_batch_tokens lr critic_lr lora_alpha max_grad_norm "
            "temperature max_new_tokens max_obs_length max_length top_k eval_every clip_eps "
            "value_clip").split()  # fmt: skip
NOT_NEGATIVE = ("search_patience max_turns redraws clip_high kl_coef warmup_steps critic_lr_warmup_steps lora_rank "
                "lora_layers slots weight_decay keep save_every cooldown eval_limit").split()  # fmt: skip
# What a resumed run may change: how long it is, what it keeps, and what bounds its memory without changing its result.
RESUME_MAY_CHANGE = set("steps until_learned save_every keep slots micro_batch_tokens gradient_checkpointing "
                        "no_cuda_graphs wandb search_patience stop_on_collapse".split())  # fmt: skip

def parse_flags(argv):
    """Command line -> {name: value} of the flags that were given."""
    parser = Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    for f in fields(Config):
        how = {"default": None, "help": f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")}
        if isinstance(f.default, bool):
            how |= {"action": "store_true" if f.name.startswith("no_") else argparse.BooleanOptionalAction}
        else:
            how |= {"type": type(f.default), "choices": CHOICES.get(f.name)}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

def parse_config(given):
    """{name: value} of flags, or a command line -> Config. Mistake for unknown flags and values that cannot work."""
    given = given if isinstance(given, dict) else parse_flags(given)
    if "resume" in given:
        return resumed_config(given)
    if given.get("model"):
        given = given | {"model": data.newest(given["model"])}
    preset = given.get("preset") or ("real" if given.get("model") else "tiny")
    name = f"{preset}/{given.get('algo', 'grpo')}"
    if name not in PRESETS:
        raise Mistake("--algo format is the cold start of --preset laptop, which takes any --model")
    config = check_config(Config(**(PRESETS[name] | given | {"preset": preset})))
    if not config.output_dir:
        taken = [int(d.name[4:]) for d in Path("outputs").glob("run-*") if d.name[4:].isdigit()]
        config.output_dir = f"outputs/run-{max(taken, default=0) + 1}"
    if (Path(config.output_dir) / "metrics.jsonl").exists():
        raise Mistake(f"--output-dir {config.output_dir} holds a run already: --resume it, or take another folder")
    return config

def check_config(c):
    """Config -> the same one, or Mistake, with the flag and the remedy, for values that cannot work."""
    given = lambda name: f"--{name.replace('_', '-')} {getattr(c, name)}"
    wrong = {f"{given(name)}: must be above 0": not getattr(c, name) > 0 for name in POSITIVE}
    wrong |= {f"{given(name)}: cannot be negative": not getattr(c, name) >= 0 for name in NOT_NEGATIVE}
    wrong |= {
        f"{given('seed')}: must lie within 10**12 of 0": abs(c.seed) > 10**12,
        f"{given('adam_beta2')}: must be at least 0 and below 1": not 0 <= c.adam_beta2 < 1,
        f"{given('gamma')}, {given('lam')}: each must be from 0 to 1": not (0 <= c.gamma <= 1 and 0 <= c.lam <= 1),
        "--preset real needs --model, --train-data and --corpus": c.preset == "real" and not c.model,
        "--model, --train-data and --corpus go together": not bool(c.model) == bool(c.train_data) == bool(c.corpus),
        "--eval-data needs --train-data: the tiny world has held-out questions": c.eval_data and not c.train_data,
        f"{given('device')}: torch finds none here": c.device != "auto" and not getattr(torch, c.device).is_available(),
        f"{given('group_size')}: {c.algo} has one example a question": c.algo in ("sft", "format") and c.group_size > 1,
        f"{given('redraws')}: a group of one has no spread": c.redraws and c.group_size == 1,
        f"{given('redraws')}: shuffled rewards say nothing about a group": c.redraws and c.shuffle_rewards,
        "--algo format shows how to search: leave out --no-search and --max-turns 0":
            c.algo == "format" and (c.no_search or not c.max_turns),
        f"{given('lora_layers')}: without --lora-rank there are no adapters": c.lora_layers and not c.lora_rank,
        "--easy-first needs --model: the tiny world has a schedule of its own": c.easy_first and not c.model,
        f"{given('slots')}: a group of {c.group_size} rollouts is in flight together": 0 < c.slots < c.group_size,
        "--kl exact is a loss: give --kl-in loss, too": c.kl == "exact" and c.kl_in != "loss",
        f"--kl exact: --algo {c.algo} has no KL in its loss": c.kl == "exact" and c.algo in FINE_TUNING,
        f"{given('kl_coef')}: --algo {c.algo} takes no KL": c.kl_coef and c.algo in FINE_TUNING,
    }  # fmt: skip
    if mistakes := [message for message, found in wrong.items() if found]:
        raise Mistake(mistakes[0])
    return c

def resumed_config(given):
    """--resume DIR -> the run's saved Config, with what RESUME_MAY_CHANGE from the command line."""
    folder = given["resume"]
    if (Path(folder) / "search_r1.json").exists():
        raise Mistake(f"--resume {folder}: that is a checkpoint; give its run, {Path(folder).absolute().parent}")
    try:  # a flag may be younger than the run
        saved = {"until_learned": False} | json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError, TypeError) as error:
        raise Mistake(f"--resume: {folder} is no folder of a run: {error}") from None
    if data.checkpoints(folder) and not data.checkpoints(folder, "trainer_state.pt"):
        raise Mistake(f"--resume: no checkpoint in {folder} has the trainer_state.pt that it takes to continue")
    if unknown := set(saved) - {f.name for f in fields(Config)}:
        raise Mistake(f"{folder} was made by another version, with flags that are gone: {', '.join(sorted(unknown))}")
    saved = asdict(Config()) | saved | {"resume": folder, "output_dir": folder}
    for name in set(given) - RESUME_MAY_CHANGE:
        if given[name] != saved[name]:
            raise Mistake(f"--resume goes on with --{name.replace('_', '-')} {saved[name]}, not with {given[name]}")
    return check_config(Config(**(saved | given)))

def main(argv=None):
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which the newer one would override
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # blocks of many sizes: fewer gaps
    config = parse_config(argv)
    changed = {k: v for k, v in asdict(config).items() if v != getattr(Config, k) and k != "output_dir"}
    print(f"{config.output_dir}: " + ", ".join(f"{k} {v}" for k, v in changed.items()))  # all values: config.json
    with alone_in(config.output_dir), shortage_named(config):
        policy, task = load_run(config)
        memory = predict_memory(policy, config, task.bytes_on_card)
        print(memory_table(memory) if config.model else f"memory, predicted: {size(predicted_peak(memory)[0])}")
        train(config, policy, task)
    out = Path(config.output_dir)
    records = list(read_log(out / "metrics.jsonl"))
    # On a GPU: what all programs together hold on the card (log by phase: tensors only). On a CPU: the whole process.
    held = max(r.get("memory_gib/card", 0) for r in records) * 2**30 or peak_bytes()
    print(f"memory, predicted: {size(predicted_peak(memory)[0])}; measured, all included: {size(held)}; all in {out}")
    phases = ("rollout", "logprobs", "update", "eval")
    print("seconds: " + ", ".join(f"{p} {sum(r.get(f'timing_s/{p}', 0) for r in records):.0f}" for p in phases))
    plot_runs({out.name: records}, out / "curves.png")
    samples = list(read_log(out / "samples.jsonl"))
    for title, sample in (("before training", samples[0]), (f"after {config.steps} steps", samples[-1])):
        gold = " or ".join(sample["golden_answers"])
        lines = re.sub(r"\s*(<(think|search|information|answer)>)", r"\n  \1", sample["transcript"])
        about = f"greedy, a held-out question; gold answer: {gold}; exact match: {sample['em']:.0f}"
        print(f"\n--- {title} ({about})\n{sample['question']} {lines}".translate(HARMLESS))
    asked = shlex.quote(samples[-1]["question"].translate(HARMLESS))
    files = f" --data {config.eval_data or config.train_data}" if config.corpus.endswith("contexts") else ""
    print(f"\nNext: python eval.py --checkpoint {out} --ask {asked}{files}")
    plain = config.preset == "tiny" and config.method == "search-r1" and "eval/em_2hop" in records[-1]
    plain = plain and not (config.no_mask or config.shuffle_rewards)
    if plain and (config.steps >= Config.steps or any(learned(records[:i], config) for i in range(len(records)))):
        searches, right = ([records[-1][f"eval/{of}_{hops}hop"] for hops in (1, 2)] for of in ("searches", "em"))
        print(f"It now searches {searches[0]:.2f} / {searches[1]:.2f} times for one-hop / two-hop questions", end="")
        fine = right[0] >= 0.95 and right[1] >= 0.90  # how many runs end above these: README.md, "What comes out"
        verdict = "as expected." if fine else "BELOW the expected 95% / 90%: try another --seed (why: LOG.md, 28)."
        print(f" and is right in {right[0]:.0%} / {right[1]:.0%}, {verdict}")

if __name__ == "__main__":
    run_main(main)
