"""
A chat template at work, in a process of its own: it is a stranger's program, and may run wild.

render() starts this file as a process, and writes it lines of JSON: a string is the template from
now on, an object the variables of a text. The answer to these is a line, too: {"text": ...} or
{"error": ...}. A rendering that takes more than SECONDS of processor time ends the process; one
that takes more than MEMORY bytes ends it, or fails, as one longer than LENGTH does. (Windows has
no limits of time and memory.) This file knows nothing else of the project, so that it starts at
once: no torch.
"""
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from datetime import datetime

import jinja2.sandbox

try:
    import resource
except ImportError:
    resource = None

SECONDS = 5
MEMORY = 2**30
LENGTH = 2**20  # of a text, in characters, besides four times that of its request


# ------------------------------------------------------------------------------------ Who asks

PROCESSES = {}  # {our process's id: the one in which its templates run}
ONE_AT_A_TIME = threading.Lock()


def render(template, variables):
    """The text that a chat template makes of its variables, all of which JSON can express. Raises
    ValueError if it fails or takes too much, TypeError or OSError if it cannot be asked."""
    request = json.dumps(variables, ensure_ascii=False)
    with ONE_AT_A_TIME:
        process = PROCESSES.get(os.getpid())
        if process is None or process.poll() is not None:
            process = PROCESSES[os.getpid()] = start_process()
        try:
            if process.template != template:
                print(json.dumps(template), file=process.stdin)
                process.template = template
            print(request, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise ValueError("it took more time or memory than a template may")
        except BaseException:  # what it answers later would be taken for the next answer
            process.kill()
            process.wait()
            raise
    answer = json.loads(answer)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]


def renew_lock():
    """For a forked process: a thread that it has not got may hold the lock."""
    global ONE_AT_A_TIME
    ONE_AT_A_TIME = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_lock)


def start_process():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    command = [sys.executable, os.path.abspath(__file__)]
    process = subprocess.Popen(command, encoding="utf-8", errors="surrogatepass", **pipes)
    process.template = None  # the one that it has been told
    return process


# ---------------------------------------------------------------------------------- Who is asked


@functools.lru_cache
def compile_template(text):
    """A chat template as transformers runs it, in jinja2's sandbox."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    sandbox.globals["raise_exception"] = raise_exception
    # {% generation %} marks what a trainer takes as the answer: here it is just its contents
    text = re.sub(r"({%[-+]?\s*)generation(?=\s*[-+]?%})", r"\1if true", text)
    text = re.sub(r"({%[-+]?\s*)endgeneration(?=\s*[-+]?%})", r"\1endif", text)
    return sandbox.from_string(text)


def limit(what, most):
    """Lower a limit of this process, where the system has it and lets us."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most, hard))


def main():
    if resource:
        limit(resource.RLIMIT_AS, MEMORY)
        limit(resource.RLIMIT_CORE, 0)
    for pipe in (sys.stdin, sys.stdout):
        pipe.reconfigure(encoding="utf-8", errors="surrogatepass")
    for line in sys.stdin:
        if resource:
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])  # user's and system's
            limit(resource.RLIMIT_CPU, int(used) + SECONDS)
        try:
            request = json.loads(line)
            if isinstance(request, str):
                template = request
                continue
            text = compile_template(template).render(request)
            if len(text) > LENGTH + 4 * len(line):
                raise ValueError("its text is too long")
            answer = {"text": text}
        except Exception as e:  # a template may raise anything
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
