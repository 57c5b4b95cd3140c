"""Measures speed, beside a peer in one run: python -m launch.bench train --config=configs/d4.py --peer=transformers

train, decode and rl take the October 2025 family with random weights, unless the command names another --family.
decode: --batch_sizes, with and without the cache, speculation. rl: rollouts together, a prompt and a sample at a time.
evaluate: --checkpoint=runs/d4/pretrain --tasks core:DIRECTORY, all questions and problems together and one at a time.
serve: --checkpoint=runs/tiny/rl, the server under load from another process; --quick with few requests.
gpu, tpu: everything worth measuring there within --budget_s=540, into --out=bench_gpu.json: train, attention, loss,
decode, rl, peer, sweep; or some of it with --only=train,decode
"""

import importlib
import shlex

from jaxchat import launcher
from jaxchat.errors import UserError

MODULES = {"train": "training", "decode": "decoding", "rl": "rl", "evaluate": "evaluation", "serve": "serving"}


def main(argv: list[str]) -> dict[str, object]:
    kind, kinds = argv[0] if argv else "", (*MODULES, "gpu", "tpu")
    if kind in ("-h", "--help"):
        print(f"{__doc__}\nThe options: python -m launch.bench train --help; {', '.join(kinds)}")
        raise SystemExit(0)
    if kind not in kinds:
        raise UserError(f"which benchmark? name one of {', '.join(kinds)}: python -m launch.bench train --config=...")
    from benchmarks import accelerator, options, report

    bench, arguments = options.read(kind, argv[1:], __doc__ or "")
    command = shlex.join(["python", "-m", "launch.bench", *argv])
    if kind in ("gpu", "tpu"):
        return accelerator.start(kind, bench, arguments, command)
    module = importlib.import_module(f"benchmarks.{MODULES[kind]}")
    return report.rounded(module.run(bench, arguments) | {"command": command})


if __name__ == "__main__":
    launcher.run(main)
