"""What several test files share: models and tokenizers without training, scripted policies, a small world, a batch.

A claim of the paper is marked: `python -m pytest -m paper -v tests` reads like the paper's summary.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. The variable is read when kernels.py is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["no_proxy"] = "127.0.0.1,localhost"  # the tests' own servers
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub; with no network the question would take 20 seconds
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # models this small only wait for a second thread

import transformers

import data
import searchr1
from retrieval import Passage, build_index

PASSAGES = [Passage("0", "Ada", "Ada was born in London."), Passage("1", "London", "London stands on the Thames.")]
LOUD = ("<search>", "</search>", "<answer>", "</answer>")


def pytest_configure(config):
    config.addinivalue_line("markers", "paper: a claim of the paper, or of how we read it")


# ----- Models that have learned nothing -----


def shaped(kind, tied=True, dtype=torch.float32, vocabulary=100, loud=(), seed=0, **values):
    """A random two-layer model in the shape of a family: Qwen2, Qwen3, Llama. Rows `loud` of its head are tripled."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": tied}
    config = getattr(transformers, kind + "Config")(vocab_size=vocabulary, **sizes | values)
    model = getattr(transformers, kind + "ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for row in loud:
            model.lm_head.weight[row] *= 3
    return model


def random_model(tokenizer, seed=0, loud=(), layers=2):
    """A random Qwen3 over the tokenizer's vocabulary. The rows of the tokens `loud` are tripled, so that a model that
    has learned nothing still opens and closes tags now and then."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": None}
    sizes |= {"vocabulary": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return shaped("Qwen3", False, loud=[tokenizer.convert_tokens_to_ids(token) for token in loud], seed=seed, **sizes)


@pytest.fixture(scope="session")
def tokenizer():
    return data.make_tokenizer()


@pytest.fixture(scope="session")
def world():
    return data.make_world(0)


@pytest.fixture(scope="session")
def engine(world):
    return build_index(world.passages)


@pytest.fixture()
def model(tokenizer):
    return random_model(tokenizer, loud=LOUD)


def sampled(model, tokenizer, temperature=1.0, group_size=1, slots=None, search=None, **settings):
    """Five conversations of a random model over two passages, ragged, with several turns and some searches."""
    found = [Passage("0", "kinake", "kinake lives in gugoton."), Passage("1", "x", "the mayor of gugoton is kinake.")]
    texts = (
        "who is kinake?",
        "what is the city where kinake was born?",
        "can you name the mayor of gugoton?",
        "who is the mayor of the city where kinake lives?",
        "what is born?",
    )
    lengths = {"max_new_tokens": 12, "max_obs_length": 40, "max_length": 200, "invalid_message": "paper"}
    return searchr1.rollout(
        model,
        tokenizer,
        [searchr1.Question(str(i), text, ("gugoton",)) for i, text in enumerate(texts)],
        search or (lambda queries, k: [found[: 1 + len(query) % 2] for query in queries]),
        searchr1.Settings(max_turns=3, **lengths | settings),
        group_size,
        temperature,
        torch.Generator().manual_seed(0),
        slots,
    )


# ----- Conversations without a model -----


def played(turns, question="q", passages=PASSAGES, tokenizer=None, **settings):
    """searchr1.play over one question: the policy "writes" `turns` (str or ids), the engine always finds `passages`
    -> (Rollout, queries that were asked, tokenizer). No model, no engine.py."""
    tokenizer, asked = tokenizer or searchr1.ByteTokenizer(), []
    settings = searchr1.Settings(**{"max_new_tokens": 200} | settings)
    r = searchr1.begin(question, searchr1.prompt_ids(question, tokenizer, settings), settings)
    script = [list(turn.encode()) if isinstance(turn, str) else turn for turn in turns]
    talk = searchr1.converse(r, tokenizer, settings)
    searchr1.play(r, talk, script, lambda query: asked.append(query) or passages[: settings.top_k])
    return r, asked, tokenizer


@pytest.fixture()
def short_prompt(monkeypatch):
    """For tests that do not look at the prompt."""
    monkeypatch.setattr(searchr1, "TEMPLATE", "{question}\n")


class ScriptedPolicy(torch.nn.Module):
    """A policy that writes prepared turns: what a model is to engine.py, with nothing learned and nothing random.

    script: prompt text -> list of turns, each a list of ids. It uses the cache as a model does, and only that way: the
    keys it stores are the ids it was fed and the number of their block, so it reads its own context from the cache, and
    slots that mixed up rows or positions would make it lose its place.
    """

    dtype, device = torch.float32, torch.device("cpu")
    config = argparse.Namespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=2)  # of the keys that it stores

    def __init__(self, tokenizer, script):
        super().__init__()
        self.tokenizer, self.script, self.base_model = tokenizer, script, self.hidden_states
        self.head = torch.nn.Linear(len(tokenizer), len(tokenizer), bias=False)
        torch.nn.init.eye_(self.head.weight)

    def get_output_embeddings(self):
        return self.head

    def hidden_states(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        n, T = input_ids.shape
        # A block's number is its first position + 1; a single sampled token has 0.
        block_n1 = (position_ids[:, :1] + 1) * (T > 1)
        state = torch.stack([input_ids, block_n1.expand(n, T)], dim=-1)[:, None].float()
        seen, _ = past_key_values.update(state, state, 0)
        hidden = torch.zeros(n, T, len(self.tokenizer))
        for row in range(n):
            for t in range(T):
                ids, blocks = seen[row, 0, attention_mask[row, 0, t] == 0].long().T.tolist()
                turn = len(set(blocks) - {0}) - 1
                written = next((i for i, b in enumerate(reversed(blocks)) if b), len(blocks))
                prompt = self.tokenizer.decode(ids[: blocks.count(1)])
                turns = self.script.get(prompt, [])
                segment = turns[turn] if turn < len(turns) else []
                token = segment[written] if written < len(segment) else self.tokenizer.eos_token_id
                hidden[row, t, token] = 100.0
        return argparse.Namespace(last_hidden_state=hidden)


# ----- Batches and runs -----


def a_batch(tokenizer, model, group_size=4):
    """Two questions x group_size rollouts of a random model as a Batch, with advantages from made-up rewards, reference
    log-probs and values -> (Batch, rewards [B])."""
    texts = "who is kinake?", "what is the city where kinake was born?"
    questions = [searchr1.Question("0", text, ("x",)) for text in texts]
    settings = searchr1.Settings(3, 12, 40, 200, invalid_message="paper")
    find, generator = lambda queries, k: [PASSAGES[:1]] * len(queries), torch.Generator().manual_seed(3)
    batch = searchr1.collate(searchr1.rollout(model, tokenizer, questions, find, settings, group_size, 1.0, generator))
    rewards = torch.tensor([1.0] + [0.0] * (group_size - 1)).repeat(2)
    batch.advantages_BT = searchr1.group_advantages(rewards, group_size)[:, None] * batch.mask_BT
    batch.ref_logprobs_BT = batch.old_logprobs_BT - 0.2 * batch.mask_BT
    batch.values_BT, batch.returns_BT = torch.zeros_like(batch.old_logprobs_BT), 1.0 * batch.mask_BT
    return batch, rewards


def metrics(folder):
    """metrics.jsonl of a run, without what a clock or a card measured."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    measured = ("timing", "tokens_per_s", "memory_gib")
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]


@pytest.fixture()
def here(tmp_path, monkeypatch):
    """An empty working directory; here(path, records) writes JSON lines into it."""
    monkeypatch.chdir(tmp_path)

    def write(path, *records):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(json.dumps(r) + "\n" for r in records))
        return Path(path)

    return write
