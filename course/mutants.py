"""Mutants: one-line mistakes that were made in real code of this kind, and the test that catches each of them.

    python -m course.mutants                                try them all: a test must turn red for each (minutes)
    python -m course.mutants --only 4,9                     these two

The bug hunt (`python -m course.assignment bughunt OUT --seed ada`): read the code beside the paper, find three lines
that do not do what the paper says, write for each a test that is red before and green after. Which three they are
depends on the seed, so give every student another one.
"""

import ast
import hashlib
import random
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from course.assignment import ROOT, copy_project
from course.exercises import chosen
from course.grade import run_tests
from course.paper_map import functions
from data import Mistake, Parser, run_main

# old: a piece of the file that occurs once; test: "file::test"; lesson: what goes wrong with `new`, maybe where it was
# seen.
Mutant = namedtuple("Mutant", "file old new test lesson")

S, T, M, R, E = (f"test_{name}.py::" for name in ("searchr1", "train", "models", "retrieval", "engine"))
MUTANTS = [
    Mutant(
        "searchr1.py", "[logprobs is not None] * len(ids)", "[True] * len(ids)",
        S + "test_retrieved_tokens_prompt_and_padding_get_exactly_zero_gradient",
        "retrieved tokens are trained as if the policy had written them: the paper's ablation, by accident",
    ),
    Mutant(
        "searchr1.py", "mask_BT=padded(masks, torch.bool)[:, 1:],", "mask_BT=padded(masks, torch.bool)[:, :-1],",
        S + "test_retrieved_tokens_prompt_and_padding_get_exactly_zero_gradient",
        "position t scores token t + 1: the mask is one token late, and nothing crashes",
    ),
    Mutant(
        "searchr1.py", "torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp_min(1)",
        "(torch.where(mask.bool(), x, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)).mean()",
        S + "test_the_policy_loss_is_a_mean_over_tokens_not_over_rollouts",
        "a mean of means: a token of a short rollout weighs more [D7]",
    ),
    Mutant(
        "searchr1.py", "variance = (centred**2).sum() / (count - 1).clamp_min(1)",
        "variance = (centred**2).sum() / count",
        S + "test_whitening_uses_masked_mean_and_unbiased_deviation", "the biased variance, as numpy's default",
    ),
    Mutant(
        "searchr1.py", "next_value = torch.where(own, values[:, t], next_value)", "next_value = values[:, t]",
        S + "test_gae_over_a_masked_rollout_is_gae_with_those_positions_deleted",
        "the value of a retrieved token is bootstrapped from, as in the official code [D2]",
    ),
    Mutant(
        "searchr1.py", "next_advantage = torch.where(own, advantage, next_advantage)", "next_advantage = advantage",
        S + "test_gae_over_a_masked_rollout_is_gae_with_those_positions_deleted",
        "retrieved tokens take part in GAE, as in the official code [D2]",
    ),
    Mutant(
        "searchr1.py", "rewards_QG.std(1, keepdim=True) + 1e-6", "rewards_QG.std(1, keepdim=True, correction=0) + 1e-6",
        S + "test_group_advantages_ignore_shift_and_scale_and_equal_rewards_give_zero",
        "the biased deviation: with groups of five all advantages are 12 % larger",
    ),
    Mutant(
        "searchr1.py", "rewards.double().view(-1, group_size)", "rewards.float().view(-1, group_size)",
        S + "test_group_advantages_ignore_shift_and_scale_and_equal_rewards_give_zero",
        "eight equal rewards of 2/3 have an advantage of 0.06 by rounding: ours had it until a real model was trained",
    ),
    Mutant(
        "searchr1.py", "rewards_QG - rewards_QG.mean(1, keepdim=True)", "rewards_QG - rewards_QG.mean()",
        S + "test_group_advantages_ignore_shift_and_scale_and_equal_rewards_give_zero",
        "the batch's mean as the baseline: easy questions are always rewarded, hard ones always punished",
    ),
    Mutant(
        "searchr1.py", "-token_mean(torch.minimum(unclipped, clipped), mask)",
        "-token_mean(torch.maximum(unclipped, clipped), mask)",
        S + "test_clipping_stops_the_gradient_on_the_right_side_only", "the optimistic bound: nothing is held back",
    ),
    Mutant(
        "searchr1.py", "torch.where(mask.bool(), logprobs - old_logprobs, 0.0)",
        "torch.where(mask.bool(), old_logprobs - logprobs, 0.0)",
        S + "test_clipping_stops_the_gradient_on_the_right_side_only",
        "the ratio upside down: at the first update it is 1 all the same, and its gradient points the other way",
    ),
    Mutant(
        "searchr1.py", "(torch.expm1(r) - r).clamp(max=10.0)", "torch.expm1(r) - r",
        S + "test_the_estimators_of_kl_have_schulmans_values_and_a_bounded_gradient",
        "one token that the policy has given up outweighs the whole batch",
    ),
    Mutant(
        "searchr1.py", "r = (ref_logprobs - logprobs).clamp(max=20.0)", "r = (logprobs - ref_logprobs).clamp(max=20.0)",
        S + "test_the_estimators_of_kl_have_schulmans_values_and_a_bounded_gradient",
        "k3 of the other direction: it estimates another quantity, and looks as small and as positive",
    ),
    Mutant(
        "searchr1.py", "token_mean(torch.maximum((values - returns)", "token_mean(torch.minimum((values - returns)",
        S + "test_the_value_loss_takes_the_larger_square", "a value that ran away is never pulled back",
    ),
    Mutant(
        "searchr1.py", "if answer is not None and normalize_answer(answer) else 0.0", "if answer is not None else 0.0",
        S + "test_an_answer_that_normalises_to_nothing_earns_nothing",
        "an answer of punctuation is right whenever a gold answer is an article [D8]",
    ),
    Mutant(
        "searchr1.py", "pairs[-1].strip() if pairs else None", "pairs[0].strip() if pairs else None",
        S + "test_the_last_answer_pair_counts", "the first answer counts, though the policy corrected itself",
    ),
    Mutant(
        "searchr1.py", 're.sub(r"\\b(a|an|the)\\b", " ", s)', 're.sub(r"(a|an|the)", " ", s)',
        S + "test_exact_match_is_the_official_one", "articles are cut out of words: 'Athens' equals 'ens'",
    ),
    Mutant(
        "searchr1.py", "tokenizer.decode(ids[max(start, len(ids) - 16) :])", "tokenizer.decode(ids[-16:])",
        S + "test_only_the_text_of_a_turn_can_end_it", "a tag in the prompt or in a passage ends the policy's turn",
    ),
    Mutant(
        "searchr1.py", "if b == max_turns:", "if b > max_turns:",
        S + "test_the_last_turn_cannot_search", "one search more than the budget, and its passages are never read",
    ),
    Mutant(
        "searchr1.py", "for b in range(max_turns + 1):", "for b in range(max_turns):",
        S + "test_the_last_turn_cannot_search", "after its last search the policy cannot answer any more",
    ),
    Mutant(
        "searchr1.py", "split_special_tokens=True", "split_special_tokens=False",
        S + "test_special_tokens_spelled_out_in_a_passage_stay_text",
        "a passage that spells <|im_end|> ends the message: retrieved text is hostile",
    ),
    Mutant(
        "searchr1.py", "return ids[: max(0, budget - len(tail))] + tail", "return ids[:budget]",
        S + "test_passages_are_cut_and_their_closing_tag_is_not",
        "</information> is cut off with the passages, as in the official code [D6]",
    ),
    Mutant(
        "searchr1.py", "r.append(block)", "r.append(block, [0.0] * len(block))",
        S + "test_a_conversation_runs_as_algorithm_1_says", "log-probs for tokens that nobody sampled, so mask 1",
    ),
    Mutant(
        "searchr1.py", "last_B = T - 1 - mask_BT.flip(1).float().argmax(1)", "last_B = torch.full((B,), T - 1)",
        S + "test_the_outcome_reward_stands_on_the_policys_last_token",
        "the reward stands on padding: only the longest rollout of a batch is ever paid",
    ),
    Mutant(
        "searchr1.py", "last_hidden_state[:, :-1].float()", "last_hidden_state[:, 1:].float()",
        S + "test_the_critic_values_the_state_before_each_token", "the critic has seen the token whose value it tells",
    ),
    Mutant(
        "engine.py", "torch.log_softmax(scaled_nV, dim=-1)", "torch.log_softmax(logits_nV, dim=-1)",
        E + "test_the_samplers_logprobs_equal_the_trainers",
        "tokens and old log-probs at temperature 1, whatever is asked for",
    ),
    Mutant(
        "engine.py", "slots.lengths, slots.head = [0] * len(slots.lengths), None", "slots.head = None",
        E + "test_old_keys_never_meet_new_weights", "a cache outlives the optimiser step: old keys, new weights",
    ),
    Mutant(
        "train.py", "token_rewards_BT -= config.kl_coef * kl_k1", "token_rewards_BT += config.kl_coef * kl_k1",
        T + "test_kl_in_the_reward_is_k1_of_the_policys_tokens", "the policy is paid for leaving the reference",
    ),
    Mutant(
        "train.py", "loss = loss + config.kl_coef * kl_metrics", "loss = loss - config.kl_coef * kl_metrics",
        T + "test_the_kl_loss_pulls_towards_the_reference", "a minus in front of a penalty: the policy runs away",
    ),
    Mutant(
        "train.py", "share = part.mask_BT.sum() / tokens", "share = len(piece) / len(index)",
        T + "test_micro_batches_equal_the_big_batch", "micro-batches weigh by rows: their size changes the gradient",
    ),
    Mutant(
        "models.py", "self.B[self.role].T, alpha=self.scale)", "self.B[self.role].T)",
        M + "test_an_adapted_model_is_the_model_with_the_sums_as_its_weights", "alpha / rank is forgotten",
    ),
    Mutant(
        "models.py", "p.detach().copy_(master.detach())", "p.detach().copy_(p.detach())",
        M + "test_a_bf16_weight_moves_at_the_papers_learning_rate_only_with_an_fp32_master",
        "the masters learn, the model that samples does not",
    ),
    Mutant(
        "retrieval.py", "rows_SK[~query_SE.any(1)] = -1", "pass",
        R + "test_search_returns_only_what_was_found", "a query of unknown words finds the first passages of the file",
    ),
]  # fmt: skip


def around(mutant, text):
    """What stands before and after `old` in the text. Mistake if `old` does not stand there exactly once."""
    if text.count(mutant.old) != 1:
        raise Mistake(f"{mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
    return text.split(mutant.old)


def mutated(mutant):
    """The text of the mutant's file with its mistake in it."""
    return mutant.new.join(around(mutant, (ROOT / mutant.file).read_text("utf-8")))


def killed(mutant, seconds=300):
    """Does the mutant's test turn red? -> (bool, seconds it took)."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        Path(folder, mutant.file).write_text(mutated(mutant))
        (error,) = run_tests(folder, [mutant.test], seconds).values()
    return error is not None, time.perf_counter() - began


# What no run shows: the conversation ends before a second pair of tags, no gold answer of a data set is empty, all
# presets sample at temperature 1, and slots are empty when all conversations have left them.
QUIET = (
    "pairs[-1].strip() if pairs else None", "if answer is not None and normalize_answer(answer) else 0.0",
    "torch.log_softmax(scaled_nV, dim=-1)", "slots.lengths, slots.head = [0] * len(slots.lengths), None",
)  # fmt: skip
HANDOUT = """# The bug hunt

Three lines of this project do not do what the paper says, or the text beside the code. Find them, mend them, and write
for each a test in `tests/test_hunt.py` that is red before and green after.

- Read `searchr1.py`, `train.py` to the end of section 4, `engine.py`, `models.py` and `retrieval.py`. The others are
  whole.
- What is tagged [D1] to [D18] departs from the paper on purpose; the list stands at the head of the files.
- The tests were taken away on purpose, and so were the comments right above the three lines. `tests/conftest.py` is
  still there: small models, batches, scripted conversations.
- Ask yourself of each mistake what a run would look like, and which metric would show it first.
- Do not look into the hints of the exercises: some of them tell. A clean copy of the project tells everything:
  a mistake counts with its test and a sentence of your own about what it does.

This is hunt {mark}.
"""


def place(mutant):
    """-> (file, "Class.function") in which the mutant's line stands."""
    text = (ROOT / mutant.file).read_text("utf-8")
    line = text.count("\n", 0, text.index(mutant.old)) + 1
    return mutant.file, ".".join(name for first, last, name in functions(ast.parse(text)) if first <= line <= last)


def planted(seed):
    """Seed of a student -> three mutants, two in searchr1.py, caught by different tests, and one in another file."""
    rng = random.Random(f"bug hunt {seed}")
    by_test = {True: {}, False: {}}
    for mutant in MUTANTS:
        if mutant.old not in QUIET:
            by_test[mutant.file == "searchr1.py"].setdefault(mutant.test, []).append(mutant)
    tests = [(True, t) for t in rng.sample(sorted(by_test[True]), 2)] + [(False, rng.choice(sorted(by_test[False])))]
    return [rng.choice(by_test[method][test]) for method, test in tests]


def with_mistake(bug, text):
    """The text of the mutant's file with its mistake in it, without the comments on this line and right above it."""
    before, after = around(bug, text)
    lines, rest = before.split("\n"), after.split("\n")
    while len(lines) > 1 and lines[-2].strip().startswith("#"):
        del lines[-2]
    rest[0] = rest[0].split("  # ")[0]
    return "\n".join(lines) + bug.new + "\n".join(rest)


def mark(seed):
    """What HUNT.md says of the seed, so that it is graded by the same one."""
    return hashlib.sha256(f"bug hunt {seed}".encode()).hexdigest()[:8]


def write_bughunt(out, seed):
    """A folder that does not exist yet -> the project with three mistakes in it, with a handout, and without what tells
    them: tests (most mistakes turn several of them red), and comments on the three lines or right above them."""
    out = copy_project(out, ("mutants.py",))
    for bug in planted(seed):
        (out / bug.file).write_text(with_mistake(bug, (out / bug.file).read_text("utf-8")), "utf-8")
    for test in (out / "tests").glob("test_*.py"):
        test.unlink()
    (out / "HUNT.md").write_text(HANDOUT.format(mark=mark(seed)))


def grade_bughunt(folder, seed, seconds):
    """A student's bug hunt and its seed -> list of {file, lesson, red: what its test says, or None}. A mistake can turn
    the test of another one red, too. So each is tested alone: where the others were planted, the functions are ours."""
    handout = Path(folder) / "HUNT.md"
    if not handout.exists() or mark(seed) not in handout.read_text("utf-8"):
        raise Mistake(f"{handout} is not of the bug hunt with the seed {seed}")
    bugs, results = planted(seed), []
    places = [place(bug) for bug in bugs]
    for bug, own in zip(bugs, places):
        ours = {}
        for file, function in places:
            if (file, function) != own:
                ours.setdefault(file, []).append(function)
        error = run_tests(folder, [bug.test], seconds, ours)[bug.test]
        results.append({"file": bug.file, "lesson": bug.lesson, "red": error})
    return results


def main(argv=None):
    parser = Parser(description="Try the mutants: a test must turn red for each.")
    parser.add_argument("--only", default="", metavar="N", help="like 1-6 or 3,7-9 (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="tests side by side (default: 2)")
    args = parser.parse_args(argv)
    numbers = chosen(args.only, "--only", len(MUTANTS))
    if args.jobs < 1:
        raise Mistake(f"--jobs {args.jobs}: must be at least 1")
    tried = [MUTANTS[n - 1] for n in numbers]
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, mutant, (dead, seconds) in zip(numbers, tried, results := list(pool.map(killed, tried))):
            print(f"{number:2}  {'killed  ' if dead else 'SURVIVED'}  {seconds:4.1f} s  {mutant.file}: {mutant.lesson}")
    survivors = sum(not dead for dead, _ in results)
    print(f"{len(tried) - survivors} of {len(tried)} killed")
    return int(survivors > 0)


if __name__ == "__main__":
    run_main(main)
