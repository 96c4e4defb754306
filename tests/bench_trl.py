"""A GRPO step of the laptop recipe: ours against TRL's, the same model, adapters and conversations, in one run.

    pip install -r course/requirements-outgrow.txt peft        (for this comparison only)
    python tests/bench_trl.py --model DIR --train-data FILE --corpus bm25:FILE [--repeats 3] [any flag of train.py]

Our policy writes the conversations; TRL is handed the same ids and masks. Rewards are dealt out, two of each group are
right, so that no group is left out: untrained models earn nothing. What is timed is the rest of the step, from the
batch to the optimiser: advantages, log-probs, gradients, one update. Both have adapters on the same layers and no
reference. Ours runs with as many tokens at once as --micro-batch-tokens says, TRL with --rows conversations. The rate
of a product of two matrices, printed first, is the floor under both.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_kernels import seconds
from bench_lora import LINEARS
from course.outgrow_trl import carried_over
from data import run_main
from models import decoder_layers, make_models
from searchr1 import collate
from train import load_run, outcome_advantages, parse_config, update, writer


def product_rate(size=1024):
    """Gflop/s of a product of two fp32 matrices."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / seconds(lambda: a @ b, "cpu", 9) / 1e9


def our_steps(models, rollouts, rewards, config, repeats):
    """Seconds of each step but the first, which warms up."""
    times = []
    for step in range(repeats + 1):
        start = time.perf_counter()
        batch = collate(rollouts, models.policy.device, mask_retrieved=True)
        batch = outcome_advantages(batch, torch.tensor(rewards), config)
        update(models, batch, 1 + step, config, random.Random(step))
        times.append(time.perf_counter() - start)
    return times[1:]


class Clock(transformers.TrainerCallback):
    """Seconds from the beginning to the end of each step of a transformers Trainer."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.times.append(time.perf_counter() - self.start)


def trl_steps(folder, tokenizer, rollouts, rewards, config, rows, repeats):
    """The same in TRL's GRPOTrainer, with peft's adapters on the model in `folder`."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    last, count = len(decoder_layers(policy)), config.lora_layers or len(decoder_layers(policy))
    lora = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=LINEARS,
        layers_to_transform=list(range(last - count, last)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as output:
        args = trl.GRPOConfig(
            output_dir=output, max_steps=repeats + 1, num_generations=config.group_size, beta=config.kl_coef,
            per_device_train_batch_size=rows, gradient_accumulation_steps=len(rollouts) // rows,
            max_completion_length=config.max_length, temperature=config.temperature, epsilon=config.clip_eps,
            epsilon_high=config.clip_high, loss_type="bnpo", scale_rewards="group", learning_rate=config.lr,
            adam_beta2=config.adam_beta2, bf16=False, use_cpu=True, gradient_checkpointing=False,
            activation_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        questions = datasets.Dataset.from_list([{"prompt": r.question.text} for r in rollouts[:: config.group_size]])
        clock, carried = Clock(), carried_over(rollouts)
        trainer = trl.GRPOTrainer(
            policy, lambda completions, **_: rewards, args, questions, processing_class=tokenizer, peft_config=lora,
            rollout_func=lambda prompts, trainer: dict(carried), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return clock.times[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="TRL's conversations at once")
    flags, others = parser.parse_known_args()
    config = parse_config(["--preset", "laptop", "--dtype", "fp32", "--device", "cpu", "--no-easy-first", *others])
    print(f"{torch.get_num_threads()} threads; {config.model}; torch {torch.__version__}, trl {trl.__version__}")
    rate = product_rate()
    policy, task = load_run(config)
    models = make_models(policy.eval(), config)
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    _, write = writer(models, task, config)
    start = time.perf_counter()
    rollouts, _ = write(task.draw(1, {}), [], generator, rng)
    written = time.perf_counter() - start
    rewards = [float(i % config.group_size < 2) for i in range(len(rollouts))]
    tokens, own = sum(len(r.ids) for r in rollouts), sum(sum(r.response_mask) for r in rollouts)
    print(f"products of matrices: {rate:.0f} Gflop/s. {len(rollouts)} conversations, {tokens} tokens,")
    print(f"of which the policy wrote {own} in {written:.1f} s: {own / written:.0f} a second")
    ours = our_steps(models, rollouts, rewards, config, flags.repeats)
    folder, tokenizer = config.model, task.tokenizer
    del models, policy
    theirs = trl_steps(folder, tokenizer, rollouts, rewards, config, flags.rows, flags.repeats)
    print("| | seconds a step | tokens a second | ratio |\n|---|---|---|---|")
    base = statistics.median(ours)
    for name, times in (("ours", ours), (f"TRL, {flags.rows} rows at once", theirs)):
        middle, spread = statistics.median(times), f"{min(times):.1f} to {max(times):.1f}"
        print(f"| {name} | {middle:.1f} ({spread}) | {tokens / middle:.0f} | {middle / base:.2f} |")


if __name__ == "__main__":
    run_main(main)
