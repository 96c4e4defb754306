"""Claims about the loop, on models too small to learn anything: what is checked is that the arithmetic is right, and
that a run survives what happens to it."""

import ast
import copy
import functools
import itertools
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
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import data
import engine
import searchr1
import train
from conftest import LOUD, PASSAGES, a_batch, metrics, played, random_model, shaped
from data import Mistake, run_main
from eval import main as eval_main
from eval import plot_runs, read_log
from models import Models, make_models, merged_state, trained
from retrieval import SearchFailed, engine_from
from searchr1 import Critic, Question, Settings, token_logprobs

ROOT = Path(train.__file__).parent
SMALL = "--batch-size 5 --group-size 4 --eval-limit 3 --eval-every 2 --steps 2 --reward format --max-turns 1".split()
SMALL += "--max-new-tokens 8".split()


@pytest.fixture()
def small_base(monkeypatch, tmp_path, tokenizer, world, engine):
    """A run in an empty folder. A random model, which answers something now and then, stands in for the base model. No
    time is spent on pictures (the runs on files draw theirs) or on the world."""
    monkeypatch.chdir(tmp_path)
    model = random_model(tokenizer, loud=LOUD, layers=1)
    model.name_or_path = "the base"
    monkeypatch.setattr(data, "base_model", lambda config, cache: (copy.deepcopy(model), tokenizer, "the base"))
    monkeypatch.setattr(data, "make_world", lambda seed: world)
    monkeypatch.setattr(data, "build_index", lambda passages: engine)
    monkeypatch.setattr(train, "plot_runs", lambda runs, path: path.touch())


def update(policy, reference, batch, critic=None, **values):
    """Phase 6 once, by plain SGD: at a rate of 1 the change of the weights is minus the gradient -> the losses."""
    warm = {"warmup_steps": 0, "critic_lr_warmup_steps": 0, "critic_warmup_steps": 0}
    config = train.Config(**{"minibatches": 1, "lr": 1.0, "critic_lr": 1.0, "max_grad_norm": 1e9} | warm | values)
    sgd = lambda network: torch.optim.SGD(network.parameters(), lr=1.0)
    learners = [(name, network, sgd(network)) for name, network in (("policy", policy), ("critic", critic)) if network]
    return train.update(Models(policy, reference, critic, learners), batch, 1, config, random.Random(0))


# ----- Phase 3: rewards -----


@pytest.mark.paper
def test_every_rollout_is_paid_for_its_own_question(small_base, tokenizer, monkeypatch):
    """Claim: [Eq. 4] in the loop, rollout i is scored against the gold answers of the question that stands in its
    prompt.
    Fails if: rewards() reads rollouts[0].question, for em_B or for rewards_B, or rollout() gives the members of a group
    different questions.
    """
    seen, paid, rewards, outcome = [], [], train.rewards, train.outcome_reward
    note = lambda answer, gold: paid.append((answer, gold)) or outcome(answer, gold)

    def spy(rollouts, *rest):
        paid.clear()
        found = rewards(rollouts, *rest)
        seen.append((rollouts, list(paid)))
        return found

    monkeypatch.setattr(train, "outcome_reward", note)
    monkeypatch.setattr(train, "rewards", spy)
    train.main(SMALL + ["--steps", "1", "--reward", "em", "--output-dir", "run"])
    ((rollouts, paid),) = seen
    prompts = [tokenizer.decode(r.ids[: r.prompt_length]) for r in rollouts]
    asked = [re.search("<question> (.*) </question>", prompt)[1].replace(" ", "") for prompt in prompts]
    gold = {q.text.replace(" ", ""): q.gold_answers for q in data.make_world(0).train}
    assert len(rollouts) == 20 and len(set(asked)) > 2
    assert paid == 2 * [(r.answer, gold[text]) for r, text in zip(rollouts, asked)]  # exact match, and the reward
    assert asked[::4] == asked[1::4] == asked[2::4] == asked[3::4]  # groups stand in a row


def test_shuffled_rewards_are_the_same_rewards_in_another_order(short_prompt):
    """Claim: without --shuffle-rewards a rollout's reward is its exact match. With it the rewards of a step are the
    same, dealt out anew, and reward/em stays what the rollouts are worth.
    Fails if: rewards() shuffles em_B, too, or draws each reward with replacement.
    """
    said, gold = ["x", "The X!", "y", "", "z", "x"], ("x", "w")
    rollouts = [played([f"<answer>{answer}</answer>"], Question("0", "q", gold))[0] for answer in said]
    want = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    rewards_B, em_B = train.rewards(rollouts, train.Config(), random.Random(0))
    assert rewards_B.tolist() == em_B.tolist() == want
    orders = set()
    for seed in range(20):
        rewards_B, em_B = train.rewards(rollouts, train.Config(shuffle_rewards=True), random.Random(seed))
        assert em_B.tolist() == want and sorted(rewards_B.tolist()) == sorted(want)
        orders.add(tuple(rewards_B.tolist()))
    assert len(orders) > 5


@pytest.mark.parametrize(
    "answer, em, f1",
    [("Ada Lovelace", 1.0, 1.0), ("Countess Ada Lovelace", 0.0, 0.8), ("Byron", 0.0, 0.0), (None, 0.0, 0.0)],
)
def test_each_reward_pays_what_it_says(short_prompt, answer, em, f1):
    """Claim: --reward em, f1, em+f1 pay exact match, token F1 and the mean of both; reward/em is exact match whatever
    is paid.
    Fails if: rewards() pays config.reward to em_B, too, or em+f1 is the sum.
    """
    turn = "nothing" if answer is None else f"<answer>{answer}</answer>"
    r, *_ = played([turn], Question("0", "q", ("Ada Lovelace",)), max_turns=0)
    for reward, want in (("em", em), ("f1", f1), ("em+f1", (em + f1) / 2)):
        rewards_B, em_B = train.rewards([r], train.Config(reward=reward), random.Random(0))
        assert rewards_B.tolist() == pytest.approx([want]) and em_B.tolist() == [em]


def test_groups_that_teach_nothing_make_way_for_new_questions(small_base, monkeypatch):
    """Claim: [DAPO] with --redraws N, groups of equal rewards are replaced by groups about other questions, N times at
    most; groups with a difference stay where they are, and what is trained has each rollout paid for its own question.
    Which questions these are does not depend on the number of steps, which the cooldown and --steps change.
    Fails if: write() replaces the other groups, or computes the rewards of the first rollouts only, or the loop draws
    the questions of `step + k * config.steps`.
    """
    rounds, rewards, trained = [], train.rewards, []

    def worth(rollouts, *rest):  # in round 0 group 1 differs, in round 1 groups 0 and 1, then all
        rewards_B, em_B = torch.zeros(len(rollouts)), rewards(rollouts, *rest)[1]
        rewards_B[[4, 0, 8, 12, 16][: 1 + len(rounds)]] = 1.0
        rounds.append([r.question.id for r in rollouts[::4]])
        return rewards_B, em_B

    monkeypatch.setattr(train, "rewards", worth)
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda rows, *a, **k: trained.extend(rows) or collate(rows, *a, **k))
    train.main(SMALL + ["--steps", "1", "--redraws", "2", "--output-dir", "run"])
    first, second, third = rounds
    assert len(first) == 5 and [a == b for a, b in zip(first, second)] == [False, True, False, False, False]
    assert [a == b for a, b in zip(second, third)] == [True, True, False, False, False]
    assert [r.question.id for r in trained[::4]] == third
    line = metrics("run")[1]
    assert line["frac_reward_zero_std"] == pytest.approx(0.4) and line["redrawn_groups"] == 4 + 3
    rounds.clear()
    train.main(SMALL + ["--steps", "2", "--redraws", "2", "--output-dir", "longer"])
    assert rounds[:3] == [first, second, third]


# ----- Phase 4: log-probs and values -----


@pytest.mark.paper
def test_kl_in_the_reward_is_k1_of_the_policys_tokens(tokenizer, model):
    """Claim: [Eq. 1, PPO] each token of the policy is charged beta (log pi - log pi_ref), the last one also gets the
    outcome; retrieved tokens get nothing.
    Fails if: token_rewards adds the penalty instead of subtracting it, or logprobs_under scores all tokens instead of
    the mask's.
    """
    reference = random_model(tokenizer, seed=1)
    batch, rewards = a_batch(tokenizer, model)
    networks = Models(model, reference, None, [])
    token_rewards = train.token_rewards(networks, batch, rewards, train.Config(kl_in="reward", kl_coef=0.1))
    with torch.no_grad():
        ref = torch.log_softmax(reference(input_ids=batch.ids_BL).logits[:, :-1], -1)
    ref = ref.gather(-1, batch.ids_BL[:, 1:, None])[..., 0]
    for row in range(8):
        own = batch.mask_BT[row].nonzero()[:, 0]
        want = -0.1 * (batch.old_logprobs_BT - ref)[row, own]
        want[-1] += rewards[row]
        torch.testing.assert_close(token_rewards[row, own], want, atol=1e-5, rtol=0)
        assert (token_rewards[row, ~batch.mask_BT[row]] == 0).all()


@pytest.mark.paper
def test_without_the_mask_retrieved_tokens_are_trained_like_the_policys_own(small_base, monkeypatch):
    """Claim: [Table 4] with --no-mask every token after the prompt is trained, each with an old log-prob (none is 0).
    With the mask only what the policy wrote is.
    Fails if: train() hands collate no mask_retrieved, or `config.no_mask or` is dropped in token_rewards: nobody
    sampled the retrieved tokens, and their old log-probs would be 0.
    """
    seen, rollouts, token_rewards, collate = [], [], train.token_rewards, train.collate
    monkeypatch.setattr(train, "token_rewards", lambda *args: seen.append(args[1]) or token_rewards(*args))
    monkeypatch.setattr(train, "collate", lambda rows, *a, **k: rollouts.extend(rows) or collate(rows, *a, **k))
    for name, flags in (("off", ["--no-mask"]), ("on", [])):
        seen.clear(), rollouts.clear()
        train.main(SMALL + "--steps 1 --max-turns 3 --max-new-tokens 12".split() + flags + ["--output-dir", name])
        (batch,), written = seen, [sum(r.response_mask) for r in rollouts]
        after = [len(r.ids) - r.prompt_length for r in rollouts]
        assert any(r.searches for r in rollouts) and sum(after) > sum(written)
        assert batch.mask_BT.sum(1).tolist() == (after if flags else written)
        assert (batch.old_logprobs_BT[batch.mask_BT] < 0).all()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_loop_never_makes_a_wall_of_logits(tokenizer, model, kl_in):
    """Claim: log-probs of the policy, the old policy and the reference are all computed without their lm_heads being
    run.
    Fails if: any of the three passes calls model(ids).logits.
    """
    config = train.Config(recompute_old_logprobs=True, kl_in=kl_in, micro_batch_tokens=300)
    batch, _ = a_batch(tokenizer, model)
    batch.old_logprobs_BT, batch.ref_logprobs_BT = torch.zeros_like(batch.old_logprobs_BT), None
    networks = make_models(model, config)
    for network in (networks.policy, networks.reference):
        network.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the lm_head was run"))
    train.token_rewards(networks, batch, torch.ones(len(batch.ids_BL)), config)
    losses = train.update(networks, batch, 1, config, random.Random(0))
    assert (batch.old_logprobs_BT[batch.mask_BT] < 0).all() and "kl" in losses
    assert kl_in == "loss" or (batch.ref_logprobs_BT[batch.mask_BT] < 0).all()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_without_a_penalty_the_reference_never_runs(tokenizer, model, kl_in):
    """Claim: with beta 0 no forward pass is spent on the reference, and no KL is logged.
    Fails if: token_rewards or new_logprobs does not look at config.kl_coef.
    """
    config = train.Config(kl_in=kl_in, kl_coef=0.0)
    batch, _ = a_batch(tokenizer, model)
    networks = make_models(model, config)
    networks.reference.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the reference was run"))
    train.token_rewards(networks, batch, torch.ones(len(batch.ids_BL)), config)
    assert not {"kl", "kl_exact"} & set(train.update(networks, batch, 1, config, random.Random(0)))


@pytest.mark.parametrize("algo, flags", [("reinforce", {}), ("grpo", {"no_mask": True})])
def test_with_one_update_a_step_old_logprobs_need_no_pass_of_their_own(tokenizer, model, algo, flags):
    """Claim: [D9] with one update a step and the KL in the loss, the update's own log-probs are the old ones: the same
    gradient as with a pass of their own, over several micro-batches, too, and one pass less over the policy.
    Fails if: old_is_new does not ask for minibatches == 1, or reinforcement_loss takes the sampler's log-probs.
    """
    batch, _ = a_batch(tokenizer, model)
    sampler = batch.old_logprobs_BT + 0.5 * batch.mask_BT  # a sampler that rounds otherwise
    results = []
    for minibatches, spare in ((1, True), (1, False), (2, True)):
        config = train.Config(algo=algo, minibatches=minibatches, recompute_old_logprobs=True, group_size=4,
                              micro_batch_tokens=300, **flags)  # fmt: skip
        assert config.old_is_new == (minibatches == 1)
        policy, batch.old_logprobs_BT, passes = copy.deepcopy(model), sampler.clone(), []
        networks = make_models(policy, config)
        policy.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
        if not spare:  # as if it were not known
            batch.old_logprobs_BT = train.logprobs_under(policy, batch, config)
        train.token_rewards(networks, batch, torch.ones(len(batch.ids_BL)), config)
        before = len(passes)
        assert (before == 0) == (spare and minibatches == 1)
        train.update(networks, batch, 1, config, random.Random(0))
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=0)
    assert not torch.allclose(results[0], results[2], atol=1e-6, rtol=0)


# ----- Phase 5: advantages -----


@pytest.mark.paper
def test_groups_without_any_difference_in_reward_are_left_out(tokenizer, model):
    """Claim: [D10] a group of equal rewards is not trained on; if all groups are equal, all rows stay with advantage 0:
    then only the KL acts, and without it there is no update at all.
    Fails if: outcome_advantages() returns the batch as it is, or an empty one; or update() goes on without a KL.
    """
    batch, _ = a_batch(tokenizer, model)
    config = train.Config(group_size=4)
    for value in (0.0, 1.0):
        same = train.outcome_advantages(batch, torch.full((8,), value), config)
        assert len(same.ids_BL) == 8 and (same.advantages_BT == 0).all()
    for kl_coef in (0.1, 0.0):
        changed = train.Config(group_size=4, kl_coef=kl_coef)
        networks = make_models(copy.deepcopy(model), changed)
        assert bool(train.update(networks, same, 1, changed, random.Random(0))) == bool(kl_coef)
    kept = train.outcome_advantages(batch, torch.tensor([0.0] * 4 + [1.0, 0, 0, 0]), config)
    assert kept.ids_BL.shape[0] == 4 and kept.lengths_B.tolist() == batch.lengths_B[4:].tolist()


def test_the_baseline_of_reinforce_is_the_batchs_mean(tokenizer, model):
    """Claim: [Williams 1992] REINFORCE gives each token the reward of its rollout minus the mean over the batch.
    Fails if: outcome_advantages takes the mean of each group.
    """
    batch, _ = a_batch(tokenizer, model)
    scores = torch.tensor([1.0, 0, 0, 0] + [1.0, 1, 1, 0])  # mean 0.5
    got = train.outcome_advantages(batch, scores, train.Config(algo="reinforce", group_size=4))
    want = torch.tensor([0.5, -0.5, -0.5, -0.5] + [0.5, 0.5, 0.5, -0.5])[:, None] * batch.mask_BT
    assert torch.equal(got.advantages_BT, want)


# ----- Phase 6: the update -----


@pytest.mark.paper
@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_micro_batches_equal_the_big_batch(tokenizer, model, algo):
    """Claim: [D7] the loss is a mean over all tokens of the minibatch: a budget of one row a micro-batch moves policy
    and critic as one big batch does.
    Fails if: `share` is dropped in update (each micro-batch's mean would count alike), or is a share of rows.
    """
    batch, _ = a_batch(tokenizer, model)
    reference, moved = random_model(tokenizer, seed=1), []
    for budget in (10**6, 1):
        policy, critic = copy.deepcopy(model), Critic(model) if algo == "ppo" else None
        values = {"algo": algo, "micro_batch_tokens": budget, "kl_coef": 0.5, "entropy_coef": 0.1}
        losses = update(policy, reference, batch, critic, **values)
        networks = [policy, critic] if critic else [policy]
        moved.append((torch.cat([p.detach().flatten() for m in networks for p in m.parameters()]), losses))
    networks = [model, Critic(model)] if critic else [model]
    start = torch.cat([p.detach().flatten() for m in networks for p in m.parameters()])
    assert len(set(batch.lengths_B.tolist())) > 1 and (moved[0][0] - start).abs().max() > 1e-3
    torch.testing.assert_close(moved[0][0], moved[1][0], atol=2e-6, rtol=1e-5)
    assert moved[0][1] == pytest.approx(moved[1][1], abs=1e-5)


def test_micro_batches_hold_every_row_once_within_the_budget(tokenizer, model):
    """Claim: pieces partition the rows; rows times the longest row stays within the budget, one row at least.
    Fails if: micro_batches drops its last piece.
    """
    batch, _ = a_batch(tokenizer, model)
    for budget in (1, 100, 200, 10**6):
        pieces = train.micro_batches(batch, range(8), budget)
        assert sorted(i for piece in pieces for i in piece) == list(range(8))
        assert all(len(p) == 1 or len(p) * max(batch.lengths_B[i] for i in p) <= budget for p in pieces)


@pytest.mark.paper
def test_one_update_raises_the_logprob_of_the_rewarded_rollout(tokenizer, model):
    """Claim: after one small step, rollouts with reward 1 are more likely and the others, on the whole, less.
    Fails if: policy_loss loses its minus sign, or group_advantages returns each group in reverse.
    """
    batch, rewards = a_batch(tokenizer, model)
    policy = copy.deepcopy(model)
    update(policy, model, batch, lr=1e-3)
    with torch.no_grad():
        change = (token_logprobs(policy, batch.ids_BL, batch.mask_BT).logp - batch.old_logprobs_BT).sum(1)
    assert (change[rewards == 1] > 0).all() and change[rewards == 0].mean() < 0


@pytest.mark.paper
def test_the_kl_loss_pulls_towards_the_reference(tokenizer, model):
    """Claim: [Eq. 1, GRPO] with no reward at all, a step brings the log-probs of the sampled tokens closer to the
    reference's: the k3 that is logged as kl falls.
    Fails if: the KL term is subtracted in reinforcement_loss (`+ config.kl_coef` -> `-`), a bug that the official code
    once had.
    """
    reference = random_model(tokenizer, seed=1)
    batch, _ = a_batch(tokenizer, model)
    batch.advantages_BT = torch.zeros_like(batch.old_logprobs_BT)
    policy = copy.deepcopy(model)
    logged = [update(policy, reference, batch, kl_coef=1.0, lr=0.01)["kl"] for _ in range(2)]
    assert 0 < logged[1] < logged[0]


def test_the_learning_rate_warms_up_and_decays():
    """Claim: [D11] linear to 1 over the warm-up, never 0; then constant, and in the cooldown linear to a tenth at the
    end. A short run cools down over its second half, one without a cooldown not at all.
    Fails if: the warm-up counts from step - 1; a cooldown of 0 steps still lowers the last one; or `// 2` goes.
    """
    config = train.Config(steps=100, cooldown=20)
    got = [train.learning_rate_factor(step, 4, config) for step in (1, 2, 4, 50, 80, 90, 100)]
    assert got == pytest.approx([0.25, 0.5, 1, 1, 1, 0.55, 0.1])
    short = [train.learning_rate_factor(step, 1, train.Config(steps=8)) for step in (1, 4, 6, 8)]
    assert short == pytest.approx([1, 1, 0.55, 0.1])
    assert train.learning_rate_factor(100, 5, train.Config(steps=100, cooldown=0)) == 1


def test_the_critic_warms_up_by_its_own_steps(tokenizer, model):
    """Claim: in step 3 of warm-ups over 10 steps for the policy and 2 for the critic, their rates are 0.3 lr and
    critic_lr.
    Fails if: update takes the policy's `warmups` for both.
    """
    batch, _ = a_batch(tokenizer, model)
    warm = {"warmup_steps": 10, "critic_lr_warmup_steps": 2, "critic_warmup_steps": 0}
    config = train.Config(algo="ppo", lr=0.01, critic_lr=0.02, **warm)
    networks = make_models(model, config)
    train.update(networks, batch, 3, config, random.Random(0))
    rates = [optimizer.param_groups[0]["lr"] for _, _, optimizer in networks.learners]
    assert rates == pytest.approx([0.003, 0.02])


# ----- Phase 6: the KL in the loss -----


def kl_by_enumeration(policy, reference, batch):
    """float64: (k3 of the sampled tokens, exact KL of the distributions), each the mean over the policy's tokens."""
    scores = lambda model: model(input_ids=batch.ids_BL).logits[:, :-1].double()[batch.mask_BT]
    p, q = (torch.log_softmax(scores(model), -1) for model in (policy, reference))
    tokens = batch.ids_BL[:, 1:][batch.mask_BT][:, None]
    r = (q - p).gather(-1, tokens)[:, 0]
    return (torch.exp(r) - r - 1).clamp(max=10).mean(), (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.paper
@pytest.mark.parametrize("rank", [0, 3])
def test_one_pass_of_the_kernel_gives_k3_and_the_exact_kl_to_the_reference(tokenizer, model, rank):
    """Claim: in GRPO's update `kl` is the mean k3 and `kl_exact` the mean of sum p (ln p - ln q) over the vocabulary,
    for two models and for adapters on one base, whose reference is the base.
    Fails if: new_logprobs runs the reference without `role(models.reference, None)`, or takes part.ref_logprobs_BT.
    """
    batch, _ = a_batch(tokenizer, model)
    batch.ref_logprobs_BT = None
    config = train.Config(lora_rank=rank, lora_alpha=6.0)
    made = make_models(copy.deepcopy(model), config)
    for name, p in trained(made.policy, "policy").items():
        p.data += 0.05 * torch.randn_like(p)
    plain = random_model(tokenizer)
    plain.load_state_dict(merged_state(made.policy))
    _, logged = train.reinforcement_loss(made, batch, config)
    with torch.no_grad():
        k3, exact = kl_by_enumeration(plain, model, batch)
    assert exact > 0.003 and logged["kl"].item() == pytest.approx(k3.item(), rel=1e-4)
    assert logged["kl_exact"].item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.paper
@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_the_kl_in_the_loss_has_the_gradient_of_its_definition(tokenizer, model, kl):
    """Claim: without advantages, the gradient of the loss at beta 1 is that of k3, or with --kl exact that of the exact
    KL, in float64, with a PLUS.
    Fails if: reinforcement_loss takes kl_metrics["kl"] whatever config.kl is, or subtracts it.
    """
    batch, _ = a_batch(tokenizer, model)
    batch.advantages_BT = torch.zeros_like(batch.old_logprobs_BT)
    reference = random_model(tokenizer, seed=1)
    policy, exactly = copy.deepcopy(model), copy.deepcopy(model).double()
    config = train.Config(kl=kl, kl_coef=1.0)
    train.reinforcement_loss(Models(policy, reference, None, []), batch, config)[0].backward()
    dict(zip(("k3", "exact"), kl_by_enumeration(exactly, reference.double(), batch)))[kl].backward()
    for got, want in zip(policy.parameters(), exactly.parameters()):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=2e-5, rtol=1e-3)


# ----- Fine-tuning -----


@pytest.mark.paper
def test_sft_raises_the_logprob_of_the_gold_answer_and_of_nothing_else(tokenizer, model):
    """Claim: an example of SFT is the prompt of direct inference and the gold answer; the prompt is masked; the
    gradient is that of the mean negative log-likelihood of the answer's tokens. Its one turn is a valid action.
    Fails if: gold_example appends the prompt with log-probs (mask True), or leaves num_valid_actions at 0, or
    fine_tuning_loss loses its minus.
    """
    who = Question("1", "who is kinake?", ("gugoton", "second"))
    where = Question("2", "where is kinake?", ("kinake gugoton",))
    rollouts = [train.gold_example(question, tokenizer) for question in (who, where)]
    assert [r.num_valid_actions / len(r.turns) for r in rollouts] == [1, 1]
    texts = [(tokenizer.decode(r.ids[: r.prompt_length]), tokenizer.decode(r.ids[r.prompt_length :])) for r in rollouts]
    assert texts[0] == ("<question> who is kinake ? </question> <answer>", "gugoton </answer>")
    assert texts[1] == ("<question> where is kinake ? </question> <answer>", "kinake gugoton </answer>")
    assert [r.response_mask for r in rollouts] == [[i >= r.prompt_length for i in range(len(r.ids))] for r in rollouts]
    batch = searchr1.collate(rollouts)
    batch = train.outcome_advantages(batch, torch.ones(2), train.Config(algo="sft"))
    policy = copy.deepcopy(model)
    update(policy, model, batch, algo="sft", kl_coef=0.0)
    logits_BTV = model(input_ids=batch.ids_BL).logits[:, :-1]
    assert batch.mask_BT.sum() == 5  # gugoton </answer>, kinake gugoton </answer>
    own = batch.mask_BT
    torch.nn.functional.cross_entropy(logits_BTV[own], batch.ids_BL[:, 1:][own]).backward()  # a mean
    for before, after in zip(model.parameters(), policy.parameters()):
        torch.testing.assert_close(after, before - before.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.paper
@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2", "--lr", "1"]])
def test_rejection_sampling_imitates_the_base_models_right_rollouts(small_base, monkeypatch, flags):
    """Claim: every step's rollouts are the untouched base model's, whatever was learned before, in slots of their own,
    since a graph knows one role; only rows with reward are trained, and a step without any trains nothing.
    Fails if: the writer is the policy (or, with adapters, plays its role), outcome_advantages() keeps every row, update
    goes on where no advantage is left, or `new_slots()` of the rejection branch is `slots`.
    """
    writes, reads = [], []
    keep = lambda call, where, at: lambda *args, **how: where.append(how.get("slots") or args[at]) or call(*args, **how)
    monkeypatch.setattr(train, "rollout", keep(train.rollout, writes, -1))
    monkeypatch.setattr(train, "evaluate", keep(train.evaluate, reads, -1))
    monkeypatch.setattr(train, "outcome_reward", lambda answer, gold: float(answer is not None))
    seen, batches, plain = [], [], train.update
    monkeypatch.setattr(train, "rewards", lambda *args, plain=train.rewards: seen.append(args[0]) or plain(*args))
    monkeypatch.setattr(train, "update", lambda *args: batches.append(args[1]) or plain(*args))
    run = "--algo rejection --steps 2 --batch-size 6 --eval-limit 2 --max-turns 2 --max-new-tokens 8".split()
    train.main(run + ["--output-dir", "run", "--lr", "0.1"] + flags)
    base, task = train.load_run(train.Config())
    settings, generator = Settings(2, 8, 64, 256, invalid_message="paper"), torch.Generator(base.device).manual_seed(2)
    asked = [r.question for r in seen[1][::5]]
    untouched = searchr1.rollout(base, task.tokenizer, asked, task.search, settings, 5, generator=generator)
    assert [r.ids for r in seen[1]] == [r.ids for r in untouched]
    assert len(writes) == 2 and len(set(map(id, writes))) == 1 == len(set(map(id, reads))) and writes[0] is not reads[0]
    moved = AutoModelForCausalLM.from_pretrained("run/checkpoint-2").state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in base.state_dict().items())
    for rollouts, batch in zip(seen, batches, strict=True):
        paid = [len(r.ids) for r in rollouts if r.answer is not None]
        assert 0 < len(paid) < 30 and batch.lengths_B.tolist() == paid
    saved = json.loads(Path("run/checkpoint-2/search_r1.json").read_text())
    assert (saved["method"], saved["base"]) == ("rejection", "the base")
    monkeypatch.setattr(train, "outcome_reward", lambda answer, gold: 0.0)
    train.main(run + ["--output-dir", "nothing"])
    moved = AutoModelForCausalLM.from_pretrained("nothing/checkpoint-2").state_dict()
    assert all(torch.equal(moved[name], value) for name, value in base.state_dict().items())


# ----- Whole runs in the tiny world -----


def test_the_same_seed_gives_the_same_metrics_twice(small_base):
    """Claim: two runs of one command log the same numbers (but for times), another seed others; something was learned.
    Fails if: writer hands rollout() None for its generator.
    """
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(SMALL + ["--steps", "1", "--output-dir", name, "--seed", str(seed)])
    assert metrics("a") == metrics("b") != metrics("c")
    assert any(line.get("grad_norm", 0) > 0 for line in metrics("a"))


def test_an_update_on_a_cpu_hands_freed_memory_back(small_base, monkeypatch):
    """Claim: on a CPU each step's update ends with give_back.
    Fails if: update does not call it.
    """
    calls = []
    monkeypatch.setattr(train, "give_back", lambda: calls.append(1))
    train.main(SMALL + ["--steps", "2", "--device", "cpu", "--output-dir", "run"])
    assert len(calls) == 2


FLAGS = [
    ["--no-search"],
    ["--no-mask", "--kl-in", "reward"],
    ["--shuffle-rewards", "--recompute-old-logprobs"],
    ["--algo", "ppo", "--critic-warmup-steps", "0", "--no-mask"],
    ["--group-size", "1", "--batch-size", "20"],
]


@pytest.mark.parametrize("flags", FLAGS)
def test_every_variant_runs_and_leaves_a_whole_run_behind(small_base, flags):
    """Claim: config, metrics with the official names, samples, curves and a checkpoint that transformers loads; the
    first and the last line of the metrics carry an evaluation. With --no-search, and only then, nobody searches.
    Fails if: a metric of the list is renamed, the last step is not evaluated when eval_every does not divide it, or
    Config.settings always searches.
    """
    train.main(SMALL + "--steps 1 --max-turns 3 --max-new-tokens 12 --output-dir run".split() + flags)
    lines = metrics("run")
    names = "reward/mean reward/std frac_reward_zero_std kl entropy clip_ratio grad_norm lr response_length/mean "
    names += "env/number_of_actions env/ratio_of_valid_action env/number_of_valid_search env/finish_ratio "
    names += "response_length/at_limit env/repeated_search "
    names += "state_tokens/coverage"
    assert [line["step"] for line in lines] == [0, 1]
    assert set(names.split()) <= set().union(*lines[1:]) and all(v == v for line in lines for v in line.values())
    evaluated = "eval/em eval/f1 eval/em_1hop eval/em_2hop eval/sampled_em train/sampled_em"
    assert all(set(evaluated.split()) <= set(line) for line in (lines[0], lines[-1]))
    files = {".lock", "config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoint-1"}
    assert {f.name for f in Path("run").iterdir()} == files
    AutoModelForCausalLM.from_pretrained("run/checkpoint-1")
    assert AutoTokenizer.from_pretrained("run/checkpoint-1").chat_template == data.CHAT_TEMPLATE
    assert (lines[1]["env/number_of_valid_search"] == 0) == ("--no-search" in flags)


def test_slots_bound_what_is_in_flight_and_change_nothing_else(small_base, monkeypatch):
    """Claim: with --slots 4 the rollouts of a step and of an evaluation work in four slots, the same ones through the
    whole run, and the metrics are those of a run with a slot for each rollout.
    Fails if: writer hands rollout() no slots or makes them without config.slots, or evaluation() hands evaluate() none.
    """
    run, used = engine.run, []
    monkeypatch.setattr(engine, "run", lambda *args: used.append(args[-1]) or run(*args))
    for name, flags in (("all", []), ("few", ["--slots", "4"])):
        train.main(SMALL + ["--steps", "1", "--output-dir", name] + flags)
    assert [len(slots.lengths) for slots in used] == [20] * 7 + [4] * 7 and len(set(map(id, used))) == 2
    for few, whole in zip(metrics("few"), metrics("all"), strict=True):
        assert few == pytest.approx(whole, abs=1e-3)


# ----- Runs that end early, and go on -----


@pytest.mark.parametrize("flags", [["--algo", "grpo"], ["--algo", "reinforce", "--kl-in", "reward"]])
def test_a_resumed_run_is_the_uninterrupted_run(small_base, monkeypatch, flags):
    """Claim: killed after step 1 of 2 and resumed, the metrics and weights are those of a run that was left alone. Of
    the checkpoints of a run only the newest keeps what resuming needs.
    Fails if: restore() forgets the optimiser or where the policy was, a step's randomness depends on earlier steps, or
    tidy leaves the trainer states of older checkpoints.
    """
    run, save = SMALL + flags + ["--steps", "2", "--save-every", "1"], train.save_checkpoint

    def saved(step, *args):
        save(step, *args)
        if step == 1:  # as if it died in step 2
            shutil.copytree("whole", "killed")

    monkeypatch.setattr(train, "save_checkpoint", saved)
    train.main(run + ["--output-dir", "whole"])
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert [str(state) for state in Path("whole").rglob("trainer_state.pt")] == ["whole/checkpoint-2/trainer_state.pt"]
    train.main(["--resume", "killed"])
    assert metrics("killed") == metrics("whole")
    weights = lambda run: AutoModelForCausalLM.from_pretrained(f"{run}/checkpoint-2").state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights("whole"), weights("killed"), strict=True))


def test_a_full_disk_is_one_line_and_older_checkpoints_stay_whole(small_base, monkeypatch):
    """Claim: whether Python, torch or safetensors finds the disk full, the run ends with one line that says what is
    kept, leaves no half a checkpoint, and goes on from the older one when there is room.
    Fails if: save_checkpoint catches OSError only, or leaves `unfinished` behind.
    """
    write = train.torch.save
    errors = [OSError(28, "No space left on device"), RuntimeError("write failed"), SafetensorError("No space left")]

    def full(state, path):
        if state["step"] == 2:
            raise errors[0]
        write(state, path)

    monkeypatch.setattr(train.torch, "save", full)
    message = "checkpoint-2 cannot be written to full: .*; older checkpoints are whole; make"
    run = SMALL + ["--steps", "2", "--save-every", "1", "--output-dir", "full"]
    while errors:
        with pytest.raises(Mistake, match=message) as ended:
            train.main(run)
        assert "\n" not in str(ended.value)
        assert sorted(d.name for d in Path("full").iterdir() if d.is_dir()) == ["checkpoint-1"]
        errors.pop(0)
        run = ["--resume", "full"]
    monkeypatch.setattr(train.torch, "save", write)
    train.main(run)
    assert [line["step"] for line in metrics("full")] == [0, 1, 2]


def test_interrupted_it_finishes_its_step_and_saves(small_base, monkeypatch, capsys):
    """Claim: Ctrl-C in step 1 ends the run after step 1, with a checkpoint and one line that says how to go on; what is
    resumed is the run that was not interrupted.
    Fails if: `or stop` is removed from the condition that saves.
    """
    run = SMALL + ["--steps", "2"]
    train.main(run + ["--output-dir", "whole"])
    draw = data.draw_questions

    def interrupted(*args):
        if len(metrics("stopped")) == 1:
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(data, "draw_questions", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(run + ["--output-dir", "stopped"])
    assert stopped.value.code == 130 and len(metrics("stopped")) == 2
    assert "--resume stopped" in capsys.readouterr().out
    assert Path("stopped/checkpoint-1/trainer_state.pt").exists()  # else --resume would begin anew
    monkeypatch.setattr(data, "draw_questions", draw)
    train.main(["--resume", "stopped"])
    assert metrics("stopped") == metrics("whole")


def test_a_search_engine_that_goes_away_ends_the_run_and_loses_no_step(small_base, monkeypatch):
    """Claim: if the engine fails in step 3, the run ends with its address, steps 1 and 2 are kept, and resumed it is
    the run in which the engine never failed. No rollout is trained on without its passages.
    Fails if: train catches SearchFailed and goes on, or orderly_end saves nothing, or under the number of the step that
    failed.
    """
    run = SMALL + ["--steps", "3", "--eval-every", "9", "--batch-size", "25", "--device", "cpu"]  # enough to search
    train.main(run + ["--output-dir", "whole"])
    load_run = train.load_run

    def gone_later(config):
        policy, task = load_run(config)

        def fragile(queries, top_k):
            if Path("broken/metrics.jsonl").exists() and len(metrics("broken")) == 3:  # the base's line, and two steps
                raise SearchFailed("http://nowhere did not answer")
            return task.search(queries, top_k)

        return policy, task._replace(search=fragile)

    monkeypatch.setattr(train, "load_run", gone_later)
    with pytest.raises(SearchFailed, match="nowhere did not answer; saved after step 2, continue with"):
        train.main(run + ["--output-dir", "broken"])
    assert Path("broken/checkpoint-2/trainer_state.pt").exists()  # else --resume would begin anew
    monkeypatch.setattr(train, "load_run", load_run)
    train.main(["--resume", "broken"])
    assert metrics("broken") == metrics("whole")


def test_an_engine_that_goes_away_during_an_evaluation_costs_the_evaluation_only(small_base, monkeypatch):
    """Claim: if the evaluation of step 1 cannot search, step 1 is logged and saved all the same, and the resumed run
    has the other steps of a run in which nothing failed.
    Fails if: train() logs the step after its evaluation instead of whatever becomes of it, or the run goes on.
    """
    run = SMALL + ["--eval-every", "1"]
    train.main(run + ["--output-dir", "whole"])
    evaluate = train.evaluate

    def fragile(*args, **settings):
        if Path("broken/metrics.jsonl").exists():
            raise SearchFailed("http://nowhere did not answer")
        return evaluate(*args, **settings)

    monkeypatch.setattr(train, "evaluate", fragile)
    with pytest.raises(SearchFailed, match="nowhere did not answer; saved after step 1, continue with"):
        train.main(run + ["--output-dir", "broken"])
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main(["--resume", "broken"])
    whole, broken = metrics("whole"), metrics("broken")
    assert broken[1] == {k: v for k, v in whole[1].items() if not k.startswith("eval/")}
    assert broken[:1] + broken[2:] == whole[:1] + whole[2:]


def test_a_run_that_cannot_be_evaluated_at_its_start_leaves_nothing_behind(small_base, monkeypatch):
    """Claim: if the search engine is not there at the first evaluation, the run ends with its address and has logged
    nothing, so that the same command can be given again.
    Fails if: restore logs before it evaluates.
    """

    def gone(*args, **settings):
        raise SearchFailed("http://nowhere did not answer")

    monkeypatch.setattr(train, "evaluate", gone)
    with pytest.raises(SearchFailed, match="^http://nowhere did not answer$"):
        train.main(SMALL + ["--output-dir", "run"])
    assert {file.name for file in Path("run").iterdir()} == {"config.json", ".lock"}
    assert train.parse_config(SMALL + ["--output-dir", "run"]).steps == 2


def test_an_evaluation_is_told_in_words():
    """Claim: an evaluation prints exact match and searches by hops, if they are known, and says when a kind of question
    takes another number of searches than at the evaluation before.
    Fails if: in_words compares unrounded searches, or says nothing of questions without hops.
    """
    old = {"eval/em": 0.2, "eval/searches": 1.4}
    new = {"eval/em": 0.314, "eval/searches": 1.6}
    assert train.in_words(old, old) == "20% of questions right, 1.4 searches"
    told = "31% of questions right, 1.6 searches; questions now take 2 searches instead of 1"
    assert train.in_words(new, old) == told
    em = {"eval/em_1hop": 1.0, "eval/em_2hop": 0.5}
    hops = lambda one, two: em | {"eval/searches_1hop": one, "eval/searches_2hop": two}
    said = "100% of one-hop questions right, 1.2 searches; 50% of two-hop questions right, 1.9 searches; "
    said += "one-hop questions now take 1 search instead of 2"
    assert train.in_words(new | hops(1.2, 1.9), old | hops(1.8, 2.2)) == said


def test_what_looks_ill_is_said_in_words_and_a_healthy_run_is_left_alone():
    """Claim: each sign shows in the mean of five steps, beside that of the first five, from step 10 on; equal rewards
    are no sign once they are high, or without groups; a large loss is one where advantages have a baseline.
    What a step does not report counts as nothing, not as 0.
    Fails if: a bound of health is turned round (`now(name) < 0.8` -> `>`), it looks at the first steps twice, `abs`
    is dropped, or its mean divides by len(part), steps that do not report the name included.
    """
    well = {"entropy": 0.6, "kl": 0.3, "grad_norm": 0.5, "env/ratio_of_valid_action": 0.9, "env/finish_ratio": 0.9,
            "frac_reward_zero_std": 0.8, "reward/mean": 0.1}  # fmt: skip
    said = lambda config=train.Config(), **new: train.health([well] * 6 + [well | new] * 5, config)
    assert said() == train.health([well] * 4 + [well | {"entropy": 9}] * 5, train.Config()) == []
    ill = {"entropy": 1.3, "kl": 1.1, "grad_norm": 2.1, "env/finish_ratio": 0.6, "env/ratio_of_valid_action": 0.6,
           "frac_reward_zero_std": 0.95, "response_length/at_limit": 0.3, "env/repeated_search": 0.4,
           "env/empty_search": 0.6, "policy_loss": -0.6}  # fmt: skip
    signs = [said(**{name: value}) for name, value in ill.items()]
    assert [len(sign) for sign in signs] == [1] * 10 and len({sign[0] for sign in signs}) == 10
    assert "too early" in said(entropy=0.08)[0]
    assert said(entropy=0.08, **{"reward/mean": 0.9}) == said(entropy=0.0) == []
    assert "entropy" in signs[0][0] and "finish_ratio" in signs[3][0] and "--max-length" in signs[6][0]
    assert said(frac_reward_zero_std=1.0, **{"reward/mean": 0.9}) == []
    assert said(train.Config(group_size=1), frac_reward_zero_std=1.0) == []
    assert said(train.Config(group_size=1), policy_loss=-1.0) == said(train.Config(algo="sft"), policy_loss=3.0) == []
    assert "baseline" in said(train.Config(algo="reinforce", group_size=1), policy_loss=1.0)[0]
    without = {name: value for name, value in well.items() if name not in ("entropy", "kl", "grad_norm")}
    warmed_up = {"entropy": 1.2, "kl": 1.2, "grad_norm": 2.5}  # PPO's critic learned alone in the first three steps
    assert train.health([without] * 3 + [well | warmed_up] * 8, train.Config()) == []


def test_a_step_counts_rollouts_without_room_and_queries_asked_twice():
    """Claim: of four rollouts, one at the limit of its length and one that asked the same twice, a quarter each, and so
    one search of four that found nothing; of the three that ended in an answer, three quarters.
    Fails if: measure() compares with another length (`- 1` -> `- 2`) or counts every second search (`set(r.searches)`
    -> `r.searches[:1]`).
    """
    question, config = Question("0", "?", ("x",)), train.Config(max_length=10, group_size=2)
    lists = lambda n: ([1] * n, [False] + [True] * (n - 1), [0.0] * n)
    full, twice, two, short = (searchr1.Rollout(question, *lists(n), 1, turns=["t"]) for n in (9, 8, 7, 5))
    twice.searches, two.searches, two.found = ["a", "a"], ["a", "b"], [[], None]
    twice.finished = two.finished = short.finished = True
    costs = train.Costs(torch.device("cpu"))
    costs.end("rollout")
    record = train.measure(1, [full, twice, two, short], 0, torch.zeros(4), torch.zeros(4), {}, costs, config)
    assert record["response_length/at_limit"] == record["env/repeated_search"] == record["env/empty_search"] == 0.25
    assert record["env/finish_ratio"] == 0.75 and record["env/number_of_valid_search"] == 1.0


def test_no_script_asks_what_time_it_is():
    """Claim: a clock that jumps changes nothing: durations come from clocks that only run on.
    Fails if: HttpEngine waits by time.time() instead of time.monotonic().
    """
    asking = {"time.time", "time.ctime", "time.localtime", "time.gmtime", "datetime.now", "datetime.datetime.now"}
    for file in Path(train.__file__).parent.glob("*.py"):
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
        assert not calls & asking, file


def test_a_collapse_is_told_once_and_ends_the_run_if_asked(small_base, monkeypatch, capsys):
    """Claim: a sign is told once and not at every step; --stop-on-collapse saves that step and ends there.
    Fails if: train() tells all signs each time (`- told` dropped), or train() does not look at the flag.
    """
    monkeypatch.setattr(train, "health", lambda records, config: ["it burns"] if len(records) > 1 else [])
    train.main(SMALL + ["--steps", "4", "--output-dir", "on"])
    assert capsys.readouterr().out.count("it burns") == 1 and len(metrics("on")) == 5
    with pytest.raises(SystemExit):
        train.main(SMALL + ["--steps", "4", "--output-dir", "off", "--stop-on-collapse"])
    assert "step 2: it burns" in capsys.readouterr().out
    assert len(metrics("off")) == 3 and Path("off/checkpoint-2/trainer_state.pt").exists()


def test_a_policy_has_learned_when_five_steps_answer_both_kinds_right():
    """Claim: 95 % at one hop and 85 % at two, in the mean of the last five steps. Never before the fifth, with
    --no-until-learned, or without a cooldown to begin.
    Fails if: learned() divides by the number of records, takes one kind for both, or leaves out a condition.
    """
    steps = lambda one, two, count=5: [{"env/em_1hop": one, "env/em_2hop": two}] * count
    config = train.Config()
    assert train.learned(steps(0.0, 0.0) + steps(0.96, 0.86), config)
    assert train.learned(steps(0.93, 0.82, 2) + steps(0.98, 0.88, 3), config)
    for records in (steps(0.94, 1.0), steps(1.0, 0.84), steps(1.0, 1.0, 4), [{}] * 5):
        assert not train.learned(records, config)
    for off in ({"until_learned": False}, {"cooldown": 0}):
        assert not train.learned(steps(1.0, 1.0), replace(config, **off))


def test_a_run_that_has_learned_cools_down_and_ends(small_base, monkeypatch, capsys):
    """Claim: from the step at which it has learned a run takes --cooldown more, at a falling rate, told once. The last
    one is evaluated and saved, config.json has its number, and the run is over.
    Fails if: the loop goes on to the old number of steps, or the cooldown begins again at every step.
    """
    monkeypatch.setattr(train, "learned", lambda records, config: len(records) > 1)
    train.main(SMALL + "--steps 9 --cooldown 2 --warmup-steps 1 --output-dir run".split())
    lines = metrics("run")
    assert [line["step"] for line in lines] == list(range(5)) and "eval/sampled_em" in lines[-1]
    assert [line["lr"] / train.Config.lr for line in lines[1:]] == pytest.approx([1, 1, 0.55, 0.1])
    assert Path("run/checkpoint-4").exists() and json.loads(Path("run/config.json").read_text())["steps"] == 4
    assert capsys.readouterr().out.count("nearly learned") == 1
    with pytest.raises(Mistake, match="has all its 4 steps"):
        train.main(["--resume", "run"])


def test_a_run_that_was_not_cut_short_ends_with_a_verdict(small_base, monkeypatch, capsys):
    """Claim: the last line says whether the run is as expected, if it learned on the way (though not in its last five
    steps) or had all the steps that it may take; it says nothing about a run that was given fewer, or that was not
    asked about two hops.
    Fails if: main() looks at the end of the log only, at neither, or does not ask for eval/em_2hop.
    """
    verdict = lambda flags: train.main(SMALL + flags.split()) or capsys.readouterr().out.splitlines()[-1]
    assert "expected" not in verdict("--output-dir short")
    with monkeypatch.context() as patch:
        patch.setattr(train, "learned", lambda records, config: bool(records) and records[-1]["step"] == 1)
        assert "BELOW the expected 95% / 90%" in verdict("--steps 9 --cooldown 2 --output-dir learned")
    monkeypatch.setattr(train.Config, "steps", 2)
    assert "BELOW the expected 95% / 90%" in verdict("--output-dir whole")
    assert "expected" not in verdict("--eval-limit 1 --output-dir one")  # no two-hop question was asked


def test_searches_and_answers_by_hops_steer_the_next_questions(small_base):
    """Claim: the log has the searches and the exact match of one-hop and of two-hop questions, and the next step's share
    of two-hop questions comes from them, also in a run that is resumed.
    Fails if: train() gives draw the record of step 0 at every step, or a resumed run begins without one.
    """
    shares, share = [], data.two_hop_share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "two_hop_share", lambda record: shares.append(share(record)) or shares[-1])
        run = SMALL + "--batch-size 9 --save-every 1 --output-dir run --max-turns 2 --max-new-tokens 20".split()
        train.main(run + ["--steps", "2"])
        train.main(["--resume", "run", "--steps", "3"])
    lines = metrics("run")
    names = {f"env/{of}_{hops}hop" for of in ("searches", "em") for hops in (1, 2)}
    assert all(names <= set(line) for line in lines[1:])
    assert shares == [share(line) for line in lines[:3]] and len(set(shares)) > 1


def test_a_run_killed_before_its_first_checkpoint_begins_anew(small_base, monkeypatch):
    """Claim: killed in step 2 without a checkpoint, half a line at the end of its log, a resumed run is the run that
    was left alone. Killed after a checkpoint with half a line, too.
    Fails if: read_log takes a line without its newline (`if line.endswith(...)`), or restore keeps the logs.
    """
    run, log = SMALL + ["--steps", "3"], train.log
    train.main(run + ["--output-dir", "whole"])

    def torn(record, config):
        log(record, config)
        if record["step"] == 2:
            with open(f"{config.output_dir}/metrics.jsonl", "a") as file:
                file.write('{"step": 3, "rew')
            raise KeyboardInterrupt  # as if it were killed

    for save_every in ("0", "1"):
        monkeypatch.setattr(train, "log", torn)
        with pytest.raises(KeyboardInterrupt):
            train.main(run + ["--save-every", save_every, "--output-dir", "killed" + save_every])
        monkeypatch.setattr(train, "log", log)
        assert len(list(read_log(Path("killed" + save_every) / "metrics.jsonl"))) == 3
        train.main(["--resume", "killed" + save_every])
        assert metrics("killed" + save_every) == metrics("whole")


def test_of_two_processes_in_one_folder_the_second_refuses(small_base):
    """Claim: while a process trains in a folder, another one ends with one line, whether it begins or resumes a run
    there, before it loads anything. A lock that a dead process left behind stops nobody.
    Fails if: alone_in waits (timeout=-1), or takes the existence of its file for a lock, or main loads before it locks.
    """
    train.main(SMALL + ["--output-dir", "run"])
    assert Path("run/.lock").exists()
    with train.alone_in("run"), train.alone_in("new"), mock.patch.object(train, "load_run", None):
        for flags in (["--resume", "run", "--steps", "3"], [*SMALL, "--output-dir", "new"]):
            with pytest.raises(Mistake, match="another process trains in (run|new): wait for it"):
                train.main(flags)
    train.main(["--resume", "run", "--steps", "3"])


def test_old_checkpoints_go_and_the_best_one_stays(here):
    """Claim: of five checkpoints the newest two stay, and the one with the best evaluation, of equals the newer; one
    that was never evaluated is not the best. What a kill left unfinished goes. With keep 0 all stay. In each case only
    the newest keeps what resuming needs. Copies under longer names are left alone.
    Fails if: tidy takes the first of equal evaluations, or keeps the trainer state of the best, or data.checkpoints
    takes every "checkpoint-*".
    """
    for folder, keep, left in (("few", 2, [3, 5, 6]), ("all", 0, [1, 2, 3, 4, 5, 6])):
        for step in range(1, 7):
            here(f"{folder}/checkpoint-{step}/trainer_state.pt", {})
        here(f"{folder}/unfinished-9/trainer_state.pt", {})
        here(f"{folder}/checkpoint-1-mine/config.json", {}), here(f"{folder}/checkpoint-7.tar.gz", {})
        em = {1: 0.1, 2: 0.5, 3: 0.5, 5: 0.2, 6: 0.3}
        here(f"{folder}/metrics.jsonl", *({"step": step, "eval/em": value} for step, value in em.items()), {"step": 4})
        train.tidy(Path(folder), keep)
        kept = ["checkpoint-1-mine", *(f"checkpoint-{step}" for step in left), "checkpoint-7.tar.gz"]
        assert sorted(d.name for d in Path(folder).glob("*-*")) == sorted(kept)
        assert [state.parent.name for state in Path(folder).rglob("trainer_state.pt")] == ["checkpoint-6"]


def test_a_trainer_state_that_cannot_be_trusted_is_one_line(small_base):
    """Claim: a torn trainer_state.pt, and one that would run code when it is unpickled, end in one line; nothing runs.
    Fails if: restore loads with weights_only=False, or catches RuntimeError only.
    """

    class Payload:
        def __reduce__(self):
            return Path.touch, (Path("executed"),)

    train.main(SMALL + ["--output-dir", "run"])
    state = Path("run/checkpoint-2/trainer_state.pt")
    whole = state.read_bytes()
    torn = [whole[:size] for size in (0, 9000, len(whole) // 2)]  # torch reports them as three different errors
    for bad in (*torn, pickle.dumps(Payload(), protocol=2)):
        state.write_bytes(bad)
        with pytest.raises(Mistake, match="trainer_state.pt cannot be read: .*--model run/checkpoint-2") as ended:
            train.main(["--resume", "run", "--steps", "3"])
        assert "\n" not in str(ended.value)
    torch.save({"step": 2, "policy": Payload()}, state)
    with pytest.raises(Mistake, match="trainer_state.pt cannot be read"):
        train.main(["--resume", "run", "--steps", "3"])
    assert not Path("executed").exists()


def test_a_gradient_that_is_not_finite_is_skipped_and_the_third_in_a_row_ends_the_run(small_base, monkeypatch):
    """Claim: an update with a nan in its gradient changes no weight, is counted, and leaves no nan in the log; two in a
    row are survived; the third ends the run with one line, its steps saved. The critic's gradients count apart.
    Fails if: update steps without looking at the norm, models.broken is never set back to 0, or is one number.
    """
    loss, calls = train.reinforcement_loss, []

    def sometimes(broken):
        def changed(*args):
            calls.append(len(calls))
            value, metrics = loss(*args)
            if calls[-1] in broken:
                return value * math.nan, metrics | {"policy_loss": value * math.nan}
            return value, metrics

        calls.clear()
        return changed

    run = SMALL + "--steps 3 --minibatches 4 --entropy-coef 0.1 --output-dir".split()
    monkeypatch.setattr(train, "reinforcement_loss", sometimes({0, 1, 3, 5, 6}))
    train.main(run + ["survives"])
    lines = metrics("survives")
    assert [line.get("skipped_updates", 0) for line in lines] == [0, 3, 2, 0]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    monkeypatch.setattr(train, "reinforcement_loss", sometimes({6, 7, 8}))
    with pytest.raises(Mistake, match="three gradients of the policy in a row are not finite.*saved after step 2"):
        train.main(run + ["ends"])
    weights = AutoModelForCausalLM.from_pretrained("ends/checkpoint-2").state_dict().values()
    assert all(value.isfinite().all() for value in weights)
    monkeypatch.setattr(train, "reinforcement_loss", sometimes(range(99)))
    with pytest.raises(Mistake, match="three gradients of the policy"):
        train.main(run + "ppo --algo ppo --group-size 1 --critic-warmup-steps 0".split())


def test_resuming_changes_nothing_but_the_number_of_steps(small_base):
    """Claim: --resume refuses a flag with another value than the run had, and a run that is complete; the command that
    started the run, repeated with --resume and more steps, goes on with it, and the folder says so. A folder that is
    only called like a checkpoint is left alone. Adam is fused or not as the device wants it, wherever the run began.
    Fails if: resumed_config ignores what else was given, restore does not write the config, restore or tidy takes
    "checkpoint-*" for a step, or restore takes `fused` from the file.
    """
    run = SMALL + ["--device", "cpu", "--output-dir", "run"]
    train.main(run)
    for flags, message in (
        (["--resume", "run", "--lr", "1"], "with --lr 0.0005"),
        (run + ["--resume", "run"], "has all its 2 steps"),
    ):
        with pytest.raises(Mistake, match=message):
            train.main(flags)
    shutil.copytree("run/checkpoint-2", "run/checkpoint-best")  # somebody's copy
    state = torch.load("run/checkpoint-2/trainer_state.pt")
    state["policy_optimizer"]["param_groups"][0]["fused"] = True  # as on a GPU
    torch.save(state, "run/checkpoint-2/trainer_state.pt")
    train.main(run + ["--resume", "run", "--steps", "3"])
    (group,) = torch.load("run/checkpoint-3/trainer_state.pt")["policy_optimizer"]["param_groups"]
    assert group["fused"] is None
    assert [line["step"] for line in metrics("run")] == [0, 1, 2, 3]
    assert json.loads(Path("run/config.json").read_text())["steps"] == 3
    assert train.parse_config(["--resume", "run", "--steps", "9"]).output_dir == "run"


def begun(values, tmp_path, monkeypatch):
    """A folder "run" with a checkpoint and these values in its config.json."""
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoint-1").mkdir(parents=True, exist_ok=True)
    Path("run/checkpoint-1/trainer_state.pt").touch()
    Path("run/config.json").write_text(json.dumps(values))


def test_a_resumed_run_may_lower_what_bounds_memory(tmp_path, monkeypatch):
    """Claim: the flags that an out-of-memory line asks to lower may differ in --resume, the rank of the adapters may
    not. The values are checked as a new run's are.
    Fails if: RESUME_MAY_CHANGE loses one of them, or resumed_config does not call check_config.
    """
    begun({"steps": 9, "lr": 0.5}, tmp_path, monkeypatch)  # of an older version: newer flags are missing
    config = train.parse_config("--resume run --slots 8 --micro-batch-tokens 512 --gradient-checkpointing".split())
    assert (config.slots, config.micro_batch_tokens, config.gradient_checkpointing) == (8, 512, True)
    assert config.lr == 0.5
    with pytest.raises(Mistake, match="--lora-rank 0"):
        train.parse_config("--resume run --lora-rank 4".split())
    with pytest.raises(Mistake, match="--slots 2: a group of 5"):
        train.parse_config("--resume run --slots 2".split())


@pytest.mark.parametrize("name, value", [("retriever", "exact"), ("save_hidden", ""), ("colour", "blue")])
def test_a_run_of_an_earlier_version_goes_on_or_is_refused_in_one_line(tmp_path, monkeypatch, name, value):
    """Claim: a run that is older than a flag resumes with the flag's default. A run with a flag that is gone is refused
    in one line that names the flag.
    Fails if: resumed_config fills nothing in, or drops unknown flags without a look.
    """
    saved = asdict(train.Config(steps=9, lr=0.25, output_dir="elsewhere"))
    del saved["kl"]  # which is younger than such a run
    begun(saved, tmp_path, monkeypatch)
    want = train.Config(steps=9, lr=0.25, kl="k3", resume="run", output_dir="run")
    assert train.parse_config(["--resume", "run"]) == want
    with pytest.raises(Mistake, match="with --kl k3"):
        train.parse_config(["--resume", "run", "--kl", "exact"])
    begun(saved | {name: value}, tmp_path, monkeypatch)
    with pytest.raises(Mistake, match=f"made by another version, with flags that are gone: {name}$") as refused:
        train.parse_config(["--resume", "run"])
    assert "\n" not in str(refused.value)


def test_the_settings_of_an_older_checkpoint_are_read(tmp_path):
    """Claim: search_r1.json, as every version has written it, gives the conversation's settings and what else is known
    of the checkpoint; what an old file does not say is filled in.
    Fails if: load_settings looks for one of these keys without a default, or takes the paper's settings for a file's.
    """
    settings = {"max_turns": 2, "max_new_tokens": 20, "max_obs_length": 30, "max_length": 99, "top_k": 5}
    settings |= {"do_search": True, "invalid_message": "paper"}
    about = {"world_seed": 7, "corpus": "passages.jsonl"}
    later = {"encoder": "intfloat/e5-base-v2", "method": "rejection", "base": "Qwen/Qwen2.5-0.5B"}
    (tmp_path / "search_r1.json").write_text(json.dumps(settings | about | later))
    want = Settings(2, 20, 30, 99, 5, True, "paper")
    assert data.load_settings(tmp_path) == data.load_settings(tmp_path, real=True) == (want, about | later)
    for do_search, method in ((True, "search-r1"), (False, "r1")):
        (tmp_path / "search_r1.json").write_text(json.dumps(settings | about | {"do_search": do_search}))
        filled = about | {"encoder": "hashed", "method": method, "base": None}
        assert data.load_settings(tmp_path) == (replace(want, do_search=do_search), filled)


# ----- Runs of every family, short of memory or not -----


def short_run(policy, tokenizer, out, steps=2, resume="", **values):
    """train.train, two questions and four rollouts a step, without load_run."""
    sizes = {"batch_size": 2, "group_size": 2, "minibatches": 2, "eval_every": 9, "max_turns": 1, "max_new_tokens": 3}
    rates = {"lr": 1e-2, "cooldown": 0, "warmup_steps": 1, "critic_warmup_steps": 0}  # whatever the number of steps
    learns = {"entropy_coef": 0.1, "reward": "format"}  # something to learn, whatever the rewards
    run = {"preset": "tiny", "model": "files", "steps": steps, "output_dir": out, "resume": resume}
    Path(out).mkdir(exist_ok=True)
    names = ("kinake", "zofozu", "vaseru", "lamira")
    asked = [Question(str(i), f"who is {name}?", ("gugoton",)) for i, name in enumerate(names)]
    draw = lambda step, _: random.Random(step).sample(asked, 2)
    task = train.Task(tokenizer, lambda queries, k: [PASSAGES[:1]] * len(queries), draw, [], asked[:1])
    train.train(train.Config(**sizes | rates | learns | run | values), copy.deepcopy(policy), task)


def loud_model(kind, tokenizer, dtype=torch.float32):
    """A random model of a family, over the tokenizer's vocabulary, that opens and closes tags now and then."""
    ids = [tokenizer.convert_tokens_to_ids(tag) for tag in LOUD]
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": 0}
    return shaped(kind, False, dtype, len(tokenizer), loud=ids, **ends)


@pytest.mark.parametrize(
    "kind, algo, rank, dtype",
    [
        ("Qwen2", "ppo", 2, torch.float32),
        ("Qwen3", "grpo", 2, torch.float32),
        ("Llama", "ppo", 0, torch.float32),
        ("Qwen2", "ppo", 0, torch.bfloat16),
        ("Llama", "grpo", 2, torch.bfloat16),
    ],
)
def test_every_family_trains_with_adapters_and_without_and_resumes_exactly(
    tokenizer, tmp_path, kind, algo, rank, dtype
):
    """Claim: two steps of PPO and GRPO, adapters or full, fp32 or bf16, log the same numbers whether or not the run
    ended after step 1 and was resumed; something was learned, all values are numbers, the checkpoints' weights are
    equal.
    Fails if: save_checkpoint writes the rounded parameters instead of the masters, or restore leaves out the critic.
    """
    policy, whole, parts = loud_model(kind, tokenizer, dtype), str(tmp_path / "whole"), str(tmp_path / "parts")
    how = {"algo": algo, "lora_rank": rank, "kl_in": "reward" if algo == "ppo" else "loss"}
    run = functools.partial(short_run, policy, tokenizer, gradient_checkpointing=rank > 0, **how)
    run(whole)
    run(parts, steps=1)
    run(parts, resume="yes")
    assert metrics(whole)[2] == metrics(parts)[2]
    last = metrics(whole)[-1]
    assert last["grad_norm"] > 0 and all(v == v for v in last.values())
    assert ("critic_grad_norm" in last) == (algo == "ppo")
    a, b = (load_file(Path(folder) / "checkpoint-2" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == dtype for key in a)


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
SHORT_OF_MEMORY = (
    "in rollouts or an evaluation lower --slots (now all 4), in updates --micro-batch-tokens (now 4096) or add "
    "--gradient-checkpointing, in loading take --lora-rank 16 or a smaller --preset"
)


@pytest.fixture(scope="module")
def enough(tokenizer, tmp_path_factory):
    """Metrics of the run that had enough memory, made once."""
    out = tmp_path_factory.mktemp("enough")
    short_run(loud_model("Qwen3", tokenizer), tokenizer, str(out), algo="grpo", lora_rank=2)
    return metrics(out)


@pytest.mark.parametrize(
    "function, calls, error, saved",
    [
        ("rollout", 0, torch.OutOfMemoryError("CUDA out of memory."), 0),
        ("rollout", 1, torch.OutOfMemoryError("CUDA out of memory."), 1),
        ("token_rewards", 1, CPU_ERROR, 1),
        ("policy_loss", 2, CPU_ERROR, 1),
        ("policy_loss", 3, CPU_ERROR, 1),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_flags_and_loses_no_step(
    tokenizer, enough, monkeypatch, tmp_path, function, calls, error, saved
):
    """Claim: memory that runs out in step 1 or 2 ends the run with the flags to lower; the steps before it are saved,
    and resumed it is the run that had enough. If the step had moved the policy already, the line says so.
    Fails if: shortage_named knows the CUDA class only, orderly_end saves the next step, or update does not count
    (`models.updates += 1` is dropped).
    """
    monkeypatch.chdir(tmp_path)
    run = functools.partial(short_run, loud_model("Qwen3", tokenizer), tokenizer, "broken", algo="grpo", lora_rank=2)
    works, left = getattr(train, function), [calls]

    def breaks(*args, **values):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return works(*args, **values)

    monkeypatch.setattr(train, function, breaks)
    with pytest.raises(Mistake) as ended:
        run()
    text = str(ended.value)
    assert text.startswith(f"out of memory; {SHORT_OF_MEMORY}") and "\n" not in text
    assert f"saved after step {saved}" in text and text.endswith("continue with: python train.py --resume broken")
    assert ("with 1 of the 2 updates of step 2" in text) == (calls == 3)
    monkeypatch.setattr(train, function, works)
    run(resume="yes")
    assert (metrics("broken") == enough) == (calls != 3) and len(metrics("broken")) == 3


def test_out_of_memory_in_an_evaluation_costs_the_evaluation_only(tokenizer, enough, monkeypatch, tmp_path):
    """Claim: memory that runs out in the last evaluation ends the run with the flag to lower; the step before it is
    logged and saved. All steps are done, so the line points to the evaluation: --resume would refuse.
    Fails if: orderly_end() catches SearchFailed alone, or does not compare the step with config.steps.
    """
    evaluate, left = train.evaluate, [1]  # the first evaluation has enough

    def breaks(*args, **values):
        left[0] -= 1
        if left[0] < 0:
            raise CPU_ERROR
        return evaluate(*args, **values)

    monkeypatch.setattr(train, "evaluate", breaks)
    with pytest.raises(Mistake) as ended:
        short_run(loud_model("Qwen3", tokenizer), tokenizer, str(tmp_path), algo="grpo", lora_rank=2)
    text = str(ended.value)
    assert text.startswith(f"out of memory; {SHORT_OF_MEMORY}") and "\n" not in text
    assert text.endswith(f"saved after step 2, see: python eval.py --checkpoint {tmp_path}")
    assert (tmp_path / "checkpoint-2/trainer_state.pt").exists()
    assert metrics(tmp_path)[:2] == enough[:2] and metrics(tmp_path)[2].items() <= enough[2].items()


def test_out_of_memory_while_loading_and_other_errors(monkeypatch, tmp_path):
    """Claim: a model that does not fit ends with one line that names --lora-rank; an error that is no shortage of
    memory keeps its class and its traceback.
    Fails if: main() does not guard load_run, or shortage_named turns every RuntimeError into a Mistake.
    """
    monkeypatch.chdir(tmp_path)
    for error, kind, message in (
        (CPU_ERROR, Mistake, "out of memory; .* in loading take --lora-rank 16"),
        (RuntimeError("odd"), RuntimeError, "odd"),
    ):
        monkeypatch.setattr(train, "load_run", lambda config: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match=message):
            train.main([])


# ----- Models and questions from files -----


@pytest.fixture()
def real_shape(tmp_path, monkeypatch):
    """Files in the official formats, and a two-layer Qwen3 with a byte-level BPE tokenizer and a ChatML template. No
    time is spent on pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_runs", lambda runs, path: path.touch())
    towns = [f"Town {chr(65 + i)}{i}" for i in range(24)]
    about = "lies on the river Number {i}, and its mayor is called Person {i}. Ünïcode; naïve."
    texts = [f'"{town}"\n{town} {about.format(i=i)}' for i, town in enumerate(towns)]
    passages = [{"id": str(i), "contents": text} for i, text in enumerate(texts)]
    questions = [
        {"id": f"q{i}", "question": f"Who is the mayor of {t}", "golden_answers": [f"Person {i}"],
         "metadata": {"context": {"title": [t], "sentences": [[text.partition("\n")[2]]]}}}
        for i, (t, text) in enumerate(zip(towns, texts))
    ]
    for name, records in (("passages", passages), ("questions", questions)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=special)
    bpe.train_from_iterator([searchr1.TEMPLATE, searchr1.INVALID_ACTION, *texts], trainer)
    message = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    chatml = "{% for m in messages %}" + message + "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    several = {"default": chatml, "tool_use": chatml}  # transformers saves the second one in a subfolder
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": several}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)
    random_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return "--model model --train-data questions.jsonl --corpus passages.jsonl".split()


def test_the_cold_start_shows_the_form_and_no_answer(real_shape, monkeypatch):
    """Claim: --algo format trains on whole conversations in the right form: one or two searches for words of the
    question, then what the untrained model reads. Its own tokens are trained, all of them, passages are not; with other
    gold answers the conversations are the same. The short prompt is saved with the checkpoint.
    Fails if: poor_policy takes r.question.gold_answers, outcome_advantages weighs format by the reward, or prompt_ids
    does not look at settings.prompt.
    """
    trained, advantages, collate, outcome = [], [], train.collate, train.outcome_advantages
    monkeypatch.setattr(train, "collate", lambda rows, *a, **k: trained.append(rows) or collate(rows, *a, **k))
    monkeypatch.setattr(train, "outcome_advantages", lambda *a: advantages.append(outcome(*a)) or advantages[-1])
    lengths = "--steps 1 --batch-size 5 --max-new-tokens 70 --max-obs-length 90 --max-length 500 --eval-limit 1"
    flags = f"--preset laptop --algo format --eval-data questions.jsonl {lengths} --output-dir".split()
    train.main(real_shape + flags + ["run"])
    text = Path("questions.jsonl").read_text()
    Path("questions.jsonl").write_text(text.replace('"golden_answers": ["Person', '"golden_answers": ["Nobody'))
    train.main(real_shape + flags + ["other"])
    rollouts, others = trained
    assert [r.ids for r in rollouts] == [r.ids for r in others] and len(rollouts) > 3
    tokenizer = AutoTokenizer.from_pretrained("model")
    assert {r.num_searches for r in rollouts} == {1, 2}
    for r in rollouts:
        assert searchr1.check_format(searchr1.policy_view(r))[0] and r.answer is not None
        assert all(set(query.split()) <= set(r.question.text.split()) for query in r.searches)
        own = [i for i, mine in zip(r.ids, r.response_mask) if mine]
        assert tokenizer.decode(own) == "".join(r.turns) and len(r.found) == len(r.turns)
        prompt = f"Search, read, then answer. Question: {r.question.text}?"
        assert tokenizer.decode(r.ids[: r.prompt_length]).startswith("<|im_start|>user\n" + prompt)
    assert all((batch.advantages_BT == batch.mask_BT).all() for batch in advantages)
    assert data.load_settings("run/checkpoint-1", real=True)[0].prompt == "short"
    assert [set(line) & {"kl", "kl_exact"} for line in metrics("run")] == [set(), set()]  # beta is 0: no reference


def test_the_cold_start_shows_no_conversation_that_a_budget_cut(tokenizer):
    """Claim: the conversations shown are whole. One whose turn is too long, which an invalid turn would follow, and one
    that ends while its passages come in, are left out.
    Fails if: format_examples does not look at num_valid_actions, or poor_policy hands passages over by
    talk.generator.send.
    """
    questions = [Question(str(i), "who is kinake born in? " * 4, ("x",)) for i in range(12)]
    task = SimpleNamespace(tokenizer=tokenizer, search=lambda queries, k: [PASSAGES[:1]] * len(queries))

    def shown(max_new_tokens, max_length):
        settings, rng = Settings(2, max_new_tokens, 40, max_length, 1, prompt="short"), random.Random(max_length)
        return train.format_examples(random_model(tokenizer), task, questions, settings, rng, None)

    assert 0 < len(shown(34, 160)) < 12 and all(len(r.turns) == r.num_valid_actions for r in shown(34, 160))
    for max_new_tokens, max_length in [(30, 160), (34, 60), (34, 61), (34, 68)]:
        with pytest.raises(Mistake, match="no conversation reaches its answer"):
            shown(max_new_tokens, max_length)


def test_a_tag_in_a_question_ends_the_query_of_a_cold_start(tokenizer):
    """Claim: a question that holds a closing tag closes the poor policy's query early. What it would have said after
    that is dropped, and not taken for passages.
    Fails if: say goes on although the conversation waits for passages (`if talk.query is None:` -> `if True:`).
    """
    questions = [Question(str(i), "who </search> is kinake", ("x",)) for i in range(12)]
    task = SimpleNamespace(tokenizer=tokenizer, search=lambda queries, k: [PASSAGES[:1]] * len(queries))
    settings, rng = Settings(2, 60, 40, 400, 1, prompt="short"), random.Random(0)
    shown = train.format_examples(random_model(tokenizer), task, questions, settings, rng, None)
    assert shown and any("</search> is" not in turn and "</search>" in turn for r in shown for turn in r.turns)


def test_easy_questions_come_first(here):
    """Claim: --easy-first orders the first epoch by hops, then by the place of the first passage with a gold answer
    when the question itself is the query; the second epoch is shuffled, and so is every one without the flag. The
    engine is asked for 512 questions at a time and has the patience that was asked for. A question that does not fit a
    conversation is found before the run begins.
    Fails if: draw() sorts every epoch, sorts without the flag (`rank and` dropped), or forgets the hops; first_ranks
    counts a passage without a gold answer; load_run leaves out `begin`.
    """
    passages = [(f"Hill {i}", f"hill {i} of the fog is {word}") for i, word in enumerate(("red", "blue", "green"))]
    here("p.jsonl", *[{"id": str(i), "contents": f'"{t}"\n{text}'} for i, (t, text) in enumerate(passages)])
    answers = {"hill 0 fog": "green", "hill 1 fog": "blue", "hill 2 fog": "nowhere", "hill 1 of fog": "blue"}
    hops = (1, 2, 1, 1)
    questions = [Question(str(i), text, (gold,), hops[i]) for i, (text, gold) in enumerate(answers.items())]
    search = engine_from("bm25:p.jsonl").search
    ranks = train.first_ranks(questions, search)
    assert ranks[questions[1]] == ranks[questions[3]] == 0 and ranks[questions[0]] in (1, 2)
    assert ranks[questions[2]] == 3
    unknown = Question("4", "xyzzy", ("green",), 1)  # BM25 finds nothing for it
    assert search([unknown.text], 3) == [[]] and train.first_ranks([unknown], search) == {unknown: 3}
    calls = []
    train.first_ranks(questions * 200, lambda asked, most: calls.append(len(asked)) or search(asked, most))
    assert calls == [512, 288]
    record = lambda q: {"question": q.text, "golden_answers": list(q.gold_answers), "metadata": {"hops": q.hops}}
    here("q.jsonl", *[{"id": q.id} | record(q) for q in questions])
    random_model(data.make_tokenizer()).save_pretrained("model")
    data.make_tokenizer().save_pretrained("model")
    files = "--model model --train-data q.jsonl --eval-data q.jsonl --corpus bm25:p.jsonl --batch-size 4".split()
    _, task = train.load_run(train.parse_config(files + ["--easy-first", "--search-patience", "7"]))
    assert task.search.__self__.patience == 7
    assert [q.id for q in task.draw(1, {})] == ["3", "0", "2", "1"]
    assert any([q.id for q in task.draw(step, {})] != ["3", "0", "2", "1"] for step in range(2, 12))
    assert all(sorted(q.id for q in task.draw(step, {})) == ["0", "1", "2", "3"] for step in range(1, 12))
    with pytest.raises(Mistake, match="'hill 1 of fog'.* has 7 tokens and max_length is 7: shorten"):
        train.load_run(train.parse_config(files + ["--max-length", "7"]))
    seeds = [train.load_run(train.parse_config(files + ["--seed", str(seed)]))[1] for seed in range(3)]
    assert any([q.hops for q in task.draw(1, {})] != [1, 1, 1, 2] for task in seeds)


def test_a_tracker_gets_the_lines_of_the_log(small_base, monkeypatch):
    """Claim: --wandb PROJECT sends every line of metrics.jsonl under its step; without the package one line says so.
    Fails if: log() leaves the tracker out or writes the line first, or the ImportError is not caught.
    """
    sent, begun = [], []
    run = SimpleNamespace(log=lambda record, step: sent.append((step, record)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: begun.append(how) or run))
    train.main(SMALL + ["--steps", "2", "--wandb", "course", "--output-dir", "run-w"])
    assert [record for _, record in sent] == [json.loads(line) for line in Path("run-w/metrics.jsonl").open()]
    assert [step for step, _ in sent] == [0, 1, 2]
    assert [(how["project"], how["id"], how["resume"]) for how in begun] == [("course", "run-w", "allow")]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Mistake, match="--wandb needs its package: pip install wandb"):
        train.main(SMALL + ["--steps", "1", "--wandb", "course", "--output-dir", "run-v"])
    assert not Path("run-v/metrics.jsonl").exists()  # so the same command works once the package is there


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_real_models_folder_trains_on_files_with_the_official_prompt_and_format(real_shape, algo, monkeypatch):
    """Claim: --model DIR with question and passage files runs the same loop: the official prompt in the model's chat
    template, the official information block, checkpoints that load, with all chat templates of the tokenizer.
    Fails if: the tiny preset's lengths or messages are used (`preset` fixed to "tiny" in parse_config), or
    save_checkpoint opens folders (`filter(Path.is_file, unfinished.rglob("*"))` -> `unfinished.iterdir()`).
    """
    # An untrained model never closes a tag; let every third turn do so, so that passages really enter conversations.
    parse, search, turn = searchr1.parse_action, searchr1.Action("search", "mayor of Town B1"), itertools.count()
    monkeypatch.setattr(searchr1, "parse_action", lambda text: parse(text) if next(turn) % 3 else search)
    if algo == "grpo":  # one picture is enough
        monkeypatch.setattr(train, "plot_runs", plot_runs)
    flags = f"--algo {algo} --steps 2 --batch-size 3 --group-size 2 --max-new-tokens 10 --max-turns 2 --eval-limit 2"
    train.main(real_shape + flags.split() + ["--output-dir", "run"])
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"].startswith("<|im_start|>user\nAnswer the given question.")
    assert samples[0]["prompt"].endswith("?\n<|im_end|>\n<|im_start|>assistant\n")
    text = "".join(s["transcript"] for s in samples)
    assert '\n\n<information>Doc 1(Title: "Town B1") Town B1 lies on the river Number 1' in text
    assert searchr1.INVALID_ACTION in text
    assert json.loads(Path("run/config.json").read_text())["preset"] == "real"
    assert algo == "ppo" or Path("run/curves.png").stat().st_size > 20000
    AutoModelForCausalLM.from_pretrained("run/checkpoint-2")
    assert Path("run/checkpoint-2/additional_chat_templates/tool_use.jinja").exists()
    ids = AutoTokenizer.from_pretrained("run/checkpoint-2")(searchr1.TEMPLATE)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained("model")(searchr1.TEMPLATE)["input_ids"]


@pytest.mark.parametrize(
    "algo, prompt",
    [("sft", "Answer the given question from what you know."), ("rejection", "Answer the given question. You must")],
)
def test_a_fine_tuned_checkpoint_is_evaluated_as_it_was_trained(real_shape, capsys, algo, prompt):
    """Claim: --algo sft and rejection run on files, too; eval.py then asks the checkpoint in the form it was trained
    in. The command that train.py prints last is complete, with the question file where the corpus is made of it.
    Fails if: save_checkpoint leaves the method out, or main the `files`.
    """
    flags = f"--algo {algo} --steps 1 --batch-size 2 --max-new-tokens 6 --max-turns 1 --eval-limit 1 --output-dir run"
    train.main(real_shape[:-1] + ["contexts", *flags.split()])
    assert capsys.readouterr().out.splitlines()[-1].endswith(" --data questions.jsonl")
    flags = "--checkpoint run/checkpoint-1 --data questions.jsonl --corpus passages.jsonl --limit 2 --json out.json"
    eval_main(flags.split())
    records = json.loads(Path("out.json").read_text())["records"]
    assert len(records) == 2 and all(r["method"] == algo and f"user\n{prompt}" in r["prompt"] for r in records)
    assert "2 questions (questions.jsonl), greedy" in capsys.readouterr().out


def test_files_are_gone_through_in_epochs(real_shape):
    """Claim: each epoch visits every training question once, in its own order, and draw needs no earlier step.
    Fails if: draw starts every epoch with the same permutation, or samples with replacement.
    """
    config = train.parse_config(real_shape + ["--batch-size", "11"])
    _, task = train.load_run(config)
    epochs = [[q.id for step in (2 * e + 1, 2 * e + 2) for q in task.draw(step, {})] for e in range(2)]
    assert len(task.held_out) == 2 and len(set(epochs[0])) == len(set(epochs[1])) == 22 and epochs[0] != epochs[1]
    assert {q.id for q in task.held_out}.isdisjoint(epochs[0]) and [q.id for q in task.draw(3, {})] == epochs[1][:11]


# ----- Flags and mistakes -----

FILES = "--model model --train-data questions.jsonl --corpus passages.jsonl"
MISTAKES = [
    ("--steps 0", "--steps 0: must be above 0"),
    ("--steps many", "invalid int value"),
    ("--algo dpo", "invalid choice"),
    ("--device gpu", "invalid choice"),
    *([] if torch.cuda.is_available() else [("--device cuda", "--device cuda: torch finds none here")]),
    *([] if torch.mps.is_available() else [("--device mps", "--device mps: torch finds none here")]),
    ("--stepz 3", "unrecognized arguments: --stepz"),
    ("--temperature 0", "--temperature 0.0"),
    ("--kl-coef -1", "--kl-coef -1.0: cannot be negative"),
    ("--adam-beta2 1", "--adam-beta2 1.0"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999: must lie within"),
    ("--seed -9999999999999", "--seed -9999999999999: must lie within"),
    ("--slots 2", "a group of 5"),
    ("--algo sft --group-size 5", "one example a question"),
    ("--kl exact --kl-in reward", "--kl exact is a loss"),
    ("--kl exact --algo rejection", "--kl exact: --algo rejection has no KL in its loss"),
    ("--kl-coef 0.1 --algo rejection", "--kl-coef 0.1: --algo rejection takes no KL"),
    ("--clip-eps -0.2", "--clip-eps -0.2: must be above 0"),
    ("--value-clip 0", "--value-clip 0.0: must be above 0"),
    ("--gamma 2", "--gamma 2.0, --lam 1.0: each must be from 0 to 1"),
    ("--lam -0.1", "--gamma 1.0, --lam -0.1: each must be from 0 to 1"),
    ("--eval-limit -1", "--eval-limit -1: cannot be negative"),
    ("--preset real", "--preset real needs --model"),
    ("--eval-data q.jsonl", "--eval-data needs --train-data"),
    ("--model nowhere", "--train-data"),
    ("--train-data q.jsonl", "--corpus"),
    ("--train-data q.jsonl --corpus p.jsonl", "--model, --train-data and --corpus go together"),
    (FILES.replace("model model", "model nowhere"), "no causal LM"),
    (FILES.replace("model model", "model empty"), "holds no model"),
    (FILES.replace("questions", "gone"), "cannot read gone.jsonl"),
    (FILES.replace("questions", "passages"), "passages.jsonl line 1"),
    (FILES.replace("passages", "questions"), "questions.jsonl line 1"),
    (FILES + " --batch-size 50", "--batch-size is 50"),
    (FILES + " --max-length 100", "--max-length"),
    ("--resume nowhere", "nowhere is no folder of a run"),
    ("--resume bare", "no checkpoint in bare has the trainer_state.pt"),
    ("--resume list/run --output-dir old", "goes on with --output-dir list/run, not with old"),
    ("--resume bare/checkpoint-3", "that is a checkpoint; give its run, "),
    ("--resume list", "list is no folder of a run"),
    ("--output-dir old", "holds a run already"),
    ("--algo format", "--algo format is the cold start of --preset laptop"),
    ("--algo format --preset laptop --no-search", "--algo format shows how to search"),
    ("--algo format --preset laptop --max-turns 0", "--algo format shows how to search"),
    ("--redraws 1 --algo ppo", "--redraws 1: a group of one has no spread"),
    ("--redraws 1 --shuffle-rewards", "--redraws 1: shuffled rewards say nothing about a group"),
    ("--easy-first", "--easy-first needs --model"),
    ("--lora-layers 2", "--lora-layers 2: without --lora-rank there are no adapters"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(real_shape, capsys, flags, message):
    """Claim: a user's mistake never ends in a traceback: one line that names it, exit code 2.
    Fails if: run_main lets Mistake through, or Parser.error prints the usage.
    """
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/metrics.jsonl").touch()
    Path("bare/checkpoint-3").mkdir(parents=True)
    Path("bare/config.json").write_text("{}")
    Path("bare/checkpoint-3/search_r1.json").write_text("{}")
    Path("list/run/checkpoint-3").mkdir(parents=True)
    Path("list/run/checkpoint-3/trainer_state.pt").touch()
    for file, text in (("list/config.json", "[]"), ("list/run/config.json", "{}")):
        Path(file).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: train.main(flags.split()))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


def commands():
    """(script, flags) of every `python train.py|eval.py|retrieval.py` and `python -m course.NAME` in the documents."""
    documents = (ROOT / "README.md", ROOT / "figures/README.md", *sorted((ROOT / "course").glob("*.md")))
    cells = json.loads((ROOT / "course/colab.ipynb").read_text())["cells"]
    pattern = r"python (?:(train|eval|retrieval)\.py|-m (course\.\w+))([^\n`|#&]*)"
    for text in [document.read_text() for document in documents] + ["".join(cell["source"]) for cell in cells]:
        for script, module, flags in re.findall(pattern, text):
            yield script or module, flags


def test_the_readmes_flags_exist(tmp_path, monkeypatch):
    """Claim: the documents show commands that work: train.py takes every one of its command lines, with these values,
    and every flag of eval.py, retrieval.py and the course's scripts stands in the script.
    Fails if: a flag that the README uses is renamed in the script.
    """
    found = list(commands())
    assert {script for script, flags in found if "--" in flags} >= {"train", "eval", "retrieval", "course.studies"}
    monkeypatch.chdir(tmp_path)
    for script, flags in found:
        if script == "train":
            given = train.parse_flags(shlex.split(flags))
            if "resume" not in given:
                train.parse_config(given)
            continue
        source = (ROOT / (script.replace(".", "/") + ".py")).read_text()
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in source, (script, flag)
