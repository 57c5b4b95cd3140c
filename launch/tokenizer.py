"""Trains and evaluates a tokenizer: python -m launch.tokenizer --config=configs/tiny.py [--field=value ...]

Training a model trains the tokenizer automatically. This command also prints its bytes per token on held-out text, by
script, and, if the extra `peers` is installed, those of rustbpe with nanochat's pattern on the same text.
"""

import time

from rich.console import Console
from rich.table import Table

from jaxchat import command_line, launcher
from jaxchat.errors import UserError
from jaxchat.tokenizer import Report, load_tokenizer, report, sample
from jaxchat.tokenizer.compare import peer_bytes_per_token


def main(argv: list[str]) -> dict[str, object]:
    experiment = command_line.load(argv, description=__doc__)
    if experiment.start_from:
        stage = experiment.stage
        raise UserError(f"stage {stage} takes the tokenizer of {experiment.start}: leave :{stage} out of --config")
    from jaxchat.data import prepare

    data, cache, seed = experiment.data, experiment.cache_directory, experiment.seed
    start = time.monotonic()
    path = prepare.ensure_tokenizer_directory(data, cache, seed, launcher.log)
    seconds = time.monotonic() - start
    tokenizer = load_tokenizer(path)
    held_out = list(prepare.texts(data, "val", cache, launcher.log))
    found = report(tokenizer, held_out)
    result = {
        "vocab": tokenizer.vocab_size,
        "bytes_per_token": round(found.total.bytes_per_token, 4),
        "seconds": round(seconds, 2),
        "path": str(path),
    }
    trained_on = sample(prepare.texts(data, "train", cache, launcher.log), data.tokenizer.sample_bytes, seed=seed)
    peer = peer_bytes_per_token(trained_on, held_out, vocab=tokenizer.vocab_size)
    show(found, peer)
    return result | ({} if peer is None else {"peer_bytes_per_token": round(peer, 4)})


def show(found: Report, peer: float | None) -> None:
    """Prints the table and the warnings to standard error."""
    table = Table("script", "bytes", "bytes per token", title="held-out text")
    for name, share in [*found.scripts.items(), ("all", found.total)]:
        table.add_row(name, f"{share.bytes:,}", f"{share.bytes_per_token:.3f}")
    table.add_row("rustbpe, all", f"{found.total.bytes:,}", "not installed" if peer is None else f"{peer:.3f}")
    console = Console(stderr=True)
    console.print(table)
    for warning in found.warnings():
        console.print(f"warning: {warning}", style="yellow")


if __name__ == "__main__":
    launcher.run(main)
