"""A look at a tiny world: its size, the ceiling that its engine sets, what is found, what its base model is shown.

    python -m course.world [--world-seed 0]        seven seconds on two slow cores
"""

import random

from data import RELATION, Parser, make_tokenizer, make_world, poor_episodes, reading_episode, run_main
from retrieval import build_index


def oracle_exact_match(world, questions, search, top_k):
    """Exact match of a policy that always asks "entity relation" of the right entity and reads without error. This is
    the ceiling that the engine sets: below 1.00, no training could reach the top. Measure it before training."""
    steps = []  # of all questions: (number of the question, query, the sentences that state the fact)
    for i, q in enumerate(questions):
        entity = q.path[0]
        for relation in q.path[1:]:
            query, answer = f"{entity} {relation}", world.facts[relation, entity]
            steps.append((i, query, {form.format(x=entity, y=answer) for form in RELATION[relation].facts}))
            entity = answer
    found = search([query for _, query, _ in steps], top_k)
    missed = {i for (i, _, sentences), passages in zip(steps, found) if not sentences & {p.text for p in passages}}
    return (len(questions) - len(missed)) / len(questions)


def show_world(seed):
    world, rng = make_world(seed), random.Random(seed)
    search = build_index(world.passages).search
    counts = f"{len(world.train)} training and {len(world.test)} test questions, {len(make_tokenizer())} tokens"
    print(f"world {seed}: {len(world.passages)} passages, {counts}")
    for top_k in (1, 3, 5):
        score = oracle_exact_match(world, world.test, search, top_k)
        print(f"a perfect policy with {top_k} passages a search would score {score:.4f}")
    for question in rng.sample([q for q in world.test if q.hops == 2], 3):
        print(f"\n{question.text}   -> {question.gold_answers[0]}   path: {' > '.join(question.path)}")
        print(*(f"    {passage.text}" for passage in search([question.text], 3)[0]), sep="\n")
    show = lambda segments: " ".join(text for text, _ in segments)
    print(f"\nthe base model reads:\n    {show(reading_episode(world, sorted(world.facts), 3, rng))}")
    print(f"and imitates a poor policy:\n    {show(poor_episodes([rng.choice(world.train)], search, 3, rng)[0])}")


def main(argv=None):
    parser = Parser(description="Print what a tiny world looks like, and what its base model is shown.")
    parser.add_argument("--world-seed", type=int, default=0)
    show_world(parser.parse_args(argv).world_seed)


if __name__ == "__main__":
    run_main(main)
