"""Claims about generation: a model that holds many conversations at once, over a few slots, does what it does alone.

Marked as claims of the paper: that the engine runs Algorithm 1, and that it samples from the policy which is trained.
"""

import math
import types
from dataclasses import dataclass, field

import pytest
import torch
from conftest import PASSAGES, ScriptedPolicy, random_model, sampled
from transformers import GPT2Config, GPT2LMHeadModel

import engine
import searchr1
from retrieval import Passage


def scripted(script, settings=searchr1.Settings(), find=lambda queries, k: [PASSAGES] * len(queries), **how):
    """Rollouts of a policy that writes prepared turns: a dict question -> list of turns, each a str."""
    tokenizer = searchr1.ByteTokenizer()
    prompts = {searchr1.make_prompt(q): [list(turn.encode()) for turn in turns] for q, turns in script.items()}
    policy = ScriptedPolicy(tokenizer, prompts)
    return searchr1.rollout(policy, tokenizer, list(script), find, settings, temperature=0, **how)


@dataclass
class Record:
    """All that the engine wants of a record is `ids`. sampled: position -> log-prob of the token sampled there."""

    ids: list
    sampled: dict = field(default_factory=dict)


def write(record, wish, n):
    for _ in range(n):
        token, logprob = yield wish
        record.sampled[len(record.ids)] = logprob
        record.ids.append(token)


def wanderer(number, record, calls):
    """A conversation of no method. Three times it writes, may call the model on prompts of their own, and searches.

    The first prompt is as long as the conversation, and the second call ends when it is as long: a slot that lacks one
    key of the old record must not be taken for one that lacks one key of the new record.
    """
    for turn in range(3):
        yield from write(record, None, 3 + (number + turn) % 3)
        here = len(record.ids)
        for length, n in [(here, 4), (here - 3, 3), (1, 5)][: (number + turn) % 4]:
            calls.append(Record([(7 * at + number + 1) % 600 for at in range(length)]))
            yield from write(calls[-1], calls[-1], n)
        record.ids += yield f"query {number}"


def wander(model, slots=None, temperature=0.0, found=20):
    """Six wanderers at once -> their records and those of their calls. A search finds `found` ids and some more."""
    records, calls = [Record(list(range(5, 9 + 3 * b))) for b in range(6)], [[] for _ in range(6)]
    conversations = [(r, wanderer(b, r, calls[b])) for b, r in enumerate(records)]
    find = lambda queries: [list(range(2, 2 + found + len(query))) for query in queries]
    engine.run(model, conversations, find, 700, 1, temperature, torch.Generator().manual_seed(0), slots)
    return records + sum(calls, [])


# ----- Algorithm 1 by an engine -----


@pytest.mark.paper
@pytest.mark.parametrize("group_size, slots", [(1, None), (1, 3), (2, 5)])
def test_the_algorithm_played_by_hand_equals_the_engine(short_prompt, group_size, slots):
    """Claim: conversations of different lengths, which search, blunder, wait and leave at different times, are the same
    played one by one without a model and run by the engine at once, in a slot each or in a few: ids, mask, turns,
    passages, counts. They come back in the order of the questions, a group in a row. A search is asked for top_k.
    Fails if: Slots.copy does not copy the lengths, `running[target] = running[source]` is dropped where rows leave, or
    rollout sends another number than settings.top_k.
    """
    settings, tokenizer, script, by_hand = searchr1.Settings(top_k=2), searchr1.ByteTokenizer(), {}, []
    find = lambda queries, k: [[Passage("0", q, "x" * int(q[-3]))] * min(k, int(q[-1]) + 1) for q in queries]
    for i in range(7):
        searches = [f"<think>{'t' * (3 * i)}</think><search>query {i}.{n}</search>" for n in range(i % 4)]
        turns = searches + ["no tag"] * (i % 2) + [f"<answer>{'a' * (i * 5 % 11)}{i}</answer>"]
        question = "q" * i + "?"
        script[question] = turns
        r = searchr1.begin(question, searchr1.prompt_ids(question, tokenizer, settings), settings)
        talk = searchr1.converse(r, tokenizer, settings)
        searchr1.play(r, talk, [list(turn.encode()) for turn in turns], lambda query: find([query], 2)[0])
        by_hand += [r] * group_size
    assert scripted(script, settings, find, group_size=group_size, slots=slots) == by_hand
    assert sum(r.num_searches for r in by_hand) == 9 * group_size and all(r.finished for r in by_hand)


def test_an_engine_that_loses_a_query_is_an_error(short_prompt):
    """Claim: fewer answers than queries raise, instead of training on an empty result.
    Fails if: the length check in serve is removed.
    """
    with pytest.raises(RuntimeError, match="1 lists for 2 queries"):
        scripted({"a": ["<search>a</search>"], "b": ["<search>b</search>"]}, find=lambda queries, k: [PASSAGES])


# ----- Keys and values -----


def test_the_cached_rollout_equals_encoding_everything_again(model, tokenizer):
    """Claim: greedy, ragged, over several turns: each sampled token is the argmax of one plain forward pass over all
    ids before it, without a cache.
    Fails if: positions start at 0 for a new block (`starts_n1 + torch.minimum` -> `0 * starts_n1 + torch.minimum`), or
    the first id of a prompt is not fed (`slots.lengths[row] :` -> `slots.lengths[row] + 1 :` in pending).
    """
    rollouts = sampled(model, tokenizer, 0.0)
    for r in rollouts:
        with torch.no_grad():
            best = model(input_ids=torch.tensor([r.ids])).logits[0].argmax(-1)
        own = [i for i, mine in enumerate(r.response_mask) if mine]
        assert [best[i - 1].item() for i in own] == [r.ids[i] for i in own]
    # the comparison means something only if there were searches, rows of different lengths and several turns
    assert sum(r.num_searches for r in rollouts) >= 2
    assert len({len(r.ids) for r in rollouts}) > 2 and max(len(r.turns) for r in rollouts) > 2


def test_padding_has_no_position_beyond_its_row():
    """Claim: a model with learned positions (GPT-2) is fed a short block beside a long one although the short one's row
    is nearly full; both get the logits of a plain forward pass.
    Fails if: place() gives padding the positions after its row (`starts_n1 + steps_T`).
    """
    policy = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50, n_positions=32)).eval()
    slots, long, other = engine.Slots(policy, 2, 32), [i % 50 for i in range(29)], [i % 7 for i in range(20)]
    with torch.no_grad():
        engine.feed(policy, slots, [0], [long[:28]])
        logits = engine.feed(policy, slots, [0, 1], [long[28:], other])
        for row, ids in zip(logits, (long, other)):
            torch.testing.assert_close(row, policy(torch.tensor([ids])).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_each_greedy_turn_equals_generate(model, tokenizer):
    """Claim: every turn holds the tokens that transformers' generate() writes after the same ids, up to the stop.
    Fails if: sample() takes the second-best token at temperature 0, or feed reads the wrong row's last hidden state.
    """
    for r in sampled(model, tokenizer, 0.0):
        starts = [i for i, own in enumerate(r.response_mask) if own and not r.response_mask[i - 1]]
        for start in starts:
            end = next((i for i in range(start, len(r.ids)) if not r.response_mask[i]), len(r.ids))
            prefix, how = torch.tensor([r.ids[:start]]), {"max_new_tokens": end - start, "do_sample": False}
            out = model.generate(prefix, attention_mask=torch.ones_like(prefix), pad_token_id=0, **how)
            assert out[0, start:].tolist() == r.ids[start:end]


@pytest.mark.paper
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_equal_the_trainers(model, tokenizer, temperature):
    """Claim: [D9] log-probs kept while sampling with the cache equal those of the training forward pass within 2e-5.
    Fails if: sample() returns log-probs at temperature 1, or head_inputs gives ids_BL[:, :-1] as targets.
    """
    batch = searchr1.collate(sampled(model, tokenizer, temperature, group_size=4))
    with torch.no_grad():
        logprobs_BT = searchr1.token_logprobs(model, batch.ids_BL, batch.mask_BT, temperature).logp
    assert batch.mask_BT.sum() > 300
    torch.testing.assert_close(logprobs_BT, batch.old_logprobs_BT, atol=2e-5, rtol=0)
    assert (batch.old_logprobs_BT[batch.mask_BT] < 0).all()


def test_neither_slots_nor_neighbours_nor_static_buffers_change_a_rollout(model, tokenizer, monkeypatch):
    """Claim: sampled conversations are the same, token for token, whether all are in flight at once or slots are
    refilled from the queue, in growing buffers or in the static ones of a CUDA graph, and with blocks fed in pieces.
    Fails if: a token is drawn by its row (`[t.number for t in talks]` -> `list(range(len(talks)))`), a row that
    moves keeps its old length (`self.lengths[row] = length` -> `pass`), padding writes column 0
    (`positions_nT, self.capacity - 1` -> `positions_nT, 0`), or each number of rows gets a graph of its own
    (`(count // 8, count // 2, count)` -> `range(count + 1)`).
    """
    model = model.double()  # in fp32, one draw in ten million falls between two roundings of a sum: another token
    want = sampled(model, tokenizer, group_size=4)
    assert sum(r.num_searches for r in want) >= 4
    monkeypatch.setattr(engine, "FEED_TOKENS", 150)
    for count, static in ((4, False), (4, True), (13, True)):
        slots = engine.Slots(model, count, 200, static)
        for g, w in zip(sampled(model, tokenizer, group_size=4, slots=slots), want, strict=True):
            assert (g.ids, g.response_mask, g.searches) == (w.ids, w.response_mask, w.searches)
            assert g.logprobs == pytest.approx(w.logprobs, abs=1e-4)
        rows = {rows for rows, _ in slots.steps}  # few shapes, so few graphs
        assert rows <= {count, count // 2, count // 8} and bool(rows) == static


@pytest.mark.parametrize("static, dtype", [(False, "float32"), (True, "float32"), (False, "bfloat16")])
def test_old_keys_never_meet_new_weights(model, tokenizer, static, dtype):
    """Claim: slots that are used again after the weights changed in place, and after a rollout that a search engine
    broke off, give what empty ones give.
    Fails if: run does not empty the slots (`slots.lengths` keeps its value), or keeps the fp32 copy of an old lm_head
    (`slots.head` does).
    """
    model = model.to(getattr(torch, dtype))

    def gone(queries, top_k):
        raise OSError("gone")

    slots = engine.Slots(model, 8, 200, static)
    before = sampled(model, tokenizer, 0.0, slots=slots)
    with pytest.raises(OSError):
        sampled(model, tokenizer, 0.0, slots=slots, search=gone)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * weight.roll(1, 0))
    after = [r.ids for r in sampled(model, tokenizer, 0.0, slots=slots)]
    assert after == [r.ids for r in sampled(model, tokenizer, 0.0)] != [r.ids for r in before]


def test_the_logits_of_a_bf16_model_are_not_rounded(model):
    """Claim: feed gives fp32 logits of bf16 hidden states, within 1e-6 of the float64 product.
    Fails if: its head is not made `.float()`, or its result is rounded to bf16.
    """
    model, ids = model.bfloat16(), [3, 4, 5, 6]
    with torch.no_grad():
        got = engine.feed(model, engine.Slots(model, 1, 20), [0], [ids])
        hidden_1D = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
    want = hidden_1D.double() @ model.lm_head.weight.double().T
    assert got.dtype == torch.float32 and want.abs().max() > 1
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)


def test_blocks_are_fed_in_pieces_that_fit(model, monkeypatch):
    """Claim: a pass over blocks has at most FEED_TOKENS rows x columns, one row at least; the logits come back in the
    order of the rows.
    Fails if: `.argsort()` is dropped in feed, or everything is fed at once.
    """
    blocks = [list(range(2, 2 + n)) for n in (5, 2, 7, 3, 4, 30)]
    rows = [4, 0, 5, 1, 3, 2]
    want = engine.feed(model, engine.Slots(model, 6, 64), rows, blocks)
    shapes, plain = [], engine.hidden_states
    spy = lambda policy, block, ids: shapes.append((len(ids), block.width)) or plain(policy, block, ids)
    monkeypatch.setattr(engine, "hidden_states", spy)
    for limit in (16, 64):
        shapes.clear()
        monkeypatch.setattr(engine, "FEED_TOKENS", limit)
        slots = engine.Slots(model, 6, 64)
        torch.testing.assert_close(engine.feed(model, slots, rows, blocks), want, atol=1e-5, rtol=0)
        assert slots.lengths == [2, 3, 30, 4, 5, 7] and all(n == 1 or n * width <= limit for n, width in shapes)
    assert len(shapes) == 3  # 64 hold two rows of 30


# ----- Sampling -----


@pytest.mark.paper
def test_sampling_draws_from_the_whole_distribution():
    """Claim: no hidden top-k or top-p: over 20000 draws the frequencies are the softmax at the temperature, tail too.
    Fails if: sample() masks all but the 50 best logits, or forgets the temperature.
    """
    logits, generator = torch.linspace(0, 3, 120).repeat(20000, 1), torch.Generator().manual_seed(1)
    ids, logprobs = engine.sample(logits, 0.8, torch.rand(20000, dtype=torch.float64, generator=generator))
    p = torch.softmax(logits[0].double() / 0.8, -1)
    counts = torch.bincount(ids, minlength=120).double()
    z = (counts - 20000 * p) / (20000 * p * (1 - p)).sqrt()
    assert z.abs().max() < 4.5 and (ids < 70).sum() > 0
    torch.testing.assert_close(logprobs.double(), p.log()[ids], atol=1e-5, rtol=0)


@pytest.mark.paper
def test_a_draw_finds_its_token_among_150000():
    """Claim: draw u picks the token in whose share of [0, 1) it falls, to the last one of a real vocabulary, however
    rare it is, and never a token of probability 0.
    Fails if: the probabilities are summed in fp32, or searchsorted looks from the left (`right=False`).
    """
    tokens, V = torch.tensor([0, 7, 74_999, 149_990, 149_999]), 150_000
    ids, _ = engine.sample(torch.zeros(5, V), 1.0, (tokens.double() + 0.5) / V)
    assert ids.tolist() == tokens.tolist()
    rare = torch.tensor([[0.9, 1e-8, 0.1]]).log()
    p = torch.log_softmax(rare, -1).exp().double()[0]
    ids, _ = engine.sample(rare, 1.0, ((p[0] + p[1] / 2) / p.sum())[None])
    assert ids.tolist() == [1]
    impossible = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).repeat(3, 1)
    ids, _ = engine.sample(impossible, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-40], dtype=torch.float64))
    assert ids.tolist() == [1, 2, 2]


# ----- Where a turn can end -----


def test_closing_ids_are_the_pieces_that_can_complete_a_tag():
    """Claim: the ids after which text is decoded are those of pieces that can complete a stop tag after some other
    text, in one piece or many, as a byte, with overhang or without, and of no other piece.
    Fails if: closing_ids does not know the byte `<0x3E>`, tests `piece == ">"`, drops `tag.endswith(head)`, or takes
    every piece with a ">".
    """

    class Pieces(tuple):
        def convert_ids_to_tokens(self, ids):
            return [self[i] for i in ids]

    closing = [">", ">\n\n", "<0x3E>", "></", "r>", "ch>.", "/search>", "</answer>", " </search>", "x</answer>y"]
    others = ["<", "</", "search", "answer", "<search>", "think>", "</think>", "<b>answer></", "a>", "", None]
    pieces = Pieces(closing + others)
    assert engine.closing_ids(pieces, ("</search>", "</answer>")) == set(range(len(closing)))
    assert engine.closing_ids(pieces, ("</think>",)) == {0, 1, 2, 3, *map(pieces.index, ("think>", "</think>"))}


def test_a_chat_models_second_end_of_sequence_ends_it_too():
    """Claim: the tokenizer's end of sequence and all of the model's generation config end a turn; neither needs one.
    Fails if: end_ids returns the tokenizer's id only.
    """
    configured = lambda ids: types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=ids))
    tokenizer = searchr1.ByteTokenizer()
    assert engine.end_ids(configured([3, 256, 5]), tokenizer) == {3, 5, 256}
    assert engine.end_ids(configured(3), tokenizer) == {3, 256}
    assert engine.end_ids(configured(None), tokenizer) == engine.end_ids(object(), tokenizer) == {256}


# ----- Many conversations over few slots -----


def test_nothing_is_encoded_twice_and_nobody_waits_for_a_straggler(monkeypatch, short_prompt):
    """Claim: a prompt is fed once for its group and every other id once for its rollout, the last one not at all. While
    one rollout writes a long turn, the other slot serves one question after the other.
    Fails if: the inner loop of run goes on until no row writes (its `break` dropped), or prompts are fed for every
    member of a group.
    """
    fed, plain = [], engine.feed
    monkeypatch.setattr(engine, "feed", lambda *args: fed.append(args[3]) or plain(*args))
    script = {f"short {i}?": ["<search>q</search>", "<answer>aaaaaaaa</answer>"] for i in range(6)}
    script = {"long?": ["<search>q</search>", f"<answer>{'a' * 260}</answer>"]} | script
    rollouts = scripted(script, group_size=2, slots=4)
    assert [len(r.answer) for r in rollouts] == [260, 260] + [8] * 12
    ids = sum(r.prompt_length / 2 + len(r.ids) - r.prompt_length - 1 for r in rollouts)
    assert sum(len(block) for blocks in fed for block in blocks) == ids
    fed.clear()
    longest = max(scripted(script, slots=2), key=lambda r: len(r.ids))
    assert len(fed) < sum(longest.response_mask) + 20  # 40 tokens of each of the six others found a place beside them


def test_a_token_costs_one_transfer_from_the_host(model, monkeypatch):
    """Claim: while rows only write, all that travels to the GPU for a token is one table: rows, places and ids. Where
    the draws of later tokens stand is counted on the GPU.
    Fails if: `run` calls places() before each step, or picks the writing rows by a tensor of their numbers.
    """
    made, lengths, tensor = [], [], torch.tensor
    monkeypatch.setattr(engine, "torch", types.SimpleNamespace(**vars(torch)))
    engine.torch.tensor = lambda *values, **how: made.append(1) or tensor(*values, **how)
    for length in (10, 30):
        records = [Record([1, 2, 3 + b]) for b in range(4)]
        made.clear()
        engine.run(model, [(r, write(r, None, length)) for r in records], None, 64, generator=None)
        lengths.append((len(made), [len(r.ids) for r in records]))
    assert [ids for _, ids in lengths] == [[13] * 4, [33] * 4]
    assert lengths[1][0] - lengths[0][0] == 20


def test_a_model_that_attends_in_another_way_is_refused(tokenizer):
    """Claim: we sample with full attention, so a window shorter than a conversation, which training would apply, and
    layers without attention are refused; a window that is never passed is not.
    Fails if: Slots does not look at sliding_window and max_length, or at layer_types.
    """
    model = random_model(tokenizer)
    model.config.sliding_window, model.config.layer_types = 100, ["sliding_attention", "full_attention"]
    assert engine.Slots(model, 2, 100).lengths == [0, 0]
    with pytest.raises(engine.Mistake, match="has a window of 100 tokens; we sample 101 tokens with full attention"):
        engine.Slots(model, 2, 101)
    model.config.sliding_window, model.config.layer_types = None, ["linear_attention", "full_attention"]
    with pytest.raises(engine.Mistake, match="has layers without attention"):
        engine.Slots(model, 2, 50)


def test_a_group_needs_its_slots(model, tokenizer):
    """Claim: fewer slots than a group has members are refused, with the flag that helps.
    Fails if: the check in run is removed (it would wait for ever).
    """
    with pytest.raises(engine.Mistake, match="3 slots cannot hold a group of 4 .* --slots"):
        sampled(model, tokenizer, 0.0, group_size=4, slots=3)


def test_slots_may_be_a_number_and_none_is_one_a_conversation(model, tokenizer, monkeypatch):
    """Claim: slots says how many rows are in flight, as Slots or as an int. None, on a CPU, is one a conversation, but
    no more than CACHE_BYTES hold, and at least a group; on a GPU at most 64, and what half of the free memory holds.
    Fails if: run makes one a conversation whatever the int says, slots_for forgets the bytes, or the card's
    (`mem_get_info(weight.device)[0] // 2` -> `mem_get_info(weight.device)[1]`), or run the group.
    """
    seen, plain = set(), engine.feed
    monkeypatch.setattr(engine, "feed", lambda *args: seen.add(len(args[1].lengths)) or plain(*args))
    for slots, want in ((3, 3), (engine.Slots(model, 4, 200), 4), (None, 10)):
        seen.clear()
        sampled(model, tokenizer, group_size=2, slots=slots, do_search=False)
        assert seen == {want}
    for room, want in ((5, 5), (1, 2)):
        monkeypatch.setattr(engine, "CACHE_BYTES", room * engine.slot_bytes(model, 200) + 1)
        seen.clear()
        sampled(model, tokenizer, group_size=2, do_search=False)
        assert seen == {want}
    engine.run(model, [], None, 200)  # nothing to do
    bytes_each = engine.slot_bytes(model, 200)
    weight = types.SimpleNamespace(is_cuda=True, device="cuda")
    card = types.SimpleNamespace(config=model.config, dtype=model.dtype)
    card.get_output_embeddings = lambda: types.SimpleNamespace(weight=weight)
    for held, room, want in ((100, 100, 64), (100, 7, 7), (7, 100, 7), (0, 100, 1)):
        monkeypatch.setattr(engine, "CACHE_BYTES", held * bytes_each)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * room * bytes_each, 10**12))
        assert engine.slots_for(card, 500, 200) == want


def test_searches_that_come_first_are_served_before_anything_is_fed(model, monkeypatch):
    """Claim: conversations that begin with a search are served before the model is asked anything, in one call of the
    search engine for all, also for those that have no slot yet; a search that follows a search is served, too.
    Fails if: `serve(talks, search)` before the queue is dropped, or serve answers only once (`while` -> `if`).
    """
    events, plain = [], engine.feed
    monkeypatch.setattr(engine, "feed", lambda *args: events.append("feed") or plain(*args))

    def begins(number, record):
        record.ids += yield f"first {number}"
        if number == 3:
            record.ids += yield "second 3"
        yield from write(record, None, 3)

    records = [Record([]) for _ in range(5)]
    find = lambda queries: events.append(queries) or [[int(query[-1]) + 2] * 4 for query in queries]
    engine.run(model, [(r, begins(b, r)) for b, r in enumerate(records)], find, 50, 1, 0.0, slots=2)
    assert events[:3] == [[f"first {b}" for b in range(5)], ["second 3"], "feed"] and set(events[3:]) == {"feed"}
    assert [r.ids[:-3] for r in records] == [[b + 2] * (8 if b == 3 else 4) for b in range(5)]


# ----- Calls of the model on a prompt of its own -----


@pytest.mark.parametrize("slots, static", [(None, False), (3, False), (3, True)])
def test_a_call_on_a_prompt_of_its_own_begins_empty_and_the_conversation_goes_on(model, slots, static):
    """Claim: greedy, each token of a conversation and of its calls is the argmax of a plain forward pass over its own
    record, with its log-prob: beside other rows, with fewer slots than conversations, and where the lengths of
    the two records make one look like the other.
    Fails if: a slot keeps its keys when its record changes (`talk.held, slots.lengths[row] = talk.context, 0` ->
    `talk.held = talk.context` in restart), or writing() does not ask whether the slot holds this record.
    """
    records = wander(model, slots and engine.Slots(model, slots, 700, static))
    assert len(records) > 30 and min(len(r.sampled) for r in records) >= 3
    for r in records:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([r.ids])).logits[0], -1)
        assert {at: logprobs[at - 1].argmax().item() for at in r.sampled} == {at: r.ids[at] for at in r.sampled}
        assert r.sampled == pytest.approx({at: logprobs[at - 1, r.ids[at]].item() for at in r.sampled}, abs=2e-5)


def test_calls_get_draws_of_their_own_which_no_neighbour_changes(model):
    """Claim: sampled, two calls on the same prompt and the conversation after them, on that prompt, too, write
    different tokens; and all are the same for any number of slots.
    Fails if: the draws stay when the record changes, or new ones come from the generator that all conversations share.
    """
    model, prompt = model.double(), list(range(5, 15))

    def repeats(record, calls):
        for call in calls:
            yield from write(call, call, 8)
        yield from write(record, None, 8)

    threes = [[Record([*prompt]) for _ in range(3)] for _ in range(4)]
    conversations = [(r, repeats(r, calls)) for r, *calls in threes]
    engine.run(model, conversations, None, 50, 1, 1.0, torch.Generator().manual_seed(0))
    assert len({tuple(r.ids) for three in threes for r in three}) == 12
    assert [r.ids for r in wander(model, None, 1.0)] == [r.ids for r in wander(model, 3, 1.0)]
