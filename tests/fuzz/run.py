"""make fuzz SECONDS=600: atheris looks for bytes that a reader of ours neither reads nor refuses.

    seeds and corpus --> atheris mutates what reaches new code --> target --> crash: kept in tests/fuzz/found
                                     +--keep--> the shortest of them --> corpus

One process per target, one after the other; ``tests.fuzz.test_corpus`` replays the corpus.

Source: https://github.com/google/atheris, https://llvm.org/docs/LibFuzzer.html#corpus
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tests.fuzz.targets import TARGETS, seeds

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path(__file__).parent / "found"
#: Longest input, in bytes.
MOST = 4096
#: Bytes and number of the inputs of one target that are kept.
KEPT_BYTES, KEPT = 1024, 40


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=600, type=click.IntRange(min=1), help="Of all targets together.")
@click.option("--only", default="", help=f"One of {', '.join(TARGETS)}.")
@click.option("--seed", default=1, type=click.IntRange(min=1), help="Of the mutations.")
@click.option(
    "--keep", is_flag=True, help="Put what was found to reach new code into the corpus, in place of what is there."
)
def main(seconds: int, only: str, seed: int, keep: bool) -> None:
    """Fuzz every reader of other people's bytes; fails at the first crash."""
    names = [only] if only else list(TARGETS)
    total = 0
    for name in names:
        with tempfile.TemporaryDirectory(prefix="torch-ps-fuzz-") as folder:
            work = Path(folder)
            for data in [*seeds()[name], *(file.read_bytes() for file in (CORPUS / name).glob("*"))]:
                _put(work, data)
            each = max(seconds // len(names), 1)
            executed = _executed(name, f"-max_total_time={each}", f"-seed={seed}", str(work))
            total += executed
            click.echo(f"{name}: {executed} inputs in {each} s, {len(list(work.iterdir()))} reach different code")
            if keep:
                _keep(CORPUS / name, work)
    click.echo(f"{total} inputs, no crash")


def _executed(name: str, *options: str) -> int:
    """Run one target under atheris, which puts what reaches new code into the folder; how many inputs it has tried."""
    FOUND.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.one", name, f"-max_len={MOST}", f"-artifact_prefix={FOUND}/{name}-"]
    command += ["-print_final_stats=1", "-reduce_inputs=1", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        raise click.ClickException(f"{said}\n{name}: a crash; its input is in {FOUND}")
    return int(re.findall(r"number_of_executed_units: (\d+)", done.stderr)[0])


def _keep(corpus: Path, work: Path) -> None:
    """The shortest inputs of ``work`` in place of what is there."""
    for old in corpus.glob("*"):
        old.unlink()
    corpus.mkdir(parents=True, exist_ok=True)
    inputs = sorted((file.read_bytes() for file in work.iterdir()), key=lambda data: (len(data), data))
    for data in [each for each in inputs if len(each) <= KEPT_BYTES][:KEPT]:
        _put(corpus, data)


def _put(folder: Path, data: bytes) -> None:
    Path(folder, hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


if __name__ == "__main__":
    main()
