"""
Text to train and to measure on, from what pip can fetch: the documentation of three projects.

    python experiments/text.py                # out/text/train.jsonl, out/text/held_out.jsonl

Trained on: Django's and SQLAlchemy's, 12 MB of English with code. Held out: SymPy's, on another
subject, by other authors. The versions are fixed, so the text is the same for everybody. Answers of
the model itself would be nearer to what it writes, but on two cores they cost more than training.

A file is cut at blank lines into documents of about 1,400 tokens or more: a retrofit takes the
beginning of a document that is longer than its sequences, and drops the rest.
"""

import json
import random
import re
import tarfile
import tempfile
from pathlib import Path

import shared

from common import run_script

TRAINING = {
    "django==5.2": r"/docs/(?!releases).*\.txt$",
    "sqlalchemy==2.0.41": r"/doc/build/(?!changelog).*\.rst$",
}
HELD_OUT = {"sympy==1.13.3": r"/doc/src/.*\.(rst|md)$"}
CHARACTERS = 6000  # of a document at least: about 1,400 tokens
QUESTIONED = 3000  # of one that ends with questions: so it fits into 1,024 tokens with them
ATTRIBUTES = ("access code", "phone number", "capital", "director", "weight", "room number",
              "price", "birthplace", "nickname", "account", "port", "best friend", "height",
              "address")
SYLLABLES = "ar be chi do el fa gri ho in ju ka lo mar ne ol pre qui ro sa tu vel wi yo zan".split()


def files_of(package, pattern):
    """The texts of a source distribution's files whose names match, in order."""
    with tempfile.TemporaryDirectory() as folder:
        archive = shared.download(package, folder, "--no-binary", ":all:", "--no-build-isolation")
        with tarfile.open(archive) as opened:
            names = sorted(m.name for m in opened if m.isfile() and re.search(pattern, m.name))
            return [opened.extractfile(name).read().decode("utf-8", "replace") for name in names]


def documents_of(text):
    """A file's paragraphs, joined to documents; a rest that is too short is dropped."""
    document = ""
    for paragraph in re.split(r"\n\s*\n", text):
        document += paragraph.rstrip() + "\n\n"
        if len(document) >= CHARACTERS:
            yield document
            document = ""


def with_questions(document, rng):
    """The beginning of a document with facts strewn in, and questions about them at its end."""
    name = lambda: "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
    asked = [(rng.choice(ATTRIBUTES), name()) for _ in range(rng.randint(3, 6))]
    paragraphs = document[:QUESTIONED].rsplit("\n\n", 1)[0].split("\n\n")
    questions = []
    for attribute, whose in asked:
        value = rng.choice((str(rng.randrange(10 ** rng.randint(2, 7))), name()))
        place = rng.randint(0, len(paragraphs))
        paragraphs.insert(place, f"The {attribute} of {whose} is {value}.")
        questions.append(f"Question: What is the {attribute} of {whose}?\nAnswer: {value}")
    rng.shuffle(questions)
    return "\n\n".join(paragraphs + questions)


def write_documents(packages, file, questions_every=None):
    texts = [text for package, pattern in packages.items() for text in files_of(package, pattern)]
    documents = [document for text in texts for document in documents_of(text)]
    rng = random.Random(0)
    if questions_every:
        for n in range(0, len(documents), questions_every):
            documents[n] = with_questions(documents[n], rng)
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    millions = sum(map(len, documents)) / 1e6
    print(f"{file}: {len(documents):,} documents, {millions:.1f} million characters")


def main():
    p = shared.parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("out/text"))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_documents(TRAINING, args.out / "train.jsonl", questions_every=10)
    write_documents(HELD_OUT, args.out / "held_out.jsonl")


if __name__ == "__main__":
    run_script(main)
