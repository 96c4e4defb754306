"""Claims about kernels.py. Every reference is float64 autograd over the plain expression, never the code under test.

Each claim is put to both implementations: "torch", the twins, and "triton", the kernels, which run interpreted on the
CPU or, where there is a GPU, compiled on it. BLOCK is 64 here, so that a row of a few hundred columns has several.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_kernels
import kernels
from kernels import fused_linear_logprob_kl, fused_logprob_kl
from searchr1 import kl_k1, kl_k2, kl_k3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent
INF = float("inf")
need_triton = pytest.mark.skipif(not kernels.HAVE_TRITON, reason="unproved here, for want of Triton: that the kernels are right")


def python(code, **environment):
    """Start code in a new process, since Triton reads its variable when kernels.py is imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True)


@pytest.fixture(scope="module", autouse=True)
def compiling(tmp_path_factory):
    """The process of the slowest test, which begins with the first test of this file and runs beside the others."""
    with python(COMPILE, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as process:
        yield process
        process.kill()


@pytest.fixture(params=["torch", pytest.param("triton", marks=need_triton)])
def impl(request, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def expression(logits, target, ref_logits, temperature=1.0):
    """The plain float64 expression: log_softmax, gather, sums over the vocabulary."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    ref_logp = torch.log_softmax(ref_logits.double() / temperature, -1)
    entropy = -torch.where(logp > -1e6, logp.exp() * logp, 0.0).sum(-1)
    kl = torch.where(logp > -1e6, logp.exp() * (logp - ref_logp), 0.0).sum(-1)
    pick = lambda x: x.gather(-1, target[..., None])[..., 0]
    return pick(logp), entropy, kl, pick(ref_logp)


def rand(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE)


def integers(high, *shape):
    return torch.randint(high, shape).to(DEVICE)


def close(got, want, atol=2e-5, rtol=0.0):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


def gradients(outputs, upstream, *inputs):
    """Gradients of sum_k upstream_k * output_k; entropy, KL and log-prob weigh in with different numbers."""
    return torch.autograd.grad(sum((u * x).sum() for u, x in zip(upstream, outputs)), inputs)


def compare_logits(logits, target, ref_logits, temperature, impl, atol=2e-5, rtol=0.0):
    """All four values and the gradient of all three differentiable ones against float64."""
    upstream = rand(3, *target.shape)
    logits64 = logits.detach().double().requires_grad_()
    logits = logits.detach().requires_grad_()
    want = expression(logits64, target, ref_logits, temperature)
    got = fused_logprob_kl(logits, target, None, ref_logits, temperature, impl)
    for g, x in zip(got, want):
        assert g.dtype == torch.float32
        close(g, x)
    close(*gradients(got, upstream, logits), *gradients(want, upstream, logits64), atol, rtol)


# ----- Values and gradients -----


@pytest.mark.parametrize("vocabulary, temperature", [(1, 0.6), (7, 0.6), (129, 1.0), (129, 0.6), (500, 0.6)])
def test_values_and_gradients_equal_the_float64_expression(vocabulary, temperature, impl):
    """Claim: log-prob, entropy, exact KL, the reference's log-prob and the gradients are those of float64 within 2e-5,
    also for a vocabulary of one token and for one that ends inside a block.
    Fails if, in the kernel or in the twin: a sum is not re-based when the maximum moves (`tl.exp(shift) * s` -> `s`), or
    a moment (`u + s * shift` -> `u`; `shift - shift_y` -> `shift`); a column past the end counts (`other=-inf` -> `0.0`);
    the last block is left out (`range(0, columns, BLOCK)` -> `range(0, columns - BLOCK + 1, BLOCK)`); the temperature is
    forgotten in the gradient (`* inverse_T` in dx); the entropy's or the KL's term has the wrong sign; the target's
    column is off by one (`column + first_column ==` -> `column + first_column + 1 ==`).
    """
    rows = 5
    compare_logits(rand(rows, vocabulary, scale=2), integers(vocabulary, rows), rand(rows, vocabulary, scale=2), temperature, impl)


@pytest.mark.parametrize("chunk", [None, 50])
def test_the_linear_path_equals_the_float64_expression_slice_by_slice(chunk, impl):
    """Claim: the four numbers and the gradients of hidden states and weight are those of the whole vocabulary, however
    it is cut into slices, here also in the middle of a block.
    Fails if: the state of earlier slices is not joined to a slice's (`s += tl.exp(shift) * s_before` taken out, or
    without tl.exp(shift); likewise u, w, sy); `- first_column` is forgotten for the target; d_weight is written to
    [v, v + BLOCK).
    """
    n, V, D = 6, 129, 12
    hidden, weight, ref_hidden, ref_weight = rand(n, D), rand(V, D, scale=0.5), rand(n, D), rand(V, D, scale=0.5)
    target, upstream = integers(V, n), rand(3, n)
    hidden.requires_grad_(), weight.requires_grad_()
    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = fused_linear_logprob_kl(hidden, weight, target, None, ref_hidden, ref_weight, 0.6, chunk, impl=impl)
    want = expression(hidden64 @ weight64.T, target, ref_hidden.double() @ ref_weight.double().T, 0.6)
    for g, x in zip(got, want):
        close(g, x)
    for g, x in zip(gradients(got, upstream, hidden, weight), gradients(want, upstream, hidden64, weight64)):
        close(g, x)


@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_logits_lose_nothing_but_the_rounding_of_the_result(dtype, ulp, impl):
    """Claim: with bf16 or fp16 logits the values are still those of float64 within 2e-5, and the gradient, which comes
    back in the logits' dtype, is within one unit in the last place. (One, not a half: the interpreter truncates where a
    GPU rounds.)
    Fails if: the twin subtracts in the logits' dtype (`x_nc.float() - m_n` -> `x_nc - m_n.to(x_nc.dtype)`), or the kernel
    rounds e (`tl.exp(z)` -> `tl.exp(z).to(tl.float16).to(tl.float32)`).
    """
    logits, ref_logits = rand(5, 129, scale=2).to(dtype), rand(5, 129, scale=2).to(dtype)
    compare_logits(logits, integers(129, 5), ref_logits, 1.0, impl, atol=1e-6, rtol=ulp)


def test_logits_of_ten_thousand_keep_their_digits(impl):
    """Claim: logits near +1e4, near -1e4 and spread over both are as exact as small ones.
    Fails if: finish_state subtracts a log-sum-exp (`x_a - (m + T ln s)`), in which ln s has lost three digits; new_state
    starts the maximum at 0, so that rows near -1e4 sum to 0.
    """
    noise = torch.tensor([[0.0, 1.5, -2.0, 0.25, 1.0, -0.75] * 20]).to(DEVICE)  # exact in fp32 at 1e4, too
    logits = torch.cat([noise + 1e4, noise - 1e4, torch.where(noise > 0.5, noise + 1e4, noise - 1e4)])
    compare_logits(logits, torch.tensor([7, 7, 7]).to(DEVICE), noise.repeat(3, 1), 1.0, impl)
    target = torch.tensor([0]).to(DEVICE)  # 20000 below the best
    got = fused_logprob_kl(logits[2:], target, impl=impl).logp
    close(got, expression(logits[2:], target, noise)[0], atol=2e-3, rtol=1e-7)


def test_blocks_of_minus_infinity_are_probability_zero(impl):
    """Claim: whole blocks of -inf, at the beginning, in the middle or at the end, or of the lowest finite number, which
    many use in its place, change nothing for the others, and get gradient 0. Nothing becomes NaN.
    Fails if: LOWEST becomes -inf; new_state starts the maxima at -inf; differences does not clamp; the kernel does not
    (`tl.maximum((x - m_new) * inverse_T, LOWEST_IN_KERNEL)` -> without tl.maximum).
    """
    logits, ref_logits = rand(4, 256), rand(4, 256)
    alive = torch.ones(4, 256, dtype=torch.bool, device=DEVICE)
    alive[0, :128] = alive[1, 64:200] = alive[2, 130:] = alive[3, :192] = False
    target = torch.tensor([200, 10, 129, 255], device=DEVICE)
    for low in (-INF, torch.finfo(torch.float32).min):
        x = torch.where(alive, logits, low).requires_grad_()
        y = torch.where(alive, ref_logits, low)
        upstream = rand(3, 4)
        got = fused_logprob_kl(x, target, None, y, 1.0, impl)
        (dx,) = gradients(got, upstream, x)
        assert (dx[~alive] == 0).all()
        for i in range(4):  # each row by itself, with the dead columns cut out
            x64 = logits[i][alive[i]].double().requires_grad_()
            place = alive[i][: target[i]].sum()
            want = expression(x64, place, ref_logits[i][alive[i]])
            for g, w in zip(got, want):
                close(g[i], w)
            close(dx[i][alive[i]], gradients(want, upstream[:, i], x64)[0])


def test_a_sure_policy_has_no_entropy_and_no_gradient(impl):
    """Claim: p close to 1 costs no accuracy: log-prob, entropy and gradient stay within 2e-6 of float64 and finite.
    Fails if: the kernel adds 1e-5 to s before the logarithm ("for safety"), or the entropy is log s - m - u/s.
    """
    logits = torch.zeros(2, 129, device=DEVICE).requires_grad_()
    with torch.no_grad():
        logits[0, 100], logits[1, 3] = 30.0, 12.0
    target = torch.tensor([100, 3], device=DEVICE)
    logits64 = logits.detach().double().requires_grad_()
    got = fused_logprob_kl(logits, target, impl=impl)
    want = expression(logits64, target, torch.zeros_like(logits64))
    ones = torch.ones(2, 2, device=DEVICE)
    close(got.logp, want[0], atol=2e-6)
    close(got.entropy, want[1], atol=2e-6)
    close(*gradients(got, ones, logits), *gradients(want[:2], ones, logits64), atol=2e-6)


@pytest.mark.parametrize("layout", ["shifted", "transposed", "every second column", "expanded", "padded vocabulary"])
def test_inputs_need_not_be_contiguous(layout, impl):
    """Claim: views give what their contiguous copies give, gradients included.
    Fails if: a kernel assumes that rows follow each other (`row * x_stride` -> `row * columns`, in either; likewise
    y_stride), or run that columns do (`.contiguous()` taken out).
    """
    shapes = {
        "shifted": (2, 4, 100),
        "transposed": (100, 2, 3),
        "every second column": (2, 3, 200),
        "expanded": (1, 3, 100),
        "padded vocabulary": (2, 3, 130),
    }
    base = rand(*shapes[layout]).requires_grad_()
    views = {
        "shifted": lambda t: t[:, :-1],
        "transposed": lambda t: t.permute(1, 2, 0),
        "every second column": lambda t: t[:, :, ::2],
        "expanded": lambda t: t.expand(2, 3, 100),
        "padded vocabulary": lambda t: t[:, :, :100],
    }
    target, upstream = integers(100, 2, 3), rand(3, 2, 3)
    base64 = base.detach().double().requires_grad_()
    ref = views[layout](base.detach().flip(-1) * 0.5)
    got = fused_logprob_kl(views[layout](base), target, None, ref, 1.0, impl)
    want = expression(views[layout](base64), target, ref)
    for g, x in zip(got, want):
        close(g, x)
    close(*gradients(got, upstream, base), *gradients(want, upstream, base64))


# ----- The mask -----


@pytest.mark.parametrize("level", ["logits", "linear"])
def test_nothing_leaks_out_of_masked_rows(level, impl):
    """Claim: NaN and inf in masked rows change no output and no gradient; those rows get exactly 0 of both, and a mask
    of 0 is the same as a target of -100.
    Fails if: rows are multiplied by the mask instead of selected (run: all rows, outputs * mask); run ignores the mask or
    the -100; the kernel reads row i instead of rows[i] (`tl.load(rows_ptr + i)` -> `i.to(tl.int64)`).
    """
    n, V, D = 8, 100, 6
    rows = rand(n, V if level == "logits" else D)
    weight, ref_rows, ref_weight = rand(V, D), rand(*rows.shape), rand(V, D)
    target, mask = integers(V, n), torch.tensor([1, 0, 0, 1, 0, 1, 1, 0], device=DEVICE)
    ignored = torch.where(mask == 1, target, -100)
    garbage = torch.tensor([float("nan"), INF, -INF], device=DEVICE).repeat(n, rows.shape[1])[:, : rows.shape[1]]
    dirty, ref_dirty = (torch.where(mask[:, None] == 1, clean, garbage) for clean in (rows, ref_rows))
    results = []
    for x, y, t, m in ((rows, ref_rows, target, mask), (dirty, ref_dirty, target, mask.bool()), (dirty, ref_dirty, ignored, None)):
        x, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if level == "logits":
            out = fused_logprob_kl(x, t, m, y, impl=impl)
        else:
            out = fused_linear_logprob_kl(x, w, t, m, y, ref_weight, chunk=40, impl=impl)
        torch.stack(out[:3]).sum().backward()
        assert (torch.stack(out)[:, mask == 0] == 0).all() and (x.grad[mask == 0] == 0).all()
        assert (torch.stack(out)[:, mask == 1] != 0).all() and (x.grad[mask == 1] != 0).any(1).all()
        results.append((*out, x.grad, w.grad))
    for clean, *others in zip(*results):
        assert clean is None or all(torch.equal(clean, other) for other in others)


@pytest.mark.parametrize("n", [0, 3])
def test_no_active_row_gives_zeros_and_zero_gradients(n, impl):
    """Claim: a batch without rows, or with all of them masked, is no error and teaches nothing.
    Fails if: default_chunk divides by n (`max(1, n)` -> `n`).
    """
    hidden, weight = rand(n, 4).requires_grad_(), rand(9, 4).requires_grad_()
    logits, target = rand(n, 9).requires_grad_(), integers(9, n)
    nothing = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    for out in (
        fused_linear_logprob_kl(hidden, weight, target, nothing, impl=impl),
        fused_logprob_kl(logits, target, nothing, impl=impl),
    ):
        out.logp.sum().backward()
        assert all(x.shape == (n,) and (x == 0).all() for x in out)
    assert all((t.grad == 0).all() for t in (hidden, weight, logits))


def test_products_are_made_for_the_rows_that_count_and_no_others(monkeypatch, impl):
    """Claim: masked rows enter no product with the lm_head, rows with zero upstream gradient none of the backward pass,
    a frozen lm_head costs no product for its gradient, an unused KL none for the reference.
    Fails if: slice_of_logits multiplies all rows; `wanted_n &` is taken out; `needs_input_grad[1]` -> True; the line
    `if g_kl is None: ref_rows = None` is taken out.
    """
    products, matmul = [], kernels.matmul_fp32
    monkeypatch.setattr(kernels, "matmul_fp32", lambda a, b: products.append((*a.shape, b.shape[1])) or matmul(a, b))
    V, D = 30, 5
    hidden, weight, target = rand(10, D).requires_grad_(), rand(V, D).requires_grad_(), integers(V, 10)
    mask = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0, 1], device=DEVICE)  # six rows
    upstream = torch.tensor([1.0, 0, -2, 5, 5, 5, 0, 1, 5, 0], device=DEVICE)  # three of them
    logp = fused_linear_logprob_kl(hidden, weight, target, mask, hidden, weight, chunk=16, impl=impl).logp
    assert products == [(6, D, 16)] * 2 + [(6, D, 14)] * 2  # two slices, policy and reference
    products.clear()
    (logp * upstream).sum().backward()
    assert products == [(3, D, 16), (3, 16, D), (16, 3, D), (3, D, 14), (3, 14, D), (14, 3, D)]  # logits, d_hidden, d_weight
    want = torch.autograd.grad(
        (expression(hidden.double() @ weight.double().T, target, torch.zeros(10, V, device=DEVICE))[0] * upstream * mask).sum(),
        (hidden, weight),
    )
    close(hidden.grad, want[0])
    close(weight.grad, want[1])
    products.clear()
    logp = fused_linear_logprob_kl(hidden, weight.detach(), target, mask, chunk=16, impl=impl).logp
    products.clear()
    (logp * upstream).sum().backward()
    assert products == [(3, D, 16), (3, 16, D), (3, D, 14), (3, 14, D)]


def test_skipping_slices_stays_within_its_bound_and_tau_zero_is_lossless(impl):
    """Claim: with tau the gradient of a row of logits is off by at most tau * slices / T in L1, for entropy and KL times the
    largest factor |ln p + H| or |ln p - ln q - KL| among what was skipped; with tau = 0 it is not off at all.
    Fails if: the mass of a slice is taken relative to the running maximum (`torch.exp((share[:, 0] - state[0]) / T)` ->
    1), not divided by the sum, or the target's own slice may be skipped (`| own_Kn` taken out).
    """
    n, V, chunk, T = 6, 64 if impl == "torch" else 24, 4, 0.5  # interpreted, a launch takes 30 ms
    spread = torch.linspace(1, 3, n, device=DEVICE)[:, None]  # from rows that share their probability to rows that do not
    hidden, ref_hidden = spread * rand(n, V), rand(n, V)  # the head is the identity: hidden's gradient is the logits'
    target, eye = integers(V, n), torch.eye(V, device=DEVICE)
    grads = {}
    for tau in (None, 0.0, 1e-3):
        h = hidden.clone().requires_grad_()
        cut = V if tau is None else chunk
        out = fused_linear_logprob_kl(h, eye, target, None, ref_hidden, eye, T, cut, tau or 0.0, impl)
        grads[tau] = [torch.autograd.grad(x.sum(), h, retain_graph=True)[0].double() for x in out[:3]]
    logp, logq = (torch.log_softmax(x.double() / T, -1) for x in (hidden, ref_hidden))
    p, slices = logp.exp(), torch.arange(V // chunk, device=DEVICE)
    kept = (p.view(n, -1, chunk).sum(-1) > 1e-3) | (slices == target[:, None] // chunk)  # by hand: what may not be skipped
    kept = kept.repeat_interleave(chunk, 1)
    entropy, kl = -(p * logp).sum(-1, keepdim=True), (p * (logp - logq)).sum(-1, keepdim=True)
    for exact, lossless, skipped, factor in zip(*grads.values(), (torch.ones_like(p), logp + entropy, logp - logq - kl)):
        close(lossless, exact)
        close(skipped, exact * kept)
        error, bound = (skipped - exact).abs().sum(1), 1e-3 * V / chunk / T * (factor.abs() * ~kept).amax(1)
        assert error.max() > 1e-4 and (error <= bound + 1e-5).all()  # something was skipped, and no more than stated


# ----- Precision and memory of the linear path -----


def test_bf16_models_get_fp32_logits_and_gradients_that_are_summed_in_fp32(impl):
    """Claim: bf16 hidden states and weight give log-probs good to 1e-5, not to 3e-2; the gradient of the hidden states,
    a sum over 16 slices, is off by what rounding dlogits and the result to bf16 costs, under 0.4 % in norm.
    Fails if: matmul_fp32 multiplies in bf16 (`a.float() @ b.float()` -> `(a @ b).float()`), or d_rows is summed in bf16
    (`torch.zeros(..., dtype=rows.dtype)`).
    """
    n, V, D = 6, 512, 64
    hidden, weight, target = rand(n, D).bfloat16().requires_grad_(), rand(V, D, scale=0.25).bfloat16(), integers(V, n)
    out = fused_linear_logprob_kl(hidden, weight, target, chunk=32, impl=impl)
    hidden64 = hidden.detach().double().requires_grad_()
    want = expression(hidden64 @ weight.double().T, target, torch.zeros(n, V, device=DEVICE))
    close(out.logp, want[0], atol=1e-5)
    out.logp.sum().backward()
    want[0].sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad.double() - hidden64.grad).norm() < 4e-3 * hidden64.grad.norm()


def test_autocast_and_fp32_master_weights_do_not_round_the_logits(impl):
    """Claim: inside torch.autocast the result is the one outside it, and bf16 hidden states go with an fp32 weight, whose
    gradient is fp32.
    Fails if: matmul_fp32 leaves autocast on, or `b = b.to(a.dtype)` is taken out.
    """
    hidden, weight, target = rand(5, 16), rand(70, 16).requires_grad_(), integers(70, 5)
    plain = fused_linear_logprob_kl(hidden, weight, target, impl=impl).logp
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(fused_linear_logprob_kl(hidden, weight, target, impl=impl).logp, plain)
    fused_linear_logprob_kl(hidden.bfloat16(), weight, target, impl=impl).logp.sum().backward()
    rounded = weight.detach().bfloat16().double().requires_grad_()
    want = expression(hidden.bfloat16().double() @ rounded.T, target, torch.zeros(5, 70, device=DEVICE))[0]
    want.sum().backward()
    assert weight.grad.dtype == torch.float32
    close(weight.grad, rounded.grad, atol=5e-3, rtol=2**-7)  # dlogits went through bf16


def test_no_wall_of_logits():
    """Claim: log-prob and gradients of 4096 rows, a vocabulary of 32768, 256 dimensions and 45 % of the rows active take
    at most a tenth of the memory of the plain expression, beyond the inputs. Counted: every allocation and release. The
    plain expression is measured with 512 rows and taken eight times, since three times rows x vocabulary is all it holds.
    Fails if: slice_of_logits takes all rows and not rows[index_n] at the SLICE_BYTES of a GPU; default_chunk returns
    `vocabulary`.
    """
    peak = lambda f, rows: kernels.peak_memory(kernels.backward_of(f, kernels.example(rows, 32768, 256, device=DEVICE)), DEVICE)
    eager = 8 * peak(kernels.eager_logprob, 512)
    assert eager >= 3 * 4096 * 32768 * 4  # so every allocation was counted
    assert peak(lambda *a: fused_linear_logprob_kl(*a).logp, 4096) <= eager / 10


# ----- KL estimators -----


def test_k1_k2_and_k3_of_sampled_tokens_agree_with_the_exact_kl(impl):
    """Claim: over an enumerated vocabulary of five tokens, E[k1] = E[k3] = KL exactly, E[k2] = KL to third order, and
    k3 >= 0 for every token; and the exact KL of the kernel is the same number.
    Fails if: kl_k3 has the ratio upside down (`ref_logprobs - logprobs` -> `logprobs - ref_logprobs`), or is written as
    exp(r) - r - 1; ref_logp is the policy's (`y_a - my` -> `x_a - m` in finish_state).
    """
    x, tokens = rand(1, 5), torch.arange(5, device=DEVICE)
    for distance in (0.1, 1.0):
        y = x + distance * rand(1, 5)
        out = fused_logprob_kl(x.expand(5, 5), tokens, ref_logits=y.expand(5, 5), impl=impl)  # row t scores token t
        logp, logq = torch.log_softmax(x.double(), -1)[0], torch.log_softmax(y.double(), -1)[0]
        p, exact = logp.exp(), (logp.exp() * (logp - logq)).sum()
        close(out.kl, exact.expand(5), atol=1e-6)
        for k, tolerance in ((kl_k1, 1e-6), (kl_k2, distance * exact), (kl_k3, 1e-6)):
            assert abs((p * k(out.logp, out.ref_logp)).sum() - exact) < tolerance
        assert (kl_k3(logp, logq) >= 0).all() and (kl_k1(logp, logq) < 0).any()
    near = -torch.logspace(-8, 0, 1000)  # fp32, down to differences that exp(r) - 1 cannot resolve
    assert (kl_k3(near, torch.zeros(1000)) >= 0).all() and (kl_k3(torch.zeros(1000), near) >= 0).all()


# ----- Which implementation runs, and mistakes -----


def test_mistakes_are_named():
    """Claim: a target outside the vocabulary, a temperature of 0, shapes that do not match, half a reference and an
    implementation that does not exist or cannot run are refused with the value.
    Fails if: the range check of the target is removed (an index error, or on a GPU a wrong number, would follow); the
    check of the shapes is.
    """
    logits, target = torch.randn(3, 7), torch.tensor([0, 1, 2])
    for arguments, message in (
        ({"target": torch.tensor([0, 7, 1])}, "0..7 outside the vocabulary of 7"),
        ({"target": target, "temperature": 0.0}, "temperature=0.0"),
        ({"target": target, "impl": "cuda"}, "impl='cuda'"),
        ({"target": torch.tensor([0, 1])}, r"rows \[3, 7\], target \[2\]"),
        ({"target": target, "mask": torch.ones(3, 1)}, r"mask \[3, 1\]"),
        ({"target": target, "ref_logits": logits[:2]}, r"reference's rows \[2, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_logprob_kl(logits, **arguments)
    with pytest.raises(ValueError, match="belong together"):
        fused_linear_logprob_kl(torch.randn(3, 4), torch.randn(7, 4), target, ref_hidden=torch.randn(3, 4))


def test_auto_takes_the_kernels_on_a_gpu_only_and_says_what_triton_lacks(monkeypatch):
    """Claim: "auto" means the twins on a CPU, even where the kernels could be interpreted, and the compiled kernels on a
    GPU; "triton" where nothing can run them is refused.
    Fails if: resolve_impl ignores interpreted() or the device.
    """
    cpu, gpu = torch.zeros(1), type("OnGPU", (), {"is_cuda": True, "device": "cuda:0"})()
    monkeypatch.setattr(kernels, "HAVE_TRITON", True)
    for interpreted in (True, False):
        monkeypatch.setattr(kernels, "interpreted", lambda: interpreted)
        assert kernels.resolve_impl("auto", cpu) is False and kernels.resolve_impl("auto", gpu) is not interpreted
        assert kernels.resolve_impl("triton", gpu) is True and kernels.resolve_impl("torch", gpu) is False
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.resolve_impl("triton", cpu)
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    assert kernels.resolve_impl("auto", gpu) is False
    with pytest.raises(ValueError, match="not installed"):
        kernels.resolve_impl("triton", gpu)


def test_without_triton_the_file_imports_and_computes():
    """Claim: where the package triton does not exist, kernels.py is imported and the twins do the work.
    Fails if: a kernel is defined outside `if HAVE_TRITON`, or interpreted() asks triton first.
    """
    code = (
        "import sys; sys.modules['triton'] = None; import torch, kernels as k\n"
        "assert not k.HAVE_TRITON and not k.interpreted()\n"
        "print(k.fused_logprob_kl(torch.zeros(1, 4), torch.tensor([2])).logp.item())"
    )
    out, error = (done := python(code)).communicate()
    assert done.returncode == 0 and float(out) == pytest.approx(-1.3862944), error


COMPILE = """
import json, subprocess, tempfile
from pathlib import Path
import triton, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for kernel, extra in ((kernels.statistics_kernel, ["state_ptr", "share_ptr"]), (kernels.gradient_kernel, ["numbers_ptr", "out_ptr"])):
    for capability, logits, reference in ((89, "*fp32", True), (90, "*bf16", False)):
        signature = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(extra, "*fp32")
        signature |= {"x_ptr": logits, "y_ptr": logits, "rows_ptr": "*i64", "target_ptr": "*i64", "inverse_T": "fp32", "BLOCK": "constexpr"}
        constants = {"BLOCK": kernels.BLOCK} | ({} if reference else {"y_ptr": None})
        signature |= dict.fromkeys(constants, "constexpr")
        place = kernel.arg_names.index
        aligned = {(place(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] in "*i" and name not in ("n", "first_column")}
        source = ASTSource(kernel, signature, {(place(name),): value for name, value in constants.items()}, aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(binary.asm["cubin"])
            usage, code = (subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout for flag in ("-res-usage", "-sass"))
        print(json.dumps([kernel.__name__, capability, "STACK:0 " in usage and "LOCAL:0 " in usage, "LDG.E.128" in code]))
"""


@need_triton
def test_the_kernels_compile_for_real_gpus_without_spilling(compiling):
    """Claim: for an RTX 4090 (compute capability 8.9) and an H100 (9.0) both kernels compile, keep everything in
    registers, and read 16 bytes a thread at a time. What they compute there, and how fast, needs a GPU.
    Fails if: BLOCK is 65536 (spills), or a kernel uses what only the interpreter accepts (`x_ptr[0]`).
    """
    out, error = compiling.communicate()
    assert compiling.returncode == 0, error
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 4 and all(no_spill and wide for _, _, no_spill, wide in lines), lines


def test_the_benchmark_runs_and_its_rows_are_right(capsys):
    """Claim: tests/bench_kernels.py prints a row for each implementation, with errors; what is not installed says so.
    Fails if: a row's log-prob is that of another mask or sign (its error would be about 5), or a missing package is a crash.
    """
    bench_kernels.main("--rows 40 --vocabulary 300 --dim 16 --repeats 1 --skip compile".split())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    measured = [row for row in rows if len(row[2:]) and row[2] and row[0] != "implementation"]
    assert {"ours, PyTorch twin", "eager, all rows", "eager, compacted by hand"} <= {row[0] for row in measured}
    assert all(float(error.split()[0]) < 1e-5 and float(gradient) < 1e-5 for *_, error, gradient, _, _ in measured)
    assert len(rows) - 2 > len(measured) and all("not installed" in row[1] or "needs a GPU" in row[1] for row in rows if not row[2])
