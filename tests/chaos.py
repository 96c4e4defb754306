"""Abuse training runs, and see whether anything is lost. Not part of the suite: minutes, and it kills processes.

    python tests/chaos.py                   20 kills of each kind of run, then the other faults
    python tests/chaos.py --kills 3 --seed 7

Every run is small: a random model, four steps, a checkpoint after each. It is killed (signal 9) at random moments,
the writing of a checkpoint included, resumed each time, and in the end compared with a run that was left alone: metrics
line by line, weights and trainer state bit for bit. Other faults must end in one line, and lose nothing that was saved.
The processes are forks of this one, which has imported everything and computed nothing.
"""

import argparse
import contextlib
import copy
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from conftest import LOUD, metrics, random_model
from safetensors.torch import load_file
from tqdm import tqdm

import data
import retrieval
import train
from data import run_main
from engine import Mistake

RUN = "--batch-size 4 --group-size 4 --eval-limit 4 --eval-every 2 --steps 4 --save-every 1 --reward format".split()
RUN += "--max-turns 1 --max-new-tokens 8 --entropy-coef 0.1 --device cpu".split()  # CUDA does not survive a fork
ONE = ["--group-size", "1", "--batch-size", "16"]
KINDS = {
    "grpo": [],
    "grpo, adapters": ["--lora-rank", "4"],
    "grpo, search over HTTP": ["--corpus", "SERVER", "--model", "model", "--train-data", "q.jsonl"],
    "ppo": ["--algo", "ppo", *ONE],
    "ppo, adapters": ["--algo", "ppo", *ONE, "--lora-rank", "4"],
    "reinforce": ["--algo", "reinforce", *ONE],
    "sft": ["--algo", "sft", *ONE],
    "rejection": ["--algo", "rejection"],
}


def forked(main):
    """Run main() in a process of its own, with its output in the file `output` -> its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    out = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.set_lock(threading.RLock())  # PITFALL: its own is shared by all forks, and one that is killed may hold it
    code = 1
    try:
        run_main(main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole_run(flags, folder):
    """-> seconds that a run takes which nobody disturbs."""
    began = time.monotonic()
    assert ended(forked(lambda: train.main([*RUN, *flags, "--output-dir", folder]))) == 0, Path("output").read_text()
    return time.monotonic() - began


def start(flags, folder):
    """Begin the run, or go on with what there is of it -> process."""
    begun = (Path(folder) / "config.json").exists()
    return forked(lambda: train.main(["--resume", folder] if begun else [*RUN, *flags, "--output-dir", folder]))


def same(one, other):
    """Are two runs the same: metrics, weights, trainer state?"""
    assert metrics(one) == metrics(other), "metrics differ"
    for name in ("model.safetensors", "trainer_state.pt"):
        load = load_file if name.startswith("model") else torch.load
        a, b = (load(f"{folder}/checkpoint-4/{name}") for folder in (one, other))
        assert str(a) == str(b) and equal(a, b), f"{name} differs"
    left = {path.name for path in Path(other).iterdir()}
    assert not any(name.startswith("unfinished") or name.endswith(".unfinished") for name in left), left


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def killed(name, flags, kills, rng):
    """Kill and resume runs of a kind until it has happened so often -> a row of the table."""
    seconds, dealt, runs, in_saving = whole_run(flags, f"whole-{name}"), 0, 0, 0
    while dealt < kills:
        folder = f"killed-{name}-{runs}"
        while not (Path(folder) / "checkpoint-4").exists():  # a kill after it leaves nothing to do
            pid = start(flags, folder)
            time.sleep(rng.uniform(0.0, 1.1 * seconds) if dealt < kills else 10 * seconds)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, Path("output").read_text()
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            dealt += 1
            in_saving += bool(list(Path(folder).glob("unfinished-*")))
        text = Path("output").read_text()
        assert "Traceback" not in text, text
        same(f"whole-{name}", folder)
        runs += 1
    return f"| {name}: signal 9 | {dealt} ({in_saving} while saving) | {runs} runs ended like the whole one | nothing |"


def interrupted(number, twice, flags, rng):
    """SIGTERM or Ctrl-C, once or twice: the step is finished and saved, or the run ends at once; then it is resumed."""
    name, codes = f"{signal.Signals(number).name}{' twice' if twice else ''}", []
    seconds = whole_run(flags, f"whole-{name}")
    for at in range(5):
        folder, pid = f"{name}-{at}", start(flags, f"{name}-{at}")
        while not (Path(folder) / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5 * seconds))
        for _ in range(1 + twice):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(0.05)
        codes.append(ended(pid))
        assert "Traceback" not in Path("output").read_text(), Path("output").read_text()
        if not (Path(folder) / "checkpoint-4").exists():
            assert ended(start(flags, folder)) == 0, Path("output").read_text()
        same(f"whole-{name}", folder)
    return f"| {name} | 5 | exit codes {codes}; resumed, all as the whole one | nothing |"


def one_line(name, main, words, code=2):
    """A fault that must end in one line with these words -> a row."""
    got = ended(forked(main))
    text = Path("output").read_text()
    last = text.strip().splitlines()[-1]
    assert got == code and "Traceback" not in text and words in last, (got, text)
    return f"| {name} | 1 | `{last.removeprefix('chaos.py: ')[:110]}` | nothing |"


def full_disk(rng):
    """Files may not grow beyond a limit, which lies inside a checkpoint's: every write of one fails."""
    def main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randint(20_000, 60_000),) * 2)
        train.main([*RUN, "--output-dir", "full"])

    row = one_line("a disk that is full", main, "cannot be written to full")
    assert ended(start([], "full")) == 0
    same("whole-grpo", "full")
    return row


def faults(rng):
    """Rows of everything but signals, on folders that earlier rows left behind."""
    yield full_disk(rng)
    yield one_line("a folder that cannot be made", lambda: train.main([*RUN, "--output-dir", "/proc/run"]), "/proc/run")
    resume = lambda folder, *flags: lambda: train.main(["--resume", folder, "--steps", "6", *flags])
    yield one_line("another rate than the run's", resume("whole-grpo", "--lr", "1"), "goes on with --lr 0.0005")
    yield one_line("config.json is no JSON", resume(spoiled("config.json", 40)), "is no folder of a run")
    state = "checkpoint-4/trainer_state.pt"
    yield one_line("trainer_state.pt is cut off", resume(spoiled(state, 9000)), "cannot be read")
    yield one_line("trainer_state.pt is gone", resume(spoiled(state, None)), "trainer_state.pt")
    with train.alone_in("whole-grpo"):
        yield one_line("two processes in one folder", resume("whole-grpo"), "another process trains in whole-grpo")


def spoiled(file, size):
    """A copy of the whole run with one of its files cut off, or gone."""
    folder = f"spoiled-{file.replace('/', '-')}-{size}"
    shutil.copytree("whole-grpo", folder)
    path = Path(folder) / file
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tokenizer, world = data.make_tokenizer(), data.make_world(0)
        model = random_model(tokenizer, loud=LOUD, layers=1)
        model.save_pretrained("model")
        tokenizer.save_pretrained("model")
        data.base_model = lambda config, cache: (copy.deepcopy(model), tokenizer, "the base")
        train.plot_runs = lambda runs, path: path.touch()
        server = retrieval.Server(retrieval.build_index(world.passages), port=0)
        serving = forked(server.serve_forever)
        lines = [f'{{"id": "{i}", "question": "{q.text}", "golden_answers": ["{q.gold_answers[0]}"]}}\n'
                 for i, q in enumerate(world.train[:60])]  # fmt: skip
        Path("q.jsonl").write_text("".join(lines))
        print("| fault | how often | what happened | lost |\n|---|---|---|---|", flush=True)
        try:
            for name, flags in KINDS.items():
                flags = [flag.replace("SERVER", f"http://127.0.0.1:{server.server_port}/retrieve") for flag in flags]
                print(killed(name, flags, args.kills, rng), flush=True)
            for number, twice in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)):
                print(interrupted(number, twice, [], rng), flush=True)
            for row in faults(rng):
                print(row, flush=True)
        finally:
            os.kill(serving, signal.SIGKILL)
        print(f"\nseed {args.seed}: {time.monotonic() - began:.0f} s")
        os.chdir("/")


if __name__ == "__main__":
    main()
