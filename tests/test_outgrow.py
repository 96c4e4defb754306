"""Our conversations inside TRL's GRPOTrainer. Skipped where its packages are not (course/requirements-outgrow.txt)."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from conftest import LOUD, random_model
from transformers import AutoModelForCausalLM

import data
from course import outgrow_trl
from searchr1 import outcome_reward, rollout


@pytest.fixture()
def trainer(tokenizer, world, engine, tmp_path, monkeypatch):
    """A trainer around a random model that opens and closes tags now and then, and its environment."""
    monkeypatch.setattr(outgrow_trl, "QUESTIONS", 8)
    random_model(tokenizer, loud=LOUD).save_pretrained(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # TRL loads its reference from there, too
    environment = outgrow_trl.Environment(tokenizer, world.train, engine.search, data.TINY_SETTINGS, seed=3)
    return outgrow_trl.make_trainer(policy, environment, tmp_path, steps=1), environment


def prepared(trainer):
    """What TRL hands to its loss: conversations, masks, advantages of one minibatch."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_retrieved_tokens_get_no_gradient_in_the_loss_of_trl(trainer, monkeypatch):
    """Claim: in TRL's own loss, the gradient of a token's log-prob is 0 exactly where our mask is, and nowhere else
    among the tokens of conversations with an advantage.
    Fails if: carried_over leaves out "env_mask", or fills it with ones.
    """
    trainer, _ = trainer
    inputs, kept = prepared(trainer), []
    trainer.current_gradient_accumulation_steps = 1  # which train() would set
    inputs["advantages"] = torch.linspace(-1, 1, len(inputs["advantages"]))  # a random model earns nothing
    score = trainer._get_per_token_logps_and_entropies

    def leaf(*args, **how):
        logprobs, *rest = score(*args, **how)
        kept.append(logprobs.detach().requires_grad_())
        return kept[-1], *rest

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", leaf)
    trainer.compute_loss(trainer.model, inputs).backward()
    own = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    retrieved = inputs["completion_mask"].bool() & ~own
    assert retrieved.sum() > 50 and own.sum() > 50
    assert torch.equal(kept[-1].grad != 0, own)


def test_a_conversation_in_trl_is_ours_token_for_token(trainer):
    """Claim: with the same weights, seed and questions, TRL trains on the ids, the mask and the log-probs of our own
    rollout, and pays our reward.
    Fails if: carried_over cuts the prompt alone, or the response alone, one token off, or converse leaves the seed out.
    """
    trainer, environment = trainer
    rows = environment.stream()
    asked = [next(rows) for _ in range(6)]
    got = environment.converse([row["prompt"] for row in asked], trainer)
    questions = [environment.known[row["prompt"]] for row in asked]
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    how = environment.search, environment.settings, 1, 1.0, generator
    ours = rollout(trainer.model.eval(), environment.tokenizer, questions, *how)
    prompts = got["prompt_ids"]
    assert [p + response for p, response in zip(prompts, got["completion_ids"])] == [r.ids for r in ours]
    assert [[0] * len(p) + mask for p, mask in zip(prompts, got["env_mask"])] == [r.response_mask for r in ours]
    assert [[0.0] * len(p) + logp for p, logp in zip(prompts, got["logprobs"])] == [r.logprobs for r in ours]
    paid = outgrow_trl.reward(got["answer"], [row["golden_answers"] for row in asked])
    assert paid == [outcome_reward(r.answer, r.question.gold_answers) for r in ours]


def test_a_group_asks_one_question(trainer):
    """Claim: [Eq. 3] TRL asks for the conversations of a group side by side, so that its mean is their baseline.
    Fails if: make_trainer sets no num_generations, or another one.
    """
    trainer, environment = trainer
    asked = []
    trainer.rollout_func = lambda prompts, trainer: asked.append(prompts) or environment.converse(prompts, trainer)
    prepared(trainer)
    (prompts,) = asked
    assert len(prompts) == 8 * outgrow_trl.GROUP and len(set(prompts)) == 8
    assert all(len(set(prompts[i : i + outgrow_trl.GROUP])) == 1 for i in range(0, 40, outgrow_trl.GROUP))
