"""The exercises: functions of the method to be written again, from one line to the whole of Algorithm 1.

    python -m course.exercises                     the table
    python -m course.exercises 6 --hint 2          the first two hints of exercise 6

course/assignment.py writes a starter in which these functions are empty, course/grade.py runs their tests. The solution
is the repository itself.
"""

from collections import namedtuple

from data import Mistake, Parser, run_main
from eval import aligned

# functions: what is empty in the starter, "file.function" or "file.Class.function"; minutes: a guess for whoever has
# read the paper; read: what to read before; tests: "file::test"; hints: each says more than the one before.
Exercise = namedtuple("Exercise", "functions minutes points read tests hints")

S, T, M, R, K, E = (f"test_{name}.py::" for name in ("searchr1", "train", "models", "retrieval", "kernels", "engine"))
EXERCISES = [
    Exercise(
        ("searchr1.parse_action",), 10, 2, "Sec. 3.2; Algorithm 1, lines 6 and 8",
        (S + "test_the_first_complete_tag_pair_is_the_action",),
        ("Which of the two tags comes first in the text? A tag that is never closed does not count.",
         "One regular expression finds both kinds of pairs; ACTION stands above the function.",
         "Its first group is the kind, its second the content, which is stripped. No match: invalid, and empty."),
    ),
    Exercise(
        ("searchr1.exact_match", "searchr1.outcome_reward"), 15, 3, "Sec. 3.4, Eq. 4; departure [D8]",
        (S + "test_exact_match_is_the_official_one", S + "test_an_answer_that_normalises_to_nothing_earns_nothing",
         S + "test_the_reward_reads_the_response_only"),
        ("Both sides are normalised before they are compared, and one gold answer is enough.",
         "No answer is None, not an empty text. What does normalize_answer make of 'The'?",
         "The reward is the exact match if there is an answer and its normal form is not empty; else 0.0."),
    ),
    Exercise(
        ("searchr1.Rollout.append",), 15, 4, "Sec. 3.1, I(y_t); departures [D1] and [D2]",
        (S + "test_a_conversation_runs_as_algorithm_1_says",
         S + "test_an_invalid_turn_is_told_so_in_words_which_are_masked",
         S + "test_retrieved_tokens_prompt_and_padding_get_exactly_zero_gradient",
         E + "test_the_samplers_logprobs_equal_the_trainers"),
        ("Three lists grow by the same number of entries at every call.",
         "Whoever sampled the tokens has log-probs for them. Whoever did not has none.",
         "The mask is True exactly where log-probs were given; where they were not, they are 0.0."),
    ),
    Exercise(
        ("searchr1.collate",), 30, 6, "Sec. 3.1; the alphabet of shapes at the top of searchr1.py",
        (S + "test_more_padding_changes_nothing",
         S + "test_retrieved_tokens_prompt_and_padding_get_exactly_zero_gradient",
         S + "test_without_the_mask_retrieved_tokens_are_trained_and_the_prompt_is_not",
         E + "test_the_samplers_logprobs_equal_the_trainers", T + "test_micro_batches_equal_the_big_batch"),
        ("Position t of a model's output scores token t + 1. Which end of mask and log-probs has to go?",
         "Pad on the right, with torch.nn.utils.rnn.pad_sequence. Take no mask from the padding's id.",
         "ids stay [B, L]; mask and old log-probs lose their first column. Without the mask all but the prompt count."),
    ),
    Exercise(
        ("searchr1.token_mean",), 10, 3, "Eq. 3; departure [D7]",
        (S + "test_the_policy_loss_is_a_mean_over_tokens_not_over_rollouts",
         S + "test_without_the_mask_retrieved_tokens_are_trained_and_the_prompt_is_not",
         S + "test_a_batch_or_an_episode_without_a_token_to_train_is_zero_and_not_nan"),
        ("A long rollout has more to say than a short one here.",
         "A masked position may hold NaN, and NaN * 0 is NaN: select, do not multiply.",
         "Sum where the mask is True, divided by the number of True; where there is none, by 1."),
    ),
    Exercise(
        ("searchr1.whiten",), 15, 4, "Eq. 2; the docstring",
        (S + "test_whitening_uses_masked_mean_and_unbiased_deviation",
         S + "test_a_batch_or_an_episode_without_a_token_to_train_is_zero_and_not_nan"),
        ("Mean and deviation belong to the unmasked positions of the whole batch, not of a row.",
         "Unbiased: the squares are divided by count - 1. One position must not divide by 0.",
         "Multiply the centred values by rsqrt(variance + 1e-8); masked positions are exactly 0."),
    ),
    Exercise(
        ("searchr1.gae",), 45, 10, "Eq. 2; the GAE paper, Eq. 16; departure [D2]",
        (S + "test_gae_with_lambda_one_is_return_minus_value", S + "test_gae_with_lambda_zero_is_the_td_error",
         S + "test_gae_over_a_masked_rollout_is_gae_with_those_positions_deleted"),
        ("Go from the last position to the first and carry two numbers a row: the next value and the next advantage.",
         "At a masked position nothing is carried on and nothing is written: as if it were not there.",
         "delta_t = r_t + gamma V_{t+1} - V_t with the carried V; A_t = delta_t + gamma lam A_{t+1}; torch.where."),
    ),
    Exercise(
        ("searchr1.group_advantages",), 15, 4, "Eq. 3; DeepSeekMath, Sec. 4.1.2",
        (S + "test_group_advantages_ignore_shift_and_scale_and_equal_rewards_give_zero",),
        ("Members of a group stand in a row: a view of [Q, G] is all that is needed.",
         "Unbiased deviation; equal rewards must give exactly 0. What is the deviation of a group of one?",
         "(r - mean) / (std + 1e-6) along dimension 1, in double precision; a group of one keeps its reward."),
    ),
    Exercise(
        ("searchr1.kl_k1", "searchr1.kl_k2", "searchr1.kl_k3"), 20, 5, "Eq. 1; Schulman 2020, Approximating KL",
        (S + "test_the_estimators_of_kl_have_schulmans_values_and_a_bounded_gradient",
         K + "test_k1_k2_and_k3_of_sampled_tokens_agree_with_the_exact_kl"),
        ("All three are functions of r = log pi_ref - log pi of the sampled token.",
         "-r, r^2 / 2, e^r - r - 1. Which of them can be negative?",
         "In k3 keep e^r finite before you take it (r at most 20), use expm1, and cut the result at 10."),
    ),
    Exercise(
        ("searchr1.policy_loss",), 25, 6, "Eq. 2 and Eq. 3; the PPO paper, Eq. 7",
        (S + "test_clipping_stops_the_gradient_on_the_right_side_only",
         S + "test_clip_higher_moves_the_upper_side_only",
         S + "test_the_policy_loss_is_a_mean_over_tokens_not_over_rollouts"),
        ("The objective is maximised; a loss is minimised.",
         "The ratio is exp(new - old), and 1 where the mask is False. Clip the ratio, then take the smaller product.",
         "-token_mean(min(ratio A, clip(ratio) A)), and the token mean of where the clipped product is smaller."),
    ),
    Exercise(
        ("searchr1.value_loss",), 15, 4, "Eq. 2; the docstring",
        (S + "test_the_value_loss_takes_the_larger_square",),
        ("Two predictions: the value, and the value kept near the old one.",
         "Which of two squares pulls back a value that ran away: the smaller or the larger?",
         "0.5 * token_mean(max((V - R)^2, (V_old + clamp(V - V_old) - R)^2))."),
    ),
    Exercise(
        ("models.Adapted.forward",), 25, 6, "the LoRA paper, Eq. 3; departure [D14]",
        (M + "test_an_adapted_model_is_the_model_with_the_sums_as_its_weights",),
        ("The frozen layer's result is always there; the change is added only if a role is on.",
         "Two thin products, x A^T and then B^T, never the [out, in] matrix B A.",
         "y = linear(x) + scale * (x A^T) B^T with the matrices of self.role; keep all leading dimensions of x."),
    ),
    Exercise(
        ("retrieval.BM25.rank",), 30, 6, "retrieval.py, the docstring of BM25",
        (R + "test_bm25_is_the_formula", R + "test_of_passages_that_tie_bm25_takes_the_first"),
        ("Word w owns a slice of two arrays: in which passages it stands, and what it weighs there.",
         "Add up one score a passage; a word that the query repeats counts as often.",
         "np.partition gives the k-th best score. Order what reaches it by score, then by row; drop scores of 0."),
    ),
    Exercise(
        ("kernels.gradient_twin", "kernels.gradient_kernel"), 60, 10, "kernels.py, section 1",
        (K + "test_values_and_gradients_equal_the_float64_expression",
         K + "test_the_linear_path_equals_the_float64_expression_slice_by_slice",
         K + "test_nothing_leaks_out_of_masked_rows"),
        ("The last formula of section 1 is the whole function. First the twin: it is plain PyTorch.",
         "p = exp(z - ln s). Which columns of this slice, if any, hold a target?",
         "In the kernel a program has a row and BLOCK columns: load, compute in fp32, store under the mask `inside`."),
    ),
    Exercise(
        ("kernels.statistics_twin", "kernels.statistics_kernel"), 90, 14, "kernels.py, section 1; Milakov, Gimelshein",
        (K + "test_values_and_gradients_equal_the_float64_expression",
         K + "test_logits_of_ten_thousand_keep_their_digits",
         K + "test_blocks_of_minus_infinity_are_probability_zero",
         K + "test_one_pass_with_a_reference_equals_two_passes_and_the_kl_over_all_tokens"),
        ("Sums are always relative to the maximum so far. When it rises, they are re-based.",
         "Twin: new maximum first, then shift, then this slice's sums, then the formulas of s', u', w' in section 1.",
         "Kernel: the same over BLOCKs within the slice, and once more, at its end, for the state of earlier slices."),
    ),
    Exercise(
        ("searchr1.converse",), 90, 16, "Algorithm 1; departures [D1], [D5], [D6], [D18]",
        tuple(S + name for name in (
            "test_a_conversation_runs_as_algorithm_1_says", "test_a_turn_stops_at_its_first_closing_tag",
            "test_sampled_ids_are_the_trained_ids_however_a_tag_is_split",
            "test_an_invalid_turn_is_told_so_in_words_which_are_masked",
            "test_a_sampled_end_of_sequence_is_kept_and_trained", "test_the_last_turn_cannot_search",
            "test_without_search_there_is_one_turn_and_no_call",
            "test_the_budgets_end_turns_and_episodes_and_the_prompt_stays",
            "test_a_hostile_passage_neither_ends_the_episode_nor_earns_a_reward_nor_breaks_the_mask",
        )),
        ("A generator: `token, logprob = yield` asks for a token, `passages = yield query` for passages.",
         "One turn more than may search. turn_ended, parse_action and observation_ids do the details.",
         "What the policy wrote goes in with its log-prob, what comes back without. Leave room for one token."),
    ),
]  # fmt: skip
OPEN = (
    "An improvement of your own: change one thing about the method and measure it at three seeds of your world, next\n"
    "to the method as it is. Hand in the change, one picture (python -m course.points) and half a page: what you\n"
    "expected, what came out, and why. A result that disappoints is worth as much as any other."
)


def chosen(text, flag="--exercises", count=len(EXERCISES)):
    """"1-3,7" -> [1, 2, 3, 7]; "" -> all. Mistake for a number that is not from 1 to `count`."""
    numbers = []
    for piece in text.split(",") if text else [f"1-{count}"]:
        first, dash, last = piece.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise Mistake(f"{flag} {text}: give numbers like 1-3,7")
        numbers += range(int(first), int(last) + 1)
    if wrong := [n for n in numbers if not 1 <= n <= count]:
        raise Mistake(f"{flag} {text}: there is no {wrong[0]}, only 1 to {count}")
    return sorted(set(numbers))


def table():
    rows = [["", "write", "minutes", "points", "read before"]]
    for n, e in enumerate(EXERCISES, 1):
        rows.append([f"{n}", ", ".join(e.functions), f"{e.minutes}", f"{e.points}", e.read])
    total = sum(e.minutes for e in EXERCISES), sum(e.points for e in EXERCISES)
    return f"{aligned(rows)}\n{total[0]} minutes, {total[1]} points; and an open one:\n{OPEN}"


def main(argv=None):
    parser = Parser(description="Print the exercises, or hints for some of them.")
    parser.add_argument("exercise", nargs="?", help="a number, or like 1-3,7")
    parser.add_argument("--hint", type=int, choices=(1, 2, 3), default=1, help="how many hints (default: 1)")
    args = parser.parse_args(argv)
    if not args.exercise:
        return print(table())
    for number in chosen(args.exercise, "exercise"):
        exercise = EXERCISES[number - 1]
        print(f"{number}. {', '.join(exercise.functions)}    read: {exercise.read}")
        print("\n".join(f"   {hint}" for hint in exercise.hints[: args.hint]))


if __name__ == "__main__":
    run_main(main)
