"""Claims about kernels.py. Every reference is float64 autograd over the plain expression, never the code under test."""

import itertools

import pytest
import torch

from kernels import fused_linear_logprob_kl, fused_logprob_kl
from searchr1 import kl_k1, kl_k2, kl_k3


def expression(logits, target, ref_logits, temperature):
    """The plain float64 expression: log_softmax, gather, sums over the vocabulary."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    ref_logp = torch.log_softmax(ref_logits.double() / temperature, -1)
    entropy = -torch.where(logp > -1e6, logp.exp() * logp, 0.0).sum(-1)
    kl = torch.where(logp > -1e6, logp.exp() * (logp - ref_logp), 0.0).sum(-1)
    pick = lambda x: x.gather(-1, target[..., None])[..., 0]
    return pick(logp), entropy, kl, pick(ref_logp)


def problem(rows, vocabulary, hidden=12, seed=0):
    torch.manual_seed(seed)
    h, rh = torch.randn(rows, hidden), torch.randn(rows, hidden)
    w, rw = torch.randn(vocabulary, hidden), torch.randn(vocabulary, hidden)
    return h, w, rh, rw, torch.randint(vocabulary, (rows,)), torch.rand(rows) < 0.5


@pytest.mark.parametrize("vocabulary, temperature", list(itertools.product([1, 7, 129, 500], [1.0, 0.6])))
def test_values_and_gradients_equal_the_float64_expression(vocabulary, temperature):
    """Claim: log-prob, entropy, exact KL and their gradients, slice by slice, are those of the whole row.
    Fails if: update_statistics does not re-base a sum when the maximum moves (`decay * stats["sum"]` -> `stats["sum"]`),
    the moments are not shifted, or slice_gradient forgets `/ temperature`.
    """
    h, w, rh, rw, target, mask = problem(40, vocabulary)
    upstream = torch.randn(3, 40)
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    want = expression(h64 @ w64.T, target, rh.double() @ rw.double().T, temperature)
    sum((u * x)[mask].sum() for u, x in zip(upstream, want)).backward()
    for chunk in (None, 64, 5):
        h.grad = w.grad = None
        h.requires_grad_(), w.requires_grad_()
        got = fused_linear_logprob_kl(h, w, target, mask, rh, rw, temperature, chunk=chunk)
        sum((u * x).sum() for u, x in zip(upstream, got)).backward()
        for g, x in zip(got, want):
            torch.testing.assert_close(g[mask].double(), x[mask], atol=2e-5, rtol=1e-5)
        # fp32 matrix products of these sizes are off by about 1e-6 relative to entries of up to 50
        torch.testing.assert_close(h.grad.double(), h64.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(w.grad.double(), w64.grad, atol=1e-4, rtol=1e-4)
    logits = (h @ w.T).detach().requires_grad_()
    got = fused_logprob_kl(logits, target, mask, rh @ rw.T, temperature)
    for g, x in zip(got, want):
        torch.testing.assert_close(g[mask].double(), x[mask], atol=2e-5, rtol=1e-5)
    sum((u * x).sum() for u, x in zip(upstream, got)).backward()
    logits64 = logits.detach().double().requires_grad_()
    want = expression(logits64, target, (rh @ rw.T), temperature)
    sum((u * x)[mask].sum() for u, x in zip(upstream, want)).backward()
    torch.testing.assert_close(logits.grad.double(), logits64.grad, atol=2e-5, rtol=1e-5)


def test_nothing_leaks_out_of_masked_rows():
    """Claim: NaN and inf in masked rows change no output and no gradient, and get exactly 0 of both.
    Fails if: rows are multiplied by the mask instead of selected (`index = active.nonzero()` -> all rows, outputs * mask).
    """
    h, w, _, _, target, mask = problem(30, 50)
    target[~mask] = -100
    dirty = h.clone()
    dirty[~mask] = torch.tensor([float("nan"), float("inf")]).repeat(6)
    results = []
    for hidden in (h, dirty):
        hidden = hidden.clone().requires_grad_()
        weight = w.clone().requires_grad_()
        out = fused_linear_logprob_kl(hidden, weight, target)
        (out.logp.sum() + out.entropy.sum()).backward()
        assert (out.logp[~mask] == 0).all() and (out.entropy[~mask] == 0).all() and (hidden.grad[~mask] == 0).all()
        results.append((out.logp, out.entropy, hidden.grad, weight.grad))
    for clean, same in zip(*results):
        assert torch.equal(clean, same)


def test_extreme_logits_keep_their_digits():
    """Claim: logits shifted by 1e4, whole slices of -inf, and p close to 1 cost no accuracy.
    Fails if: finish_statistics keeps a log-sum-exp and subtracts it (`target - (max + log_sum)`), or LOWEST becomes -inf.
    """
    torch.manual_seed(1)
    logits = torch.randn(20, 64)
    target = torch.randint(32, 64, (20,))
    shifted = logits.double() + 1e4
    got = fused_logprob_kl(shifted.float(), target).logp
    torch.testing.assert_close(got.double(), expression(shifted.float(), target, shifted, 1.0)[0], atol=1e-5, rtol=0)
    blocked = logits.clone()
    blocked[:, :32] = float("-inf")
    out = fused_logprob_kl(blocked, target)
    want = expression(logits[:, 32:], target - 32, logits[:, 32:], 1.0)
    torch.testing.assert_close(out.logp.double(), want[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy.double(), want[1], atol=1e-5, rtol=0)
    sure = torch.zeros(1, 64).index_fill(1, torch.tensor([40]), 30.0)
    out = fused_logprob_kl(sure, torch.tensor([40]))
    assert abs(out.logp.item()) < 1e-6 and abs(out.entropy.item()) < 1e-6


def test_no_active_row_gives_zeros_and_zero_gradients():
    """Claim: a batch that is masked out altogether is no error and teaches nothing.
    Fails if: the chunk is computed by dividing by the number of active rows (`max(1, len(index))` -> `len(index)`).
    """
    h, w, _, _, target, _ = problem(5, 9)
    h.requires_grad_(), w.requires_grad_()
    out = fused_linear_logprob_kl(h, w, target, torch.zeros(5, dtype=torch.bool))
    out.logp.sum().backward()
    assert (out.logp == 0).all() and (h.grad == 0).all() and (w.grad == 0).all()


def test_skipping_slices_stays_within_its_bound_and_tau_zero_is_lossless():
    """Claim: with tau the gradient of a row of logits is off by at most |g| tau * slices in L1; with tau = 0 not at all.
    Fails if: the mass of a slice is taken relative to the running maximum (`torch.stack(maxima) - stats["max"]` -> 0).
    """
    torch.manual_seed(2)
    V, chunk = 96, 8
    hidden = 6 * torch.randn(30, V)  # the head is the identity, so that hidden's gradient is the logits' gradient
    target, eye = torch.randint(V, (30,)), torch.eye(V)
    grads = {}
    for tau in (None, 0.0, 1e-3):
        h = hidden.clone().requires_grad_()
        fused_linear_logprob_kl(h, eye, target, chunk=V if tau is None else chunk, tau=tau or 0.0).logp.sum().backward()
        grads[tau] = h.grad
    torch.testing.assert_close(grads[0.0], grads[None], atol=1e-6, rtol=1e-5)
    slices = torch.arange(V // chunk)
    mass = torch.softmax(hidden.double(), -1).view(30, -1, chunk).sum(-1)
    kept = (mass > 1e-3) | (slices == target[:, None] // chunk)  # by hand: the slices that may not be skipped, and no others
    torch.testing.assert_close(grads[1e-3], grads[None] * kept.repeat_interleave(chunk, 1), atol=1e-6, rtol=1e-5)
    error = (grads[1e-3] - grads[None]).abs().sum(1)
    assert 1e-5 < error.max() <= 1e-3 * V / chunk  # something was skipped, and no more than stated


def test_a_frozen_head_gets_no_gradient_and_bf16_is_summed_in_fp32():
    """Claim: a weight without requires_grad costs and gets nothing; bf16 inputs give log-probs good to 1e-4, not to 3e-2.
    Fails if: matmul_fp32 multiplies in bf16 (`a.float() @ b.float()` -> `(a @ b).float()`).
    """
    h, w, _, _, target, _ = problem(30, 400, hidden=64)
    h, w = h.bfloat16().requires_grad_(), w.bfloat16()
    out = fused_linear_logprob_kl(h, w, target)
    want = expression(h.detach().double() @ w.double().T, target, torch.zeros(30, 400), 1.0)
    assert out.logp.dtype == torch.float32 and (out.logp.double() - want[0]).abs().max() < 1e-4
    out.logp.sum().backward()
    assert w.grad is None and h.grad.dtype == torch.bfloat16


def test_mistakes_are_named():
    """Claim: a target outside the vocabulary, a temperature of 0 and an unknown impl are refused with the value.
    Fails if: the range check of the target is removed (an index error, or on a GPU a device assert, would follow).
    """
    logits = torch.randn(3, 7)
    for arguments, message in (
        ({"target": torch.tensor([0, 7, 1])}, "vocabulary of 7"),
        ({"target": torch.tensor([0, 1, 2]), "temperature": 0.0}, "temperature"),
        ({"target": torch.tensor([0, 1, 2]), "impl": "triton"}, "impl"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_logprob_kl(logits, **arguments)


def test_k1_and_k3_are_unbiased_k2_nearly_and_k3_is_never_negative():
    """Claim: over an enumerated vocabulary of five tokens, E[k1] = E[k3] = KL exactly, E[k2] = KL to third order, and
    k3 >= 0 for every token; the exact KL of the kernel is the same number.
    Fails if: kl_k3 has the ratio upside down (`ref_logprobs - logprobs` -> `logprobs - ref_logprobs`), or is written as
    exp(r) - r - 1.
    """
    torch.manual_seed(3)
    x = torch.randn(1, 5)
    for distance in (0.1, 1.0):
        y = x + distance * torch.randn(1, 5)
        logp, logq = torch.log_softmax(x.double(), -1)[0], torch.log_softmax(y.double(), -1)[0]
        p, exact = logp.exp(), (logp.exp() * (logp - logq)).sum()
        assert abs((p * kl_k1(logp, logq)).sum() - exact) < 1e-9
        assert abs((p * kl_k3(logp, logq)).sum() - exact) < 1e-9
        assert abs((p * kl_k2(logp, logq)).sum() - exact) < distance * exact
        assert (kl_k3(logp, logq) >= 0).all() and (kl_k1(logp, logq) < 0).any()
        near = -torch.logspace(-8, 0, 1000)  # fp32, down to differences that exp(r) - 1 cannot resolve
        assert (kl_k3(near, torch.zeros(1000)) >= 0).all() and (kl_k3(torch.zeros(1000), near) >= 0).all()
        assert abs(fused_logprob_kl(x, torch.tensor([0]), ref_logits=y).kl.item() - exact.item()) < 1e-6
