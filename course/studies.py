"""Many runs on the tiny world: the paper's Table 2 in small, its findings one by one, and a study of its KL.

    python -m course.studies mask [--seeds N]     runs of one study: figures/mask.png, mask.csv, and where they end
    python -m course.studies table [--quick]      nine methods side by side: figures/table.csv
    python -m course.studies kl                   three estimators of the KL and the exact one: figures/kl.png, kl.csv
    python -m course.studies seeds --jobs 2       sixty runs, and how many reach the bar: figures/seeds.png, seeds.csv

Flags of train.py may follow; they go to every run. Runs lie in outputs/studies, in folders named after what sets them
apart. A finished run is taken as it is, half a one is continued. So a study that was stopped goes on, and studies share
their runs.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import multiprocessing
import random
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy
import torch
from tqdm import tqdm

import data
import train
from course.points import write_points
from data import Mistake, fixed_sample, load_checkpoint
from eval import evaluate, plot_runs, read_runs
from retrieval import BM25, SearchEngine, written_whole
from searchr1 import (collate, group_advantages, head_inputs, kl_k1, kl_k2, kl_k3, policy_loss, rollout, token_logprobs,
    token_mean)  # fmt: skip

# ----- 1. A run -----

# What a study changes and no flag of train.py does, with the values of all other runs.
LOADING = {"retriever": "exact", "format_steps": data.BaseConfig.policy_steps, "patch": ""}


def failing(passages):
    """Half of the queries, always the same ones, find nothing, and nobody is told."""
    search = data.build_index(passages).search
    lost = lambda query: random.Random(query).random() < 0.5
    return lambda queries, top_k: [[] if lost(q) else found for q, found in zip(queries, search(queries, top_k))]


ENGINES = {  # passages -> search(queries, top_k)
    "lexical": lambda passages: SearchEngine(passages, BM25(passages)).search,
    # Drawn by lot; the same query finds the same passages, as with any engine.
    "random": lambda passages: lambda queries, top_k: [random.Random(q).sample(passages, top_k) for q in queries],
    "empty": lambda passages: lambda queries, top_k: [[] for _ in queries],
    "failing": failing,
}


def late_mask(*how, **more):
    """collate() with the mask one token late, as it is if it is not shifted together with the targets."""
    batch = collate(*how, **more)
    batch.mask_BT = batch.mask_BT.roll(1, 1)
    return batch


def leave_one_out(rewards_B, group_size):
    """[RLOO, Ahmadian et al. 2024] The baseline of a rollout is the mean of the others of its group; no deviation."""
    others = group_size / max(1, group_size - 1)  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
    return group_advantages(rewards_B, group_size, normalize_std=False) * others


def sequence_ratio(logprobs, old_logprobs, advantages, mask, *clip):
    """[GSPO, Zheng et al. 2025] One ratio a rollout: the geometric mean of its tokens' ratios."""
    change_BT = torch.where(mask, logprobs - old_logprobs, 0.0)
    mean_B1 = change_BT.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return policy_loss(old_logprobs + mean_B1, old_logprobs, advantages, mask, *clip)


def patch(**functions):
    """Functions of train.py by name -> a context in which they are replaced."""
    return lambda: mock.patch.multiple(train, **functions)


# What a run is made with, if not with train.py as it is: variants of the loss, and mistakes.
PATCHES = {
    "": contextlib.nullcontext,
    "dr-grpo": patch(group_advantages=functools.partial(group_advantages, normalize_std=False)),  # [Liu et al. 2025]
    "rloo": patch(group_advantages=leave_one_out),
    "gspo": patch(policy_loss=sequence_ratio),
    "no-baseline": patch(group_advantages=lambda rewards_B, group_size: rewards_B.clone()),
    "late-mask": patch(collate=late_mask),
}


def load(config, loading=LOADING):
    """Config -> (policy, Task) on the tiny world: the base model after `format_steps` steps of format, searching with
    `retriever`."""
    policy, task = train.load_run(config, loading["format_steps"])
    if loading["retriever"] != "exact":
        task = task._replace(search=ENGINES[loading["retriever"]](data.make_world(config.world_seed).passages))
    return policy, task


def finished_run(given):
    """What a run is given (flags of train.py, LOADING) -> its last checkpoint, in outputs/studies/<given>. A finished
    run is taken as it is, half a one is continued, any other is made. Mistake if another process is making it."""
    name = "-".join(f"{key}-{value}".replace("_", "-") for key, value in sorted(given.items()))
    folder = Path("outputs/studies") / name
    flags = {key: value for key, value in given.items() if key not in LOADING}
    # A run that learns early has fewer steps than it was given; its config.json says how many.
    last = lambda: folder / f"checkpoint-{json.loads((folder / 'config.json').read_text())['steps']}"
    with train.alone_in(folder):
        if not (folder / "config.json").exists() or not last().exists():
            half = data.checkpoints(folder, "trainer_state.pt")
            if not half:  # what a killed run left before its first checkpoint
                (folder / "metrics.jsonl").unlink(missing_ok=True)
            config = train.parse_config({"resume": str(folder)} if half else flags | {"output_dir": str(folder)})
            print(f"{'continuing' if half else 'run'} {name}")
            with quiet(), PATCHES[given.get("patch", "")]():  # the bar stays
                train.train(config, *load(config, {key: given.get(key, LOADING[key]) for key in LOADING}))
    return last()


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


def spread(values):
    """Numbers, one a seed -> "mean (lowest to highest)"."""
    text = f"{sum(values) / len(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


# ----- 2. The studies -----

# Study -> {label: what its runs are given}. Runs that are given the same are made once, whichever study wants them.
STUDIES = {
    # Table 4: without the mask training is less stable and ends lower.
    "mask": {"with the mask": {}, "without": {"no_mask": True}},
    # Sec. 5: GRPO is faster at first, PPO is more stable, both end alike. Table 8: groups of one (REINFORCE) end best.
    "algo": {"PPO": {"algo": "ppo"}, "GRPO": {}, "REINFORCE": {"algo": "reinforce"}},
    # Sec. 5: the instruct model starts higher and learns faster, the base model catches up.
    "base-instruct": {f"{n} steps of format": {"format_steps": n} for n in (80, 160, 480)},
    # Appendix, Table 7: three passages a search are best, one is worse; five learn fast and end below three.
    "topk": {f"{k} a search": {"top_k": k} for k in (1, 3, 5)},
    # Appendix, Table 8: larger groups learn faster and are less stable; a group of one ends best. Always 240 rollouts.
    "group-size": {f"groups of {g}": {"group_size": g, "batch_size": 240 // g} for g in (1, 3, 5, 8)},
    # Sec. 5: the response first gets shorter (filler goes), then longer (it searches), and the reward rises with it.
    "dynamics": {"PPO": {"algo": "ppo"}, "GRPO": {}},
    # A later re-examination: with a random engine the policy stops searching, with an empty one it searches more.
    "retriever": {kind: {"retriever": kind} for kind in ("exact", "lexical", "random", "empty")},
    # The budget of Algorithm 1: what takes two searches cannot be answered with one.
    "turns": {f"B = {b}": {"max_turns": b} for b in (1, 2, 3)},
    # Later algorithms: what each changes about GRPO's advantage, ratio or batch (--variant: one of them).
    "variants": {
        "GRPO": {}, "Dr. GRPO": {"patch": "dr-grpo"}, "RLOO": {"patch": "rloo"},
        "GSPO": {"patch": "gspo", "clip_eps": 3e-4, "clip_high": 4e-4},  # its paper's: a mean ratio hardly leaves 1
        "DAPO": {"clip_high": 0.28, "redraws": 1},
    },
    # A gallery: what a broken run looks like, and which metric shows it first.
    "failures": {
        "as it is": {}, "mask off": {"no_mask": True}, "no KL, large rate": {"kl_coef": 0.0, "lr": 0.005},
        "rate times ten": {"lr": 0.005}, "no baseline": {"patch": "no-baseline"},
        "mask one token late": {"patch": "late-mask"}, "engine fails in silence": {"retriever": "failing"},
    },
}  # fmt: skip


LENGTH = {"steps": 100, "until_learned": False}  # of all runs of a study: compared are runs of one length


def study(name, seeds, given, labels):
    """Make the runs of a study with these labels, draw them into figures/<name>.png with bands over the seeds, print
    where they end."""
    runs, defaults = {}, dataclasses.asdict(train.Config()) | LOADING
    variants = {label: changes for label, changes in STUDIES[name].items() if label in labels}
    for seed in range(seeds):
        for label, changes in variants.items():
            changes = {key: value for key, value in changes.items() if value != defaults[key]}  # a run has one name
            folder = finished_run(LENGTH | changes | given | {"seed": seed}).parent
            runs[f"{label}, seed {seed}"] = read_runs([folder])[folder.name]
    Path("figures").mkdir(exist_ok=True)
    plot_runs(runs, f"figures/{name}.png")
    write_points(runs, f"figures/{name}.csv")
    header = f"| {name} | EM, one hop | EM, two hops | searches, one hop | searches, two hops |"
    print(f"\n{header}\n|---|---|---|---|---|")
    for label in variants:
        last = [runs[f"{label}, seed {seed}"][-1] for seed in range(seeds)]
        ends = ("eval/em_1hop", "eval/em_2hop", "eval/searches_1hop", "eval/searches_2hop")
        print(f"| {label} | " + " | ".join(spread([r[metric] for r in last]) for metric in ends) + " |")
    print(f"\nwrote figures/{name}.png and .csv; mean of {seeds} seeds (lowest to highest), greedy, held-out questions")


# ----- 3. The table -----

# How many steps `table --quick` trains: with one seed enough for the order.
QUICK = {"grpo": 50, "ppo": 40, "sft": 40, "rejection": 25, "r1": 10}
UNTRAINED = {"direct": "Direct inference", "cot": "CoT", "ircot": "IRCoT", "search-o1": "Search-o1", "rag": "RAG"}


def trained_rows(seed, quick, given):
    """Make the runs behind those rows of the table that are trained -> {(row, method): checkpoint}."""
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
    scores = {}
    for seed in range(seeds):
        checkpoints = trained_rows(seed, quick, given)
        config = train.parse_config(given | {"seed": seed})
        with quiet():
            base, task = load(config)
        held_out = fixed_sample(task.held_out, 200 if quick else 0)
        settings = dataclasses.replace(config.settings, do_search=True)
        rows = {(row, method): base for method, row in UNTRAINED.items()}
        rows |= {row: load_checkpoint(checkpoint, base.device)[0] for row, checkpoint in checkpoints.items()}
        for (row, method), policy in tqdm(rows.items(), desc=f"evaluating, seed {seed}"):
            metrics, _ = evaluate(policy, task.tokenizer, held_out, task.search, settings, method)
            scores.setdefault(row, []).append({name: metrics[name] for name in columns})
    Path("figures").mkdir(exist_ok=True)
    with open("figures/table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *columns])
        for row, each in scores.items():
            writer.writerows([row, seed, *(f"{s[c]:.4f}" for c in columns)] for seed, s in enumerate(each))
    header = "| method | EM, one hop | EM, two hops | both | hit | searches | calls | tokens |"
    print(f"\n{header}\n|---|---|---|---|---|---|---|---|")
    for row, each in scores.items():
        cells = [spread([s[name] for s in each]) for name in ("em_1hop", "em_2hop", "em")]
        means = [sum(s[name] for s in each) / len(each) for name in ("hit", "searches", "turns", "response_tokens")]
        print(f"| {row} | " + " | ".join(cells + [f"{mean:.2f}" for mean in means]) + " |")
    guess = sum(1 / data.PART[data.KIND_OF[q.gold_answers[0]]] for q in held_out) / len(held_out)
    print(f"\nguessing an entity of the right kind would score {guess:.3f}")
    how = f"{len(held_out)} held-out questions, greedy, mean of {seeds} seeds (lowest to highest)"
    print(f"wrote figures/table.csv; {how}")


# ----- 4. The KL: three estimators and what they estimate -----
#
# At one position pi is the policy, pi_ref its base model, y ~ pi the sampled token, r = log pi_ref(y) - log pi(y). As
# numbers, k1 and k3 have the mean KL(pi || pi_ref), and k2 is biased. As losses, what counts is their mean gradient.
# Since E[grad log pi(y)] = 0, it is
#     k1 = -r             E[grad log pi(y)]               0: it teaches nothing
#     k2 = r^2 / 2        E[-r grad log pi(y)]            grad KL(pi || pi_ref), that of the exact KL
#     k3 = e^r - r - 1    E[(1 - e^r) grad log pi(y)]     grad KL(pi_ref || pi), that of the other direction
# Our k3 is cut at 10, which takes a little from both of its means.

KL_BATCHES, KL_QUESTIONS = 20, 48  # what means, deviations and cosines are measured on
KL_STEPS, KL_LR = 40, 0.02  # of plain SGD on one estimator alone; Adam would turn k1's noise into steps of full size
KL_CURVES = [("exact KL to the base model", "kl_exact", "nats a token")]
ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
KL_NUMBERS = [("", name, "") for name in ("kl_mean", "kl_std", "kl_cosine")]  # in the CSV, too, at step 0


def kl_means(policy, base, batch):
    """Token means over a Batch: k1, k2, k3 of its sampled tokens and the exact KL -> {name: scalar}, differentiable."""
    with torch.no_grad():
        reference = head_inputs(base, batch.ids_BL)[:2]
    new = token_logprobs(policy, batch.ids_BL, batch.mask_BT, 1.0, *reference)
    kl_BT = {name: of(new.logp, new.ref_logp) for name, of in ESTIMATORS.items()} | {"exact": new.kl}
    return {name: token_mean(x_BT, batch.mask_BT) for name, x_BT in kl_BT.items()}


def kl_numbers(policy, base, batches):
    """-> {name: {kl_mean, kl_std, kl_cosine}}: mean and unbiased deviation of the estimator over the batches, and the
    cosine of its gradient with the exact KL's, both of the mean over all tokens of all batches."""
    means, gradients, parameters = {}, {}, list(policy.parameters())
    for batch in batches:
        for name, mean in kl_means(policy, base, batch).items():
            of = torch.autograd.grad(mean * batch.mask_BT.sum(), parameters, retain_graph=True)
            gradients[name] = gradients.get(name, 0) + torch.cat([g.flatten() for g in of]).double()
            means.setdefault(name, []).append(mean.item())
    numbers = {name: {"kl_mean": statistics.mean(x), "kl_std": statistics.stdev(x)} for name, x in means.items()}
    for name, gradient in gradients.items():
        numbers[name]["kl_cosine"] = torch.cosine_similarity(gradient, gradients["exact"], dim=0).item()
    return numbers


def descend(policy, base, name, draw):
    """KL_STEPS steps of SGD on one estimator alone, each on a fresh batch of the policy as it is then, draw(policy, i)
    -> [{"step": steps done, "kl_exact": token mean of the exact KL on that batch}]. The policy given stays as it is."""
    policy, records = copy.deepcopy(policy), []
    optimizer = torch.optim.SGD(policy.parameters(), KL_LR)
    for step in tqdm(range(KL_STEPS + 1), desc=f"descending {name}"):
        kl = kl_means(policy, base, draw(policy, KL_BATCHES + step))
        records.append({"step": step, "kl_exact": kl["exact"].item()})
        optimizer.zero_grad()
        kl[name].backward()
        optimizer.step()
    return records


def kl_study(seeds, given):
    """Compare k1, k2, k3 and the exact KL, as numbers and as losses, on the GRPO run of each seed. Temperature 1."""
    runs = {}
    for seed in range(seeds):
        policy, tokenizer = load_checkpoint(finished_run(given | {"seed": seed}))
        config = train.parse_config(given | {"seed": seed})
        with quiet():
            base, task = load(config)
        policy, test = policy.to(base.device), data.make_world(config.world_seed).test
        questions = fixed_sample(test, KL_BATCHES * KL_QUESTIONS)  # one hop first, then two; a batch has both

        def draw(policy, i):
            generator, asked = torch.Generator(policy.device).manual_seed(i), questions[i % KL_BATCHES :: KL_BATCHES]
            rollouts = rollout(policy, tokenizer, asked, task.search, config.settings, 1, 1.0, generator)
            return collate(rollouts, policy.device)

        for name, numbers in kl_numbers(policy, base, [draw(policy, i) for i in range(KL_BATCHES)]).items():
            runs[f"{name}, seed {seed}"] = descend(policy, base, name, draw)
            runs[f"{name}, seed {seed}"][0] |= numbers
    Path("figures").mkdir(exist_ok=True)
    plot_runs(runs, "figures/kl.png", KL_CURVES)
    write_points(runs, "figures/kl.csv", KL_CURVES + KL_NUMBERS)
    after = f"exact KL after {KL_STEPS} steps on it"
    print(f"\n| KL | mean | deviation over batches | cosine with the exact gradient | {after} |\n|---|---|---|---|---|")
    for name in ("k1", "k2", "k3", "exact"):
        of = [runs[f"{name}, seed {seed}"] for seed in range(seeds)]
        cells = [spread([records[0][key] for records in of]) for key in ("kl_mean", "kl_std", "kl_cosine")]
        print(f"| {name} | " + " | ".join([*cells, spread([records[-1]["kl_exact"] for records in of])]) + " |")
    how = f"{KL_BATCHES} batches of {KL_QUESTIONS} held-out questions, nats a token; SGD with learning rate {KL_LR}"
    print(f"\nwrote figures/kl.png and .csv; {how}; mean of {seeds} seeds (lowest to highest)")


# ----- 5. Does it depend on luck? -----

BAR = {"eval/em_1hop": 0.95, "eval/em_2hop": 0.90, "eval/sampled_em_1hop": 0.80, "eval/sampled_em_2hop": 0.70}
ALGOS = ("grpo", "ppo", "reinforce")
NUMBERS = {"seed": range(10), "world_seed": range(1, 11)}  # chosen before tuning; some rules came after these


def luck(jobs, given):
    """Each algorithm at ten seeds and, apart, in ten worlds, `jobs` runs side by side with a thread each. Ends of the
    runs in figures/seeds.csv, curves in figures/seeds.png, and the share of runs that reach BAR in full."""
    kinds = [(algo, kind) for algo in ALGOS for kind in NUMBERS]
    asked = [{"algo": algo, kind: NUMBERS[kind][i]} for i in range(10) for algo, kind in kinds]
    # GRPO is the default: the same run has the same name in every study.
    givens = [{key: value for key, value in a.items() if value != "grpo"} | given for a in asked]
    Path("figures").mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) if jobs > 1 else contextlib.nullcontext()
    with pool as workers:
        runs = []
        for checkpoint in (workers.map if workers else map)(finished_run, givens):
            runs.append(read_runs([checkpoint.parent])[checkpoint.parent.name])
            reached = write_luck(asked, runs)
    draw_runs(asked, runs)
    for algo, kind in kinds:
        of = [fine for a, fine in zip(asked, reached) if a["algo"] == algo and kind in a]
        print(f"{algo:10} {kind:10} {sum(of)} of {len(of)} reach the bar")
    print(f"{sum(reached)} of {len(runs)} runs reach {BAR}; wrote figures/seeds.png and .csv")


def write_luck(asked, runs):
    """The ends of the runs made so far -> figures/seeds.csv, a row each -> whether each of them reaches BAR."""
    reached = [all(records[-1][name] >= bar for name, bar in BAR.items()) for records in runs]
    names = ["step", *BAR, "eval/searches_1hop", "eval/searches_2hop"]
    with written_whole("figures/seeds.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algo", "what", "number", *(name.removeprefix("eval/") for name in names), "reached"])
        for a, records, fine in zip(asked, runs, reached):
            what = next(kind for kind in NUMBERS if kind in a)
            writer.writerow([a["algo"], what, a[what], *(round(records[-1][name], 4) for name in names), int(fine)])
    return reached


def draw_runs(asked, runs):
    """Held-out EM over the steps: a column an algorithm, a row a number of hops, a thin line a run, a thick one their
    mean."""
    from matplotlib.figure import Figure

    algos = list(dict.fromkeys(a["algo"] for a, _ in zip(asked, runs)))
    figure = Figure(figsize=(4 * len(algos), 6), layout="constrained")
    panels = figure.subplots(2, len(algos), sharex="col", sharey=True, squeeze=False)
    for row, name in enumerate(("eval/em_1hop", "eval/em_2hop")):
        for column, algo in enumerate(algos):
            axis = panels[row][column]
            of = [records for a, records in zip(asked, runs) if a["algo"] == algo]
            lines = [{r["step"]: r[name] for r in records if name in r} for records in of]
            for line in lines:
                axis.plot(*zip(*line.items()), color="C0", alpha=0.3, linewidth=0.8)
            steps = sorted(set.union(*map(set, lines)))
            at_steps = [numpy.interp(steps, *zip(*line.items())) for line in lines]  # after its end: its last one
            axis.plot(steps, numpy.mean(at_steps, axis=0), color="C3", linewidth=2)
            axis.axhline(BAR[name], color="gray", linestyle=":")
            axis.set(title=f"{algo}, {row + 1} hop{'s' * row}, {len(of)} runs", xlabel="training step", ylim=(0, 1))
            axis.grid(alpha=0.3)
    figure.savefig("figures/seeds.png", dpi=110)


# ----- 6. The command line -----

VARIED = {"table": {"algo", "no_search"}, "seeds": {"algo", "world_seed"}, "kl": {"algo"}}  # flags that labels set


def main(argv=None):
    about = "Make many runs on the tiny world and compare them. Flags of train.py may follow; they go to every run."
    parser = data.Parser(allow_abbrev=False, description=about)
    names = ("table", *STUDIES, "kl", "seeds")
    parser.add_argument("name", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="of table: one seed, fewer steps and questions")
    slug = lambda label: label.lower().replace(". ", "-")  # "Dr. GRPO": dr-grpo
    chosen = {slug(label): label for label in STUDIES["variants"]}
    parser.add_argument("--variant", choices=chosen, help="of variants: this one alone, beside GRPO")
    parser.add_argument("--seeds", type=int, help="seeds of each run (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="of seeds: runs side by side (default: 1)")
    args, rest = parser.parse_known_args(argv)
    given = train.parse_flags(rest)
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    if seeds < 1:
        raise Mistake(f"--seeds {seeds}: must be at least 1")
    if args.quick and args.name != "table":
        raise Mistake("--quick goes with table")
    if args.variant and args.name != "variants":
        raise Mistake("--variant goes with variants")
    if args.jobs != 1 and args.name != "seeds":
        raise Mistake("--jobs goes with seeds")
    if args.seeds is not None and args.name == "seeds":
        raise Mistake("seeds makes all of its sixty runs: leave out --seeds")
    varied = VARIED.get(args.name) or set().union(*STUDIES[args.name].values())
    if own := sorted(varied & set(given)):
        raise Mistake(f"{args.name} sets --{own[0].replace('_', '-')} itself: leave it out")
    if {"seed", "resume", "output_dir", "model", "preset"} & set(given):
        refused = "no --seed, --resume, --output-dir, --model or --preset"
        raise Mistake(f"{args.name} makes runs of its own on the tiny world: {refused}")
    train.parse_config(given)  # a mistake in the flags, before a folder is made
    if args.name == "table":
        table(seeds, args.quick, given)
    elif args.name == "kl":
        kl_study(seeds, given)
    elif args.name == "seeds":
        luck(args.jobs, given)
    else:
        labels = {"GRPO", chosen[args.variant]} if args.variant else STUDIES[args.name]
        study(args.name, seeds, given, labels)


if __name__ == "__main__":
    data.run_main(main)
