"""Questions and passages: the embedded tiny world with its base model, and files of real ones.

The paper trains Qwen2.5 on NQ (mostly one hop) and HotpotQA (two hops) against 21 million Wikipedia passages. The
tiny world has the same shape at a size that two CPU cores learn in minutes: invented people, cities, companies and
countries, one passage a fact, one-hop and two-hop questions about them. It comes in two parts that share no entity,
so nothing learned by heart on the training questions helps on the test questions; one index holds both parts.

What stands in for Qwen is a 0.4 M-parameter transformer, made here from random weights in about a minute. It is taught
two things and no third: to READ (given passages and a question, name the answer) and the FORMAT (the tags, in the
hand of a poor policy that draws its number of searches, its queries and most of its answers at random). It never sees
a right episode, and never the world on which reinforcement learning will train it. Everything else, what to ask, when
to ask again, which passage to believe, has to come from the reward.

    Question, load_questions     a question, and the FlashRAG file format
    load_data                    FILE, or real sets by name: nq+hotpotqa
    resolve_corpus               FILE, DIR, http://..., or `contexts` and `wiki18`, which become an index
    export_rows                  the same questions for trainers of many GPUs: verl, SkyRL
    make_world                   the tiny world (people, places, facts, wordings)
    make_tokenizer               word-level, an ordinary Hugging Face tokenizer
    oracle_exact_match           what a perfect policy would score: the ceiling that the engine sets
    reading_batch, poor_episodes what the base model is shown
    base_model                   made on the spot and cached

    python data.py [--world-seed 0]      prints what a world looks like and what its base model is shown (two seconds)
    python data.py export verl --data nq+hotpotqa --output train.json
"""

import argparse
import ast
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HTTPError
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from retrieval import WORD, Passage, build, build_index

# ----- 1. Questions -----


@dataclass(frozen=True)
class Question:
    """A question and every answer that counts as right. `path` is known for the tiny world only: (entity, relation of
    the first hop, relation of the second hop); its length says how many searches an honest answer takes."""

    id: str
    question: str
    golden_answers: tuple
    path: tuple = ()

    @property
    def hops(self):
        return max(0, len(self.path) - 1)


def load_questions(path):
    """Read JSON lines `{"id": str, "question": str, "golden_answers": [str, ...]}` (FlashRAG) -> list[Question].

    ValueError, naming file and line, for a line that is no JSON object, lacks a key or has no answer.
    """
    questions = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not a JSON object ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get("question"), str) or not record["question"].strip():
                raise ValueError(f'{where}: a question needs "question" (a string)')
            answers = record.get("golden_answers")
            if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
                raise ValueError(f'{where}: a question needs "golden_answers" (a list of strings, at least one)')
            questions.append(Question(str(record.get("id", number)), record["question"], tuple(answers)))
    if not questions:
        raise ValueError(f"{path}: no questions in this file")
    return questions


# ----- 2. The tiny world -----


@dataclass(frozen=True)
class Relation:
    """One kind of fact. Every wording, of passages and of questions, holds the word that names the relation."""

    name: str
    subject: str
    object: str
    nouns: tuple  # how a question asks for it: "the city where {x} lives"
    facts: tuple  # how a passage states it, {x} the subject, {y} the object


def _of(name, subject, object):
    return Relation(
        name,
        subject,
        object,
        (f"the {name} of {{x}}", f"the {name} belonging to {{x}}"),
        (f"the {name} of {{x}} is {{y}}.", f"{{y}} is the {name} of {{x}}."),
    )


RELATIONS = [
    Relation(
        "born",
        "person",
        "city",
        ("the city where {x} was born", "the place in which {x} was born"),
        ("{x} was born in {y}.", "{y} is the city where {x} was born."),
    ),
    Relation(
        "lives",
        "person",
        "city",
        ("the city where {x} lives", "the place in which {x} lives"),
        ("{x} lives in {y}.", "{y} is the city where {x} lives."),
    ),
    Relation(
        "works",
        "person",
        "company",
        ("the company where {x} works", "the company for which {x} works"),
        ("{x} works for {y}.", "{y} is the company where {x} works."),
    ),
    _of("teacher", "person", "person"),
    _of("country", "city", "country"),
    _of("mayor", "city", "person"),
    _of("port", "city", "city"),
    Relation(
        "based",
        "company",
        "city",
        ("the city where {x} is based", "the place in which {x} is based"),
        ("{x} is based in {y}.", "{y} is the city where {x} is based."),
    ),
    _of("founder", "company", "person"),
    _of("supplier", "company", "company"),
    _of("capital", "country", "city"),
    _of("leader", "country", "person"),
    _of("protector", "country", "country"),
]
RELATION = {r.name: r for r in RELATIONS}
OPENERS = {"person": ("who is {np}?", "can you name {np}?"), "thing": ("what is {np}?", "can you name {np}?")}

# A part of the world draws its entities from these pools; a name is one token and never two entities.
POOL = {"person": 320, "city": 110, "company": 110, "country": 70}
PART = {"person": 150, "city": 50, "company": 50, "country": 30}
ENDING = {"person": "", "city": "ton", "company": "corp", "country": "land"}


def _names():
    """The pools of names, the same in every world: stems of two or three syllables, no stem used twice."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng, seen, pools = random.Random("names"), set(), {}
    for kind, size in POOL.items():
        pools[kind] = []
        while len(pools[kind]) < size:
            stem = "".join(rng.sample(syllables, 3 if kind == "person" else 2))
            if stem not in seen:
                seen.add(stem)
                pools[kind].append(stem + ENDING[kind])
    return pools


NAMES = _names()
KIND_OF = {name: kind for kind, names in NAMES.items() for name in names}


@dataclass
class World:
    passages: list  # of Passage, of every part
    facts: dict  # (relation name, subject) -> object
    questions: list  # one list[Question] a part

    @property
    def train(self):
        return self.questions[0]

    @property
    def test(self):
        return self.questions[-1]


def make_world(seed, parts=2):
    """seed (int or str) -> World of `parts` disjoint parts, each with 990 facts, as many one-hop questions and about
    3240 two-hop ones. Facts and questions stay inside their part: no entity of one part is ever mentioned in another.
    """
    rng = random.Random(f"world {seed}")
    pools = {kind: rng.sample(names, len(names)) for kind, names in NAMES.items()}
    passages, facts, questions = [], {}, []
    for part in range(parts):
        members = {kind: pools[kind][part * n : (part + 1) * n] for kind, n in PART.items()}
        own = {}
        for relation in RELATIONS:
            for subject in members[relation.subject]:
                object = rng.choice([e for e in members[relation.object] if e != subject])
                own[relation.name, subject] = object
                passages.append(Passage(str(len(passages)), subject, rng.choice(relation.facts).format(x=subject, y=object)))
        facts |= own
        questions.append(_questions(own, rng, part))
    rng.shuffle(passages)
    return World(passages, facts, questions)


def _questions(facts, rng, part):
    """Every fact as a one-hop question, every chain of two facts as a two-hop one, in random wordings."""
    questions = []

    def ask(noun_phrase, answer, path):
        opener = rng.choice(OPENERS["person" if KIND_OF[answer] == "person" else "thing"])
        questions.append(Question(f"{part}-{len(questions)}", opener.format(np=noun_phrase), (answer,), path))

    for (name, subject), object in facts.items():
        first = RELATION[name]
        ask(rng.choice(first.nouns).format(x=subject), object, (subject, name))
        for second in RELATIONS:
            # A chain that leads back to where it started would be answered by copying from the question.
            if second.subject == first.object and facts[second.name, object] != subject:
                noun = rng.choice(second.nouns).format(x=rng.choice(first.nouns).format(x=subject))
                ask(noun, facts[second.name, object], (subject, name, second.name))
    return questions


def draw_questions(questions, count, two_hop_share, rng):
    """Draw `count` training questions of the tiny world: first the hops, then a relation (or pair) uniformly, then one
    question of it. Drawn uniformly, six in ten one-hop questions would be about people, and the policy would learn
    "one search" or "two searches" by relation and not by question."""
    by_type = {}
    for question in questions:
        by_type.setdefault(question.path[1:], []).append(question)
    types = {hops: sorted(t for t in by_type if len(t) == hops) for hops in (1, 2)}
    return [rng.choice(by_type[rng.choice(types[2 if rng.random() < two_hop_share else 1])]) for _ in range(count)]


def oracle_exact_match(world, questions, search, top_k):
    """Exact match of a policy that always asks "entity relation" of the right entity and reads without error.

    It is the ceiling that the engine sets; below 1.00 no training could reach the top. Measure it before training.
    """
    entities, right = [q.path[0] for q in questions], [True] * len(questions)
    for hop in range(1, max(len(q.path) for q in questions)):
        rows = [i for i, q in enumerate(questions) if hop < len(q.path)]
        found = search([f"{entities[i]} {questions[i].path[hop]}" for i in rows], top_k)
        for i, passages in zip(rows, found):
            relation, answer = questions[i].path[hop], world.facts[questions[i].path[hop], entities[i]]
            sentences = {form.format(x=entities[i], y=answer) for form in RELATION[relation].facts}
            right[i] &= any(passage.text in sentences for passage in passages)
            entities[i] = answer
    return sum(right) / len(right)


# ----- 3. Its tokenizer -----

TAGS = ["<question>", "</question>"] + [
    f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")
]
THOUGHTS = ["i need to search", "not sure", "now i know", ""]
# A conversation of the tiny world: at most three searches of three passages, fourteen tokens a turn.
TINY_SETTINGS = {
    "max_turns": 3,
    "max_new_tokens": 14,
    "max_obs_length": 64,
    "max_length": 256,
    "top_k": 3,
    "do_search": True,
    "invalid_message": "paper",
}
RETHINK_WORDS = "my action is not correct. let me rethink."

# The prompt is the official one [Table 1], 100 words of instructions that 0.4 M parameters cannot use. Every model has
# a chat template to bring a message into the form it was trained on; this one keeps the question, and passages that a
# prompt brings along (RAG) in the place where the base model learned to read them, and drops the rest.
CHAT_TEMPLATE = (
    "{%- set asked, _, context = messages[-1]['content'].split('Question: ')[-1].partition(' Context: ') -%}"
    "{{ ('<information> ' + context.strip() + ' </information> ' if context else '') + '<question> ' + asked.strip() + ' </question>' }}"
)


def make_tokenizer():
    """A word-level tokenizer over the words of the tiny world: 669 tokens, tags and names one token each.

    It lower-cases, splits off punctuation, and reads the head `Doc 1(Title: "...")` of an official passage as the one
    word `doc`, because in this world a passage always names what it is about, and the colon of a note ("born: luguton") as `is`. Tags are added tokens, found in the raw
    text before anything else. Saved next to a Qwen3Config, AutoTokenizer loads it back as it is.
    PITFALL: next to a Qwen2Config, AutoTokenizer silently builds a Qwen2 tokenizer instead.
    """
    templates = [t for r in RELATIONS for t in r.nouns + r.facts] + [o for pair in OPENERS.values() for o in pair]
    words = sorted(
        {w for text in templates + THOUGHTS + [RETHINK_WORDS] for w in re.findall(r"\w+|[^\w\s]+", re.sub(r"{\w+}", "", text))}
        | {"doc"}
    )
    names = [name for pool in NAMES.values() for name in pool]
    vocabulary = ["<eos>", "<unk>"] + words + names
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r'Doc \d+\(Title: "[^"]*"\)'), "doc"),
            normalizers.Replace(Regex(r":\s"), " is "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# ----- 4. What the base model is shown -----


@dataclass(frozen=True)
class BaseConfig:
    """How the base model is made; the cache's folder is named after a hash of these values."""

    seed: int = 0
    hidden: int = 128
    layers: int = 2
    heads: int = 8
    reading_steps: int = 420  # phase 1: passages, questions, answers
    policy_steps: int = 480  # phase 2: the format, with a poor policy; 40 % reading batches mixed in
    reading_share: float = 0.4
    batch_size: int = 32
    lr: float = 2e-3
    top_k: int = 3  # passages a search; reinforcement learning with another K meets blocks of a length never read
    context_weight: float = 0.02  # loss weight of prompts and passages: random names cannot be predicted
    version: int = 3  # raised when this file changes what the base model sees


def reading_episode(world, facts, documents, rng):
    """Some passages, then a question and its answer for every one of them, as [(text, loss weight is 1)].

    Half of the other passages share the first one's entity, a third its relation: reading means telling these apart.
    """
    relation, subject = rng.choice(facts)
    chosen = {(relation, subject)}
    while len(chosen) < documents:
        luck = rng.random()
        same = [r.name for r in RELATIONS if r.subject == KIND_OF[subject]]
        pick = (rng.choice(same), subject) if luck < 0.5 else rng.choice(facts)
        if 0.5 <= luck < 0.8:
            pick = rng.choice([f for f in facts if f[0] == relation])
        chosen.add(pick)
    chosen = sorted(chosen)
    rng.shuffle(chosen)
    sentences = [rng.choice(RELATION[r].facts).format(x=s, y=world.facts[r, s]) for r, s in chosen]
    segments = [("<information> " + " ".join(f"doc {s}" for s in sentences) + " </information>", False)]
    for name, subject in rng.sample(chosen, len(chosen)):
        noun = rng.choice(RELATION[name].nouns).format(x=subject)
        answer = world.facts[name, subject]
        opener = rng.choice(OPENERS["person" if KIND_OF[answer] == "person" else "thing"])
        segments += [(f"<question> {opener.format(np=noun)} </question>", False), (f"<answer> {answer} </answer>", True)]
    return segments


def poor_episodes(questions, search, top_k, rng):
    """Episodes of a policy that knows the tags and little else, one a question, as [(text, the policy wrote it)].

    The number of searches is drawn from 0..3 with weights 1, 2, 2, 1 whatever the question. A query pairs a random
    entity of the context with a random relation word of the question that can be said of such an entity (no pair
    twice); one query in ten is one or two random words of the question. The answer is a random entity of the last
    passages; in four episodes of ten, of some passage that holds some relation word of the question. Thoughts are a
    random phrase. With three passages a search this policy is right in 0.26 / 0.07 of one-hop / two-hop questions.
    """
    episodes = []
    for question in questions:
        words = WORD.findall(question.question)
        episodes.append(
            {
                "segments": [(f"<question> {question.question} </question>", False)],
                "words": words,
                "relations": [w for w in words if w in RELATION],
                "mentioned": [w for w in words if w in KIND_OF],
                "asked": set(),
                "passages": [],
                "searches": rng.choices([0, 1, 2, 3], [1, 2, 2, 1])[0],
            }
        )

    def think():
        return f"<think> {rng.choice(THOUGHTS)} </think>"

    for turn in range(3):
        searching = [e for e in episodes if e["searches"] > turn]
        queries = []
        for e in searching:
            pairs = [
                (n, r)
                for n in e["mentioned"]
                for r in e["relations"]
                if RELATION[r].subject == KIND_OF[n] and (n, r) not in e["asked"]
            ]
            if pairs and rng.random() > 0.1:
                pair = rng.choice(pairs)
                e["asked"].add(pair)
                queries.append(" ".join(pair))
            else:
                queries.append(" ".join(rng.sample(e["words"], rng.choice([1, 2]))))
            e["segments"].append((f"{think()} <search> {queries[-1]} </search>", True))
        for e, passages in zip(searching, search(queries, top_k)):
            e["passages"] = [p.text for p in passages]
            e["segments"].append(("<information> " + " ".join(f"doc {text}" for text in e["passages"]) + " </information>", False))
            for word in WORD.findall(" ".join(e["passages"])):
                if word in KIND_OF and word not in e["mentioned"]:
                    e["mentioned"].append(word)
            e.setdefault("seen", []).extend(e["passages"])
    for e in episodes:
        asked_about = set(e["words"])
        last = [w for w in WORD.findall(" ".join(e["passages"])) if w in KIND_OF]
        if rng.random() < 0.4:
            about = [text for text in e.get("seen", []) if any(r in WORD.findall(text) for r in e["relations"])]
            last = [w for w in WORD.findall(" ".join(about)) if w in KIND_OF and w not in asked_about] or last
        elif rng.random() < 0.1:
            last = e["mentioned"]
        answer = rng.choice(last or e["mentioned"])
        e["segments"].append((f"{think()} <answer> {answer} </answer>", True))
    return [e["segments"] for e in episodes]


# ----- 5. The base model -----


def _batch(tokenizer, episodes, context_weight):
    """Episodes of text segments -> ids_BL long and weights_BL fp32 (1 on what the policy wrote), right-padded."""
    flat = tokenizer([text for episode in episodes for text, _ in episode], add_special_tokens=False)["input_ids"]
    rows, at = [], 0
    for episode in episodes:
        ids, weights = [], []
        for _, own in episode:
            ids += flat[at]
            weights += [1.0 if own else context_weight] * len(flat[at])
            at += 1
        rows.append((torch.tensor(ids), torch.tensor(weights)))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad([r[0] for r in rows], batch_first=True), pad([r[1] for r in rows], batch_first=True)


def train_base_model(config, progress=True):
    """BaseConfig -> (model, tokenizer). Next-token prediction on worlds drawn afresh every 40 steps.

    Phase 1 teaches to read by curriculum: one passage, then two, then three, the next level at 80 % right answers.
    Without the curriculum a model this small never forms the circuit that copies an answer out of a passage.
    """
    torch.manual_seed(config.seed)
    rng = random.Random(f"base {config.seed}")
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=config.hidden, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            num_key_value_heads=config.heads, head_dim=config.hidden // config.heads, intermediate_size=2 * config.hidden, tie_word_embeddings=True, initializer_range=0.05,
            max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    steps = config.reading_steps + config.policy_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step):  # linear warm-up over 40 steps; in the second phase a cosine to zero
        decay = max(0.0, (step - config.reading_steps) / config.policy_steps)
        return min(1.0, (step + 1) / 40) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * decay))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    level, accuracy = 1, 0.0
    bar = tqdm(range(steps), desc="base model", disable=not progress)
    for step in bar:
        if step % 40 == 0:
            world = make_world(f"warm-up {config.seed} {step}", parts=1)
            facts = sorted(world.facts)
            if step + 40 > config.reading_steps:
                engine = build_index(world.passages)
                questions = rng.choices(world.train, k=40 * config.batch_size)
                episodes = poor_episodes(questions, engine.search, config.top_k, rng)
        reading = step < config.reading_steps or rng.random() < config.reading_share
        if reading:
            batch = [reading_episode(world, facts, rng.randint(1, level), rng) for _ in range(config.batch_size)]
        else:
            at = step % 40 * config.batch_size
            batch = episodes[at : at + config.batch_size]
        ids_BL, weights_BL = _batch(tokenizer, batch, config.context_weight)
        logits_BTV = model(input_ids=ids_BL).logits[:, :-1]
        targets_BT, weights_BT = ids_BL[:, 1:], weights_BL[:, 1:]
        losses_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
        loss = (losses_BT * weights_BT).sum() / weights_BT.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if reading:
            own = weights_BT == 1.0
            names = (
                own
                & (targets_BT != tokenizer.convert_tokens_to_ids("<answer>"))
                & (targets_BT != tokenizer.convert_tokens_to_ids("</answer>"))
            )
            right = (logits_BTV.argmax(-1) == targets_BT)[names].float().mean().item()
            accuracy += 0.2 * (right - accuracy)
            if accuracy > 0.8 and level < 3:
                level, accuracy = level + 1, 0.0
        if progress and step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.2f}, reading {accuracy:.2f} of {level} passages")
    return model.eval(), tokenizer


def base_model(config, cache):
    """BaseConfig, folder of the cache -> (model, tokenizer, its folder); made and saved at the first call.

    The folder appears whole or not at all: it is written beside its final name and then renamed.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(cache) / f"base-{digest}"
    if not folder.exists():
        model, tokenizer = train_base_model(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="base-unfinished-", dir=folder.parent))
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "base_config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        try:
            unfinished.rename(folder)
        except OSError:  # another run finished the same model first
            shutil.rmtree(unfinished)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder


# ----- 6. Real questions -----

# Set of the FlashRAG collection -> (its training split, the split that the paper evaluates on).
DATASETS = {
    "nq": ("train", "test"),
    "triviaqa": ("train", "test"),
    "popqa": (None, "test"),
    "hotpotqa": ("train", "dev"),
    "2wikimultihopqa": ("train", "dev"),
    "musique": ("train", "dev"),
    "bamboogle": (None, "test"),
}
# Where a file that was fetched by hand is looked for. PITFALL: a folder of the name "datasets" in a directory on Python's
# path makes transformers believe that the library of that name is installed.
DOWNLOADS = Path("downloads")


def fetch(repo, file, place):
    """A file of a hub dataset -> its path: `place` if it lies there, else the hub's cache, else a download into it.

    ValueError, one line that says what to put where, if it cannot be had.
    """
    if place.exists():
        return place
    url = huggingface_hub.hf_hub_url(repo, file, repo_type="dataset")
    try:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset", local_files_only=True))
        except FileNotFoundError:
            # Asked first, because the download itself would try for 20 seconds, with a warning each time.
            size = huggingface_hub.get_hf_file_metadata(url).size or 0
            print(f"downloading {url} ({size / 1e6:,.0f} MB)")
            return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset", tqdm_class=tqdm))
    except (OSError, HTTPError) as error:  # no network, offline mode, no such file, no permission, a full disk
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}".replace(url, "it")
        raise ValueError(f"{place} is not there and cannot be downloaded: get {url} and put it there ({why})") from None


def question_files(spec, split):
    """FILE, or names of DATASETS joined by "+"; split "train" or "eval" -> list of Paths, fetched where need be.

    A file wins over a set of the same name. ValueError for an unknown name, a set without that split, a file out of reach.
    """
    if Path(spec).is_file():
        return [Path(spec)]
    wanted = []
    for name in spec.split("+"):  # all names, before any of them is downloaded
        if name not in DATASETS:
            raise ValueError(f"cannot read {spec}: no such file, and {name!r} is none of the sets {', '.join(DATASETS)}")
        kind = DATASETS[name][split == "eval"]
        if kind is None:
            raise ValueError(
                f"{name} has no training split; {', '.join(n for n, (train, _) in DATASETS.items() if train)} have one"
            )
        wanted.append(f"{name}/{kind}.jsonl")
    return [fetch("RUC-NLPIR/FlashRAG_datasets", file, DOWNLOADS / file) for file in wanted]


def load_data(spec, split):
    """As question_files -> list[Question]. Where sets are joined, an id has the set's name before it: "nq/test_0"."""
    files = question_files(spec, split)
    if len(files) == 1:
        return load_questions(files[0])
    return [replace(q, id=f"{name}/{q.id}") for name, file in zip(spec.split("+"), files) for q in load_questions(file)]


# ----- 7. Real passages -----


def write_lines(path, records):
    """Records -> JSON lines; `path` appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def paragraphs(record):
    """A record of a question file -> the paragraphs that came with the question, as pairs (title, text).

    HotpotQA: metadata.context = {"title": [...], "sentences": [[...], ...]}; 2WikiMultiHopQA calls the last key "content".
    MuSiQue: metadata.question_decomposition = [{..., "support_paragraph": {"title", "paragraph_text"}}, ...], which are the
    supporting paragraphs and no others. That file was not at hand: public code that reads it finds a dict there, in one
    case a dict printed as a string. The original MuSiQue has them all, in "paragraphs".
    """
    metadata = record.get("metadata") or {}
    context = metadata.get("context") or {}
    sentences = context.get("sentences") or context.get("content") or []
    for title, parts in zip(context.get("title") or [], sentences, strict=True):
        yield title, " ".join(part.strip() for part in ([parts] if isinstance(parts, str) else parts))
    steps = metadata.get("question_decomposition") or []
    for found in metadata.get("paragraphs") or [step.get("support_paragraph") for step in steps]:
        found = ast.literal_eval(found) if isinstance(found, str) else found
        if found:
            yield found["title"], found["paragraph_text"].strip()


def distinct_paragraphs(files):
    """Question files -> the `contents` of every paragraph that came with a question, each once, in their order.

    Read line by line, with 64 bits kept of each paragraph: HotpotQA's training file has 600 MB. ValueError for a file of which
    no question brings a paragraph.
    """
    seen = set()
    for file in files:
        total = bare = 0
        with open(file, "rb") as lines, tqdm(total=file.stat().st_size, unit="B", unit_scale=True, delay=2, desc="reading") as bar:
            for number, line in enumerate(lines, 1):
                bar.update(len(line))
                if not line.strip():
                    continue
                try:
                    found = list(paragraphs(json.loads(line)))
                except (ValueError, SyntaxError, TypeError, AttributeError, KeyError) as error:
                    raise ValueError(f"{file} line {number}: paragraphs in an unknown form ({error!r})") from None
                total, bare = total + 1, bare + (not found)
                for title, text in found:
                    contents = f'"{title}"\n{text}'
                    if text and hash(contents) not in seen:
                        seen.add(hash(contents))
                        yield contents
        if bare == total:
            raise ValueError(
                f"{file}: no question brings paragraphs, as those of hotpotqa, 2wikimultihopqa and musique do; "
                "give another --corpus: wiki18, a file of passages, an index or a server"
            )
        print(f"{file}: {len(seen):,} paragraphs so far; {bare:,} of {total:,} questions bring none")


def contexts_corpus(files, folder):
    """Question files -> path of a corpus of their paragraphs in `folder`, made at the first call. Its name holds a hash of the
    files' paths, sizes and times."""
    files = list(dict.fromkeys(Path(file).absolute() for file in files))
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    corpus = Path(folder) / f"contexts-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:10]}.jsonl"
    if not corpus.exists():
        corpus.parent.mkdir(parents=True, exist_ok=True)
        write_lines(corpus, ({"id": str(row), "contents": contents} for row, contents in enumerate(distinct_paragraphs(files))))
    return corpus


def resolve_corpus(spec, files, encoder="hashed", folder="outputs/corpora"):
    """--corpus -> what retrieval.engine_from takes.

    `contexts` (the paragraphs of the question files) and `wiki18` (the official corpus) become the folder of an index, made at
    the first call and used again: Flat and IVF-SQ8, over vectors of `encoder`; with bm25: before them, BM25. Anything else
    (FILE, DIR, bm25:..., http://...) is returned as it is.
    """
    name = spec.removeprefix("bm25:")
    if name not in ("contexts", "wiki18") or Path(name).exists():
        return spec
    encoder = encoder if name == spec else "bm25"
    if name == "contexts":
        if not files:
            raise ValueError("--corpus contexts is made of the paragraphs of the questions: give a question file, too (--data)")
        corpus, index = contexts_corpus(files, folder), "Flat"
    else:
        corpus, index = DOWNLOADS / "wiki18" / "wiki-18.jsonl", "IVF-SQ8"
    output = Path(folder) / f"{corpus.stem}-{encoder.strip('/').replace('/', '--')}"
    if not (output / "manifest.json").exists():
        if not corpus.exists():  # wiki18, packed
            corpus = fetch("PeterJinGo/wiki-18-corpus", "wiki-18.jsonl.gz", corpus.with_name("wiki-18.jsonl.gz"))
            print(f"unpacking {corpus}: 14 GB")
        build(corpus, output, {"encoder": encoder}, index)
    return f"bm25:{output}" if encoder == "bm25" else str(output)


# ----- 8. The same questions for trainers of many GPUs -----

# The system message of both examples. Ours has none, the model's chat template decides: --system "" leaves it out.
SYSTEM = "You are a helpful and harmless assistant."


def set_of(file, given=None):
    """Which set a question file is of: as given, or by its folder's name or its own. ValueError if that is none."""
    name = given or next((name for name in (file.parent.name, file.stem) if name in DATASETS), None)
    if name is None:
        raise ValueError(f"{file}: of which set is it? --name with one of {', '.join(DATASETS)}; verl chooses the reward by it")
    return name


def export_rows(questions, trainer, make_prompt, split="train", system=SYSTEM):
    """list of (set, Question) -> rows as verl (trainer "verl") or SkyRL ("skyrl") reads them, one dict a question.

    Columns of verl's examples/data_preprocess/preprocess_search_r1_dataset.py and of SkyRL's
    examples/train/search/searchr1_dataset.py. `metadata` is null: neither reads it. make_prompt: searchr1's, handed in,
    because a copy of the prompt would be a second truth and this file knows only retrieval. verl's search is a tool call.
    """
    for index, (name, question) in enumerate(questions):
        head, mark, text = make_prompt(question.question).partition("Question: ")  # text: with a question mark, if it lacked one
        if trainer == "verl":
            head = head.replace("search>", "tool_call>").replace("information>", "tool_response>")
            text = text.strip()
        content, text = head + mark + text, text.strip()
        source, truth = f"searchR1_{name}", {"target": list(question.golden_answers)}
        tool = {"create_kwargs": {"ground_truth": truth, "question": text, "data_source": source}}
        yield {
            "data_source": source,
            "prompt": [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": content}],
            "ability": "fact-reasoning",
            **({"env_class": "search"} if trainer == "skyrl" else {"agent_name": "tool_agent"}),
            "reward_spec" if trainer == "skyrl" else "reward_model": {"ground_truth": truth, "style": "rule"},
            "extra_info": {
                "index": index,
                "need_tools_kwargs": True,
                "question": text,
                "split": split,
                "tools_kwargs": {"search": tool},
            },
            "metadata": None,
        }


def export(args):
    """python data.py export: question files -> JSON lines, whole or not at all."""
    from searchr1 import make_prompt

    output, suffixes = Path(args.output), [".json"] if args.trainer == "verl" else [".json", ".jsonl"]
    if output.suffix not in suffixes:
        raise ValueError(f"--output {output}: {args.trainer} reads JSON lines from a file that ends in {' or '.join(suffixes)}")
    files = question_files(args.data, args.split)
    if args.name and len(files) > 1:
        raise ValueError(f"--name is for a single file; {args.data} says itself which sets it is of")
    questions = [(set_of(file, args.name), q) for file in files for q in load_questions(file)]
    split = {"train": "train", "eval": "test"}[args.split]  # as both converters call it
    write_lines(output, export_rows(questions, args.trainer, make_prompt, split, args.system))
    print(f"wrote {output}: {len(questions):,} questions for {args.trainer}")


def show_world(seed):
    world, rng = make_world(seed), random.Random(seed)
    engine = build_index(world.passages)
    print(
        f"world {seed}: {len(world.passages)} passages, {len(world.train)} training and {len(world.test)} test questions, {len(make_tokenizer())} tokens"
    )
    for top_k in (1, 3, 5):
        print(
            f"a perfect policy with {top_k} passages a search would score {oracle_exact_match(world, world.test, engine.search, top_k):.4f}"
        )
    for question in rng.sample([q for q in world.test if q.hops == 2], 3):
        print(f"\n{question.question}   -> {question.golden_answers[0]}   path: {' > '.join(question.path)}")
        for passage in engine.search([question.question], 3)[0]:
            print(f"    {passage.text}")
    show = lambda segments: " ".join(text for text, _ in segments)
    print(f"\nthe base model reads:\n    {show(reading_episode(world, sorted(world.facts), 3, rng))}")
    print(f"and imitates a poor policy:\n    {show(poor_episodes([rng.choice(world.train)], engine.search, 3, rng)[0])}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print what a tiny world looks like, and what its base model is shown.")
    parser.add_argument("--world-seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command")
    p = commands.add_parser("export", help="write questions as another trainer reads them")
    p.add_argument("trainer", choices=("verl", "skyrl"))
    p.add_argument("--output", required=True, metavar="FILE", help="JSON lines; ends in .json (SkyRL: or .jsonl)")
    p.add_argument("--data", default="nq+hotpotqa", help="FILE, or sets joined by + (default: nq+hotpotqa, the paper's)")
    p.add_argument("--split", choices=("train", "eval"), default="train", help="of the sets (default: train)")
    p.add_argument("--name", choices=DATASETS, help="which set FILE is of (default: by its name or its folder's)")
    p.add_argument("--system", default=SYSTEM, help=f'system message; "" for none, as train.py asks (default: {SYSTEM})')
    args = parser.parse_args(argv)
    if args.command == "export":
        export(args)
    else:
        show_world(args.world_seed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
