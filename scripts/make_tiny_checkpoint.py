"""Writes a checkpoint folder in the official layout, filled with random weights.

Why: the way from files to weights - shards, formats, .pth, tokenizer - can then be tried without a download of tens of
gigabytes. What such a model generates is noise.

How: python scripts/make_tiny_checkpoint.py FOLDER [--seed N] [--model tiny] [--shards N] [--dit-dtype float32]
Then: wan21-generate --task tiny --ckpt_dir FOLDER
"""

import argparse
import sys
from pathlib import Path

import torch

from wan21.errors import WanError
from wan21.models import MODELS, model_spec
from wan21.runtime import CpuRuntime
from wan21.weights.inspect import inspect_folder
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    """Writes the folder, checks it as a run would, and prints a table of its files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="is made if it is not there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--shards", type=int, default=1, help="files for the diffusion transformer")
    parser.add_argument("--dit-dtype", choices=sorted(DTYPES), default="float32")
    arguments = parser.parse_args()
    try:
        spec = model_spec(arguments.model)
        weights = RandomWeights(spec, arguments.seed, CpuRuntime().generator)
        files = write_folder(
            arguments.folder, spec, weights, num_shards=arguments.shards, dit_dtype=DTYPES[arguments.dit_dtype]
        )
        facts = inspect_folder(arguments.folder, spec)
    except WanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for path in files:
        print(f"{path.stat().st_size:>15,} bytes  {path.relative_to(arguments.folder)}")
    print(f"fingerprint {facts.fingerprint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
