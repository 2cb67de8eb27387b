"""Commands in processes that are forked from one which has everything imported: they do what the command line does, without
the seconds that each start of Python with torch takes. Signals, exit codes and files are those of a process of its own."""
import json
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path


class Forks:
    "The process that is forked from, started when it is first needed."
    def __init__(self): self.server = None

    def ask(self, *words):
        if self.server is None:
            self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True)
        self.server.stdin.write(json.dumps(words) + '\n')
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def place(self, folder: Path, env: dict):
        "Where the next commands work, and their environment."
        self.ask('place', str(folder), env)

    def start(self, words, out: Path) -> int:
        "The number of a process that runs `radiology_ai` with `words`, and writes what it says to `out`."
        return self.ask('start', list(map(str, words)), str(out))

    def ended(self, pid: int, wait: bool=False):
        "Its exit code (less than 0: the signal that ended it); None while it runs."
        return self.ask('wait' if wait else 'poll', pid)

    def run(self, *words) -> str:
        "What a command says that must succeed."
        with tempfile.TemporaryDirectory() as tmp:
            code = self.ended(self.start(words, Path(tmp)/'out'), wait=True)
            said = (Path(tmp)/'out').read_text()
        assert code==0, said
        return said

    def close(self):
        if self.server is not None: self.server.communicate()


def _command(words, out: str):
    "What the forked process does; it never returns."
    code = 1
    try:
        for fd, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
            os.dup2(os.open(name, flags), fd)
        os.dup2(1, 2)
        sys.argv[:] = ['radiology_ai', *words]
        from radiology_ai.cli import main
        try: main()
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        else: code = 0
        util._exit_function() # as a Python ends that was not forked
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)


def _serve():
    import radiology_ai.all  # noqa: F401 - the point is that it is loaded
    import radiology_ai.models.detector  # noqa: F401
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for line in sys.stdin:
        what, given, *more = json.loads(line)
        if what=='start':
            answer = os.fork()
            if not answer:
                os.setsid()
                _command(given, *more)
        elif what=='place':
            os.chdir(given)
            os.environ.clear()
            os.environ.update(more[0])
            answer = tempfile.tempdir = None
        else:
            pid, status = os.waitpid(given, 0 if what=='wait' else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


if __name__=='__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _serve()
