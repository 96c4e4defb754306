"""Time, memory and error of kernels.py beside the usual expression and beside other people's kernels.

    python tests/bench_kernels.py                     the quick table: ours and the usual expression, synthetic data
    python tests/bench_kernels.py --peers [DIR]       all implementations, on peaked and on flat synthetic data
    python tests/bench_kernels.py --checkpoint DIR    all implementations, on hidden states of a checkpoint of train.py
    python tests/bench_kernels.py --cases FILE        all implementations, on hidden states that save_case wrote

The DIR of --peers holds unpacked wheels (liger_kernel/, cut_cross_entropy/), where these packages are not installed.

Each implementation computes the log-prob of the target in each active row, and the gradient of minus their sum with
respect to hidden states and weight. Ours also gives the entropy. Others get the mask in the form that they support:
targets of -100, or a mask of their own. The columns:

    forward          seconds without gradient, as for the reference
    + backward       seconds of the forward and the backward pass
    peak             MiB held beyond the inputs, over both passes
    error log-prob   largest error over all active rows, against float64; "mean" where a method returns only the sum
    error d_hidden   error of the gradient of 64 rows, relative, in L2 norm
    time, memory     divided by the first row that ran, which is ours
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels

QUICK = ("ours, Triton", "ours, PyTorch twin", "eager, all rows")  # what a run without options measures

# ----- 1. Measuring -----


def seconds(call, device, repeats=3):
    """Median seconds of call(), after a warm-up. On a GPU: by the GPU's clock, with its L2 cache flushed before."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # 256 MiB: more than any L2
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory(call, device):
    """The most bytes that call() held at once, beyond those held before. On a GPU the CUDA allocator counts them. On a
    CPU torch's profiler reports each allocation and release, and we add them up."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(itertools.accumulate(changes, initial=0))


def backward_of(logprob, arguments):
    """A call that computes the gradient of -sum(log-probs) and throws it away."""
    hidden, weight = arguments[:2]

    def call():
        hidden.grad = weight.grad = None
        (-logprob(*arguments).sum()).backward()
        hidden.grad = weight.grad = None

    return call


# ----- 2. The data: (hidden [N, D], weight [V, D], target [N], mask [N]); the first two ask for gradients -----


def example(n, vocabulary, dim, active=0.45, peak=15.0, dtype=torch.float32, device="cpu"):
    """Synthetic data. The logits of a row are N(0, 1), except the target's, which is higher by 0 to 2 * peak, uniformly
    over the rows. With a vocabulary of 152k a target that is 8 higher has a probability of 0.01, one that is 15 higher
    has 0.9. With peak 0 the policy is flat."""
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocabulary, dim, generator=g, device=device) / dim**0.5
    target = torch.randint(vocabulary, (n,), generator=g, device=device)
    height = 2 * peak * torch.rand(n, 1, generator=g, device=device)
    hidden = torch.randn(n, dim, generator=g, device=device) + height * weight[target]
    mask = torch.rand(n, generator=g, device=device) < active
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, mask


@torch.no_grad()
def save_case(policy, batch, temperature, path, tokens=4096):
    """Write to `path` what fused_linear_logprob_kl gets for the longest rows of a searchr1.Batch: as many as fit into
    `tokens` padded tokens, but at least one. How much tau can skip depends on the policy's logits, so measure it on a
    trained policy."""
    import searchr1

    count = max(1, tokens // int(batch.lengths_B.max()))
    part = batch.rows(batch.lengths_B.argsort(descending=True, stable=True)[:count])
    hidden_BTD, weight_VD, target_BT = searchr1.head_inputs(policy, part.ids_BL)
    case = {"hidden": hidden_BTD.flatten(0, 1), "weight": weight_VD}
    case |= {"target": target_BT.flatten(), "mask": part.mask_BT.flatten()}
    torch.save({name: t.detach().cpu().clone() for name, t in case.items()} | {"temperature": temperature}, path)


def load_case(path, device):
    """Read what save_case wrote. The temperature is divided out, so every implementation can work with T = 1."""
    case = torch.load(path, map_location=device)
    hidden = (case["hidden"] / case["temperature"]).requires_grad_()
    return hidden, case["weight"].requires_grad_(), case["target"], case["mask"]


def checkpoint_case(folder, device):
    """Let a checkpoint answer 48 training questions of the tiny world, five times each, and take its hidden states."""
    import data
    import retrieval
    import searchr1

    policy, tokenizer = data.load_checkpoint(folder, device)
    world = data.make_world(0)
    questions = random.Random(0).sample(world.train, 48)
    search = retrieval.build_index(world.passages).search
    generator = torch.Generator(device).manual_seed(0)
    rollouts = searchr1.rollout(
        policy, tokenizer, questions, search, data.TINY_SETTINGS, group_size=5, temperature=1.0, generator=generator
    )
    with tempfile.TemporaryDirectory() as place:
        path = str(Path(place) / "case.pt")
        save_case(policy, searchr1.collate(rollouts, device), 1.0, path)
        return load_case(path, device)


# ----- 3. The implementations: f(hidden, weight, target, mask) -> log-probs [N], or only their sum -----


def ours(impl, **settings):
    return lambda *arguments: kernels.fused_linear_logprob_kl(*arguments, impl=impl, **settings).logp


def eager_logprob(hidden, weight, target, mask, temperature=1.0):
    """The usual expression: all rows through the lm_head, log_softmax, gather."""
    logits = (hidden @ weight.T).float() / temperature
    logp = torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
    return torch.where(mask, logp, 0.0)


def compacted(logprob):
    """The same on the active rows only, as a careful user would write it."""

    def call(hidden, weight, target, mask):
        index = mask.nonzero()[:, 0]
        logp = logprob(hidden[index], weight, target[index], torch.ones_like(index, dtype=torch.bool))
        return torch.zeros(len(mask), device=mask.device).index_copy(0, index, logp)

    return call


def torch_linear_cross_entropy(hidden, weight, target, mask):
    options = torch.nn.LinearCrossEntropyOptions()  # chunked; new in torch 2.13
    target = torch.where(mask, target, -100)
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)


def liger_cross_entropy(hidden, weight, target, mask):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as function

    return -function.apply(hidden, weight, torch.where(mask, target, -100), None, None, -100, 0.0, 0.0, "sum")[0]


def liger_scaled_cross_entropy(hidden, weight, target, mask):
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    function = liger.LigerFusedLinearScaledCrossEntropyFunction
    return -function.apply(hidden, weight, torch.where(mask, target, -100), 1.0, -100, 1, True)[0]


def liger_grpo(hidden, weight, target, mask):
    """Liger's GRPO loss at ratio 1 and advantage 1, in rollouts of 1024 tokens. Its value is always -1; its gradient is
    that of the negative mean log-prob."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rollouts = max(1, len(target) // 1024) if len(target) % 1024 == 0 else 1
    shape = (rollouts, len(target) // rollouts)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=hidden.is_cuda)
    ones = torch.ones(rollouts, device=hidden.device)
    out = loss(hidden.view(*shape, -1), weight, target.view(shape), mask.view(shape).float(), ones)[0]
    return -out * mask.sum()


def apple(filter_eps):
    def call(hidden, weight, target, mask):
        from cut_cross_entropy import linear_cross_entropy

        target = torch.where(mask, target, -100)
        return -linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=filter_eps)

    return call


def implementations():
    """Title -> (function, the package that it needs)."""
    return {
        "ours, Triton": (ours("triton"), "triton"),
        "ours, PyTorch twin": (ours("torch"), "torch"),
        "ours, auto, tau 1e-5": (ours("auto", tau=1e-5), "torch"),
        "eager, all rows": (eager_logprob, "torch"),
        "eager, compacted by hand": (compacted(eager_logprob), "torch"),
        "torch.compile, all rows": (torch.compile(eager_logprob), "torch"),
        "torch.compile, compacted": (compacted(torch.compile(eager_logprob)), "torch"),
        "torch linear_cross_entropy": (torch_linear_cross_entropy, "torch"),
        "Liger fused linear CE": (liger_cross_entropy, "liger_kernel"),
        "Liger fused linear scaled CE": (liger_scaled_cross_entropy, "liger_kernel"),
        "Liger fused linear GRPO": (liger_grpo, "liger_kernel"),
        "Apple CCE": (apple("high"), "cut_cross_entropy"),
        "Apple CCE, no filter": (apple(None), "cut_cross_entropy"),
    }


# ----- 4. The truth, and the table -----


def float64_logprob(hidden, weight, target, rows):
    """Log-probs of the targets in `rows`, in float64: the expression of eager_logprob."""
    logits = hidden.detach()[rows].double() @ weight.detach().double().T
    return torch.log_softmax(logits, -1).gather(-1, target[rows, None])[:, 0]


def float64_values(hidden, weight, target, mask):
    """(log-probs of the active rows, the numbers of these rows, gradient of the first 64 of them), in float64."""
    index, weight64 = mask.nonzero()[:, 0], weight.detach().double()
    logp = torch.cat([float64_logprob(hidden, weight64, target, part) for part in index.split(64)])
    first = index[:64]
    p = torch.softmax(hidden.detach()[first].double() @ weight64.T, -1)
    return logp, index, p @ weight64 - weight64[target[first]]  # gradient of -log p_a


def live_share(hidden, weight, mask, chunk, tau):
    """Share of the pairs (row, slice) that hold more than tau of the probability. The backward pass does only these."""
    index = mask.nonzero()[:, 0]
    live = 0
    for part in index.split(64):
        p = torch.softmax(kernels.matmul_fp32(hidden.detach()[part], weight.detach().T), -1)
        live += sum((slice_of_p.sum(1) > tau).sum().item() for slice_of_p in p.split(chunk, 1))
    return live / (len(index) * -(-weight.shape[0] // chunk))


def measure(logprob, arguments, device, repeats, truth):
    """-> (seconds forward, seconds of both passes, peak bytes, error of the log-probs as text, error of d_hidden)."""
    hidden, weight = arguments[:2]
    truth_logp, index, truth_gradient = truth
    both = backward_of(logprob, arguments)
    with torch.no_grad():
        forward = seconds(lambda: logprob(*arguments), device, repeats)
        value = logprob(*arguments).double()
        if value.dim():
            error = f"{(value - torch.zeros_like(value).index_copy(0, index, truth_logp)).abs().max():.1e}"  # masked: 0
        else:
            off = (value - truth_logp.sum()).abs() / len(index)
            error = "none returned" if value == len(index) else f"{off:.1e} (mean)"
    (-logprob(*arguments).sum()).backward()
    gradient = hidden.grad[index[:64]].double()
    error_gradient = ((gradient - truth_gradient).norm() / truth_gradient.norm()).item()
    hidden.grad = weight.grad = None
    return forward, seconds(both, device, repeats), peak_memory(both, device), error, error_gradient


def table(rows, arguments, device, repeats):
    """Print the rows (title -> (function, package)) as a Markdown table. A row that cannot run says why."""
    print("| implementation | forward s | + backward s | peak MiB | error log-prob | error d_hidden | time | memory |")
    print("|---|---|---|---|---|---|---|---|")
    truth, base = float64_values(*arguments), None
    for title, (logprob, package) in rows.items():
        reason = "" if importlib.util.find_spec(package) else f"{package} is not installed"
        if title == "ours, Triton" and not reason and (device == "cpu" or kernels.interpreted()):
            reason = "needs a GPU"
        if title == "torch linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            reason = "needs a newer torch"
        if not reason:
            try:
                forward, both, memory, error, error_gradient = measure(logprob, arguments, device, repeats, truth)
            except Exception as failure:  # other people's code may fail in any way; the table says how, and goes on
                reason = f"{type(failure).__name__}: {(str(failure).strip() or '-').splitlines()[0][:90]}"
                for tensor in arguments[:2]:
                    tensor.grad = None
        if reason:
            print(f"| {title} | {reason} | | | | | | |", flush=True)
            continue
        base = base or (both, memory)
        print(
            f"| {title} | {forward:.4f} | {both:.4f} | {memory / 2**20:.0f} | {error} | {error_gradient:.1e} "
            f"| {both / base[0]:.2f} | {memory / base[1]:.2f} |",
            flush=True,
        )


def main(argv=None):
    big = torch.cuda.is_available()
    device = "cuda" if big else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--rows", type=int, default=8192 if big else 4096)
    option("--vocabulary", type=int, default=151936 if big else 32768)
    option("--dim", type=int, default=2048 if big else 256)
    option("--active", type=float, default=0.45, help="share of the rows that count")
    option("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if big else "float32")
    option("--repeats", type=int, default=10 if big else 3)
    option("--peers", nargs="?", const="", metavar="DIR", help="all implementations; DIR: folder of unpacked wheels")
    option("--checkpoint", metavar="DIR", help="hidden states of this checkpoint instead of synthetic data")
    option("--cases", nargs="*", default=[], metavar="FILE", help="hidden states that save_case wrote")
    option("--skip", nargs="*", default=[], metavar="WORD", help="leave out rows with one of these words in the title")
    args = parser.parse_args(argv)
    if args.peers:
        sys.path.append(args.peers)
    cases = {path: lambda path=path: load_case(path, device) for path in args.cases}
    if args.checkpoint:
        cases[args.checkpoint] = lambda: checkpoint_case(args.checkpoint, device)
    quick = not cases and args.peers is None
    if not cases:
        size = args.rows, args.vocabulary, args.dim, args.active
        for name, peak in (("peaked", 15.0), ("flat", 0.0))[: 1 if quick else 2]:
            cases[f"synthetic, {name}"] = lambda peak=peak: example(*size, peak, getattr(torch, args.dtype), device)
    rows = {title: row for title, row in implementations().items() if not quick or title in QUICK}
    rows = {title: row for title, row in rows.items() if not any(word in title for word in args.skip)}
    name = torch.cuda.get_device_name() if big else f"CPU, {torch.get_num_threads()} threads"
    l2 = "flushed" if big else "not flushed"
    print(f"{name}, torch {torch.__version__}, median of {args.repeats}, L2 {l2}; time and memory / ours")
    for title, make in cases.items():
        arguments = hidden, weight, target, mask = make()
        chunk = kernels.default_chunk(int(mask.sum()), len(weight), device)
        live = live_share(hidden, weight, mask, chunk, 1e-5)
        p = float64_logprob(hidden, weight, target, mask.nonzero()[:64, 0]).exp()
        (n, dim), vocabulary = hidden.shape, len(weight)
        print(f"\n{title}: N {n}, V {vocabulary}, D {dim}, {hidden.dtype}, {int(mask.sum())} active rows;")
        print(f"median probability of a target {statistics.median(p.tolist()):.2g}; ", end="")
        print(f"{live:.0%} of the pairs (row, slice of {chunk}) hold more than 1e-5\n")
        table(rows, arguments, device, args.repeats)


if __name__ == "__main__":
    main()
