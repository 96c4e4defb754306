"""Does a long run leak? Two thousand steps of a very small one: memory, files, threads and what it leaves behind.

    python tests/bench_soak.py [--steps 2000]      some minutes on one core

A random model, a step of 4 conversations, an evaluation and a checkpoint every hundred steps. While it trains, another
thread reads metrics.jsonl and parses every line, again and again. Printed are resident memory, open files and threads
after a tenth of the steps and at the end. Linux only.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ["TQDM_DISABLE"] = "1"

import torch
from bench_retrieval import held
from conftest import LOUD, random_model

import data
import train


def is_record(line):
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args(argv).steps
    torch.set_num_threads(1)
    seen, reads, torn, over = {}, 0, [], threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tempfile.tempdir = str(Path(folder, "tmp"))  # what the run leaves there is seen below
        os.mkdir("tmp")
        tokenizer = data.make_tokenizer()
        random_model(tokenizer, loud=LOUD).save_pretrained("base")
        tokenizer.save_pretrained("base")
        data.base_model = lambda *_: (*data.load_checkpoint("base", "cpu"), "base")

        def read():
            nonlocal reads
            while not over.is_set():
                if Path("run/metrics.jsonl").exists():
                    with open("run/metrics.jsonl") as lines:  # one by one: it must not take memory of its own
                        torn.extend(line for line in lines if line.endswith("\n") and not is_record(line))
                    reads += 1
                time.sleep(0.5)

        watcher = threading.Thread(target=read)
        watcher.start()
        measure = train.measure

        def looked_at(step, *args):
            if step in (max(1, steps // 10), steps):
                seen[step] = *held("self"), len(os.listdir("/proc/self/fd"))
            return measure(step, *args)

        train.measure = looked_at
        flags = f"--batch-size 2 --group-size 2 --max-turns 1 --max-new-tokens 8 --eval-limit 4 --steps {steps}"
        try:
            train.main([*flags.split(), "--eval-every", "100", "--save-every", "100", "--output-dir", "run"])
        finally:
            over.set()
            watcher.join()
        left = sorted(path.name for path in Path("run").iterdir()), os.listdir("tmp")
        os.chdir("/")
    (first, (mb, threads, files)), (last, (more, threads2, files2)) = sorted(seen.items())
    print(f"\nstep {first}: {mb:.1f} MB, {files} open files, {threads} threads")
    print(f"step {last}: {more:.1f} MB ({more / mb - 1:+.1%}), {files2} open files, {threads2} threads")
    print(f"metrics.jsonl was read {reads} times, {len(torn)} lines were no records; left behind: {left[0]}, temporary: {left[1]}")


if __name__ == "__main__":
    main()
