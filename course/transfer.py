"""What has a policy learned: its entities, its wordings, or the method? Exact match of a checkpoint of the tiny world
on questions that are more or less far from those that it was trained on.

    python -m course.transfer outputs/run-1

    training questions        about training entities; a run of GRPO asks about half of them (PPO, REINFORCE: most)
    reworded                  about the same facts, in other words
    held out                  about entities that no training question mentions
    another world             other facts, about names that the first world may have, too; the engine searches there
    three hops                held out, and never seen: a chain of three facts

Each row greedy and sampled at temperature 1, one hop and two hops.
"""

import random

import torch

import data
from data import RELATION, Mistake, Parser, fixed_sample, load_checkpoint, load_settings, make_world, newest, run_main
from eval import aligned, evaluate
from retrieval import build_index
from searchr1 import Question


def reworded(world):
    """World -> its training questions in other words, those that come out as they were left out."""
    entities = {q.path[0] for q in world.train}
    facts = {fact: object for fact, object in world.facts.items() if fact[1] in entities}
    old = {q.path: q.text for q in world.train}
    return [q for q in data._questions(facts, random.Random("reworded"), 0) if q.text != old.get(q.path, q.text)]


def three_hops(world):
    """World -> held-out questions with a third relation around each two-hop question."""
    rng, questions = random.Random("three hops"), []
    for q in (q for q in world.test if q.hops == 2):
        kind = data.KIND_OF[q.gold_answers[0]]
        name = rng.choice([r.name for r in RELATION.values() if r.subject == kind])
        answer, path = world.facts[name, q.gold_answers[0]], (*q.path, name)
        text = data.worded(path[0], path[1:], answer, rng)
        if answer not in q.path:
            questions.append(Question(f"3-{q.id}", text, (answer,), 3, path))
    return questions


def transfer(policy, tokenizer, settings, world_seed, limit):
    """-> rows of the table: name, then EM greedy and sampled, of one hop and two (or of three)."""
    world, other = make_world(world_seed), make_world(f"{world_seed} other")
    engine, other_engine = build_index(world.passages), build_index(other.passages)
    sets = {
        "training questions": (world.train, engine), "reworded": (reworded(world), engine),
        "held out": (world.test, engine), "another world": (other.test, other_engine),
        "three hops": (three_hops(world), engine),
    }  # fmt: skip
    rows = []
    for name, (questions, search_engine) in sets.items():
        asked, cells = fixed_sample(questions, limit), []
        for temperature in (0.0, 1.0):
            generator = torch.Generator(policy.device).manual_seed(0)
            how = search_engine.search, settings, "search-r1", temperature, generator
            scores, _ = evaluate(policy, tokenizer, asked, *how)
            cells += [f"{scores[key]:.3f}" for key in scores if key.startswith("em_")]
        cells = cells if len(cells) == 4 else [cells[0], "", cells[1], ""]
        rows.append([name, f"{len(asked)}", *cells])
    return rows


def main(argv=None):
    parser = Parser(description="Ask a checkpoint of the tiny world what is more or less far from its training.")
    parser.add_argument("checkpoint", type=newest, help="folder of a run in the tiny world, or of its checkpoint")
    parser.add_argument("--limit", type=int, default=400, help="questions a row (default: 400)")
    args = parser.parse_args(argv)
    if args.limit < 0:
        raise Mistake(f"--limit {args.limit}: cannot be negative")
    settings, about = load_settings(args.checkpoint)
    policy, tokenizer = load_checkpoint(args.checkpoint)
    header = ["", "questions", "one hop", "two hops", "one hop, sampled", "two hops, sampled"]
    print(aligned([header, *transfer(policy, tokenizer, settings, about["world_seed"], args.limit)]))
    print("three hops: in the columns of one hop")


if __name__ == "__main__":
    run_main(main)
