"""Generation: many conversations at once, over a few slots of keys and values.

The official code hands this job to vLLM, which needs its own copy of the weights. Here the policy that is trained
also samples. A conversation is a generator (searchr1.converse): it yields what it wants, a token or passages, and this
file answers all that are in flight together.

    1. Slots, Block      keys and values of the rows in flight; they stay in memory over all turns of a conversation
    2. feed, decode      append ids to slots -> logits of the next token; on a GPU one token a row is a CUDA graph
    3. sample            logits -> one token a row and its log-prob
    4. where a turn can end: closing_ids, end_ids
    5. Talk, run         conversations wait in a queue, get a slot, are fed, sampled and served until they are over

Shapes: B conversations, n rows of one forward pass, T ids a row, L positions, V vocabulary, D hidden, w columns seen.
Nothing here knows the method: no tag, no prompt, no reward.
"""

import functools
from dataclasses import dataclass

import torch
from tqdm import tqdm

from kernels import bf16_units, matmul_fp32

GPU_SLOTS = 64  # conversations in flight on a GPU
CACHE_BYTES = 8 * 2**30  # of keys and values: beside the weights of a 3B model this fits 24 GB
FEED_TOKENS = 2**14  # rows x columns of one forward pass over long blocks: bounds the memory of prompts and passages

class Mistake(ValueError):
    """Something that the user can put right. Scripts print it as one line and exit with code 2, without a traceback."""

# ----- 1. Keys and values -----

def slot_bytes(policy, max_length):
    """Bytes that the keys and values of one conversation take at most."""
    c = policy.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return (max_length + 1) * c.num_hidden_layers * 2 * heads * head_dim * policy.dtype.itemsize

def slots_for(policy, conversations, max_length):
    """How many conversations run at once if the caller does not say: as many as memory and GPU_SLOTS allow."""
    weight, most, room = policy.get_output_embeddings().weight, conversations, CACHE_BYTES
    if weight.is_cuda:
        most, room = GPU_SLOTS, min(room, torch.cuda.mem_get_info(weight.device)[0] // 2)  # half of what is free
    return max(1, min(conversations, most, room // slot_bytes(policy, max_length)))  # Llama-3.2-3B, 4096 ids: 18

class Slots:
    """Slot s holds keys and values of positions 0..lengths[s]-1 of one conversation, left-aligned and without holes.
    Whatever lies beyond is left over from an earlier row. It is never visible, since a query at position p sees keys
    0..p only, and it is overwritten when the row grows. The last column takes what padding writes.

    PITFALL: keys and values belong to the weights that made them. A cache that outlives an optimiser step mixes old
    keys with new weights, and nothing complains. So `run` empties all slots first. Buffers and graphs stay: the
    optimiser changes weights in place, and a graph reads addresses. A parameter that becomes a new tensor is missed."""

    def __init__(self, policy, slots, max_length, static=None, graphs=True):
        window, kinds = (getattr(policy.config, name, None) for name in ("sliding_window", "layer_types"))
        if (window and window < max_length) or set(kinds or ()) - {"full_attention", "sliding_attention"}:
            has = f"a window of {window} tokens" if window else "layers without attention"
            raise Mistake(f"this model has {has}; we sample {max_length} tokens with full attention: take another one")
        self.device = policy.get_output_embeddings().weight.device
        self.static = self.device.type == "cuda" if static is None else static
        self.columns = max_length + 1  # the last one is never visible
        self.capacity = self.columns if self.static else 0  # fixed addresses for a graph; elsewhere the buffers grow
        self.layers = []  # a pair [keys, values] a layer, each [slots, heads, capacity, d]
        self.lengths = [0] * slots
        self.head = None  # the lm_head in fp32, on a CPU, where a product of bf16 numbers would be rounded to bf16
        self.graphs = graphs and self.static  # False: each kernel of a decoding step is started by itself
        self.steps = {}  # (rows, columns) -> the static inputs and the replay of `decode`
        # PITFALL: a graph keeps addresses, not tensors. What it reads has to live as long as the graph itself.
        self.numbers = torch.arange(slots, device=self.device)
        if self.device.type == "cuda":
            # Graphs share scratch memory. PITFALL: they need a capture stream of their own, too. On torch's common one,
            # dropping the graphs of other slots frees the cuBLAS workspace that these replay into.
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def place(self, rows, blocks):
        """Where the ids of blocks[i] go in slot rows[i] -> (ids padded to the longest block, [n, T]; the index of each
        row's last id among them, [n]; the Block that says where they are written)."""
        T, width = max(map(len, blocks)), max(self.lengths[row] + len(block) for row, block in zip(rows, blocks))
        if not self.static and self.capacity <= width:
            self.capacity = min(self.columns, width + width // 2 + 16)
        # One table, so that a decoding step waits for one transfer to the GPU and not for one a column.
        table = [[row, self.lengths[row], len(b), *b, *[0] * (T - len(b))] for row, b in zip(rows, blocks)]
        table = torch.tensor(table, device=self.device)
        rows_n, starts_n1, counts_n1, ids_nT = table[:, 0], table[:, 1:2], table[:, 2:3], table[:, 3:]
        steps_T = torch.arange(T, device=self.device)
        last_n1 = (counts_n1 - 1).clamp_min(0)
        positions_nT = starts_n1 + torch.minimum(steps_T, last_n1)  # padding stays within the row
        places_nT = torch.where(steps_T < counts_n1, positions_nT, self.capacity - 1)
        block = Block(self, rows_n, list(rows) == list(range(len(rows))), positions_nT, places_nT, width)
        return ids_nT, last_n1[:, 0], block

    def copy(self, sources, targets):
        """Make slot targets[i] equal to slot sources[i]: for members of a group, and to move rows to free slots."""
        if not sources:
            return
        for source, target in zip(sources, targets):
            self.lengths[target] = self.lengths[source]
        width = max(self.lengths[row] for row in sources)
        from_n, to_n = torch.tensor([sources, targets], device=self.device)
        for store in (store for layer in self.layers for store in layer):
            store[to_n, :, :width] = store[from_n, :, :width]

@dataclass
class Block:
    """Where the ids of one forward pass go. It stands in for a transformers Cache: the model calls `update`."""

    slots: Slots
    rows_n: torch.Tensor  # long, the slot of each row
    in_order: bool  # rows_n is 0, 1, ..., n-1: keys can be read in place
    positions_nT: torch.Tensor  # long, position of each id in its conversation
    places_nT: torch.Tensor  # long, column that each id writes; padding writes the last one
    width: int  # columns that this block can see

    def update(self, keys, values, layer, *_, **__):
        """keys, values [n, heads, T, d] of the block -> all keys and values of its rows, [n, heads, width, d]."""
        slots, (n, heads, _, d) = self.slots, keys.shape
        if layer == len(slots.layers):
            slots.layers.append([new.new_zeros(len(slots.lengths), heads, 0, d) for new in (keys, values)])
        stores = slots.layers[layer]
        for i, new in enumerate((keys, values)):
            if stores[i].shape[2] < slots.capacity:
                # Zeros, not empty memory: a masked NaN times an attention weight of 0 is still NaN.
                room = new.new_zeros(len(slots.lengths), heads, slots.capacity - stores[i].shape[2], d)
                stores[i] = torch.cat([stores[i], room], dim=2)
            stores[i][self.rows_n[:, None], :, self.places_nT] = new.transpose(1, 2)
        seen = [store[:, :, : self.width] for store in stores]
        return tuple(store[:n] if self.in_order else store[self.rows_n] for store in seen)

    def get_seq_length(self, *_):
        return 0  # models ask in order to guess positions; ours are always given

# ----- 2. Ids in, logits out -----

def hidden_states(policy, block, ids_nT):
    """Run the model's body over the ids of a Block -> hidden states [n, T, D]."""
    visible_n1Tw = torch.arange(block.width, device=ids_nT.device) <= block.positions_nT[:, None, :, None]
    bias_n1Tw = torch.zeros(visible_n1Tw.shape, dtype=policy.dtype, device=ids_nT.device)
    bias_n1Tw.masked_fill_(~visible_n1Tw, torch.finfo(policy.dtype).min)
    inputs = {"input_ids": ids_nT, "attention_mask": bias_n1Tw, "position_ids": block.positions_nT}
    return policy.base_model(**inputs, past_key_values=block, use_cache=True).last_hidden_state

def decode(policy, block, ids_n1):
    """hidden_states() of one id a row over static buffers, on a GPU as a replayed CUDA graph -> [n, 1, D].

    One token takes hundreds of small kernels. Started one by one from Python they take longer than reading all weights;
    a graph starts them at once, but only for fixed shapes, and takes up to 0.1 GB. So there are few shapes: rows are
    padded to all slots, a half or an eighth of them, columns to quarters of the buffer. A graph is made when its shape
    first occurs. Padding rows are free slots: the next prompt overwrites what they write."""
    slots = block.slots
    rows, width = shape = graph_shape(slots, len(ids_n1), block.width)
    if shape in slots.steps:
        return replayed(slots, shape, block, ids_n1)
    inputs = ids_n1.new_zeros(3, rows, 1)  # ids, positions, places
    inputs[2] = slots.capacity - 1  # capturing runs the step, too, and must not write into anybody's keys
    fixed = Block(slots, slots.numbers[:rows], True, inputs[1], inputs[2], width)
    return checked(policy, slots, shape, inputs, lambda: hidden_states(policy, fixed, inputs[0]), block, ids_n1)

def graph_shape(slots, n, width):
    """(rows, columns) of the graph for n rows that see `width` columns: twelve shapes at most."""
    count, quarter = len(slots.lengths), -(-(slots.capacity - 1) // 4)
    rows = next(rows for rows in (count // 8, count // 2, count) if rows >= n)
    return rows, min(slots.capacity - 1, -(-width // quarter) * quarter)

def replayed(slots, shape, block, ids_n1):
    """Put the ids of a Block into the static inputs of the graph of this shape and replay it -> hidden states."""
    inputs, replay = slots.steps[shape]
    inputs[:, : len(ids_n1)] = torch.stack([ids_n1, block.positions_nT, block.places_nT])
    return replay()[: len(ids_n1)]

def checked(policy, slots, shape, inputs, run, block, ids_n1):
    """Capture a step and compare its first replay with the plain step -> hidden states. If they differ by more than
    rounding, or if the capture fails, a line says so and these slots go on without graphs. The replay comes first:
    after the plain step the new keys would be in place, whether the graph writes them or not. A good graph is replayed
    once more for the result: a resumed run captures at other tokens, yet must give the same log-probs, bit for bit."""
    try:
        slots.steps[shape] = inputs, captured(run, slots)
        found, wrong = replayed(slots, shape, block, ids_n1).clone(), None
    except RuntimeError as error:
        found, wrong = None, str(error).strip().splitlines()[0]
    wanted = hidden_states(policy, block, ids_n1)
    if not wrong:
        apart = ((found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)).max().item()
        within = 1e-3 if wanted.dtype == torch.float32 else 0.1
        wrong = None if apart <= within else f"a replay is {apart:.1%} off"  # NaN is not within, either
    if wrong:
        tqdm.write(f"CUDA graphs are off from here, which is slower and changes nothing else: {wrong}")
        slots.graphs = False
        slots.steps.clear()
    return wanted if wrong else replayed(slots, shape, block, ids_n1)

def captured(run, slots):
    """run: () -> tensor. Return a function that repeats it: the replay of a CUDA graph, or on a CPU `run` as it is."""
    if slots.device.type != "cuda":
        return run
    now = torch.cuda.current_stream(slots.device)
    slots.stream.wait_stream(now)
    with torch.cuda.stream(slots.stream):  # the first calls choose kernels and take workspaces; a capture must not
        run()
        run()
    now.wait_stream(slots.stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=slots.pool, stream=slots.stream):
            out = run()
    finally:
        torch.cuda.set_stream(now)  # a capture that fails would leave its own stream behind

    def replay():
        graph.replay()
        return out

    return replay

def feed(policy, slots, rows, blocks):
    """Append blocks[i], a list of ids, to slot rows[i] -> logits [n, V] fp32 of the token after the last id of each.
    This serves a prompt (a long block, the slot is empty), a decoding step (one id) and retrieved passages (a long
    block, the slot holds a conversation): nothing is encoded twice. An empty block leaves its slot as it was."""
    most = max(1, FEED_TOKENS // max(slots.lengths[row] + len(block) for row, block in zip(rows, blocks)))
    if max(map(len, blocks)) > 1 and len(rows) > most:  # in pieces, blocks of like length together
        order = sorted(range(len(rows)), key=lambda i: len(blocks[i]))
        pieces = [order[at : at + most] for at in range(0, len(order), most)]
        logits = [feed(policy, slots, [rows[i] for i in piece], [blocks[i] for i in piece]) for piece in pieces]
        return torch.cat(logits)[torch.tensor(order, device=slots.device).argsort()]
    ids_nT, last_n, place = slots.place(rows, blocks)
    run = decode if slots.graphs and place.in_order and ids_nT.shape[1] == 1 else hidden_states
    last_nD = run(policy, place, ids_nT)[torch.arange(len(rows), device=slots.device), last_n]
    for row, block in zip(rows, blocks):
        slots.lengths[row] += len(block)
    weight_VD = policy.get_output_embeddings().weight
    if slots.device.type == "cpu":
        slots.head = weight_VD.float() if slots.head is None else slots.head  # converted once, not for each token
        with bf16_units(policy.dtype):
            return last_nD.float() @ slots.head.T
    return matmul_fp32(last_nD, weight_VD.T)

# ----- 3. Sampling -----

def sample(logits_nV, temperature, draws_n=None):
    """[n, V] fp32 -> ids [n] and their log-probs [n] under softmax(logits / temperature). Temperature 0 is greedy, with
    log-probs at temperature 1. draws_n: a uniform number from [0, 1) a row, float64; the token is where the cumulated
    probabilities pass it. No top-k, no top-p [D12]: what is sampled must be the distribution whose log-probs are
    trained. PITFALL: transformers' generate(do_sample=True) cuts to the 50 most likely tokens unless told otherwise."""
    scaled_nV = logits_nV if temperature in (0, 1) else logits_nV / temperature
    logprobs_nV = torch.log_softmax(scaled_nV, dim=-1)
    if temperature == 0:
        ids_n1 = logprobs_nV.argmax(-1, keepdim=True)
    else:  # float64: in fp32, sums near 1 are 6e-8 apart, and a token rarer than that could never be drawn
        passed_nV = logprobs_nV.exp().cumsum(-1, dtype=draws_n.dtype)
        ids_n1 = torch.searchsorted(passed_nV, draws_n[:, None] * passed_nV[:, -1:], right=True)
        ids_n1 = ids_n1.clamp_max(logits_nV.shape[1] - 1)
    return ids_n1[:, 0], logprobs_nV.gather(1, ids_n1)[:, 0]

# ----- 4. Where a turn can end -----

@functools.lru_cache(maxsize=32)
def closing_ids(tokenizer, tags):
    """Ids of the tokens that can complete one of `tags`, whatever came before: text is decoded only after these.
    A tokenizer may spell `</search>` as one token, as `</`, `search`, `>`, or end it inside `>\\n\\n`. The piece that
    completes the tag, cut after one of the piece's `>`, is a suffix of the tag or ends with the whole tag."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    pieces = [">" if piece == "<0x3E>" else piece or "" for piece in pieces]  # Gemma has a token for each byte
    heads = lambda piece: [piece[: at + 1] for at, character in enumerate(piece) if character == ">"]
    closes = lambda piece: any(tag.endswith(head) or head.endswith(tag) for head in heads(piece) for tag in tags)
    return {i for i, piece in enumerate(pieces) if closes(piece)}

def end_ids(policy, tokenizer):
    """Ids that end a sequence: the tokenizer's, and those of the model's generation config (chat models have two)."""
    configured = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    return {tokenizer.eos_token_id, *configured} - {None}

# ----- 5. Many conversations over few slots -----

class Talk:
    """A conversation in flight: its record, the generator that holds it, and what that wants next. The generator yields
    a str to search for (and is sent the passages), or None for the next token of the record (and is sent (token,
    log-prob)). It may yield another record instead of None: a call of the model on a prompt of its own."""

    def __init__(self, number, record, generator):
        self.number, self.record, self.generator = number, record, generator
        self.done, self.context = False, record  # context: the record that the model continues
        self.advance(None)
        self.held = self.context  # the record whose keys are in its slot

    def advance(self, answer):
        """Send what the generator waits for, and note what it asks for next."""
        try:
            wish = self.generator.send(answer)
        except StopIteration:
            self.query, self.done = None, True
            return
        self.query = wish if isinstance(wish, str) else None
        if self.query is None:
            self.context = self.record if wish is None else wish

def serve(talks, search):
    """Answer all searches of these conversations, in one call of the search engine for all that ask at once."""
    while asking := [talk for talk in talks if talk.query is not None]:
        results = search([talk.query for talk in asking])
        if len(results) != len(asking):
            raise RuntimeError(f"the search engine returned {len(results)} lists for {len(asking)} queries")
        for talk, passages in zip(asking, results):
            talk.advance(passages)

def leave(running, slots):
    """Conversations that are over leave, and the last rows take their slots."""
    n = sum(not talk.done for talk in running)
    free = [row for row in range(n) if running[row].done]
    moving = [row for row in range(n, len(running)) if not running[row].done]
    slots.copy(moving, free)
    for source, target in zip(moving, free):
        running[target] = running[source]
    slots.lengths[n:] = [0] * (len(slots.lengths) - n)
    del running[n:]

def restart(running, slots, draws_BL):
    """Where a call on its own prompt begins or ends, empty the slot and renew the draws, since positions repeat."""
    for row, talk in enumerate(running):
        if talk.held is not talk.context:
            talk.held, slots.lengths[row] = talk.context, 0
            if draws_BL is not None:
                seed = int(draws_BL[talk.number, 0] * 2**53)  # no token is sampled at position 0
                draws_BL[talk.number].uniform_(generator=torch.Generator(draws_BL.device).manual_seed(seed))

@torch.no_grad()
def run(policy, conversations, search, max_length, group_size=1, temperature=1.0, generator=None, slots=None):
    """Hold all conversations to their end. Their records have grown afterwards; nothing is returned.

    conversations  list of B pairs (record, generator), as Talk takes them; the group_size members of a group stand in a
                   row and begin with the same prompt
    search         list[str] -> list of lists of passages
    max_length     ids that a record may hold
    slots          Slots to work in (they bound what is in flight), or how many to make. None: see slots_for
    Raises Mistake if a group is larger than the slots, RuntimeError if the search engine loses a query.

    No row waits for the slowest one. A finished conversation gives its slot to the next one. As soon as a quarter of
    the rows have ended their turns, those are served, while the others are in the middle of theirs. Which rows run side
    by side changes nothing but last bits: the draw that picks a token belongs to its conversation and position."""
    device, B = policy.get_output_embeddings().weight.device, len(conversations)
    slots = slots or max(group_size, slots_for(policy, B, max_length))
    slots = slots if isinstance(slots, Slots) else Slots(policy, slots, max_length)
    if len(slots.lengths) < group_size:
        raise Mistake(f"{len(slots.lengths)} slots cannot hold a group of {group_size} rollouts: raise --slots")
    slots.lengths, slots.head = [0] * len(slots.lengths), None  # keys and head of older weights are forgotten
    double = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    draws_BL = torch.rand(B, max_length, dtype=double, generator=generator, device=device) if temperature else None

    talks = [Talk(b, *conversation) for b, conversation in enumerate(conversations)]
    serve(talks, search)  # those that begin with a search
    queue = [talks[at : at + group_size] for at in range(0, len(talks), group_size)]
    running = []  # the conversations in flight, in the order of their slots

    def pending(row):
        """Ids of the row's context that its slot does not hold yet."""
        return running[row].context.ids[slots.lengths[row] :]

    def writing(row):
        """Is the row in the middle of a turn: all that its slot lacks is the last token?"""
        talk = running[row]
        return talk.held is talk.context and talk.query is None and not talk.done and len(pending(row)) == 1

    def places(talks):
        """Number and next position of each conversation, [2, n]: where the draw of its next token stands."""
        return torch.tensor([[t.number for t in talks], [len(t.context.ids) for t in talks]], device=device)

    def step(talks, logits_nV, at_2n):
        """Sample the next token of these conversations and hand it to them; None: the row's token is thrown away."""
        draws_n = draws_BL[at_2n[0], at_2n[1].clamp_max(max_length - 1)] if temperature else None
        drawn_2n = torch.stack([t.to(double) for t in sample(logits_nV, temperature, draws_n)])  # one transfer back
        for talk, token, logprob in zip(talks, *drawn_2n.tolist()):
            if talk:
                talk.advance((int(token), logprob))

    while queue or running:
        serve(running, search)
        leave(running, slots)
        # Free slots go to the next groups, as long as there is room for a whole one.
        before, new = len(running), []
        while queue and len(running) + group_size <= len(slots.lengths):
            new.append(list(range(len(running), len(running) + group_size)))
            running += queue.pop(0)
        restart(running, slots, draws_BL)
        # One pass over what the slots do not hold yet: prompts, or a turn's last token and the passages after it.
        due = [[row] for row in range(before) if not writing(row)] + new
        if due:
            rows = [members[0] for members in due]
            logits_nV = feed(policy, slots, rows, [pending(row) for row in rows])
            # A prompt is encoded once and fanned out to its group.
            slots.copy([first for first, *rest in new for _ in rest], [row for _, *rest in new for row in rest])
            source = [i for i, members in enumerate(due) for _ in members]
            takers = [running[row] for members in due for row in members]
            step(takers, logits_nV[torch.tensor(source, device=device)], places(takers))
        # One token a row and step, until a quarter of the rows wait. Only the new ids travel to the GPU each time.
        at_2n = places(running)
        while any(takers := [talk if writing(row) else None for row, talk in enumerate(running)]):
            if takers.count(None) >= max(1, len(running) // 4):
                break
            blocks = [pending(row) if talk else [] for row, talk in enumerate(takers)]
            step(takers, feed(policy, slots, range(len(running)), blocks), at_2n)
            at_2n[1] += 1
