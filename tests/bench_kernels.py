"""Time, memory and error of the log-probs of response tokens, from hidden states and the lm_head: ours and others'.

    python tests/bench_kernels.py                                   synthetic data, flat and peaked
    python tests/bench_kernels.py --cases hidden.pt                 of a training step: train.py --save-hidden hidden.pt
    python tests/bench_kernels.py --peers DIR                       a folder with liger_kernel/ and cut_cross_entropy/ in it
                                                                    (unpacked wheels), where they are not installed

Every row computes the log-prob of each active row's target and the gradient of -sum of them with respect to hidden states
and weight. "Ours" gives the entropy, too. Others get the mask the way they offer it: as targets of -100, or as their own
mask. Forward: without gradient, as for the reference. Peak: bytes held beyond the inputs, forward and backward. Error of
the log-prob: largest over all active rows, against float64 ("mean" where a method returns the sum only). Error of the
gradient: of d_hidden over 64 rows, relative, in norm. The last columns are divided by the first row that ran, ours.
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels

# ----- The rows of the table: f(hidden, weight, target, mask) -> log-probs [N], or their sum, or None as a value -----


def ours(impl, **settings):
    return lambda *arguments: kernels.fused_linear_logprob_kl(*arguments, impl=impl, **settings).logp


def compacted(logprob):
    """The plain expression on the active rows only, what a careful user writes by hand."""

    def call(hidden, weight, target, mask):
        index = mask.nonzero()[:, 0]
        logp = logprob(hidden[index], weight, target[index], torch.ones_like(index, dtype=torch.bool))
        return torch.zeros(len(mask), device=mask.device).index_copy(0, index, logp)

    return call


def torch_linear_cross_entropy(hidden, weight, target, mask):
    options = torch.nn.LinearCrossEntropyOptions()  # chunked; torch 2.13
    target = torch.where(mask, target, -100)
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)


def liger_cross_entropy(hidden, weight, target, mask):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as function

    return -function.apply(hidden, weight, torch.where(mask, target, -100), None, None, -100, 0.0, 0.0, "sum")[0]


def liger_scaled_cross_entropy(hidden, weight, target, mask):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as function

    return -function.apply(hidden, weight, torch.where(mask, target, -100), 1.0, -100, 1, True)[0]


def liger_grpo(hidden, weight, target, mask):
    """Its loss at ratio 1 and advantage 1: the value is -1, the gradient that of the mean log-prob. Rollouts of 1024."""
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


def candidates():
    """Title -> (function, the package that it needs)."""
    return {
        "ours, Triton": (ours("triton"), "triton"),
        "ours, PyTorch twin": (ours("torch"), "torch"),
        "ours, auto, tau 1e-5": (ours("auto", tau=1e-5), "torch"),
        "eager, all rows": (kernels.eager_logprob, "torch"),
        "eager, compacted by hand": (compacted(kernels.eager_logprob), "torch"),
        "torch.compile, all rows": (torch.compile(kernels.eager_logprob), "torch"),
        "torch.compile, compacted": (compacted(torch.compile(kernels.eager_logprob)), "torch"),
        "torch linear_cross_entropy": (torch_linear_cross_entropy, "torch"),
        "Liger fused linear CE": (liger_cross_entropy, "liger_kernel"),
        "Liger fused linear scaled CE": (liger_scaled_cross_entropy, "liger_kernel"),
        "Liger fused linear GRPO": (liger_grpo, "liger_kernel"),
        "Apple CCE": (apple("high"), "cut_cross_entropy"),
        "Apple CCE, no filter": (apple(None), "cut_cross_entropy"),
    }


# ----- The yardstick, and what the data is like -----


def float64_values(hidden, weight, target, mask):
    """(log-probs of the active rows, their numbers, gradient of d_hidden of the first 64 of them), in float64."""
    index, weight64 = mask.nonzero()[:, 0], weight.detach().double()
    logp = torch.cat([kernels.float64_logprob(hidden, weight64, target, part) for part in index.split(64)])
    first = index[:64]
    p = torch.softmax(hidden.detach()[first].double() @ weight64.T, -1)
    return logp, index, p @ weight64 - weight64[target[first]]  # gradient of -log p_a


def live_share(hidden, weight, mask, chunk, tau):
    """Share of (row, slice) pairs with more than tau of the row's probability: what the backward pass has to work on."""
    index = mask.nonzero()[:, 0]
    live = 0
    for part in index.split(64):
        p = torch.softmax(kernels.matmul_fp32(hidden.detach()[part], weight.detach().T), -1)
        live += sum((slice_of_p.sum(1) > tau).sum().item() for slice_of_p in p.split(chunk, 1))
    return live / (len(index) * -(-weight.shape[0] // chunk))


def measure(logprob, arguments, device, repeats, truth):
    """A row of the table: forward and forward+backward seconds, peak bytes, error of log-prob (text) and of d_hidden."""
    hidden, weight = arguments[:2]
    truth_logp, index, truth_gradient = truth
    both = kernels.backward_of(logprob, arguments)
    with torch.no_grad():
        forward = kernels.seconds(lambda: logprob(*arguments), device, repeats)
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
    return forward, kernels.seconds(both, device, repeats), kernels.peak_memory(both, device), error, error_gradient


def table(arguments, device, repeats, skip):
    print(
        "| implementation | forward s | + backward s | peak MiB | error log-prob | error d_hidden | time / ours | memory / ours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    truth, base = float64_values(*arguments), None
    for title, (logprob, package) in candidates().items():
        if any(word in title for word in skip):
            continue
        reason = "" if importlib.util.find_spec(package) else f"{package} is not installed"
        if title == "ours, Triton" and not reason and not (device == "cuda" and not kernels.interpreted()):
            reason = "needs a GPU"
        if not reason:
            try:
                forward, both, memory, error, error_gradient = measure(logprob, arguments, device, repeats, truth)
            except Exception as failure:  # other people's code may fail in any way: a row says how, the table goes on
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


def load_case(path, device):
    """What train.py --save-hidden wrote -> arguments; the temperature is divided out, so that every row has T = 1."""
    case = torch.load(path, map_location=device)
    hidden = (case["hidden"] / case["temperature"]).requires_grad_()
    return hidden, case["weight"].requires_grad_(), case["target"], case["mask"]


def main(argv=None):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    big = device == "cuda"
    parser.add_argument("--rows", type=int, default=8192 if big else 4096)
    parser.add_argument("--vocabulary", type=int, default=151936 if big else 32768)
    parser.add_argument("--dim", type=int, default=2048 if big else 256)
    parser.add_argument("--active", type=float, default=0.45, help="share of the rows that count")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if big else "float32")
    parser.add_argument("--repeats", type=int, default=10 if big else 3)
    parser.add_argument("--cases", nargs="*", default=[], metavar="FILE", help="saved hidden states instead of synthetic data")
    parser.add_argument("--peers", metavar="DIR", help="folder of unpacked wheels")
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="leave out the rows with these words in the title")
    args = parser.parse_args(argv)
    if args.peers:
        sys.path.append(args.peers)
    cases = {path: lambda path=path: load_case(path, device) for path in args.cases} or {
        f"synthetic, {name}": lambda peak=peak: kernels.example(
            args.rows, args.vocabulary, args.dim, args.active, peak, getattr(torch, args.dtype), device
        )
        for name, peak in (("peaked", 15.0), ("flat", 0.0))
    }
    name = torch.cuda.get_device_name() if big else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, median of {args.repeats}, L2 {'flushed' if big else 'not flushed'}")
    for title, make in cases.items():
        arguments = hidden, weight, target, mask = make()
        chunk = kernels.default_chunk(int(mask.sum()), len(weight), device)
        live = live_share(hidden, weight, mask, chunk, 1e-5)
        p = kernels.float64_logprob(hidden, weight, target, mask.nonzero()[:64, 0]).exp()
        print(
            f"\n{title}: N {len(hidden)}, V {len(weight)}, D {hidden.shape[1]}, {hidden.dtype}, {int(mask.sum())} rows active; "
            f"median probability of a target {statistics.median(p.tolist()):.2g}; {live:.0%} of (row, slice of {chunk}) pairs hold more than 1e-5\n"
        )
        table(arguments, device, args.repeats, args.skip)


if __name__ == "__main__":
    main()
