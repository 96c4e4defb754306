"""The same environment inside another trainer: TRL's GRPOTrainer, on several processes.

    pip install -r course/requirements-outgrow.txt
    torchrun --nproc_per_node 2 -m course.outgrow_trl --output outputs/trl
    python eval.py --checkpoint outputs/trl

Ours stay: questions, conversation, search engine, response mask, reward. TRL's are: advantages, loss, optimiser, the
work of several processes. Three things carry over:

    Rollout.ids                  -> prompt_ids, completion_ids: the ids that were sampled, never encoded again
    Rollout.response_mask        -> env_mask: TRL multiplies it into its loss mask
    outcome_reward(r.answer, .)  -> reward_funcs

For a model of your own on your own data, replace `tiny` by a model, a tokenizer, an engine's search and your questions.
"""

import os
import random

import torch

import data
from data import Mistake, Parser, run_main
from eval import evaluate
from searchr1 import outcome_reward, rollout
from train import by_hops

QUESTIONS, GROUP, UPDATES = 48, 5, 4  # a step of train.py: 48 questions, five conversations each, four updates


def packages():
    """What only this file needs -> (datasets, trl). Mistake if they are not installed."""
    try:
        import datasets
        import trl
    except ImportError:
        raise Mistake("TRL is not installed: pip install -r course/requirements-outgrow.txt") from None
    return datasets, trl


def carried_over(rollouts):
    """Rollouts -> what TRL's rollout_func returns, one of each a rollout. `answer` reaches the reward function."""
    response = lambda values, r: list(values[r.prompt_length :])
    return {
        "prompt_ids": [r.ids[: r.prompt_length] for r in rollouts],
        "completion_ids": [response(r.ids, r) for r in rollouts],
        "logprobs": [response(r.logprobs, r) for r in rollouts],
        "env_mask": [[int(own) for own in response(r.response_mask, r)] for r in rollouts],
        "answer": [r.answer for r in rollouts],
    }


def reward(answer, golden_answers, **_):
    """[Eq. 4] As TRL wants it: one number a conversation, from `answer` and a column of the dataset."""
    return [outcome_reward(a, gold) for a, gold in zip(answer, golden_answers)]


class Environment:
    """The tiny world for a trainer: draws questions, holds conversations, and remembers how the last ones went."""

    def __init__(self, tokenizer, questions, search, settings, seed=0):
        self.tokenizer, self.questions, self.search, self.settings = tokenizer, questions, search, settings
        self.known, self.seed, self.told = {q.text: q for q in questions}, seed, {}

    def stream(self):
        """Questions without end, as rows of a dataset: two hops or one, by how the last conversations went."""
        rng = random.Random(self.seed)
        while True:
            for q in data.draw_questions(self.questions, QUESTIONS, data.two_hop_share(self.told), rng):
                yield {"prompt": q.text, "golden_answers": list(q.gold_answers)}

    def converse(self, prompts, trainer):
        """TRL's rollout_func: the prompts of this process, each as often as its group is large -> conversations."""
        policy = trainer.accelerator.unwrap_model(trainer.model)
        device = policy.get_output_embeddings().weight.device
        place = trainer.state.global_step * trainer.accelerator.num_processes + trainer.accelerator.process_index
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + place)
        asked = [self.known[prompt] for prompt in prompts]
        how = self.settings, 1, trainer.args.temperature, generator
        policy.eval()  # PITFALL: while it trains with checkpointed layers, transformers takes the cache away
        rollouts = rollout(policy, self.tokenizer, asked, self.search, *how)
        policy.train()
        self.told |= by_hops(rollouts, [outcome_reward(r.answer, r.question.gold_answers) for r in rollouts])
        return carried_over(rollouts)


def make_trainer(policy, environment, output, steps, processes=1):
    """The paper's GRPO with the values of train.py, in TRL's words."""
    datasets, trl = packages()
    args = trl.GRPOConfig(
        output_dir=str(output), max_steps=steps * UPDATES, num_generations=GROUP, steps_per_generation=UPDATES,
        per_device_train_batch_size=QUESTIONS * GROUP // UPDATES // processes, gradient_accumulation_steps=1,
        max_completion_length=environment.settings.max_length, temperature=1.0, beta=0.001, epsilon=0.2,
        loss_type="bnpo", scale_rewards="group",  # [D7] the mean over the tokens of a minibatch; [Eq. 3] the deviation
        learning_rate=5e-4, adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="constant_with_warmup",
        warmup_steps=5 * UPDATES, bf16=False, use_cpu=not torch.cuda.is_available(), seed=environment.seed,
        logging_steps=5 * UPDATES, activation_checkpointing=False, save_strategy="no", report_to="none",
    )  # fmt: skip
    questions = datasets.IterableDataset.from_generator(environment.stream)
    own = {"processing_class": environment.tokenizer, "rollout_func": environment.converse}
    return trl.GRPOTrainer(policy, reward, args, questions, **own)


def tiny(seed):
    """-> (policy, Environment, held-out questions) of the tiny world. Its base model is made at the first run."""
    held_out, engine, world = data.task(0)
    policy, tokenizer, _ = data.base_model(data.BaseConfig(seed=seed), "outputs")
    return policy, Environment(tokenizer, world.train, engine.search, data.TINY_SETTINGS, seed), held_out


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/trl", help="folder of the trained policy")
    parser.add_argument("--steps", type=int, default=100, help=f"of {QUESTIONS} questions x {GROUP}, {UPDATES} updates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    packages()  # before a base model is made for nothing
    processes = int(os.environ.get("WORLD_SIZE", 1))  # that torchrun started
    if QUESTIONS * GROUP // UPDATES % processes:
        raise Mistake(f"{processes} processes cannot share {QUESTIONS * GROUP // UPDATES} rollouts: start 2 or 4")
    policy, environment, held_out = tiny(args.seed)
    trainer = make_trainer(policy, environment, args.output, args.steps, processes)
    trainer.train()
    trainer.save_model(args.output)
    if trainer.accelerator.is_main_process:
        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
        asked = data.fixed_sample(held_out, 400)
        how = environment.search, environment.settings, "search-r1"
        metrics, _ = evaluate(policy, environment.tokenizer, asked, *how)
        right = " / ".join(f"{metrics[f'em_{hops}hop']:.3f}" for hops in (1, 2))
        print(f"after {args.steps} steps on {processes} processes: EM {right} (one hop / two hops)")


if __name__ == "__main__":
    run_main(main)
