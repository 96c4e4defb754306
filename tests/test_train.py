"""Claims about the loop, on models too small to learn anything: what is checked is that the arithmetic is right."""

import copy
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

import bench_kernels
import bench_memory
import data
import kernels
import searchr1
import train
from conftest import random_model
from eval import Mistake, plot_runs, run_main
from eval import main as eval_main
from retrieval import Passage, SearchFailed

SMALL = (
    "--batch-size 5 --group-size 4 --eval-limit 3 --eval-every 2 --steps 2 --reward format --max-turns 1 --max-new-tokens 8".split()
)


make_world = functools.lru_cache(data.make_world)


@pytest.fixture()
def small_base(monkeypatch, tmp_path, tokenizer, engine):
    """A run in an empty folder, with a random model in place of the base model, that now and then answers something, and
    no time spent on pictures (the runs on files draw theirs)."""
    monkeypatch.chdir(tmp_path)
    model = random_model(tokenizer, loud=("<search>", "</search>", "<answer>", "</answer>"), layers=1)
    monkeypatch.setattr(data, "base_model", lambda config, cache: (copy.deepcopy(model), tokenizer, "random"))
    monkeypatch.setattr(train, "plot_runs", lambda runs, path: path.touch())
    monkeypatch.setattr(data, "make_world", make_world)  # once for all tests, and without asking the oracle (test_data does)
    monkeypatch.setattr(data, "oracle_exact_match", lambda *_: 1.0)
    monkeypatch.setattr("eval.build_index", lambda passages: engine)


def metrics(folder):
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("timing") and k != "tokens_per_s"} for line in lines]


def a_batch(tokenizer, model, group_size=4):
    """Rollouts of a random model as a Batch with advantages from made-up rewards, reference log-probs and values."""
    found = [Passage("0", "kinake", "kinake lives in gugoton.")]
    rollouts = searchr1.rollout(
        model,
        tokenizer,
        ["who is kinake?", "what is the city where kinake was born?"],
        lambda q, k: [found] * len(q),
        group_size,
        3,
        12,
        40,
        200,
        temperature=1.0,
        invalid_message=searchr1.RETHINK,
        generator=torch.Generator().manual_seed(3),
    )
    batch = searchr1.collate(rollouts)
    rewards = torch.tensor([1.0, 0, 0, 0] * 2)
    batch.advantages_BT = searchr1.group_advantages(rewards, group_size)[:, None] * batch.mask_BT
    batch.ref_logprobs_BT = batch.old_logprobs_BT - 0.2 * batch.mask_BT
    batch.values_BT, batch.returns_BT = torch.zeros_like(batch.old_logprobs_BT), 1.0 * batch.mask_BT
    return batch, rewards


def sgd(model):
    """A learning rate of 1 without momentum: the change of the weights is minus the gradient."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


# ----- The update -----


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_micro_batches_equal_the_big_batch(tokenizer, model, algo):
    """Claim: a budget of one row a micro-batch moves policy and critic as one big batch does.
    Fails if: `share` is dropped in update (each micro-batch's mean would count alike), or is a share of rows.
    """
    batch, _ = a_batch(tokenizer, model)
    moved = []
    for budget in (10**6, 1):
        config = train.Config(
            algo=algo,
            minibatches=1,
            micro_batch_tokens=budget,
            lr=1.0,
            critic_lr=1.0,
            kl_coef=0.5,
            entropy_coef=0.1,
            max_grad_norm=1e9,
            warmup_steps=0,
            critic_warmup_steps=0,
        )
        policy, critic = copy.deepcopy(model), searchr1.Critic(model) if algo == "ppo" else None
        losses = train.update(
            train.Models(policy, model, critic, sgd(policy), sgd(critic) if critic else None), batch, 1, config, random.Random(0)
        )
        weights = torch.cat([p.detach().flatten() for m in (policy, critic) if m for p in m.parameters()])
        moved.append((weights, losses))
    start = torch.cat([p.flatten() for m in (model, critic and searchr1.Critic(model)) if m for p in m.parameters()])
    assert len({len(r) for r in batch.ids_BL}) == 1 and (moved[0][0] - start).abs().max() > 1e-3
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


def test_one_update_raises_the_logprob_of_the_rewarded_rollout(tokenizer, model):
    """Claim: after one small step, rollouts with reward 1 are more likely and the others, on the whole, less.
    Fails if: policy_loss loses its minus sign, or group_advantages returns each group in reverse.
    """
    batch, rewards = a_batch(tokenizer, model)
    batch.ref_logprobs_BT = batch.old_logprobs_BT
    policy = copy.deepcopy(model)
    config = train.Config(minibatches=1, warmup_steps=0, lr=1e-3)
    train.update(train.Models(policy, model, None, sgd(policy), None), batch, 1, config, random.Random(0))
    with torch.no_grad():
        change = (searchr1.token_logprobs(policy, batch.ids_BL, batch.mask_BT)[0] - batch.old_logprobs_BT).sum(1)
    assert (change[rewards == 1] > 0).all() and change[rewards == 0].mean() < 0


def test_the_loop_never_makes_a_wall_of_logits(tokenizer, model):
    """Claim: log-probs of the policy, the old policy and the reference are all computed without their lm_heads being run.
    Fails if: any of the three passes calls model(ids).logits.
    """
    config = train.Config(recompute_old_logprobs=True, kl_in="reward", micro_batch_tokens=300)
    batch, _ = a_batch(tokenizer, model)
    batch.old_logprobs_BT, batch.ref_logprobs_BT = torch.zeros_like(batch.old_logprobs_BT), None
    models = train.make_models(model, config)
    for network in (models.policy, models.reference):
        network.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the lm_head was run"))
    train.score_batch(models, batch, torch.ones(len(batch.ids_BL)), config)
    train.update(models, batch, 1, config, random.Random(0))
    assert (batch.old_logprobs_BT[batch.mask_BT] < 0).all() and (batch.ref_logprobs_BT[batch.mask_BT] < 0).all()


def test_save_hidden_writes_what_the_benchmark_measures(tokenizer, model, tmp_path, capsys):
    """Claim: the file holds the longest rows of the batch; its hidden states, weight, targets, mask and temperature give
    the log-probs that the sampler saw; and tests/bench_kernels.py --cases measures it without error.
    Fails if: hidden states and targets are not shifted against each other, or load_case forgets the temperature.
    """
    (batch, _), path = a_batch(tokenizer, model), str(tmp_path / "hidden.pt")
    train.save_hidden(model, batch, train.Config(save_hidden=path, micro_batch_tokens=300))
    rows = batch.lengths_B.argsort(descending=True, stable=True)[: 300 // batch.lengths_B.max()]
    want = batch.old_logprobs_BT[rows, : batch.lengths_B.max() - 1].flatten()
    arguments = bench_kernels.load_case(path, "cpu")
    assert arguments[3].sum() == batch.mask_BT[rows].sum() > 20
    torch.testing.assert_close(kernels.eager_logprob(*arguments), want, atol=1e-5, rtol=0)
    bench_kernels.main(["--cases", path, "--repeats", "1", "--skip", "compile", "tau"])
    assert len(re.findall(r"\| \d.*e-0[67] \|.*e-0[67] \|", capsys.readouterr().out)) >= 3  # errors of the rows that ran
    torch.save(torch.load(path) | {"temperature": 2.0}, path)
    want = kernels.eager_logprob(*arguments, temperature=2.0)
    torch.testing.assert_close(kernels.eager_logprob(*bench_kernels.load_case(path, "cpu")), want, atol=1e-5, rtol=0)


def test_the_kl_loss_pulls_towards_the_reference(tokenizer, model):
    """Claim: with no reward at all, a step brings the log-probs of the sampled tokens closer to the reference's: the k3
    that is logged as kl falls.
    Fails if: the KL term is subtracted in update (`+ config.kl_coef` -> `-`), a bug that the official code once had.
    """
    reference = random_model(tokenizer, seed=1)
    batch, _ = a_batch(tokenizer, model)
    batch.advantages_BT, batch.ref_logprobs_BT = torch.zeros_like(batch.old_logprobs_BT), None
    policy, logged = copy.deepcopy(model), []
    for _ in range(2):
        config = train.Config(minibatches=1, warmup_steps=0, kl_coef=1.0, lr=0.01)
        logged.append(
            train.update(train.Models(policy, reference, None, sgd(policy), None), batch, 1, config, random.Random(0))["kl"]
        )
    assert 0 < logged[1] < logged[0]


def test_kl_in_the_reward_is_k1_of_the_policys_tokens(tokenizer, model):
    """Claim: [Eq. 1, PPO] each token of the policy is charged beta (log pi - log pi_ref), the last one also gets the
    outcome; retrieved tokens get nothing.
    Fails if: score_batch adds the penalty instead of subtracting it, or `logprobs_under` scores all tokens and not the mask's.
    """
    reference = random_model(tokenizer, seed=1)
    batch, rewards = a_batch(tokenizer, model)
    token_rewards = train.score_batch(
        train.Models(model, reference, None, None, None), batch, rewards, train.Config(kl_in="reward", kl_coef=0.1)
    )
    with torch.no_grad():
        ref = torch.log_softmax(reference(input_ids=batch.ids_BL).logits[:, :-1], -1).gather(-1, batch.ids_BL[:, 1:, None])[..., 0]
    for row in range(8):
        own = batch.mask_BT[row].nonzero()[:, 0]
        want = -0.1 * (batch.old_logprobs_BT - ref)[row, own]
        want[-1] += rewards[row]
        torch.testing.assert_close(token_rewards[row, own], want, atol=1e-5, rtol=0)
        assert (token_rewards[row, ~batch.mask_BT[row]] == 0).all()


def test_groups_without_any_difference_in_reward_are_left_out(tokenizer, model):
    """Claim: [D10] a group of equal rewards is not trained on; if all groups are equal, all rows stay with advantage 0.
    Fails if: advantages() returns the batch as it is, or an empty one.
    """
    batch, _ = a_batch(tokenizer, model)
    config = train.Config(group_size=4)
    for value in (0.0, 1.0):
        same = train.advantages(batch, searchr1.rewards_at_end(torch.full((8,), value), batch.mask_BT), config)
        assert len(same.ids_BL) == 8 and (same.advantages_BT == 0).all()
    kept = train.advantages(batch, searchr1.rewards_at_end(torch.tensor([0.0] * 4 + [1.0, 0, 0, 0]), batch.mask_BT), config)
    assert kept.ids_BL.shape[0] == 4 and kept.lengths_B.tolist() == batch.lengths_B[4:].tolist()


def test_the_learning_rate_warms_up_and_decays():
    """Claim: [D11] linear to 1 over the warm-up, never 0; constant to half-way, then linear to a tenth at the end.
    Fails if: the warm-up counts from step - 1.
    """
    config = train.Config(steps=100)
    got = [train.learning_rate_factor(step, 4, config) for step in (1, 2, 4, 50, 75, 100)]
    assert got == pytest.approx([0.25, 0.5, 1, 1, 0.55, 0.1])
    assert train.learning_rate_factor(100, 5, train.Config(steps=100, lr_decay=False)) == 1


# ----- Whole runs -----


def test_every_rollout_is_paid_for_its_own_question(small_base, monkeypatch):
    """Claim: in the loop, rollout i is scored against the gold answers of the question that it was asked.
    Fails if: golds are repeated group by group in train() (`for q in questions for _ in range(...)` -> loops swapped).
    """
    asked, rewards = [], train.rewards
    monkeypatch.setattr(
        train, "rewards", lambda rollouts, golds, *rest: asked.extend(zip(rollouts, golds)) or rewards(rollouts, golds, *rest)
    )
    train.main(SMALL + ["--steps", "1", "--output-dir", "run"])
    gold = {q.question: q.golden_answers for q in data.make_world(0).train}
    assert len(asked) == 20 and all(gold[r.question] == answers for r, answers in asked)


def test_the_same_seed_gives_the_same_metrics_twice(small_base):
    """Claim: two runs of one command log the same numbers (but for times), another seed others; something was learned.
    Fails if: a generator is left unseeded (`generator=generator` dropped from the rollout).
    """
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(SMALL + ["--steps", "1", "--output-dir", name, "--seed", str(seed)])
    assert metrics("a") == metrics("b") != metrics("c")
    assert any(line.get("grad_norm", 0) > 0 for line in metrics("a"))


@pytest.mark.parametrize("flags", [["--algo", "grpo"], ["--algo", "reinforce", "--kl-in", "reward"]])
def test_a_resumed_run_is_the_uninterrupted_run(small_base, flags):
    """Claim: killed after step 1 of 2 and resumed, the metrics and weights are those of a run that was left alone.
    Fails if: restore() forgets the optimiser, or a step's randomness depends on the steps before it.
    """
    run = SMALL + flags + ["--steps", "2", "--save-every", "1"]
    train.main(run + ["--output-dir", "whole"])
    shutil.copytree("whole", "killed", ignore=shutil.ignore_patterns("checkpoint-2"))  # as if it had died before that
    train.main(["--resume", "killed"])
    assert metrics("killed") == metrics("whole")
    states = [AutoModelForCausalLM.from_pretrained(f"{run}/checkpoint-2").state_dict() for run in ("whole", "killed")]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def test_interrupted_it_finishes_its_step_and_saves(small_base, monkeypatch, capsys):
    """Claim: Ctrl-C in step 1 ends the run after step 1, with a checkpoint and one line that says how to go on; what is
    resumed is the run that was not interrupted.
    Fails if: `or stop` is removed from the condition that saves.
    """
    run = SMALL + ["--steps", "2"]
    train.main(run + ["--output-dir", "whole"])
    draw = data.draw_questions
    monkeypatch.setattr(
        data,
        "draw_questions",
        lambda *args: os.kill(os.getpid(), signal.SIGINT) or draw(*args) if len(metrics("stopped")) == 1 else draw(*args),
    )
    with pytest.raises(SystemExit) as stopped:
        train.main(run + ["--output-dir", "stopped"])
    assert stopped.value.code == 130 and len(metrics("stopped")) == 2 and "--resume stopped" in capsys.readouterr().out
    monkeypatch.setattr(data, "draw_questions", draw)
    train.main(["--resume", "stopped"])
    assert metrics("stopped") == metrics("whole")


def test_a_search_engine_that_goes_away_ends_the_run_and_loses_no_step(small_base, monkeypatch):
    """Claim: if the engine fails in step 3, the run ends with its address, steps 1 and 2 are kept, and resumed it is the run
    in which the engine never failed. No rollout is trained on without its passages.
    Fails if: train catches SearchFailed and goes on, or saves under the number of the step that failed.
    """
    run = SMALL + ["--steps", "3", "--eval-every", "9", "--seed", "0"]
    train.main(run + ["--output-dir", "whole"])
    load_run = train.load_run

    def gone_later(config):
        policy, tokenizer, search, *rest = load_run(config)

        def fragile(queries, top_k):
            if Path("broken/metrics.jsonl").exists() and len(metrics("broken")) == 3:  # the base's line, and two steps
                raise SearchFailed("http://nowhere did not answer")
            return search(queries, top_k)

        return policy, tokenizer, fragile, *rest

    monkeypatch.setattr(train, "load_run", gone_later)
    with pytest.raises(SearchFailed, match="nowhere did not answer; saved after step 2, continue with"):
        train.main(run + ["--output-dir", "broken"])
    monkeypatch.setattr(train, "load_run", load_run)
    train.main(["--resume", "broken"])
    assert metrics("broken") == metrics("whole")


def test_an_engine_that_goes_away_during_an_evaluation_costs_the_evaluation_only(small_base, monkeypatch):
    """Claim: if the evaluation of step 1 cannot search, step 1 is logged and saved all the same, and the resumed run has the
    other steps of a run in which nothing failed.
    Fails if: evaluation(step) is not guarded in the loop, or the run goes on as if nothing had been.
    """
    run = SMALL + ["--eval-every", "1"]
    train.main(run + ["--output-dir", "whole"])
    evaluate = train.evaluate

    def fragile(*args, **settings):
        if Path("broken/metrics.jsonl").exists():
            raise SearchFailed("http://nowhere did not answer")
        return evaluate(*args, **settings)

    monkeypatch.setattr(train, "evaluate", fragile)
    with pytest.raises(SearchFailed, match="nowhere did not answer; saved after step 1, which was not evaluated"):
        train.main(run + ["--output-dir", "broken"])
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main(["--resume", "broken"])
    whole, broken = metrics("whole"), metrics("broken")
    assert broken[1] == {k: v for k, v in whole[1].items() if not k.startswith("eval/")}
    assert broken[:1] + broken[2:] == whole[:1] + whole[2:]


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-search"],
        ["--no-mask", "--kl-in", "reward"],
        ["--shuffle-rewards"],
        ["--recompute-old-logprobs"],
        ["--algo", "ppo", "--critic-warmup-steps", "0", "--no-mask"],
        ["--group-size", "1"],
    ],
)
def test_every_variant_runs_and_leaves_a_whole_run_behind(small_base, flags):
    """Claim: config, metrics with the official names, samples, curves and a checkpoint that transformers loads; the
    first and the last line of the metrics carry an evaluation.
    Fails if: a metric of the list is renamed, or the last step is not evaluated when eval_every does not divide it.
    """
    train.main(SMALL + ["--steps", "1", "--output-dir", "run"] + flags)
    lines = metrics("run")
    names = "reward/mean reward/std frac_reward_zero_std kl entropy clip_ratio grad_norm lr response_length/mean env/number_of_actions env/ratio_of_valid_action env/number_of_valid_search env/finish_ratio state_tokens/coverage"
    assert [line["step"] for line in lines] == [0, 1]
    assert set(names.split()) <= set().union(*lines[1:]) and all(v == v for line in lines for v in line.values())
    for line in (lines[0], lines[-1]):
        assert {"eval/em", "eval/f1", "eval/em_1hop", "eval/em_2hop", "eval/sampled_em", "train/sampled_em"} <= set(line)
    assert {f.name for f in Path("run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        "checkpoint-1",
    }
    AutoModelForCausalLM.from_pretrained("run/checkpoint-1")
    assert AutoTokenizer.from_pretrained("run/checkpoint-1").chat_template == data.CHAT_TEMPLATE
    if "--no-search" in flags:
        assert all(line["env/number_of_valid_search"] == 0 for line in lines[1:])


@pytest.fixture()
def real_shape(tmp_path, monkeypatch):
    """Files in the official formats and a saved two-layer Qwen3 with a byte-level BPE tokenizer and a ChatML template; no time
    is spent on pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_runs", lambda runs, path: path.touch())
    towns = [f"Town {chr(65 + i)}{i}" for i in range(24)]
    passages = [
        {"id": str(i), "contents": f'"{t}"\n{t} lies on the river Number {i}, and its mayor is called Person {i}. Ünïcode; naïve.'}
        for i, t in enumerate(towns)
    ]
    questions = [
        {"id": f"q{i}", "question": f"Who is the mayor of {t}", "golden_answers": [f"Person {i}"], "metadata": {}}
        for i, t in enumerate(towns)
    ]
    for name, records in (("passages", passages), ("questions", questions)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [searchr1.TEMPLATE, searchr1.INVALID_ACTION] + [p["contents"] for p in passages]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    chatml = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chatml
    )
    random_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return "--model model --train-data questions.jsonl --corpus passages.jsonl".split()


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_real_models_folder_trains_on_files_with_the_official_prompt_and_format(real_shape, algo, monkeypatch):
    """Claim: --model DIR with question and passage files runs the same loop: the official prompt in the model's chat
    template, the official information block, checkpoints that load, an unfinished rollout paid nothing.
    Fails if: the tiny preset's lengths or messages are used (`preset` fixed to "tiny" in parse_config).
    """
    # An untrained model never closes a tag; let it find one, so that passages really enter the conversation.
    parse = searchr1.parse_action
    monkeypatch.setattr(
        searchr1, "parse_action", lambda text: searchr1.Action("search", "mayor of Town B1") if len(text) % 2 else parse(text)
    )
    flags = (
        f"--algo {algo} --steps 2 --batch-size 3 --group-size 2 --max-new-tokens 10 --max-turns 2 --eval-limit 2 --output-dir run"
    )
    if algo == "grpo":  # one picture is enough
        monkeypatch.setattr(train, "plot_runs", plot_runs)
    train.main(real_shape + flags.split())
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"].startswith("<|im_start|>user\nAnswer the given question.") and samples[0]["prompt"].endswith(
        "?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    text = "".join(s["transcript"] for s in samples)
    assert '\n\n<information>Doc 1(Title: "Town B1") Town B1 lies on the river Number 1' in text and searchr1.INVALID_ACTION in text
    assert json.loads(Path("run/config.json").read_text())["preset"] == "real" and (
        algo == "ppo" or Path("run/curves.png").stat().st_size > 20000
    )
    AutoModelForCausalLM.from_pretrained("run/checkpoint-2")
    ids = AutoTokenizer.from_pretrained("run/checkpoint-2")(searchr1.TEMPLATE)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained("model")(searchr1.TEMPLATE)["input_ids"]


def test_files_are_gone_through_in_epochs(real_shape):
    """Claim: each epoch visits every training question once, in its own order, and draw(step) needs no earlier step.
    Fails if: draw starts every epoch with the same permutation, or samples with replacement.
    """
    config = train.parse_config(real_shape + ["--batch-size", "11"])
    _, _, _, draw, sample, held = train.load_run(config)
    epochs = [[q.id for step in (2 * e + 1, 2 * e + 2) for q in draw(step)] for e in range(2)]
    assert len(held) == 2 and len(set(epochs[0])) == len(set(epochs[1])) == 22 and epochs[0] != epochs[1]
    assert {q.id for q in held}.isdisjoint(epochs[0]) and [q.id for q in draw(3)] == epochs[1][:11]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps 0: must be above 0"),
        (["--steps", "many"], "invalid int value"),
        (["--algo", "dpo"], "invalid choice"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--temperature", "0"], "--temperature 0.0"),
        (["--model", "nowhere"], "--train-data"),
        (["--train-data", "q.jsonl"], "--corpus"),
        (["--model", "nowhere", "--train-data", "questions.jsonl", "--corpus", "passages.jsonl"], "no causal LM"),
        (["--model", "empty", "--train-data", "questions.jsonl", "--corpus", "passages.jsonl"], "holds no model"),
        (["--model", "model", "--train-data", "gone.jsonl", "--corpus", "passages.jsonl"], "cannot read gone.jsonl"),
        (["--model", "model", "--train-data", "passages.jsonl", "--corpus", "passages.jsonl"], "passages.jsonl line 1"),
        (
            ["--model", "model", "--train-data", "questions.jsonl", "--corpus", "passages.jsonl", "--batch-size", "50"],
            "--batch-size is 50",
        ),
        (
            ["--model", "model", "--train-data", "questions.jsonl", "--corpus", "passages.jsonl", "--max-length", "100"],
            "--max-length",
        ),
        (["--resume", "nowhere"], "no checkpoint"),
        (["--save-hidden", "nowhere/hidden.pt"], "there is no folder nowhere"),
        (["--output-dir", "old"], "holds a run already"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(real_shape, capsys, flags, message):
    """Claim: a user's mistake never ends in a traceback: one line that names it, exit code 2.
    Fails if: run_main lets Mistake or ValueError through, or Parser.error prints the usage.
    """
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/metrics.jsonl").touch()
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: train.main(flags))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


def test_resuming_changes_nothing_but_the_number_of_steps(small_base):
    """Claim: --resume refuses a flag with another value than the run had, and a run that is complete; the command that
    started the run, repeated with --resume and more steps, goes on with it.
    Fails if: resumed_config ignores what else was given.
    """
    run = SMALL + ["--output-dir", "run"]
    train.main(run)
    for flags, message in ((["--resume", "run", "--lr", "1"], "with --lr 0.0005"), (run + ["--resume"], "has all its 2 steps")):
        with pytest.raises(Mistake, match=message):
            train.main(flags)
    train.main(run + ["--resume", "--steps", "3"])
    assert [line["step"] for line in metrics("run")] == [0, 1, 2, 3]
    assert train.parse_config(["--resume", "run", "--steps", "9"]).output_dir == "run"


def test_predicted_keys_and_values_are_the_buffers_bytes(model):
    """Claim: "keys and values" of predict_memory is what the static buffers of a GPU hold.
    Fails if: the extra column or the values are forgotten (`* 2 *` dropped), query heads are counted, or rejection sampling's
    second set is left out.
    """
    cache = searchr1.Slots(model, 8, 200, static=True)
    with torch.no_grad():
        searchr1.feed(model, cache, [0], [[3, 4, 5]])
    held = sum(store.numel() * store.element_size() for layer in cache.layers for store in layer)
    assert train.predict_memory(model, train.Config(slots=8, max_length=200))["keys and values"] == held
    rejection = train.Config(algo="rejection", slots=8, max_length=200)  # a second set, for the base model
    assert train.predict_memory(model, rejection)["keys and values"] == 2 * held


def test_every_preset_fits_a_card_of_24_gb_as_the_readme_says(monkeypatch, tmp_path):
    """Claim: for the models' true shapes predict_memory stays below 24 GB, PPO included, and the README's table has its figures.
    Fails if: a preset's slots are doubled, or the README's table is not brought up to date.
    """
    readme = (Path(train.__file__).parent / "README.md").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    for preset in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "llama-3.2-3b"):
        family, shape = bench_memory.SHAPES[preset]
        with torch.device("meta"):
            model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**shape)).bfloat16()
        configs = [train.parse_config(["--preset", preset, "--algo", algo]) for algo in ("grpo", "ppo")]
        peaks = [train.predicted_peak(train.predict_memory(model, config))[0] for config in configs]
        assert max(peaks) < 24e9
        (row,) = [line for line in readme if line.startswith(f"| `{preset}` |")]
        assert f"{peaks[0] / 2**30:.1f} / {peaks[1] / 2**30:.1f} GiB" in row, (preset, peaks)


def test_the_paper_preset_is_the_official_script():
    """Claim: --preset paper has the values of the official v0.2 scripts and of the paper's appendix, PPO and GRPO.
    Fails if: any of them is changed in PRESETS["paper"], REAL or the defaults.
    """
    both = {
        "model": "Qwen/Qwen2.5-7B", "train_data": "nq+hotpotqa", "steps": 1005, "batch_size": 512, "lr": 1e-6, "critic_lr": 1e-5, "warmup_steps": 286,
        "critic_lr_warmup_steps": 15, "critic_warmup_steps": 0, "lr_decay": False, "adam_beta2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "clip_eps": 0.2, "value_clip": 0.5, "gamma": 1.0, "lam": 1.0, "kl_coef": 0.001, "entropy_coef": 0.001, "reward": "em", "temperature": 1.0,
        "max_turns": 4, "max_new_tokens": 500, "max_obs_length": 500, "max_length": 4096, "top_k": 3, "invalid_message": "official",
        "recompute_old_logprobs": True, "lora_rank": 0, "no_mask": False,
    }  # fmt: skip
    for algo, own in (
        ("grpo", {"group_size": 5, "minibatches": 10, "kl_in": "loss"}),  # 2560 rollouts in mini-batches of 256
        ("ppo", {"group_size": 1, "minibatches": 2, "kl_in": "reward"}),
    ):
        config = vars(train.parse_config(["--preset", "paper", "--algo", algo, "--output-dir", "none"]))
        assert {name: config[name] for name in both | own} == both | own


def test_the_readmes_flags_exist():
    """Claim: every flag of a train.py, eval.py or retrieval.py command in the README is one of the script's.
    Fails if: a flag that the README uses is renamed in the script.
    """
    root = Path(__file__).parent.parent
    commands = re.findall(r"python (train|eval|retrieval)\.py([^\n`|#]*)", (root / "README.md").read_text())
    assert {script for script, flags in commands if "--" in flags} >= {"train", "eval"}
    for script, flags in commands:
        for flag in re.findall(r"--[\w-]+", flags):
            if script == "train" and flag[2:] not in ("table", "quick", "study", "seeds"):
                assert flag[2:].replace("-", "_") in {f.name for f in train.fields(train.Config)}, flag
            else:
                assert f'"{flag}"' in (root / f"{script}.py").read_text(), (script, flag)


# ----- Roles, masters, memory -----

SHAPES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def shaped(kind, tied=True, dtype=torch.float32, vocabulary=100, **values):
    """A random two-layer model in the shape of a family."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config, model = SHAPES[kind]
    return model(
        config(vocab_size=vocabulary, tie_word_embeddings=tied, initializer_range=0.3, **{"head_dim": 8} | sizes | values)
    ).to(dtype)


def grow(model):
    for layer in model.modules():
        for name in layer.B if isinstance(layer, train.Adapted) else ():
            torch.nn.init.normal_(layer.B[name], std=0.1)


def with_sums(base, layers, name, scale):
    """`base` in float64 with the weights W + scale B A, by definition."""
    want = copy.deepcopy(base).double()
    with torch.no_grad():
        for key, m in layers.items():
            want.get_submodule(key).weight += scale * m.B[name].double() @ m.A[name].double()
    return want


def grown(policy, roles=("policy", "critic")):
    """`policy` adapted, with adapters as after some training: nothing in them is 0."""
    train.adapt(policy, roles, rank=3, alpha=6)
    grow(policy)
    return policy


@pytest.mark.parametrize("kind", SHAPES)
def test_an_adapted_model_is_the_model_with_the_sums_as_its_weights(kind):
    """Claim: at first every role answers as the base does, bit for bit, and role None always; later policy and critic are
    the float64 models whose weights are W + alpha/rank B A, each with its own, in outputs and in gradients.
    Fails if: `alpha=self.scale` is dropped in Adapted.forward, or a role's B stands with another's A.
    """
    base, ids = shaped(kind).eval(), torch.arange(24).view(2, 12)
    answer = lambda model: model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    adapted = train.adapt(copy.deepcopy(base), ("policy", "critic"), 3, 6)
    assert torch.equal(answer(adapted), answer(base))
    grown(adapted := copy.deepcopy(base))
    assert not any(isinstance(m, torch.nn.Linear) for m in adapted.base_model.modules())
    with train.role(adapted, None):
        assert torch.equal(answer(adapted), answer(base))
    layers = {name: m for name, m in adapted.named_modules() if isinstance(m, train.Adapted)}
    assert len(layers) == 14
    for name in ("policy", "critic"):
        want = with_sums(base, layers, name, 6 / 3)
        weights = {key: want.get_submodule(key).weight for key in layers}
        with train.role(adapted, name):
            torch.testing.assert_close(answer(adapted).double(), answer(want), atol=2e-5, rtol=1e-4)
            answer(adapted).sin().sum().backward()
        answer(want).sin().sum().backward()
        assert {key for key, p in adapted.named_parameters() if p.grad is not None} == set(train.trained(adapted, name))
        for key, m in layers.items():
            dW, A, B = weights[key].grad, m.A[name].double(), m.B[name].double()
            torch.testing.assert_close(m.A[name].grad.double(), 2 * B.T @ dW, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(m.B[name].grad.double(), 2 * dW @ A.T, atol=1e-4, rtol=1e-3)
        adapted.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_merged_checkpoint_answers_like_the_policy(kind, tied, tmp_path):
    """Claim: what is saved of an adapted policy is an ordinary folder: the files and names of the base model's, no adapter in
    it, and the loaded model's logits are the unmerged policy's to 1e-5.
    Fails if: merged_state leaves out the scale, merges the critic's adapter, or keeps the adapters' own tensors.
    """
    base = shaped(kind, tied).eval()
    policy, ids = grown(copy.deepcopy(base)), torch.arange(24).view(2, 12)
    base.save_pretrained(tmp_path / "base")
    policy.save_pretrained(tmp_path / "merged", state_dict=train.merged_state(policy))
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("base", "merged")]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        got, want, before = (model(input_ids=ids).logits for model in (merged, policy, base))
    assert names[0] == names[1] and (want - before).abs().max() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_on_one_base_the_reference_is_the_base_and_the_critic_has_its_own_adapter(tokenizer, model, kl_in):
    """Claim: phases 4 and 6 of PPO with adapters score the reference with all adapters off, the values with the critic's,
    whatever the policy has become: float64 models with the sums as weights say the same.
    Fails if: one of the two `with role(models.reference, None)` goes, or `with role(models.critic, "critic")` in phase 4.
    """
    batch, rewards = a_batch(tokenizer, model)
    batch.ref_logprobs_BT = None
    config = train.Config(algo="ppo", lora_rank=3, lora_alpha=6.0, kl_in=kl_in, critic_warmup_steps=0)
    models = train.make_models(copy.deepcopy(model), config)
    grow(models.policy)
    torch.nn.init.normal_(models.critic.head.weight)
    layers = {name: m for name, m in models.policy.named_modules() if isinstance(m, train.Adapted)}
    with torch.no_grad():
        want = torch.log_softmax(copy.deepcopy(model).double()(input_ids=batch.ids_BL).logits[:, :-1], -1)
        want = want.gather(-1, batch.ids_BL[:, 1:, None])[..., 0] * batch.mask_BT
        body = with_sums(model, layers, "critic", 2).base_model
        values = body(input_ids=batch.ids_BL).last_hidden_state[:, :-1] @ models.critic.head.weight[0].double()
    train.score_batch(models, batch, rewards, config)
    if kl_in == "loss":
        train.update(models, batch, 9, config, random.Random(0))
    torch.testing.assert_close(batch.ref_logprobs_BT.double(), want, atol=1e-4, rtol=0)
    for row, length in enumerate(batch.lengths_B - 1):
        torch.testing.assert_close(batch.values_BT[row, :length].double(), values[row, :length], atol=1e-4, rtol=1e-4)


def updated(policy, batch, **values):
    """One PPO update of adapters and head that are not 0, plain SGD at a rate of 1 -> (Models, {name: change})."""
    values = {
        "kl_coef": 0.5,
        "max_grad_norm": 1e9,
        "critic_warmup_steps": 0,
        "warmup_steps": 0,
        "critic_lr_warmup_steps": 0,
    } | values
    config = train.Config(algo="ppo", minibatches=1, lr=1.0, critic_lr=1.0, **values)
    batch = dataclasses.replace(batch, ref_logprobs_BT=None)
    models, before, after = train.make_models(policy, config), {}, {}
    models.optimizer, models.critic_optimizer = sgd(models.policy), sgd(models.critic)
    torch.manual_seed(1)
    grow(models.policy)
    torch.nn.init.normal_(models.critic.head.weight)  # from 0 nothing would reach the body
    for found in (before, after):
        for name, network, _ in models.learners():
            found |= {(name, key): p.detach().clone() for key, p in train.trained(network, name).items()}
        if found is before:
            train.update(models, batch, 1, config, random.Random(0))
    return models, {key: after[key] - before[key] for key in after}


@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_checkpointing_changes_the_memory_and_not_the_gradients(tokenizer, model, rank):
    """Claim: with --gradient-checkpointing, PPO's update moves policy and critic as without it, adapters or not; no layer
    is put into training mode; and autograd holds less than half.
    Fails if: backward() of the value loss stands outside `with role(critic, "critic")` in update: the forward pass that it
    repeats is then the policy's.
    """
    batch, _ = a_batch(tokenizer, model)
    moved, kept = [], []
    for on in (False, True):
        models, change = updated(copy.deepcopy(model), batch, lora_rank=rank, gradient_checkpointing=on)
        moved.append(change)
        assert not any(m.training for m in models.policy.modules()) and models.critic.body.training is False
        saved = {}  # storages that autograd keeps
        note = lambda t: saved.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            hidden, *_ = searchr1.head_inputs(models.policy, batch.ids_BL)
        weights = {p.untyped_storage().data_ptr() for p in models.policy.parameters()}
        kept.append(sum(size for at, size in saved.items() if at not in weights))
    assert moved[0].keys() == moved[1].keys() and {name for name, _ in moved[0]} == {"policy", "critic"}
    assert max(change.abs().max() for (_, key), change in moved[0].items() if ".critic" in key or "body" in key) > 1e-3
    for key, change in moved[0].items():
        torch.testing.assert_close(moved[1][key], change, atol=1e-5, rtol=1e-4, msg=str(key))
    assert kept[1] < 0.5 * kept[0]


def test_a_bf16_weight_moves_at_the_papers_learning_rate_only_with_an_fp32_master():
    """Claim: 200 Adam steps at 1e-6 leave a bf16 weight of 0.02 where it was; with a master it follows 2e-4 down, at its old
    address. Gradients of micro-batches are summed, and clipped, in fp32: 1 + 512 times 2^-9 is 2, in bf16 still 1.
    Fails if: adam() gives the optimiser the parameters themselves, or hand_over adds up in p.grad.
    """
    p = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    start, address = p.detach().clone(), p.data_ptr()
    bare = torch.optim.AdamW([p], lr=1e-6, weight_decay=0.0)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        bare.step()
    assert torch.equal(p, start)
    p.grad = None
    optimizer = train.adam({"p": p}, 1e-6, train.Config())
    (master,) = optimizer.param_groups[0]["params"]
    for _ in range(200):
        p.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(master, start.float() - 2e-4, atol=2e-6, rtol=0)
    assert torch.equal(p, master.bfloat16()) and p.data_ptr() == address and p.dtype == torch.bfloat16
    p.sum().backward()
    for _ in range(512):
        (p * 2**-9).sum().backward()
    assert p.grad is None and torch.equal(master.grad, torch.full((4,), 2.0))


def short_run(policy, tokenizer, out, steps=2, resume="", **values):
    """train.train, two questions and four rollouts a step, without load_run."""
    found = [Passage("0", "kinake", "kinake lives in gugoton.")]
    sizes = {
        "batch_size": 2,
        "group_size": 2,
        "minibatches": 2,
        "eval_every": 9,
        "max_turns": 1,
        "max_new_tokens": 3,
        "warmup_steps": 1,
        "lr": 1e-2,
        "lr_decay": False,  # else it would depend on the number of steps
        "entropy_coef": 0.1,  # something to learn, whatever the rewards
    }
    config = train.Config(
        preset="tiny", model="files", reward="format", steps=steps, output_dir=out, resume=resume, critic_warmup_steps=0, **sizes | values
    )  # fmt: skip
    asked = [
        data.Question(str(i), f"who is {name}?", ("gugoton",)) for i, name in enumerate(("kinake", "zofozu", "vaseru", "lamira"))
    ]
    draw = lambda step: random.Random(step).sample(asked, 2)
    train.train(config, copy.deepcopy(policy).eval(), tokenizer, lambda q, k: [found] * len(q), draw, [], asked[:1])


@pytest.fixture()
def loud(tokenizer):
    def make(kind, dtype=torch.float32):
        model = shaped(kind, False, dtype, len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            for tag in ("<search>", "</search>", "<answer>", "</answer>"):
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(tag)] *= 3
        return model

    return make


@pytest.mark.parametrize(
    "kind, algo, rank, dtype",
    [
        ("qwen2", "ppo", 2, torch.float32),
        ("qwen3", "grpo", 2, torch.float32),
        ("llama", "ppo", 0, torch.float32),
        ("qwen2", "ppo", 0, torch.bfloat16),
        ("llama", "grpo", 2, torch.bfloat16),
    ],
)
def test_every_family_trains_with_adapters_and_without_and_resumes_exactly(
    loud, tokenizer, world, tmp_path, kind, algo, rank, dtype
):
    """Claim: two steps of PPO and GRPO, adapters or full, fp32 or bf16, log the same numbers whether or not the run ended
    after step 1 and was resumed; something was learned, all values are numbers, the checkpoints' weights are equal.
    Fails if: save_checkpoint writes the rounded parameters instead of the masters, or restore leaves out the critic's adapter.
    """
    run = functools.partial(
        short_run, loud(kind, dtype), tokenizer, algo=algo, lora_rank=rank, kl_in="reward" if algo == "ppo" else "loss",
        gradient_checkpointing=rank > 0,
    )  # fmt: skip
    run(str(tmp_path / "whole"))
    run(str(tmp_path / "parts"), steps=1)
    run(str(tmp_path / "parts"), resume="yes")
    assert metrics(tmp_path / "whole")[2] == metrics(tmp_path / "parts")[2]
    last = metrics(tmp_path / "whole")[-1]
    assert last["grad_norm"] > 0 and all(v == v for v in last.values()) and ("critic_grad_norm" in last) == (algo == "ppo")
    a, b = (load_file(tmp_path / f / "checkpoint-2" / "model.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == dtype for key in a)


def test_the_critic_warms_up_by_its_own_steps(tokenizer, model):
    """Claim: in step 3 of warm-ups over 10 steps for the policy and 2 for the critic, their rates are 0.3 lr and critic_lr.
    Fails if: update takes one learning_rate_factor for both.
    """
    batch, _ = a_batch(tokenizer, model)
    config = train.Config(algo="ppo", warmup_steps=10, critic_lr_warmup_steps=2, lr=0.01, critic_lr=0.02, critic_warmup_steps=0)
    models = train.make_models(model, config)
    train.update(models, batch, 3, config, random.Random(0))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (models.optimizer, models.critic_optimizer)]
    assert rates == pytest.approx([0.003, 0.02])


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (0, torch.bfloat16), (3, torch.bfloat16)])
def test_predicted_weights_adapters_and_optimiser_states_are_the_tensors_bytes(tokenizer, model, rank, dtype):
    """Claim: the first lines of the memory table are exact, PPO with adapters and full, in fp32 and bf16.
    Fails if: predict_memory counts the tied head twice, gives the critic no second adapter, or forgets Adam's step counters.
    """
    policy = shaped("qwen3", True, dtype, len(tokenizer)).eval()
    config = train.Config(algo="ppo", lora_rank=rank, critic_warmup_steps=0, minibatches=1)
    memory = train.predict_memory(policy, config)
    batch, _ = a_batch(tokenizer, model)
    models = train.make_models(policy, config)
    train.update(models, batch, 9, config, random.Random(0))
    total = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    weights = {id(p): p for m in (models.policy, models.reference, models.critic) for p in m.parameters()}
    names = ("weights", "reference's weights", "critic's weights", "critic's head", "adapters")
    assert sum(memory[name] for name in names) == total(weights.values())
    masters = [p for _, _, optimizer in models.learners() for p in optimizer.param_groups[0]["params"]]
    assert memory["fp32 masters"] == total(p for p in masters if id(p) not in weights) and memory["gradients"] == total(masters)
    states = [t for _, _, optimizer in models.learners() for state in optimizer.state.values() for t in state.values()]
    assert memory["Adam"] == total(states)


@pytest.mark.parametrize("rank, checkpointing, kind", [(0, False, "qwen2"), (4, False, "qwen3"), (4, True, "llama")])
def test_predicted_activations_are_near_what_a_forward_and_backward_pass_holds(kind, rank, checkpointing):
    """Claim: the peak of one micro-batch's pass forward and back is within 25 % of activations + log-probs + gradients.
    Fails if: predict_memory forgets the MLP's four tensors, or counts all layers in full with gradient checkpointing.
    """
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    policy = shaped(kind, True, vocabulary=1000, **sizes | {"head_dim": 16}).eval()
    config = train.Config(lora_rank=rank, gradient_checkpointing=checkpointing, micro_batch_tokens=1024, max_length=256)
    memory = train.predict_memory(policy, config)
    models, ids = train.make_models(policy, config), torch.randint(1000, (4, 256))

    def call():
        searchr1.token_logprobs(models.policy, ids, torch.ones(4, 255))[0].sum().backward()
        models.optimizer.zero_grad()

    call()
    update = {"gradients", "activations", "log-probs", "one layer"}
    predicted, _ = train.predicted_peak({name: count * (name in update) for name, count in memory.items()})
    assert predicted == pytest.approx(kernels.peak_memory(call, "cpu"), rel=0.25)


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


WHOLE = []  # metrics of the run that had enough memory, made once


@pytest.mark.parametrize(
    "function, calls, error, message",
    [
        ("rollout", 1, torch.OutOfMemoryError("CUDA out of memory."), "the rollouts; lower --slots (now all 4)"),
        ("score_batch", 1, CPU_ERROR, "the log-probs; lower --micro-batch-tokens (now 4096)"),
        ("policy_loss", 2, CPU_ERROR, "the update; lower --micro-batch-tokens (now 4096), then add --gradient-checkpointing"),
        ("policy_loss", 3, CPU_ERROR, "the update; lower --micro-batch-tokens"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_flag_and_loses_no_step(
    loud, tokenizer, monkeypatch, tmp_path, function, calls, error, message
):
    """Claim: memory that runs out in step 2 ends the run with what it was doing and the flag to lower; step 1 is
    saved, and resumed it is the run that had enough. If step 2 had moved the policy already, the line says so.
    Fails if: `ending` knows the CUDA class only, save_checkpoint gets `step`, or update counts its updates at its end.
    """
    monkeypatch.chdir(tmp_path)
    run = functools.partial(short_run, loud("qwen3"), tokenizer, algo="grpo", lora_rank=2)
    if not WHOLE:
        run("whole")
        WHOLE.extend(metrics("whole"))
    works, left = getattr(train, function), [calls]

    def breaks(*args, **values):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return works(*args, **values)

    monkeypatch.setattr(train, function, breaks)
    with pytest.raises(Mistake) as ended:
        run("broken")
    text = str(ended.value)
    assert text.startswith(f"out of memory in {message}") and "\n" not in text
    assert "saved after step 1" in text and text.endswith("continue with: python train.py --resume broken")
    assert ("with 1 of the 2 updates of step 2" in text) == (calls == 3)
    monkeypatch.setattr(train, function, works)
    run("broken", resume="yes")
    assert (metrics("broken") == WHOLE) == (calls != 3) and len(metrics("broken")) == 3


def test_out_of_memory_while_loading_and_other_errors(monkeypatch, tmp_path):
    """Claim: a model that does not fit ends with one line that names --lora-rank; an error that is no shortage of memory
    keeps its class and its traceback.
    Fails if: main() does not guard load_run, or `ending` turns every RuntimeError into a Mistake.
    """
    monkeypatch.chdir(tmp_path)
    for error, kind, message in (
        (CPU_ERROR, Mistake, "out of memory in loading; take --lora-rank 16"),
        (RuntimeError("odd"), RuntimeError, "odd"),
    ):
        monkeypatch.setattr(train, "load_run", lambda config: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match=message):
            train.main([])


def test_a_resumed_run_may_lower_what_bounds_memory(small_base):
    """Claim: the flags that an out-of-memory line asks to lower may differ in --resume, the rank of the adapters may not.
    Fails if: RESUME_MAY_CHANGE loses one of them.
    """
    Path("run/checkpoint-1").mkdir(parents=True)
    Path("run/checkpoint-1/trainer_state.pt").touch()
    Path("run/config.json").write_text(json.dumps({"steps": 9, "lr": 0.5}))  # of an older version: newer flags are missing
    config = train.parse_config("--resume run --slots 8 --micro-batch-tokens 512 --gradient-checkpointing".split())
    assert (config.slots, config.micro_batch_tokens, config.gradient_checkpointing, config.lr) == (8, 512, True, 0.5)
    with pytest.raises(Mistake, match="--lora-rank 0"):
        train.parse_config("--resume run --lora-rank 4".split())


def test_slots_bound_what_is_in_flight_and_change_nothing_else(small_base, monkeypatch):
    """Claim: with --slots 4 the rollouts of a step and of an evaluation work in four slots, one cache through the whole run,
    and the metrics are those of a run with a slot for each rollout.
    Fails if: train() hands no cache to rollout() or evaluate(), or makes it without config.slots.
    """
    rollout, caches = searchr1.rollout, []
    spy = lambda *args, cache, **settings: caches.append(cache) or rollout(*args, cache=cache, **settings)
    monkeypatch.setattr(train, "rollout", spy)
    monkeypatch.setattr("eval.rollout", spy)
    for name, flags in (("all", []), ("few", ["--slots", "4"])):
        train.main(SMALL + ["--steps", "1", "--output-dir", name] + flags)
    assert [len(cache.lengths) for cache in caches] == [20] * 7 + [4] * 7 and len(set(map(id, caches))) == 2
    for few, whole in zip(metrics("few"), metrics("all"), strict=True):
        assert few == pytest.approx(whole, abs=1e-3)


# ----- Fine-tuning, the table, the studies -----


def test_sft_raises_the_logprob_of_the_gold_answer_and_of_nothing_else(tokenizer, model):
    """Claim: an example of SFT is the prompt of direct inference and the gold answer; the prompt is masked; the gradient is
    that of the mean negative log-likelihood of the answer's tokens.
    Fails if: gold_example's prompt is appended with log-probs (mask True), or FINE_TUNING's line in update is dropped.
    """
    asked = [
        data.Question("1", "who is kinake?", ("gugoton", "second")),
        data.Question("2", "where is kinake?", ("kinake gugoton",)),
    ]
    rollouts = [train.gold_example(q, tokenizer) for q in asked]
    texts = [(tokenizer.decode(r.ids[: r.prompt_length]), tokenizer.decode(r.ids[r.prompt_length :])) for r in rollouts]
    assert texts[0] == ("<question> who is kinake ? </question> <answer>", "gugoton </answer>")
    assert texts[1] == ("<question> where is kinake ? </question> <answer>", "kinake gugoton </answer>")
    assert [r.response_mask for r in rollouts] == [[i >= r.prompt_length for i in range(len(r.ids))] for r in rollouts]
    batch = searchr1.collate(rollouts)
    config = train.Config(algo="sft", minibatches=1, lr=1.0, kl_coef=0.0, max_grad_norm=1e9, warmup_steps=0)
    batch = train.advantages(batch, searchr1.rewards_at_end(torch.ones(2), batch.mask_BT), config)
    policy = copy.deepcopy(model)
    train.update(train.Models(policy, model, None, sgd(policy), None), batch, 1, config, random.Random(0))
    logits_BTV = model(input_ids=batch.ids_BL).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.ids_BL[:, 1:].flatten(), reduction="none")
    losses[batch.mask_BT.flatten()].mean().backward()  # the last five tokens: gugoton </answer>, kinake gugoton </answer>
    assert batch.mask_BT.sum() == 5
    for before, after in zip(model.parameters(), policy.parameters()):
        torch.testing.assert_close(after, before - before.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2", "--lr", "1"]])
def test_rejection_sampling_imitates_the_base_models_right_rollouts(small_base, monkeypatch, flags):
    """Claim: every step's rollouts are the untouched base model's, whatever was learned before; only rows with reward are
    trained, and a step without any trains nothing.
    Fails if: the writer is the policy (or, with adapters, plays its role), or advantages() keeps every row.
    """
    monkeypatch.setattr(train, "outcome_reward", lambda answer, gold: float(answer is not None))
    seen, trained, update = [], [], train.update
    monkeypatch.setattr(train, "rewards", lambda *args, plain=train.rewards: seen.append(args[0]) or plain(*args))
    monkeypatch.setattr(train, "update", lambda models, batch, *rest: trained.append(batch) or update(models, batch, *rest))
    run = "--algo rejection --steps 2 --batch-size 6 --eval-limit 2 --max-turns 2 --max-new-tokens 8 --output-dir run".split()
    train.main(run + ["--lr", "0.1"] + flags)
    base, tokenizer, search, draw, *_ = train.load_run(train.Config())
    config = json.loads(Path("run/config.json").read_text())
    untouched = searchr1.rollout(
        base, tokenizer, [r.question for r in seen[1][::5]], search, 5, 2, 8, config["max_obs_length"], 256, generator=torch.Generator().manual_seed(2),
        invalid_message=searchr1.RETHINK,
    )  # fmt: skip
    assert [r.ids for r in seen[1]] == [r.ids for r in untouched]
    moved = AutoModelForCausalLM.from_pretrained("run/checkpoint-2").state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in base.state_dict().items())
    for rollouts, batch in zip(seen, trained, strict=True):
        paid = [len(r.ids) for r in rollouts if r.answer is not None]
        assert 0 < len(paid) < 30 and batch.lengths_B.tolist() == paid
    saved = json.loads(Path("run/checkpoint-2/search_r1.json").read_text())
    assert (saved["method"], saved["base"]) == ("rejection", base.name_or_path)
    monkeypatch.setattr(train, "outcome_reward", lambda answer, gold: 0.0)
    train.main(run[:-1] + ["nothing"])
    moved = AutoModelForCausalLM.from_pretrained("nothing/checkpoint-2").state_dict()
    assert all(torch.equal(moved[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    "algo, prompt", [("sft", "Answer the given question from what you know."), ("rejection", "Answer the given question. You must")]
)
def test_a_fine_tuned_checkpoint_is_evaluated_as_it_was_trained(real_shape, capsys, algo, prompt):
    """Claim: --algo sft and rejection run on files, too; eval.py then asks the checkpoint in the form it was trained in.
    Fails if: save_checkpoint leaves the method out.
    """
    train.main(
        real_shape
        + f"--algo {algo} --steps 1 --batch-size 2 --max-new-tokens 6 --max-turns 1 --eval-limit 1 --output-dir run".split()
    )
    flags = "--checkpoint run/checkpoint-1 --data questions.jsonl --corpus passages.jsonl --limit 2 --json out.json".split()
    eval_main(flags)
    records = json.loads(Path("out.json").read_text())["records"]
    assert len(records) == 2 and all(r["method"] == algo and f"user\n{prompt}" in r["prompt"] for r in records)
    assert "2 questions (questions.jsonl), greedy" in capsys.readouterr().out


def test_worse_engines_are_what_their_names_say(world, engine):
    """Claim: lexical is BM25, random finds the same passages for the same query and others for another one, empty finds none.
    Fails if: `random` draws with the module's generator (another list at each call).
    """
    queries = ["kinake lives", "mayor", "kinake lives"]
    exact, lexical, drawn, none = (
        train.searching(kind, world.passages, engine.search)(queries, 3) for kind in train.CHOICES["retriever"]
    )
    assert exact == engine.search(queries, 3) and none == [[], [], []]
    scores = train.BM25(world.passages).rank(queries[:1], 3)[1][0]
    assert lexical[0] == [world.passages[row] for row in scores]
    assert drawn[0] == drawn[2] != drawn[1] and {len(found) for found in drawn} == {3}


def test_a_study_makes_each_run_once_and_draws_all_seeds(monkeypatch, tmp_path, capsys):
    """Claim: --study makes its runs at every seed with the flags of their label, draws all of them into figures/, and prints
    mean and spread; runs that are there, of this study or another, are not made again, half ones are continued.
    Fails if: finished_run names folders by the study, or study() leaves a seed out.
    """
    made, drawn = [], {}

    def run(config):  # what train() leaves behind
        made.append(config)
        folder = Path(config.output_dir)
        (folder / f"checkpoint-{config.steps}").mkdir(parents=True)
        (folder / f"checkpoint-{config.steps}/trainer_state.pt").touch()
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        end = {
            "eval/em_1hop": 0.5 + config.seed / 4,
            "eval/em_2hop": 0.25,
            "eval/searches_1hop": config.max_turns,
            "eval/searches_2hop": 2.0,
        }
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 0, "reward/mean": 0.5}) + "\n" + json.dumps({"step": config.steps} | end)
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(train, "load_run", lambda config: ())
    monkeypatch.setattr(train, "plot_runs", lambda runs, path: drawn.update({path: sorted(runs)}))
    train.main(["--study", "turns", "--seeds", "2"])
    assert drawn == {"figures/turns.png": sorted(f"B = {b}, seed {seed}" for b in (1, 2, 3) for seed in (0, 1))}
    assert [(c.max_turns, c.seed, c.steps) for c in made] == [(b, seed, 100) for seed in (0, 1) for b in (1, 2, 3)]
    printed = capsys.readouterr().out
    assert (
        "| B = 2 | 0.625 (0.500 to 0.750) | 0.250 (0.250 to 0.250) | 2.000 (2.000 to 2.000) | 2.000 (2.000 to 2.000) |" in printed
    )
    rows = Path("figures/turns.csv").read_text().splitlines()
    assert rows[0] == "run,step,metric,value" and '"B = 2, seed 1",100,eval/em_1hop,0.75' in rows
    train.main(["--study", "retriever", "--seeds", "1"])  # its "exact" is the other study's B = 3
    assert [c.retriever for c in made[6:]] == ["lexical", "random", "empty"]
    random_engine = Path(made[7].output_dir)
    (random_engine / "checkpoint-100").rename(random_engine / "checkpoint-30")  # stopped half-way
    shutil.rmtree(Path(made[8].output_dir) / "checkpoint-100")  # died before it saved anything
    train.main(["--study", "retriever", "--seeds", "1"])
    assert [(c.retriever, Path(c.resume or ".").name) for c in made[9:]] == [("random", random_engine.name), ("empty", "")]


def test_the_table_has_every_method_of_the_paper(small_base, monkeypatch, capsys):
    """Claim: --table trains the five that are trained, evaluates all methods in the paper's order on both kinds of questions,
    the untrained ones with the base model; --quick is one seed.
    Fails if: a row is left out of trained_rows, or the base model is evaluated in place of a trained one.
    """
    few = "--steps=1 --batch-size=4 --eval-limit=4 --max-new-tokens=8 --max-turns=1".split()
    made, train_one, evaluated, evaluate = [], train.train, [], train.evaluate
    monkeypatch.setattr(train, "train", lambda config, *run: made.append(config) or train_one(config, *run))
    monkeypatch.setattr(train, "fixed_sample", lambda questions, limit: questions[: min(limit or 4, 4)])
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda policy, *args, method, **rest: (
            evaluated.append((method, policy.name_or_path)) or evaluate(policy, *args, method=method, **rest)
        ),
    )
    train.main(["--table", "--quick", *few])
    assert [(c.algo, c.no_search) for c in made] == [
        ("sft", False),
        ("grpo", True),
        ("rejection", False),
        ("ppo", False),
        ("grpo", False),
    ]
    rows = [row.split(",") for row in Path("figures/table.csv").read_text().splitlines()]
    names = [
        "Direct inference",
        "CoT",
        "IRCoT",
        "Search-o1",
        "RAG",
        "SFT",
        "R1",
        "Rejection sampling",
        "Search-R1 (PPO)",
        "Search-R1 (GRPO)",
    ]
    assert (
        [row[0] for row in rows[1:]] == names
        and {row[1] for row in rows[1:]} == {"0"}
        and rows[0][2:5] == ["em_1hop", "em_2hop", "em"]
    )
    final = evaluated[-10:]
    assert [method for method, _ in final] == [
        "direct",
        "cot",
        "ircot",
        "search-o1",
        "rag",
        "sft",
        "r1",
        "rejection",
        "search-r1",
        "search-r1",
    ]
    assert len({policy for _, policy in final[:5]}) == 1 and len({policy for _, policy in final}) == 6
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in names)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--study", "nothing"], "invalid choice"),
        (["--quick"], "--quick with --table"),
        (["--seeds", "2"], "--seeds goes with"),
        (["--table", "--study", "mask"], "one at a time"),
        (["--table", "--seeds", "0"], "--seeds 0"),
        (["--study", "mask", "--model", "x"], "no --seed"),
        (["--algo", "sft", "--group-size", "5"], "one example a question"),
        (["--format-steps", "900"], "--format-steps 900"),
        (["--model", "m", "--train-data", "q", "--corpus", "p", "--retriever", "random"], "are the tiny world's"),
    ],
)
def test_mistakes_about_many_runs_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    """Claim: as above.
    Fails if: many_runs makes runs before it has looked at the flags.
    """
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: train.main(flags))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error and not list(tmp_path.iterdir())
