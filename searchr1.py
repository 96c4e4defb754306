"""Search-R1: the method of arXiv 2503.09516 in one file. Read it beside the paper, in the paper's order.

A language model answers a question in turns: it thinks, asks a search engine, reads what comes back, asks again, and
answers. Its only training signal is whether the final answer is right.

    1. the prompt               Table 1          make_prompt
    2. one turn                 Sec. 3.2         parse_action, format_information
    3. the conversation         Algorithm 1      converse, rollout
    4. the reward               Sec. 3.4, Eq. 4  exact_match, outcome_reward
    5. log-probs and the mask   Sec. 3.1, I(y_t) collate, token_logprobs, Critic
    6. KL to the reference      Eq. 1            kl_k1, kl_k2, kl_k3
    7. advantages               Eq. 2, Eq. 3     gae, whiten, group_advantages
    8. losses                   Eq. 2, Eq. 3     policy_loss, value_loss
    9. afterwards: the second paper's format reward; 10. reading a rollout, a demonstration without a model

Shapes are suffixes: B rollouts, Q questions, G rollouts a question (B = Q*G), L positions of ids, T = L-1 predicted
positions, V vocabulary, D hidden. L turns into T only in section 5. The paper's budget of turns is `max_turns`.

Departures from the paper (P) and the official code (C), tagged where they happen; train, models and eval list others:
  [D1] C  The tokens that were sampled are the tokens that are trained; a turn ends with the one that completes a tag.
          The official code goes on, decodes the turn, cuts the text at the first `</search>`, else `</answer>`, and
          encodes it again, so it can train on other tokens than it sampled.
  [D2] C  One response mask, made together with the token, for loss, KL, GAE, whitening and critic. The official code
          uses four masks: retrieved tokens count in GAE, in the statistics of whitening and in the value loss.
  [D3] C  The reward reads only what the policy wrote. The official extractor also reads the prompt, whose example
          answer is Beijing: a rollout without an answer is paid whenever the right answer is Beijing.
  [D4] C  An end-of-sequence token that was sampled stays, as a trained token. The official code strips it.
  [D5] C  When the length budget is spent, the episode ends. The official code drops the beginning of the prompt.
  [D6] C  Passages are cut to their budget but keep their closing tag; special tokens spelled in them stay text. The
          official code cuts the whole block, closing tag included, and such spellings become special tokens.
  [D7] P,C The loss is the mean over all tokens of the minibatch. Eq. 2 and Eq. 3 average within each rollout first,
          so a token of a short rollout weighs more; the official code averages within each micro-batch first.
  [D8] C  An answer that normalises to nothing ("The", "...") earns nothing, even if a gold answer is just as empty.
  [D13] C Without a chat template (Llama 3.2 base) the prompt begins with the tokenizer's start-of-sequence token, which
          the model has always seen first. The official code leaves it out.
  [D18] P When Algorithm 1's budget is spent, one more turn follows that cannot search, as in the official code.

    python searchr1.py --demo      a scripted policy, two passages, and the mask made visible (two seconds)
"""

import argparse
import copy
import itertools
import re
import string
from collections import Counter, namedtuple
from dataclasses import dataclass, field

import torch

import engine
from kernels import fused_linear_logprob_kl

# ----- 1. The prompt (Table 1) -----

@dataclass(frozen=True)
class Question:
    """x: a question and every answer that counts as right."""

    id: str
    text: str
    gold_answers: tuple
    hops: int = 0  # searches that an honest answer takes; 0: not known
    path: tuple = ()  # in the tiny world: entity, relation of the first hop, relation of the second hop

# PAPER vs CODE: the code's text to the letter, "as your want" included; Table 1 says "as you want".
TEMPLATE = ("Answer the given question. You must conduct reasoning inside <think> and </think> first every time you "
            "get new information. After reasoning, if you find you lack some knowledge, you can call a search engine "
            "by <search> query </search> and it will return the top searched results between <information> and "
            "</information>. You can search as many times as your want. If you find no further external knowledge "
            "needed, you can directly provide the answer inside <answer> and </answer>, without detailed "
            "illustrations. For example, <answer> Beijing </answer>. Question: {question}\n")  # fmt: skip
# The paper's "R1" baseline: the same reinforcement learning without a search engine.
NO_SEARCH_TEMPLATE = ("Answer the given question. You should first have a reasoning process in mind and then provides "
                      "the answer. Show your reasoning in <think> </think> tags and return the final answer in "
                      "<answer> </answer> tags, for example <answer> Beijing </answer>. Question: {question}\n")

# [ours] "short" has a tenth of the tokens. A model too small for instructions learns from examples (--algo format).
PROMPTS = {"official": None, "short": "Search, read, then answer. Question: {question}\n"}

def make_prompt(question, tokenizer=None, do_search=True, template=None, **parts):
    """question str -> prompt str: the official template, as one user message if the tokenizer has a chat template. Base
    models go through the chat template, too, as in the official code; a replication without it stayed some eight
    points of EM below the paper. template: another text, with {question} and fields that `parts` fills (eval.py)."""
    question = question.strip().removesuffix("?") + "?"
    content = (template or (TEMPLATE if do_search else NO_SEARCH_TEMPLATE)).format(question=question, **parts)
    if getattr(tokenizer, "chat_template", None):
        message = {"role": "user", "content": content}
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return content

# ----- 2. One turn: what the policy asks for, what the search engine answers (Sec. 3.2) -----

Action = namedtuple("Action", "kind content")  # kind: search, answer or invalid; content: stripped, "" if invalid

ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
STOP_TAGS = ("</search>", "</answer>")

def parse_action(text):
    """The text of one turn -> Action. The first complete tag pair wins; without one the turn is invalid. An empty
    `<search></search>` counts as a search, as in the official code; our engine finds nothing."""
    match = ACTION.search(text)
    return Action(match.group(1), match.group(2).strip()) if match else Action("invalid", "")

def format_passages(passages):
    """list[Passage] -> text, a line a passage, numbered from 1."""
    return "".join(f'Doc {i}(Title: "{p.title}") {p.text}\n' for i, p in enumerate(passages, 1)).strip()

def format_information(passages):
    """list[Passage] -> the official observation text. No passage gives an empty pair of tags."""
    return f"\n\n<information>{format_passages(passages)}</information>\n\n"

# PAPER vs CODE: after an invalid turn, Algorithm 1 appends the short sentence, the official code the long one.
RETHINK = "\nMy action is not correct. Let me rethink.\n"
INVALID_ACTION = ("\nMy previous action is invalid. If I want to search, I should put the query between <search> and "
                  "</search>. If I want to give the final answer, I should put the answer between <answer> and "
                  "</answer>. Let me try again.\n")  # fmt: skip
INVALID_MESSAGES = {"paper": RETHINK, "official": INVALID_ACTION}

# ----- 3. The conversation (Algorithm 1) -----
# The paper's algorithm, its lines numbered for the tags `l. n` in `converse`:
#    1  y <- empty, b <- 0
#    2  while b < budget:
#    3      y_b <- empty
#    4      repeat: sample y_t from pi(. | x, y, y_b), append it to y_b; until </search>, </answer> or end of sequence
#    5      y <- y + y_b
#    6      if y_b holds <search> q </search>:
#    7          d <- R(q);  y <- y + <information> d </information>
#    8      else if y_b holds <answer>: return y
#    9      else: y <- y + "My action is not correct. Let me rethink."
#   10      b <- b + 1
#   11  return y

@dataclass(frozen=True)
class Settings:
    """How a conversation runs; the defaults are the official code's. Saved with every checkpoint, because a policy that
    was trained with three passages and fourteen tokens a turn behaves differently with five and forty."""

    max_turns: int = 4  # turns that may search, the paper's budget; then one more that cannot [D18]
    max_new_tokens: int = 500  # tokens of a turn
    max_obs_length: int = 500  # tokens of what answers a turn: passages, or the message after an invalid one
    max_length: int = 4096  # tokens of prompt and conversation together
    top_k: int = 3  # passages a search
    do_search: bool = True  # False is the paper's R1: its own prompt, one turn
    invalid_message: str = "official"  # what an invalid turn is told: a key of INVALID_MESSAGES, or the sentence itself
    prompt: str = "official"  # a key of PROMPTS, or the template itself

@dataclass
class Rollout:
    """One conversation. Tokens are only appended. ids, response_mask and logprobs share the same L positions."""

    question: Question | str  # as it was asked
    ids: list  # token ids: the prompt, then what was sampled and what was retrieved, in order
    response_mask: list  # True where the policy sampled the token: the paper's I(y_t) [Sec. 3.1]
    logprobs: list  # log-prob of the sampled token at the sampling temperature; 0.0 where the mask is False
    prompt_length: int
    answer: str | None = None  # the text of the answer tag, None while there is none
    finished: bool = False  # ended by an answer
    turns: list = field(default_factory=list)  # what the policy wrote, decoded for reading, one str a turn
    searches: list = field(default_factory=list)  # the queries that were sent
    found: list = field(default_factory=list)  # for each turn: the passages it found, or None if it did not search
    num_valid_actions: int = 0  # turns that ended in an executed search or an answer

    @property
    def num_searches(self):
        return len(self.searches)

    def append(self, ids, logprobs=None):
        """Add tokens of a conversation, each with its bit of the mask. Only sampled tokens come with log-probs."""
        self.ids += ids
        self.response_mask += [logprobs is not None] * len(ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)

def converse(r, tokenizer, settings, ends=None):
    """[Algorithm 1] Hold the conversation of Rollout r, whose prompt is already in it. A generator: it yields None to
    get the next (token, log-prob), and the query, a str, to get passages. ends: ids that end a sequence; None: eos."""
    ends = ends or {tokenizer.eos_token_id}
    max_turns = settings.max_turns if settings.do_search else 0
    for b in range(max_turns + 1):  # l. 1, l. 2, l. 10; and one more turn [D18]
        start = len(r.ids)  # l. 3
        limit = min(start + settings.max_new_tokens, settings.max_length)
        while True:  # l. 4
            token, logprob = yield
            r.append([token], [logprob])  # [D1] [D2] this very id is trained
            if turn_ended(r.ids, start, limit, tokenizer, ends):
                break
        r.turns.append(tokenizer.decode(r.ids[start:]))  # l. 5; read, never encoded again
        r.found.append(None)
        action = parse_action(r.turns[-1])
        if action.kind == "answer":  # l. 8
            r.answer, r.finished, r.num_valid_actions = extract_answer(r.turns[-1]), True, r.num_valid_actions + 1
            return
        if b == max_turns:  # l. 11; a search asked for here is not executed
            return
        if action.kind == "search":  # l. 6
            r.found[-1] = yield action.content  # l. 7: d = R(q)
            r.searches.append(action.content)
            r.num_valid_actions += 1
            text, closing = format_information(r.found[-1]), "</information>\n\n"
        else:  # l. 9
            text, closing = INVALID_MESSAGES.get(settings.invalid_message, settings.invalid_message), ""
        room = settings.max_length - len(r.ids) - 1  # at least one token must be left for the policy
        block = observation_ids(tokenizer, text, max(0, min(settings.max_obs_length, room)), closing)
        if not 0 < len(block) <= room:  # [D5] the length budget is spent
            return
        r.append(block)  # not written by the policy: mask 0

def turn_ended(ids, start, limit, tokenizer, ends, stop_tags=STOP_TAGS):
    """[Alg. 1 l. 4] Does the last id end the turn that began at `start`: with a stop tag, end of sequence [D4], limit?
    The tag (9 characters at most) is sought in THIS turn's last 16 ids. The token that completes it stays whole."""
    can_close = ids[-1] in engine.closing_ids(tokenizer, stop_tags)
    tail = tokenizer.decode(ids[max(start, len(ids) - 16) :]) if can_close else ""
    return ids[-1] in ends or len(ids) >= limit or any(tag in tail for tag in stop_tags)

def observation_ids(tokenizer, text, budget, closing=""):
    """Text that the environment injects -> at most `budget` ids, or `closing` alone if it is longer. A long text loses
    its end, never `closing` [D6]. It is encoded apart from what the policy wrote, so that training sees the ids that
    sampling saw. Special tokens spelled in a passage stay plain text: a hostile `<|im_end|>` must not become one."""
    encode = lambda part: tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    text = text if len(text) < 50 * budget else text[: 50 * budget] + closing  # never encode a million characters
    ids = encode(text)
    tail = encode(closing) if len(ids) > budget else []
    return ids[: max(0, budget - len(tail))] + tail

def prompt_ids(question, tokenizer, settings):
    """Question or str -> ids of the prompt."""
    text = question if isinstance(question, str) else question.text
    plain = not getattr(tokenizer, "chat_template", None)  # [D13]; a template spells its special tokens out
    template = PROMPTS.get(settings.prompt, settings.prompt) if settings.do_search else None
    return tokenizer(make_prompt(text, tokenizer, settings.do_search, template), add_special_tokens=plain)["input_ids"]

def begin(question, ids, settings):
    """A question and the ids of its prompt -> Rollout that holds them. Mistake if they leave no room for an answer."""
    if len(ids) >= settings.max_length:
        raise engine.Mistake(f"the prompt of {question!r:.80} has {len(ids)} tokens and max_length is "
                             f"{settings.max_length}: shorten the question, or train with a larger --max-length")
    return Rollout(question, list(ids), [False] * len(ids), [0.0] * len(ids), len(ids))

def rollout(policy, tokenizer, questions, search, settings, group_size=1, temperature=1.0, generator=None, slots=None):
    """Hold G = group_size conversations about each of Q questions at once -> B = Q*G Rollouts, each group contiguous.

    policy       causal LM of transformers, or anything with base_model, get_output_embeddings, config and dtype
    questions    Question records or plain str
    search       (list[str], top_k) -> list[list[Passage]]
    temperature  0 is greedy;  generator: torch.Generator on the policy's device;  slots, and the errors: engine.run"""
    prompts = [(question, prompt_ids(question, tokenizer, settings)) for question in questions]
    rollouts = [begin(question, ids, settings) for question, ids in prompts for _ in range(group_size)]
    ends = engine.end_ids(policy, tokenizer)
    conversations = [(r, converse(r, tokenizer, settings, ends)) for r in rollouts]
    find = lambda queries: search(queries, settings.top_k)
    engine.run(policy, conversations, find, settings.max_length, group_size, temperature, generator, slots)
    return rollouts

# ----- 4. The reward (Sec. 3.4) -----

def normalize_answer(s):
    """SQuAD's normalisation, in the official order: lower case, ASCII punctuation deleted, articles, white space."""
    s = "".join(c for c in s.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

def exact_match(prediction, gold_answers):
    """1.0 if the prediction equals any gold answer after normalisation, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(gold) for gold in gold_answers))

def f1_score(prediction, gold_answers):
    """Largest token F1 over the gold answers, in [0, 1]; yes, no, noanswer count only if equal [HotpotQA, FlashRAG]."""
    best, normal = 0.0, normalize_answer(prediction)
    for gold in map(normalize_answer, gold_answers):
        if normal == gold or not {normal, gold} & {"yes", "no", "noanswer"}:
            common = sum((Counter(normal.split()) & Counter(gold.split())).values())
            best = max(best, 2 * common / max(1, len(normal.split()) + len(gold.split())))
    return best

def extract_answer(response):
    """The policy's own text -> content of its last complete answer pair, stripped, or None [D3]."""
    pairs = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return pairs[-1].strip() if pairs else None

def outcome_reward(answer, gold_answers):
    """[Eq. 4] r(x, y) = EM(a_pred, a_gold): 1.0 or 0.0; no answer, or one that normalises to nothing, is 0.0 [D8]."""
    return exact_match(answer, gold_answers) if answer is not None and normalize_answer(answer) else 0.0

# ----- 5. Log-probs and the mask (Sec. 3.1) -----

@dataclass
class Batch:
    """B rollouts as tensors. Position t of a _BT tensor is about the token ids_BL[:, t + 1]."""

    ids_BL: torch.Tensor  # long, right-padded
    mask_BT: torch.Tensor  # bool, I(y_t): True where the policy wrote the token
    old_logprobs_BT: torch.Tensor  # fp32, of the policy that sampled
    lengths_B: torch.Tensor  # long, ids of each row without padding
    ref_logprobs_BT: torch.Tensor | None = None  # fp32, of the frozen reference
    advantages_BT: torch.Tensor | None = None
    values_BT: torch.Tensor | None = None  # fp32, of the critic before this step's update (PPO)
    returns_BT: torch.Tensor | None = None

    def rows(self, index):
        """The rows in `index` (list or long tensor) as a Batch of their own, cut to the longest of them."""
        L = int(self.lengths_B[index].max())
        cut = lambda x_BT: None if x_BT is None else x_BT[index, : L - 1]
        return Batch(self.ids_BL[index, :L], cut(self.mask_BT), cut(self.old_logprobs_BT), self.lengths_B[index],
                     cut(self.ref_logprobs_BT), cut(self.advantages_BT), cut(self.values_BT), cut(self.returns_BT))

def collate(rollouts, device="cpu", mask_retrieved=True):
    """list of B Rollouts -> Batch. mask_retrieved False is the paper's ablation [Table 4]: passages are trained, too.
    Padding is id 0, whatever that is: it is on the right, where causal attention never looks, and it is masked.
    PITFALL: a mask derived from `id != pad` would lose genuine tokens wherever pad = eos."""
    tensors = lambda rows, dtype: [torch.tensor(row, dtype=dtype) for row in rows]
    padded = lambda rows, dtype: torch.nn.utils.rnn.pad_sequence(tensors(rows, dtype), batch_first=True).to(device)
    masks = [r.response_mask if mask_retrieved else [i >= r.prompt_length for i in range(len(r.ids))] for r in rollouts]
    return Batch(
        ids_BL=padded([r.ids for r in rollouts], torch.long),
        mask_BT=padded(masks, torch.bool)[:, 1:],
        old_logprobs_BT=padded([r.logprobs for r in rollouts], torch.float32)[:, 1:],
        lengths_B=torch.tensor([len(r.ids) for r in rollouts], device=device),
    )

def head_inputs(policy, ids_BL):
    """ids [B, L] -> hidden states [B, T, D] of all positions but the last, the lm_head's weight [V, D], and the tokens
    [B, T] that they predict. Only the body runs: policy(ids).logits would be [B, L, V], which kernels.py avoids."""
    hidden_BLD = policy.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    return hidden_BLD[:, :-1], policy.get_output_embeddings().weight, ids_BL[:, 1:]

def token_logprobs(policy, ids_BL, mask_BT, temperature=1.0, ref_hidden_BTD=None, ref_weight_VD=None):
    """log pi(y_t | x, y_<t; R) of each token, and what else one pass over the vocabulary gives -> kernels.LogprobKL:
    logp, entropy of pi, exact KL(pi || pi_ref), ref_logp; fp32 [B, T], 0 where masked. The last two are 0 without the
    reference's hidden states and lm_head (head_inputs). Policy, old policy and reference all come through here."""
    return fused_linear_logprob_kl(*head_inputs(policy, ids_BL), mask_BT, ref_hidden_BTD, ref_weight_VD, temperature)

class Critic(torch.nn.Module):
    """V(s_t) for PPO: a copy of the policy's body, as in the official code, and one linear row that starts at 0.
    body: share this one instead of making a copy. The row is always fp32: bf16 would round small updates away."""

    def __init__(self, policy, body=None):
        super().__init__()
        self.body = body or copy.deepcopy(policy.base_model)
        self.head = torch.nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, ids_BL):
        """ids [B, L] -> values [B, T] fp32: position t values the state before token t+1 is written."""
        return self.head(self.body(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1].float()).squeeze(-1)

# ----- 6. KL to the reference (Eq. 1) -----
# Three estimators of KL(pi || pi_ref) from one sampled token, r = log pi_ref - log pi [Schulman 2020]. Any shape.

def kl_k1(logprobs, ref_logprobs):
    """-r: unbiased, can be negative. A penalty in the reward, but no loss: its gradient averages to 0."""
    return logprobs - ref_logprobs

def kl_k2(logprobs, ref_logprobs):
    """r^2 / 2: biased, never negative, low variance."""
    return 0.5 * (logprobs - ref_logprobs) ** 2

def kl_k3(logprobs, ref_logprobs):
    """e^r - r - 1: unbiased and never negative. As in the official code it is cut at 10, and its gradient with it: one
    token that the policy has all but given up would otherwise outweigh the whole batch."""
    r = (ref_logprobs - logprobs).clamp(max=20.0)  # PITFALL: e^89 is inf in fp32, and inf * 0 makes the gradient NaN
    return (torch.expm1(r) - r).clamp(max=10.0)  # expm1: for small r, exp(r) - 1 in fp32 can round to below r

# ----- 7. Advantages -----

def rewards_at_end(rewards_B, mask_BT):
    """Outcome rewards [B] -> the r_t of GAE, [B, T]: r(x, y) on the last token that the policy wrote, 0 elsewhere."""
    B, T = mask_BT.shape
    last_B = T - 1 - mask_BT.flip(1).float().argmax(1)
    rewards_BT = torch.zeros(B, T, device=mask_BT.device).scatter(1, last_B[:, None], rewards_B[:, None])
    return rewards_BT * mask_BT  # a row in which the policy wrote nothing gets no reward

def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """[GAE Eq. 16] Generalised advantages and returns, both [B, T]; rewards, values float, mask bool.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t
    t+1 is the next token that the policy writes. Masked positions are skipped, since passages are part of the
    environment's step [D2]; they get 0. V past the end is 0. With gamma = lam = 1, A_t = (sum of r from t on) - V_t."""
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        own = mask[:, t].bool()
        advantages[:, t] = torch.where(own, advantage, 0.0)
        next_advantage = torch.where(own, advantage, next_advantage)
        next_value = torch.where(own, values[:, t], next_value)
    return advantages, torch.where(mask.bool(), advantages + values, 0.0)

def whiten(x, mask):
    """Shift and scale x [B, T] to mean 0 and unbiased std 1 over all positions where mask is True; 0 elsewhere."""
    mask = mask.bool()
    count = mask.sum().clamp_min(1)
    mean = torch.where(mask, x, 0.0).sum() / count
    centred = torch.where(mask, x - mean, 0.0)
    variance = (centred**2).sum() / (count - 1).clamp_min(1)
    return centred * torch.rsqrt(variance + 1e-8)

def group_advantages(rewards, group_size, normalize_std=True):
    """[GRPO, DeepSeekMath Sec. 4.1.2] (r - mean) / (std + 1e-6) within each group of consecutive rewards; [B] -> [B].
    std is unbiased (G - 1), as in the official code. Equal rewards give exactly 0. A group of one has no baseline: its
    advantage is its reward [Table 8]. ValueError if B is no multiple of group_size."""
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    if group_size == 1:
        return rewards.clone()
    # PITFALL: the fp32 mean of eight times 2/3 is a bit off; over a std of almost 0 that is an advantage of 0.06.
    rewards_QG = rewards.double().view(-1, group_size)
    advantages_QG = rewards_QG - rewards_QG.mean(1, keepdim=True)
    if normalize_std:
        advantages_QG = advantages_QG / (rewards_QG.std(1, keepdim=True) + 1e-6)
    return advantages_QG.reshape(-1).float()

# ----- 8. Losses (Eq. 2 and Eq. 3) -----

def token_mean(x, mask):
    """Mean of x over the positions where mask is True; 0 if there is none. The denominator counts tokens, not rows."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp_min(1)

def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, clip_high=None):
    """[Eq. 2, Eq. 3; PPO Eq. 7] Clipped surrogate over [B, T], token mean [D7] -> (loss, share of tokens clipped).
    clip_high: epsilon of the upper side, if it differs [DAPO: clip-higher]."""
    # [Eq. 2]  - 1/sum I(y_t)  sum_{t: I(y_t)=1}  min( rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t ),   rho_t = pi / pi_old
    ratio = torch.exp(torch.where(mask.bool(), logprobs - old_logprobs, 0.0))
    unclipped = ratio * advantages
    clipped = torch.clamp(ratio, 1 - clip_eps, 1 + (clip_high or clip_eps)) * advantages
    return -token_mean(torch.minimum(unclipped, clipped), mask), token_mean((clipped < unclipped).float(), mask)

def value_loss(values, old_values, returns, mask, clip=0.5):
    """0.5 * token mean of the larger of two squared errors [B, T]: that of the value, and that of the value kept within
    `clip` of its old one. The larger one, so that a value which ran away is pulled back."""
    kept = old_values + torch.clamp(values - old_values, -clip, clip)
    return 0.5 * token_mean(torch.maximum((values - returns) ** 2, (kept - returns) ** 2), mask)

# ----- 9. The second paper's format reward (arXiv 2505.15117) -----

FORMAT_STATES = {  # which tag may follow which; between two pairs only white space, inside a pair any text
    "start": {"<think>": "in_think"}, "in_think": {"</think>": "after_think"},
    "after_think": {"<search>": "in_search", "<answer>": "in_answer"}, "in_answer": {"</answer>": "end"}, "end": {},
    "in_search": {"</search>": "after_search"}, "after_search": {"<information>": "in_information"},
    "in_information": {"</information>": "information"}, "information": {"<think>": "in_think"},
}  # fmt: skip

def check_format(response):
    """Response str -> (bool, why not). Think, search, information, think, ..., answer, and nothing after that."""
    state = "start"
    for i, piece in enumerate(re.split(r"(</?(?:think|search|information|answer)>)", response)):
        if i % 2:  # split() gives text, tag, text, tag, ...
            if piece not in FORMAT_STATES[state]:
                return False, f"{piece} in state {state}"
            state = FORMAT_STATES[state][piece]
        elif piece.strip() and not state.startswith("in_"):
            return False, f"text {piece.strip()[:30]!r} in state {state}"
    return (True, "") if state == "end" else (False, f"ended in state {state}")

def policy_view(rollout):
    """The response with every block of passages emptied: what the format is checked on, so that no passage, cut or with
    tags in it, can spoil or forge it. The message after an invalid turn spoils it, as in the official code."""
    blocks = [INVALID_ACTION if passages is None else "<information></information>" for passages in rollout.found[:-1]]
    return "".join(text + block for text, block in zip(rollout.turns, [*blocks, ""]))  # nothing follows the last turn

def format_reward(rollout, gold_answers, structure=0.2, final=0.1, retrieval=0.0):
    """The shaped reward of the second paper, in [0, 1], with the values of the official v0.3 scripts: `structure` is
    what good format is worth, `final` any answer, `retrieval` a gold answer among the passages (in good format)."""
    valid, _ = check_format(policy_view(rollout))
    if outcome_reward(rollout.answer, gold_answers):
        return 1.0 if valid else 1.0 - structure
    if valid:
        return structure + retrieval * holds_gold(rollout.found, gold_answers)
    return final if rollout.answer is not None else 0.0

def holds_gold(found, gold_answers):
    """True if a gold answer, normalised, is part of a passage in the lists of `found` (also one that was cut away)."""
    texts = [normalize_answer(f"{p.title} {p.text}") for passages in found for p in passages or []]
    return any(gold and gold in text for gold in map(normalize_answer, gold_answers) for text in texts)

# ----- 10. Reading a rollout, and a demonstration without a model -----

COLOURS = {"think": "36", "search": "33", "information": "2", "answer": "32"}
TAGGED = re.compile(r"<(think|search|answer)>.*?(</\1>|\Z)", re.DOTALL)
# PITFALL: anybody may have written a retrieved text. Its escape codes (C0, C1) could control the terminal, and its
# direction marks could reverse a line. Each is replaced by exactly one character, so that positions stay the same.
HARMLESS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
HARMLESS |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)

def parts(r, tokenizer):
    """The response in runs of one mask value -> list of (text, True where the policy wrote it, range of its positions).
    Earlier parts never change. A space that a word-level tokenizer omits between parts is put before the second one."""
    found, before = [], ""
    for own, run in itertools.groupby(range(r.prompt_length, len(r.ids)), r.response_mask.__getitem__):
        run = list(run)
        text = tokenizer.decode(r.ids[run[0] : run[-1] + 1])
        if before and text and not before[-1].isspace() and not text[0].isspace():
            text = " " + text
        found.append((text, own, range(run[0], run[-1] + 1)))
        before = text or before
    return found

def kinds(text, own):
    """Text of a part -> the tag that each character belongs to: think, search, answer, "" for none; or information."""
    names = ["" if own else "information"] * len(text)
    for match in TAGGED.finditer(text) if own else ():
        names[match.start() : match.end()] = [match[1]] * len(match[0])
    return names

def paint(text, own, start=0):
    """text[start:] of a part in ANSI colours: tags bright, masked text dimmed. Every colour is switched off again."""
    runs = itertools.groupby(zip(kinds(text, own)[start:], text[start:]), lambda pair: pair[0])
    pieces = [(name, "".join(character for _, character in run)) for name, run in runs]
    return "".join(f"\033[{COLOURS[name]}m{piece}\033[0m" if name else piece for name, piece in pieces)

def transcript(r, tokenizer, colour=False):
    """The response as text; with colour, for a terminal: in ANSI colours and with control characters made visible."""
    return "".join(paint(text.translate(HARMLESS), own) if colour else text for text, own, _ in parts(r, tokenizer))

class ByteTokenizer:
    """One token a byte, so that every tag is many tokens; 256 ends a sequence. It is for demonstration and tests."""

    eos_token_id, chat_template = 256, None

    def __len__(self):
        return 257

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def convert_ids_to_tokens(self, ids):
        return [chr(i) for i in ids]

def play(r, talk, turns, search):
    """Drive the conversation of r by hand. The policy "writes" `turns`, one list of ids a turn; search(query) finds.
    A turn that runs out of ids goes on with 256. Tests prove the claims of Algorithm 1 with this, without a model."""
    scripts, talk = {b: iter(ids) for b, ids in enumerate(turns)}, engine.Talk(0, r, talk)
    while not talk.done:
        script = scripts.get(len(r.turns), iter(()))
        talk.advance((next(script, 256), 0.0) if talk.query is None else search(talk.query))

def demo():
    """Print one scripted conversation over two passages with its mask, and what the reward makes of it."""
    from retrieval import Passage, build_index
    ada = "Ada Lovelace, born in London, wrote the first program for Babbage's engine."
    passages = [Passage("0", "Ada Lovelace", ada), Passage("1", "London", "London stands on the River Thames.")]
    question = Question("0", "On which river was the first programmer born?", ("River Thames",))
    turns = ["<think>I need to find the first programmer.</think>\n<search> first program engine born </search>",
             "<think>She was born in London. Which river is that?</think>\n<search> London river </search>",
             "<think>The Thames.</think>\n<answer> the River Thames </answer>"]  # fmt: skip
    tokenizer, settings, index = ByteTokenizer(), Settings(max_new_tokens=200), build_index(passages)
    r = begin(question, prompt_ids(question, tokenizer, settings), settings)
    find = lambda query: index.search([query], settings.top_k)[0]
    play(r, converse(r, tokenizer, settings), [turn.encode() for turn in turns], find)
    print(make_prompt(question.text), transcript(r, tokenizer, colour=True), sep="\n")
    own = sum(r.response_mask)
    print(f"\n{r.prompt_length} bytes of prompt, {own} by the policy (mask 1), the rest retrieved (dimmed, mask 0)")
    reward = outcome_reward(r.answer, question.gold_answers)
    print(f"{r.num_searches} searches: {r.searches}   answer: {r.answer!r}   reward: {reward}")
    print("Next: python -m course.exercises (write it yourself), python train.py (a policy that learns it)")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Search-R1, the method. Training: train.py. Evaluation: eval.py.")
    parser.add_argument("--demo", action="store_true", required=True, help="print a scripted conversation, its mask")
    parser.parse_args()
    demo()
