"""The same questions as rows that verl and SkyRL read, trainers for many GPUs. course/OUTGROWING.md has the rest.

    python -m course.export verl --data nq+hotpotqa --output train.json
    python -m course.export skyrl --data nq+hotpotqa --split eval --system "" --output eval.jsonl
"""

import json
from pathlib import Path

from data import DATASETS, Mistake, Parser, load_questions, question_files, run_main
from retrieval import written_whole
from searchr1 import make_prompt

# The system message of both trainers' examples. Our prompt has none: --system "" leaves it out.
SYSTEM = "You are a helpful and harmless assistant."


def set_of(file, given=None):
    """Which set a question file is of: as given, or by the name of its folder or its own. Mistake if that is none."""
    name = given or next((name for name in (file.parent.name, file.stem) if name in DATASETS), None)
    if name is None:
        known = ", ".join(DATASETS)
        raise Mistake(f"{file}: of which set is it? --name with one of {known}; verl chooses the reward by it")
    return name


def export_rows(questions, trainer, split="train", system=SYSTEM):
    """list of (set, Question) -> rows as verl (trainer "verl") or SkyRL ("skyrl") reads them, one dict a question.

    The columns are those of verl's examples/data_preprocess/preprocess_search_r1_dataset.py and of SkyRL's
    examples/train/search/searchr1_dataset.py. `metadata` is null, since neither reads it. verl's search is a tool call.
    """
    for index, (name, question) in enumerate(questions):
        head, mark, text = make_prompt(question.text).partition("Question: ")  # text ends in a question mark, as asked
        if trainer == "verl":
            head = head.replace("search>", "tool_call>").replace("information>", "tool_response>")
            text = text.strip()
        content, text = head + mark + text, text.strip()
        source, truth = f"searchR1_{name}", {"target": list(question.gold_answers)}
        tool = {"create_kwargs": {"ground_truth": truth, "question": text, "data_source": source}}
        yield {
            "data_source": source,
            "prompt": [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": content}],
            "ability": "fact-reasoning",
            **({"env_class": "search"} if trainer == "skyrl" else {"agent_name": "tool_agent"}),
            "reward_spec" if trainer == "skyrl" else "reward_model": {"ground_truth": truth, "style": "rule"},
            "extra_info": {"index": index, "need_tools_kwargs": True, "question": text, "split": split}
            | {"tools_kwargs": {"search": tool}},
            "metadata": None,
        }


def write_lines(path, records):
    """Records -> a file of JSON lines, whole or not at all."""
    with written_whole(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(argv=None):
    parser = Parser(description="Write questions as another trainer reads them: JSON lines, whole or not at all.")
    add = parser.add_argument
    add("trainer", choices=("verl", "skyrl"))
    add("--output", required=True, metavar="FILE", help="ends in .json (SkyRL: or .jsonl)")
    add("--data", default="nq+hotpotqa", help="FILE, or sets joined by + (default: nq+hotpotqa, the paper's)")
    add("--split", choices=("train", "eval"), default="train", help="of the sets (default: train)")
    add("--name", choices=DATASETS, help="which set FILE is of (default: by its name or its folder's)")
    add("--system", default=SYSTEM, help=f'system message; "" for none, as train.py asks (default: {SYSTEM})')
    args = parser.parse_args(argv)
    output, suffixes = Path(args.output), [".json"] if args.trainer == "verl" else [".json", ".jsonl"]
    if output.suffix not in suffixes:
        ends = " or ".join(suffixes)
        raise Mistake(f"--output {output}: {args.trainer} reads JSON lines from a file that ends in {ends}")
    files = question_files(args.data, args.split)
    if args.name and len(files) > 1:
        raise Mistake(f"--name is for a single file; {args.data} says itself which sets it is of")
    questions = [(set_of(file, args.name), q) for file in files for q in load_questions(file)]
    split = {"train": "train", "eval": "test"}[args.split]  # as both converters call it
    write_lines(output, export_rows(questions, args.trainer, split, args.system))
    print(f"wrote {output}: {len(questions):,} questions for {args.trainer}")


if __name__ == "__main__":
    run_main(main)
