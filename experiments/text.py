"""
Text to train and to measure on, from what pip can fetch: the documentation of three projects.

    python experiments/text.py                # out/text/train.jsonl, out/text/held_out.jsonl

Trained on: Django's and SQLAlchemy's, 12 MB of English with code. Held out: SymPy's, another subject
by other authors. The versions are fixed, so the text is the same for everybody. Not answers of the
model itself, which would be nearer to what it writes: at the speed of two cores they cost more than
the training does.

A file is cut at headings and blank lines into documents of some 1,200 tokens or more, as a retrofit
takes the beginning of a document that is longer than its sequences and drops the rest.
"""

import argparse
import json
import re
import tarfile
import tempfile
from pathlib import Path

from shared import download

from checkpoint import run_script, write_text

TRAINING = {
    "django==5.2": r"/docs/(?!releases).*\.txt$",
    "sqlalchemy==2.0.41": r"/doc/build/(?!changelog).*\.rst$",
}
HELD_OUT = {"sympy==1.13.3": r"/doc/src/.*\.(rst|md)$"}
CHARACTERS = 6000  # of a document at least: some 1,400 tokens


def files_of(package, pattern):
    """The texts of a source distribution's files of some names, in order."""
    with tempfile.TemporaryDirectory() as folder:
        archive = download(package, folder, "--no-binary", ":all:", "--no-build-isolation")
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


def write_documents(packages, file):
    texts = [text for package, pattern in packages.items() for text in files_of(package, pattern)]
    documents = [document for text in texts for document in documents_of(text)]
    write_text(file, "".join(json.dumps({"text": document}) + "\n" for document in documents))
    millions = sum(map(len, documents)) / 1e6
    print(f"{file}: {len(documents):,} documents, {millions:.1f} million characters")


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("out/text"))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_documents(TRAINING, args.out / "train.jsonl")
    write_documents(HELD_OUT, args.out / "held_out.jsonl")


if __name__ == "__main__":
    run_script(main)
