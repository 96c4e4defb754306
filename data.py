"""Questions and passages: the embedded tiny world with its base model, and files of real ones.

The paper trains Qwen2.5 on NQ (mostly one hop) and HotpotQA (two hops) against 21 million Wikipedia passages. The tiny
world has the same shape, at a size that two CPU cores learn in minutes: invented people, cities, companies and
countries, one passage a fact, one-hop and two-hop questions. Training and test questions share no entity.

A transformer of 0.17 M parameters stands in for Qwen, made here from random weights in a minute. It learns exactly
two things: to READ (name the answer, given passages and a question) and the FORMAT (the tags, from a poor policy that
searches and answers at random). No episode is picked because its answer is right, and none comes from the world of the
reinforcement learning. Which query, when to ask again, which passage to believe: that must come from the reward.

    1. the tiny world                    make_world, draw_questions, make_tokenizer; course/world.py prints one
    2. its base model                    reading_episode, poor_episodes: what it is shown; base_model
    3. real questions and passages       load_data, fixed_sample; resolve_corpus
    4. checkpoints, a user's mistakes    load_checkpoint, load_settings, task; run_main
"""

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import huggingface_hub
import torch
from filelock import FileLock
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from engine import Mistake
from retrieval import (WORD, Passage, SearchFailed, build, build_index, engine_from, numbered_lines, whole_characters,
    written_whole)  # fmt: skip
from searchr1 import RETHINK, Question, Settings

transformers_logging.disable_progress_bar()

# ----- 1. The tiny world -----

# One kind of fact. All its wordings contain its name. nouns: how a question asks for it, "the city where {x} lives";
# facts: how a passage states it, with {x} the subject and {y} the object.
Relation = namedtuple("Relation", "name subject object nouns facts")

def _noun(name, subject, object):
    nouns = f"the {name} of {{x}}", f"the {name} belonging to {{x}}"
    return Relation(name, subject, object, nouns, (f"the {name} of {{x}} is {{y}}.", f"{{y}} is the {name} of {{x}}."))

def _verb(name, subject, object, verb, noun="place", preposition="in"):
    nouns = f"the {object} where {{x}} {verb}", f"the {noun} {preposition} which {{x}} {verb}"
    facts = f"{{x}} {verb} {preposition} {{y}}.", f"{{y}} is the {object} where {{x}} {verb}."
    return Relation(name, subject, object, nouns, facts)

RELATION = {r.name: r for r in (
    _verb("born", "person", "city", "was born"), _verb("lives", "person", "city", "lives"),
    _verb("works", "person", "company", "works", "company", "for"), _noun("teacher", "person", "person"),
    _noun("country", "city", "country"), _noun("mayor", "city", "person"), _noun("port", "city", "city"),
    _verb("based", "company", "city", "is based"), _noun("founder", "company", "person"),
    _noun("supplier", "company", "company"), _noun("capital", "country", "city"),
    _noun("leader", "country", "person"), _noun("protector", "country", "country"),
)}  # fmt: skip

# Each part of a world takes PART entities from these pools. A name is one token and belongs to one entity.
POOL = {"person": 320, "city": 110, "company": 110, "country": 70}
PART = {"person": 150, "city": 50, "company": 50, "country": 30}
ENDING = {"person": "", "city": "ton", "company": "corp", "country": "land"}
OPENERS = {kind: (f"{'who' if kind == 'person' else 'what'} is {{np}}?", "can you name {np}?") for kind in POOL}

def _names():
    """Name -> kind, the same in every world. A stem has two or three syllables and is used once."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng, kind_of = random.Random("names"), {}  # stem -> kind
    for kind, size in POOL.items():
        wanted = len(kind_of) + size
        while len(kind_of) < wanted:
            kind_of.setdefault("".join(rng.sample(syllables, 3 if kind == "person" else 2)), kind)
    return {stem + ENDING[kind]: kind for stem, kind in kind_of.items()}

KIND_OF = _names()
NAMES = {kind: [name for name in KIND_OF if KIND_OF[name] == kind] for kind in POOL}

# facts: (relation's name, subject) -> object; train and test: the Questions of the first and of the last part.
World = namedtuple("World", "passages facts train test")

def make_world(seed, parts=2):
    """seed (int or str) -> World of `parts` parts, each with 990 facts, 990 one-hop questions and about 3240 two-hop
    questions. Facts and questions stay inside their part: no entity of one part is mentioned in another."""
    rng = random.Random(f"world {seed}")
    pools = {kind: rng.sample(names, len(names)) for kind, names in NAMES.items()}
    passages, facts, questions = [], {}, []
    for part in range(parts):
        members = {kind: pools[kind][part * n : (part + 1) * n] for kind, n in PART.items()}
        own = {}
        for relation in RELATION.values():
            for subject in members[relation.subject]:
                object = own[relation.name, subject] = rng.choice([e for e in members[relation.object] if e != subject])
                text = rng.choice(relation.facts).format(x=subject, y=object)
                passages.append(Passage(str(len(passages)), subject, text))
        facts |= own
        questions.append(_questions(own, rng, part))
    rng.shuffle(passages)
    return World(passages, facts, questions[0], questions[-1])

def worded(subject, path, answer, rng):
    """Subject, relations from the first hop on, answer -> the text of the question, in random wordings."""
    phrase = "{x}"
    for relation in reversed(path):  # "the mayor of {x}", "the mayor of the city where {x} lives"
        phrase = phrase.format(x=rng.choice(RELATION[relation].nouns))
    return rng.choice(OPENERS[KIND_OF[answer]]).format(np=phrase.format(x=subject))

def _questions(facts, rng, part):
    """Every fact as a one-hop question and every chain of two facts as a two-hop question, in random wordings."""
    questions = []
    for (name, subject), object in facts.items():
        paths = {(name,): object}
        paths |= {(name, then): facts[then, object] for then in RELATION if RELATION[then].subject == KIND_OF[object]}
        for path, answer in paths.items():
            if answer != subject:  # a chain that leads back could be answered by copying from the question
                text = worded(subject, path, answer, rng)
                questions.append(Question(f"{part}-{len(questions)}", text, (answer,), len(path), (subject, *path)))
    return questions

def two_hop_share(record):
    """Metrics of the last step -> share of two-hop questions in the next one. A policy that cannot yet tell both kinds
    apart drifts to one search for every question, or to two, and then never tries the other number. The share works
    against that: 0.75 at 1.5 searches a question (the mean of both kinds), higher below 1.5, lower above it. It is
    lowered less if one-hop questions have the better EM, since a second search does not hurt them then. It also falls
    by 0.25 for each search that two-hop questions take more than one-hop ones (LOG.md, 28, 29, 31 and 32)."""
    one, two = (record.get(f"env/searches_{hops}hop", 1.5) for hops in (1, 2))
    lean = 1.5 - (one + two) / 2
    if lean < 0:
        lean *= 1 - max(0.0, record.get("env/em_1hop", 0.0) - record.get("env/em_2hop", 0.0))
    return min(0.9, max(0.2, 0.75 + lean - 0.25 * max(0.0, two - one)))

def draw_questions(questions, count, share, rng):
    """Draw `count` questions: first the hops, then a relation (or a pair), then one of its questions. Drawn uniformly,
    six in ten one-hop questions would be about people: the policy could learn the number of searches by relation."""
    by_type = {}
    for question in questions:
        by_type.setdefault(question.path[1:], []).append(question)
    types = {hops: sorted(t for t in by_type if len(t) == hops) for hops in (1, 2)}
    return [rng.choice(by_type[rng.choice(types[2 if rng.random() < share else 1])]) for _ in range(count)]

TAGS = [f"<{slash}{tag}>" for tag in ("question", "think", "search", "information", "answer") for slash in ("", "/")]
THOUGHTS = ["i need to search", "not sure", "now i know", ""]
TINY_SETTINGS = Settings(max_turns=3, max_new_tokens=14, max_obs_length=64, max_length=256, invalid_message="paper")

# The official prompt [Table 1] has 100 words of instructions that 0.17 M parameters cannot use. This template keeps its
# question, puts its passages (RAG) where the base model learned to read them, and drops the rest.
CHAT_TEMPLATE = ("{%- set asked, _, context = messages[-1]['content'].split('Question: ')[-1].partition(' Context: ')"
                 " -%}{{ ('<information> ' + context.strip() + ' </information> ' if context else '') + '<question> ' "
                 "+ asked.strip() + ' </question>' }}")  # fmt: skip

def make_tokenizer():
    """A word-level tokenizer over the words of the tiny world: 669 tokens, each tag and each name one token. It
    lower-cases and splits off punctuation. The head `Doc 1(Title: "...")` of a passage becomes the one word `doc`,
    since a passage of this world always names what it is about; the colon of a note ("born: luguton") becomes `is`.
    PITFALL: next to a Qwen3Config, AutoTokenizer loads it back. Next to a Qwen2Config, it silently makes another."""
    groups = [r.nouns + r.facts for r in RELATION.values()] + [*OPENERS.values(), THOUGHTS, [RETHINK.lower()]]
    texts = [re.sub(r"{\w+}", "", text) for group in groups for text in group]
    words = sorted({"doc"} | {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = ["<eos>", "<unk>", *words, *KIND_OF]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    head, colon = Regex(r'Doc \d+\(Title: "[^"]*"\)'), Regex(r":\s")
    replaced = normalizers.Replace(head, "doc"), normalizers.Replace(colon, " is ")
    tokenizer.normalizer = normalizers.Sequence([*replaced, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)

# ----- 2. Its base model. It is shown episodes: lists of segments (text, True where the policy wrote it) -----

def reading_episode(world, facts, count, rng):
    """`count` passages, then for each of them a question and its answer, in random order. Of the other passages, half
    share the first one's entity and three in ten its relation: to read is to tell these apart."""
    relation, subject = rng.choice(facts)
    same = [r.name for r in RELATION.values() if r.subject == KIND_OF[subject]]
    chosen = {(relation, subject)}
    while len(chosen) < count:
        luck = rng.random()
        pick = (rng.choice(same), subject) if luck < 0.5 else rng.choice(facts)
        if 0.5 <= luck < 0.8:
            pick = rng.choice([fact for fact in facts if fact[0] == relation])
        chosen.add(pick)
    chosen = sorted(chosen)
    rng.shuffle(chosen)
    passages = [rng.choice(RELATION[r].facts).format(x=s, y=world.facts[r, s]) for r, s in chosen]
    segments = [("<information> " + " ".join(f"doc {text}" for text in passages) + " </information>", False)]
    for relation, subject in rng.sample(chosen, len(chosen)):
        answer = world.facts[relation, subject]
        text = worded(subject, [relation], answer, rng)
        segments += [(f"<question> {text} </question>", False), (f"<answer> {answer} </answer>", True)]
    return segments

def _poor_policy(question, searches, rng):
    """A conversation with a policy that knows the tags and little else. A generator: it yields a query and is sent the
    passages, yields None to wait for the other conversations, and yields its episode in the end."""
    entities_in = lambda text: [word for word in WORD.findall(text) if word in KIND_OF]
    words, entities = WORD.findall(question.text), entities_in(question.text)
    relations = [word for word in words if word in RELATION]
    asked, last, shown = set(), [], []  # pairs of earlier queries; sentences of the last search, and of all searches
    segments = [(f"<question> {question.text} </question>", False)]
    for _ in range(searches):
        new = [(e, r) for e in entities for r in relations if RELATION[r].subject == KIND_OF[e] and (e, r) not in asked]
        if new and rng.random() > 0.1:
            query = rng.choice(new)
            asked.add(query)
        else:
            query = rng.sample(words, rng.choice([1, 2]))
        query = " ".join(query)
        segments.append((f"<think> {rng.choice(THOUGHTS)} </think> <search> {query} </search>", True))
        last = [passage.text for passage in (yield query)]
        segments.append(("<information> " + " ".join(f"doc {text}" for text in last) + " </information>", False))
        shown += last
        entities = list(dict.fromkeys(entities + entities_in(" ".join(last))))
        yield
    choices = entities_in(" ".join(last))
    if rng.random() < 0.4:
        about = [text for text in shown if set(relations) & set(WORD.findall(text))]
        choices = [e for e in entities_in(" ".join(about)) if e not in words] or choices
    elif rng.random() < 0.1:
        choices = entities
    answer = rng.choice(choices or entities)
    yield [*segments, (f"<think> {rng.choice(THOUGHTS)} </think> <answer> {answer} </answer>", True)]

def poor_episodes(questions, search, top_k, rng):
    """Conversations of a poor policy, one a question, side by side -> episodes. The number of searches does not depend
    on the question. With three passages a search 0.24 of one-hop and 0.05 of two-hop questions are answered right."""
    searches = [rng.choices([0, 1, 2, 3], [1, 2, 2, 1])[0] for _ in questions]
    talks = [_poor_policy(question, count, rng) for question, count in zip(questions, searches)]
    for turn in range(3):
        searching = [talk for talk, count in zip(talks, searches) if count > turn]
        for talk, passages in zip(searching, search([next(talk) for talk in searching], top_k)):
            talk.send(passages)
    return [next(talk) for talk in talks]

@dataclass(frozen=True)
class BaseConfig:
    """How the base model is made. The cache names its folder after a hash of these values."""

    seed: int = 0
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    reading_steps: int = 420  # phase 1: passages, questions, answers
    policy_steps: int = 480  # phase 2: the format, as a poor policy writes it, mixed with reading
    reading_share: float = 0.4  # share of reading steps in phase 2
    batch_size: int = 32
    lr: float = 2e-3
    top_k: int = 3  # passages a search: a base model cannot read blocks of a length that it has never seen
    context_weight: float = 0.02  # loss weight of prompts and passages: random names cannot be predicted
    version: int = 5  # raised when this file changes what the base model sees

def _batch(tokenizer, episodes, context_weight):
    """Episodes -> ids_BL, positions_BL, weights_BL: 1 on what the policy wrote, context_weight on the rest, 0 on
    padding (right) and where an episode begins. Short episodes share a row, which leaves less padding. Positions start
    again at 0 with each of them; that is how transformers knows to keep attention within an episode."""
    encoded = iter(tokenizer([text for e in episodes for text, _ in e], add_special_tokens=False)["input_ids"])
    packed = []  # rows of (id, position, weight)
    for tokens in sorted(([(i, own) for _, own in e for i in next(encoded)] for e in episodes), key=len, reverse=True):
        room = next((row for row in packed if len(row) + len(tokens) <= len(packed[0])), None)
        if room is None:
            packed.append(room := [])
        room += [(i, at, (1.0 if own else context_weight) * (at > 0)) for at, (i, own) in enumerate(tokens)]
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True)
    return [pad([[token[k] for token in row] for row in packed]) for k in range(3)]

def train_base_model(config):
    """BaseConfig -> (model, tokenizer). Next-token prediction on worlds that are drawn afresh every 40 steps. Phase 1
    reads one passage, then two, then three; the next level begins at 60 % right answers. Without this curriculum, a
    model so small never forms the circuit that copies an answer out of a passage."""
    torch.manual_seed(config.seed)
    rng, tokenizer = random.Random(f"base {config.seed}"), make_tokenizer()
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.hidden // 2, bos_token_id=None,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
        head_dim=config.hidden // config.heads, tie_word_embeddings=True, initializer_range=0.05, eos_token_id=0,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, pad_token_id=0,
    ))  # fmt: skip
    for layer in model.model.layers:  # W_O = W_V^T / 2: a head begins by copying what it attends to (arXiv 2305.09828)
        layer.self_attn.o_proj.weight.data.copy_(layer.self_attn.v_proj.weight.T / 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    answer_tags = torch.tensor(tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"]))
    level, accuracy = 1, 0.0  # passages of a reading episode; running share of right answers at this level
    for step in tqdm(range(config.reading_steps + config.policy_steps), desc="base model"):
        if step % 40 == 0:
            world = make_world(f"warm-up {config.seed} {step}", parts=1)
            facts = sorted(world.facts)
            if step + 40 > config.reading_steps:
                questions = rng.choices(world.train, k=40 * config.batch_size)
                episodes = poor_episodes(questions, build_index(world.passages).search, config.top_k, rng)
        reading = step < config.reading_steps or rng.random() < config.reading_share
        if reading:
            batch = [reading_episode(world, facts, rng.randint(1, level), rng) for _ in range(config.batch_size)]
        else:
            batch = episodes[step % 40 * config.batch_size :][: config.batch_size]
        ids_BL, positions_BL, weights_BL = _batch(tokenizer, batch, config.context_weight)
        # PITFALL: with a cache, positions that start again mean nothing: episodes would see each other.
        logits_BTV = model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits[:, :-1]
        targets_BT, weights_BT = ids_BL[:, 1:], weights_BL[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        loss = (losses.view_as(weights_BT) * weights_BT).sum() / weights_BT.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # The learning rate: linear warm-up over 40 steps; in the second phase a cosine to zero.
        decay = max(0.0, (step - config.reading_steps) / config.policy_steps)
        rate = min(1.0, (step + 1) / 40) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * decay))))
        optimizer.param_groups[0]["lr"] = config.lr * rate
        optimizer.step()
        optimizer.zero_grad()
        if reading:
            names_BT = (weights_BT == 1.0) & ~torch.isin(targets_BT, answer_tags)
            right = (logits_BTV[names_BT].argmax(-1) == targets_BT[names_BT]).float().mean().item()
            accuracy += 0.2 * (right - accuracy)
            if accuracy > 0.6 and level < 3:
                level, accuracy = level + 1, 0.0
    return model.eval(), tokenizer

def base_model(config, cache):
    """BaseConfig, cache folder -> (model, tokenizer, their folder). The first call makes it, whole or not at all."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(cache) / f"base-{digest}"
    if not folder.exists():
        model, tokenizer = train_base_model(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="base-unfinished-", dir=folder.parent) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            Path(unfinished, "base_config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
            if not folder.exists():  # else another run has finished the same model in the meantime
                Path(unfinished).rename(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder

# ----- 3. Real questions and passages -----

DATASETS = {  # set of the FlashRAG collection -> (its training split, the split that the paper evaluates on)
    "nq": ("train", "test"), "triviaqa": ("train", "test"), "popqa": (None, "test"), "hotpotqa": ("train", "dev"),
    "2wikimultihopqa": ("train", "dev"), "musique": ("train", "dev"), "bamboogle": (None, "test"),
}  # fmt: skip
# Files fetched by hand. PITFALL: transformers takes a folder "datasets" on Python's path for the library of that name.
DOWNLOADS = Path("downloads")

def fetch(repo, file, place, kind="dataset"):
    """File of a hub repository -> `place`, or its path in the hub's cache, downloaded if need be. Mistake if not."""
    if place.exists():
        return place
    # Not by hf_hub_url, which raises for a mistyped path, since that is no valid name of a repository.
    url = f"{huggingface_hub.constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}/resolve/main/{file}"
    try:
        found = huggingface_hub.try_to_load_from_cache(repo, file, repo_type=kind)
        if not isinstance(found, str):
            # Ask whether it is there: without a network, the download itself would try for 20 seconds, with warnings.
            huggingface_hub.get_hf_file_metadata(url)
            found = huggingface_hub.hf_hub_download(repo, file, repo_type=kind, tqdm_class=tqdm)
        return Path(found)
    except (OSError, ValueError, HTTPError) as error:  # no network, no such file, no permission, a full disk
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}".replace(url, "it")
        raise Mistake(f"{place} is not there and cannot be downloaded: get {url} and put it there ({why})") from None

def question_files(spec, split):
    """FILE, or names of DATASETS joined by "+"; split "train" or "eval" -> list of Paths, fetched if need be. A file
    wins over a set of the same name. Mistake for an unknown name, a missing split, a file out of reach."""
    if Path(spec).is_file():
        return [Path(spec)]
    official = {name: splits[split == "eval"] for name, splits in DATASETS.items() if splits[split == "eval"]}
    if unknown := [name for name in spec.split("+") if name not in official]:  # all of them before the first download
        raise Mistake(f"cannot read {spec}: no file, and {unknown[0]!r} is none of the sets {', '.join(official)}")
    files = [f"{name}/{official[name]}.jsonl" for name in spec.split("+")]
    return [fetch("RUC-NLPIR/FlashRAG_datasets", file, DOWNLOADS / file) for file in files]

def load_data(spec, split):
    """As question_files -> list[Question]. In joined sets an id begins with the name of its set: "nq/test_0"."""
    files = question_files(spec, split)
    sets = [f"{name}/" for name in spec.split("+")] if len(files) > 1 else [""]
    return [replace(q, id=name + q.id) for name, file in zip(sets, files) for q in load_questions(file)]

def load_questions(path):
    """JSON lines `{"id": str, "question": str, "golden_answers": [str, ...]}` (FlashRAG), maybe with `"metadata":
    {"hops": int}` -> list[Question]. Mistake, with file and line, if a line is anything else or has no answer."""
    questions = []
    for number, _, line in numbered_lines(path):
        try:
            record = json.loads(line)
            text, gold = whole_characters(record["question"]), record["golden_answers"]
            if not (text.strip() and gold and isinstance(gold, list) and all(isinstance(a, str) for a in gold)):
                raise ValueError("empty, or of another type")
            id, hops = str(record.get("id", number)), int((record.get("metadata") or {}).get("hops", 0))
            questions.append(Question(whole_characters(id), text, tuple(map(whole_characters, gold)), hops))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            needed = '"question" (a string) and "golden_answers" (a list of strings, at least one)'
            raise Mistake(f"{path} line {number}: a question needs {needed}; {error!r:.99}") from None
    if not questions:
        raise Mistake(f"{path}: no questions in this file")
    return questions

def fixed_sample(questions, limit):
    """At most `limit` questions (0: all), the same at every call, and as many of one number of hops as of another."""
    if not limit or limit >= len(questions):
        return list(questions)
    kinds, rng, picked = sorted({q.hops for q in questions}), random.Random("sample 0"), []
    for i, hops in enumerate(kinds):
        of_kind, count = [q for q in questions if q.hops == hops], limit // len(kinds) + (i < limit % len(kinds))
        picked += rng.sample(of_kind, min(count, len(of_kind)))
    return picked

def paragraphs(record):
    """A record of a question file -> list of the paragraphs that came with the question, each `"Title"\\ntext`.
    HotpotQA: metadata.context = {"title": [...], "sentences": [[...], ...]}, where 2WikiMultiHopQA says "content".
    MuSiQue: metadata.question_decomposition = [{..., "support_paragraph": {"title", "paragraph_text"}}, ...]."""
    metadata = record.get("metadata") or {}
    context = metadata.get("context") or {}
    titled = zip(context.get("title") or [], context.get("sentences") or context.get("content") or [], strict=True)
    found = [(title, " ".join(part.strip() for part in parts)) for title, parts in titled]
    supporting = [step.get("support_paragraph") for step in metadata.get("question_decomposition") or []]
    found += [(paragraph["title"], paragraph["paragraph_text"].strip()) for paragraph in supporting if paragraph]
    return [f'"{title}"\n{text}' for title, text in found if text.strip()]

def contexts_corpus(files, folder):
    """Question files -> a corpus in `folder`, named after the files' paths, sizes and times: each different paragraph
    of their questions, in order. Mistake for a file in which no question brings one."""
    files = list(dict.fromkeys(Path(file).absolute() for file in files))
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    corpus = Path(folder) / f"contexts-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:10]}.jsonl"
    if corpus.exists():
        return corpus
    corpus.parent.mkdir(parents=True, exist_ok=True)
    seen = set()  # HotpotQA's file has 600 MB: we read it by lines and keep 64 bits a paragraph
    with written_whole(corpus) as out:
        for file in files:
            bare = True
            for number, _, line in numbered_lines(file):
                try:
                    found = [whole_characters(contents) for contents in paragraphs(json.loads(line))]
                except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                    raise Mistake(f"{file} line {number}: paragraphs in an unknown form ({error!r:.99})") from None
                bare = bare and not found
                for contents in found:
                    if hash(contents) not in seen:
                        out.write(json.dumps({"id": str(len(seen)), "contents": contents}, ensure_ascii=False) + "\n")
                        seen.add(hash(contents))
            if bare:
                raise Mistake(f"{file}: no question brings paragraphs; give a --corpus: wiki18, FILE, DIR or a server")
    return corpus

def resolve_corpus(spec, files, encoder="hashed", folder="outputs/corpora"):
    """--corpus -> what retrieval.engine_from takes. `contexts` (the questions' paragraphs) and `wiki18` (the official
    corpus) become an index in a folder, built at the first call: Flat and IVF-SQ8 over vectors of `encoder`, or BM25
    with "bm25:" in front. Anything else (FILE, DIR, bm25:..., http://...) is returned as it is."""
    name = spec.removeprefix("bm25:")
    if name not in ("contexts", "wiki18") or Path(name).exists():
        return spec
    encoder = encoder if name == spec else "bm25"
    if name == "contexts" and not files:
        raise Mistake("--corpus contexts is made of the questions' paragraphs: give a question file, too (--data)")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder) / ".lock"):  # two runs that begin together: the second waits for the first one's index
        corpus = contexts_corpus(files, folder) if name == "contexts" else DOWNLOADS / "wiki18" / "wiki-18.jsonl"
        output = Path(folder) / (f"{corpus.stem}-" + re.sub(r"[\\/:]+", "--", encoder.strip("/")))
        if not (output / "manifest.json").exists():
            if not corpus.exists():  # wiki18, packed
                corpus = fetch("PeterJinGo/wiki-18-corpus", "wiki-18.jsonl.gz", corpus.with_name("wiki-18.jsonl.gz"))
                print(f"unpacking {corpus}: 14 GB")
            build(corpus, output, {"encoder": encoder}, "Flat" if name == "contexts" else "IVF-SQ8")
    return f"bm25:{output}" if encoder == "bm25" else str(output)

# ----- 4. Checkpoints, and what a user can get wrong -----

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line, without the page of usage above it."""

    def error(self, message):
        raise Mistake(f"{message} (--help lists the flags)")

def run_main(main):
    """Call a script's main(). A Mistake, a file that cannot be read or written, a search engine that is gone: one line,
    exit code 2. Any other exception is a bug of ours and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a pipe on Windows cannot encode every character of a passage
        sys.stdout.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except (Mistake, SearchFailed, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"{Path(sys.argv[0]).name}: {'interrupted' if interrupted else error}", file=sys.stderr)
        sys.exit(130 if interrupted else 2)

DTYPES = ("auto", "bf16", "fp32")  # --dtype

def weights_dtype(wish, device):
    """--dtype, device -> torch dtype. "auto": bf16 on a GPU that has it, else fp32; fp16 would need a scaled loss."""
    on_card = str(device).startswith("cuda")
    has_bf16 = not on_card or torch.cuda.is_bf16_supported(including_emulation=False)
    if wish != "fp32" and not has_bf16:
        print("this GPU has no bf16: weights are fp32, twice the memory (adapters fit: --lora-rank 32)")
    return torch.bfloat16 if has_bf16 and (wish == "bf16" or (wish == "auto" and on_card)) else torch.float32

def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1])

def checkpoints(run, file=""):
    """Folder of a run -> its checkpoints that have `file`, the newest last. Copies under longer names do not count."""
    found = [c for c in Path(run).glob("checkpoint-*") if c.name.removeprefix("checkpoint-").isdigit()]
    return sorted((c for c in found if (c / file).exists()), key=step_of)

def newest(path):
    """Folder of a run -> its newest checkpoint; whatever else names a model -> itself. For command lines: what a run or
    an evaluation records is then the checkpoint, which stays what it is when the run goes on."""
    return str([path, *checkpoints(path)][-1])

def load_checkpoint(path, device="cpu", dtype=torch.float32):
    """Folder, hub id or GGUF file of a causal LM with a linear head -> (policy, tokenizer). Mistake if it is none."""
    packed = Path(path).suffix == ".gguf"
    if Path(path).exists() and not packed and not (Path(path) / "config.json").exists():
        raise Mistake(f"{path} holds no model (no config.json); give a folder like outputs/run-1")
    where, file = (Path(path).parent, {"gguf_file": Path(path).name}) if packed else (path, {})
    try:
        if not packed:  # asks once; transformers tries for 30 seconds
            fetch(path, "config.json", Path(path) / "config.json", "model")
        policy = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **file)
        tokenizer = AutoTokenizer.from_pretrained(where, **file)
    except ImportError as error:
        why = "two more packages: pip install gguf accelerate" if packed else f"another package: {error}"
        raise Mistake(f"{path}: reading it takes {why}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise Mistake(f"no causal LM could be loaded from {path}: {str(error).strip().splitlines()[0]}") from None
    if packed:  # its weights are unpacked now, but transformers would refuse to save a model that came from such a file
        config, state = policy.config, policy.state_dict()
        config.__dict__.pop("quantization_config", None)
        # PITFALL: .to(bfloat16) would round the frequencies of the positions, too.
        policy = AutoModelForCausalLM.from_config(config, dtype=policy.dtype)
        policy.load_state_dict(state)
    if not hasattr(policy.config, "hidden_size"):
        raise Mistake(f"{path}: a {type(policy).__name__} is not a model of text alone, which is all we support")
    policy = policy.to(device).eval()
    # Rollout and training compute logits as head(hidden). A model that scales or caps its logits is another policy.
    ids, head = torch.arange(4, device=device)[None], policy.get_output_embeddings()
    with torch.no_grad():
        plain = head(policy.base_model(input_ids=ids).last_hidden_state)
        if not torch.allclose(plain, policy(input_ids=ids).logits, atol=1e-3, rtol=1e-2) or head.bias is not None:
            raise Mistake(f"{path}: its logits are not one linear map of its hidden states, which is all we support")
    return policy, tokenizer

def load_settings(checkpoint, real=False):
    """Checkpoint -> (Settings of its conversations, the rest of search_r1.json as a dict: world_seed, corpus, encoder,
    method, base). Without that file: the paper's settings if it is asked about `real` data, else the tiny world's."""
    file = Path(checkpoint) / "search_r1.json"
    try:
        saved = json.loads(file.read_text()) if file.exists() else asdict(Settings() if real else TINY_SETTINGS)
        settings = Settings(**{f.name: saved.pop(f.name, f.default) for f in fields(Settings)})  # one may be younger
    except (ValueError, TypeError, AttributeError) as error:
        raise Mistake(f"{file} is damaged: {error}; without it the conversation has default settings") from None
    about = {"world_seed": 0, "corpus": None, "encoder": "hashed", "base": None}
    return settings, about | {"method": "search-r1" if settings.do_search else "r1"} | saved

def task(world_seed, corpus=None, questions=None, split="eval", encoder="hashed", others=(), device=None):
    """-> (questions, search engine, World or None). Without a corpus: the tiny world's held-out questions. With one:
    those of a file, or of `split` of named sets. others: more question files for `contexts`; device: of the engine."""
    if not corpus:
        world = make_world(world_seed)
        return world.test, build_index(world.passages), world
    asked = load_data(questions, split) if questions else []  # first: building an index may take hours
    files = [*question_files(questions, split), *others] if questions else others
    try:
        return asked, engine_from(resolve_corpus(corpus, files, encoder), device), None
    except ValueError as error:  # a line that is no passage, an index that does not fit its passages, no such encoder
        raise Mistake(str(error)) from None
